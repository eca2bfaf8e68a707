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
from shared.wire.columns import decode_columns, encode_columns

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
fields = st.sampled_from(["seq", "at", "request", "name", "value", "detail", "d", "i", "kind"])
almost = st.fixed_dictionaries(
    {"v": st.just(1)},
    optional={
        kind: st.dictionaries(fields, columns, max_size=5) for kind in ("reading", "event", "result", "outcome", "x")
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
        {"v": 2},
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


def test_repeated_text_is_stored_once() -> None:
    body = Result(request="r", model="digits-of-a-house-number", version="1.0.0", variant="int8", rung="full")
    data = encode_columns([Record(seq=n, at_ms=0, body=body) for n in range(1, 101)])
    assert data.count(b"digits-of-a-house-number") == 1


def test_every_body_has_a_class() -> None:
    assert set(CLASS_OF) == {Result, Reading, Outcome, DeviceEvent}
