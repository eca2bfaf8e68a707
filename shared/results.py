"""How bringing a release in ended, as devices report it: one vocabulary for the device, the hub and people.

A result is an error code (shared/errors.py). What the hub concludes from it is decided here, once, by its first word
or, where that is not enough, by the whole code. A code of a first word that is not here comes from a newer agent: it is
shown as it is and counts against the release, because a fleet is better stopped once too often.

A result never makes a device do anything: it is read by rollouts, which decide for all devices together.
The table in docs/slots.md is made from `RESULTS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final


class Blame(Enum):
    """Against whom a result counts.

    RELEASE: the device tried it and it failed. ELSEWHERE: it was never tried, or not by its own fault. PERSON: someone
    at the device took it back. UNKNOWN: not a word of this vocabulary.
    """

    RELEASE = "the release"
    ELSEWHERE = "nobody: link, disk, or another model of the set"
    PERSON = "the release: a person at the device took it back"
    UNKNOWN = "the release, until this hub knows the word"


RESULTS: Final[Mapping[str, tuple[Blame, str]]] = {
    "model": (Blame.RELEASE, "it could not be loaded or run"),
    "model.golden": (Blame.RELEASE, "it gave other answers than recorded, when loaded or on trial"),
    "model.host_lost": (Blame.RELEASE, "its process ended, when loaded or on trial"),
    "model.slow": (Blame.RELEASE, "a golden sample got no answer in time"),
    "model.crash_loop": (Blame.RELEASE, "committed, its process was lost again and again"),
    "release": (Blame.RELEASE, "it was given up"),
    "release.loads": (Blame.RELEASE, "it was loaded as often as may be, and the device went down each time"),
    "release.loops": (Blame.RELEASE, "it used up its steps"),
    "release.silent": (Blame.RELEASE, "it answered too little on trial, probes included"),
    "release.quarantined": (Blame.RELEASE, "it failed on this device before"),
    "trust": (Blame.RELEASE, "its files or its signatures do not hold"),
    "operator.rollback": (Blame.PERSON, "rolled back by the operator of the device"),
    "transfer": (Blame.ELSEWHERE, "its files did not arrive"),
    "storage": (Blame.ELSEWHERE, "the disk refused, or has changed its files"),
    "set": (Blame.ELSEWHERE, "it changes with others, and not because of itself did it not"),
    "set.member_failed": (Blame.ELSEWHERE, "another model of the set failed; the message names it, its code and why"),
    "set.timeout": (Blame.ELSEWHERE, "the other models of the set were not ready in time"),
    "set.no_room": (Blame.ELSEWHERE, "all hosts of the set, old and new, do not fit the memory of the profile"),
}


def blame(code: str) -> Blame:
    """Against whom this result counts; UNKNOWN for what an agent says that is newer than this vocabulary."""
    found = RESULTS.get(code) or RESULTS.get(code.split(".", maxsplit=1)[0])
    return found[0] if found is not None else Blame.UNKNOWN


def table() -> str:
    """The vocabulary as a Markdown table."""
    rows = [f"| `{code}` | {meaning} | {whom.value} |" for code, (whom, meaning) in RESULTS.items()]
    return "\n".join(["| code | what happened | counts against |", "|---|---|---|", *rows])
