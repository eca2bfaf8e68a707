"""The record store: typed records in, batches as they are sent out; on the journal, without a thread.

Rules of this file:
1. A batch's columns are made from its records each time that it is sent. The same records give the same columns; an
   agent that was updated meanwhile may give others, and the hub then compares record by record.
2. Only what was handed out, and is answered with its own digest, is settled or buried.
3. A record that cannot be read becomes a gap of its own and blocks nothing.
4. So do the numbers of a batch that was buried: the hub is told that they will not come. A gap that is refused itself
   is only let go of.

Not here: files and their order (`journal.py`), when to commit (`outbox.py`), when to send (`edge_agent/core/pump.py`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from edge_agent.adapters.buried import Buried
from edge_agent.adapters.journal import Journal
from edge_agent.core.frames import Entry
from edge_agent.core.journal import Moment, Portion
from edge_agent.ports import Depth
from shared import limits
from shared.errors import InvalidValue, StorageFull
from shared.telemetry import BatchId, Body, Gap, Record, RecordClass
from shared.wire.columns import encode_columns
from shared.wire.messages import Batch, digest_of

logger = logging.getLogger(__name__)

_MAX_HANDED: Final = 256

_encoder = msgspec.msgpack.Encoder()
_decoder: Final[msgspec.msgpack.Decoder[Body]] = msgspec.msgpack.Decoder(Body)


def encode_record(body: Body) -> bytes:
    """The record's bytes for the journal; raises InvalidValue when it exceeds MAX_RECORD_BYTES."""
    data = _encoder.encode(body)
    if len(data) > limits.MAX_RECORD_BYTES:
        raise InvalidValue(
            f"record of {len(data)} bytes exceeds {limits.MAX_RECORD_BYTES}",
            code="invalid.record",
            hint="send large data as a file, not as a record",
        )
    return data


class RecordStore:
    """What waits for the hub, as the hub will see it. Errors are the journal's."""

    def __init__(self, journal: Journal, *, buried: Buried) -> None:
        self._journal = journal
        self._buried = buried
        self._handed: OrderedDict[tuple[int, int, int], str] = OrderedDict()

    @property
    def epoch(self) -> str:
        """16 hex digits, drawn when this store was created."""
        return self._journal.epoch

    @property
    def is_dirty(self) -> bool:
        """Whether `tick` will have something to write."""
        return self._journal.is_dirty

    def append(self, klass: RecordClass, entries: Sequence[Entry], *, moment: Moment) -> int:
        """Store encoded records of a class and return the first one's number: all of them are durable, or none."""
        return self._journal.append(klass, entries, moment=moment)

    def load(self, klass: RecordClass, *, after: int, moment: Moment) -> Batch | None:
        """The oldest batch or gap of the class that is not settled and begins above `after`."""
        while True:
            portion = self._journal.load(klass, after=after, moment=moment)
            if portion is None:
                return None
            batch = self._batch(portion, moment)
            if batch is not None:
                break
        key = (batch.batch.klass, batch.batch.first, batch.batch.last)
        self._handed[key] = batch.batch.digest
        self._handed.move_to_end(key)
        while len(self._handed) > _MAX_HANDED:
            self._handed.popitem(last=False)
        return batch

    def settle(self, batch: BatchId) -> bool:
        """Let go of what the hub acknowledged; False for what is not open."""
        if not self._is_open(batch):
            return False
        del self._handed[batch.klass, batch.first, batch.last]
        return self._journal.settle(RecordClass(batch.klass), batch.first, batch.last)

    def bury(self, batch: BatchId, *, reason: str, moment: Moment) -> bool:
        """Put aside a batch that will never be taken, with the reason, and leave a gap; False for what is not open."""
        if not self._is_open(batch):
            return False
        klass = RecordClass(batch.klass)
        found = self.load(klass, after=batch.first - 1, moment=moment)
        if found is None or found.batch != batch:
            return False
        try:
            self._buried.put(found, reason=reason)
        except StorageFull as error:
            # A batch that nobody takes must not hold up its class until somebody makes room.
            about = {"class": klass.name.lower(), "first": batch.first, "last": batch.last, "reason": reason}
            logger.error("refused records are gone, for lack of room", extra={**about, "why": error.message})
        if found.gap is not None:
            return self.settle(batch)
        self._journal.lose(klass, batch.first, batch.last, reason="refused", moment=moment)
        del self._handed[batch.klass, batch.first, batch.last]
        return True

    def drop(self, klass: RecordClass, *, moment: Moment) -> int:
        """Drop the class's waiting records, leaving a gap; returns how many. Raises InvalidValue for class 0."""
        if klass is RecordClass.EVENT:
            raise InvalidValue("events are never dropped", code="invalid.class", hint="they are few, and are audited")
        return self._journal.drop(klass, moment=moment)

    def tick(self, moment: Moment) -> None:
        """Do what is due; about once a second."""
        self._journal.tick(moment)

    def depth(self, moment: Moment) -> Depth:
        """How much waits, and what it has cost."""
        depth = self._journal.depth(moment)
        return replace(depth, buried=self._buried.count, buried_given_up=self._buried.given_up)

    def close(self, moment: Moment) -> None:
        """Let go of the files. Safe to call twice."""
        try:
            self._journal.close(moment)
        finally:
            self._buried.close()

    def _is_open(self, batch: BatchId) -> bool:
        return batch.epoch == self.epoch and self._handed.get((batch.klass, batch.first, batch.last)) == batch.digest

    def _batch(self, portion: Portion, moment: Moment) -> Batch | None:
        """The portion as it is sent; None when a record of it could not be read and was given up."""
        columns, gap = b"", None
        if portion.reason:
            gap = Gap(reason=portion.reason, records=portion.last - portion.first + 1)
        else:
            records: list[Record] = []
            for number, (at_ms, data) in enumerate(portion.entries, portion.first):
                try:
                    records.append(Record(seq=number, at_ms=at_ms, body=_decoder.decode(data)))
                except msgspec.MsgspecError:
                    self._journal.lose(portion.klass, number, number, reason="damaged", moment=moment)
            if len(records) < len(portion.entries):
                return None
            columns = encode_columns(records)
        digest = digest_of(columns=columns, gap=gap)
        name = BatchId(
            epoch=self.epoch, klass=int(portion.klass), first=portion.first, last=portion.last, digest=digest
        )
        return Batch(batch=name, columns=columns, gap=gap)
