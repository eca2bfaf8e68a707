"""Columns: any batch of records comes back as it was, and no bytes whatever raise anything but a violation."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits
from shared.errors import ProtocolViolation
from shared.telemetry import CLASS_OF, Body, DeviceEvent, Outcome, Reading, Record, Result
from shared.wire.columns import decode_columns, encode_columns, open_columns

texts = st.text(st.characters(codec="utf-8"), max_size=12)
floats = st.floats(allow_nan=False)
few = st.sampled_from(["digits", "1.0.0", "int8"])
bodies: st.SearchStrategy[Body] = st.one_of(
    st.builds(Result, request=texts, model=few, version=few, variant=few, rung=few, label=few, confidence=floats,
              took_us=st.integers(0, 2**40)),
    st.builds(Reading, name=texts, value=floats),
    st.builds(Outcome, request=texts, model=few, version=texts, variant=texts, label=st.none() | texts,
              correct=st.none() | st.booleans(), value=st.none() | floats, latency_us=st.integers(0, 2**40)),
    st.builds(DeviceEvent, name=texts, detail=st.dictionaries(texts, texts, max_size=3)),
)  # fmt: skip


@st.composite
def batches(draw: st.DrawFn) -> list[Record]:
    """Records with ascending numbers, times that jump either way, bodies of every kind."""
    seqs = sorted(draw(st.sets(st.integers(1, 2**40), max_size=20)))
    return [Record(seq=seq, at_ms=draw(st.integers(0, 2**60)), body=draw(bodies)) for seq in seqs]


@given(batches())
def test_a_batch_comes_back_as_it_was(records: list[Record]) -> None:
    assert decode_columns(encode_columns(records)) == records


@given(batches())
def test_the_same_records_have_the_same_bytes(records: list[Record]) -> None:
    assert encode_columns(records) == encode_columns(decode_columns(encode_columns(records)))


columns: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**63) | st.floats() | texts | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | st.sampled_from(["d", "i"]), inner, max_size=4),
    max_leaves=10,
)
packed = st.tuples(st.sampled_from([b"b", b"h", b"i", b"q", b"d", b"x"]), st.binary(max_size=17)).map(b"".join)
columns |= packed
fields = st.sampled_from(["seq", "at", "request", "name", "value", "detail", "d", "i", "kind"])
almost = st.fixed_dictionaries(
    {"v": st.sampled_from([1, 2])},
    optional={
        kind: st.dictionaries(fields, columns, max_size=5)
        | st.fixed_dictionaries(
            {
                "seq": st.lists(st.integers(-1, 5), max_size=4),
                "at": st.lists(st.integers(-1, 2**63), max_size=4) | packed,
                "name": st.lists(texts, max_size=3)
                | st.fixed_dictionaries({"d": st.lists(texts, max_size=2), "i": st.binary(max_size=3)}),
                "value": st.lists(floats, max_size=3) | packed,
            }
        )
        for kind in ("reading", "event", "result", "outcome", "x")
    },
).map(msgspec.msgpack.encode)


@given(st.binary(max_size=200) | almost)
def test_hostile_bytes_are_a_violation_and_nothing_else(data: bytes) -> None:
    try:
        decode_columns(data)
    except ProtocolViolation as error:
        assert error.code in {"protocol.columns", "protocol.too_large"}


@pytest.mark.parametrize(
    "document",
    [
        {"v": 3},
        {"v": 2, "reading": {"seq": [1], "at": [0], "name": ["a"], "value": [1.0]}},
        {"v": 2, "reading": {"seq": [], "at": [], "name": [], "value": []}},
        {"v": 2, "reading": {"seq": [1, 0], "at": [], "name": [], "value": []}},
        {"v": 2, "reading": {"seq": [1, 2, 2, 1], "at": [0, 0, 0], "name": ["a"] * 3, "value": [1.0] * 3}},
        {"v": 2, "reading": {"seq": [1, 2**62], "at": [0], "name": ["a"], "value": [1.0]}},
        {"v": 2, "reading": {"seq": [2**63, 1], "at": [0], "name": ["a"], "value": [1.0]}},
        {"v": 2, "reading": {"seq": [1, 1], "at": b"", "name": ["a"], "value": [1.0]}},
        {"v": 2, "reading": {"seq": [1, 1], "at": b"b", "name": ["a"], "value": [1.0]}},
        {"v": 2, "reading": {"seq": [1, 1], "at": b"d" + bytes(8), "name": ["a"], "value": [1.0]}},
        {"v": 2, "reading": {"seq": [1, 1], "at": b"b" + b"\xff" * 8, "name": ["a"], "value": [1.0]}},
        {"v": 2, "reading": {"seq": [1, 1], "at": [0], "name": ["a"], "value": b"d" + bytes(7)}},
        {"v": 2, "reading": {"seq": [1, 1], "at": [0], "name": ["a"], "value": b"q" + bytes(8)}},
        {"v": 2, "reading": {"seq": [1, 2], "at": [0, 0], "name": {"d": ["a"], "i": b"\0\1"}, "value": [1.0, 2.0]}},
        {"v": 2, "reading": {"seq": [1, 2], "at": [0, 0], "name": {"d": [], "i": b""}, "value": [1.0, 2.0]}},
        {"v": 2, "reading": {"seq": [1, 2], "at": [0, 0], "name": {"d": ["a"], "i": b"\0"}, "value": [1.0, 2.0]}},
        {"v": 2, "reading": {"seq": [1, 1], "at": [0], "name": [None], "value": [1.0]}},
        {"v": 2, "reading": {"seq": [1, 1], "at": [0], "name": {"d": ["a", "b"], "i": b""}, "value": [1.0]}},
        {"v": 2, "outcome": {"seq": [1, 1], "at": [0], "request": ["a"], "latency_us": [2**63]}},
        {
            "v": 2,
            "reading": {"seq": [1, 1], "at": [0], "name": ["a"], "value": [1.0]},
            "event": {"seq": [1, 1], "at": [0], "name": ["a"]},
        },
        {"v": 1, "surprise": {"seq": [1], "at": [0]}},
        {"v": 1, "reading": {"seq": [1], "at": [0, 0], "name": ["a"], "value": [1.0]}},
        {"v": 1, "reading": {"seq": [1, 1], "at": [0, 0], "name": ["a"], "value": [1.0, 2.0]}},
        {"v": 1, "reading": {"seq": [-1], "at": [0], "name": ["a"], "value": [1.0]}},
        {"v": 1, "reading": {"seq": [True], "at": [0], "name": ["a"], "value": [1.0]}},
        {"v": 1, "reading": {"seq": [1, 0], "at": [0, 0], "name": ["a", "b"], "value": [1.0, 2.0]}},
        {"v": 1, "reading": {"seq": [1], "at": [0], "name": {"d": ["a"], "i": [1]}, "value": [1.0]}},
        {"v": 1, "reading": {"seq": [1], "at": [0], "name": {"d": ["a"], "i": [-1]}, "value": [1.0]}},
        {"v": 1, "reading": {"seq": [1], "at": [0], "name": {"d": "a", "i": [0]}, "value": [1.0]}},
        {"v": 1, "reading": {"seq": [1], "at": [0]}},
        {"v": 1, "reading": 3},
    ],
)
def test_columns_that_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        decode_columns(msgspec.msgpack.encode(document))


def test_a_batch_of_too_many_records_or_bytes_is_refused() -> None:
    body = Reading(name="t", value=1.0)
    many = [Record(seq=n, at_ms=0, body=body) for n in range(1, limits.MAX_BATCH_RECORDS + 2)]
    assert len(decode_columns(encode_columns(many[:-1]))) == limits.MAX_BATCH_RECORDS
    with pytest.raises(ProtocolViolation):
        decode_columns(encode_columns(many))
    with pytest.raises(ProtocolViolation):
        decode_columns(b"\x80" * (limits.MAX_BATCH_BYTES + 1))


def usual(count: int, *, names: int, first: int = 1) -> list[Record]:
    """What a device with some sensors says: every second a reading of each, a little late each time."""
    return [
        Record(
            seq=first + n,
            at_ms=1_800_000_000_000 + 1000 * (n // names) + 7 * n % 13 * (n % names == 0),
            body=Reading(name=f"sensor_{n % names}_c", value=20 + n / 7),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("names", [1, 2, 4])
@pytest.mark.parametrize("count", [100, 500])
def test_the_usual_reading_takes_at_most_twelve_bytes(count: int, names: int) -> None:
    assert len(encode_columns(usual(count, names=names, first=5_000_000))) <= 12 * count


def test_columns_of_the_first_version_are_read() -> None:
    document = {
        "v": 1,
        "reading": {
            "seq": [4, 1, 2],
            "at": [1000, 5, -3],
            "name": {"d": ["a", "b"], "i": [0, 1, 0]},
            "value": [1.0, 2, 3.5],
        },
    }
    assert decode_columns(msgspec.msgpack.encode(document)) == [
        Record(seq=4, at_ms=1000, body=Reading(name="a", value=1.0)),
        Record(seq=5, at_ms=1005, body=Reading(name="b", value=2.0)),
        Record(seq=7, at_ms=1002, body=Reading(name="a", value=3.5)),
    ]


def test_a_field_that_a_newer_agent_added_harms_nothing() -> None:
    document = {"v": 2, "reading": {"seq": [1, 1], "at": [5], "name": ["a"], "value": [1.0], "unit": ["c"]}}
    assert decode_columns(msgspec.msgpack.encode(document)) == [
        Record(seq=1, at_ms=5, body=Reading(name="a", value=1.0))
    ]


def test_one_long_text_named_often_is_refused_before_it_is_unpacked() -> None:
    document = {
        "v": 2,
        "reading": {
            "seq": [1, 500],
            "at": b"b" + bytes(8 + 499),
            "name": {"d": ["x" * 100_000], "i": b""},
            "value": b"d" + bytes(8 * 500),
        },
    }
    with pytest.raises(ProtocolViolation) as caught:
        open_columns(msgspec.msgpack.encode(document))
    assert caught.value.code == "protocol.too_large"


@given(batches())
def test_what_is_asked_of_open_columns_is_what_the_records_say(records: list[Record]) -> None:
    opened = open_columns(encode_columns(records))
    assert opened.count == len(records)
    assert [n for first, last in opened.runs for n in range(first, last + 1)] == [record.seq for record in records]
    for kind in opened.kinds:
        bodies = [record.body for record in records if record.body.__struct_config__.tag == kind]
        for field in bodies[0].__struct_fields__:
            values = opened.values(kind, field)
            assert values is not None
            assert list(values) == [getattr(body, field) for body in bodies]


def test_repeated_text_is_stored_once() -> None:
    body = Result(request="r", model="digits-of-a-house-number", version="1.0.0", variant="int8", rung="full")
    data = encode_columns([Record(seq=n, at_ms=0, body=body) for n in range(1, 101)])
    assert data.count(b"digits-of-a-house-number") == 1


def test_every_body_has_a_class() -> None:
    assert set(CLASS_OF) == {Result, Reading, Outcome, DeviceEvent}
