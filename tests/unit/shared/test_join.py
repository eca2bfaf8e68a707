"""Join tokens: one word that survives copying, shows no secret when printed, and is whole or refused."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shared.errors import InvalidValue
from shared.join import PREFIX, JoinToken, decode_join_token, encode_join_token

tokens = st.builds(
    JoinToken,
    hub_url=st.sampled_from(["https://hub.example.org:8443", "https://10.0.0.1", "https://[::1]:8443"]),
    ca_fingerprint=st.binary(min_size=32, max_size=32).map(bytes.hex),
    secret=st.binary(min_size=32, max_size=32),
)


@given(tokens)
def test_a_token_survives_as_one_word(token: JoinToken) -> None:
    text = encode_join_token(token)
    assert re.fullmatch(r"orj1\.[A-Za-z0-9_-]+", text)
    assert decode_join_token(text) == token
    assert decode_join_token(f"  {text}\n") == token


@given(tokens, st.data())
def test_a_token_that_lost_its_end_is_refused(token: JoinToken, data: st.DataObject) -> None:
    text = encode_join_token(token)
    with pytest.raises(InvalidValue) as caught:
        decode_join_token(text[: data.draw(st.integers(0, len(text) - 1))])
    assert "outrider-hub token create" in caught.value.hint


@given(st.text(max_size=60) | st.text(max_size=60).map(lambda text: PREFIX + text))
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidValue):
        decode_join_token(text)


@pytest.mark.parametrize(
    "change",
    [
        {"hub_url": "http://hub.example.org"},
        {"hub_url": "https://hub.example.org/path"},
        {"hub_url": "https://user@hub.example.org"},
        {"hub_url": "https://hub.example.org\n"},
        {"ca_fingerprint": "ab"},
        {"ca_fingerprint": "AB" * 32},
        {"secret": b"short"},
    ],
    ids=str,
)
def test_a_token_with_an_unusable_part_is_refused(change: dict[str, Any]) -> None:
    good = JoinToken(hub_url="https://hub.example.org", ca_fingerprint="ab" * 32, secret=bytes(32))
    assert decode_join_token(encode_join_token(good)) == good
    with pytest.raises(InvalidValue):
        decode_join_token(encode_join_token(msgspec.structs.replace(good, **change)))


@given(tokens)
def test_printing_a_token_does_not_show_its_secret(token: JoinToken) -> None:
    assume(token.secret.hex() != token.ca_fingerprint)
    for text in (repr(token), str(token), f"{token}"):
        assert repr(token.secret) not in text
        assert token.secret.hex() not in text
