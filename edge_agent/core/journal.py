"""What the journal is told and what it gives: bounds, moments, portions; and its arithmetic.

The design is docs/adr/0009-the-journal.md. Values and decisions only: bytes are in `frames.py`, the files in
`edge_agent/adapters/journal.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from edge_agent.core.frames import SLOT_BYTES, SLOTS, Cursor, Entry, fits_frame
from shared import limits
from shared.limits import KIB, MIB
from shared.telemetry import GapReason, RecordClass

LARGEST_SEGMENT_BYTES: Final = 512 * KIB
SMALLEST_SEGMENT_BYTES: Final = 64 * KIB
SMALLEST_TOTAL_BYTES: Final = MIB
CLASS_SHARES: Final[Mapping[RecordClass, float]] = {
    RecordClass.EVENT: 0.5,
    RecordClass.OUTCOME: 0.8,
    RecordClass.RESULT: 0.9,
    RecordClass.READING: 1.0,
}
"""The share of the whole budget that one class may fill. A precious class takes room from those below it, so it is the
one to be bounded: a flood of events shall not leave the others nothing."""


class Moment(msgspec.Struct, frozen=True):
    """All that the machine's clocks say at once.

    Attributes:
        boot: the boot's id; `uptime_ms` is comparable only within one.
        uptime_ms: since the boot, suspended time included (CLOCK_BOOTTIME).
        wall_ms: since 1970, as far as this machine knows.
        synchronised: whether something outside keeps the wall clock right.
    """

    boot: str
    uptime_ms: int
    wall_ms: int
    synchronised: bool


class JournalBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How large the journal may become, and how long records wait.

    Attributes:
        total_bytes: all files together; at least SMALLEST_TOTAL_BYTES.
        segment_bytes: of one file.
        batch_bytes, batch_records: a batch is cut before it exceeds either.
        min_free_bytes: what the file system keeps free of us.
        ttl_ms: by class; a class that is not in it never expires.
        spares: files kept for reuse.
    """

    total_bytes: int
    segment_bytes: int
    batch_bytes: int
    batch_records: int = limits.MAX_BATCH_RECORDS
    min_free_bytes: int = 0
    ttl_ms: Mapping[RecordClass, int] = {}
    spares: int = 2

    def quota(self, klass: RecordClass) -> int:
        """How many segments the class may have; at least one."""
        return max(1, int(self.segments * CLASS_SHARES[klass]))

    @property
    def segments(self) -> int:
        """How many files of a segment's size there may be beside the cursor, the reserve included."""
        return (self.total_bytes - SLOTS * SLOT_BYTES) // self.segment_bytes


def bounds_for(
    total_bytes: int, *, min_free_bytes: int = 0, ttl_ms: Mapping[RecordClass, int] | None = None
) -> JournalBounds:
    """Bounds for a budget: the segment is a sixteenth of it, from 64 KiB to 512 KiB."""
    size = LARGEST_SEGMENT_BYTES
    while size > SMALLEST_SEGMENT_BYTES and size * 16 > total_bytes:
        size //= 2
    return JournalBounds(
        total_bytes=max(total_bytes, SMALLEST_TOTAL_BYTES),
        segment_bytes=size,
        batch_bytes=min(limits.MAX_BATCH_BYTES, size // 2),
        min_free_bytes=min_free_bytes,
        ttl_ms=dict(ttl_ms or {}),
    )


class Portion(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as it lies on the disk, or numbers that will not come.

    Attributes:
        entries: the records first to last; empty for a gap.
        reason: why they will not come; None where they do.
    """

    klass: RecordClass
    first: int
    last: int
    entries: Sequence[Entry] = ()
    reason: GapReason | None = None


class StoreClock(msgspec.Struct, frozen=True):
    """The store's own clock, for as long as the journal is open: it said `store_ms` at `uptime_ms` of this boot."""

    store_ms: int
    uptime_ms: int

    def at(self, moment: Moment) -> int:
        """What it says at this moment, in milliseconds."""
        return self.store_ms + max(0, moment.uptime_ms - self.uptime_ms)


def store_time(cursor: Cursor | None, *, newest_ms: int, now: Moment) -> int:
    """What the store's own clock says when the journal is opened.

    It counts while the machine is up. Of the time in which it was not, it counts what two synchronised wall clocks
    say, and nothing otherwise: a clock that may be wrong moves nothing.

    Args:
        cursor: the newest that was found.
        newest_ms: the store's time of the newest frame that was found.
        now: the machine's clocks.
    """
    if cursor is None:
        return newest_ms
    if cursor.boot == now.boot:
        return max(cursor.store_ms + max(0, now.uptime_ms - cursor.uptime_ms), newest_ms)
    # Nothing that was found is of this boot: opening writes the cursor before anything else.
    slept_ms = 0
    if cursor.synchronised and now.synchronised:
        slept_ms = max(0, now.wall_ms - cursor.wall_ms - now.uptime_ms)
    return max(cursor.store_ms + slept_ms, newest_ms) + now.uptime_ms


def victim(segments: Mapping[RecordClass, int], newcomer: RecordClass) -> RecordClass | None:
    """Whose oldest segment makes room: the least precious class's that has one and is not above the newcomer.

    Class 0 gives way to nobody, not to itself either.
    """
    for klass in reversed(RecordClass):
        if klass < newcomer or klass is RecordClass.EVENT:
            return None
        if segments[klass]:
            return klass
    return None


class Part(msgspec.Struct, frozen=True):
    """Records that will lie in one frame, and how many bytes they have."""

    entries: Sequence[Entry]
    size: int


def cut(entries: Sequence[Entry], *, bounds: JournalBounds) -> list[Part]:
    """The records in the frames that they will lie in: each within a batch's bounds, its times near each other."""
    first_ms = entries[0][0]
    size = sum([len(data) for _, data in entries])
    if len(entries) <= bounds.batch_records and size <= bounds.batch_bytes:
        times = [at_ms for at_ms, _ in entries]
        if fits_frame(min(times), first_ms) and fits_frame(max(times), first_ms):
            return [Part(entries, size)]
    parts: list[Part] = []
    begin = size = 0
    for index, (at_ms, data) in enumerate(entries):
        length = len(data)
        full = index - begin >= bounds.batch_records or size + length > bounds.batch_bytes
        if index > begin and (full or not fits_frame(at_ms, entries[begin][0])):
            parts.append(Part(entries[begin:index], size))
            begin, size = index, 0
        size += length
    parts.append(Part(entries[begin:], size))
    return parts
