"""The journal's bytes: names of its files, frames, and the two slots of its cursor (docs/adr/0009-the-journal.md).

A segment is a row of frames, each aligned to 8 bytes. A frame is one commit's records of one class:

    checksum u32 | mark u8 | flags u8 | count u16 | size u32 | number u32 | store_ms i64 | at_ms i64     32 bytes
    length u16 of each record | time i32 of each, less at_ms | the records' bytes | padding

All integers are little-endian. `number` is the first record's, less the segment's first; `size` is the whole frame's
without padding. The checksum is CRC-32 over all that follows it, started with the segment's generation, so that what a
recycled file still holds of its former life does not pass. Generation and first number are in the file's name: names
are few, small and synced by themselves, and need no header that could be damaged.

A cursor slot is a checksum, a length and MessagePack. Nothing here reads or writes a file.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final

import msgspec

from edge_agent.core.standing import Standing
from shared.telemetry import RecordClass

Entry = tuple[int, bytes]
"""When a record happened, by the device's wall clock in milliseconds, and its bytes."""

HEAD_BYTES: Final = 32
ALIGN_BYTES: Final = 8
RECORD_HEAD_BYTES: Final = 6
SLOT_BYTES: Final = 8192
SLOTS: Final = 2

BEGINS: Final = 1
"""A batch begins with this frame."""
CONTINUES: Final = 2
"""Written in one commit with the frame before: without that one it was never acknowledged to anybody."""

_MARK: Final = 0xA7
_HEAD: Final = struct.Struct("<IBBHIIqq")
_SLOT: Final = struct.Struct("<II")
_MARK_AT: Final = 4
_MAX_DELTA: Final = 2**31 - 1
_SEGMENT: Final = re.compile(r"([0-3])-([0-9a-f]{16})-([0-9a-f]{8})\.seg")
_EPOCH: Final = re.compile(r"epoch-([0-9a-f]{16})")

CURSOR_NAME: Final = "cursor"
RESERVE_NAME: Final = "reserve.seg"


class SegmentName(msgspec.Struct, frozen=True, order=True):
    """A segment's class, first number and generation, as its file's name says them."""

    klass: int
    base: int
    generation: int

    def __str__(self) -> str:
        return f"{self.klass}-{self.base:016x}-{self.generation:08x}.seg"


def parse_segment_name(name: str) -> SegmentName | None:
    """What a file's name says; None for a file that is no segment."""
    found = _SEGMENT.fullmatch(name)
    if found is None:
        return None
    return SegmentName(int(found[1]), int(found[2], 16), int(found[3], 16))


def epoch_name(epoch: str) -> str:
    """The name of the empty file that keeps the store's epoch."""
    return f"epoch-{epoch}"


def parse_epoch_name(name: str) -> str | None:
    """The epoch that a file's name keeps; None for any other file."""
    found = _EPOCH.fullmatch(name)
    return None if found is None else found[1]


# Frames


class Frame(msgspec.Struct, frozen=True):
    """A frame that checks: where it lies, and what its head says."""

    offset: int
    size: int
    first: int
    count: int
    flags: int
    store_ms: int
    at_ms: int

    @property
    def last(self) -> int:
        """The number of its last record."""
        return self.first + self.count - 1

    @property
    def bytes(self) -> int:
        """Of its records."""
        return self.size - HEAD_BYTES - RECORD_HEAD_BYTES * self.count

    @property
    def end(self) -> int:
        """Where the next frame begins."""
        return self.offset + padded(self.size)


def padded(size: int) -> int:
    """A frame's size with its padding."""
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def frame_bytes(count: int, size: int) -> int:
    """How much room a frame of so many records with so many bytes takes, padding included."""
    return padded(HEAD_BYTES + RECORD_HEAD_BYTES * count + size)


def fits_frame(at_ms: int, first_at_ms: int) -> bool:
    """Whether a record of this time can share a frame whose first record has that one."""
    return abs(at_ms - first_at_ms) <= _MAX_DELTA


def encode_frame(entries: Sequence[Entry], *, generation: int, number: int, flags: int, store_ms: int) -> bytes:
    """A frame with its padding.

    Args:
        entries: at least one; their times must fit a frame (`fits_frame`), their bytes 65,535 each.
        generation: the segment's.
        number: the first record's number less the segment's first.
        flags: BEGINS, CONTINUES.
        store_ms: by the store's own clock.
    """
    count = len(entries)
    at_ms = entries[0][0]
    lengths = [len(data) for _, data in entries]
    deltas = [at - at_ms for at, _ in entries]
    body = b"".join([struct.pack(f"<{count}H{count}i", *lengths, *deltas), *[data for _, data in entries]])
    size = HEAD_BYTES + len(body)
    head = _HEAD.pack(0, _MARK, flags, count, size, number, store_ms, at_ms)[_MARK_AT:]
    checksum = zlib.crc32(body, zlib.crc32(head, generation))
    return b"".join((checksum.to_bytes(4, "little"), head, body, bytes(padded(size) - size)))


def read_frame(data: bytes, offset: int, *, start: int, segment: SegmentName) -> Frame | None:
    """The frame at `offset` of its segment, whose bytes from `start` on are `data`; None when none is there whole."""
    at = offset - start
    if len(data) - at < HEAD_BYTES:
        return None
    checksum, mark, flags, count, size, number, store_ms, at_ms = _HEAD.unpack_from(data, at)
    if mark != _MARK or count == 0 or not HEAD_BYTES + RECORD_HEAD_BYTES * count <= size <= len(data) - at:
        return None
    if zlib.crc32(memoryview(data)[at + _MARK_AT : at + size], segment.generation) != checksum:
        return None
    return Frame(offset, size, segment.base + number, count, flags, store_ms, at_ms)


def frame_size(data: bytes, offset: int, *, start: int) -> int:
    """How long the frame that seems to be at `offset` says it is; 0 when none seems to."""
    if len(data) - (offset - start) < HEAD_BYTES:
        return 0
    _, mark, _, count, size, *_ = _HEAD.unpack_from(data, offset - start)
    return size if mark == _MARK and count else 0


def find_frame(data: bytes, offset: int, *, start: int, segment: SegmentName) -> Frame | None:
    """The first whole frame at or behind `offset`, for going on behind damage; None when there is none."""
    mark = bytes((_MARK,))
    found = data.find(mark, offset - start + _MARK_AT)
    while found >= 0:
        here = found - _MARK_AT + start
        if here % ALIGN_BYTES == 0:
            frame = read_frame(data, here, start=start, segment=segment)
            if frame is not None:
                return frame
        found = data.find(mark, found + 1)
    return None


def frame_entries(data: bytes, frame: Frame, *, start: int) -> list[Entry]:
    """The records of a frame that `read_frame` found in the same data."""
    count = frame.count
    at = frame.offset - start + HEAD_BYTES
    heads = struct.unpack_from(f"<{count}H{count}i", data, at)
    ends = list(accumulate(heads[:count], initial=at + RECORD_HEAD_BYTES * count))
    base = frame.at_ms
    return [(base + delta, data[begin:end]) for delta, begin, end in zip(heads[count:], ends, ends[1:], strict=False)]


# Cursor


class Cursor(msgspec.Struct, frozen=True, array_like=True):
    """What the journal remembers beside its segments.

    Attributes:
        generation: one more than that of the slot before; the highest that checks is the newest.
        store_ms: the store's own clock when this was written, with the machine's clocks at that moment:
        boot, uptime_ms, wall_ms, synchronised: as in `Moment`.
        segment_bytes: of the files that there are.
        classes: one for each class, in order.
        lost: records lost by reason, since the store was made.
    """

    generation: int
    store_ms: int
    boot: str
    uptime_ms: int
    wall_ms: int
    synchronised: bool
    segment_bytes: int
    classes: tuple[Standing, ...]
    lost: dict[str, int]


_cursor_decoder = msgspec.msgpack.Decoder(Cursor)


def encode_slot(cursor: Cursor) -> bytes:
    """One slot, SLOT_BYTES long at most; raises ValueError when the cursor does not fit."""
    body = msgspec.msgpack.encode(cursor)
    if len(body) > SLOT_BYTES - _SLOT.size:
        raise ValueError(f"cursor of {len(body)} bytes")
    return _SLOT.pack(zlib.crc32(body), len(body)) + body


def decode_slots(data: bytes) -> Iterator[tuple[int, Cursor]]:
    """The slots that check, with their places (0 or 1)."""
    for place in range(SLOTS):
        slot = data[place * SLOT_BYTES : (place + 1) * SLOT_BYTES]
        if len(slot) < _SLOT.size:
            continue
        checksum, length = _SLOT.unpack_from(slot)
        body = slot[_SLOT.size : _SLOT.size + length]
        if not length or len(body) != length or zlib.crc32(body) != checksum:
            continue
        try:
            cursor = _cursor_decoder.decode(body)
        except msgspec.MsgspecError:
            continue
        if len(cursor.classes) == len(RecordClass):
            yield place, cursor


def newest_slot(data: bytes) -> tuple[int, Cursor] | None:
    """The newest slot that checks, with its place; None when none does."""
    return max(decode_slots(data), key=lambda found: found[1].generation, default=None)
