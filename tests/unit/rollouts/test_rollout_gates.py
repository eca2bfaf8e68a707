"""The gates: what they say of evidence, how often they err when looked at again and again, and when they wait."""

from __future__ import annotations

import random

import pytest

from cloud_hub.rollouts.gates import (
    Answers,
    Evidence,
    Harm,
    answers_needed,
    missed_rate,
    read_devices,
    read_latency,
    read_outcomes,
    wilson_upper,
)
from shared.ids import DeviceId
from shared.rollout import DeviceGate, LatencyGate, OutcomeGate, Reading, Verdict
from shared.sketch import Sketch, sketch_of

A, B = DeviceId("a"), DeviceId("b")


def told(right: int, wrong: int) -> Answers:
    return Answers(answered=right + wrong, right=right, wrong=wrong)


def timed(values: list[float]) -> Answers:
    return Answers(answered=len(values), latency=sketch_of(values))


def outcomes(new: Answers, old: Answers, gate: OutcomeGate | None = None) -> Reading:
    return read_outcomes(gate or OutcomeGate(), Evidence(new={A: new}, old={A: old}), touched=[A])


@pytest.mark.parametrize(
    ("new", "old", "verdict"),
    [
        (told(0, 0), told(950, 50), Verdict.WAIT),
        (told(10, 0), told(950, 50), Verdict.WAIT),
        (told(285, 15), told(950, 50), Verdict.PASS),
        (told(240, 60), told(950, 50), Verdict.FAIL),
        (told(285, 15), told(30, 1), Verdict.WAIT),  # little is known of the release before
        (told(1200, 300), told(800, 200), Verdict.PASS),  # it was no better before
    ],
)
def test_outcomes_are_held_against_the_release_before(new: Answers, old: Answers, verdict: Verdict) -> None:
    reading = outcomes(new, old)
    assert reading.verdict is verdict, reading
    assert reading.figures["right"] == new.right


def test_a_device_is_held_against_its_own_past() -> None:
    # B has always been bad (a dirty lens); on A the same share of wrong answers would be news.
    old = {A: told(4900, 100), B: told(3500, 1500)}
    both = Evidence(new={B: told(1400, 600)}, old=old)
    assert read_outcomes(OutcomeGate(), both, touched=[B]).verdict is Verdict.PASS
    other = Evidence(new={A: told(140, 60)}, old=old)
    assert read_outcomes(OutcomeGate(), other, touched=[A]).verdict is Verdict.FAIL


def test_control_devices_speak_for_a_device_without_a_past() -> None:
    evidence = Evidence(new={A: told(140, 60)}, old={B: told(970, 30)})
    assert read_outcomes(OutcomeGate(), evidence, touched=[A]).verdict is Verdict.FAIL


def test_looking_after_every_answer_does_not_make_a_good_release_fail() -> None:
    gate, old, failed, trials = OutcomeGate(), told(4900, 100), 0, 150
    draw = random.Random(7)
    for _ in range(trials):
        right = wrong = 0
        for _ in range(1500):
            is_wrong = draw.random() < 0.02 + gate.tolerance  # the worst that still counts as good
            right, wrong = right + (not is_wrong), wrong + is_wrong
            if outcomes(told(right, wrong), old).verdict is Verdict.FAIL:
                failed += 1
                break
    assert failed / trials <= 0.03  # alpha is 1 %


def test_a_release_that_is_worse_by_the_margin_is_found_in_about_as_many_answers_as_the_plan_says() -> None:
    gate, old = OutcomeGate(), told(4900, 100)
    draw, needed = random.Random(8), []
    for _ in range(60):
        right = wrong = 0
        while outcomes(told(right, wrong), old).verdict is not Verdict.FAIL:
            is_wrong = draw.random() < 0.02 + gate.margin
            right, wrong = right + (not is_wrong), wrong + is_wrong
            assert right + wrong < 3000
        needed.append(right + wrong)
    find, clear = answers_needed(gate, wrong=100, told=5000)
    assert find / 2 < sum(needed) / len(needed) < find * 2
    assert 0 < clear < 1000


def test_sharing_alpha_asks_for_more_evidence() -> None:
    evidence = Evidence(new={A: told(240, 30)}, old={A: told(950, 50)})
    whole = read_outcomes(OutcomeGate(), evidence, touched=[A])
    part = read_outcomes(OutcomeGate(), evidence, touched=[A], share=0.1)
    assert part.figures["fails_at"] > whole.figures["fails_at"]


@pytest.mark.parametrize(
    ("factor", "count", "verdict"),
    [
        (1.0, 200, Verdict.PASS),
        (1.3, 200, Verdict.PASS),
        (2.0, 200, Verdict.FAIL),
        (2.0, 30, Verdict.WAIT),
        (1.0, 30, Verdict.WAIT),
        (1.8, 60, Verdict.WAIT),
    ],
)
def test_latency_is_a_ratio_of_p95_with_enough_answers_on_both_sides(
    factor: float, count: int, verdict: Verdict
) -> None:
    draw = random.Random(9)
    old = [1000 * draw.lognormvariate(1, 0.2) for _ in range(400)]
    new = [factor * 1000 * draw.lognormvariate(1, 0.2) for _ in range(count)]
    evidence = Evidence(new={A: timed(new)}, old={A: timed(old)})
    reading = read_latency(LatencyGate(), evidence, touched=[A])
    assert reading.verdict is verdict, reading


def test_latency_compares_the_same_devices() -> None:
    # The control device is fast, the touched one slow: before and after.
    evidence = Evidence(new={A: timed([9000.0] * 100)}, old={A: timed([9000.0] * 100), B: timed([1000.0] * 900)})
    assert read_latency(LatencyGate(), evidence, touched=[A]).verdict is Verdict.PASS


def test_a_rare_outlier_does_not_fail_latency() -> None:
    new = timed([2000.0] * 97 + [60000.0] * 3)
    evidence = Evidence(new={A: new}, old={A: timed([2000.0] * 200)})
    assert read_latency(LatencyGate(), evidence, touched=[A]).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("healthy", "harmed", "fresh", "limit", "verdict"),
    [
        (0, 0, 0, 1, Verdict.WAIT),
        (1, 0, 0, 1, Verdict.PASS),
        (3, 1, 1, 1, Verdict.PASS),
        (3, 1, 1, 0, Verdict.FAIL),
        (30, 2, 0, 0, Verdict.PASS),  # acknowledged
        (5, 4, 4, 50, Verdict.FAIL),  # the share is far too high, whatever the limit
        (1000, 20, 20, 50, Verdict.PASS),
    ],
)
def test_devices_by_number_and_by_share(healthy: int, harmed: int, fresh: int, limit: int, verdict: Verdict) -> None:
    harm = Harm(healthy=healthy, harmed=harmed, fresh=fresh, limit=limit)
    assert read_devices(DeviceGate(), harm).verdict is verdict


def test_without_the_test_of_shares_the_absolute_limit_still_holds() -> None:
    gate = DeviceGate(enabled=False)
    assert read_devices(gate, Harm(healthy=1, harmed=9, fresh=9, limit=9)).verdict is Verdict.PASS
    assert read_devices(gate, Harm(healthy=1, harmed=9, fresh=9, limit=8)).verdict is Verdict.FAIL


def test_the_power_of_a_canary() -> None:
    assert round(missed_rate(10), 2) == 0.26
    assert missed_rate(0) == 1.0
    assert missed_rate(1000) < 0.004


def test_the_upper_end_of_a_share() -> None:
    assert wilson_upper(0, 0) == 1.0
    assert 0.02 < wilson_upper(2, 100) < 0.08
    assert 0.02 < wilson_upper(2000, 100_000) < 0.0211


def test_nothing_at_all_is_waited_for() -> None:
    nothing = Evidence(new={}, old={})
    assert read_outcomes(OutcomeGate(), nothing, touched=[A]).verdict is Verdict.WAIT
    assert read_latency(LatencyGate(), nothing, touched=[A]).verdict is Verdict.WAIT
    assert Answers().latency == Sketch()
