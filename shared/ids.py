"""Names of things. Each is a checked string: made by its `parse_…` at the edge, trusted inside.

A device's name is also its certificate's common name, its MQTT user name and a topic level, so its alphabet is
the narrowest of the three: no `+`, `#`, `/` or `$`, nothing a shell or a URL would have to quote.
"""

from __future__ import annotations

import re
from typing import NewType

from shared.errors import InvalidValue

DeviceId = NewType("DeviceId", str)
"""`dev-7f3a`: lower-case letters, digits and inner hyphens, 1 to 63 characters."""

Digest = NewType("Digest", str)
"""SHA-256 as 64 lower-case hexadecimal digits."""

FamilyName = NewType("FamilyName", str)
"""A model family, `digits`: the same alphabet as a device's name."""

ModelVersion = NewType("ModelVersion", str)
"""Semantic version without build metadata (semver.org 2.0.0, section 2 and 9): `1.4.0`, `2.0.0-rc.1`."""

RESERVED_DEVICE_IDS = frozenset({"hub", "broker", "localhost"})
"""Names that mean something else on the broker; no device may carry one."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_PRE = r"(?:0|[1-9][0-9]*|[0-9]*[a-zA-Z-][0-9a-zA-Z-]*)"
_VERSION = re.compile(rf"({_NUMBER})\.({_NUMBER})\.({_NUMBER})(?:-({_PRE}(?:\.{_PRE})*))?")


def parse_device_id(text: str) -> DeviceId:
    """Return the device name, or raise InvalidValue saying which characters are allowed."""
    if not _NAME.fullmatch(text):
        raise InvalidValue(
            f"device name {text[:80]!r} is not valid",
            code="invalid.device_id",
            hint="use 1 to 63 lower-case letters, digits and inner hyphens, for example 'pi-kitchen-3'",
        )
    if text in RESERVED_DEVICE_IDS:
        raise InvalidValue(
            f"device name {text!r} is reserved", code="invalid.device_id", hint="choose another name for the device"
        )
    return DeviceId(text)


def parse_family(text: str) -> FamilyName:
    """Return the model family's name, or raise InvalidValue."""
    if not _NAME.fullmatch(text):
        raise InvalidValue(
            f"model family {text[:80]!r} is not valid",
            code="invalid.family",
            hint="use 1 to 63 lower-case letters, digits and inner hyphens, for example 'digits'",
        )
    return FamilyName(text)


def parse_digest(text: str) -> Digest:
    """Return the SHA-256 digest, or raise InvalidValue."""
    if not _DIGEST.fullmatch(text):
        raise InvalidValue(
            f"{text[:80]!r} is not a SHA-256 digest", code="invalid.digest", hint="give 64 lower-case hex digits"
        )
    return Digest(text)


def parse_version(text: str) -> ModelVersion:
    """Return the semantic version, or raise InvalidValue."""
    if len(text) > 64 or not _VERSION.fullmatch(text):
        raise InvalidValue(
            f"model version {text[:80]!r} is not a semantic version",
            code="invalid.version",
            hint="use MAJOR.MINOR.PATCH, for example '1.4.0' or '2.0.0-rc.1'",
        )
    return ModelVersion(text)


def version_key(version: ModelVersion) -> tuple[int, int, int, tuple[tuple[int, int, str], ...]]:
    """Sort key of a version by precedence (semver.org 2.0.0, section 11): a release sorts after its candidates."""
    match = _VERSION.fullmatch(version)
    if match is None:
        raise InvalidValue(f"{version!r} is not a semantic version", code="invalid.version")
    major, minor, patch, pre = match.groups()
    if pre is None:
        return int(major), int(minor), int(patch), ((2, 0, ""),)
    parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in pre.split("."))
    return int(major), int(minor), int(patch), parts
