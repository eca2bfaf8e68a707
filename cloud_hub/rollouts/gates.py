"""The gates over harmed devices and wrong answers, in numbers that a person can check.

Rules of this file:
1. Evidence is cumulative from the first offer to the end of the rollout and never reset. A sequential test that is
   looked at again and again keeps its error all the same: under "as good as before" the likelihood ratio is a
   martingale that starts at 1, so the chance that it ever reaches 1/alpha is at most alpha (Ville 1939; Wald 1945).
2. That holds only for evidence that comes in an order which nothing about it chose. Harm shows within seconds, health
   after many answers: so devices are counted in the order of offers, up to the first that is neither yet. The absolute
   limit of harmed devices does not wait.
3. Too little evidence is WAIT. Passing only lets a stage advance; the test goes on.
4. The release before is the measure: what is expected of a device (past.py) is made once, when it was offered the
   release, and kept. How far a device may differ from that by itself is in both hypotheses (beta-binomial), so one
   that always was worse than the others is not held against the release.

Not here: latency (latency.py), who is harmed (stages.py), where figures come from (evidence.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import msgspec

from cloud_hub.rollouts.answers import Evidence
from cloud_hub.rollouts.past import log_chance, wilson_upper
from shared.ids import DeviceId
from shared.rollout import DeviceGate, OutcomeGate, Reading, Verdict

MOST_WRONG: Final = 0.95
MISSED: Final = 0.05
USEFUL: Final = "answers_that_would_help"
SATED: Final = 3
"""After so many times the weight of what is expected of it, a device's further answers change the ratio no more."""


class Harm(msgspec.Struct, frozen=True, kw_only=True):
    """How the offered devices fared.

    Attributes:
        healthy, harmed: all of them; `fresh` are the harmed ones that nobody has acknowledged by resuming.
        limit: fresh ones that are still borne.
        healthy_in_order, harmed_in_order: those before the first device, in the order of offers, that is neither yet.
    """

    healthy: int
    harmed: int
    fresh: int
    limit: int
    healthy_in_order: int
    harmed_in_order: int


def read_devices(gate: DeviceGate, harm: Harm) -> Reading:
    """Too many devices harmed: by the absolute limit, or by the test of their share."""
    ratio = 0.0
    bar = math.log(1 / gate.alpha)
    if gate.enabled:
        ratio = _log_ratio(
            good=harm.healthy_in_order, bad=harm.harmed_in_order, p0=gate.tolerated, p1=gate.unacceptable
        )
    figures = {
        "healthy": harm.healthy,
        "harmed": harm.harmed,
        "harmed_not_acknowledged": harm.fresh,
        "max_harmed": harm.limit,
        "healthy_in_order": harm.healthy_in_order,
        "harmed_in_order": harm.harmed_in_order,
        "tolerated": gate.tolerated,
        "unacceptable": gate.unacceptable,
        "log_likelihood_ratio": round(ratio, 3),
        "fails_at": round(bar, 3),
    }
    if harm.fresh > harm.limit:
        why = f"{harm.fresh} devices harmed, {harm.limit} are borne"
        return Reading(gate="devices", verdict=Verdict.FAIL, why=why, figures=figures)
    if gate.enabled and ratio >= bar:
        counted = harm.healthy_in_order + harm.harmed_in_order
        why = (
            f"{harm.harmed_in_order} of {counted} devices harmed: evidence for {gate.unacceptable:.0%} against "
            f"{gate.tolerated:.0%}"
        )
        return Reading(gate="devices", verdict=Verdict.FAIL, why=why, figures=figures)
    if harm.healthy == 0:
        return Reading(gate="devices", verdict=Verdict.WAIT, why="no device is healthy yet", figures=figures)
    why = f"{harm.healthy} devices healthy, {harm.harmed} harmed"
    return Reading(gate="devices", verdict=Verdict.PASS, why=why, figures=figures)


class _Weighed(msgspec.Struct):
    """Outcomes of some devices against what was expected of them."""

    right: int = 0
    wrong: int = 0
    expected: float = 0.0
    fail_ratio: float = 0.0
    pass_ratio: float = 0.0
    useful: float = 0.0


def _weigh(gate: OutcomeGate, evidence: Evidence, touched: Iterable[DeviceId]) -> _Weighed:
    found = _Weighed()
    for device in touched:
        new, expected = evidence.new.get(device), evidence.expected.get(device)
        if new is None or expected is None or new.told == 0:
            continue
        found.right, found.wrong = found.right + new.right, found.wrong + new.wrong
        found.expected += new.told * expected.share
        p0, p1 = _hypotheses(gate, expected.share)
        found.fail_ratio += log_chance(new.wrong, new.right, p1, expected.weight)
        found.fail_ratio -= log_chance(new.wrong, new.right, p0, expected.weight)
        found.useful += max(0.0, SATED * expected.weight - new.told)
        found.pass_ratio += _log_ratio(good=new.right, bad=new.wrong, p0=p0, p1=p1)
    return found


def read_outcomes(
    gate: OutcomeGate, evidence: Evidence, *, touched: Iterable[DeviceId], share: float = 1.0, name: str = "outcomes"
) -> Reading:
    """Wrong answers against the release before.

    Two ratios are made of the same answers. FAIL reads the one that lets each device differ from what is expected of
    it; it grows slowly where little is known of a device, so that its error is kept. PASS reads the one that takes
    the expectation at its word, as there is nothing to keep but `beta`.

    Args:
        touched: devices that were offered the release.
        share: part of the gate's alpha that this reading may spend.
        name: the reading's.
    """
    old_right = sum(answers.right for answers in evidence.old.values())
    old_wrong = sum(answers.wrong for answers in evidence.old.values())
    seen = _weigh(gate, evidence, touched)
    right, wrong, told = seen.right, seen.wrong, old_right + old_wrong
    fails_at, passes_at = math.log(1 / (gate.alpha * share)), math.log(gate.beta)
    figures = {
        "right": right,
        "wrong": wrong,
        "wrong_share": _share(wrong, right + wrong),
        "expected_wrong_share": _share(seen.expected, right + wrong),
        "before_right": old_right,
        "before_wrong": old_wrong,
        "before_wrong_share": _share(old_wrong, told),
        "tolerance": gate.tolerance,
        "margin": gate.margin,
        "log_likelihood_ratio": round(seen.fail_ratio, 3),
        "fails_at": round(fails_at, 3),
        "log_likelihood_ratio_to_pass": round(seen.pass_ratio, 3),
        "passes_at": round(passes_at, 3),
        USEFUL: math.ceil(seen.useful),
    }
    shares = (
        f"{_share(wrong, right + wrong):.1%} wrong of {right + wrong}, before {_share(old_wrong, told):.1%} of {told}"
    )
    if told < gate.min_baseline:
        why = f"the release before has {told} answers with a known outcome, {gate.min_baseline} are needed"
        return Reading(gate=name, verdict=Verdict.WAIT, why=why, figures=figures)
    if right + wrong == 0:
        return Reading(gate=name, verdict=Verdict.WAIT, why="no outcome of the release is known yet", figures=figures)
    if seen.fail_ratio >= fails_at:
        return Reading(gate=name, verdict=Verdict.FAIL, why=f"answers worse than before: {shares}", figures=figures)
    if seen.pass_ratio <= passes_at:
        return Reading(gate=name, verdict=Verdict.PASS, why=f"as good as before: {shares}", figures=figures)
    why = f"not decided yet: {shares}"
    if not figures[USEFUL]:
        why += "; these devices have said what they can, others are needed"
    return Reading(gate=name, verdict=Verdict.WAIT, why=why, figures=figures)


def needs_others(reading: Reading) -> bool:
    """Whether a reading waits for what only further devices can say."""
    figures = reading.figures
    is_undecided = reading.verdict is Verdict.WAIT and figures.get("right", 0) + figures.get("wrong", 0) > 0
    return is_undecided and figures.get(USEFUL) == 0


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


def _hypotheses(gate: OutcomeGate, p: float) -> tuple[float, float]:
    """Shares of wrong answers that mean "as good as before" and "worse", for a share before."""
    p0 = min(max(p + gate.tolerance, 1e-4), MOST_WRONG - 0.01)
    return p0, min(max(p + gate.margin, p0 + 0.005), MOST_WRONG + 0.04)


def _log_ratio(*, good: int, bad: int, p0: float, p1: float) -> float:
    return bad * math.log(p1 / p0) + good * math.log((1 - p1) / (1 - p0))


def _drift(p: float, *, p0: float, p1: float) -> float:
    return p * math.log(p1 / p0) + (1 - p) * math.log((1 - p1) / (1 - p0))


def _share(part: float, whole: int) -> float:
    return round(part / whole, 5) if whole else 0.0


def _whole(number: float) -> int:
    return min(math.ceil(number), 1_000_000_000) if math.isfinite(number) else 1_000_000_000
