"""The outbox without a thread and without files: the real record store on a disk in memory."""

from __future__ import annotations

import itertools

from edge_agent.adapters.buried import Buried
from edge_agent.adapters.journal import Journal
from edge_agent.adapters.records import RecordStore, encode_record
from edge_agent.core.journal import Moment, bounds_for
from edge_agent.ports import Depth
from shared.errors import OutriderError
from shared.limits import MIB
from shared.telemetry import CLASS_OF, BatchId, Body, Grade, RecordClass
from shared.wire.messages import Batch
from tests.fakes.memory_disk import MemoryDisk


class KeptTicket:
    """A ticket for what was stored, or refused, when it was put."""

    def __init__(self, *, number: int = 0, error: OutriderError | None = None) -> None:
        self._number = number
        self._error = error

    async def durable(self) -> int:
        """The number, or the error, at once."""
        if self._error is not None:
            raise self._error
        return self._number


class FakeOutbox:
    """`edge_agent.ports.Outbox`; whatever its grade, a record is stored when it is put. `restart` opens it anew."""

    def __init__(self, *, total_bytes: int = MIB, disk: MemoryDisk | None = None) -> None:
        self.disk = disk or MemoryDisk()
        self.aside = MemoryDisk()
        self.grades: list[Grade] = []
        self._bounds = bounds_for(total_bytes)
        self._seeds = itertools.count(1)
        self._uptime_ms = 0
        self._store = self._open()

    def restart(self) -> None:
        """As a new process finds it."""
        self._store.close(self._moment())
        self._store = self._open()

    @property
    def epoch(self) -> str:
        """The store's."""
        return self._store.epoch

    def put(self, body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> KeptTicket:
        """Store it now."""
        self.grades.append(grade)
        entry = (at_ms, encode_record(body))
        try:
            return KeptTicket(number=self._store.append(CLASS_OF[type(body)], [entry], moment=self._moment()))
        except OutriderError as error:
            return KeptTicket(error=error)

    async def load(self, klass: RecordClass, *, after: int = 0) -> Batch | None:
        """The store's."""
        return self._store.load(klass, after=after, moment=self._moment())

    async def settle(self, batch: BatchId) -> bool:
        """The store's."""
        settled = self._store.settle(batch)
        self._store.tick(self._moment())
        return settled

    async def bury(self, batch: BatchId, *, reason: str) -> bool:
        """The store's."""
        return self._store.bury(batch, reason=reason, moment=self._moment())

    async def flush(self) -> None:
        """Nothing waits."""

    async def drop(self, klass: RecordClass) -> int:
        """The store's."""
        return self._store.drop(klass, moment=self._moment())

    def depth(self) -> Depth:
        """The store's."""
        return self._store.depth(self._moment())

    async def close(self) -> None:
        """The disk stays."""
        self._store.close(self._moment())

    def _open(self) -> RecordStore:
        journal = Journal.open(self.disk, self._bounds, moment=self._moment(), draw=self._draw)
        return RecordStore(journal, buried=Buried(self.aside, most_bytes=MIB))

    def _draw(self, size: int) -> bytes:
        return next(self._seeds).to_bytes(size, "big")

    def _moment(self) -> Moment:
        self._uptime_ms += 1
        return Moment(boot="fake", uptime_ms=self._uptime_ms, wall_ms=0, synchronised=False)
