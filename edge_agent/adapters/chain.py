"""One class's segments: appends frames, hands out batches, remembers what is settled (docs/adr/0009-the-journal.md).

Rules of this file:
1. What `append` returned is on the disk. A failed write leaves the numbers unused and the file behind.
2. What was handed out begins and ends where the frames' marks say, so that it comes back the same after any crash.
3. A frame that does not check ends what is known of its place: the numbers up to the next one that does are a gap.

Not here: room, the cursor, other classes (`journal.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace

from edge_agent.core.frames import (
    BEGINS,
    CONTINUES,
    HEAD_BYTES,
    Entry,
    Frame,
    SegmentName,
    encode_frame,
    find_frame,
    frame_entries,
    frame_size,
    read_frame,
)
from edge_agent.core.journal import LARGEST_SEGMENT_BYTES, JournalBounds, Part, Portion
from edge_agent.core.standing import Standing
from edge_agent.ports import Disk
from shared.telemetry import GapReason, RecordClass

WINDOW_BYTES: Final = 256 * 1024


class Window:
    """The part of a file that was read last, so that small frames are not read one by one."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._name = ""
        self._is_whole = False
        self.start = 0
        self.data = b""

    def show(self, name: str, offset: int, size: int, *, end: int) -> None:
        """See to it that `data`, from `start` on, holds so many bytes from there, as far as they lie below `end`."""
        wanted = min(offset + size, end)
        if name == self._name and self.start <= offset and (wanted <= self.start + len(self.data) or self._is_whole):
            return
        length = max(0, min(max(size, WINDOW_BYTES), end - offset))
        self.data = self._disk.read(name, offset, length)
        self._is_whole = len(self.data) < length
        self._name, self.start = name, offset

    def has_grown(self, name: str) -> None:
        """The file was written to: it may end later than it did."""
        if name == self._name:
            self._is_whole = False


@dataclass(slots=True)
class _Found:
    """A run of frames that make a batch, or a hole; and where the next one is looked for."""

    first: int
    last: int
    entries: list[Entry]
    reason: GapReason | None
    newest_ms: int
    next_at: tuple[SegmentName, int]


class Chain:
    """The segments of a class, oldest first, and what is known of its numbers.

    Attributes:
        segments: their names; the last one is written to.
        end: where the last one's next frame goes; LARGEST_SEGMENT_BYTES when none may.
        is_unsure: what could not be written may lie behind the last frame after all.
        failed: a file whose sync failed before it held anything; it has the name of the one to come, and must go first.
        standing: which of its numbers are settled, lost, or wait.
        lost: records lost by reason, since this was opened.
    """

    def __init__(self, klass: RecordClass, *, disk: Disk, window: Window, bounds: JournalBounds) -> None:
        self.klass = klass
        self.segments: list[SegmentName] = []
        self.end = 0
        self.is_unsure = False
        self.failed: SegmentName | None = None
        self.standing = Standing()
        self.lost: dict[str, int] = {}
        self.written_bytes = 0
        self._disk = disk
        self._window = window
        self._bounds = bounds
        self._begins = True
        self._open_records = 0
        self._open_bytes = 0
        self._handed: set[tuple[int, int]] = set()
        self._places: dict[int, tuple[SegmentName, int]] = {}
        self._oldest: tuple[int, int] = (0, 0)

    # Appending

    def room_for(self, need: int) -> bool:
        """Whether the last segment takes so many bytes more."""
        return bool(self.segments) and self.end + need <= self._bounds.segment_bytes

    def add(self, name: SegmentName) -> None:
        """Go on in this file, which exists."""
        self.segments.append(name)
        self.end = 0
        self.is_unsure = False
        self._begins = True

    def begin_batch(self) -> None:
        """Let the next frame begin a batch: what is before it may have been sent."""
        self._begins = True

    def append(self, parts: Sequence[Part], *, store_ms: int) -> int:
        """Write these frames, sync them, and return the first record's number.

        Raises OSError with no number used; nothing more is written to that file then.
        """
        segment = self.segments[-1]
        number, begins = self.standing.next, self._begins
        open_records, open_bytes = self._open_records, self._open_bytes
        frames: list[bytes] = []
        for part in parts:
            count, size = len(part.entries), part.size
            full = open_records + count > self._bounds.batch_records or open_bytes + size > self._bounds.batch_bytes
            if begins or full:
                open_records = open_bytes = 0
            flags = (BEGINS if begins or full else 0) | (CONTINUES if frames else 0)
            frames.append(
                encode_frame(
                    part.entries,
                    generation=segment.generation,
                    number=number - segment.base,
                    flags=flags,
                    store_ms=store_ms,
                )
            )
            number += count
            open_records += count
            open_bytes += size
            begins = False
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        try:
            self._disk.write(str(segment), self.end, data)
            self._window.has_grown(str(segment))
            self._disk.sync(str(segment))
        except OSError:
            self._leave_failed()
            raise
        first, self.standing = self.standing.next, replace(self.standing, next=number)
        self.end += len(data)
        self.written_bytes += len(data)
        self._begins, self._open_records, self._open_bytes = False, open_records, open_bytes
        return first

    # Handing out

    def load(self, *, after: int, expired_ms: int | None) -> Portion | None:
        """The first batch or gap above `after` that is not settled; what is older than `expired_ms` is a gap."""
        while True:
            first = self.standing.unsettled_above(after)
            if first >= self.standing.next:
                return None
            gap = self.standing.gap_at(first)
            if gap is not None:
                self._handed.add((first, gap.last))
                return Portion(klass=self.klass, first=first, last=gap.last, reason=gap.reason)
            found = self._read(first)
            if not found.reason and expired_ms is not None and found.newest_ms <= expired_ms:
                found.reason = "expired"
            if found.reason:
                self.lose(found.first, found.last, found.reason)
                self._places[found.last + 1] = found.next_at
                continue
            self._places[found.last + 1] = found.next_at
            if found.last + 1 == self.standing.next:
                self.begin_batch()
            self._handed.add((found.first, found.last))
            return Portion(klass=self.klass, first=found.first, last=found.last, entries=found.entries)

    def settle(self, first: int, last: int) -> bool:
        """Remember that these numbers are settled; False unless they were handed out and some were not settled."""
        if (first, last) not in self._handed:
            return False
        self._handed.discard((first, last))
        after = self.standing.with_settled(first, last)
        if after is None:
            return False
        if after.settled > self.standing.settled:
            self._handed = {span for span in self._handed if span[1] > after.settled}
            self._places = {number: at for number, at in self._places.items() if number > after.settled}
        self.standing = after
        return True

    def lose(self, first: int, last: int, reason: GapReason) -> int:
        """Declare what waits of these numbers a gap; returns how many those were."""
        self.standing, records = self.standing.with_lost(first, last, reason)
        if records:
            self.lost[reason] = self.lost.get(reason, 0) + records
        return records

    # Segments

    def stop(self, index: int) -> int:
        """The number after the last one in this segment."""
        return self.segments[index + 1].base if index + 1 < len(self.segments) else self.standing.next

    def base(self) -> int:
        """The first number that lies in a segment."""
        return self.segments[0].base if self.segments else self.standing.next

    def take_oldest(self) -> SegmentName:
        """Give the oldest segment away; its numbers must be settled or lost."""
        name = self.segments.pop(0)
        if not self.segments:
            self.end = 0
            self.begin_batch()
        return name

    def leave(self) -> None:
        """Write no more to the last segment."""
        self.end = LARGEST_SEGMENT_BYTES if self.segments else 0

    def _leave_failed(self) -> None:
        """Write no more to the last segment, because its disk failed; where nothing in it is needed, it is `failed`."""
        if self.segments[-1].base == self.standing.next:
            self.failed = self.segments.pop()
        else:
            self.is_unsure = True
        self.leave()

    def newest_before(self, index: int) -> int | None:
        """A store's time at or after that of every frame in this segment; None when that cannot be told."""
        if index + 1 >= len(self.segments):
            return None
        frame = self._frame_at(index + 1, 0)
        return None if frame is None else frame.store_ms

    def oldest_ms(self) -> int | None:
        """The store's time of the oldest record that waits; None when none does."""
        if not self.standing.waiting():
            return None
        first = self.standing.unsettled_above(0)
        if self._oldest[0] != first:
            number = first
            while (gap := self.standing.gap_at(number)) is not None:
                number = self.standing.unsettled_above(gap.last)
            place = self._locate(number)
            frame = None if place is None else self._frame_at(*place)
            if frame is None:
                return None
            self._oldest = (first, frame.store_ms)
        return self._oldest[1]

    # Reading

    def _frame_at(self, index: int, offset: int) -> Frame | None:
        segment, window = self.segments[index], self._window
        end = self._end_of(index)
        if offset + HEAD_BYTES > end:
            return None
        name = str(segment)
        window.show(name, offset, HEAD_BYTES, end=end)
        size = frame_size(window.data, offset, start=window.start)
        if not size or offset + size > end:
            return None
        window.show(name, offset, size, end=end)
        return read_frame(window.data, offset, start=window.start, segment=segment)

    def _end_of(self, index: int) -> int:
        """Where to stop reading; a segment that is not written to any more may be from a time of other sizes."""
        return self.end if index + 1 == len(self.segments) else LARGEST_SEGMENT_BYTES

    def _frame_behind(self, index: int, offset: int, *, above: int, below: int) -> Frame | None:
        """The next frame behind damage whose numbers lie between; reads the rest of the segment."""
        segment = self.segments[index]
        end = self._end_of(index)
        data = self._disk.read(str(segment), offset, max(0, end - offset))
        at = offset
        while (frame := find_frame(data, at, start=offset, segment=segment)) is not None:
            if above <= frame.first and frame.last < below:
                return frame
            at = frame.offset + HEAD_BYTES
        return None

    def _locate(self, number: int) -> tuple[int, int] | None:
        """Segment and offset of the frame with this number, or of the damage where it should be."""
        index = bisect_right(self.segments, number, key=lambda segment: segment.base) - 1
        if index < 0:
            return None
        segment = self.segments[index]
        place = self._places.get(number)
        if place is not None and place[0] == segment:
            return index, place[1]
        offset, expected, stop = 0, segment.base, self.stop(index)
        while expected < number:
            frame = self._frame_at(index, offset)
            if frame is None or frame.first < expected or frame.last >= stop:
                frame = self._frame_behind(index, offset, above=expected, below=stop)
                if frame is None or frame.first > number:
                    break
            if frame.last >= number:
                return index, frame.offset
            expected, offset = frame.last + 1, frame.end
        return index, offset

    def _read(self, first: int) -> _Found:
        """The batch that begins with this number, or the hole."""
        place = self._locate(first)
        if place is None:
            last = self.base() - 1
            return _Found(first, last, [], "damaged", 0, (self.segments[0], 0) if self.segments else _NOWHERE)
        index, offset = place
        segment, stop = self.segments[index], min(self.stop(index), self.standing.known_above(first))
        entries: list[Entry] = []
        expected, size, newest_ms = first, 0, 0
        while expected < stop:
            frame = self._frame_at(index, offset)
            if frame is None or not frame.first <= expected <= frame.last < self.stop(index):
                if entries:
                    break
                behind = self._frame_behind(index, offset, above=expected + 1, below=self.stop(index))
                last = min(stop, behind.first if behind is not None else stop) - 1
                return _Found(first, last, [], "damaged", 0, (segment, behind.offset if behind else self.end))
            if entries and (
                frame.flags & BEGINS
                or len(entries) + frame.count > self._bounds.batch_records
                or size + frame.bytes > self._bounds.batch_bytes
            ):
                break
            more = frame_entries(self._window.data, frame, start=self._window.start)
            more = more[expected - frame.first : stop - frame.first]
            entries += more
            expected, size, newest_ms = expected + len(more), size + frame.bytes, frame.store_ms
            if expected > frame.last:
                offset = frame.end
        return _Found(first, expected - 1, entries, None, newest_ms, (segment, offset))


_NOWHERE: Final = (SegmentName(0, 0, 0), 0)
