"""The bytes of a patch: a header, then up to nine streams, one after the other.

    magic "OTRP", version 1
    base: SHA-256, length       result: SHA-256, length          lengths are unsigned, little-endian, of 8 bytes
    which of the nine streams there are, a bit each, in 2 bytes; the others are empty
    for each of them: method (0 as it is, 1 .lzma), length when unpacked, length here, of 4 bytes
    the streams' bytes

The streams: steps, literals, differences of single bytes, of 16-bit numbers in 2 byte planes, of 32-bit numbers in 4.
Each is packed by itself, because each has statistics of its own. The steps are varints (7 bits at a time, the lowest
first): `length << 3 | kind`, and for all kinds but literals the distance of the base's offset from where the last step
ended in the base, zigzag. The steps make the result from its first byte to its last.

    kind        makes `length` bytes
    0 literal   from the stream of literals
    1 copy      as they are in the base
    2 bytes     base + difference, modulo 256
    3 shorts    base + difference, 16 bits, little-endian; the difference is zigzag, low bytes in one plane
    4 words     the same with 32 bits

A `.lzma` stream names its dictionary in its header; reader and writer keep it within the bounds below.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from shared import limits
from shared.errors import PatchFailed
from shared.limits import KIB, MIB

MAGIC: Final = b"OTRP\x01"
LITERAL: Final = 0
COPY: Final = 1
ADD_BYTES: Final = 2
ADD_SHORTS: Final = 3
ADD_WORDS: Final = 4
WIDTHS: Final = {ADD_BYTES: 1, ADD_SHORTS: 2, ADD_WORDS: 4}

STEPS_STREAM: Final = 0
LITERAL_STREAM: Final = 1
DIFFERENCE_STREAMS: Final = {ADD_BYTES: (2,), ADD_SHORTS: (3, 4), ADD_WORDS: (5, 6, 7, 8)}
STREAMS: Final = 9

RAW: Final = 0
LZMA: Final = 1

MAX_STEP_BYTES: Final = 4 * MIB
"""The stream of steps when unpacked: two million steps, which a device reads in some seconds."""
MAX_DICTIONARY_BYTES: Final = 8 * MIB
"""Of all streams together: the decoders keep their dictionaries in memory side by side."""
LZMA_HEADER_BYTES: Final = 13
STREAM_MEMORY_BYTES: Final = MAX_DICTIONARY_BYTES + 512 * KIB
"""What one decoder may take; liblzma refuses a stream that asks for more."""

_HEADER: Final = struct.Struct("<5s32sQ32sQH")
_STREAM: Final = struct.Struct("<BII")
HEADER_BYTES: Final = _HEADER.size + STREAMS * _STREAM.size
"""The longest that a header is."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Which file a patch starts from and which it makes, by SHA-256 (hexadecimal) and length in bytes."""

    base: str
    base_length: int
    result: str
    result_length: int


class StreamHead(msgspec.Struct, frozen=True, kw_only=True):
    """How one stream is packed.

    Attributes:
        method: RAW or LZMA.
        length: bytes when unpacked.
        packed: bytes in the patch.
    """

    method: int
    length: int
    packed: int


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """A patch's header."""

    terms: Terms
    streams: tuple[StreamHead, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return _HEADER.size + _STREAM.size * sum(1 for stream in self.streams if stream.length)


def encode_head(head: Head) -> bytes:
    """The header's bytes."""
    terms = head.terms
    used = [number for number, stream in enumerate(head.streams) if stream.length]
    data = _HEADER.pack(
        MAGIC,
        bytes.fromhex(terms.base),
        terms.base_length,
        bytes.fromhex(terms.result),
        terms.result_length,
        sum(1 << number for number in used),
    )
    streams = (head.streams[number] for number in used)
    return data + b"".join(_STREAM.pack(stream.method, stream.length, stream.packed) for stream in streams)


def decode_head(data: bytes, *, patch_length: int) -> Head:
    """Parse and check the header that these bytes begin with; raises PatchFailed unless all lengths are in bounds."""
    if len(data) < _HEADER.size or not data.startswith(MAGIC):
        raise malformed("it does not begin like a patch of a version that is known")
    _, base, base_length, result, result_length, used = _HEADER.unpack_from(data)
    end = _HEADER.size + _STREAM.size * used.bit_count()
    if used >> STREAMS or len(data) < end:
        raise malformed("its header is cut off")
    heads = _STREAM.iter_unpack(data[_HEADER.size : end])
    streams = tuple(
        StreamHead(method=method, length=length, packed=packed)
        for method, length, packed in (next(heads) if used >> number & 1 else (RAW, 0, 0) for number in range(STREAMS))
    )
    if not (0 < base_length <= limits.MAX_MODEL_BYTES and 0 < result_length <= limits.MAX_MODEL_BYTES):
        raise malformed("it speaks of files that are no models by their length")
    for index, stream in enumerate(streams):
        most = MAX_STEP_BYTES if index == STEPS_STREAM else result_length
        if stream.length > most or stream.method not in (RAW, LZMA) or (used >> index & 1) != (stream.length > 0):
            raise malformed(f"stream {index} is out of bounds")
        if stream.method == RAW and stream.length != stream.packed:
            raise malformed(f"stream {index} has two lengths")
    if sum(stream.packed for stream in streams) + end != patch_length:
        raise malformed("its streams do not fill it")
    terms = Terms(base=base.hex(), base_length=base_length, result=result.hex(), result_length=result_length)
    return Head(terms=terms, streams=streams)


def dictionary_bytes(header: bytes) -> int:
    """The dictionary that a `.lzma` stream asks for in its first bytes; raises PatchFailed when they are cut off."""
    if len(header) < LZMA_HEADER_BYTES:
        raise malformed("a stream is too short")
    return int.from_bytes(header[1:5], "little")


def encode_varint(number: int) -> bytes:
    """7 bits at a time, the lowest first."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def malformed(why: str) -> PatchFailed:
    """What is raised for bytes that are no patch."""
    return PatchFailed(f"the patch is malformed: {why}", code="transfer.patch.malformed", hint=FETCH_WHOLE)


FETCH_WHOLE: Final = "the whole file is fetched instead"
