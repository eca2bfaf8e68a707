"""Bodies: every kind round-trips, a newer field does not break an older reader, anything else is a violation."""

from __future__ import annotations

import types
from typing import Any, Union, get_args, get_origin

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ProtocolViolation
from shared.wire import messages
from shared.wire.envelope import Envelope

texts = st.text(st.characters(codec="utf-8"), max_size=20)


def envelope(kind: str, body: bytes) -> Envelope:
    return Envelope(v=1, id="m", kind=kind, device="d", boot=1, wall_ms=0, mono_ms=0, body=msgspec.Raw(body))


def test_the_registry_holds_every_message() -> None:
    assert set(messages.KINDS.values()) == set(get_args(messages.Message))
    assert {messages.KIND_OF[struct]: struct for struct in messages.KINDS.values()} == messages.KINDS


@pytest.mark.parametrize("kind", sorted(messages.KINDS))
@given(data=st.data())
def test_a_body_survives_the_wire(kind: str, data: st.DataObject) -> None:
    struct: Any = messages.KINDS[kind]
    fields = {field.name: data.draw(value_of(field.type)) for field in msgspec.structs.fields(struct)}
    message = struct(**fields)
    raw = bytes(messages.encode_body(message))
    assert messages.decode_body(envelope(kind, raw)) == message
    assert messages.expect(envelope(kind, raw), struct) == message
    newer = msgspec.msgpack.encode({**msgspec.msgpack.decode(raw), "from_the_future": [1]})
    assert messages.decode_body(envelope(kind, newer)) == message


def value_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a message field's type."""
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(0, 2**62), str: texts, bytes: st.binary(max_size=50), tuple[int, int]: st.just((1, 1)),
    }  # fmt: skip
    if hint in simple:
        return simple[hint]
    if get_origin(hint) is tuple:
        return st.lists(value_of(get_args(hint)[0]), max_size=3).map(tuple)
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        parts = {field.name: value_of(field.type) for field in msgspec.structs.fields(hint)}
        return st.builds(hint, **parts)
    if get_origin(hint) in (Union, types.UnionType):
        return st.one_of([st.none() if part is type(None) else value_of(part) for part in get_args(hint)])
    return st.sampled_from(get_args(hint))


@given(st.sampled_from(sorted(messages.KINDS)), st.binary(max_size=80))
def test_a_body_that_does_not_parse_is_a_violation(kind: str, raw: bytes) -> None:
    try:
        messages.decode_body(envelope(kind, raw))
    except ProtocolViolation as error:
        assert error.code == "protocol.body"


def test_text_that_is_not_utf8_is_a_violation() -> None:
    raw = msgspec.msgpack.encode({"boot": 1, "session": 1, "reason": "lost"}).replace(b"lost", b"\xff\xff\xff\xff")
    with pytest.raises(ProtocolViolation):
        messages.decode_body(envelope("death", raw))


def test_an_unknown_kind_and_an_unexpected_kind_are_violations() -> None:
    with pytest.raises(ProtocolViolation, match="unknown kind"):
        messages.decode_body(envelope("surprise", b"\x80"))
    raw = bytes(messages.encode_body(messages.Death(boot=1, session=1)))
    with pytest.raises(ProtocolViolation, match="expected 'birth'"):
        messages.expect(envelope("death", raw), messages.Birth)
