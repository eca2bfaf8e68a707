"""The parser before tuf: one reading of the bytes, or none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits
from shared.errors import InvalidValue, TrustError
from shared.trust import roles, strict


def parse(data: bytes, *, floats: bool = False) -> object:
    return strict.parse_json(data, what="it", max_bytes=100_000, floats=floats)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"1", b'"x"', b"{", b'{"a":1,"a":2}', b'{"a":{"b":1,"b":1}}', b'{"a":NaN}', b'{"a":Infinity}',
        b'{"a":-Infinity}', b'{"a":1.0}', b'{"a":1e2}', b'{"a":9007199254740993}', b'{"a":"\\ud800"}', b'{"\\ud800":1}',
        b'{"a":"\xff"}', b'\xef\xbb\xbf{}', b'{"a":' + b"9" * 5000 + b"}", b"{}{}",
        b'{"a":' + b"[" * 60_000, b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
    ],
)  # fmt: skip
def test_what_two_readers_could_read_in_two_ways_is_malformed(data: bytes) -> None:
    with pytest.raises(TrustError) as caught:
        parse(data)
    assert caught.value.code == "trust.malformed"


def test_depth_is_allowed_up_to_its_bound() -> None:
    inner = limits.MAX_JSON_DEPTH - 2  # the object itself, and the innermost value
    parse(b'{"a":' + b"[" * inner + b"1" + b"]" * inner + b"}")
    with pytest.raises(TrustError):
        parse(b'{"a":' + b"[" * (inner + 1) + b"1" + b"]" * (inner + 1) + b"}")


def test_fractions_only_where_they_are_asked_for() -> None:
    assert parse(b'{"a":0.5}', floats=True) == {"a": 0.5}
    with pytest.raises(TrustError):
        parse(b'{"a":1e999}', floats=True)


def test_too_many_bytes_are_not_read() -> None:
    with pytest.raises(TrustError) as caught:
        strict.parse_json(b"{}" + b" " * 99, what="it", max_bytes=100)
    assert caught.value.code == "trust.endless_data"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), json_values, max_size=5))
def test_ordinary_objects_come_back_as_they_were(document: dict[str, object]) -> None:
    assert parse(json.dumps(document).encode()) == document


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    try:
        parse(data)
    except TrustError as error:
        assert error.code == "trust.malformed"


@given(json_values)
def test_any_document_passes_or_is_refused(value: object) -> None:
    try:
        strict.check_metadata({"signed": value, "signatures": []}, what="it")
    except TrustError as error:
        assert error.code == "trust.malformed"


@pytest.mark.parametrize(
    ("role", "version", "name"),
    [
        ("timestamp", None, "timestamp.json"),
        ("root", 12, "12.root.json"),
        ("models/digits", 1, "1.models%2Fdigits.json"),
        ("../x", 3, "3...%2Fx.json"),
        ("a%2Fb", 3, "3.a%252Fb.json"),
    ],
)
def test_file_names_are_encoded_and_read_back(role: str, version: int | None, name: str) -> None:
    assert roles.file_name(role, version) == name
    assert roles.parse_file_name(name) == (role, version)


def test_a_file_name_that_a_router_decoded_is_read_too() -> None:
    assert roles.parse_file_name("1.models/digits.json") == ("models/digits", 1)


@pytest.mark.parametrize(
    "name", ["", "root.json", "1.timestamp.json", "0.root.json", "1.root", "1..json", "1.%00.json", "x" * 400]
)
def test_other_file_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidValue):
        roles.parse_file_name(name)


def test_a_family_has_one_role_and_one_pattern() -> None:
    from shared.ids import FamilyName

    assert roles.family_role(FamilyName("digits")) == "models/digits"
    assert roles.family_paths(FamilyName("digits")) == "models/digits/*/*"
