"""Frames are cut from a stream whatever pieces it comes in, and announcing a large one costs nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.framing import FrameReader, build_frame
from shared import limits
from shared.errors import ProtocolViolation
from shared.wire import frames

FRAMES = st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=3000)), max_size=8)


def feed(reader: FrameReader, data: bytes, sizes: list[int]) -> list[tuple[bytes, bytes]]:
    """Give the reader the data in pieces of these sizes, the last size repeated."""
    found = []
    position = 0
    for turn in range(len(data) + 1):
        while (frame := reader.next_frame()) is not None:
            found.append((frame[0], bytes(frame[1])))
        if position == len(data):
            break
        room = reader.buffer()
        assert len(room) > 0
        count = min(sizes[min(turn, len(sizes) - 1)], len(room), len(data) - position)
        room[:count] = data[position : position + count]
        room.release()
        reader.received(count)
        position += count
    return found


@given(FRAMES, st.lists(st.integers(1, 5000), min_size=1, max_size=20))
def test_any_pieces_give_the_same_frames(sent: list[tuple[bytes, bytes]], sizes: list[int]) -> None:
    data = b"".join(bytes(part) for header, payload in sent for part in build_frame(header, (payload,)))
    assert feed(FrameReader(), data, sizes) == sent


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, limits.MIB, 3 * limits.MIB + 7])
@pytest.mark.parametrize("header", [0, limits.MAX_FRAME_HEADER_BYTES])
def test_large_payloads_and_headers_arrive_whole(size: int, header: int) -> None:
    sent = [(bytes(header), bytes(range(256)) * (size // 256) + bytes(size % 256)), (b"next", b"one")]
    data = b"".join(bytes(part) for head, payload in sent for part in build_frame(head, (payload,)))
    assert feed(FrameReader(), data, [100_000]) == sent


def test_announcing_a_payload_takes_no_memory_for_it() -> None:
    reader = FrameReader()
    feed(reader, frames.prefix(1, limits.MAX_FRAME_PAYLOAD_BYTES) + b"h" + b"x" * 10, [1000])
    assert reader.payload_pending <= limits.MIB


def test_what_is_no_frame_is_refused() -> None:
    reader = FrameReader()
    reader.buffer()[:12] = b"POST / HTTP/"
    reader.received(12)
    with pytest.raises(ProtocolViolation):
        reader.next_frame()


def test_too_large_a_frame_cannot_be_built() -> None:
    with pytest.raises(ProtocolViolation):
        build_frame(b"", (bytes(limits.MAX_FRAME_PAYLOAD_BYTES), b"x"))
