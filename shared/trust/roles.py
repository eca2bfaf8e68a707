"""Names of roles and of their files.

A role's name comes from signed metadata, yet never reaches a path or an address as it is: it is percent-encoded
first, slash included, so that `../x` is a harmless file name.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import quote, unquote

from shared.errors import InvalidValue
from shared.ids import FamilyName

ROOT: Final = "root"
TIMESTAMP: Final = "timestamp"
SNAPSHOT: Final = "snapshot"
TARGETS: Final = "targets"
LEARNED: Final = "learned/"
TOP_LEVEL: Final = frozenset({ROOT, TIMESTAMP, SNAPSHOT, TARGETS})

MAX_ROLE_CHARS: Final = 200
"""Of a role's name once it is percent-encoded: with version and suffix, file systems allow 255 bytes."""

_FILE = re.compile(r"(?:([1-9][0-9]{0,15})\.)?(.+)\.json", re.DOTALL)


def family_role(family: FamilyName) -> str:
    """The role that signs a family's releases: `models/digits`."""
    return f"models/{family}"


def family_paths(family: FamilyName) -> str:
    """The path pattern that the family's role is trusted for: `models/digits/*/*`."""
    return f"models/{family}/*/*"


def learned_role(family: FamilyName) -> str:
    """The role that the hub itself signs a family's learned releases with, where a person allowed it."""
    return f"{LEARNED}{family}"


def learned_paths(family: FamilyName) -> str:
    """The path pattern that this role is trusted for: `models/digits/*-learned.*/*`."""
    return f"models/{family}/*-learned.*/*"


def is_role_name(name: str) -> bool:
    """Whether a role may be called that: printable, and short enough for a file name."""
    return bool(name) and name.isprintable() and len(quote(name, safe="")) <= MAX_ROLE_CHARS


def file_name(role: str, version: int | None = None) -> str:
    """A metadata file's name on the hub: `timestamp.json`, `3.snapshot.json`, `1.models%2Fdigits.json`."""
    encoded = quote(role, safe="")
    return f"{encoded}.json" if version is None else f"{version}.{encoded}.json"


def parse_file_name(name: str) -> tuple[str, int | None]:
    """Role and version of a metadata file's name, encoded or already decoded once; raises InvalidValue.

    Only the timestamp has no version: a name without one is the timestamp's or is refused.
    """
    match = _FILE.fullmatch(name)
    if match is None or len(name) > MAX_ROLE_CHARS + 32:
        _refuse(name)
        raise AssertionError
    version, encoded = match.groups()
    role = unquote(encoded)
    if not is_role_name(role) or (version is None) != (role == TIMESTAMP):
        _refuse(name)
    return role, None if version is None else int(version)


def _refuse(name: str) -> None:
    raise InvalidValue(
        f"{name[:120]!r} is not the name of a metadata file",
        code="invalid.metadata_name",
        hint="use 'timestamp.json' or VERSION.ROLE.json, for example '1.root.json' or '1.models%2Fdigits.json'",
    )
