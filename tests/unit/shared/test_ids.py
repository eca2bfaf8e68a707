"""Names: what parses is safe as a topic level, a file name and an MQTT user name; versions sort by precedence."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidValue
from shared.ids import (
    RESERVED_DEVICE_IDS,
    ModelVersion,
    parse_device_id,
    parse_digest,
    parse_family,
    parse_version,
    version_key,
)

NAME_CHARACTERS = set(string.ascii_lowercase + string.digits + "-")
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
numbers = st.integers(0, 999_999_999).map(str)


@given(st.text(max_size=80))
def test_a_device_name_that_parses_holds_nothing_dangerous(text: str) -> None:
    try:
        device = parse_device_id(text)
    except InvalidValue as error:
        assert error.code == "invalid.device_id"
        assert error.hint
    else:
        assert device == text
        assert set(device) <= NAME_CHARACTERS
        assert 1 <= len(device) <= 63
        assert not device.startswith("-")
        assert not device.endswith("-")


@given(names)
def test_a_name_of_the_alphabet_parses_unless_reserved(text: str) -> None:
    assert parse_family(text) == text
    if text in RESERVED_DEVICE_IDS:
        with pytest.raises(InvalidValue):
            parse_device_id(text)
    else:
        assert parse_device_id(text) == text


@pytest.mark.parametrize("text", ["", "-a", "a-", "a" * 64, "A", "a_b", "a/b", "a+", "#", "a\n", "é", "a b", "hub"])
def test_device_names_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidValue):
        parse_device_id(text)


@given(st.binary(min_size=32, max_size=32))
def test_a_digest_is_64_lower_case_hex_digits(raw: bytes) -> None:
    assert parse_digest(raw.hex()) == raw.hex()
    for wrong in (raw.hex()[:-1], raw.hex() + "0", raw.hex() + "\n", "g" + raw.hex()[1:]):
        with pytest.raises(InvalidValue):
            parse_digest(wrong)


def test_an_upper_case_digest_is_refused() -> None:
    with pytest.raises(InvalidValue):
        parse_digest("A" * 64)


@given(numbers, numbers, numbers)
def test_versions_sort_as_numbers(major: str, minor: str, patch: str) -> None:
    version = parse_version(f"{major}.{minor}.{patch}")
    assert version_key(version)[:3] == (int(major), int(minor), int(patch))
    assert version_key(ModelVersion(f"{version}-rc.1")) < version_key(version)


def test_precedence_is_that_of_the_specification() -> None:
    # semver.org 2.0.0, section 11
    ascending = (
        "1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta 1.0.0-beta.2 1.0.0-beta.11 1.0.0-rc.1 1.0.0 1.0.1"
    )
    keys = [version_key(parse_version(text)) for text in ascending.split()]
    assert keys == sorted(keys)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "text", ["1", "1.0", "01.0.0", "1.0.0+build", "1.0.0-", "1.0.0-01", "v1.0.0", "1.0.0\n", "1.0.0/.."]
)
def test_versions_that_are_refused(text: str) -> None:
    with pytest.raises(InvalidValue):
        parse_version(text)
