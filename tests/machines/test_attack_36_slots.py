"""Attack 36, a model that crashes: when it is loaded, on trial, and once it is committed; nobody loops for ever."""

from __future__ import annotations

from edge_agent.core import slots
from edge_agent.core.slot_steps import CRASH_LOOP_CODE
from edge_agent.core.slot_values import (
    CRASH_LOOP,
    MAX_LOADS,
    MAX_RESTART_DELAY_MS,
    Phase,
    RestartDue,
    StartTimer,
    Timer,
    WarmUpAllowed,
    WarmUpDue,
)
from tests.machines.slot_parts import installed, key, offer
from tests.machines.slot_script import Script, committed, host_lost, on_probation

V1, V2 = key("1.0.0"), key("2.0.0")


def test_attack_36_a_model_that_crashes_when_it_is_loaded_is_given_up_and_never_serves() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2)[:-1])
    for _ in range(MAX_LOADS - 1):
        script.say(host_lost(V2))
        assert slots.serving(script.slot) == installed("1.0.0", at=1)
        script.say(WarmUpDue(), WarmUpAllowed(V2))
        script.stands(Phase.WARMUP)
    script.say(host_lost(V2))
    assert (script.slot.phase, script.slot.quarantine) == (Phase.COMMITTED, (V2,))


def test_attack_36_a_model_that_crashes_on_trial_is_given_up_and_not_taken_again() -> None:
    script = Script().say(*committed("1.0.0", at=1))
    script.say(*on_probation("2.0.0", at=2))
    for _ in range(2):
        script.say(host_lost(V2))
        assert slots.serving(script.slot) == installed("1.0.0", at=1)
        script.say(WarmUpAllowed(V2), *on_probation("2.0.0", at=2)[-1:])
        script.stands(Phase.PROBATION)
    script.say(host_lost(V2))
    assert (script.slot.phase, script.slot.quarantine) == (Phase.ROLLING_BACK, (V2,))
    assert slots.serving(script.slot) == installed("1.0.0", at=1)
    script.say(offer("2.0.0", at=3))
    assert script.notes == ["release.refused"]


def test_attack_36_a_committed_model_that_crashes_is_started_ever_more_slowly_and_told() -> None:
    script = Script().say(*committed("1.0.0", at=1))
    pauses: list[int] = []
    for _ in range(CRASH_LOOP + 10):
        script.say(host_lost(V1))
        pauses += [one.delay_ms for one in script.effects if isinstance(one, StartTimer) and one.timer is Timer.RESTART]
        script.say(RestartDue())
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_RESTART_DELAY_MS
    assert (script.slot.error_code, script.slot.failed) == (CRASH_LOOP_CODE, V1)
