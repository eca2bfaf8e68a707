"""The rollout machine as scripts of what a fleet does and what is decided of it."""

from __future__ import annotations

import msgspec
import pytest

from cloud_hub.rollouts import rules
from cloud_hub.rollouts.values import AbortAsked, Looked, PauseAsked, ResumeAsked, Rollout, Started, WishesDone
from shared.ids import DeviceId
from shared.machine import UnexpectedEvent
from shared.rollout import Condition, Phase, StagePhase, Verdict, Wish
from tests.machines.rollout_world import (
    MINUTE_MS,
    NEW,
    OLD,
    RolloutWorld,
    dies,
    idles,
    refuses,
    slower,
    well,
    worse,
)


def test_a_good_release_goes_stage_by_stage_to_everybody() -> None:
    world = RolloutWorld(devices=20)
    seen: list[int] = []
    for _ in range(200):
        world.run(well, minutes=1)
        if len(world.touched()) not in seen:
            seen.append(len(world.touched()))
        if world.is_in(Phase.COMPLETED):
            break
    assert world.is_in(Phase.COMPLETED)
    assert seen == [1, 5, 10, 20]
    assert {sighting.version for sighting in world.fleet.values()} == {NEW}
    stages = [note.text for note in world.notes if note.kind == "stage" and note.text.endswith("passed")]
    assert len(stages) == 4
    passed = [note for note in world.notes if note.text.endswith("passed")]
    assert all(reading.verdict is Verdict.PASS for note in passed for reading in note.readings)


def test_no_stage_is_left_before_it_has_soaked() -> None:
    world = RolloutWorld(devices=20)
    world.run(well, minutes=11)
    assert len(world.touched()) == 1
    assert world.state.stage is not None
    assert world.state.stage.phase is StagePhase.SOAKING
    world.run(well, minutes=1)
    assert len(world.touched()) == 5


@pytest.mark.parametrize(("behave", "gate"), [(worse, "outcomes"), (slower, "latency")])
def test_what_installs_well_and_is_worse_is_stopped_in_the_canary(behave: object, gate: str) -> None:
    world = RolloutWorld(devices=20)
    world.run(behave, minutes=60, until=lambda: world.is_in(Phase.ROLLED_BACK))  # type: ignore[arg-type]
    assert world.is_in(Phase.ROLLED_BACK)
    assert len(world.touched()) == 1
    assert world.state.reason.startswith(gate)
    assert {sighting.version for sighting in world.fleet.values()} == {OLD}
    (failed,) = [note for note in world.notes if note.kind == "failed"]
    (reading,) = [reading for reading in failed.readings if reading.verdict is Verdict.FAIL]
    assert reading.gate == gate
    assert len(reading.figures) > 4


def test_harmed_devices_are_borne_up_to_the_limit_and_then_all_go_back() -> None:
    world = RolloutWorld(devices=20, spec_fields={"max_harmed": 2, "stages": [5, "100%"]})
    victims = {world.state.members[i].device for i in (0, 2)}

    def some(inner: RolloutWorld, name: DeviceId) -> None:
        (refuses if name in victims else well)(inner, name)

    world.run(some, minutes=15)
    assert world.is_in(Phase.RUNNING)
    assert len(world.touched()) == 20
    victims.add(world.state.members[7].device)
    world.change(world.state.members[7].device, error_code="model.crash_loop")
    world.run(some, minutes=5)
    assert world.is_in(Phase.ROLLED_BACK)
    assert world.state.reason.startswith("devices")
    back = [member for member in world.state.members if member.wish is Wish.BEFORE]
    assert len(back) == 20
    assert all(member.settled for member in back)
    assert {sighting.version for sighting in world.fleet.values()} == {OLD}


def test_a_device_that_goes_silent_over_the_release_is_harmed() -> None:
    world = RolloutWorld(devices=4, spec_fields={"max_harmed": 0})
    world.run(dies, minutes=9)
    assert world.is_in(Phase.RUNNING)
    world.run(dies, minutes=60, until=lambda: world.is_in(Phase.ROLLED_BACK))
    (harmed,) = [member for member in world.state.members if member.condition is Condition.HARMED]
    assert "silent" in harmed.reason
    # It cannot say that it is back; its assignment says so to it.
    assert harmed.wish is Wish.BEFORE
    assert not harmed.settled
    assert world.assignments[harmed.device] == (2, OLD)


def test_silence_is_not_judged_by_a_hub_that_was_not_listening() -> None:
    world = RolloutWorld(devices=4, spec_fields={"max_harmed": 0})
    world.run(dies, minutes=2)
    world.at_ms += 60 * MINUTE_MS
    world.watching_since_ms = world.at_ms - MINUTE_MS
    world.look()
    assert world.is_in(Phase.RUNNING)
    world.at_ms += 10 * MINUTE_MS
    world.look()
    assert world.is_in(Phase.ROLLING_BACK)


def test_a_device_that_is_away_is_not_offered_and_holds_nothing_up() -> None:
    world = RolloutWorld(devices=10)
    away = world.state.members[0].device
    world.change(away, online=False)
    world.run(well, minutes=14)
    assert away not in world.touched()
    assert len(world.touched()) >= 1
    world.change(away, online=True)
    world.run(well, minutes=60, until=lambda: world.is_in(Phase.COMPLETED))
    assert away in world.touched()
    assert world.is_in(Phase.COMPLETED)


def test_who_was_never_reached_is_assigned_the_release_at_the_end() -> None:
    world = RolloutWorld(devices=4)
    away = world.state.members[3].device
    world.change(away, online=False)
    world.run(well, minutes=60, until=lambda: world.is_in(Phase.COMPLETED))
    member = world.state.members[3]
    assert (member.condition, member.wish) == (Condition.WAITING, Wish.TARGET)
    assert world.assignments[away] == (1, NEW)


def test_when_nobody_is_here_it_waits() -> None:
    world = RolloutWorld(devices=3)
    for name in list(world.fleet):
        world.change(name, online=False)
    world.run(well, minutes=60)
    assert world.is_in(Phase.RUNNING)
    assert world.touched() == []


def test_a_device_in_the_middle_of_another_change_is_left_alone() -> None:
    world = RolloutWorld(devices=2)
    busy = world.state.members[0].device
    world.change(busy, phase="probation", candidate="1.0.5")
    world.look()
    assert busy not in world.touched()


def test_too_little_evidence_is_waited_for() -> None:
    world = RolloutWorld(devices=4)

    def quiet(inner: RolloutWorld, name: DeviceId) -> None:
        well(inner, name)
        inner.new[name] = msgspec.structs.replace(inner.new[name], right=0, wrong=0)

    world.run(quiet, minutes=120)
    assert world.is_in(Phase.RUNNING)
    assert len(world.touched()) == 1
    (reading,) = [one for one in world.state.readings if one.gate == "outcomes"]
    assert reading.verdict is Verdict.WAIT


def test_a_first_installation_has_nothing_to_compare_with_and_nothing_to_go_back_to() -> None:
    world = RolloutWorld(devices=3)
    world.old.clear()
    for name in list(world.fleet):
        world.change(name, version="", manifest="", phase="")
    world.run(refuses, minutes=2)
    stranded = [member for member in world.state.members if member.stranded]
    assert stranded == []
    world.run(refuses, minutes=10, until=lambda: world.is_in(Phase.ROLLED_BACK))
    assert world.is_in(Phase.ROLLED_BACK)
    assert all(member.stranded for member in world.state.members if member.is_touched)


def test_devices_that_do_not_get_there_pause_it_and_resuming_acknowledges_them() -> None:
    world = RolloutWorld(devices=20, spec_fields={"stages": [3, "100%"], "max_unresolved": 0})
    slow = world.state.members[1].device

    def one_idles(inner: RolloutWorld, name: DeviceId) -> None:
        (idles if name == slow else well)(inner, name)

    world.run(one_idles, minutes=30)
    assert world.is_in(Phase.PAUSED)
    assert "unresolved" in world.state.reason
    assert "0 good answers" in next(m.reason for m in world.state.members if m.device == slow)
    world.say(ResumeAsked(at_ms=world.at_ms, actor="ann"))
    world.run(one_idles, minutes=30, until=lambda: world.is_in(Phase.COMPLETED))
    assert world.is_in(Phase.COMPLETED)


def test_resuming_acknowledges_the_harmed_and_only_new_ones_count() -> None:
    world = RolloutWorld(devices=20, spec_fields={"stages": [5, "100%"], "max_harmed": 1})
    first = world.state.members[0].device
    world.run(lambda w, n: (refuses if n == first else well)(w, n), minutes=3)
    world.say(PauseAsked(at_ms=world.at_ms, actor="ann", reason="lunch"))
    world.say(ResumeAsked(at_ms=world.at_ms, actor="ann"))
    world.change(world.state.members[1].device, error_code="model.crash_loop")
    world.run(well, minutes=3)
    assert world.is_in(Phase.RUNNING)  # one new one is borne
    world.change(world.state.members[2].device, error_code="model.crash_loop")
    world.look()
    assert world.is_in(Phase.ROLLING_BACK)


def test_while_paused_nobody_is_offered_and_a_failing_gate_still_rolls_back() -> None:
    world = RolloutWorld(devices=20, spec_fields={"max_harmed": 0})
    world.run(well, minutes=3)
    world.say(PauseAsked(at_ms=world.at_ms, actor="ann"))
    world.run(well, minutes=60)
    assert len(world.touched()) == 1
    world.change(world.touched()[0], error_code="model.crash_loop")
    world.look()
    assert world.is_in(Phase.ROLLING_BACK)


@pytest.mark.parametrize("reverting", [True, False])
def test_an_abort_keeps_or_gives_back(reverting: bool) -> None:
    world = RolloutWorld(devices=20)
    world.run(well, minutes=14)
    touched = world.touched()
    assert len(touched) == 5
    world.say(AbortAsked(at_ms=world.at_ms, actor="ann", reverting=reverting))
    world.assign()
    world.run(well, minutes=5, until=lambda: world.is_in(Phase.ABORTED))
    assert world.is_in(Phase.ABORTED)
    assert {world.fleet[DeviceId(name)].version for name in touched} == ({OLD} if reverting else {NEW})


def test_the_first_stage_goes_on_to_another_device_when_its_only_one_failed() -> None:
    world = RolloutWorld(devices=40, spec_fields={"max_harmed": 2})
    first = world.state.members[0].device
    world.run(lambda w, n: (refuses if n == first else well)(w, n), minutes=5)
    assert len(world.touched()) == 2
    assert world.is_in(Phase.RUNNING)


def test_a_failed_download_is_no_fault_of_the_release() -> None:
    world = RolloutWorld(devices=20, spec_fields={"max_harmed": 0, "max_unresolved": 0})
    world.run(lambda w, n: w.change(n, error_code="transfer.refused"), minutes=20)
    assert world.is_in(Phase.PAUSED)
    assert {m.condition for m in world.state.members} == {Condition.WAITING, Condition.UNRESOLVED}


def test_the_failure_of_another_model_of_a_set_is_no_fault_of_the_release() -> None:
    world = RolloutWorld(devices=20, spec_fields={"max_harmed": 0, "max_unresolved": 0})
    world.run(
        lambda w, n: w.change(n, error_code="set.member_failed", error="faces: model.golden: 7 of 10"), minutes=20
    )
    assert world.is_in(Phase.PAUSED)
    assert {m.condition for m in world.state.members} == {Condition.WAITING, Condition.UNRESOLVED}
    assert any("set.member_failed" in m.reason for m in world.state.members)


def test_a_result_that_this_hub_does_not_know_is_shown_and_counts_against_the_release() -> None:
    world = RolloutWorld(devices=20, spec_fields={"max_harmed": 0})
    world.run(lambda w, n: w.change(n, error_code="quantum.flux", error="of a newer agent"), minutes=3)
    assert "quantum.flux: of a newer agent" in {m.reason for m in world.state.members}


def test_an_assignment_that_cannot_be_made_is_told_and_holds_nothing_up() -> None:
    world = RolloutWorld(devices=20, spec_fields={"stages": [2, "100%"]})
    world.say(
        Looked(at_ms=world.at_ms, watching_since_ms=0, sightings=dict(world.fleet)),
    )
    first, second = world.touched()
    event = WishesDone(
        at_ms=world.at_ms,
        wish=Wish.TARGET,
        assigned={DeviceId(second): 1},
        impossible={DeviceId(first): "too_many_models"},
    )
    world.say(event)
    assert rules.outstanding(world.state) == ()
    assert world.state.members[0].condition is Condition.UNRESOLVED
    assert "too_many_models" in world.state.members[0].reason


def test_a_stale_error_and_an_old_report_are_not_held_against_the_release() -> None:
    world = RolloutWorld(devices=1)
    world.change("dev-0", error_code="model.golden")  # of an earlier release
    world.look()
    world.look()
    assert world.state.members[0].condition is Condition.OFFERED


def test_every_profile_is_among_the_first() -> None:
    profiles = {DeviceId(f"d-{n}"): ("jetson" if n % 50 == 0 else "pi4") for n in range(200)}
    ordered = rules_order(profiles)
    assert {profiles[name] for name in ordered[:2]} == {"jetson", "pi4"}
    assert sorted(ordered) == sorted(profiles)
    assert ordered == rules_order(dict(reversed(profiles.items())))


def rules_order(profiles: dict[DeviceId, str]) -> tuple[DeviceId, ...]:
    from cloud_hub.rollouts.planning import order

    return order(profiles, seed="digits/1.1.0")


def test_what_cannot_happen_is_refused() -> None:
    world = RolloutWorld(devices=2)
    with pytest.raises(UnexpectedEvent):
        world.say(ResumeAsked(at_ms=world.at_ms, actor="ann"))
    with pytest.raises(UnexpectedEvent):
        world.say(Started(at_ms=world.at_ms, actor="ann", members=()))


def test_looking_twice_at_the_same_thing_changes_nothing() -> None:
    world = RolloutWorld(devices=10)
    world.run(well, minutes=1)
    world.look()
    before = world.state
    world.look()
    assert world.state is before


def test_the_state_survives_its_bytes() -> None:
    world = RolloutWorld(devices=10)
    world.run(well, minutes=3)
    assert msgspec.json.decode(msgspec.json.encode(world.state), type=Rollout) == world.state
