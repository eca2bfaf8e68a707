"""The near end of the outbox: what happened here becomes records, each with the grade that it is worth.

Rules of this file:
1. Who must know that a record is on the disk waits for it (`keep`): what was promised to an application, and events.
   All others only put it (`keep_soon`), and one task for each class sees when there is something to send.
2. A record that nobody waits for is not lost in silence: each that the disk does not take is counted; when it takes
   none, that is logged once, and once when it is over.

Not here: the far end, sending and settling (`uplink.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Sequence
from typing import Final, Protocol

from edge_agent.core.pump import Hurried, RecordsWaiting
from edge_agent.driver.events import ForPump
from edge_agent.driver.loop import Loop
from edge_agent.ports import Depth, Outbox, Ticket
from shared.clock import Clock
from shared.errors import InvalidValue, StorageError, StorageFull
from shared.telemetry import CLASS_OF, Body, Grade, RecordClass

logger = logging.getLogger(__name__)

ROOM_WITHIN_S: Final = 5.0
"""How long a record that nobody waits for waits for a disk that is behind, and at the end for the disk at all."""

ADOPT_AGAIN_S: Final = 60.0


class OldRecords(Protocol):
    """Records that an earlier version of the agent left in another place than the outbox."""

    async def oldest(self) -> Sequence[tuple[int, Body]]:
        """A few of those that are left, with their times; empty when none is."""
        ...

    async def forget(self, places: Collection[int]) -> None:
        """Delete those at these places of what `oldest` gave last."""
        ...


class Records:
    """Puts records into the outbox and wakes the pump.

    Attributes:
        lost: records that nobody waited for and that the disk did not take, by class, since the start.
    """

    def __init__(self, *, clock: Clock, loop: Loop, outbox: Outbox) -> None:
        self._clock = clock
        self._inbox, self._works = loop.inbox, loop.works
        self._outbox = outbox
        self._unsure: dict[RecordClass, deque[Ticket]] = {klass: deque() for klass in RecordClass}
        self._watched: set[RecordClass] = set()
        self._waking: set[RecordClass] = set()
        self._refused: set[RecordClass] = set()
        self.lost: dict[RecordClass, int] = {}

    async def keep(self, body: Body) -> int:
        """Put a record and return its number once it is durable; raises StorageError, InvalidValue."""
        number = await self._put(body, self._clock.wall_ms(), Grade.DURABLE).durable()
        self._wake(CLASS_OF[type(body)])
        return number

    async def keep_soon(self, body: Body, *, grade: Grade = Grade.BUFFERED, until: float | None = None) -> bool:
        """Put a record that nobody waits for.

        Args:
            body: the record.
            grade: what it is worth.
            until: how long to wait for a disk that is behind, on the event loop's clock; ROOM_WITHIN_S when None.

        Returns:
            Whether it had to wait. What the disk did not take meanwhile is lost, and counted.
        """
        klass, at_ms = CLASS_OF[type(body)], self._clock.wall_ms()
        waited = False
        try:
            try:
                ticket = self._put(body, at_ms, grade)
            except StorageFull:
                waited = True
                ticket = await self._put_patiently(body, at_ms, grade, until=until)
        except (StorageError, InvalidValue) as error:
            self._note_lost(klass, 1, error.message)
        except TimeoutError:
            self._note_lost(klass, 1, "the disk does not keep up")
        else:
            self._unsure[klass].append(ticket)
            if klass not in self._watched:
                self._watched.add(klass)
                self._works.start(("durable", klass), self._watch(klass))
        return waited

    async def flush(self) -> None:
        """Bring what was put onto the disk; raises StorageError."""
        await self._outbox.flush()

    def hurry(self) -> None:
        """Let the pump try at once what rests."""
        self._inbox.post(ForPump(Hurried()))

    async def drop(self, klass: RecordClass) -> int:
        """Give up what waits of a class and let the hub be told; returns how many. Raises InvalidValue for class 0."""
        dropped = await self._outbox.drop(klass)
        self._wake(klass)
        return dropped

    def depth(self) -> Depth:
        """How much waits."""
        return self._outbox.depth()

    async def end(self) -> None:
        """Bring what is left onto the disk, as far as it takes it in time."""
        try:
            async with asyncio.timeout(ROOM_WITHIN_S):
                await self._outbox.flush()
        except (StorageError, TimeoutError) as error:
            logger.error("the last records are not on the disk", extra={"why": str(error)})

    async def adopt(self, old: OldRecords) -> None:
        """Bring what an earlier version left into the outbox; each is deleted there once it is durable here."""
        adopted = 0
        try:
            while found := await old.oldest():
                brought = await self._bring(found)
                await old.forget(brought)
                adopted += len(brought)
                if len(brought) < len(found):
                    await asyncio.sleep(ADOPT_AGAIN_S)
        except StorageError as error:
            logger.error("old records cannot be read, the next start tries again", extra={"why": error.message})
        if adopted:
            logger.info("old records are in the outbox", extra={"records": adopted})

    async def _bring(self, found: Sequence[tuple[int, Body]]) -> Sequence[int]:
        """The places of those among these that are durable now; no other one will become it."""
        brought: list[int] = []
        tickets: list[Ticket] = []
        try:
            for at_ms, body in found:
                tickets.append(await self._put_patiently(body, at_ms, Grade.DURABLE))
        except StorageError as error:
            self._note_disk(CLASS_OF[type(body)], error.message)
        except TimeoutError:
            self._note_disk(CLASS_OF[type(body)], f"the disk took nothing for {ROOM_WITHIN_S:g} s")
        # Every one that was put is waited for: one that is not told of here would be put once more.
        for place, ticket in enumerate(tickets):
            klass = CLASS_OF[type(found[place][1])]
            try:
                await ticket.durable()
            except StorageError as error:
                self._note_disk(klass, error.message)
            else:
                brought.append(place)
                self._wake_soon(klass)
        return brought

    def _wake(self, klass: RecordClass) -> None:
        self._inbox.post(ForPump(RecordsWaiting(klass)))

    def _wake_soon(self, klass: RecordClass) -> None:
        """Wake the pump once for all that became durable together."""
        if klass not in self._waking:
            self._waking.add(klass)
            asyncio.get_running_loop().call_soon(self._wake_now, klass)

    def _wake_now(self, klass: RecordClass) -> None:
        self._waking.discard(klass)
        self._wake(klass)

    def _put(self, body: Body, at_ms: int, grade: Grade) -> Ticket:
        return self._outbox.put(body, at_ms=at_ms, grade=grade)

    async def _put_patiently(self, body: Body, at_ms: int, grade: Grade, *, until: float | None = None) -> Ticket:
        try:
            return self._put(body, at_ms, grade)
        except StorageFull:
            latest = asyncio.get_running_loop().time() + ROOM_WITHIN_S if until is None else until
            async with asyncio.timeout_at(latest):
                await self._outbox.flush()
            return self._put(body, at_ms, grade)

    async def _watch(self, klass: RecordClass) -> None:
        """See what becomes of each record of the class, until there is none of which that is not known."""
        unsure = self._unsure[klass]
        try:
            while unsure:
                try:
                    # All that are committed together are known once the first is: only that one is waited for.
                    await unsure.popleft().durable()
                except StorageError as error:
                    self._note_lost(klass, 1, error.message)
                else:
                    self._note_disk(klass, "")
                    self._wake_soon(klass)
        finally:
            self._watched.discard(klass)

    def _note_lost(self, klass: RecordClass, records: int, why: str) -> None:
        self.lost[klass] = self.lost.get(klass, 0) + records
        self._note_disk(klass, why)

    def _note_disk(self, klass: RecordClass, why: str) -> None:
        """Log that the disk takes none of a class, and that it does again, once each."""
        about = {"class": klass.name.lower()}
        if why and klass not in self._refused:
            self._refused.add(klass)
            logger.error("records are not kept", extra={**about, "why": why})
        elif not why and klass in self._refused:
            self._refused.discard(klass)
            logger.info("records are kept again", extra=about)
