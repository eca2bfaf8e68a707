"""Uploads of answers: one for each task, on the disk as they come, bounded in time and number, and no stray files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud_hub.ground import arrivals
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import Throttled
from cloud_hub.ground.system import SystemClock
from cloud_hub.rounds import inbox as inbox_room
from cloud_hub.rounds import rules, tables
from cloud_hub.rounds.counts import Counts
from cloud_hub.rounds.inbox import Inbox
from cloud_hub.rounds.rules import Head
from shared.errors import Conflict, OutriderError, TransferCorrupt
from shared.ids import DeviceId
from shared.wire.messages import RoundReply
from tests.fakes.hub_parts import envelope_of, hub_database
from tests.fakes.round_room import spec

RUN = "r-0123456789"
DEVICE = DeviceId("dev-1")
MESSAGES = [f"{RUN}-1t1-{number:016x}" for number in range(1, 5)]


class Pieces:
    """A body that comes as it is let."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.asked = 0

    def give(self, *parts: bytes | Exception | None) -> None:
        """Let these come; None is the end, an error is what breaks it off."""
        for part in parts:
            self._parts.put_nowait(part)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.asked += 1
            part = await self._parts.get()
            if part is None:
                return
            if isinstance(part, Exception):
                raise part
            yield part

    async def until_asked(self, times: int) -> None:
        """Wait until the hub wants so many pieces: it has dealt with those before."""
        async with asyncio.timeout(20):
            while self.asked < times:
                await asyncio.sleep(0.001)


class Place:
    """An inbox over a database with a run and a task for each message."""

    def __init__(self, root: Path, database: Database) -> None:
        self.folder = root / RUN
        self.folder.mkdir(parents=True)
        self.database = database
        self.told: list[str] = []
        self.inbox = Inbox(
            root,
            database=database,
            clock=SystemClock(),
            counts=Counts(Metrics()),
            tell=lambda _run, message: self.told.append(message),
        )

        def work(conn: Any) -> None:
            tables.add_run(conn, RUN, spec=spec(), head=Head(features="r", width=2, classes=2), at_ms=1, actor="test")
            tables.add_tasks(conn, RUN, "1t1", {m: (n, DEVICE) for n, m in enumerate(MESSAGES)}, number=1, at_ms=1)

        database.write_now(work)

    async def upload(self, pieces: Pieces, *, length: int, message: str = MESSAGES[0]) -> bool | str:
        """Whether it was new, or the code of the refusal."""
        try:
            return await self.inbox.upload(DEVICE, run=RUN, message=message, length=length, pieces=pieces)
        except OutriderError as error:
            return error.code

    def files(self) -> dict[str, bytes]:
        """What lies in the run's folder, by the ends of names."""
        return {path.suffix: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with hub_database(tmp_path) as database:
        yield Place(tmp_path / "rounds", database)


def story(work: Callable[[asyncio.TaskGroup], Awaitable[None]]) -> None:
    async def go() -> None:
        async with asyncio.timeout(40), asyncio.TaskGroup() as group:
            await work(group)

    asyncio.run(go())


def test_an_upload_is_on_the_disk_as_it_comes_and_is_not_gathered_in_memory(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "BUFFER_BYTES", 1000)

    async def work(group: asyncio.TaskGroup) -> None:
        pieces = Pieces()
        upload = group.create_task(place.upload(pieces, length=5000))
        pieces.give(*[bytes([number]) * 1000 for number in range(4)])
        await pieces.until_asked(5)
        assert place.files() == {".part": b"".join(bytes([number]) * 1000 for number in range(4))}
        pieces.give(b"x" * 1000, None)
        assert await upload is True
        assert place.told == [MESSAGES[0]]
        assert list(place.files()) == [".reply"]

    story(work)


def test_a_second_upload_of_the_same_answer_is_refused_while_the_first_runs(place: Place) -> None:
    async def work(group: asyncio.TaskGroup) -> None:
        first, second = Pieces(), Pieces()
        upload = group.create_task(place.upload(first, length=4))
        first.give(b"ab")
        await first.until_asked(2)
        assert await place.upload(second, length=4) == "conflict.uploading"
        assert second.asked == 0
        first.give(TransferCorrupt("broken off"))
        assert await upload == "transfer.corrupt"
        assert place.files() == {}
        second.give(b"abcd", None)
        assert await place.upload(second, length=4) is True
        assert place.files() == {".reply": b"abcd"}

    story(work)


def test_an_upload_that_comes_second_leaves_no_file(place: Place) -> None:
    async def work(group: asyncio.TaskGroup) -> None:
        pieces = Pieces()
        upload = group.create_task(place.upload(pieces, length=4))
        pieces.give(b"ab")
        await pieces.until_asked(2)
        reply = RoundReply(run=RUN, message=MESSAGES[0], content=b"by message")
        await place.inbox.replied(DEVICE, envelope_of(reply, device=DEVICE), reply)
        pieces.give(b"cd", None)
        assert await upload is False
        assert place.files() == {}
        assert place.told == [MESSAGES[0]]

    story(work)


def test_an_upload_that_drips_is_ended(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "BEGINNING_S", 0.2)
    monkeypatch.setattr(arrivals, "SLOWEST_BYTES_S", 10**9)

    async def drip() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b"x"

    async def work(_group: asyncio.TaskGroup) -> None:
        with pytest.raises(TransferCorrupt, match="had not arrived"):
            await place.inbox.upload(DEVICE, run=RUN, message=MESSAGES[0], length=10**6, pieces=drip())
        assert place.files() == {}

    story(work)


def test_only_so_many_uploads_run_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_room, "MAX_UPLOADS", 2)

    async def work(group: asyncio.TaskGroup) -> None:
        several = [Pieces() for _ in range(3)]
        uploads = [
            group.create_task(place.upload(pieces, length=1, message=message))
            for pieces, message in zip(several[:2], MESSAGES[:2], strict=True)
        ]
        for pieces in several[:2]:
            await pieces.until_asked(1)
        with pytest.raises(Throttled):
            await place.inbox.upload(DEVICE, run=RUN, message=MESSAGES[2], length=1, pieces=several[2])
        for pieces in several:
            pieces.give(b"x", None)
        assert [await upload for upload in uploads] == [True, True]
        assert await place.upload(several[2], length=1, message=MESSAGES[2]) is True

    story(work)


@pytest.mark.parametrize(("length", "given"), [(4, b"abc"), (4, b"abcde")], ids=["too few", "too many"])
def test_what_is_not_as_long_as_announced_is_not_kept(place: Place, length: int, given: bytes) -> None:
    async def work(_group: asyncio.TaskGroup) -> None:
        pieces = Pieces()
        pieces.give(given, None)
        assert await place.upload(pieces, length=length) == "transfer.corrupt"
        assert place.files() == {}
        assert place.told == []

    story(work)


def test_a_run_that_has_ended_meanwhile_takes_nothing(place: Place) -> None:
    async def work(group: asyncio.TaskGroup) -> None:
        pieces = Pieces()
        upload = group.create_task(place.upload(pieces, length=2))
        pieces.give(b"a")
        await pieces.until_asked(2)
        await place.database.write(lambda conn: tables.close_tasks(conn, RUN))
        pieces.give(b"b", None)
        assert await upload is False
        assert place.files() == {}
        with pytest.raises(Conflict):
            await place.inbox.upload(DEVICE, run=RUN, message=MESSAGES[0], length=2, pieces=Pieces())

    story(work)


@pytest.mark.parametrize("ended", [False, True], ids=["rounds later", "after the run"])
def test_an_answer_to_a_task_that_is_forgotten_is_late_and_no_violation(place: Place, ended: bool) -> None:
    """Its row is gone: its name, its device and how far the run has come say what it was."""
    mine = rules.message_of(RUN, number=2, phase="train", attempt=1, node=rules.node_of(DEVICE))
    future = rules.message_of(RUN, number=4, phase="train", attempt=1, node=rules.node_of(DEVICE))
    others = rules.message_of(RUN, number=2, phase="train", attempt=1, node=rules.node_of(DeviceId("dev-2")))

    async def answer(message: str) -> str:
        reply = RoundReply(run=RUN, message=message, content=b"x")
        try:
            await place.inbox.replied(DEVICE, envelope_of(reply, device=DEVICE), reply)
        except OutriderError as error:
            return error.code
        return "taken or late"

    async def work(_group: asyncio.TaskGroup) -> None:
        def go_on(conn: Any) -> None:
            conn.execute(tables.round_runs.update().values(round=3))
            tables.drop_tasks(conn, RUN)
            if ended:
                tables.set_state(conn, RUN, "stopped", at_ms=2)

        await place.database.write(go_on)
        assert await answer(mine) == "taken or late"
        assert await answer(others) == "protocol.unexpected"
        assert await answer(future) == ("taken or late" if ended else "protocol.unexpected")
        for nonsense in (f"{RUN}-", f"{RUN}-2t1-xyz", f"{RUN}-2q1-{rules.node_of(DEVICE):016x}", "", "r-other-1t1-1"):
            assert await answer(nonsense) == "protocol.unexpected"
        assert await place.upload(Pieces(), length=1, message=mine) == "conflict.round_over"
        assert await place.upload(Pieces(), length=1, message=others) == "not_found.round_task"
        assert place.told == []

    story(work)
