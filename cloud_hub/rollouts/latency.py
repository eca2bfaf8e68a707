"""The latency gate: 95th percentiles of time, each device against itself.

Rules of this file:
1. Devices are not mixed: one that is slow by nature must not make a release look slow, nor a fast one hide it. Each
   comparison is a ratio of the same device's percentiles; where a device has answered too little on either side, those
   devices of one profile are compared together.
2. The ratios are combined as logarithms, weighted by how exactly each is known, with the spread between devices
   measured and added (DerSimonian and Laird 1986).
3. What also slowed down devices that still run the release before is not the release's doing: it is divided out. That
   these became faster is not held against it.
4. This is no sequential test: it fails when the ratio is too high by `Z` standard errors. There is no alpha that
   looking often could not use up.

Not here: who is compared with what (evidence.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from shared.rollout import LatencyGate, Reading, Verdict
from shared.sketch import RELATIVE_ERROR, Sketch

P95: Final = 0.95
Z: Final = 3.0
"""Standard errors; looked at often, so more than usual."""
EXACT: Final = RELATIVE_ERROR / math.sqrt(3)
"""A sketch knows a time to within its relative error: the standard error of a ratio that seems exact."""


class Pair(msgspec.Struct, frozen=True):
    """Times of one device, or of one profile's, with the release and before it, and how many there are of each."""

    new: Sketch
    old: Sketch
    new_count: int
    old_count: int

    def is_enough(self, gate: LatencyGate) -> bool:
        """Whether both sides have the answers that the gate asks for."""
        return self.new_count >= gate.min_answers and self.old_count >= gate.min_answers


def pair_of(new: Sketch, old: Sketch) -> Pair:
    """Both sides of a comparison."""
    return Pair(new, old, new.count, old.count)


class _Times(msgspec.Struct, frozen=True):
    """Logarithms: of both percentiles, of their ratio, and the ratio's standard error."""

    new: float
    old: float
    ratio: float
    error: float


def read_latency(gate: LatencyGate, pairs: Sequence[Pair], *, controls: Sequence[Pair] = ()) -> Reading:
    """The 95th percentile against the release before.

    Args:
        pairs: of devices that were offered the release; those without enough answers do not count.
        controls: of devices that still run the release before: since the rollout began, and before that.
    """
    compared = [pair for pair in pairs if pair.is_enough(gate)]
    figures: dict[str, float] = {
        "answers": sum(pair.new_count for pair in compared or pairs),
        "before_answers": sum(pair.old_count for pair in compared or pairs),
        "min_answers": gate.min_answers,
        "max_ratio": gate.max_ratio,
        "compared": len(compared),
    }
    if not compared:
        most = max((min(pair.new_count, pair.old_count) for pair in pairs), default=0)
        why = f"no device and no profile has {gate.min_answers} timed answers with both releases, at most {most}"
        return Reading(gate="latency", verdict=Verdict.WAIT, why=why, figures=figures)
    found = _combine([_compare(pair) for pair in compared])
    others = _combine([_compare(pair) for pair in controls if pair.is_enough(gate)] or [_Times(0, 0, 0, 0)])
    load = max(0.0, others.ratio)
    error = math.hypot(found.error, others.error) if load else found.error
    ratio, least = math.exp(found.ratio - load), math.exp(found.ratio - load - Z * error)
    figures |= {
        "p95_ms": round(math.exp(found.new) / 1000, 3),
        "before_p95_ms": round(math.exp(found.old) / 1000, 3),
        "ratio": round(ratio, 3),
        "ratio_at_least": round(least, 3),
        "ratio_of_controls": round(math.exp(others.ratio), 3),
    }
    return _judge(gate, ratio=ratio, least=least, load=math.exp(load), figures=figures)


def _judge(gate: LatencyGate, *, ratio: float, least: float, load: float, figures: Mapping[str, float]) -> Reading:
    said = f"p95 {figures['p95_ms']:.2f} ms, before {figures['before_p95_ms']:.2f} ms"
    if load > 1:
        said += f", of which {load:.2f} times is load (devices with the release before slowed down as well)"
    said += f": {ratio:.2f} times, {gate.max_ratio:g} are right"
    if least > gate.max_ratio:
        return Reading(gate="latency", verdict=Verdict.FAIL, why=said, figures=dict(figures))
    if ratio <= gate.max_ratio:
        return Reading(gate="latency", verdict=Verdict.PASS, why=said, figures=dict(figures))
    return Reading(gate="latency", verdict=Verdict.WAIT, why=f"not decided yet: {said}", figures=dict(figures))


def _compare(pair: Pair) -> _Times:
    low, new = _logs(pair.new, P95 - _rank_error(pair.new_count), P95)
    old, high = _logs(pair.old, P95, min(1.0, P95 + _rank_error(pair.old_count)))
    return _Times(new, old, new - old, max(EXACT, (new - low + high - old) / Z))


def _combine(times: Sequence[_Times]) -> _Times:
    if len(times) == 1:
        return times[0]
    weights = [1 / one.error**2 for one in times]
    whole = sum(weights)
    mean = sum(weight * one.ratio for weight, one in zip(weights, times, strict=True)) / whole
    apart = sum(weight * (one.ratio - mean) ** 2 for weight, one in zip(weights, times, strict=True))
    spread2 = max(0.0, (apart - (len(times) - 1)) / (whole - sum(weight**2 for weight in weights) / whole))
    weights = [1 / (one.error**2 + spread2) for one in times]
    whole = sum(weights)
    new = sum(weight * one.new for weight, one in zip(weights, times, strict=True)) / whole
    old = sum(weight * one.old for weight, one in zip(weights, times, strict=True)) / whole
    return _Times(new, old, new - old, math.sqrt(1 / whole))


def _logs(sketch: Sketch, *shares: float) -> tuple[float, float]:
    first, second = sketch.quantiles(shares)
    return math.log(max(first, 1e-9)), math.log(max(second, 1e-9))


def _rank_error(count: int) -> float:
    return min(P95, Z * math.sqrt(P95 * (1 - P95) / count))
