"""Flower's messages in bytes: the same bytes as flwr's own, both ways, and only ProtocolViolation for anything else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits
from shared.errors import ProtocolViolation
from shared.federated import (
    PRECONDITION,
    Array,
    ArrayRecord,
    ConfigRecord,
    FlowerError,
    FlowerMessage,
    Metadata,
    MetricRecord,
    reply_to,
)
from shared.wire.flower import decode_message, encode_message
from shared.wire.protobuf import Part

_U64 = st.integers(0, 2**64 - 1)
_I64 = st.integers(-(2**63), 2**63 - 1)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_DOUBLE = st.floats(allow_nan=False)
_LISTS = st.one_of(
    st.lists(_DOUBLE, min_size=1, max_size=4), st.lists(_I64, min_size=1, max_size=4), st.lists(_U64, min_size=1)
)
_METRIC = st.one_of(_DOUBLE, _I64, _U64, _LISTS)
_CONFIG = st.one_of(
    _METRIC, st.booleans(), _TEXT, st.binary(max_size=8), st.lists(st.booleans()), st.lists(_TEXT, max_size=3)
)
_METADATA = st.builds(
    Metadata,
    run_id=_U64,
    message_id=_TEXT,
    src_node_id=_U64,
    dst_node_id=_U64,
    reply_to_message_id=_TEXT,
    group_id=_TEXT,
    ttl=_DOUBLE,
    message_type=st.sampled_from(["train", "evaluate", "query", "train.head"]),
    created_at=_DOUBLE,
    src_task_id=st.none() | _U64,
    dst_task_id=st.none() | _U64,
)
_ARRAY = st.builds(
    Array,
    dtype=_TEXT,
    shape=st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    data=st.binary(max_size=40),
    stype=_TEXT,
)
_RECORD = st.one_of(
    st.dictionaries(_TEXT, _ARRAY, max_size=3).map(ArrayRecord),
    st.dictionaries(_TEXT, _METRIC, max_size=3).map(MetricRecord),
    st.dictionaries(_TEXT, _CONFIG, max_size=3).map(ConfigRecord),
)
_MESSAGES = st.one_of(
    st.builds(FlowerMessage, metadata=_METADATA, content=st.dictionaries(_TEXT, _RECORD, max_size=3)),
    st.builds(FlowerMessage, metadata=_METADATA, error=st.builds(FlowerError, _I64, _TEXT)),
)


@given(_MESSAGES)
def test_what_is_written_is_read(message: FlowerMessage) -> None:
    assert decode_message(encode_message(message)) == message


@given(_MESSAGES)
def test_flwr_reads_what_is_written_and_writes_the_same(message: FlowerMessage) -> None:
    serde, proto = _flwr()
    data = encode_message(message)

    parsed = proto.Message()
    parsed.ParseFromString(data)

    assert parsed.SerializeToString() == data
    if message.error is None or -(2**31) <= message.error.code < 2**31:
        again = serde.message_to_proto(serde.message_from_proto(parsed))
        assert decode_message(again.SerializeToString()) == decode_message(data)


def test_a_message_made_by_flwr_is_read_and_written_byte_for_byte() -> None:
    serde, _ = _flwr()
    from flwr.app import ArrayRecord as FlwrArrays
    from flwr.app import ConfigRecord as FlwrConfig
    from flwr.app import Message, RecordDict
    from flwr.app import MetricRecord as FlwrMetrics

    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    config: dict[str, Any] = {
        "family": "digits", "labels": ["0", "1"], "learning_rate": 0.1, "epochs": 2, "seed": -7, "big": 2**63,
        "on": True, "raw": b"\x00\xff", "flags": [True, False], "none": [], "bigs": [1, 2**64 - 1], "blobs": [b"a"],
    }  # fmt: skip
    content = RecordDict(
        {
            "arrays": FlwrArrays([weight, np.zeros(0)]),
            "metrics": FlwrMetrics({"num-examples": 3, "loss": 0.5, "none": [], "history": [1.0, 2.0], "ints": [-1]}),
            "config": FlwrConfig(config),
        }
    )
    message = Message(content, dst_node_id=2**63 + 5, message_type="train", group_id="3")
    data = serde.message_to_proto(message).SerializeToString()

    mine = decode_message(data)

    assert encode_message(mine) == data
    assert mine.settings("config") == config
    assert mine.metadata.dst_node_id == 2**63 + 5
    assert mine.metadata.group_id == "3"
    arrays = mine.arrays("arrays")
    assert arrays is not None
    assert arrays["0"].shape == (3, 4)
    assert bytes(arrays["0"].data) == content.array_records["arrays"]["0"].data
    assert mine.settings("arrays") is None
    assert mine.arrays("config") is None


def test_a_reply_is_what_flwr_makes_of_one() -> None:
    serde, proto = _flwr()
    from flwr.app import Error, Message, RecordDict

    task = Message(RecordDict(), dst_node_id=7, message_type="train", group_id="2", ttl=60.0)
    task.metadata.__dict__["_message_id"] = "m-1"
    theirs = Message(Error(PRECONDITION, "no samples"), reply_to=task)
    mine = decode_message(serde.message_to_proto(task).SerializeToString())

    answer = reply_to(mine.metadata, FlowerError(PRECONDITION, "no samples"), created_at=theirs.metadata.created_at)

    assert encode_message(answer) == serde.message_to_proto(theirs).SerializeToString()
    assert answer.metadata.reply_to_message_id == "m-1"
    content = reply_to(mine.metadata, {"metrics": MetricRecord({"num-examples": 1})}, created_at=1e12)
    assert content.metadata.ttl == 0.0
    assert proto.Message.FromString(encode_message(content)).HasField("content")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    _, proto = _flwr()
    try:
        message = decode_message(data)
    except ProtocolViolation:
        return
    parsed = proto.Message()
    parsed.ParseFromString(data)  # what we take, flwr's parser takes too
    assert parsed.metadata.message_id == message.metadata.message_id


@given(_MESSAGES, st.data())
def test_a_damaged_message_is_read_or_refused(message: FlowerMessage, draw: st.DataObject) -> None:
    data = bytearray(encode_message(message))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    cut = bytes(data[: draw.draw(st.integers(0, len(data)))])
    try:
        decode_message(cut)
    except ProtocolViolation:
        return


def test_fields_that_nobody_knows_are_left_alone() -> None:
    later = Part()
    later.data(99, b"news")
    later.varint(98, 5)
    later.double(97, 1.5)
    message = FlowerMessage(metadata=Metadata(message_id="m"))

    assert decode_message(encode_message(message) + later.join()) == message


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x0a", "a number is cut"),
        (b"\x0a\x05ab", "5 bytes are promised"),
        (b"\x0b", "wire type 3"),
        (b"\x00\x00", "field number 0"),
        (b"\x08\x01", "bytes were expected"),
        (b"\x0a\x00\x0a\x00", "comes twice"),
        (b"\x0a\x03\x12\x01\xff", "not UTF-8"),
        (b"\x12\x02\x0a\x00", "0 kinds"),
        (b"\x0a\x0c" + b"\x08" + b"\xff" * 11, "ten bytes"),
        (b"\x0a\x0b" + b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
    ],
)
def test_malformed_bytes_say_what_is_wrong(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolViolation, match=why):
        decode_message(data)


def test_a_message_of_very_many_fields_is_refused_before_they_are_all_read() -> None:
    unknown = b"\x78\x01"  # field 15, a number
    half = limits.MAX_ROUND_FIELDS // 2
    decode_message(unknown * half)
    entry = Part()
    entry.data(1, unknown * (half + 1))
    for data in (unknown * (limits.MAX_ROUND_FIELDS + 1), unknown * half + entry.join(), unknown * 2**22):
        with pytest.raises(ProtocolViolation, match="fields") as caught:
            decode_message(data)
        assert caught.value.code == "protocol.too_large"


def test_the_numbers_of_all_lists_together_are_bounded() -> None:
    numbers: list[int] = [1] * limits.MAX_ROUND_LIST
    few = FlowerMessage(metadata=Metadata(), content={"m": MetricRecord({"a": numbers, "b": numbers})})
    assert decode_message(encode_message(few)) == few
    many = FlowerMessage(metadata=Metadata(), content={"m": MetricRecord({str(key): numbers for key in range(4)})})
    with pytest.raises(ProtocolViolation, match="fields"):
        decode_message(encode_message(many))


def test_what_is_too_much_is_refused_before_it_is_made() -> None:
    many = Part()
    for _ in range(limits.MAX_ROUND_ITEMS + 1):
        many.part(1, Part())
    content = Part()
    content.part(2, many)
    with pytest.raises(ProtocolViolation, match="items"):
        decode_message(content.join())

    with pytest.raises(ProtocolViolation, match="list"):
        _decoded_value(22, bytes(limits.MAX_ROUND_LIST + 1))
    with pytest.raises(ProtocolViolation, match="list"):
        _decoded_value(24, bytes(limits.MAX_ROUND_LIST + 1))

    class Endless(bytes):
        def __len__(self) -> int:
            return limits.MAX_ROUND_MESSAGE_BYTES + 1

    with pytest.raises(ProtocolViolation) as refused:
        decode_message(Endless())
    assert refused.value.code == "protocol.too_large"


@pytest.mark.parametrize(
    "message",
    [
        FlowerMessage(metadata=Metadata(run_id=2**64)),
        FlowerMessage(metadata=Metadata(), content={"c": ConfigRecord({"x": [1, "a"]})}),  # type: ignore[dict-item]
        FlowerMessage(metadata=Metadata(), content={"c": ConfigRecord({"x": -(2**63) - 1})}),
        FlowerMessage(metadata=Metadata(), content={"a": ArrayRecord({"x": Array(dtype="f", shape=(-1,), data=b"")})}),
        FlowerMessage(metadata=Metadata(message_id="\ud800")),
    ],
)
def test_what_the_format_cannot_say_is_not_written(message: FlowerMessage) -> None:
    with pytest.raises(ProtocolViolation):
        encode_message(message)


def _decoded_value(field: int, packed: bytes) -> FlowerMessage:
    values, one, entry, record, item, whole, content = (Part() for _ in range(7))
    values.data(1, packed)
    one.part(field, values)
    entry.data(1, b"x")
    entry.part(2, one)
    record.part(1, entry)
    item.data(1, b"config")
    item.part(4, record)
    content.part(1, item)
    whole.part(2, content)
    return decode_message(whole.join())


def _flwr() -> tuple[Any, Any]:
    """flwr's own codec, where it is installed."""
    pytest.importorskip("flwr")
    from flwr.common import serde
    from flwr.proto import message_pb2
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 1, 1
    return serde, message_pb2
