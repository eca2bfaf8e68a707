"""The protobuf wire format, as far as messages without recursion need it: fields out of bytes, bytes out of fields.

Rules of this file:
1. Nothing recurses: a message is split into its fields, and only who knows a field's type looks inside.
2. Embedded bytes are views of what came, never copies; a length is checked before anything is made of it.
3. Whatever the bytes are, the only error is ProtocolViolation. Fields that nobody knows are left alone.

Reference: https://protobuf.dev/programming-guides/encoding/. Not here: groups (deprecated there, refused here).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, TypeAlias

from shared.errors import ProtocolViolation
from shared.federated import Buffer

Value: TypeAlias = int | memoryview
"""A field as it stands on the wire: a number for varints, a view of the bytes for everything else."""

VARINT: Final = 0
FIXED64: Final = 1
LENGTH: Final = 2
FIXED32: Final = 5

_DOUBLE: Final = struct.Struct("<d")
_U64: Final = (1 << 64) - 1


class Part:
    """A message being written: pieces in order, joined once at the end, so that large arrays are copied once."""

    __slots__ = ("length", "pieces")

    def __init__(self) -> None:
        self.pieces: list[Buffer] = []
        self.length = 0

    def _add(self, piece: Buffer) -> None:
        self.pieces.append(piece)
        self.length += len(piece)

    def varint(self, field: int, number: int) -> None:
        """A uint64, an int32 or a bool; negative numbers as their 64-bit complement."""
        self._add(encode_varint(field << 3 | VARINT) + encode_varint(number & _U64))

    def double(self, field: int, number: float) -> None:
        """A double."""
        self._add(encode_varint(field << 3 | FIXED64) + _DOUBLE.pack(number))

    def data(self, field: int, content: Buffer) -> None:
        """A string or bytes."""
        self._add(encode_varint(field << 3 | LENGTH) + encode_varint(len(content)))
        self._add(content)

    def part(self, field: int, part: Part) -> None:
        """An embedded message."""
        self._add(encode_varint(field << 3 | LENGTH) + encode_varint(part.length))
        self.pieces.extend(part.pieces)
        self.length += part.length

    def join(self) -> bytes:
        """The message's bytes."""
        return b"".join(self.pieces)


def fields(data: memoryview) -> Iterator[tuple[int, int, Value]]:
    """Each field of a message: number, wire type, value."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _varint_at(data, at)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise _bad(f"field number {number}")
        if kind == VARINT:
            value, at = _varint_at(data, at)
            yield number, kind, value
            continue
        if kind == LENGTH:
            length, at = _varint_at(data, at)
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        else:
            raise _bad(f"wire type {kind}")
        if length > end - at:
            raise _bad(f"{length} bytes are promised, {end - at} are left")
        yield number, kind, data[at : at + length]
        at += length


def encode_varint(number: int) -> bytes:
    """A number from 0 to 2**64 - 1 as a base 128 varint."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def zigzag(number: int) -> int:
    """A sint64 as the varint that stands for it."""
    return (number << 1) ^ (number >> 63)


def as_unsigned(kind: int, value: Value) -> int:
    """A uint64 field."""
    if kind != VARINT or not isinstance(value, int):
        raise _bad("a number was expected")
    return value


def as_signed(kind: int, value: Value) -> int:
    """A sint64 field."""
    number = as_unsigned(kind, value)
    return (number >> 1) ^ -(number & 1)


def as_int32(kind: int, value: Value) -> int:
    """An int32 field, which is a 64-bit complement on the wire, cut to its low 32 bits as the format says."""
    number = as_unsigned(kind, value) & 0xFFFFFFFF
    return number - (1 << 32) if number >> 31 else number


def as_bool(kind: int, value: Value) -> bool:
    """A bool field."""
    return as_unsigned(kind, value) != 0


def as_double(kind: int, value: Value) -> float:
    """A double field."""
    if kind != FIXED64 or isinstance(value, int):
        raise _bad("a double was expected")
    number: float = _DOUBLE.unpack(value)[0]
    return number


def as_view(kind: int, value: Value) -> memoryview:
    """The bytes of a bytes field, or of an embedded message."""
    if kind != LENGTH or isinstance(value, int):
        raise _bad("bytes were expected")
    return value


def as_text(kind: int, value: Value) -> str:
    """A string field."""
    try:
        return str(as_view(kind, value), "utf-8")
    except UnicodeDecodeError as error:
        raise _bad("a string is not UTF-8") from error


def unpack_varints(kind: int, value: Value, *, at_most: int) -> list[int]:
    """A repeated number: packed, or one of many unpacked ones."""
    if kind == VARINT:
        return [as_unsigned(kind, value)]
    data = as_view(kind, value)
    numbers: list[int] = []
    at = 0
    while at < len(data):
        if len(numbers) >= at_most:
            raise _bad(f"a list of more than {at_most} numbers")
        number, at = _varint_at(data, at)
        numbers.append(number)
    return numbers


def unpack_doubles(kind: int, value: Value, *, at_most: int) -> list[float]:
    """A repeated double: packed, or one of many unpacked ones."""
    if kind == FIXED64:
        return [as_double(kind, value)]
    data = as_view(kind, value)
    if len(data) % 8:
        raise _bad("a list of doubles is cut")
    if len(data) // 8 > at_most:
        raise _bad(f"a list of more than {at_most} numbers")
    return [number for (number,) in _DOUBLE.iter_unpack(data)]


def pack_doubles(numbers: list[float]) -> bytes:
    """A repeated double, packed."""
    return struct.pack(f"<{len(numbers)}d", *numbers)


def _varint_at(data: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            if number > _U64:
                raise _bad("a number of more than 64 bits")
            return number, at
        shift += 7
        if shift > 63:
            raise _bad("a number of more than ten bytes")
    raise _bad("a number is cut")


def _bad(why: str) -> ProtocolViolation:
    return ProtocolViolation(f"not protobuf: {why}", code="protocol.flower")
