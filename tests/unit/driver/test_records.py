"""Records that nobody waits for: each that the disk does not take is counted, and what it takes wakes the pump."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from edge_agent.core.pump import RecordsWaiting
from edge_agent.driver.events import ForPump
from edge_agent.driver.loop import Loop
from edge_agent.driver.records import Records
from shared.errors import StorageError
from shared.telemetry import Body, Grade, Reading, RecordClass, Result
from tests.fakes.agent_world import until
from tests.fakes.clock import FakeClock
from tests.fakes.outbox import FakeOutbox

RESULT = Result(request="r", model="digits", version="1.0.0", variant="int8", rung="full")


class GroupTicket:
    """A record of a group that is committed, or fails, as one."""

    def __init__(self, group: asyncio.Future[int]) -> None:
        self._group = group

    async def durable(self) -> int:
        """What becomes of the group."""
        return await asyncio.shield(self._group)


class GroupedOutbox(FakeOutbox):
    """Only what is put: into the group that is open."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[asyncio.Future[int]] = []

    def begin(self) -> None:
        """Open another group."""
        self.groups.append(asyncio.get_running_loop().create_future())

    def put(self, body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> GroupTicket:  # type: ignore[override]
        """A place in the group that is open."""
        return GroupTicket(self.groups[-1])


def played(story: Callable[[GroupedOutbox, Records, Loop], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            loop, outbox = Loop(tasks), GroupedOutbox()
            await story(outbox, Records(clock=FakeClock(), loop=loop, outbox=outbox), loop)

    asyncio.run(run())


def test_a_group_that_fails_between_others_is_counted_in_full() -> None:
    async def story(outbox: GroupedOutbox, records: Records, loop: Loop) -> None:
        for size in (3, 5, 2):
            outbox.begin()
            for _ in range(size):
                await records.keep_soon(RESULT)
        await asyncio.sleep(0)
        outbox.groups[0].set_result(1)
        outbox.groups[1].set_exception(StorageError("input/output error"))
        outbox.groups[2].set_result(4)
        await until(lambda: records.lost == {RecordClass.RESULT: 5}, "counted")

    played(story)


def test_the_pump_is_woken_for_each_commit_and_once() -> None:
    async def story(outbox: GroupedOutbox, records: Records, loop: Loop) -> None:
        for _ in range(2):
            outbox.begin()
            for _ in range(50):
                await records.keep_soon(Reading(name="t", value=1.0))
        for group in outbox.groups:
            group.set_result(1)
            assert await loop.inbox.next() == ForPump(RecordsWaiting(RecordClass.READING))
            assert loop.inbox._queue.empty()

    played(story)


def test_losses_are_counted_by_class() -> None:
    async def story(outbox: GroupedOutbox, records: Records, loop: Loop) -> None:
        outbox.begin()
        for body in (RESULT, Reading(name="t", value=1.0), Reading(name="t", value=2.0)):
            await records.keep_soon(body)
        outbox.groups[0].set_exception(StorageError("input/output error"))
        wanted = {RecordClass.RESULT: 1, RecordClass.READING: 2}
        await until(lambda: records.lost == wanted, "counted")

    played(story)
