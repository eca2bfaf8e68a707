"""The envelope: what goes in comes out, what is unknown survives, what is hostile is a ProtocolViolation."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits
from shared.errors import ProtocolViolation
from shared.wire.envelope import WIRE_VERSION, Envelope, decode_envelope, encode_envelope

texts = st.text(st.characters(codec="utf-8"), max_size=20)
plain: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
known = set(Envelope.__struct_fields__) - {"extra"}
envelopes = st.builds(
    Envelope,
    v=st.just(WIRE_VERSION),
    id=st.text(st.characters(codec="utf-8"), min_size=1, max_size=64),
    kind=texts,
    device=texts,
    boot=st.integers(0, 2**31),
    wall_ms=st.integers(-(2**63), 2**63 - 1),
    mono_ms=st.integers(0, 2**62),
    body=plain.map(lambda value: msgspec.Raw(msgspec.msgpack.encode(value))),
    deadline_ms=st.none() | st.integers(0, 2**31),
    correlation=st.none() | texts,
    trace=st.none() | texts,
    extra=st.dictionaries(
        texts.filter(lambda key: key not in known),
        plain.map(lambda value: msgspec.Raw(msgspec.msgpack.encode(value))),
        max_size=4,
    ),
)
hostile = st.binary(max_size=200) | plain.map(msgspec.msgpack.encode)


@given(envelopes)
def test_an_envelope_survives_the_wire_with_the_keys_that_nobody_knows(envelope: Envelope) -> None:
    assert decode_envelope(encode_envelope(envelope)) == envelope


@given(envelopes)
def test_passing_an_envelope_on_does_not_change_its_meaning(envelope: Envelope) -> None:
    once = encode_envelope(envelope)
    again = encode_envelope(decode_envelope(once))
    assert msgspec.msgpack.decode(again) == msgspec.msgpack.decode(once)


@given(hostile)
def test_anything_else_is_a_protocol_violation(data: bytes) -> None:
    try:
        decode_envelope(data)
    except ProtocolViolation as error:
        assert error.code.startswith("protocol.")


@given(envelopes, st.data())
def test_a_cut_envelope_is_a_protocol_violation(envelope: Envelope, data: st.DataObject) -> None:
    whole = encode_envelope(envelope)
    with pytest.raises(ProtocolViolation):
        decode_envelope(whole[: data.draw(st.integers(0, len(whole) - 1))])


def an_envelope(**changes: Any) -> Envelope:
    fields = {"v": 1, "id": "m", "kind": "birth", "device": "d", "boot": 1, "wall_ms": 0, "mono_ms": 0}
    return Envelope(**{**fields, "body": msgspec.Raw(b"\xc0"), **changes})


@pytest.mark.parametrize("changes", [{"v": 0}, {"v": 2}, {"id": ""}, {"id": "m" * 65}, {"kind": "k" * 65}])
def test_envelopes_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolViolation):
        decode_envelope(encode_envelope(an_envelope(**changes)))


def test_a_message_larger_than_the_broker_carries_is_refused_before_it_is_sent_and_when_it_comes() -> None:
    body = msgspec.Raw(msgspec.msgpack.encode(b"x" * limits.MAX_MQTT_PACKET_BYTES))
    with pytest.raises(ProtocolViolation, match="too large"):
        encode_envelope(an_envelope(body=body))
    with pytest.raises(ProtocolViolation):
        decode_envelope(b"\x80" * (limits.MAX_MQTT_PACKET_BYTES + 1))


def test_a_deeply_nested_message_is_refused() -> None:
    with pytest.raises(ProtocolViolation):
        decode_envelope(b"\x81\xa1v" + b"\x91" * 100_000 + b"\xc0")
