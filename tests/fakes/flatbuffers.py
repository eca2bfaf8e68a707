"""A writer of flatbuffers for tests: as much of the format as hostile and honest LiteRT files need.

A table is a dict from field number to value: `I8(3)`, `I32(7)`, a text, `Vector("<i", (1, 2))`, another dict, or a list
of dicts. Everything that is referred to lies behind what refers to it, because offsets only point forwards.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scalar:
    """A number of a struct format."""

    form: str
    value: float


@dataclass(frozen=True)
class Vector:
    """Numbers of a struct format."""

    form: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Raw:
    """An offset as it is written, wherever it points."""

    offset: int


def i8(value: int) -> Scalar:
    """A signed byte."""
    return Scalar("<b", value)


def i32(value: int) -> Scalar:
    """A signed number of four bytes."""
    return Scalar("<i", value)


def u64(value: int) -> Scalar:
    """A number of eight bytes."""
    return Scalar("<Q", value)


def vector(*values: int) -> Vector:
    """A vector of signed numbers of four bytes."""
    return Vector("<i", values)


def write(root: dict[int, Any], *, identifier: bytes = b"TFL3") -> bytes:
    """The file."""
    out = bytearray(4) + identifier
    struct.pack_into("<I", out, 0, _table(out, root))
    return bytes(out)


def _align(out: bytearray, size: int) -> None:
    out.extend(bytes(-len(out) % size))


def _table(out: bytearray, fields: dict[int, Any]) -> int:
    slots: dict[int, int] = {}
    size = 4
    for number, value in fields.items():
        width = struct.calcsize(value.form) if isinstance(value, Scalar) else 4
        size += -size % width
        slots[number] = size
        size += width
    count = max(fields, default=-1) + 1
    _align(out, 2)
    # So placed that the table after it is aligned to eight.
    while (len(out) + 4 + 2 * count) % 8:
        out.extend(b"\0\0")
    vtable = len(out)
    out.extend(struct.pack(f"<{2 + count}H", 4 + 2 * count, size, *(slots.get(number, 0) for number in range(count))))
    at = len(out)
    out.extend(struct.pack("<i", at - vtable) + bytes(size - 4))
    for number, value in fields.items():
        place = at + slots[number]
        if isinstance(value, Scalar):
            struct.pack_into(value.form, out, place, int(value.value) if value.form[1] in "bBhHiIqQ" else value.value)
        elif isinstance(value, Raw):
            struct.pack_into("<I", out, place, value.offset % 2**32)
        else:
            target = _value(out, value)
            struct.pack_into("<I", out, place, target - place)
    return at


def _value(out: bytearray, value: Any) -> int:
    if isinstance(value, dict):
        return _table(out, value)
    if isinstance(value, str):
        _align(out, 4)
        at = len(out)
        data = value.encode()
        out.extend(struct.pack("<I", len(data)) + data + b"\0")
        return at
    if isinstance(value, Vector):
        width = struct.calcsize(value.form)
        while (len(out) + 4) % max(width, 4):
            out.extend(b"\0")
        at = len(out)
        out.extend(struct.pack("<I", len(value.values)))
        for item in value.values:
            out.extend(struct.pack(value.form, item))
        return at
    _align(out, 4)
    at = len(out)
    out.extend(struct.pack("<I", len(value)) + bytes(4 * len(value)))
    for index, item in enumerate(value):
        place = at + 4 + 4 * index
        struct.pack_into("<I", out, place, _table(out, item) - place)
    return at
