"""Frames: twelve bytes that say how much follows, refused before anything of that size is allocated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits
from shared.errors import ProtocolViolation
from shared.wire import frames

headers = st.integers(0, limits.MAX_FRAME_HEADER_BYTES)
payloads = st.integers(0, limits.MAX_FRAME_PAYLOAD_BYTES)


@given(headers, payloads)
def test_lengths_survive(header_bytes: int, payload_bytes: int) -> None:
    prefix = frames.prefix(header_bytes, payload_bytes)
    assert len(prefix) == frames.PREFIX_BYTES
    assert frames.parse_prefix(prefix) == (header_bytes, payload_bytes)
    assert frames.parse_prefix(memoryview(bytearray(prefix))) == (header_bytes, payload_bytes)


@given(st.binary(min_size=frames.PREFIX_BYTES, max_size=frames.PREFIX_BYTES))
def test_no_prefix_leads_to_more_than_the_limits(data: bytes) -> None:
    try:
        header_bytes, payload_bytes = frames.parse_prefix(data)
    except ProtocolViolation:
        return
    assert header_bytes <= limits.MAX_FRAME_HEADER_BYTES
    assert payload_bytes <= limits.MAX_FRAME_PAYLOAD_BYTES


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes"),
    [(limits.MAX_FRAME_HEADER_BYTES + 1, 0), (0, limits.MAX_FRAME_PAYLOAD_BYTES + 1), (2**32 - 1, 2**32 - 1)],
)
def test_a_frame_that_is_too_large_is_refused_on_both_sides(header_bytes: int, payload_bytes: int) -> None:
    with pytest.raises(ProtocolViolation, match="too large"):
        frames.prefix(header_bytes, payload_bytes)
    forged = frames.prefix(0, 0)[:4] + header_bytes.to_bytes(4, "big") + payload_bytes.to_bytes(4, "big")
    with pytest.raises(ProtocolViolation, match="too large"):
        frames.parse_prefix(forged)


def test_the_hint_is_about_the_part_that_is_too_large() -> None:
    for header_bytes, payload_bytes, limit in (
        (limits.MAX_FRAME_HEADER_BYTES + 1, 0, limits.MAX_RECORD_BYTES),
        (0, limits.MAX_FRAME_PAYLOAD_BYTES + 1, limits.MAX_FRAME_PAYLOAD_BYTES),
    ):
        with pytest.raises(ProtocolViolation) as caught:
            frames.prefix(header_bytes, payload_bytes)
        assert str(limit) in caught.value.hint


@pytest.mark.parametrize("start", [b"GET / HT", b"POST /v2", b"\xf1\x02\x00\x00", b"\xf1\x01\x00\x01", b"\x00\x01"])
def test_what_is_not_a_frame_is_refused(start: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="not an Outrider frame"):
        frames.parse_prefix(start.ljust(frames.PREFIX_BYTES, b"\0"))


def test_no_http_method_starts_like_a_frame() -> None:
    assert frames.MAGIC > 127
