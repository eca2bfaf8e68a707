"""The outbox in memory: the same numbers, batches, bounds and gap notes as the real one, without a disk."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import msgspec

from edge_agent.adapters.outbox import CLASS_SHARES, NOTE_BYTES, RECORD_OVERHEAD_BYTES
from edge_agent.ports import Depth
from shared import limits
from shared.errors import InvalidValue, StorageFull
from shared.telemetry import CLASS_OF, BatchId, Body, DeviceEvent, Record, RecordClass
from shared.wire.columns import encode_columns
from shared.wire.messages import Batch


def _cost(body: Body) -> int:
    return len(msgspec.msgpack.encode(body)) + RECORD_OVERHEAD_BYTES


@dataclass
class _Lane:
    next_seq: int = 1
    waiting: list[Record] = field(default_factory=list)
    sealed: Batch | None = None

    def records(self) -> int:
        sealed = self.sealed.batch.last - self.sealed.batch.first + 1 if self.sealed else 0
        return len(self.waiting) + sealed

    def bytes(self) -> int:
        sealed = len(self.sealed.columns) + RECORD_OVERHEAD_BYTES if self.sealed else 0
        return sum(_cost(record.body) for record in self.waiting) + sealed


class FakeOutbox:
    """`edge_agent.ports.Outbox` without a disk; passing it to a new owner is a restart."""

    def __init__(self, *, limit_bytes: int, epoch: str = "00000000000000aa") -> None:
        self._limit_bytes = limit_bytes
        self._epoch = epoch
        self._lanes = {klass: _Lane() for klass in RecordClass}

    @property
    def epoch(self) -> str:
        """As given."""
        return self._epoch

    async def put(self, *, at_ms: int, body: Body) -> int:
        """Append a record, dropping older and less precious ones where there is no room."""
        if len(msgspec.msgpack.encode(body)) > limits.MAX_RECORD_BYTES:
            raise InvalidValue("record too large", code="invalid.record")
        klass = CLASS_OF[type(body)]
        lane = self._lanes[klass]
        over_class = lane.bytes() + _cost(body) - int(self._limit_bytes * CLASS_SHARES[klass])
        if over_class > 0 and klass is not RecordClass.EVENT:
            self._evict(klass, need=over_class + NOTE_BYTES, at_ms=at_ms)
        for victim in (RecordClass.TELEMETRY, RecordClass.OUTCOME):
            over = self.depth().bytes + _cost(body) - self._limit_bytes
            if over > 0 and victim >= klass:
                self._evict(victim, need=over + NOTE_BYTES, at_ms=at_ms)
        if self.depth().bytes + _cost(body) > self._limit_bytes:
            raise StorageFull("the queue is full")
        return self._append(klass, at_ms=at_ms, body=body)

    async def next_batch(self, klass: RecordClass) -> Batch | None:
        """The sealed batch, or the oldest records sealed now."""
        lane = self._lanes[klass]
        if lane.sealed is None and lane.waiting:
            records = lane.waiting[: limits.MAX_BATCH_RECORDS]
            while len(columns := encode_columns(records)) > limits.MAX_BATCH_BYTES:
                records = records[: len(records) // 2]
            identity = BatchId(
                epoch=self._epoch,
                klass=int(klass),
                first=records[0].seq,
                last=records[-1].seq,
                digest=hashlib.sha256(columns).hexdigest(),
            )
            lane.sealed = Batch(batch=identity, columns=columns)
            lane.waiting = lane.waiting[len(records) :]
        return lane.sealed

    async def settle(self, batch: BatchId) -> bool:
        """Forget the batch."""
        for lane in self._lanes.values():
            if lane.sealed is not None and lane.sealed.batch == batch:
                lane.sealed = None
                return True
        return False

    def depth(self) -> Depth:
        """How much waits."""
        return Depth(
            records={klass: lane.records() for klass, lane in self._lanes.items()},
            bytes=sum(lane.bytes() for lane in self._lanes.values()),
        )

    async def drop(self, klass: RecordClass, *, at_ms: int) -> int:
        """Drop the class's unsealed records."""
        if klass is RecordClass.EVENT:
            raise InvalidValue("events are never dropped", code="invalid.class")
        count = len(self._lanes[klass].waiting)
        self._evict(klass, need=2**62, at_ms=at_ms)
        return count

    def _append(self, klass: RecordClass, *, at_ms: int, body: Body) -> int:
        lane = self._lanes[klass]
        lane.waiting.append(Record(seq=lane.next_seq, at_ms=at_ms, body=body))
        lane.next_seq += 1
        return lane.next_seq - 1

    def _evict(self, klass: RecordClass, *, need: int, at_ms: int) -> None:
        lane, gone = self._lanes[klass], []
        while lane.waiting and need > 0:
            gone.append(lane.waiting.pop(0))
            need -= _cost(gone[-1].body)
        if gone:
            self._note(klass, first=gone[0].seq, last=gone[-1].seq, at_ms=at_ms)

    def _note(self, klass: RecordClass, *, first: int, last: int, at_ms: int) -> None:
        name = klass.name.lower()
        events = self._lanes[RecordClass.EVENT].waiting
        for index, record in enumerate(events):
            match record.body:
                case DeviceEvent(name="queue.evicted", detail=detail) if (
                    detail["class"] == name and int(detail["last"]) + 1 == first
                ):
                    events[index] = msgspec.structs.replace(record, body=_gap(name, int(detail["first"]), last))
                    return
        self._append(RecordClass.EVENT, at_ms=at_ms, body=_gap(name, first, last))


def _gap(name: str, first: int, last: int) -> DeviceEvent:
    detail = {"class": name, "first": str(first), "last": str(last), "records": str(last - first + 1)}
    return DeviceEvent(name="queue.evicted", detail=detail)
