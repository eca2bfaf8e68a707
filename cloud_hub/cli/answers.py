"""The hub's answers as typed values: the fields that this program acts on. Fields it does not know are passed over.

Whole documents are kept beside them for `--json`, which shows everything that the hub said.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from shared.errors import InvalidValue, ProtocolViolation
from shared.ids import FamilyName, ModelVersion, parse_family, parse_version

T = TypeVar("T")


class WhoAmI(msgspec.Struct, frozen=True, kw_only=True):
    """Who the token says we are."""

    name: str
    role: str


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """One model slot as a device reports it (shared.wire.messages.RunningModel)."""

    family: str
    phase: str
    version: str = ""
    variant: str = ""
    candidate: str = ""
    error_code: str = ""


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """What the hub measured of one variant."""

    name: str
    released: bool = True
    reason: str = ""
    accuracy: float = 0.0
    drop_pt: float = 0.0
    p50_us: int = 0
    length: int = 0


def read(document: Any, kind: type[T], *, what: str) -> T:
    """The document as this type; raises ProtocolViolation that names the field which does not fit."""
    try:
        return msgspec.convert(document, type=kind)
    except msgspec.ValidationError as error:
        raise ProtocolViolation(
            f"the hub's {what} does not parse: {error}",
            code="protocol.answer",
            hint="are `outrider` and the hub of the same version?",
        ) from error


def parse_release(text: str) -> tuple[FamilyName, ModelVersion]:
    """Take `FAMILY/VERSION` apart."""
    family, slash, version = text.partition("/")
    if not slash:
        raise InvalidValue(
            f"{text[:80]!r} is not FAMILY/VERSION", code="invalid.release", hint="for example digits/1.0.0"
        )
    return parse_family(family), parse_version(version)
