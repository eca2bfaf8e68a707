"""Reading frames from a byte stream without doing the reading: bytes are received straight into its buffers.

    reader.buffer()        where the next bytes shall go
    reader.received(n)     that many bytes are there now
    reader.next_frame()    a whole frame, or None; call it until it says None

Rules: nothing is allocated before the prefix passed its check, and memory grows with what has arrived, not with what
was announced; a payload that does not come in one piece with its header is received into its own memory.

No sockets and no asyncio here, so that the blocking client, the asyncio client, the door and both ends of a model
host share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from shared import limits
from shared.wire import frames

Buffer: TypeAlias = bytes | bytearray | memoryview

_SCRATCH_BYTES: Final = frames.PREFIX_BYTES + limits.MAX_FRAME_HEADER_BYTES
_JOIN_BYTES: Final = 256 * limits.KIB
"""Up to here one copy costs less than a second system call and a second wake-up of the reader."""

_STEP_BYTES: Final = limits.MIB
"""A payload's first allocation; it doubles as bytes arrive, so that announcing 64 MiB costs the sender 64 MiB."""


def build_frame(header: bytes, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """A frame in the fewest pieces worth sending; raises ProtocolViolation when it is too large."""
    size = sum(len(part) for part in payload)
    start = frames.prefix(len(header), size) + header
    if size <= _JOIN_BYTES:
        return [b"".join((start, *payload))]
    return [start, *payload]


class FrameReader:
    """Cuts one stream into frames."""

    __slots__ = ("_begin", "_end", "_filled", "_header", "_lengths", "_payload", "_scratch")

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._begin = 0
        self._end = 0
        self._lengths: tuple[int, int] | None = None
        self._header = b""
        self._payload: bytearray | None = None
        self._filled = 0

    @property
    def payload_pending(self) -> int:
        """Bytes set aside for a payload that has not arrived in full."""
        return len(self._payload) if self._payload is not None else 0

    def buffer(self) -> memoryview:
        """Where to put the next bytes; never empty, provided that `next_frame` was called until it said None."""
        payload = self._payload
        if payload is not None and self._lengths is not None:
            if self._filled == len(payload):
                payload.extend(bytes(min(self._lengths[1] - self._filled, self._filled)))
            return memoryview(payload)[self._filled :]
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._end == _SCRATCH_BYTES or self._begin > _SCRATCH_BYTES // 2:
            rest = bytes(self._scratch[self._begin : self._end])
            self._scratch[: len(rest)] = rest
            self._begin, self._end = 0, len(rest)
        return self._scratch[self._end :]

    def received(self, count: int) -> None:
        """`count` bytes were put into what `buffer` gave last."""
        if self._payload is not None:
            self._filled += count
        else:
            self._end += count

    def next_frame(self) -> tuple[bytes, bytearray] | None:
        """Header and payload of the next whole frame; raises ProtocolViolation when this is no frame of ours."""
        if self._payload is None and not self._begin_payload():
            return None
        payload = self._payload
        if payload is None or self._lengths is None or self._filled < self._lengths[1]:
            return None
        self._payload, self._lengths = None, None
        return self._header, payload

    def _begin_payload(self) -> bool:
        have = self._end - self._begin
        if self._lengths is None:
            if have < frames.PREFIX_BYTES:
                return False
            self._lengths = frames.parse_prefix(self._scratch[self._begin : self._begin + frames.PREFIX_BYTES])
            self._begin += frames.PREFIX_BYTES
            have -= frames.PREFIX_BYTES
        header_bytes, payload_bytes = self._lengths
        if have < header_bytes:
            return False
        start = self._begin + header_bytes
        self._header = bytes(self._scratch[self._begin : start])
        there = min(payload_bytes, self._end - start)
        self._payload = bytearray(max(there, min(payload_bytes, _STEP_BYTES)))
        self._payload[:there] = self._scratch[start : start + there]
        self._filled = there
        self._begin = start + there
        return True
