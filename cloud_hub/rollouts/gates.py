"""The gates: what the evidence says of a release, in numbers that a person can check.

Rules of this file:
1. Evidence is cumulative from the first offer to the end of the rollout and never reset. A sequential test that is
   looked at again and again keeps its error all the same: under "as good as before" the likelihood ratio is a
   martingale that starts at 1, so the chance that it ever reaches 1/alpha is at most alpha (Ville 1939; Wald 1945).
2. Too little evidence is WAIT. Passing only lets a stage advance; the test goes on.
3. The release before is the measure: each device's wrong answers are held against its own past, drawn towards the
   fleet's where that past is short, and the fleet's is taken at the upper end of its 95 % interval (Wilson), so that
   luck before the rollout does not make a release look bad.

Not here: who is harmed (rules.py), where figures come from (the telemetry room).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from shared.ids import DeviceId
from shared.rollout import DeviceGate, LatencyGate, OutcomeGate, Reading, Verdict
from shared.sketch import Sketch, merge_all

P95: Final = 0.95
LATENCY_Z: Final = 3.0
"""Width of the interval around the 95th percentile in standard errors: looked at often, so wider than usual."""
UPPER_Z: Final = 1.645
OWN_PAST: Final = 300
"""As many answers of its own past weigh as much as the fleet's share of wrong answers."""
MOST_WRONG: Final = 0.95
MISSED: Final = 0.05


class Answers(msgspec.Struct, frozen=True):
    """What was seen of one version on one device.

    Attributes:
        answered: requests that got an answer.
        right, wrong: answers of which the application said so.
        latency: microseconds.
    """

    answered: int = 0
    right: int = 0
    wrong: int = 0
    latency: Sketch = Sketch()

    @property
    def good(self) -> int:
        """Answers not known to be wrong."""
        return self.answered - self.wrong

    @property
    def told(self) -> int:
        """Answers of which it is known whether they were right."""
        return self.right + self.wrong


class Evidence(msgspec.Struct, frozen=True):
    """Figures by device: of the release, and of what the device ran before (control devices included)."""

    new: Mapping[DeviceId, Answers]
    old: Mapping[DeviceId, Answers]


class Harm(msgspec.Struct, frozen=True, kw_only=True):
    """How the offered devices fared.

    Attributes:
        harmed: all of them, `fresh` those that nobody has acknowledged by resuming.
        limit: fresh ones that are still borne.
    """

    healthy: int
    harmed: int
    fresh: int
    limit: int


def read_devices(gate: DeviceGate, harm: Harm) -> Reading:
    """Too many devices harmed: by the absolute limit, or by the test of their share."""
    ratio = 0.0
    bar = math.log(1 / gate.alpha)
    if gate.enabled:
        ratio = _log_ratio(good=harm.healthy, bad=harm.harmed, p0=gate.tolerated, p1=gate.unacceptable)
    figures = {
        "healthy": harm.healthy,
        "harmed": harm.harmed,
        "harmed_not_acknowledged": harm.fresh,
        "max_harmed": harm.limit,
        "tolerated": gate.tolerated,
        "unacceptable": gate.unacceptable,
        "log_likelihood_ratio": round(ratio, 3),
        "fails_at": round(bar, 3),
    }
    if harm.fresh > harm.limit:
        why = f"{harm.fresh} devices harmed, {harm.limit} are borne"
        return Reading(gate="devices", verdict=Verdict.FAIL, why=why, figures=figures)
    if gate.enabled and ratio >= bar:
        why = (
            f"{harm.harmed} of {harm.healthy + harm.harmed} devices harmed: evidence for {gate.unacceptable:.0%} "
            f"against {gate.tolerated:.0%}"
        )
        return Reading(gate="devices", verdict=Verdict.FAIL, why=why, figures=figures)
    if harm.healthy == 0:
        return Reading(gate="devices", verdict=Verdict.WAIT, why="no device is healthy yet", figures=figures)
    why = f"{harm.healthy} devices healthy, {harm.harmed} harmed"
    return Reading(gate="devices", verdict=Verdict.PASS, why=why, figures=figures)


def read_outcomes(
    gate: OutcomeGate, evidence: Evidence, *, touched: Iterable[DeviceId], share: float = 1.0, name: str = "outcomes"
) -> Reading:
    """Wrong answers against the release before, answer by answer.

    Args:
        touched: devices that were offered the release; the others that run the one before are the control.
        share: part of the gate's alpha that this reading may spend.
        name: the reading's.
    """
    old_right = sum(answers.right for answers in evidence.old.values())
    old_wrong = sum(answers.wrong for answers in evidence.old.values())
    told = old_right + old_wrong
    pool = wilson_upper(old_wrong, told)
    right = wrong = 0
    ratio = 0.0
    for device in touched:
        new = evidence.new.get(device)
        if new is None or new.told == 0:
            continue
        right, wrong = right + new.right, wrong + new.wrong
        past = evidence.old.get(device, _NOTHING)
        p = (past.wrong + OWN_PAST * pool) / (past.told + OWN_PAST)
        p0, p1 = _hypotheses(gate, p)
        ratio += _log_ratio(good=new.right, bad=new.wrong, p0=p0, p1=p1)
    fails_at, passes_at = math.log(1 / (gate.alpha * share)), math.log(gate.beta)
    figures = {
        "right": right,
        "wrong": wrong,
        "wrong_share": _share(wrong, right + wrong),
        "before_right": old_right,
        "before_wrong": old_wrong,
        "before_wrong_share": _share(old_wrong, told),
        "before_wrong_share_at_most": round(pool, 5),
        "tolerance": gate.tolerance,
        "margin": gate.margin,
        "log_likelihood_ratio": round(ratio, 3),
        "fails_at": round(fails_at, 3),
        "passes_at": round(passes_at, 3),
    }
    shares = (
        f"{_share(wrong, right + wrong):.1%} wrong of {right + wrong}, before {_share(old_wrong, told):.1%} of {told}"
    )
    if told < gate.min_baseline:
        why = f"the release before has {told} answers with a known outcome, {gate.min_baseline} are needed"
        return Reading(gate=name, verdict=Verdict.WAIT, why=why, figures=figures)
    if right + wrong == 0:
        return Reading(gate=name, verdict=Verdict.WAIT, why="no outcome of the release is known yet", figures=figures)
    if ratio >= fails_at:
        return Reading(gate=name, verdict=Verdict.FAIL, why=f"answers worse than before: {shares}", figures=figures)
    if ratio <= passes_at:
        return Reading(gate=name, verdict=Verdict.PASS, why=f"as good as before: {shares}", figures=figures)
    return Reading(gate=name, verdict=Verdict.WAIT, why=f"not decided yet: {shares}", figures=figures)


def read_latency(gate: LatencyGate, evidence: Evidence, *, touched: Sequence[DeviceId]) -> Reading:
    """The 95th percentile against the release before, on the same devices if they have answered enough before."""
    new = merge_all(evidence.new[device].latency for device in touched if device in evidence.new)
    old = merge_all(evidence.old[device].latency for device in touched if device in evidence.old)
    if old.count < gate.min_answers:
        old = merge_all(answers.latency for answers in evidence.old.values())
    figures: dict[str, float] = {
        "answers": new.count,
        "before_answers": old.count,
        "min_answers": gate.min_answers,
        "max_ratio": gate.max_ratio,
    }
    if new.count < gate.min_answers or old.count < gate.min_answers:
        why = f"{new.count} answers timed, {old.count} before; each side needs {gate.min_answers}"
        return Reading(gate="latency", verdict=Verdict.WAIT, why=why, figures=figures)
    new_ms, old_ms = new.quantile(P95) / 1000, old.quantile(P95) / 1000
    least = new.quantile(P95 - _rank_error(new.count)) / max(old.quantile(min(1.0, P95 + _rank_error(old.count))), 1e-9)
    ratio = new_ms / max(old_ms, 1e-9)
    figures |= {
        "p95_ms": round(new_ms, 3),
        "before_p95_ms": round(old_ms, 3),
        "ratio": round(ratio, 3),
        "ratio_at_least": round(least, 3),
    }
    said = f"p95 {new_ms:.2f} ms, before {old_ms:.2f} ms: {ratio:.2f} times, {gate.max_ratio:g} are right"
    if least > gate.max_ratio:
        return Reading(gate="latency", verdict=Verdict.FAIL, why=said, figures=figures)
    if ratio <= gate.max_ratio:
        return Reading(gate="latency", verdict=Verdict.PASS, why=said, figures=figures)
    return Reading(gate="latency", verdict=Verdict.WAIT, why=f"not decided yet: {said}", figures=figures)


def missed_rate(devices: int) -> float:
    """A share of harmed devices below this has a chance above 5 % to show not one among so many devices."""
    return 1.0 if devices < 1 else float(1 - MISSED ** (1 / devices))


def answers_needed(gate: OutcomeGate, *, wrong: int, told: int) -> tuple[int, int]:
    """Answers to find a rise by the margin, and to clear a release as good as before: Wald's mean sample numbers."""
    pool = wilson_upper(wrong, told)
    p0, p1 = _hypotheses(gate, pool)
    worse = _share(wrong, told) + gate.margin if told else p1
    rise = _drift(worse, p0=p0, p1=p1)
    fall = -_drift(_share(wrong, told) if told else max(0.0, p0 - gate.tolerance), p0=p0, p1=p1)
    find = math.log(1 / gate.alpha) / rise if rise > 0 else math.inf
    clear = -math.log(gate.beta) / fall if fall > 0 else math.inf
    return _whole(find), _whole(clear)


def wilson_upper(bad: int, count: int, *, z: float = UPPER_Z) -> float:
    """Upper end of Wilson's interval for a share (1927); 1.0 when nothing was counted."""
    if count == 0:
        return 1.0
    share, z2 = bad / count, z * z
    middle = share + z2 / (2 * count)
    return (middle + z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))) / (1 + z2 / count)


_NOTHING: Final = Answers()


def _hypotheses(gate: OutcomeGate, p: float) -> tuple[float, float]:
    """Shares of wrong answers that mean "as good as before" and "worse", for a share before."""
    p0 = min(max(p + gate.tolerance, 1e-4), MOST_WRONG - 0.01)
    return p0, min(max(p + gate.margin, p0 + 0.005), MOST_WRONG + 0.04)


def _log_ratio(*, good: int, bad: int, p0: float, p1: float) -> float:
    return bad * math.log(p1 / p0) + good * math.log((1 - p1) / (1 - p0))


def _drift(p: float, *, p0: float, p1: float) -> float:
    return p * math.log(p1 / p0) + (1 - p) * math.log((1 - p1) / (1 - p0))


def _rank_error(count: int) -> float:
    return min(P95, LATENCY_Z * math.sqrt(P95 * (1 - P95) / count))


def _share(part: int, whole: int) -> float:
    return round(part / whole, 5) if whole else 0.0


def _whole(number: float) -> int:
    return min(math.ceil(number), 1_000_000_000) if math.isfinite(number) else 1_000_000_000
