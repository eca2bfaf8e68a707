"""The hub's telemetry tables in memory: transactions that are whole or not at all, and questions for a test's oracle.

telemetry = MemoryTelemetry()
with telemetry.transaction() as store:
    verdict = take(store, device, batch, at_ms=…)
# committed: the verdict may go out. An exception inside leaves nothing behind.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cloud_hub.telemetry.figures import Tallies, add_all, bounded
from cloud_hub.telemetry.rules import MAX_SPAN, Stream, explode
from cloud_hub.telemetry.taking import BatchRow, Note, Received
from shared.ids import DeviceId
from shared.telemetry import Record

Figure = tuple[DeviceId, int]
"""Whose, and of which minute."""


@dataclass
class MemoryTelemetry:
    """What is committed.

    Attributes:
        batches: per stream, ascending by first number.
        received: what is known of each stream.
        figures: by device and minute.
        notes: audit events in their order.
    """

    batches: dict[Stream, list[BatchRow]] = field(default_factory=dict)
    received: dict[Stream, Received] = field(default_factory=dict)
    figures: dict[Figure, Tallies] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    @contextmanager
    def transaction(self) -> Iterator[MemoryTransaction]:
        """A transaction: committed when the block ends, without a trace when it raises."""
        transaction = MemoryTransaction(self)
        yield transaction
        transaction.commit()

    def records(self, stream: Stream) -> list[Record]:
        """All records of the stream that are stored, in the order of their numbers; one that is here twice, twice."""
        rows = self.batches.get(stream, ())
        found = [record for row in rows for record in explode(row.columns)]
        return sorted(found, key=lambda record: record.seq)


class MemoryTransaction:
    """`taking.Store`, over what is committed, with what this transaction wrote on top."""

    def __init__(self, committed: MemoryTelemetry) -> None:
        self._committed = committed
        self._batches: dict[Stream, list[BatchRow]] = {}
        self._received: dict[Stream, Received] = {}
        self._figures: dict[Figure, Tallies] = {}
        self._notes: list[Note] = []

    def read(self, streams: Collection[Stream]) -> dict[Stream, Received]:
        """What is known of these."""
        known = self._committed.received | self._received if self._received else self._committed.received
        return {stream: known[stream] for stream in streams if stream in known}

    def epochs(self, device: DeviceId) -> frozenset[str]:
        """All epochs of the device."""
        known = (*self._committed.received, *self._received)
        return frozenset(stream.epoch for stream in known if stream.device == device)

    def holds(self, stream: Stream, first: int, last: int, digest: str) -> bool:
        """Whether a batch with this very claim is stored."""
        found = self._of(stream)
        same = found[bisect_left(found, first, key=_first) : bisect_left(found, first + 1, key=_first)]
        return any((row.last, row.digest) == (last, digest) for row in same)

    def overlapping(self, stream: Stream, first: int, last: int, *, most: int) -> Sequence[BatchRow] | None:
        """The stream's batches that hold a number from first to last; None for more bytes than this."""
        found = self._of(stream)
        begin = bisect_left(found, first - MAX_SPAN, key=_first)
        end = bisect_left(found, last + 1, key=_first)
        rows = [row for row in found[begin:end] if row.last >= first]
        return None if sum(len(row.columns) for row in rows) > most else rows

    def insert(self, rows: Sequence[BatchRow], *, at_ms: int) -> None:
        """Add batches."""
        for row in rows:
            if row.stream not in self._batches:
                self._batches[row.stream] = list(self._committed.batches.get(row.stream, ()))
            mine = self._batches[row.stream]
            mine.insert(bisect_left(mine, row.first + 1, key=_first), row)

    def write(self, streams: Mapping[Stream, Received]) -> None:
        """Replace what is known of these."""
        self._received.update(streams)

    def count(self, device: DeviceId, tallies: Tallies, *, minute: int) -> None:
        """Add to the minute's figures."""
        key = (device, minute)
        before = self._figures.get(key, self._committed.figures.get(key, {}))
        self._figures[key] = add_all([before, bounded(before, tallies)])

    def note(self, note: Note, *, at_ms: int) -> None:
        """Write an audit event."""
        self._notes.append(note)

    def commit(self) -> None:
        """Make it all visible."""
        self._committed.batches.update(self._batches)
        self._committed.received.update(self._received)
        self._committed.figures.update(self._figures)
        self._committed.notes.extend(self._notes)

    def _of(self, stream: Stream) -> list[BatchRow]:
        return self._batches.get(stream, self._committed.batches.get(stream, []))


def _first(row: BatchRow) -> int:
    return row.first
