"""The join token: one word, whole or refused, and silent about its secret."""

from __future__ import annotations

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidValue
from shared.join import JoinToken, decode_join_token, encode_join_token

TOKEN = JoinToken(hub_url="https://hub.example:8443", ca_fingerprint="0a" * 32, secret=bytes(range(32)))


def packed(document: object) -> str:
    return "orj1." + base64.urlsafe_b64encode(msgspec.msgpack.encode(document)).rstrip(b"=").decode()


@given(
    host=st.from_regex(r"[a-z0-9]{1,20}(\.[a-z]{2,6})?", fullmatch=True),
    port=st.integers(1, 65535),
    secret=st.binary(min_size=32, max_size=32),
)
def test_what_goes_in_comes_out(host: str, port: int, secret: bytes) -> None:
    token = JoinToken(hub_url=f"https://{host}:{port}", ca_fingerprint="ff" * 32, secret=secret)
    text = encode_join_token(token)
    assert text.replace("-", "").replace("_", "").replace(".", "").isalnum()
    assert decode_join_token(f"  {text}\n") == token


@pytest.mark.parametrize("url", ["https://[::1]:8443", "https://10.0.0.1", "https://hub"])
def test_urls_that_are_taken(url: str) -> None:
    token = msgspec.structs.replace(TOKEN, hub_url=url)
    assert decode_join_token(encode_join_token(token)) == token


@pytest.mark.parametrize(
    "text",
    [
        "",
        "orj1.",
        "orj2." + encode_join_token(TOKEN)[5:],
        encode_join_token(TOKEN)[:-3],
        encode_join_token(TOKEN) + "!",
        "orj1." + "A" * 5000,
        packed(["https://hub", "0a" * 32, b"x" * 32]),
        packed({"u": "http://hub", "f": "0a" * 32, "s": b"x" * 32}),
        packed({"u": "https://hub/path", "f": "0a" * 32, "s": b"x" * 32}),
        packed({"u": "https://me@hub", "f": "0a" * 32, "s": b"x" * 32}),
        packed({"u": "https://hub", "f": "0A" * 32, "s": b"x" * 32}),
        packed({"u": "https://hub", "f": "0a" * 32, "s": b"x" * 31}),
        packed({"u": "https://hub", "f": "0a" * 32}),
    ],
)
def test_texts_that_are_no_tokens(text: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        decode_join_token(text)
    assert caught.value.code == "invalid.join_token"


@given(st.text(max_size=200))
def test_no_text_breaks_it(text: str) -> None:
    for candidate in (text, "orj1." + text):
        try:
            decode_join_token(candidate)
        except InvalidValue:
            continue


def test_formatting_a_token_does_not_tell_its_secret() -> None:
    assert repr(TOKEN.secret) not in repr(TOKEN)
    assert "secret" not in repr(TOKEN)
