"""Records that wait for the hub, as `edge_agent.ports.Outbox`: a thread around the record store.

Rules of this file:
1. One thread owns the store; what is put is collected and committed together, one write and one sync for all that wait
   of a class. A ticket is kept after that sync.
2. What is put is held in memory within a bound, and refused beyond it: a disk that is too slow is the caller's matter.
3. Whatever goes wrong in the thread is told to whoever waits for it.

Not here: batches (`records.py`), files and their order (`journal.py`), when to send (`edge_agent/core/pump.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from edge_agent.adapters.buried import Buried
from edge_agent.adapters.disk import PosixDisk
from edge_agent.adapters.journal import Journal
from edge_agent.adapters.records import RecordStore, encode_record
from edge_agent.core.frames import Entry
from edge_agent.core.journal import JournalBounds, Moment
from edge_agent.ports import Depth, Disk
from shared import limits
from shared.clock import Clock
from shared.errors import OutriderError, StorageError, StorageFull
from shared.telemetry import CLASS_OF, BatchId, Body, Grade, RecordClass
from shared.wire.messages import Batch

logger = logging.getLogger(__name__)

T = TypeVar("T")

MEMORY_MS: Final = 30_000
GROUP_BYTES: Final = 64 * limits.KIB
"""So much of one class is committed without waiting for more; a quarter of a segment, where that is less: a commit lies
in one segment, with what frames add to small records."""
MAX_PENDING_BYTES: Final = 2 * limits.MIB
TICK_MS: Final = 1_000
IDLE_MS: Final = 60_000
CLOSE_WITHIN_S: Final = 10.0


@dataclass(slots=True, eq=False)
class _Group:
    """Records of a class that will be committed together, and the number of the first of them once they are."""

    klass: RecordClass
    due_ms: int
    done: asyncio.Future[int]
    entries: list[Entry] = field(default_factory=list)
    size: int = 0


@dataclass(slots=True, eq=False)
class _Call:
    """Something for the thread to do between commits."""

    work: Callable[[], Any]
    done: asyncio.Future[Any]
    flushes: bool = False


_Outcome = tuple[asyncio.Future[Any] | None, Any, OutriderError | None]


class JournalTicket:
    """`edge_agent.ports.Ticket`: a place in a group."""

    __slots__ = ("_group", "_index")

    def __init__(self, group: _Group, index: int) -> None:
        self._group = group
        self._index = index

    async def durable(self) -> int:
        """Wait until the record is on the disk and return its number; raises StorageFull or StorageError."""
        return await asyncio.shield(self._group.done) + self._index


class JournalOutbox:
    """`Outbox` on a directory. Made by `open`; `close` commits what waits and ends the thread."""

    def __init__(
        self, store: RecordStore, *, clock: Clock, moments: Callable[[], Moment], flush_ms: int, group_bytes: int
    ) -> None:
        self._store = store
        self._clock = clock
        self._moments = moments
        self._flush_ms = flush_ms
        self._group_bytes = group_bytes
        self._loop = asyncio.get_running_loop()
        self._ready = threading.Condition()
        self._groups: deque[_Group] = deque()
        self._open: dict[RecordClass, _Group] = {}
        self._calls: deque[_Call] = deque()
        self._pending_bytes = 0
        self._closing = False
        self._failing = False
        self._depth = store.depth(moments()), clock.mono_ms()
        # A daemon thread: an interpreter that ends without `close` (a crash elsewhere) must not hang on it.
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    @classmethod
    async def open(
        cls,
        directory: Path,
        *,
        bounds: JournalBounds,
        clock: Clock,
        moments: Callable[[], Moment],
        flush_ms: int = 200,
        draw: Callable[[int], bytes] = secrets.token_bytes,
    ) -> JournalOutbox:
        """Open or make the store in this directory.

        Args:
            directory: made if it is missing; for this outbox alone.
            bounds: how large it may become.
            clock: for the time until a commit.
            moments: all of the machine's clocks, for the time to live.
            flush_ms: how long a BUFFERED record may wait for its commit.
            draw: random bytes.

        Raises:
            StorageError: the directory cannot be used; StorageFull when there is no room for a new store.
        """

        def work() -> RecordStore:
            try:
                disk: Disk = PosixDisk(directory)
                aside = Buried(PosixDisk(directory / "buried"), most_bytes=min(4 * limits.MIB, bounds.total_bytes // 8))
            except OSError as error:
                raise StorageError(f"{directory} cannot be used: {error.strerror}") from error
            return RecordStore(Journal.open(disk, bounds, moment=moments(), draw=draw), buried=aside)

        store = await asyncio.to_thread(work)
        group_bytes = min(GROUP_BYTES, bounds.segment_bytes // 4)
        return cls(store, clock=clock, moments=moments, flush_ms=flush_ms, group_bytes=group_bytes)

    @property
    def epoch(self) -> str:
        """16 hex digits, drawn when this store was created."""
        return self._store.epoch

    # Putting

    def put(self, body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> JournalTicket:
        """Append a record to its class; returns at once. Raises InvalidValue, StorageFull, StorageError when closed."""
        data = encode_record(body)
        klass = CLASS_OF[type(body)]
        due_ms = 0
        if grade is not Grade.DURABLE:
            due_ms = self._clock.mono_ms() + (self._flush_ms if grade is Grade.BUFFERED else MEMORY_MS)
        with self._ready:
            if self._closing:
                raise StorageError("the outbox is closed", code="storage.closed")
            if self._pending_bytes + len(data) > MAX_PENDING_BYTES:
                raise StorageFull(
                    "the disk is slower than what is to be kept", code="storage.behind", hint="put fewer records"
                )
            group = self._open.get(klass)
            if group is None or group.size + len(data) > self._group_bytes:
                group = self._begin(klass, due_ms)
            elif due_ms < group.due_ms:
                group.due_ms = due_ms
                self._ready.notify()
            group.entries.append((at_ms, data))
            group.size += len(data)
            self._pending_bytes += len(data)
            return JournalTicket(group, len(group.entries) - 1)

    def _begin(self, klass: RecordClass, due_ms: int) -> _Group:
        full = self._open.get(klass)
        if full is not None:
            full.due_ms = 0
        group = _Group(klass=klass, due_ms=due_ms, done=self._loop.create_future())
        # Nobody may wait for a buffered record: what became of it is told in the depth.
        group.done.add_done_callback(_look_at)
        self._groups.append(group)
        self._open[klass] = group
        self._ready.notify()
        return group

    # Sending

    async def load(self, klass: RecordClass, *, after: int = 0) -> Batch | None:
        """The oldest batch or gap of the class that is not settled and begins above `after`; raises StorageError."""
        return await self._call(lambda: self._store.load(klass, after=after, moment=self._moments()))

    async def settle(self, batch: BatchId) -> bool:
        """Let go of what the hub acknowledged; False for what is not open. Raises StorageError."""
        return await self._call(lambda: self._store.settle(batch))

    async def bury(self, batch: BatchId, *, reason: str) -> bool:
        """Put aside a batch that will never be taken, with the reason, and settle it; raises StorageError."""
        return await self._call(lambda: self._store.bury(batch, reason=reason, moment=self._moments()))

    async def drop(self, klass: RecordClass) -> int:
        """Drop the class's waiting records, leaving a gap; returns how many.

        Raises:
            InvalidValue: class 0, which is never dropped.
            StorageError: the disk refused.
        """
        return await self._call(lambda: self._store.drop(klass, moment=self._moments()), flushes=True)

    async def flush(self) -> None:
        """Return once everything that was put before is on the disk; raises StorageError for what could not be."""
        with self._ready:
            waiting = list(self._groups)
        await self._call(_nothing, flushes=True)
        for group in waiting:
            await group.done

    def depth(self) -> Depth:
        """How much waits, exact as of the last commit; what waits has grown older since."""
        depth, at_ms = self._depth
        elapsed_ms = max(0, self._clock.mono_ms() - at_ms)
        older = {klass: age_ms + elapsed_ms for klass, age_ms in depth.oldest_ms.items()}
        return msgspec.structs.replace(depth, oldest_ms=older)

    async def close(self) -> None:
        """Commit what waits, end the thread, close the files. Safe to call twice.

        Raises:
            StorageError: the disk did not answer in time; the thread is left to it.
        """
        with self._ready:
            self._closing = True
            self._ready.notify()
        await asyncio.to_thread(self._thread.join, CLOSE_WITHIN_S)
        if self._thread.is_alive():
            raise StorageError("the disk does not answer", code="storage.stalled", hint="look at the system's log")

    async def _call(self, work: Callable[[], T], *, flushes: bool = False) -> T:
        done: asyncio.Future[T] = self._loop.create_future()
        with self._ready:
            if self._closing:
                raise StorageError("the outbox is closed", code="storage.closed")
            self._calls.append(_Call(work=work, done=done, flushes=flushes))
            self._ready.notify()
        return await done

    # The thread

    def _run(self) -> None:
        is_last = False
        while not is_last:
            groups, calls, is_last = self._next()
            results = [self._attempt(group.done, partial(self._commit, group)) for group in groups]
            results += [self._attempt(call.done, call.work) for call in calls]
            # What is due and failed is tried again in a second; nothing is lost by a cursor that was not written.
            _, _, error = self._attempt(None, self._tick)
            self._note(error)
            self._tell(results)
        self._attempt(None, lambda: self._store.close(self._moments()))

    def _tick(self) -> None:
        moment = self._moments()
        try:
            self._store.tick(moment)
        finally:
            self._depth = self._store.depth(moment), self._clock.mono_ms()

    def _next(self) -> tuple[list[_Group], list[_Call], bool]:
        """Wait until something is due, and take it."""
        with self._ready:
            while True:
                now_ms = self._clock.mono_ms()
                everything = self._closing or any(call.flushes for call in self._calls)
                groups = [group for group in self._groups if everything or group.due_ms <= now_ms]
                if groups or self._calls or self._closing:
                    break
                due_ms = min((group.due_ms for group in self._groups), default=now_ms + IDLE_MS)
                wait_ms = min(due_ms - now_ms, TICK_MS if self._store.is_dirty else IDLE_MS)
                # Nothing happened for so long: the store has its own things to do.
                if not self._ready.wait(wait_ms / 1000) and wait_ms >= TICK_MS:
                    break
            for group in groups:
                self._groups.remove(group)
                self._pending_bytes -= group.size
                if self._open.get(group.klass) is group:
                    del self._open[group.klass]
            calls = list(self._calls)
            self._calls.clear()
            return groups, calls, self._closing

    def _attempt(self, done: asyncio.Future[Any] | None, work: Callable[[], Any]) -> _Outcome:
        try:
            return done, work(), None
        except OutriderError as error:
            return done, None, error
        except Exception as error:
            # A defect here must reach those who wait: a thread that ends would leave them waiting for ever.
            logger.exception("the outbox has a defect")
            return done, None, StorageError(f"the outbox failed: {error!r}", code="storage.defect")

    def _note(self, error: OutriderError | None) -> None:
        """Log that the store's own writing fails, and that it works again, once each."""
        if (error is not None) is not self._failing:
            self._failing = error is not None
            if error is not None:
                logger.error("the outbox cannot be written", extra={"code": error.code, "why": error.message})
            else:
                logger.info("the outbox is written again")

    def _tell(self, results: list[_Outcome]) -> None:
        # The loop may have been closed while its last work was under way; nobody is left to be told then.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_resolve, results)

    def _commit(self, group: _Group) -> int:
        return self._store.append(group.klass, group.entries, moment=self._moments())


def _resolve(results: list[_Outcome]) -> None:
    for done, value, error in results:
        if done is None or done.cancelled():
            continue
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(value)


def _look_at(done: asyncio.Future[int]) -> None:
    """Take note of a failure that nobody waits for, so that asyncio need not report it."""
    if not done.cancelled():
        done.exception()


def _nothing() -> None:
    return None
