"""What every outbox does, on the fake and on SQLite."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from edge_agent.adapters.database import Database
from edge_agent.adapters.outbox import SqliteOutbox
from edge_agent.ports import Outbox
from shared import limits
from shared.errors import InvalidValue, StorageFull
from shared.telemetry import Body, DeviceEvent, Outcome, Reading, Record, RecordClass, Result
from shared.wire.columns import decode_columns
from shared.wire.messages import Batch
from tests.fakes.clock import FakeClock
from tests.fakes.outbox import FakeOutbox

Story = Callable[[Outbox], Awaitable[None]]
Play = Callable[..., None]
EVENT, OUTCOME, TELEMETRY = RecordClass.EVENT, RecordClass.OUTCOME, RecordClass.TELEMETRY


@pytest.fixture(params=["fake", "sqlite"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Runs acts one after the other, each after a restart of the agent."""

    def run(*acts: Story, limit_bytes: int = 10_000_000) -> None:
        fake = FakeOutbox(limit_bytes=limit_bytes)

        async def one(act: Story) -> None:
            if request.param == "fake":
                await act(fake)
                return
            database = await Database.open(tmp_path / "agent.db", clock=FakeClock())
            try:
                await act(await SqliteOutbox.open(database, limit_bytes=limit_bytes))
            finally:
                await database.close()

        for act in acts:
            asyncio.run(one(act))

    return run


def reading(value: float) -> Reading:
    return Reading(name="cpu_temp_c", value=value)


def event(name: str = "host.lost", **detail: str) -> DeviceEvent:
    return DeviceEvent(name=name, detail=detail)


async def drained(outbox: Outbox, klass: RecordClass) -> list[Record]:
    records: list[Record] = []
    while (batch := await outbox.next_batch(klass)) is not None:
        records.extend(decode_columns(batch.columns))
        assert await outbox.settle(batch.batch)
    return records


def test_numbers_are_dense_by_class_and_bodies_come_back(play: Play) -> None:
    bodies: tuple[Body, ...] = (
        reading(1.5),
        Result(request="r1", model="digits", version="1.0.0", variant="int8", rung="full", label="7", confidence=0.9),
        Outcome(request="r1", correct=True),
        event("release.committed", version="1.0.0"),
        reading(2.5),
    )

    async def story(outbox: Outbox) -> None:
        numbers = [await outbox.put(at_ms=1000 + i, body=body) for i, body in enumerate(bodies)]
        assert numbers == [1, 2, 1, 1, 3]
        assert [record.body for record in await drained(outbox, TELEMETRY)] == [bodies[0], bodies[1], bodies[4]]
        assert await drained(outbox, OUTCOME) == [Record(seq=1, at_ms=1002, body=bodies[2])]
        assert await drained(outbox, EVENT) == [Record(seq=1, at_ms=1003, body=bodies[3])]

    play(story)


def test_the_epoch_is_sixteen_hex_digits_and_stays(play: Play) -> None:
    seen: list[str] = []

    async def look(outbox: Outbox) -> None:
        seen.append(outbox.epoch)

    play(look, look)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 16
    assert int(seen[0], 16) >= 0


def test_the_same_batch_comes_back_byte_for_byte_until_it_is_settled(play: Play) -> None:
    seen: list[Batch] = []

    async def seal(outbox: Outbox) -> None:
        for value in range(3):
            await outbox.put(at_ms=value, body=reading(value))
        batch = await outbox.next_batch(TELEMETRY)
        assert batch is not None
        seen.append(batch)
        await outbox.put(at_ms=9, body=reading(9))
        assert await outbox.next_batch(TELEMETRY) == batch

    async def again(outbox: Outbox) -> None:
        batch = await outbox.next_batch(TELEMETRY)
        assert batch == seen[0]
        assert batch.batch.digest == hashlib.sha256(batch.columns).hexdigest()
        assert (batch.batch.klass, batch.batch.first, batch.batch.last) == (2, 1, 3)
        assert batch.batch.epoch == outbox.epoch
        assert await outbox.settle(batch.batch)
        following = await outbox.next_batch(TELEMETRY)
        assert following is not None
        assert (following.batch.first, following.batch.last) == (4, 4)

    play(seal, again)


def test_an_answer_that_fits_no_open_batch_settles_nothing(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        await outbox.put(at_ms=1, body=reading(1))
        batch = await outbox.next_batch(TELEMETRY)
        assert batch is not None
        replace = msgspec.structs.replace
        for wrong in (
            replace(batch.batch, epoch="f" * 16),
            replace(batch.batch, klass=1),
            replace(batch.batch, klass=77),
            replace(batch.batch, first=0),
            replace(batch.batch, last=2),
            replace(batch.batch, digest="0" * 64),
        ):
            assert not await outbox.settle(wrong)
        assert outbox.depth().records[TELEMETRY] == 1
        assert await outbox.settle(batch.batch)
        assert not await outbox.settle(batch.batch)

    play(story)


def test_numbers_go_on_after_everything_was_settled_and_after_a_restart(play: Play) -> None:
    async def empty(outbox: Outbox) -> None:
        for value in range(4):
            await outbox.put(at_ms=1, body=reading(value))
        assert len(await drained(outbox, TELEMETRY)) == 4
        assert outbox.depth().bytes == 0

    async def on(outbox: Outbox) -> None:
        assert await outbox.next_batch(TELEMETRY) is None
        assert await outbox.put(at_ms=1, body=reading(5)) == 5

    play(empty, on)


def test_depth_is_exact_through_everything(play: Play) -> None:
    depths: list[int] = []

    async def fill(outbox: Outbox) -> None:
        assert outbox.depth().bytes == 0
        for value in range(5):
            await outbox.put(at_ms=1, body=reading(value))
        await outbox.put(at_ms=1, body=event())
        await outbox.next_batch(TELEMETRY)
        await outbox.put(at_ms=1, body=reading(6))
        assert dict(outbox.depth().records) == {EVENT: 1, OUTCOME: 0, TELEMETRY: 6}
        depths.append(outbox.depth().bytes)

    async def empty(outbox: Outbox) -> None:
        assert dict(outbox.depth().records) == {EVENT: 1, OUTCOME: 0, TELEMETRY: 6}
        assert outbox.depth().bytes == depths[0] > 0
        await drained(outbox, TELEMETRY)
        await drained(outbox, EVENT)
        assert dict(outbox.depth().records) == {EVENT: 0, OUTCOME: 0, TELEMETRY: 0}
        assert outbox.depth().bytes == 0

    play(fill, empty)


def test_batches_keep_to_the_bounds_of_the_wire(play: Play) -> None:
    async def many(outbox: Outbox) -> None:
        puts = [outbox.put(at_ms=i, body=reading(i)) for i in range(limits.MAX_BATCH_RECORDS + 7)]
        assert sorted(await asyncio.gather(*puts)) == list(range(1, limits.MAX_BATCH_RECORDS + 8))
        first = await outbox.next_batch(TELEMETRY)
        assert first is not None
        assert first.batch.last == limits.MAX_BATCH_RECORDS
        assert len(await drained(outbox, TELEMETRY)) == limits.MAX_BATCH_RECORDS + 7

    async def large(outbox: Outbox) -> None:
        bodies = [event(str(i), text=chr(97 + i) * 30_000) for i in range(15)]
        for body in bodies:
            await outbox.put(at_ms=1, body=body)
        first = await outbox.next_batch(EVENT)
        assert first is not None
        assert len(first.columns) <= limits.MAX_BATCH_BYTES
        assert [record.body for record in await drained(outbox, EVENT)] == bodies

    play(many, large)


def test_a_record_that_is_too_large_is_refused_and_takes_no_number(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        with pytest.raises(InvalidValue):
            await outbox.put(at_ms=1, body=event(text="x" * limits.MAX_RECORD_BYTES))
        assert await outbox.put(at_ms=1, body=event()) == 1

    play(story)


def test_the_oldest_telemetry_makes_room_and_the_gap_is_told(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        for value in range(400):
            await outbox.put(at_ms=1, body=reading(value))
            assert outbox.depth().bytes <= 10_000
        kept = [record.seq for record in await drained(outbox, TELEMETRY)]
        notes = [record.body for record in await drained(outbox, EVENT)]
        assert kept == list(range(kept[0], 401))
        assert len(kept) > 50
        assert notes == [
            event("queue.evicted", **{"class": "telemetry", "first": "1", "last": str(kept[0] - 1)},
                  records=str(kept[0] - 1))
        ]  # fmt: skip

    play(story, limit_bytes=10_000)


def test_a_gap_that_follows_a_sent_note_gets_a_note_of_its_own(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        for value in range(200):
            await outbox.put(at_ms=1, body=reading(value))
        (first,) = await drained(outbox, EVENT)
        for value in range(200):
            await outbox.put(at_ms=1, body=reading(value))
        (second,) = await drained(outbox, EVENT)
        assert isinstance(first.body, DeviceEvent)
        assert isinstance(second.body, DeviceEvent)
        assert int(second.body.detail["first"]) == int(first.body.detail["last"]) + 1
        assert second.seq == first.seq + 1

    play(story, limit_bytes=10_000)


def test_a_sealed_batch_is_not_dropped_for_room(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        await outbox.put(at_ms=1, body=reading(1))
        sealed = await outbox.next_batch(TELEMETRY)
        for value in range(400):
            await outbox.put(at_ms=1, body=reading(value))
        assert await outbox.next_batch(TELEMETRY) == sealed

    play(story, limit_bytes=10_000)


def test_telemetry_never_displaces_outcomes_and_events_displace_both(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        for number in range(100):
            await outbox.put(at_ms=1, body=Outcome(request=f"r{number}", correct=True))
        for value in range(300):
            await outbox.put(at_ms=1, body=reading(value))
        assert outbox.depth().records[OUTCOME] == 100
        for number in range(400):
            try:
                await outbox.put(at_ms=1, body=event(str(number)))
            except StorageFull:
                break
        else:
            raise AssertionError("400 events of 50 bytes fitted into 10 kB")
        assert outbox.depth().records[OUTCOME] == 0
        assert outbox.depth().records[TELEMETRY] == 0

    play(story, limit_bytes=10_000)


def test_telemetry_is_refused_where_only_outcomes_could_make_room(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        for number in range(100):
            await outbox.put(at_ms=1, body=event(str(number)))
        while outbox.depth().bytes + 100 < 10_000:
            await outbox.put(at_ms=1, body=Outcome(request="r", correct=True))
        before = outbox.depth()
        with pytest.raises(StorageFull):
            await outbox.put(at_ms=1, body=Reading(name="n" * 150, value=1))
        assert outbox.depth() == before

    play(story, limit_bytes=10_000)


def test_events_are_kept_to_the_last_and_then_refused(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        stored = 0
        while outbox.depth().bytes + 100 < 10_000:
            await outbox.put(at_ms=1, body=event(str(stored)))
            stored += 1
        with pytest.raises(StorageFull):
            await outbox.put(at_ms=1, body=event(text="x" * 100))
        with pytest.raises(StorageFull):
            await outbox.put(at_ms=1, body=event("again", text="x" * 100))
        records = await drained(outbox, EVENT)
        assert [record.seq for record in records] == list(range(1, stored + 1))
        assert await outbox.put(at_ms=1, body=event("after")) == stored + 1

    play(story, limit_bytes=10_000)
