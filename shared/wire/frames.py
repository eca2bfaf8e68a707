"""Frames on a byte stream: the agent's local socket, and the pipe between the core and a model host.

    byte 0      0xF1, which no HTTP method starts with
    byte 1      version, 1
    bytes 2-3   reserved, zero
    bytes 4-7   header length, big-endian, at most MAX_FRAME_HEADER_BYTES
    bytes 8-11  payload length, big-endian, at most MAX_FRAME_PAYLOAD_BYTES
    header      MessagePack (shared/inference.py)
    payload     the tensors' elements, little-endian, row-major, back to back in the header's order

The core passes payloads on without looking inside: that is how it stays free of numpy.
"""

from __future__ import annotations

import struct
from typing import Final

from shared import limits
from shared.errors import ProtocolViolation

PREFIX_BYTES: Final = 12
MAGIC: Final = 0xF1
VERSION: Final = 1
_PREFIX: Final = struct.Struct(">BBHII")


def prefix(header_bytes: int, payload_bytes: int) -> bytes:
    """The twelve bytes before a header of this length and a payload of this length."""
    if header_bytes > limits.MAX_FRAME_HEADER_BYTES or payload_bytes > limits.MAX_FRAME_PAYLOAD_BYTES:
        raise _too_large(header_bytes, payload_bytes)
    return _PREFIX.pack(MAGIC, VERSION, 0, header_bytes, payload_bytes)


def parse_prefix(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Header and payload length; raises ProtocolViolation before anything of that size is allocated."""
    magic, version, reserved, header_bytes, payload_bytes = _PREFIX.unpack(data)
    if magic != MAGIC or version != VERSION or reserved != 0:
        raise ProtocolViolation("this is not an Outrider frame", code="protocol.frame")
    if header_bytes > limits.MAX_FRAME_HEADER_BYTES or payload_bytes > limits.MAX_FRAME_PAYLOAD_BYTES:
        raise _too_large(header_bytes, payload_bytes)
    return int(header_bytes), int(payload_bytes)


def _too_large(header_bytes: int, payload_bytes: int) -> ProtocolViolation:
    hint = f"send at most {limits.MAX_FRAME_PAYLOAD_BYTES} bytes of tensors in one request"
    if header_bytes > limits.MAX_FRAME_HEADER_BYTES:
        hint = (
            f"shorten its names and labels: a header has at most {limits.MAX_FRAME_HEADER_BYTES} bytes, "
            f"what is kept as a record at most {limits.MAX_RECORD_BYTES}"
        )
    return ProtocolViolation(
        f"frame of {header_bytes} + {payload_bytes} bytes is too large", code="protocol.too_large", hint=hint
    )
