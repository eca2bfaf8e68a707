"""A run at the hub: deadlines survive restarts, the end of the worker is noticed at once, births find their task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.rounds import frames, rules, session, tables
from cloud_hub.rounds.counts import Counts
from cloud_hub.rounds.process import WorkerLost
from cloud_hub.rounds.rules import Head, Spec
from cloud_hub.rounds.session import Session, Surroundings
from shared.clock import Clock
from shared.errors import ProtocolViolation
from shared.ids import DeviceId
from shared.wire.messages import RoundTask
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import hub_database
from tests.fakes.round_room import spec

RUN = "r-0123456789"
DEVICES = [DeviceId(f"dev-{number}") for number in range(3)]
TIMEOUT_S = 100.0


class ScriptedWorker:
    """The hub's end of a worker that is a list of frames; `die` is what a killed one does."""

    def __init__(self) -> None:
        self._said: asyncio.Queue[frames.ToHub | None] = asyncio.Queue()
        self.told: list[frames.ToWorker] = []

    def say(self, frame: frames.ToHub) -> None:
        """Ask the hub."""
        self._said.put_nowait(frame)

    def die(self) -> None:
        """End by itself."""
        self._said.put_nowait(None)

    async def send(self, frame: frames.ToWorker) -> None:
        """Take what the hub says."""
        self.told.append(frame)

    async def receive(self) -> frames.ToHub:
        """The next frame; raises WorkerLost."""
        frame = await self._said.get()
        if frame is None:
            raise WorkerLost("the run's worker ended by itself")
        return frame


class Post:
    """Keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[DeviceId, RoundTask]] = []

    async def send(self, device: DeviceId, message: Any, *, leaf: str) -> None:
        """Send it."""
        assert leaf == "round"
        self.sent.append((device, message))


class Place:
    """A session with everything around it; nothing of it is a process or a broker."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.clock = FakeClock()
        self.present = tuple(DEVICES)
        self.worker = ScriptedWorker()
        self.post = Post()
        self.folder = folder
        wanted = spec(round_timeout_s=TIMEOUT_S)
        database.write_now(
            lambda conn: tables.add_run(
                conn, RUN, spec=wanted, head=Head(features="r", width=2, classes=2), at_ms=1, actor="test"
            )
        )
        database.write_now(lambda conn: tables.bind_nodes(conn, {rules.node_of(device): device for device in DEVICES}))
        self.session = self.new_session()

    def new_session(self) -> Session:
        """What a start of the worker or of the hub makes."""

        async def present(_spec: Spec) -> tuple[DeviceId, ...]:
            return self.present

        clock: Clock = self.clock
        around = Surroundings(
            database=self.database,
            clock=clock,
            post=self.post,  # type: ignore[arg-type]
            store=None,  # type: ignore[arg-type]
            counts=Counts(Metrics()),
            present=present,
        )
        row = self.database.read_now(lambda conn: tables.find_run(conn, RUN))
        assert row is not None
        return Session(row, worker=self.worker, folder=self.folder, around=around)  # type: ignore[arg-type]

    def ask(self, number: int = 1, *, devices: list[DeviceId] | None = None) -> list[str]:
        """Have the worker ask; returns the tasks' names, by device."""
        nodes = [rules.node_of(device) for device in devices or DEVICES]
        names = [rules.message_of(RUN, number=number, phase="train", attempt=1, node=node) for node in nodes]
        tasks = tuple(frames.Task(message=name, node=node, content=0) for name, node in zip(names, nodes, strict=True))
        self.worker.say(frames.Ask(round=number, phase="train", attempt=1, tasks=tasks, contents=(b"task",)))
        return names

    async def until_sent(self, count: int) -> list[tuple[DeviceId, RoundTask]]:
        """What was sent, once it is so much."""
        async with asyncio.timeout(20):
            while len(self.post.sent) < count:
                await asyncio.sleep(0.001)
        return self.post.sent

    async def until_told(self, kind: type[Any]) -> None:
        """Wait until the worker was told this."""
        async with asyncio.timeout(20):
            while not any(isinstance(frame, kind) for frame in self.worker.told):
                await asyncio.sleep(0.001)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with hub_database(tmp_path) as database:
        yield Place(database, tmp_path)


@asynccontextmanager
async def serving(one: Session) -> AsyncIterator[asyncio.Task[Any]]:
    """The session's loop, ended with the block."""
    async with asyncio.timeout(40), asyncio.TaskGroup() as group:
        task = group.create_task(_outcome(one))
        yield task
        task.cancel()


async def _outcome(one: Session) -> Any:
    try:
        return await one.serve()
    except (WorkerLost, ProtocolViolation, session.RunFailed) as error:
        return error


def test_a_restart_gives_a_round_what_is_left_of_its_time_and_not_all_of_it(place: Place) -> None:
    async def work() -> None:
        place.ask()
        async with serving(place.session):
            first = await place.until_sent(3)
        assert {task.deadline_ms for _, task in first} == {100_000}
        place.clock.wall += 60_000
        place.clock.mono += 5_000
        place.ask()
        async with serving(place.new_session()):
            again = (await place.until_sent(6))[3:]
        assert {task.deadline_ms for _, task in again} == {40_000}

    asyncio.run(work())


def test_a_round_whose_time_is_over_at_a_restart_waits_for_what_devices_have_and_then_closes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "GRACE_S", 0.2)

    async def work() -> None:
        place.ask()
        async with serving(place.session):
            await place.until_sent(3)
        place.clock.wall += 3_600_000
        place.ask()
        async with serving(place.new_session()):
            again = (await place.until_sent(6))[3:]
            assert {task.deadline_ms for _, task in again} == {200}
            await place.until_told(frames.Closed)

    asyncio.run(work())


def test_a_clock_that_was_set_back_does_not_lengthen_a_round(place: Place) -> None:
    async def work() -> None:
        place.ask()
        async with serving(place.session):
            await place.until_sent(3)
        place.clock.wall -= 3_600_000
        place.ask()
        async with serving(place.new_session()):
            again = (await place.until_sent(6))[3:]
        assert {task.deadline_ms for _, task in again} == {100_000}

    asyncio.run(work())


def test_the_end_of_the_worker_is_noticed_while_answers_are_awaited(place: Place) -> None:
    async def work() -> None:
        place.ask()
        async with serving(place.session) as task:
            await place.until_sent(3)
            place.worker.die()
            assert isinstance(await task, WorkerLost)

    asyncio.run(work())


def test_the_end_of_the_worker_is_noticed_while_devices_are_awaited(place: Place) -> None:
    async def work() -> None:
        place.present = ()
        place.worker.say(frames.Gather(round=1, phase="train", attempt=1))
        async with serving(place.session) as task:
            await asyncio.sleep(0.05)
            assert not task.done()
            place.worker.die()
            assert isinstance(await task, WorkerLost)

    asyncio.run(work())


def test_a_worker_that_asks_while_it_is_to_wait_has_lost_its_place(place: Place) -> None:
    async def work() -> None:
        place.ask()
        async with serving(place.session) as task:
            await place.until_sent(3)
            place.ask()
            assert isinstance(await task, ProtocolViolation)

    asyncio.run(work())


def test_a_run_that_was_stopped_meanwhile_asks_nobody(place: Place) -> None:
    async def work() -> None:
        await place.database.write(lambda conn: tables.set_state(conn, RUN, "stopped", at_ms=2))
        place.ask()
        async with serving(place.session) as task:
            assert isinstance(await task, session.RunFailed)
        assert place.post.sent == []

    asyncio.run(work())


def test_a_birth_brings_a_device_its_own_task_again_and_nothing_else(place: Place) -> None:
    async def work() -> None:
        names = place.ask()
        async with serving(place.session):
            await place.until_sent(3)
            for device in (DeviceId("stranger"), DEVICES[1], DeviceId("another")):
                place.session.born(device)
            again = (await place.until_sent(4))[3:]
            assert [(device, task.message) for device, task in again] == [(DEVICES[1], names[1])]
            assert place.session._news.empty()

    asyncio.run(work())


def test_answers_are_handed_over_and_the_question_is_closed_when_all_are_here(place: Place) -> None:
    async def work() -> None:
        names = place.ask()
        async with serving(place.session):
            await place.until_sent(3)
            for name in names:
                await place.database.write(
                    lambda conn, name=name: tables.set_reply(  # type: ignore[misc]
                        conn, name, content=name.encode(), file="", length=1, at_ms=2
                    )
                )
                place.session.replied(name)
            await place.until_told(frames.Closed)
        assert [frame for frame in place.worker.told if isinstance(frame, frames.Reply)] == [
            frames.Reply(message=name, content=name.encode()) for name in names
        ]

    asyncio.run(work())
