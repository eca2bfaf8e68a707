"""When the hub is asked, when not, and how its failures are remembered."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_agent.core.cascade import (
    BREAKER,
    FADE_MS,
    FAILURES_TO_OPEN,
    LONGEST_OPEN_MS,
    MOST_ON_THE_WAY,
    TRIAL_MS,
    Ask,
    Asked,
    Breaker,
    BreakerPhase,
    Bucket,
    Came,
    Cascade,
    Declined,
    Failed,
    GaveUp,
    Missed,
    Pace,
    Policy,
    Question,
    Refused,
    Stay,
    Succeeded,
    judge,
    may_ask,
    settle,
    wanted,
)
from shared.limits import MAX_ESCALATED_BYTES

POLICY = Policy(model="digits-large", family="digits", below=0.8, per_minute=6, bytes_per_minute=6_000, margin_ms=10)


def question(*, at_ms: int = 0, left_ms: float = 100, size_bytes: int = 100, online: bool = True) -> Question:
    return Question(size_bytes=size_bytes, left_ms=left_ms, online=online, at_ms=at_ms)


def asked(cascade: Cascade, *, at_ms: int = 0) -> Cascade:
    """After a question that went out."""
    after, verdict = judge(cascade, POLICY, question(at_ms=at_ms))
    assert isinstance(verdict, Ask), verdict
    return after


def stays(cascade: Cascade, **given: float) -> str:
    """Why the question does not go out; it must cost nothing."""
    after, verdict = judge(cascade, POLICY, question(**given))  # type: ignore[arg-type]
    assert isinstance(verdict, Stay), verdict
    assert after == cascade
    assert verdict.why
    return verdict.escalated


@pytest.mark.parametrize(
    ("expected", "policy", "family", "confidences"),
    [
        (True, POLICY, "digits", (0.79,)),
        (False, POLICY, "digits", (0.8,)),
        (True, POLICY, "digits", None),
        (False, POLICY, "dogs", (0.1,)),
        (False, POLICY, "dogs", None),
        (True, replace(POLICY, family=""), "dogs", (0.1,)),
        (False, POLICY, "digits", (0.1, 0.1)),
        (False, POLICY, "digits", ()),
        (False, Policy(below=1.0), "digits", (0.1,)),
        (False, Policy(below=1.0), "digits", None),
        (False, replace(POLICY, below=0.0), "digits", (0.0,)),
    ],
)
def test_only_an_unsure_answer_of_one_row_is_asked_about(
    expected: bool, policy: Policy, family: str, confidences: tuple[float, ...] | None
) -> None:
    assert wanted(policy, family=family, confidences=confidences) is expected


def test_a_question_gets_the_time_that_is_left_less_the_margin_and_is_paid_for() -> None:
    after, verdict = judge(Cascade(), POLICY, question(left_ms=100.9))
    assert verdict == Ask(90)
    assert after.on_the_way == 1
    assert after.requests.level == 5
    assert after.bytes.level == 5_900


def test_each_obstacle_has_its_name() -> None:
    assert stays(Cascade(), online=False) == "offline"
    open_breaker = Breaker(phase=BreakerPhase.OPEN, opened=1, until_ms=50)
    assert stays(Cascade(breaker=open_breaker)) == "breaker"
    assert stays(Cascade(on_the_way=MOST_ON_THE_WAY)) == "budget"
    assert stays(Cascade(), left_ms=11) == "no_time"
    assert stays(Cascade(), left_ms=-5) == "no_time"
    assert stays(Cascade(round_trip=Pace(mean_ms=91))) == "no_time"
    assert stays(Cascade(), size_bytes=MAX_ESCALATED_BYTES + 1) == "budget"
    assert stays(Cascade(), size_bytes=6_001) == "budget"
    assert stays(Cascade(requests=Bucket(level=0.99))) == "budget"


def test_a_minutes_worth_may_be_spent_at_once_and_comes_back_evenly() -> None:
    cascade = Cascade()
    for _ in range(6):
        cascade = settle(asked(cascade), POLICY, Came(took_ms=1, size_bytes=0, late=False, at_ms=0))
    assert stays(cascade) == "budget"
    assert stays(cascade, at_ms=9_999) == "budget"
    assert isinstance(judge(cascade, POLICY, question(at_ms=10_000))[1], Ask)


def test_a_large_answer_is_paid_for_afterwards() -> None:
    cascade = settle(asked(Cascade()), POLICY, Came(took_ms=1, size_bytes=11_900, late=False, at_ms=0))
    assert cascade.bytes.level == -6_000
    assert stays(cascade, at_ms=59_000) == "budget"
    assert stays(cascade, at_ms=60_900) == "budget"
    assert isinstance(judge(cascade, POLICY, question(at_ms=61_001))[1], Ask)


def test_a_bucket_never_holds_more_than_a_minutes_worth_and_a_clock_that_stands_gives_nothing() -> None:
    assert Bucket(level=1, at_ms=0).now(capacity=6, at_ms=10_000_000) == 6
    assert Bucket(level=1, at_ms=500).now(capacity=6, at_ms=400) == 1
    assert Bucket().now(capacity=0, at_ms=0) == 0


def test_the_round_trip_is_measured_and_fades() -> None:
    pace = Pace().measured(100, at_ms=0)
    assert pace.expected_ms(0) == 150
    for _ in range(60):
        pace = pace.measured(20, at_ms=0)
    assert pace.expected_ms(0) == pytest.approx(20, abs=1)
    assert pace.expected_ms(FADE_MS) == pytest.approx(pace.expected_ms(0) / 2)
    assert Pace().expected_ms(0) == 0


def test_a_slow_hub_is_asked_again_after_a_while() -> None:
    cascade = settle(asked(Cascade()), POLICY, Came(took_ms=400, size_bytes=0, late=True, at_ms=0))
    assert stays(cascade) == "no_time"
    assert stays(cascade, at_ms=2 * FADE_MS) == "no_time"
    assert isinstance(judge(cascade, POLICY, question(at_ms=3 * FADE_MS))[1], Ask)


def test_silence_opens_the_breaker_at_the_deadline_and_one_trial_closes_it() -> None:
    cascade = Cascade()
    for number in range(FAILURES_TO_OPEN):
        cascade = asked(cascade, at_ms=number)
        cascade = settle(cascade, POLICY, Missed(at_ms=number, jitter=1.0))
    assert cascade.breaker.phase is BreakerPhase.OPEN
    assert cascade.on_the_way == FAILURES_TO_OPEN
    assert stays(cascade, at_ms=400) == "breaker"
    cascade = asked(cascade, at_ms=1_000)
    assert cascade.breaker.phase is BreakerPhase.HALF_OPEN
    assert stays(cascade, at_ms=1_001) == "breaker"
    cascade = settle(cascade, POLICY, Came(took_ms=1, size_bytes=0, late=False, at_ms=1_002))
    assert cascade.breaker == Breaker()
    for _ in range(FAILURES_TO_OPEN):
        cascade = settle(cascade, POLICY, GaveUp())
    assert cascade.on_the_way == 0


def test_a_trial_that_fails_opens_for_longer_and_full_jitter_spreads_it() -> None:
    breaker, at_ms, rests = Breaker(failures=FAILURES_TO_OPEN - 1), 0, []
    for _ in range(12):
        breaker = BREAKER.decide(breaker, Failed(at_ms=at_ms, jitter=1.0)).state
        rests.append(breaker.until_ms - at_ms)
        at_ms = breaker.until_ms
        breaker = BREAKER.decide(breaker, Asked(at_ms)).state
        assert breaker.phase is BreakerPhase.HALF_OPEN
    assert rests[:4] == [500, 1_000, 2_000, 4_000]
    assert rests[-1] == 60_000
    half = BREAKER.decide(replace(breaker, phase=BreakerPhase.HALF_OPEN), Failed(at_ms=0, jitter=0.5)).state
    assert half.until_ms == 30_000


def test_retry_after_opens_at_once_is_respected_and_is_bounded() -> None:
    cascade = settle(asked(Cascade()), POLICY, Refused(at_ms=0, jitter=0.0, retry_after_ms=7_000))
    assert cascade.on_the_way == 0
    assert stays(cascade, at_ms=6_999) == "breaker"
    assert isinstance(judge(cascade, POLICY, question(at_ms=7_000))[1], Ask)
    for_ever = BREAKER.decide(Breaker(), Failed(at_ms=0, jitter=0.0, retry_after_ms=10**12)).state
    assert for_ever.until_ms == LONGEST_OPEN_MS
    longer = BREAKER.decide(cascade.breaker, Failed(at_ms=1_000, jitter=0.0, retry_after_ms=9_000)).state
    assert longer.until_ms == 10_000


def test_one_success_in_between_begins_the_count_anew() -> None:
    breaker = Breaker()
    for _ in range(5):
        for _ in range(FAILURES_TO_OPEN - 1):
            breaker = BREAKER.decide(breaker, Failed(at_ms=0, jitter=1.0)).state
        breaker = BREAKER.decide(breaker, Succeeded()).state
    assert breaker == Breaker()


def test_a_trial_that_was_never_heard_of_again_is_repeated() -> None:
    breaker = BREAKER.decide(Breaker(phase=BreakerPhase.OPEN), Asked(5)).state
    assert not may_ask(breaker, 5 + TRIAL_MS - 1)
    assert may_ask(breaker, 5 + TRIAL_MS)


def test_an_answer_from_before_it_opened_does_not_close_it() -> None:
    opened = Breaker(phase=BreakerPhase.OPEN, opened=1, until_ms=500)
    assert BREAKER.decide(opened, Succeeded()).state == opened


def test_a_question_that_was_at_fault_itself_opens_nothing_for_the_others() -> None:
    cascade = Cascade()
    for number in range(3 * FAILURES_TO_OPEN):
        cascade = settle(asked(replace(cascade, requests=Bucket()), at_ms=number), POLICY, Declined())
    assert cascade.breaker == Breaker()
    assert cascade.on_the_way == 0


def test_a_fault_of_the_question_does_not_make_failures_forgotten() -> None:
    cascade = settle(asked(Cascade()), POLICY, Refused(at_ms=0, jitter=1.0))
    assert settle(asked(cascade), POLICY, Declined()).breaker == cascade.breaker


def test_a_trial_that_was_at_fault_itself_shows_that_the_hub_answers() -> None:
    trial = Cascade(breaker=Breaker(phase=BreakerPhase.HALF_OPEN, opened=2, until_ms=TRIAL_MS), on_the_way=1)
    assert settle(trial, POLICY, Declined()).breaker == Breaker()


def test_a_fault_from_before_it_opened_does_not_close_it() -> None:
    opened = Breaker(phase=BreakerPhase.OPEN, opened=1, until_ms=500)
    assert settle(Cascade(breaker=opened, on_the_way=1), POLICY, Declined()).breaker == opened


def test_the_reason_of_a_rest_says_what_is_known() -> None:
    def why(breaker: Breaker) -> str:
        verdict = judge(Cascade(breaker=breaker), POLICY, question(at_ms=100))[1]
        assert isinstance(verdict, Stay)
        return verdict.why

    opened = BREAKER.decide(Breaker(failures=FAILURES_TO_OPEN - 1), Failed(at_ms=0, jitter=1.0)).state
    assert why(opened) == "the hub failed or asked for a pause; it is tried again in 400 ms"
    trying = BREAKER.decide(opened, Asked(500)).state
    assert why(trying) == "the hub failed or asked for a pause; a question is on its way to try whether it answers"
