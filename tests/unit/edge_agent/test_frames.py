"""The journal's bytes: what is written is read, and what is anything else is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import frames
from edge_agent.core.frames import BEGINS, CONTINUES, Cursor, Entry, SegmentName
from edge_agent.core.standing import GapSpan, Standing
from shared import limits
from shared.telemetry import RecordClass

SEGMENT = SegmentName(2, 1201, 0xDEADBEEF)
entries_of = st.lists(st.tuples(st.integers(10**12, 10**12 + 2**30), st.binary(max_size=300)), min_size=1, max_size=20)


def frame_of(entries: list[Entry], *, number: int = 7, flags: int = BEGINS, generation: int = 0xDEADBEEF) -> bytes:
    return frames.encode_frame(entries, generation=generation, number=number, flags=flags, store_ms=55)


@given(entries_of, st.integers(0, 2**31), st.sampled_from([0, BEGINS, CONTINUES, BEGINS | CONTINUES]))
def test_a_frame_comes_back(entries: list[Entry], number: int, flags: int) -> None:
    data = frame_of(entries, number=number, flags=flags)
    frame = frames.read_frame(data, 64, start=64, segment=SEGMENT)
    assert frame is not None
    assert len(data) == frames.frame_bytes(len(entries), sum(len(data) for _, data in entries))
    assert (frame.first, frame.last) == (1201 + number, 1201 + number + len(entries) - 1)
    assert (frame.flags, frame.store_ms, frame.end) == (flags, 55, 64 + len(data))
    assert frames.frame_entries(data, frame, start=64) == entries


@given(entries_of, st.data())
def test_a_frame_with_any_bit_turned_is_none(entries: list[Entry], data: st.DataObject) -> None:
    good = frame_of(entries)
    size = frames.frame_size(good, 0, start=0)
    at = data.draw(st.integers(0, size * 8 - 1))
    bad = bytearray(good)
    bad[at // 8] ^= 1 << at % 8
    assert frames.read_frame(bytes(bad), 0, start=0, segment=SEGMENT) is None


@given(entries_of, st.data())
def test_a_frame_that_is_cut_short_is_none(entries: list[Entry], data: st.DataObject) -> None:
    good = frame_of(entries)
    size = frames.frame_size(good, 0, start=0)
    cut = data.draw(st.integers(0, size - 1))
    assert frames.read_frame(good[:cut], 0, start=0, segment=SEGMENT) is None
    assert frames.read_frame(good[:cut] + bytes(size - cut), 0, start=0, segment=SEGMENT) is None or not any(good[cut:])


def test_a_frame_of_a_files_former_life_is_none() -> None:
    data = frame_of([(1, b"a")], generation=1)
    assert frames.read_frame(data, 0, start=0, segment=SEGMENT) is None
    assert frames.read_frame(data, 0, start=0, segment=SegmentName(2, 1201, 1)) is not None


@pytest.mark.parametrize("garbage", [b"", b"\xa7" * 999, bytes(4096), random.Random(1).randbytes(9999)])
def test_the_next_frame_is_found_behind_damage(garbage: bytes) -> None:
    first = frame_of([(1, b"x" * 50)], number=0)
    second = frame_of([(2, b"y" * 70)], number=1)
    hole = garbage + bytes(-len(garbage) % frames.ALIGN_BYTES)
    data = first + hole + second
    frame = frames.find_frame(data, len(first), start=0, segment=SEGMENT)
    assert frame is not None
    assert frame.offset == len(first) + len(hole)
    assert frame.first == 1202
    assert frames.find_frame(data, frame.offset + 8, start=0, segment=SEGMENT) is None


def test_every_record_that_is_allowed_fits_its_length_field() -> None:
    assert limits.MAX_RECORD_BYTES < 2**16
    data = frame_of([(1, bytes(limits.MAX_RECORD_BYTES))])
    frame = frames.read_frame(data, 0, start=0, segment=SEGMENT)
    assert frame is not None
    assert frames.frame_entries(data, frame, start=0) == [(1, bytes(limits.MAX_RECORD_BYTES))]


def test_names_say_class_first_number_and_generation_and_sort_by_them() -> None:
    assert str(SEGMENT) == "2-00000000000004b1-deadbeef.seg"
    assert frames.parse_segment_name(str(SEGMENT)) == SEGMENT
    assert sorted([SegmentName(2, 300, 0), SegmentName(2, 4, 9)])[0].base == 4
    for other in ("2-4b1-deadbeef.seg", "spare-1.seg", "7-00000000000004b1-deadbeef.seg", "cursor"):
        assert frames.parse_segment_name(other) is None
    assert frames.parse_epoch_name(frames.epoch_name("00aa00aa00aa00aa")) == "00aa00aa00aa00aa"
    assert frames.parse_epoch_name("epoch-xyz") is None


# Cursor


def cursor(generation: int) -> Cursor:
    one = Standing(10, 20, ((12, 13),), (GapSpan(15, 16, "evicted"),))
    return Cursor(
        generation=generation,
        store_ms=5,
        boot="b" * 36,
        uptime_ms=6,
        wall_ms=7,
        synchronised=True,
        segment_bytes=65_536,
        classes=(one,) * len(RecordClass),
        lost={"evicted": 2},
    )


def slots(*placed: tuple[int, bytes]) -> bytes:
    data = bytearray(frames.SLOTS * frames.SLOT_BYTES)
    for place, slot in placed:
        data[place * frames.SLOT_BYTES : place * frames.SLOT_BYTES + len(slot)] = slot
    return bytes(data)


def test_the_newest_slot_that_checks_is_the_cursor() -> None:
    older, newer = frames.encode_slot(cursor(4)), frames.encode_slot(cursor(5))
    assert frames.newest_slot(slots((0, older), (1, newer))) == (1, cursor(5))
    assert frames.newest_slot(slots((1, older), (0, newer))) == (0, cursor(5))
    torn = newer[:40] + bytes(len(newer) - 40)
    assert frames.newest_slot(slots((0, older), (1, torn))) == (0, cursor(4))
    assert frames.newest_slot(slots((0, torn))) is None
    assert frames.newest_slot(b"") is None


def test_the_largest_cursor_fits_its_slot() -> None:
    far = 2**62
    gaps = tuple(GapSpan(far + i, far + i, "evicted") for i in range(60))
    one = Standing(far, far, tuple((far + i, far + i) for i in range(12)), gaps)
    full = cursor(far)
    full = Cursor(
        generation=far,
        store_ms=far,
        boot=full.boot,
        uptime_ms=far,
        wall_ms=far,
        synchronised=True,
        segment_bytes=far,
        classes=(one,) * len(RecordClass),
        lost=dict.fromkeys(("evicted", "expired", "dropped", "damaged"), far),
    )
    assert len(frames.encode_slot(full)) <= frames.SLOT_BYTES
