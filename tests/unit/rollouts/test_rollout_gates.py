"""The gates: what they say of evidence, how often they err when looked at again and again, and when they wait."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from cloud_hub.rollouts.answers import NOTHING_SEEN, Answers, Evidence
from cloud_hub.rollouts.gates import Harm, answers_needed, missed_rate, read_devices, read_outcomes
from cloud_hub.rollouts.latency import pair_of, read_latency
from cloud_hub.rollouts.past import expect, likeness, wilson_upper
from shared.ids import DeviceId
from shared.rollout import DeviceGate, LatencyGate, OutcomeGate, Reading, Verdict
from shared.sketch import Sketch, sketch_of

A, B = DeviceId("a"), DeviceId("b")


def told(right: int, wrong: int) -> Answers:
    return Answers(answered=right + wrong, right=right, wrong=wrong)


def timed(values: list[float]) -> Sketch:
    return sketch_of(values)


def evidence(new: dict[DeviceId, Answers], old: dict[DeviceId, Answers]) -> Evidence:
    """With what is expected of the devices made as a rollout makes it, of one profile."""
    like = likeness(list(old.values()))
    return Evidence(new=new, old=old, expected={device: expect(old.get(device, NOTHING_SEEN), like) for device in new})


def outcomes(new: Answers, old: Answers, gate: OutcomeGate | None = None) -> Reading:
    return read_outcomes(gate or OutcomeGate(), evidence({A: new}, {A: old}), touched=[A])


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
    same = evidence({B: told(1400, 600)}, old)
    assert read_outcomes(OutcomeGate(), same, touched=[B]).verdict is Verdict.PASS
    other = evidence({A: told(140, 60)}, old)
    assert read_outcomes(OutcomeGate(), other, touched=[A]).verdict is Verdict.FAIL


def test_control_devices_speak_for_a_device_without_a_past() -> None:
    others: dict[DeviceId, Answers] = {DeviceId(f"c{number}"): told(97, 3) for number in range(10)}
    seen = evidence({A: told(140, 60)}, others)
    assert read_outcomes(OutcomeGate(), seen, touched=[A]).verdict is Verdict.FAIL


def test_one_control_device_does_not_say_how_another_one_is() -> None:
    seen = evidence({A: told(170, 30)}, {B: told(970, 30)})
    assert read_outcomes(OutcomeGate(), seen, touched=[A]).verdict is Verdict.WAIT


def test_an_unchanged_device_that_differs_from_its_fleet_is_hardly_ever_evidence() -> None:
    """It was wrong in a fifth of its 60 answers and goes on like that; 19 others in a fortieth of theirs."""
    draw, fails, trials = random.Random(11), 0, 60
    for _ in range(trials):
        old: dict[DeviceId, Answers] = {DeviceId(f"c{number}"): drawn(draw, 60, 0.025) for number in range(19)}
        old[A] = drawn(draw, 60, 0.2)
        seen, right, wrong = evidence({A: NOTHING_SEEN}, old), 0, 0
        for _ in range(8):
            more = drawn(draw, 200, 0.2)
            right, wrong = right + more.right, wrong + more.wrong
            seen = replace(seen, new={A: told(right, wrong)})
            if read_outcomes(OutcomeGate(), seen, touched=[A]).verdict is Verdict.FAIL:
                fails += 1
                break
    assert fails / trials <= 0.05  # nobody told the gate beforehand that this one is an exception


def test_devices_that_all_differ_are_no_evidence_together() -> None:
    draw, fails = random.Random(12), 0
    for _ in range(40):
        shares = {DeviceId(f"d{number}"): draw.betavariate(1, 19) for number in range(40)}
        old = {device: drawn(draw, 60, share) for device, share in shares.items()}
        new = {device: drawn(draw, 400, share) for device, share in list(shares.items())[:20]}
        fails += read_outcomes(OutcomeGate(), evidence(new, old), touched=list(new)).verdict is Verdict.FAIL
    assert fails <= 1


def drawn(draw: random.Random, count: int, share: float) -> Answers:
    wrong = sum(draw.random() < share for _ in range(count))
    return told(count - wrong, wrong)


def test_what_devices_have_in_common_is_measured() -> None:
    draw = random.Random(13)
    alike = likeness([drawn(draw, 60, 0.03) for _ in range(300)])
    apart = likeness([drawn(draw, 60, draw.betavariate(0.6, 19.4)) for _ in range(300)])
    assert apart.weight <= 20 < 200 <= alike.weight
    assert 0.03 < alike.share < 0.04


def test_looking_after_every_answer_does_not_make_a_good_release_fail() -> None:
    gate, failed, trials = OutcomeGate(), 0, 150
    draw, seen = random.Random(7), evidence({A: NOTHING_SEEN}, {A: told(4900, 100)})
    for _ in range(trials):
        right = wrong = 0
        for _ in range(1500):
            is_wrong = draw.random() < 0.02 + gate.tolerance  # the worst that still counts as good
            right, wrong = right + (not is_wrong), wrong + is_wrong
            if read_outcomes(gate, replace(seen, new={A: told(right, wrong)}), touched=[A]).verdict is Verdict.FAIL:
                failed += 1
                break
    assert failed / trials <= 0.03  # alpha is 1 %


def test_a_release_that_is_worse_by_the_margin_is_found_in_about_as_many_answers_as_the_plan_says() -> None:
    gate, draw, needed = OutcomeGate(), random.Random(8), []
    seen = evidence({A: NOTHING_SEEN}, {A: told(4900, 100)})
    for _ in range(60):
        right = wrong = 0
        while read_outcomes(gate, replace(seen, new={A: told(right, wrong)}), touched=[A]).verdict is not Verdict.FAIL:
            is_wrong = draw.random() < 0.02 + gate.margin
            right, wrong = right + (not is_wrong), wrong + is_wrong
            assert right + wrong < 3000
        needed.append(right + wrong)
    find, clear = answers_needed(gate, wrong=100, told=5000)
    assert find / 2 < sum(needed) / len(needed) < find * 2
    assert 0 < clear < 1000


def test_next_to_no_past_gives_an_expectation_of_next_to_no_weight() -> None:
    expected = expect(NOTHING_SEEN, likeness([told(1, 0)]))
    assert expected.weight == 1.0
    seen = Evidence(new={A: told(3, 3)}, old={B: told(1, 0)}, expected={A: expected})
    assert read_outcomes(OutcomeGate(min_baseline=1), seen, touched=[A]).verdict is Verdict.WAIT


def test_sharing_alpha_asks_for_more_evidence() -> None:
    seen = evidence({A: told(240, 30)}, {A: told(950, 50)})
    whole = read_outcomes(OutcomeGate(), seen, touched=[A])
    part = read_outcomes(OutcomeGate(), seen, touched=[A], share=0.1)
    assert part.figures["fails_at"] > whole.figures["fails_at"]


def test_outcomes_of_a_device_of_which_nothing_is_expected_yet_are_waited_for() -> None:
    seen = Evidence(new={A: told(100, 100)}, old={B: told(970, 30)})
    assert read_outcomes(OutcomeGate(), seen, touched=[A]).verdict is Verdict.WAIT


def lognormal(draw: random.Random, count: int, *, ms: float = 2.7) -> Sketch:
    return timed([1000 * ms * draw.lognormvariate(0, 0.2) for _ in range(count)])


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
    old, new = lognormal(draw, 400), lognormal(draw, count, ms=2.7 * factor)
    reading = read_latency(LatencyGate(), [pair_of(new, old)])
    assert reading.verdict is verdict, reading


def test_a_slow_device_that_answers_more_than_before_does_not_make_the_release_slow() -> None:
    # Together: 95 % within 3 ms before (the fast one answered most), within 10 ms now (the slow one does).
    draw = random.Random(10)
    fast = pair_of(lognormal(draw, 60, ms=2), lognormal(draw, 2000, ms=2))
    slow = pair_of(lognormal(draw, 2000, ms=8), lognormal(draw, 60, ms=8))
    reading = read_latency(LatencyGate(), [fast, slow])
    assert reading.verdict is Verdict.PASS, reading
    assert 0.8 < reading.figures["ratio"] < 1.2


def test_a_release_that_is_slower_on_every_device_is_found_whatever_they_take() -> None:
    draw = random.Random(11)
    pairs = [pair_of(lognormal(draw, 80, ms=ms * 2), lognormal(draw, 80, ms=ms)) for ms in (1, 4, 16, 64)]
    assert read_latency(LatencyGate(), pairs).verdict is Verdict.FAIL


def test_load_that_slows_the_control_down_as_well_is_not_the_release() -> None:
    draw = random.Random(12)
    touched = [pair_of(lognormal(draw, 300, ms=6), lognormal(draw, 300, ms=2))]
    controls = [pair_of(lognormal(draw, 300, ms=6), lognormal(draw, 300, ms=2)) for _ in range(3)]
    assert read_latency(LatencyGate(), touched).verdict is Verdict.FAIL
    reading = read_latency(LatencyGate(), touched, controls=controls)
    assert reading.verdict is Verdict.PASS
    assert 2.5 < reading.figures["ratio_of_controls"] < 3.5
    idle = [pair_of(lognormal(draw, 300, ms=1), lognormal(draw, 300, ms=2)) for _ in range(3)]
    assert read_latency(LatencyGate(), [pair_of(touched[0].old, touched[0].old)], controls=idle).verdict is Verdict.PASS


def test_a_rare_outlier_does_not_fail_latency() -> None:
    new = timed([2000.0] * 97 + [60000.0] * 3)
    assert read_latency(LatencyGate(), [pair_of(new, timed([2000.0] * 200))]).verdict is Verdict.PASS


def harm(*, healthy: int, harmed: int, fresh: int, limit: int) -> Harm:
    return Harm(
        healthy=healthy, harmed=harmed, fresh=fresh, limit=limit, healthy_in_order=healthy, harmed_in_order=harmed
    )


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
    seen = harm(healthy=healthy, harmed=harmed, fresh=fresh, limit=limit)
    assert read_devices(DeviceGate(), seen).verdict is verdict


def test_without_the_test_of_shares_the_absolute_limit_still_holds() -> None:
    gate = DeviceGate(enabled=False)
    assert read_devices(gate, harm(healthy=1, harmed=9, fresh=9, limit=9)).verdict is Verdict.PASS
    assert read_devices(gate, harm(healthy=1, harmed=9, fresh=9, limit=8)).verdict is Verdict.FAIL


def test_the_power_of_a_canary() -> None:
    assert round(missed_rate(10), 2) == 0.26
    assert missed_rate(0) == 1.0
    assert missed_rate(1000) < 0.004


def test_the_upper_end_of_a_share() -> None:
    assert wilson_upper(0, 0) == 1.0
    assert 0.02 < wilson_upper(2, 100) < 0.08
    assert 0.02 < wilson_upper(2000, 100_000) < 0.0211


def test_nothing_at_all_is_waited_for() -> None:
    assert read_outcomes(OutcomeGate(), Evidence(), touched=[A]).verdict is Verdict.WAIT
    assert read_latency(LatencyGate(), []).verdict is Verdict.WAIT
    assert read_latency(LatencyGate(), [pair_of(Sketch(), Sketch())]).verdict is Verdict.WAIT
    assert Answers().latency == Sketch()
