"""Walks the fields of protobuf messages in ONNX files, by position: what the admission gate and patches stand on.

The wire format of developers.google.com/protocol-buffers/docs/encoding, in standard Python only. Nothing is copied and
nothing recurses: who knows a field's type walks into it. Malformed bytes raise InvalidValue `model.admission` and
nothing else; the number of fields is bounded by an Allowance that all walks over one file share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shared import limits
from shared.errors import InvalidValue

MAX_FIELDS: Final = 40 * limits.MAX_GRAPH_NODES
"""Fields read before the file counts as an attack on the reader's time; ordinary graphs need 10 to 20 per node."""

VARINT: Final = 0
FIXED64: Final = 1
BYTES: Final = 2
FIXED32: Final = 5

Span = tuple[int, int, int, int, int]
"""Number, wire type, value of a varint (0 otherwise), where the content begins and where it ends."""


class Allowance:
    """How many more fields may be read of a file: MAX_FIELDS in all."""

    def __init__(self) -> None:
        self._left = MAX_FIELDS

    def spend(self) -> None:
        """One field is read; raises InvalidValue when none is left."""
        self._left -= 1
        if self._left < 0:
            raise refusal(f"the file has more than {MAX_FIELDS} fields")


def walk(view: memoryview, allowance: Allowance, *, begin: int = 0, end: int | None = None) -> Iterator[Span]:
    """The fields of the message between two positions, in their order; raises InvalidValue when it is malformed."""
    at, end = begin, len(view) if end is None else end
    while at < end:
        allowance.spend()
        key, at = varint(view, at, end)
        number, wire = key >> 3, key & 7
        if not 0 < number < 2**29:
            raise refusal("a field has no valid number")
        if wire == VARINT:
            value, at = varint(view, at, end)
            yield number, wire, value, at, at
            continue
        if wire == BYTES:
            size, at = varint(view, at, end)
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise refusal("a field has a type that ONNX does not use")
        if size > end - at:
            raise refusal("the file ends in the middle of a field")
        yield number, wire, 0, at, at + size
        at += size


def varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    """A number of up to 64 bits, and the position after it."""
    value = 0
    for count in range(10):
        if at >= end:
            raise refusal("the file ends in the middle of a number")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise refusal("a number is too long")


def refusal(message: str, *, hint: str = "check that the file is a complete ONNX model") -> InvalidValue:
    """What is raised for a file that cannot be admitted."""
    return InvalidValue(message, code="model.admission", hint=hint)
