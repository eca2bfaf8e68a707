"""What every store of samples and of answers does, on the fake and on SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge_agent.adapters.database import Database
from edge_agent.adapters.samples import MAX_SAMPLE_BYTES, SqliteReplies, SqliteSamples
from edge_agent.ports import RoundReplies, Sample, Samples
from shared.errors import InvalidValue
from shared.inference import TensorHead
from tests.fakes.clock import FakeClock
from tests.fakes.rounds import FakeReplies, FakeSamples

HEAD = (TensorHead(name="x", dtype="uint8", shape=(1, 4)),)
DAY_MS = 86_400_000

Story = Callable[[Samples, RoundReplies], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture(params=["fake", "sqlite"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Runs acts one after the other, each after a restart of the agent."""

    def run(*acts: Story, max_samples: int = 5, max_bytes: int = 2**20) -> None:
        samples, replies = FakeSamples(max_samples=max_samples, max_bytes=max_bytes), FakeReplies()

        async def one(act: Story) -> None:
            if request.param == "fake":
                await act(samples, replies)
                return
            database = await Database.open(tmp_path / "agent.db", clock=FakeClock())
            try:
                on_disk = SqliteSamples(database, max_samples=max_samples, max_bytes=max_bytes)
                await act(on_disk, SqliteReplies(database))
            finally:
                await database.close()

        for act in acts:
            asyncio.run(one(act))

    return run


def sample(label: str, *, size: int = 4) -> Sample:
    return Sample(label=label, inputs=HEAD, payload=label.encode().ljust(size, b"."))


async def labels(samples: Samples, family: str = "digits", *, after: int = 0, at_most: int = 256) -> list[str]:
    return [one.label for one in await samples.load(family, after=after, at_most=at_most)]


def test_samples_are_kept_in_order_over_restarts(play: Play) -> None:
    async def keep(samples: Samples, _: RoundReplies) -> None:
        assert await samples.oldest("digits") == 0
        assert [await samples.keep("digits", sample(label), at_ms=1) for label in "ab"] == [1, 2]
        assert await samples.keep("faces", sample("x"), at_ms=1) == 3

    async def read(samples: Samples, _: RoundReplies) -> None:
        first, second = await samples.load("digits")
        assert (first.number, first.label, first.inputs, first.payload) == (1, "a", HEAD, b"a...")
        assert second.number == 2
        assert await labels(samples, after=1) == ["b"]
        assert await labels(samples, at_most=1) == ["a"]
        assert await labels(samples, "faces") == ["x"]
        assert await labels(samples, "none") == []
        assert await samples.oldest("faces") == 3

    play(keep, read)


def test_the_oldest_make_room_by_count_and_only_in_their_family(play: Play) -> None:
    async def story(samples: Samples, _: RoundReplies) -> None:
        await samples.keep("faces", sample("x"), at_ms=1)
        for label in "abcdefg":
            await samples.keep("digits", sample(label), at_ms=1)
        assert await labels(samples) == list("cdefg")
        assert await samples.oldest("digits") == 4
        assert await labels(samples, "faces") == ["x"]

    play(story)


def test_the_oldest_make_room_by_bytes(play: Play) -> None:
    async def story(samples: Samples, _: RoundReplies) -> None:
        for label in "abcd":
            await samples.keep("digits", sample(label, size=1_000), at_ms=1)
        kept = await labels(samples)
        assert kept == list("abcd")[-len(kept) :]
        assert 1 <= len(kept) < 4

    play(story, max_bytes=2_500)


def test_a_number_is_never_used_twice(play: Play) -> None:
    async def drop(samples: Samples, _: RoundReplies) -> None:
        await samples.keep("digits", sample("a"), at_ms=1)
        assert await samples.keep("digits", sample("b"), at_ms=1) == 2
        assert await samples.drop("digits") == 2
        assert await samples.drop("digits") == 0

    async def keep(samples: Samples, _: RoundReplies) -> None:
        assert await labels(samples) == []
        assert await samples.keep("digits", sample("c"), at_ms=1) == 3

    play(drop, keep)


def test_a_sample_that_is_too_large_is_refused(play: Play) -> None:
    async def story(samples: Samples, _: RoundReplies) -> None:
        with pytest.raises(InvalidValue):
            await samples.keep("digits", sample("a", size=MAX_SAMPLE_BYTES + 1), at_ms=1)
        assert await labels(samples) == []

    play(story, max_bytes=MAX_SAMPLE_BYTES)


def test_answers_are_kept_until_the_runs_next_one_or_for_a_day(play: Play) -> None:
    async def keep(_: Samples, replies: RoundReplies) -> None:
        assert await replies.load("r", "m1") is None
        await replies.keep("r", "m1", b"one", at_ms=1_000)
        await replies.keep("s", "m1", b"other", at_ms=2_000)
        await replies.keep("s", "m1", b"again", at_ms=2_000)

    async def go_on(_: Samples, replies: RoundReplies) -> None:
        assert await replies.load("r", "m1") == b"one"
        assert await replies.load("s", "m1") == b"again"
        await replies.keep("r", "m2", b"two", at_ms=3_000)
        assert await replies.load("r", "m1") is None
        assert await replies.load("s", "m1") == b"again"
        await replies.keep("r", "m3", b"three", at_ms=3_000 + DAY_MS)
        assert await replies.load("s", "m1") is None
        assert await replies.load("r", "m3") == b"three"

    play(keep, go_on)
