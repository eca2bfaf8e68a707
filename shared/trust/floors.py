"""The floors that hang on the keys of assignments: the newest version, and the newest moment of issue.

Both are kept among the floors of roles (shared.release.Floors.roles), under a name with the fingerprint of the keys
that the root lists for assignments. A thief of the online keys can push both up as far as numbers go; new keys begin
with floors of their own, as those of TUF roles do (specification 5.3.11, recovery from fast-forward attacks).

Floors that were kept before they had names count for whatever keys there are, until the first are kept by name.
"""

from __future__ import annotations

from typing import Final

from shared.errors import TrustError
from shared.release import Assignment, Floors
from shared.trust import metadata as md
from shared.trust.assignment import EXTENSION, TYPE, authorised_keys
from shared.trust.library import Root

DAY_MS: Final = 24 * 3_600_000
MAX_AHEAD_MS: Final = DAY_MS
"""How far ahead of an attested time an assignment may have been issued: more than clocks of one hub differ."""
_VERSION: Final = f"{EXTENSION}/{TYPE}"
_ISSUED: Final = f"{EXTENSION}/issued"


def version_floor(floors: Floors, root: Root) -> int:
    """The newest version of an assignment that was accepted from the keys that this root lists, 0 for none."""
    if any(name.startswith(f"{_VERSION}@") for name in floors.roles):
        return floors.roles.get(_name(_VERSION, root), 0)
    return floors.assignment_version


def time_floor(floors: Floors, root: Root) -> int:
    """The latest moment that signed documents prove has passed, in milliseconds since 1970."""
    try:
        name = _name(_ISSUED, root)
    except TrustError:  # a root that lists nobody who may assign; it may still say who attests the time
        return floors.time_ms
    return max(floors.time_ms, floors.roles.get(name, 0))


def raised(roles: dict[str, int], floors: Floors, root: Root, assignment: Assignment) -> dict[str, int]:
    """These floors of roles with those of an accepted assignment, and without those of keys that were replaced."""
    kept = {name: floor for name, floor in roles.items() if name.rpartition("@")[0] not in (_VERSION, _ISSUED)}
    issued_ms = max(floors.roles.get(_name(_ISSUED, root), 0), assignment.issued_ms)
    version = max(version_floor(floors, root), assignment.version)
    return {**kept, _name(_VERSION, root): version, _name(_ISSUED, root): issued_ms}


def check_issued(assignment: Assignment, *, now_ms: int) -> None:
    """Raise TrustError `trust.issued_ahead` when issued more than a day after this moment, which was attested."""
    if assignment.issued_ms > now_ms + MAX_AHEAD_MS:
        raise TrustError(
            f"assignment {assignment.version} was issued {(assignment.issued_ms - now_ms) // DAY_MS} days from now",
            code="trust.issued_ahead",
            hint="check the hub's clock; if it is right, the assignment key is in other hands: rotate the online keys",
        )


def _name(what: str, root: Root) -> str:
    return md.named(what, md.materials(authorised_keys(root)[0]))
