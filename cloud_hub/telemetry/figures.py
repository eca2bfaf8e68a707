"""What a batch adds to the figures that gates read: answers, right and wrong, and how long answers took.

Figures are kept per device, family, version and minute of arrival, so that a question about any span and any set of
devices is a sum. They are written in the transaction that stores the records, from records that were not here before:
each record counts once, as it is stored once.

Rules of this file:
1. An answer that came from elsewhere (cache, hub) or was refused says nothing about how fast the model is: only
   answers of the model itself are timed.
2. Right and wrong is what the application said. What the hub's larger model said is a label, not a verdict.
3. A device can claim anything: names that are none are not counted, and of one batch at most `MAX_GROUPS` names are.

Not here: tables, time, what a gate makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from cloud_hub.telemetry.rules import StoredRecord
from shared.errors import InvalidValue
from shared.ids import DeviceId, parse_family, parse_version
from shared.sketch import Sketch, sketch_of

MAX_GROUPS: Final = 32
"""Pairs of family and version counted of one batch; a device runs a handful."""
MINUTE_MS: Final = 60_000
HUB: Final = "hub"
"""The source of an outcome that the hub's larger model gave."""

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


class _Result(msgspec.Struct, frozen=True):
    model: str
    version: str
    rung: str
    took_us: int = 0


class _Outcome(msgspec.Struct, frozen=True):
    model: str = ""
    version: str = ""
    correct: bool | None = None
    source: str = ""


@dataclass(slots=True)
class _Sum:
    answered: int = 0
    right: int = 0
    wrong: int = 0
    times_us: list[int] = field(default_factory=list)


_result_decoder = msgspec.msgpack.Decoder(_Result)
_outcome_decoder = msgspec.msgpack.Decoder(_Outcome)


def minute_of(at_ms: int) -> int:
    """The minute, counted from 1970, in which this time lies."""
    return at_ms // MINUTE_MS


def tally(records: Iterable[StoredRecord]) -> dict[tuple[str, str], Tally]:
    """What these records add, by (family, version)."""
    sums: dict[tuple[str, str], _Sum] = {}
    for record in records:
        if record.kind == "result":
            _count_result(sums, _result_decoder.decode(record.body))
        elif record.kind == "outcome":
            _count_outcome(sums, _outcome_decoder.decode(record.body))
    return {
        key: Tally(answered=one.answered, right=one.right, wrong=one.wrong, latency=sketch_of(one.times_us))
        for key, one in sums.items()
    }


def _count_result(sums: dict[tuple[str, str], _Sum], result: _Result) -> None:
    if result.rung == "refused":
        return
    found = _sum_of(sums, result.model, result.version)
    if found is None:
        return
    found.answered += 1
    if result.rung in _OWN_RUNGS and result.took_us > 0:
        found.times_us.append(result.took_us)


def _count_outcome(sums: dict[tuple[str, str], _Sum], outcome: _Outcome) -> None:
    if outcome.correct is None or outcome.source == HUB:
        return
    found = _sum_of(sums, outcome.model, outcome.version)
    if found is None:
        return
    if outcome.correct:
        found.right += 1
    else:
        found.wrong += 1


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
