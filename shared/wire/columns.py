"""Records as columns: ten times smaller than rows of JSON, one pass each way, and checked without being unpacked.

Layout (MessagePack): `{"v": 2, kind: {"seq": …, "at": …, field: …, …}, …}`. Records of one kind are stored together, so
a column holds one type. Forms of a column:

    seq       [first, how many, first, how many, …]: runs of numbers without a hole, ascending
    at        [differences to the value before, from 0], or packed: the first value and the other differences
    numbers   [values], or packed: all in one fixed size
    texts     [values], or {"d": [distinct values], "i": one byte for each record's place in them}; `i` is empty when
              all are the same, and a list of numbers when there are over 256 distinct ones
    others    [values]

Packed is a byte string: the letter of the size as in Python's `struct` (b, h, i, q or d), then little endian values. A
column is packed when that is shorter, so the same records always have the same bytes. Version 1, which is still read,
had lists only, and `seq` was differences like `at`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise, repeat
from operator import le, sub
from typing import Any, Final

import msgspec

from shared import limits
from shared.errors import ProtocolViolation
from shared.telemetry import Body, DeviceEvent, Outcome, Reading, Record, Result

VERSION: Final = 2
MAX_UNPACKED_BYTES: Final = 2 * limits.MAX_BATCH_BYTES
"""Of a batch's texts. Devices cut batches at `MAX_BATCH_BYTES` of unpacked records, and defaults add a little; but
columns can name one long text five hundred times, and would blow up into a hundred megabytes."""

_KINDS: Final[dict[str, type[Body]]] = {"result": Result, "reading": Reading, "outcome": Outcome, "event": DeviceEvent}
_KIND_OF: Final[dict[type[Body], str]] = {body: kind for kind, body in _KINDS.items()}
_FIELDS: Final[dict[str, tuple[str, ...]]] = {kind: body.__struct_fields__ for kind, body in _KINDS.items()}
_MAX: Final = 2**63
_SMALL: Final = 2
"""Up to so many records nothing is won by packing."""
_SIZES: Final = {"b": 1, "h": 2, "i": 4, "q": 8, "d": 8}
_LETTERS: Final = {ord(letter): letter for letter in _SIZES}
_PLACES: Final = bytes(range(256))
_FLOATS: Final = frozenset({"value", "confidence"})
_INTS: Final = frozenset({"took_us", "latency_us"})


class _Dictionary(msgspec.Struct, gc=False):
    """Texts of which few repeat often."""

    d: list[str]
    i: bytes | list[int]


_Texts = list[str] | _Dictionary
_OptionalTexts = list[str | None] | _Dictionary
_Ints = list[int] | bytes
_Floats = list[float] | bytes
_OptionalFloats = list[float | None] | bytes
_Values = Sequence[Any]


class _Numbered(msgspec.Struct, kw_only=True):
    seq: list[int]
    at: _Ints


class _Readings(_Numbered, kw_only=True):
    name: _Texts
    value: _Floats


class _Results(_Numbered, kw_only=True):
    request: _Texts
    model: _Texts
    version: _Texts
    variant: _Texts
    rung: _Texts
    label: _Texts | None = None
    confidence: _Floats | None = None
    took_us: _Ints | None = None


class _Outcomes(_Numbered, kw_only=True):
    request: _Texts
    model: _Texts | None = None
    version: _Texts | None = None
    variant: _Texts | None = None
    label: _OptionalTexts | None = None
    correct: list[bool | None] | None = None
    value: _OptionalFloats | None = None
    latency_us: _Ints | None = None
    source: _Texts | None = None


class _Events(_Numbered, kw_only=True):
    name: _Texts
    detail: list[dict[str, str]] | None = None


class _Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    v: int
    result: _Results | None = None
    reading: _Readings | None = None
    outcome: _Outcomes | None = None
    event: _Events | None = None


_decoder: Final = msgspec.msgpack.Decoder(_Document)
_encoder: Final = msgspec.msgpack.Encoder()

Runs = tuple[tuple[int, int], ...]
"""Ranges of record numbers, both ends inclusive, ascending, neither touching nor overlapping."""


class Columns:
    """Records as they travel: checked, and unpacked only as far as someone asks.

    Attributes:
        kinds: which kinds of records are in (`reading`).
        count: how many records.
        runs: their numbers.
    """

    def __init__(self, groups: dict[str, _Group]) -> None:
        self._groups = groups
        self.kinds = tuple(groups)
        self.count = sum(group.count for group in groups.values())
        self.runs = next(iter(groups.values())).runs if len(groups) == 1 else _merged(groups.values())

    def values(self, kind: str, field: str) -> Sequence[Any] | None:
        """A field of all records of a kind, in the order of their numbers; None when it has its default in all."""
        return self._groups[kind].values(field)

    def records(self) -> list[Record]:
        """All records in ascending order of their numbers."""
        if len(self._groups) == 1:
            return next(iter(self._groups.values())).records()
        records = [record for group in self._groups.values() for record in group.records()]
        records.sort(key=lambda record: record.seq)
        return records


class _Group:
    """The columns of one kind; `columns` holds them as they were decoded, each of the right type and length."""

    __slots__ = ("_columns", "_kind", "count", "runs")

    def __init__(self, kind: str, columns: _Numbered, *, version: int) -> None:
        self._kind = kind
        self._columns = columns
        self.runs = _runs(columns.seq) if version == VERSION else _runs_of_differences(columns.seq)
        self.count = sum(last - first + 1 for first, last in self.runs)
        if self.count > limits.MAX_BATCH_RECORDS:
            raise ProtocolViolation(f"batch of {self.count} records", code="protocol.too_large")
        _check_times(columns.at, self.count)
        for field in _FIELDS[kind]:
            _check(getattr(columns, field), self.count, letters="d" if field in _FLOATS else "bhiq")
            if field in _INTS:
                _check_ints(getattr(columns, field))

    def values(self, field: str) -> Sequence[Any] | None:
        column = getattr(self._columns, field)
        if isinstance(column, _Dictionary):
            return _named(column, self.count)
        return _unpacked(column) if isinstance(column, bytes) else column

    def records(self) -> list[Record]:
        kind = _KINDS[self._kind]
        fields = {field: values for field in _FIELDS[self._kind] if (values := self.values(field)) is not None}
        numbers = (number for first, last in self.runs for number in range(first, last + 1))
        times = accumulate(_differences(self._columns.at, self.count))
        rows = zip(numbers, times, *fields.values(), strict=True)
        return [
            Record(seq=seq, at_ms=at_ms, body=kind(**dict(zip(fields, row, strict=True)))) for seq, at_ms, *row in rows
        ]


def encode_columns(records: Sequence[Record]) -> bytes:
    """The records, which must ascend by `seq`, as columns."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_KIND_OF[type(record.body)], []).append(record)
    document: dict[str, Any] = {"v": VERSION}
    for kind, group in groups.items():
        columns: dict[str, Any] = {
            "seq": _encode_runs([record.seq for record in group]),
            "at": _encode_times([record.at_ms for record in group]),
        }
        bodies = [record.body for record in group]
        for field in _FIELDS[kind]:
            columns[field] = _encode_field(field, [getattr(body, field) for body in bodies])
        document[kind] = columns
    return _encoder.encode(document)


def open_columns(data: bytes) -> Columns:
    """The records in these bytes, checked: what is asked of the answer later cannot fail.

    Raises:
        ProtocolViolation: they are not exactly columns, or more than a batch may hold.
    """
    if len(data) > limits.MAX_BATCH_BYTES:
        raise ProtocolViolation(f"batch of {len(data)} bytes", code="protocol.too_large")
    try:
        document = _decoder.decode(data)
        if document.v not in (1, VERSION):
            raise ProtocolViolation("columns of an unknown version", code="protocol.columns")
        found = ((kind, getattr(document, kind)) for kind in _KINDS)
        opened = Columns(
            {kind: _Group(kind, columns, version=document.v) for kind, columns in found if columns is not None}
        )
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"not columns: {error}", code="protocol.columns") from error
    if opened.count > limits.MAX_BATCH_RECORDS:
        raise ProtocolViolation(f"batch of {opened.count} records", code="protocol.too_large")
    return opened


def decode_columns(data: bytes) -> list[Record]:
    """The records in ascending order of `seq`; raises ProtocolViolation for anything that is not exactly columns."""
    return open_columns(data).records()


# Writing


def _encode_runs(numbers: list[int]) -> list[int]:
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return [numbers[0], len(numbers)]
    runs: list[int] = []
    for number in numbers:
        if runs and number == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += (number, 1)
    return runs


def _encode_times(times: list[int]) -> _Ints:
    differences = list(map(sub, times[1:], times))
    plain = [times[0], *differences]
    if len(times) <= _SMALL:
        return plain
    letter = _size_of(differences)
    packed = struct.pack(f"<cq{len(differences)}{letter}", letter.encode(), times[0], *differences)
    return _shorter(packed, plain)


def _encode_field(field: str, values: list[Any]) -> Any:
    if len(values) <= _SMALL:
        return values
    if field in _FLOATS:
        if any(value is None for value in values):
            return values
        return struct.pack(f"<c{len(values)}d", b"d", *values)
    if field in _INTS:
        letter = _size_of(values)
        return _shorter(struct.pack(f"<c{len(values)}{letter}", letter.encode(), *values), values)
    if isinstance(values[0], str) and all(isinstance(value, str) for value in values):
        return _encode_texts(values)
    return values


def _encode_texts(values: list[str]) -> _Texts | dict[str, Any]:
    distinct = list(dict.fromkeys(values))
    if len(distinct) * 2 > len(values):
        return values
    if len(distinct) == 1:
        return {"d": distinct, "i": b""}
    place = {value: number for number, value in enumerate(distinct)}
    places = [place[value] for value in values]
    return {"d": distinct, "i": bytes(places) if len(distinct) <= 256 else places}


def _shorter(packed: bytes, plain: list[int]) -> _Ints:
    return packed if len(packed) < len(_encoder.encode(plain)) else plain


def _size_of(values: list[int]) -> str:
    highest, lowest = max(values), min(values)
    most = max(highest, -lowest - 1)
    return "b" if most < 2**7 else "h" if most < 2**15 else "i" if most < 2**31 else "q"


# Reading


def _runs(column: list[int]) -> Runs:
    # What nearly every batch is: one run.
    if len(column) == 2 and column[0] >= 0 and 0 < column[1] <= _MAX - column[0]:
        return ((column[0], column[0] + column[1] - 1),)
    runs = tuple((first, first + many - 1) for first, many in zip(column[::2], column[1::2], strict=False) if many > 0)
    if not column or 2 * len(runs) != len(column) or runs[0][0] < 0 or runs[-1][1] >= _MAX:
        raise ProtocolViolation("a numbering column leaves its range", code="protocol.columns")
    if any(next_first <= last + 1 for (_, last), (next_first, _) in pairwise(runs)):
        raise ProtocolViolation("two records of one number", code="protocol.columns")
    return runs


def _runs_of_differences(column: list[int]) -> Runs:
    if len(column) > limits.MAX_BATCH_RECORDS:
        raise ProtocolViolation(f"batch of {len(column)} records", code="protocol.too_large")
    if any(step < 1 for step in column[1:]):
        raise ProtocolViolation("two records of one number", code="protocol.columns")
    return _runs(_encode_runs(list(accumulate(column)))) if column else _runs([])


def _check_times(column: _Ints, count: int) -> None:
    """Raise ProtocolViolation unless the column has a time for each record, and none leaves its range."""
    if isinstance(column, bytes):
        letter = _letter(column, letters="bhiq")
        size = _SIZES[letter]
        if len(column) != 9 + (count - 1) * size:
            raise ProtocolViolation("columns of different lengths", code="protocol.columns")
        # So far from both ends that no differences of this size reach them: nothing has to be unpacked.
        reach = (count - 1) << (8 * size - 1)
        if reach <= int.from_bytes(column[1:9], "little") < _MAX - reach:
            return
    elif len(column) != count:
        raise ProtocolViolation("columns of different lengths", code="protocol.columns")
    differences = _differences(column, count)
    lowest, highest = min(differences), max(differences)
    if differences[0] + count * min(lowest, 0) < 0 or differences[0] + count * max(highest, 0) >= _MAX:
        times = list(accumulate(differences))
        if min(times) < 0 or max(times) >= _MAX:
            raise ProtocolViolation("a numbering column leaves its range", code="protocol.columns")


def _differences(column: _Ints, count: int) -> _Values:
    """A checked column of times as differences, the first from 0."""
    if isinstance(column, bytes):
        return struct.unpack(f"<xq{count - 1}{_LETTERS[column[0]]}", column)
    return column


def _check(column: Any, count: int, *, letters: str) -> None:
    """Raise ProtocolViolation unless the column has a value for each record, and none that blows up."""
    if column is None:
        return
    if isinstance(column, list):
        length = len(column)
    elif isinstance(column, bytes):
        size = _SIZES[_letter(column, letters=letters)]
        length = count if len(column) == 1 + count * size else -1
    else:
        length = _check_dictionary(column, count)
    if length != count:
        raise ProtocolViolation("columns of different lengths", code="protocol.columns")


def _check_ints(column: _Ints | None) -> None:
    """Raise ProtocolViolation for a number of over 64 bits: MessagePack has them, packed columns have not."""
    if isinstance(column, list) and column and not -_MAX <= min(column) <= max(column) < _MAX:
        raise ProtocolViolation("a number leaves its range", code="protocol.columns")


def _check_dictionary(column: _Dictionary, count: int) -> int:
    distinct, places = column.d, column.i
    if len(distinct) > count:
        # Texts that no record has would be kept all the same, and a text of one character takes forty bytes.
        raise ProtocolViolation("a dictionary column has more texts than records", code="protocol.columns")
    if isinstance(places, bytes):
        inside = not places.translate(None, _PLACES[: len(distinct)])
    else:
        inside = min(places, default=0) >= 0 and max(places, default=0) < len(distinct)
    if not distinct or not inside:
        raise ProtocolViolation("a dictionary column points outside itself", code="protocol.columns")
    # The bound that costs nothing first; UTF-8 has up to four bytes a character.
    if 4 * count * max(map(len, distinct)) > MAX_UNPACKED_BYTES:
        sizes = [len(text.encode()) for text in distinct]
        if sum(sizes[place] for place in places or bytes(count)) > MAX_UNPACKED_BYTES:
            raise ProtocolViolation(f"the batch unpacks to over {MAX_UNPACKED_BYTES} bytes", code="protocol.too_large")
    return len(places) if places else count


def _named(column: _Dictionary, count: int) -> list[str]:
    if not column.i:
        return list(repeat(column.d[0], count))
    return [column.d[place] for place in column.i]


def _letter(column: bytes, *, letters: str) -> str:
    letter = _LETTERS.get(column[0]) if column else None
    if letter is None or letter not in letters:
        raise ProtocolViolation("a packed column of an unknown size", code="protocol.columns")
    return letter


def _unpacked(column: bytes) -> _Values:
    letter = _LETTERS[column[0]]
    return struct.unpack_from(f"<{(len(column) - 1) // _SIZES[letter]}{letter}", column, 1)


def _merged(groups: Any) -> Runs:
    numbers = sorted(number for group in groups for first, last in group.runs for number in range(first, last + 1))
    if any(map(le, numbers[1:], numbers)):
        raise ProtocolViolation("two records of one number", code="protocol.columns")
    return _runs(_encode_runs(numbers)) if numbers else ()
