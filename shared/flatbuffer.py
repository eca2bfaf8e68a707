"""A reader of flatbuffers that checks every place before it looks at it (flatbuffers.dev, "FlatBuffer Internals").

Why not leave it to the runtime: interpreters follow offsets as they stand, so that a file which says a table lies
beyond its end makes them read foreign memory.

Rules: an offset points forwards and stays inside; a field lies inside its table; numbers and vectors are aligned to
their size; work is bounded by a budget of visits, because tables may be shared and a small file could else name the
same one a million times. Whatever is wrong raises `Damaged` and nothing else.
"""

from __future__ import annotations

from typing import Final

_TABLE_HEAD: Final = 4
_VTABLE_HEAD: Final = 4
_VTABLE_MAX: Final = 4096
"""No schema has a thousand fields."""


class Damaged(Exception):
    """The bytes do not hold what their offsets say."""


class Buffer:
    """The bytes with the visits that are left."""

    def __init__(self, data: memoryview, *, visits: int) -> None:
        self.data = data
        self._visits = visits

    def visit(self, count: int = 1) -> None:
        """Spend visits; raises Damaged when none are left."""
        self._visits -= count
        if self._visits < 0:
            raise Damaged("it names more parts than a file of its length needs")

    def number(self, at: int, size: int, *, signed: bool = False) -> int:
        """The little-endian whole number of `size` bytes at this place."""
        if at < 0 or at % size or at + size > len(self.data):
            raise Damaged("a number lies outside the file or is not aligned")
        return int.from_bytes(self.data[at : at + size], "little", signed=signed)

    def follow(self, at: int) -> int:
        """Where the offset at this place points."""
        target = at + self.number(at, 4)
        if target == at or target + 4 > len(self.data):
            raise Damaged("an offset points outside the file")
        return target

    def root(self) -> Table:
        """The outermost table."""
        return Table(self, self.follow(0))

    def vector(self, at: int, item: int) -> tuple[int, int]:
        """Start and count of the vector at this place, whose items take `item` bytes."""
        self.visit()
        count = self.number(at, 4)
        start = at + 4
        if start % min(item, 4) or start + count * item > len(self.data):
            raise Damaged("a vector is longer than the file")
        return start, count


class Table:
    """One table; fields by their number in the schema."""

    def __init__(self, buffer: Buffer, at: int) -> None:
        buffer.visit()
        self._buffer = buffer
        self._at = at
        self._vtable = at - buffer.number(at, 4, signed=True)
        if self._vtable < 0 or self._vtable % 2:
            raise Damaged("a table's list of fields lies outside the file")
        length = buffer.number(self._vtable, 2)
        self._length = buffer.number(self._vtable + 2, 2)
        fits = self._vtable + length <= len(buffer.data) and at + self._length <= len(buffer.data)
        if not fits or not _VTABLE_HEAD <= length <= _VTABLE_MAX or length % 2 or self._length < _TABLE_HEAD:
            raise Damaged("a table or its list of fields lies outside the file")
        self.fields = (length - _VTABLE_HEAD) // 2

    def place(self, field: int, size: int) -> int | None:
        """Where the field's `size` bytes lie; None where it is left out."""
        if field >= self.fields:
            return None
        offset = self._buffer.number(self._vtable + _VTABLE_HEAD + 2 * field, 2)
        if offset == 0:
            return None
        if offset < _TABLE_HEAD or offset + size > self._length:
            raise Damaged("a field lies outside its table")
        return self._at + offset

    def number(self, field: int, size: int, *, default: int = 0, signed: bool = False) -> int:
        """A whole number, `default` where it is left out."""
        at = self.place(field, size)
        return default if at is None else self._buffer.number(at, size, signed=signed)

    def table(self, field: int) -> Table | None:
        """A table, None where it is left out."""
        at = self.place(field, 4)
        return None if at is None else Table(self._buffer, self._buffer.follow(at))

    def tables(self, field: int) -> list[Table]:
        """A vector of tables, empty where it is left out."""
        at = self.place(field, 4)
        if at is None:
            return []
        start, count = self._buffer.vector(self._buffer.follow(at), 4)
        self._buffer.visit(count)
        return [Table(self._buffer, self._buffer.follow(start + 4 * index)) for index in range(count)]

    def length(self, field: int, item: int) -> int:
        """How many items of `item` bytes a vector has; 0 where it is left out."""
        at = self.place(field, 4)
        return 0 if at is None else self._buffer.vector(self._buffer.follow(at), item)[1]

    def numbers(self, field: int, *, item: int = 4, signed: bool = True, most: int) -> list[int]:
        """A vector of whole numbers, of which there may be `most`; empty where it is left out."""
        at = self.place(field, 4)
        if at is None:
            return []
        start, count = self._buffer.vector(self._buffer.follow(at), item)
        if count > most:
            raise Damaged(f"a list of {count} numbers is longer than {most}")
        self._buffer.visit(count)
        data = self._buffer.data[start : start + count * item]
        return [
            int.from_bytes(data[place : place + item], "little", signed=signed) for place in range(0, len(data), item)
        ]

    def text(self, field: int, *, most: int = 4096) -> str:
        """A string, empty where it is left out; it ends with the zero byte that C code looks for."""
        at = self.place(field, 4)
        if at is None:
            return ""
        start, count = self._buffer.vector(self._buffer.follow(at), 1)
        if count > most or start + count >= len(self._buffer.data) or self._buffer.data[start + count] != 0:
            raise Damaged("a text is too long or does not end")
        try:
            return bytes(self._buffer.data[start : start + count]).decode()
        except UnicodeDecodeError as error:
            raise Damaged("a text is not UTF-8") from error
