"""Flower's messages (`flwr.proto.Message`) in bytes, without Flower: what a device of a federated run speaks.

Rules of this file:
1. Byte for byte what flwr 1.41 writes for the same message, and everything that it writes is read. A sint64 above
   2**63 - 1 is a uint64 on the wire, and an empty list is what flwr makes of one; both are numbers and lists here.
2. Arrays stay what they are on the wire, `.npy` bytes, as views of the message: nobody here looks inside them.
3. Bounded in bytes, fields, records, items and list lengths before anything is made; the format has a fixed depth, so
   nothing recurses. Malformed bytes raise ProtocolViolation and nothing else. Names that come twice in a record are
   refused, where protobuf would let the last one win.

Not here: the values (shared/federated.py), and `.npy` (edge_agent/trainers).
Reference: flwr/proto/{message,recorddict,error}.proto, unchanged since flwr 1.20 but for the optional task ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar, cast

from shared import limits
from shared.errors import ProtocolViolation
from shared.federated import (
    Array,
    ArrayRecord,
    Buffer,
    ConfigRecord,
    ConfigValue,
    FlowerError,
    FlowerMessage,
    FlowerRecord,
    ListValue,
    Metadata,
    MetricRecord,
    MetricValue,
)
from shared.wire import protobuf
from shared.wire.protobuf import Part, Value

_INT64_MAX: Final = (1 << 63) - 1
_T = TypeVar("_T")


def encode_message(message: FlowerMessage) -> bytes:
    """The message's bytes; raises ProtocolViolation for what the format or its bounds do not allow."""
    whole = Part()
    try:
        whole.part(1, _metadata_part(message.metadata))
        if message.content is not None:
            whole.part(2, _content_part(message.content))
        if message.error is not None:
            whole.part(3, _error_part(message.error))
    except UnicodeEncodeError as error:
        raise _bad("a text holds half a character") from error
    if whole.length > limits.MAX_ROUND_MESSAGE_BYTES:
        raise ProtocolViolation(f"message of {whole.length} bytes", code="protocol.too_large")
    return whole.join()


def decode_message(data: Buffer) -> FlowerMessage:
    """The message; its arrays are views of `data`, which must not change. Raises ProtocolViolation."""
    if len(data) > limits.MAX_ROUND_MESSAGE_BYTES:
        raise ProtocolViolation(f"message of {len(data)} bytes", code="protocol.too_large")
    return _Reading().message(memoryview(data))


# ---------------------------------------------------------------------------------------------------- writing


def _metadata_part(metadata: Metadata) -> Part:
    part = Part()
    _put_unsigned(part, 1, metadata.run_id)
    _put_text(part, 2, metadata.message_id)
    _put_unsigned(part, 3, metadata.src_node_id)
    _put_unsigned(part, 4, metadata.dst_node_id)
    _put_text(part, 5, metadata.reply_to_message_id)
    _put_text(part, 6, metadata.group_id)
    _put_double(part, 7, metadata.ttl)
    _put_text(part, 8, metadata.message_type)
    _put_double(part, 9, metadata.created_at)
    for field, task in ((10, metadata.src_task_id), (11, metadata.dst_task_id)):
        if task is not None:
            part.varint(field, _unsigned(task))
    return part


def _content_part(content: Mapping[str, FlowerRecord]) -> Part:
    _check_count(len(content), limits.MAX_ROUND_ITEMS, "records")
    part = Part()
    for name, record in content.items():
        match record:
            case ArrayRecord(arrays):
                entry = _entry(name, 2, _items_part(arrays, _array_part))
            case MetricRecord(metrics):
                entry = _entry(name, 3, _items_part(metrics, _metric_part))
            case ConfigRecord(settings):
                entry = _entry(name, 4, _items_part(settings, _config_part))
        part.part(1, entry)
    return part


def _items_part(items: Mapping[str, _T], write: Callable[[_T], Part]) -> Part:
    _check_count(len(items), limits.MAX_ROUND_ITEMS, "items")
    part = Part()
    for key, value in items.items():
        part.part(1, _entry(key, 2, write(value)))
    return part


def _entry(key: str, field: int, value: Part) -> Part:
    part = Part()
    _put_text(part, 1, key)
    part.part(field, value)
    return part


def _array_part(array: Array) -> Part:
    part = Part()
    _check_count(len(array.shape), limits.MAX_TENSOR_RANK, "axes")
    if any(not 0 <= size < 1 << 31 for size in array.shape):
        raise _bad(f"an array of shape {list(array.shape)}")
    _put_text(part, 1, array.dtype)
    if array.shape:
        part.data(2, b"".join(map(protobuf.encode_varint, array.shape)))
    _put_text(part, 3, array.stype)
    if len(array.data):
        part.data(4, array.data)
    return part


def _metric_part(value: MetricValue) -> Part:
    part = Part()
    if isinstance(value, list):
        _put_numbers(part, value, empty=21)
    else:
        _put_number(part, value)
    return part


def _config_part(value: ConfigValue) -> Part:
    part = Part()
    match value:
        case bool():
            part.varint(4, int(value))
        case str():
            part.data(5, value.encode())
        case bytes():
            part.data(6, value)
        case list():
            _put_list(part, value)
        case _:
            _put_number(part, value)
    return part


def _put_list(part: Part, values: ListValue) -> None:
    _check_count(len(values), limits.MAX_ROUND_LIST, "list elements")
    inner = Part()
    kinds = {type(value) for value in values}
    if kinds <= {bool}:  # an empty list too: it is flwr's first choice
        if values:
            inner.data(1, bytes(bool(value) for value in values))
        part.part(24, inner)
    elif kinds == {str}:
        for text in cast(list[str], values):
            inner.data(1, text.encode())
        part.part(25, inner)
    elif kinds == {bytes}:
        for data in cast(list[bytes], values):
            inner.data(1, data)
        part.part(26, inner)
    else:
        _put_numbers(part, values, empty=24)


def _put_number(part: Part, value: int | float) -> None:
    if isinstance(value, float):
        part.double(1, value)
    elif value > _INT64_MAX:
        part.varint(3, _unsigned(value))
    else:
        part.varint(2, _signed(value))


def _put_numbers(part: Part, values: ListValue, *, empty: int) -> None:
    _check_count(len(values), limits.MAX_ROUND_LIST, "list elements")
    inner = Part()
    kinds = {type(value) for value in values}
    if not values:
        part.part(empty, inner)
    elif kinds == {float}:
        inner.data(1, protobuf.pack_doubles(cast(list[float], values)))
        part.part(21, inner)
    elif kinds != {int}:
        raise _bad("a list of several types")
    else:
        numbers = cast(list[int], values)
        field, encoded = (23, _unsigned) if max(numbers) > _INT64_MAX else (22, _signed)
        inner.data(1, b"".join(protobuf.encode_varint(encoded(number)) for number in numbers))
        part.part(field, inner)


def _error_part(error: FlowerError) -> Part:
    part = Part()
    if error.code:
        part.varint(1, _signed(error.code))
    _put_text(part, 2, error.reason)
    return part


def _put_text(part: Part, field: int, text: str) -> None:
    if text:
        part.data(field, text.encode())


def _put_unsigned(part: Part, field: int, number: int) -> None:
    if number:
        part.varint(field, _unsigned(number))


def _put_double(part: Part, field: int, number: float) -> None:
    if number or str(number) == "-0.0":
        part.double(field, number)


def _unsigned(number: int) -> int:
    if not 0 <= number < 1 << 64:
        raise _bad(f"{number} is no uint64")
    return number


def _signed(number: int) -> int:
    if not -(1 << 63) <= number <= _INT64_MAX:
        raise _bad(f"{number} is no sint64")
    return protobuf.zigzag(number)


# ---------------------------------------------------------------------------------------------------- reading


class _Reading:
    """One message being read, with what may still be looked at in it."""

    def __init__(self) -> None:
        self._left = limits.MAX_ROUND_FIELDS

    def message(self, data: memoryview) -> FlowerMessage:
        """The whole of it."""
        found = self._once(data, {1: "metadata", 2: "content", 3: "error"})
        return FlowerMessage(
            metadata=self._metadata(found["metadata"]) if "metadata" in found else Metadata(),
            content=self._content(found["content"]) if "content" in found else None,
            error=self._error(found["error"]) if "error" in found else None,
        )

    def _fields(self, data: memoryview) -> Iterator[tuple[int, int, Value]]:
        for found in protobuf.fields(data):
            self._left -= 1
            if self._left < 0:
                self._spend(0)
            yield found

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ProtocolViolation(f"more than {limits.MAX_ROUND_FIELDS} fields", code="protocol.too_large")

    def _metadata(self, data: memoryview) -> Metadata:
        texts = {2: "", 5: "", 6: "", 8: ""}
        numbers: dict[int, int] = {}
        doubles = {7: 0.0, 9: 0.0}
        for field, kind, value in self._fields(data):
            if field in texts:
                texts[field] = protobuf.as_text(kind, value)
            elif field in doubles:
                doubles[field] = protobuf.as_double(kind, value)
            elif field in (1, 3, 4, 10, 11):
                numbers[field] = protobuf.as_unsigned(kind, value)
        return Metadata(
            run_id=numbers.get(1, 0),
            message_id=texts[2],
            src_node_id=numbers.get(3, 0),
            dst_node_id=numbers.get(4, 0),
            reply_to_message_id=texts[5],
            group_id=texts[6],
            ttl=doubles[7],
            message_type=texts[8],
            created_at=doubles[9],
            src_task_id=numbers.get(10),
            dst_task_id=numbers.get(11),
        )

    def _content(self, data: memoryview) -> dict[str, FlowerRecord]:
        content: dict[str, FlowerRecord] = {}
        for entry in self._entries(data):
            found = self._once(entry, {2: "arrays", 3: "metrics", 4: "settings"})
            name = self._key(entry, content)
            match list(found.items()):
                case [("arrays", record)]:
                    content[name] = ArrayRecord(self._items(record, self._array))
                case [("metrics", record)]:
                    content[name] = MetricRecord(self._items(record, self._metric))
                case [("settings", record)]:
                    content[name] = ConfigRecord(self._items(record, self._config))
                case _:
                    raise _bad(f"the record {name[:80]!r} holds {len(found)} kinds, one is expected")
        return content

    def _entries(self, data: memoryview) -> list[memoryview]:
        entries: list[memoryview] = []
        for field, kind, value in self._fields(data):
            if field == 1:
                entries.append(protobuf.as_view(kind, value))
                _check_count(len(entries), limits.MAX_ROUND_ITEMS, "items")
        return entries

    def _items(self, data: memoryview, read: Callable[[memoryview], _T]) -> dict[str, _T]:
        items: dict[str, _T] = {}
        for entry in self._entries(data):
            key = self._key(entry, items)
            found = self._once(entry, {2: "value"})
            if not found:
                raise _bad(f"the item {key[:80]!r} has no value")
            items[key] = read(found["value"])
        return items

    def _key(self, entry: memoryview, taken: Mapping[str, object]) -> str:
        key = ""
        for field, kind, value in self._fields(entry):
            if field == 1:
                key = protobuf.as_text(kind, value)
        if key in taken:
            raise _bad(f"{key[:80]!r} comes twice")
        return key

    def _array(self, data: memoryview) -> Array:
        dtype = stype = ""
        shape: list[int] = []
        content: memoryview = data[:0]
        for field, kind, value in self._fields(data):
            match field:
                case 1:
                    dtype = protobuf.as_text(kind, value)
                case 2:
                    numbers = protobuf.unpack_varints(kind, value, at_most=limits.MAX_TENSOR_RANK)
                    shape.extend(protobuf.as_int32(protobuf.VARINT, number) for number in numbers)
                    _check_count(len(shape), limits.MAX_TENSOR_RANK, "axes")
                case 3:
                    stype = protobuf.as_text(kind, value)
                case 4:
                    content = protobuf.as_view(kind, value)
                case _:
                    pass
        if any(size < 0 for size in shape):
            raise _bad(f"an array of shape {shape}")
        return Array(dtype=dtype, shape=tuple(shape), stype=stype, data=content)

    def _metric(self, data: memoryview) -> MetricValue:
        return cast(MetricValue, self._oneof(data, _NUMERIC))

    def _config(self, data: memoryview) -> ConfigValue:
        return self._oneof(data, _ANY)

    def _oneof(self, data: memoryview, known: frozenset[int]) -> ConfigValue:
        result: ConfigValue | None = None
        for field, kind, value in self._fields(data):
            if field not in known:
                continue
            read = _SINGLE.get(field)
            result = self._list(field, protobuf.as_view(kind, value)) if read is None else read(kind, value)
        if result is None:
            raise _bad("a value of an unknown type")
        return result

    def _list(self, field: int, data: memoryview) -> ConfigValue:
        at_most = limits.MAX_ROUND_LIST
        doubles: list[float] = []
        numbers: list[int] = []
        views: list[memoryview] = []
        for inner, kind, value in self._fields(data):
            if inner != 1:
                continue
            if field == 21:
                doubles.extend(protobuf.unpack_doubles(kind, value, at_most=at_most))
            elif field in (22, 23, 24):
                found = protobuf.unpack_varints(kind, value, at_most=at_most)
                self._spend(len(found))
                numbers.extend(found)
            else:
                views.append(protobuf.as_view(kind, value))
            _check_count(len(doubles) + len(numbers) + len(views), at_most, "list elements")
        match field:
            case 21:
                return doubles
            case 22:
                return [protobuf.as_signed(protobuf.VARINT, number) for number in numbers]
            case 23:
                return numbers
            case 24:
                return [number != 0 for number in numbers]
            case 25:
                return [protobuf.as_text(protobuf.LENGTH, view) for view in views]
            case _:
                return [bytes(view) for view in views]

    def _error(self, data: memoryview) -> FlowerError:
        code, reason = 0, ""
        for field, kind, value in self._fields(data):
            if field == 1:
                code = protobuf.as_signed(kind, value)
            elif field == 2:
                reason = protobuf.as_text(kind, value)
        return FlowerError(code, reason)

    def _once(self, data: memoryview, names: Mapping[int, str]) -> dict[str, memoryview]:
        """The embedded messages of these fields, each of which may come once."""
        found: dict[str, memoryview] = {}
        for field, kind, value in self._fields(data):
            name = names.get(field)
            if name is None:
                continue
            if name in found:
                raise _bad(f"{name} comes twice")
            found[name] = protobuf.as_view(kind, value)
        return found


def _as_bytes(kind: int, value: Value) -> bytes:
    return bytes(protobuf.as_view(kind, value))


_SINGLE: Final[dict[int, Callable[[int, Value], ConfigValue]]] = {
    1: protobuf.as_double,
    2: protobuf.as_signed,
    3: protobuf.as_unsigned,
    4: protobuf.as_bool,
    5: protobuf.as_text,
    6: _as_bytes,
}
_NUMERIC: Final = frozenset({1, 2, 3, 21, 22, 23})
_ANY: Final = frozenset({1, 2, 3, 4, 5, 6, 21, 22, 23, 24, 25, 26})


def _check_count(count: int, at_most: int, what: str) -> None:
    if count > at_most:
        raise ProtocolViolation(f"{count} {what}, {at_most} are possible", code="protocol.too_large")


def _bad(why: str) -> ProtocolViolation:
    return ProtocolViolation(f"not a Flower message: {why}", code="protocol.flower")
