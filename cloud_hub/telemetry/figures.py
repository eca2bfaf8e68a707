"""What a batch adds to the figures that gates read: answers, right and wrong, and how long answers took.

Figures are kept per device, family, version and minute of arrival, so that a question about any span and any set of
devices is a sum. They are written in the transaction that stores the records, from records that were not here before:
each record counts once, as it is stored once. They are read off a batch's columns, without a value for each record.

Rules of this file:
1. An answer that came from elsewhere (cache, hub) says nothing about how fast the model is: only answers of the model
   itself are timed. A request that a release was asked for in vain counts among the times as one without end.
2. Right and wrong is what the application said. What the hub's larger model said is a label, not a verdict.
3. A device can claim anything: names that are none are not counted, of one batch at most `MAX_GROUPS` names are, and
   of one minute at most `MAX_PAIRS`, those that came first.

Not here: tables, time, what a gate makes of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from shared.errors import InvalidValue
from shared.ids import DeviceId, parse_family, parse_version
from shared.sketch import Sketch, merge_all, sketch_of
from shared.wire.columns import Columns

MAX_GROUPS: Final = 32
"""Pairs of family and version counted of one batch; a device runs a handful."""
MAX_PAIRS: Final = 64
"""Pairs of family and version counted of one device in one minute."""
MINUTE_MS: Final = 60_000
NEVER_US: Final = 60_000_000
"""What a request counts as having taken that a release was asked for in vain. It has no time of its own, and a release
that answers only what is easy must not look fast."""
HUB: Final = "hub"
"""The source of an outcome that the hub's larger model gave."""

_DEFAULTS: Final[Mapping[str, Any]] = {"model": "", "version": "", "took_us": 0, "correct": None, "source": ""}
"""Of fields that no record of a batch has."""
_OWN_RUNGS: Final = frozenset({"full", "smaller"})


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known of one release on one device, over the span that was asked for.

    Attributes:
        answered: requests that got an answer, from whichever rung.
        right, wrong: answers of which the application said so.
        latency: microseconds from a request being read to its answer, for answers of the device's own model.
    """

    device: DeviceId
    version: str
    answered: int
    right: int
    wrong: int
    latency: Sketch


@dataclass(frozen=True, slots=True)
class Tally:
    """What records add to one release's figures."""

    answered: int
    right: int
    wrong: int
    latency: Sketch


Tallies = Mapping[tuple[str, str], Tally]
"""By (family, version)."""


@dataclass(slots=True)
class _Sum:
    answered: int = 0
    right: int = 0
    wrong: int = 0
    times_us: list[int] = field(default_factory=list)


def minute_of(at_ms: int) -> int:
    """The minute, counted from 1970, in which this time lies."""
    return at_ms // MINUTE_MS


def tally(content: Columns) -> Tallies:
    """What these records add."""
    sums: dict[tuple[str, str], _Sum] = {}
    if "result" in content.kinds:
        _count_results(sums, content)
    if "outcome" in content.kinds:
        _count_outcomes(sums, content)
    return {
        key: Tally(answered=one.answered, right=one.right, wrong=one.wrong, latency=sketch_of(one.times_us))
        for key, one in sums.items()
    }


def bounded(known: Collection[tuple[str, str]], more: Tallies) -> Tallies:
    """As much of what is added to a minute with these pairs as there is room for."""
    room = MAX_PAIRS - len(known)
    if len(more) <= room:
        return more
    new = islice((key for key in more if key not in known), max(0, room))
    kept = {*known, *new}
    return {key: one for key, one in more.items() if key in kept}


def add_all(many: Sequence[Tallies]) -> Tallies:
    """What all of them add together."""
    if len(many) == 1:
        return many[0]
    found: dict[tuple[str, str], list[Tally]] = {}
    for tallies in many:
        for key, one in tallies.items():
            found.setdefault(key, []).append(one)
    return {
        key: Tally(
            answered=sum(one.answered for one in same),
            right=sum(one.right for one in same),
            wrong=sum(one.wrong for one in same),
            latency=merge_all(one.latency for one in same),
        )
        for key, same in found.items()
    }


def _count_results(sums: dict[tuple[str, str], _Sum], content: Columns) -> None:
    model, version, rung, took_us = _fields(content, "result", "model", "version", "rung", "took_us")
    for family, release, step, took in zip(model, version, rung, took_us, strict=True):
        found = _sum_of(sums, family, release)
        if found is None:
            continue
        if step == "refused":
            found.times_us.append(NEVER_US)
            continue
        found.answered += 1
        if step in _OWN_RUNGS and took > 0:
            found.times_us.append(took)


def _count_outcomes(sums: dict[tuple[str, str], _Sum], content: Columns) -> None:
    model, version, correct, source = _fields(content, "outcome", "model", "version", "correct", "source")
    for family, release, verdict, who in zip(model, version, correct, source, strict=True):
        if verdict is None or who == HUB:
            continue
        found = _sum_of(sums, family, release)
        if found is None:
            continue
        if verdict:
            found.right += 1
        else:
            found.wrong += 1


def _fields(content: Columns, kind: str, *names: str) -> list[Sequence[Any]]:
    found = []
    for name in names:
        values = content.values(kind, name)
        found.append([_DEFAULTS[name]] * content.count if values is None else values)
    return found


def _sum_of(sums: dict[tuple[str, str], _Sum], family: str, version: str) -> _Sum | None:
    key = (family, version)
    if key not in sums:
        if len(sums) >= MAX_GROUPS or not _are_names(family, version):
            return None
        sums[key] = _Sum()
    return sums[key]


def _are_names(family: str, version: str) -> bool:
    try:
        parse_family(family)
        parse_version(version)
    except InvalidValue:
        return False
    return True
