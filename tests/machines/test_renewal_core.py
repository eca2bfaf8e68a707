"""When a certificate is renewed: at two thirds, spread; at once when expired; and how failures are waited out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import renewal
from edge_agent.core.renewal import Adopt, Ask, Failed, Looked, NoteRefusal, Phase, Renewal, Renewed, StartTimer, decide

DAY_MS = 86_400_000
LIFE_MS = 30 * DAY_MS


def waiting(*, spread: float = 0.0, life_ms: int = LIFE_MS) -> Renewal:
    return Renewal(not_before_ms=0, not_after_ms=life_ms, spread=spread)


@given(st.floats(0, 1), st.integers(4_000, 825 * DAY_MS))
def test_it_is_due_between_two_thirds_and_three_quarters_of_the_life(spread: float, life_ms: int) -> None:
    due = renewal.due_ms(waiting(spread=spread, life_ms=life_ms))
    assert life_ms * 2 // 3 <= due <= life_ms * 3 // 4 + 1


def test_a_fleet_that_was_enrolled_together_is_spread() -> None:
    dues = {renewal.due_ms(waiting(spread=number / 1000)) for number in range(1000)}
    assert max(dues) - min(dues) > 2 * DAY_MS
    assert len(dues) == 1000


def test_it_waits_until_then_and_looks_at_the_clock_every_hour() -> None:
    step = decide(waiting(), Looked(now_ms=DAY_MS))
    assert (step.state.phase, step.effects) == (Phase.WAITING, (StartTimer(renewal.LOOK_MS),))
    step = decide(waiting(), Looked(now_ms=20 * DAY_MS - 5_000))
    assert step.effects == (StartTimer(5_000),)
    step = decide(waiting(), Looked(now_ms=20 * DAY_MS))
    assert (step.state.phase, step.effects) == (Phase.ASKING, (Ask(),))
    assert decide(step.state, Looked(now_ms=99 * DAY_MS)).effects == ()


def test_what_has_expired_is_renewed_at_once() -> None:
    assert decide(waiting(spread=1.0), Looked(now_ms=LIFE_MS * 5)).effects == (Ask(),)


def test_a_new_certificate_is_used_and_the_old_trouble_forgotten() -> None:
    asking = Renewal(phase=Phase.ASKING, not_before_ms=0, not_after_ms=1, spread=0, failures=3, code="x", message="y")
    new = Renewed(not_before_ms=DAY_MS, not_after_ms=DAY_MS + LIFE_MS, spread=0.5, now_ms=DAY_MS)
    step = decide(asking, new)
    assert step.effects == (Adopt(), StartTimer(renewal.LOOK_MS))
    assert (step.state.failures, step.state.code, step.state.not_after_ms) == (0, "", DAY_MS + LIFE_MS)


def test_a_clock_that_is_years_ahead_makes_no_storm() -> None:
    asking = Renewal(phase=Phase.ASKING, not_before_ms=0, not_after_ms=1, spread=0)
    new = Renewed(not_before_ms=0, not_after_ms=LIFE_MS, spread=0, now_ms=100 * LIFE_MS)
    assert decide(asking, new).effects == (Adopt(), StartTimer(renewal.LOOK_MS))


@pytest.mark.parametrize("failures", range(12))
def test_failures_are_waited_out_longer_and_longer_up_to_an_hour(failures: int) -> None:
    asking = Renewal(phase=Phase.ASKING, not_before_ms=0, not_after_ms=LIFE_MS, spread=0, failures=failures)
    failed = Failed(code="transfer.unreachable", message="away", hint="", jitter=1.0)
    (timer,) = decide(asking, failed).effects
    assert timer == StartTimer(min(60_000 * 2**failures, 3_600_000))
    (at_once,) = decide(asking, Failed(code="x", message="", hint="", jitter=0.0)).effects
    assert at_once == StartTimer(renewal.SHORTEST_WAIT_MS)


@pytest.mark.parametrize("code", sorted(renewal.SELDOM))
def test_a_refusal_for_good_is_told_once_and_asked_again_seldom(code: str) -> None:
    asking = Renewal(phase=Phase.ASKING, not_before_ms=0, not_after_ms=LIFE_MS, spread=0)
    failed = Failed(code=code, message="no", hint="enrol again", jitter=0.5)
    step = decide(asking, failed)
    assert step.effects == (StartTimer(3 * 3_600_000), NoteRefusal(code, "no"))
    assert (step.state.message, step.state.hint) == ("no", "enrol again")
    asked = decide(step.state, Looked(now_ms=LIFE_MS)).state
    assert decide(asked, failed).effects == (StartTimer(3 * 3_600_000),)


@given(
    st.lists(
        st.one_of(
            st.builds(Looked, now_ms=st.integers(0, 2**45)),
            st.builds(
                Renewed,
                not_before_ms=st.integers(0, 2**45),
                not_after_ms=st.integers(0, 2**45),
                spread=st.floats(0, 1),
                now_ms=st.integers(0, 2**45),
            ),
            st.builds(
                Failed,
                code=st.sampled_from(["x", *sorted(renewal.SELDOM)]),
                message=st.just("m"),
                hint=st.just(""),
                jitter=st.floats(0, 1),
            ),
        )
    )
)
def test_whatever_happens_it_asks_or_has_a_timer(events: list[renewal.RenewalEvent]) -> None:
    state, has_timer = waiting(), True
    for event in events:
        step = decide(state, event)
        timers = [effect for effect in step.effects if isinstance(effect, StartTimer)]
        assert all(renewal.SHORTEST_WAIT_MS <= timer.delay_ms <= renewal.REFUSED_WINDOW_MS for timer in timers)
        has_timer = bool(timers) or has_timer
        if state.phase is Phase.WAITING and isinstance(event, Looked):
            assert timers or step.state.phase is Phase.ASKING
        state = step.state
