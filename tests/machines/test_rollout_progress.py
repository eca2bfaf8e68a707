"""How a rollout goes through its stages when devices come, go, die late and do not get there."""

from __future__ import annotations

import pytest

from cloud_hub.rollouts import planning, rules
from cloud_hub.rollouts.planning import order
from cloud_hub.rollouts.progress import HEARD_WITHIN_MS
from cloud_hub.rollouts.values import AbortAsked, Member, ResumeAsked
from shared.ids import DeviceId
from shared.rollout import Condition, Phase, StagePhase, Verdict, Wish
from tests.machines.rollout_world import MANIFEST, MINUTE_MS, NEW, OLD, RolloutWorld, answers, idles, refuses, well


def restart(world: RolloutWorld) -> None:
    """The hub starts anew: it knows of nobody that is here, and listens from now on."""
    for name in list(world.fleet):
        world.change(name, online=False)
    world.watching_since_ms = world.at_ms


def everybody_is_back(world: RolloutWorld) -> None:
    for name in list(world.fleet):
        world.change(name, online=True, last_seen_ms=world.at_ms)


def wanting(world: RolloutWorld) -> list[Member]:
    return [member for member in world.state.members if member.wish is Wish.TARGET]


def test_a_hub_that_has_just_started_hands_nothing_out_to_devices_that_it_has_not_seen() -> None:
    world = RolloutWorld(devices=100, spec_fields={"stages": [1, 5, "100%"]})
    world.run(well, minutes=11)
    restart(world)
    world.run(well, minutes=60)
    assert len(wanting(world)) == 1
    assert world.is_in(Phase.RUNNING)
    assert "waits for devices" in world.state.reason
    everybody_is_back(world)
    world.run(well, minutes=90, until=lambda: world.is_in(Phase.COMPLETED))
    assert world.is_in(Phase.COMPLETED)
    conditions = [member.condition for member in world.state.members]
    assert conditions == [Condition.HARMED] + 99 * [Condition.HEALTHY]  # the canary was away for too long
    assert world.kinds().count("waits") <= 2


def test_a_stage_does_not_settle_on_the_devices_of_an_earlier_one() -> None:
    world = RolloutWorld(devices=20, spec_fields={"stages": [2, "100%"]})
    first = {member.device for member in world.state.members[:2]}
    for name in list(world.fleet):
        world.change(name, online=name in first)
    world.run(well, minutes=60)
    assert world.state.stage is not None
    assert (world.state.stage.index, world.state.stage.phase) == (1, StagePhase.APPLYING)
    assert len(wanting(world)) == 2


def test_nobody_is_offered_anything_before_the_fleet_had_time_to_be_heard() -> None:
    world = RolloutWorld(devices=10)
    world.at_ms += MINUTE_MS
    restart(world)
    there, absent = world.state.members[1].device, world.state.members[0].device
    world.change(there, online=True, last_seen_ms=world.at_ms)
    world.at_ms += HEARD_WITHIN_MS - 1
    world.look()
    assert world.touched() == []
    # The last one is heard: nothing is left to wait for.
    for name in list(world.fleet):
        if name != absent:
            world.change(name, online=True, last_seen_ms=world.at_ms)
    world.look()
    assert world.touched() == []
    world.change(absent, online=True, last_seen_ms=world.at_ms)
    world.look()
    assert world.touched() == [absent]


def test_when_many_were_not_reached_it_stays_open_and_watches_them_when_they_come() -> None:
    world = RolloutWorld(devices=20)
    late = {member.device for member in world.state.members[5:]}
    for name in late:
        world.change(name, online=False)
    world.run(well, minutes=120)
    assert world.is_in(Phase.RUNNING)
    assert len(wanting(world)) == 5
    for name in late:
        world.change(name, online=True, last_seen_ms=world.at_ms)
    world.run(refuses, minutes=4)
    assert world.is_in(Phase.ROLLED_BACK)
    assert {sighting.version for sighting in world.fleet.values()} == {OLD}


def test_it_never_goes_out_to_more_than_a_tenth_unwatched() -> None:
    world = RolloutWorld(devices=40, spec_fields={"max_harmed": 0})
    away = [member.device for member in world.state.members[36:]]
    for name in away:
        world.change(name, online=False)
    world.run(well, minutes=200)
    assert world.is_in(Phase.RUNNING)
    assert "4 were not reached, at most 3" in world.state.reason
    world.change(away[0], online=True, last_seen_ms=world.at_ms)
    world.run(well, minutes=60, until=lambda: world.is_in(Phase.COMPLETED))
    assert world.is_in(Phase.COMPLETED)
    unwatched = [member for member in wanting(world) if member.condition is Condition.WAITING]
    assert [member.device for member in unwatched] == away[1:]


def test_a_device_that_was_healthy_and_dies_is_harmed() -> None:
    world = RolloutWorld(devices=20, spec_fields={"max_harmed": 0, "soak_s": 3600})
    world.run(well, minutes=3)
    (first,) = world.touched()
    assert world.state.members[0].condition is Condition.HEALTHY
    world.change(first, online=False)
    world.run(well, minutes=9)
    assert world.is_in(Phase.RUNNING)
    world.run(well, minutes=3)
    assert world.is_in(Phase.ROLLED_BACK) or world.is_in(Phase.ROLLING_BACK)
    assert "silent" in world.state.members[0].reason


def test_a_hub_that_was_away_does_not_call_healthy_devices_dead_or_late() -> None:
    world = RolloutWorld(devices=20, spec_fields={"max_harmed": 0, "max_unresolved": 0, "stages": [2, "100%"]})
    slow = world.state.members[1].device
    world.run(lambda w, n: (idles if n == slow else well)(w, n), minutes=3)
    world.at_ms += 60 * MINUTE_MS
    restart(world)
    world.run(well, minutes=5)
    everybody_is_back(world)
    world.run(well, minutes=3)
    assert world.is_in(Phase.RUNNING)
    assert [member.condition for member in world.state.members[:2]] == [Condition.HEALTHY, Condition.OFFERED]


def test_a_stage_is_not_left_while_its_devices_are_gone() -> None:
    world = RolloutWorld(devices=20, spec_fields={"deadline_s": 3600})
    world.run(well, minutes=3)
    (first,) = world.touched()
    world.change(first, online=False)
    world.run(well, minutes=30)
    assert world.touched() == [first]
    world.change(first, online=True, last_seen_ms=world.at_ms)
    world.run(well, minutes=2)
    assert len(world.touched()) == 5


def test_a_canary_that_ran_nothing_is_no_reason_to_compare_nothing() -> None:
    world = RolloutWorld(devices=10)
    bare = world.state.members[0].device
    del world.old[bare]
    world.change(bare, version="", manifest="", phase="")
    world.run(well, minutes=2)
    assert world.touched() == [bare]
    gates = {reading.gate: reading for reading in world.state.readings}
    assert gates["outcomes"].figures["right"] > 0
    assert gates["latency"].figures["compared"] == 1


def test_before_anybody_was_offered_it_no_gate_says_pass() -> None:
    world = RolloutWorld(devices=3)
    for name in list(world.fleet):
        world.change(name, version="", manifest="", phase="", online=False)
    world.look()
    assert {reading.verdict for reading in world.state.readings} == {Verdict.WAIT}


def test_devices_that_run_nothing_come_last() -> None:
    names = [DeviceId(f"d-{number}") for number in range(20)]
    without = frozenset(names[:15])
    ordered = order(dict.fromkeys(names, "pi4"), seed="digits/1.1.0", without=without)
    assert set(ordered[:5]) == set(names[15:])
    assert sorted(ordered) == sorted(names)


def test_harm_that_shows_sooner_than_health_is_not_read_as_a_share() -> None:
    fields = {"stages": [100, "100%"], "max_harmed": 10, "soak_s": 0}
    world = RolloutWorld(devices=200, spec_fields=fields)
    failing = {world.state.members[number].device for number in (40, 60, 80, 95)}

    def soon(inner: RolloutWorld, name: DeviceId) -> None:
        if name in failing:
            refuses(inner, name)
        else:
            inner.runs(name, NEW)

    world.run(soon, minutes=2)  # four have failed; the others run it and were asked nothing yet
    (reading,) = [one for one in world.state.readings if one.gate == "devices"]
    assert (reading.figures["harmed"], reading.figures["harmed_in_order"]) == (4, 0)
    assert world.is_in(Phase.RUNNING)
    for name in world.touched():
        if name not in failing:
            well(world, DeviceId(name))
    world.look()
    (reading,) = [one for one in world.state.readings if one.gate == "devices"]
    assert (reading.figures["harmed_in_order"], reading.verdict) == (4, Verdict.PASS)


def test_harm_beyond_the_limit_does_not_wait_for_its_turn() -> None:
    world = RolloutWorld(devices=200, spec_fields={"stages": [100, "100%"], "max_harmed": 3})
    failing = {world.state.members[number].device for number in (40, 60, 80, 95)}
    world.run(lambda w, n: refuses(w, n) if n in failing else w.runs(n, NEW), minutes=2)
    assert world.is_in(Phase.ROLLING_BACK) or world.is_in(Phase.ROLLED_BACK)


def test_an_unresolved_canary_is_followed_by_another_device() -> None:
    world = RolloutWorld(devices=20)  # one unresolved device is borne
    first = world.state.members[0].device
    world.run(
        lambda w, n: (idles if n == first else well)(w, n), minutes=60, until=lambda: world.is_in(Phase.COMPLETED)
    )
    assert len(world.touched()) > 1
    assert world.state.members[0].condition is Condition.UNRESOLVED


def test_when_nobody_is_left_to_be_offered_it_pauses_and_says_so() -> None:
    world = RolloutWorld(devices=1)
    world.run(idles, minutes=15)
    assert world.is_in(Phase.PAUSED)
    assert "none is left" in world.state.reason
    assert "1 unresolved" in world.state.reason
    world.say(ResumeAsked(at_ms=world.at_ms, actor="ann"))
    world.run(idles, minutes=2)
    assert world.is_in(Phase.PAUSED)
    assert "none is left" in world.state.reason
    well(world, DeviceId("dev-0"))
    world.say(ResumeAsked(at_ms=world.at_ms, actor="ann"))
    world.run(well, minutes=30, until=lambda: world.is_in(Phase.COMPLETED))
    assert world.is_in(Phase.COMPLETED)


@pytest.mark.parametrize("online", [True, False])
def test_an_abort_that_keeps_hands_nothing_out_any_more(online: bool) -> None:
    world = RolloutWorld(devices=20)
    world.run(well, minutes=3)
    kept = list(wanting(world))
    # The stage's next devices are wanted to run it and have no assignment yet: the hub ends an abort between the two.
    world.at_ms += 20 * MINUTE_MS
    assign, world.assign = world.assign, lambda: None  # type: ignore[method-assign]
    world.look()
    assert len(rules.outstanding(world.state)) == 4
    world.say(AbortAsked(at_ms=world.at_ms, actor="ann", reverting=False))
    assign()
    assert len(wanting(world)) == len(kept) == len(world.assignments)
    for name in list(world.fleet):
        world.change(name, online=online)
    world.look()
    assert world.is_in(Phase.ABORTED)


def test_what_is_expected_of_a_device_is_made_once() -> None:
    world = RolloutWorld(devices=10, spec_fields={"stages": [2, "100%"]})
    world.run(well, minutes=2)
    before = world.state.members[0].expected
    assert before is not None
    for name in world.old:
        world.old[name] = world.new[DeviceId(world.touched()[0])]
    world.run(well, minutes=3)
    assert world.state.members[0].expected == before


def test_the_failure_of_another_release_is_not_held_against_this_one() -> None:
    world = RolloutWorld(devices=4, spec_fields={"max_harmed": 0})
    # The device has the assignment and cannot try it yet; what it tells is what an earlier release came to.
    world.run(lambda w, n: w.change(n, error_code="model.golden", failed="9" * 64), minutes=3)
    assert [member.condition for member in world.state.members][:1] == [Condition.OFFERED]
    world.change(world.touched()[0], failed=MANIFEST[NEW])
    world.look()
    assert [member.condition for member in world.state.members][:1] == [Condition.HARMED]


def test_a_stage_whose_devices_have_said_all_they_can_grows_by_one() -> None:
    """Each device was asked 40 times before; now 6.5 % are wrong: too little for one device, whatever it is asked."""

    def somewhat_worse(inner: RolloutWorld, name: DeviceId) -> None:
        inner.runs(name, NEW)
        inner.new[name] = answers(right=935, wrong=65)

    world = RolloutWorld(devices=20, spec_fields={"stages": [1, 4, "100%"]})
    for name in world.old:
        world.old[name] = answers(right=39, wrong=1)
    world.run(somewhat_worse, minutes=11)
    assert len(world.touched()) == 1
    world.run(somewhat_worse, minutes=120, until=lambda: world.is_in(Phase.ROLLED_BACK))
    assert world.is_in(Phase.ROLLED_BACK)
    assert 1 < len(world.touched()) <= 4
    assert world.state.reason.startswith("outcomes")


def test_a_stage_that_cannot_grow_says_so() -> None:
    world = RolloutWorld(devices=3, spec_fields={"stages": [1, "100%"]})
    for name in world.old:
        world.old[name] = answers(right=38, wrong=2)

    def middling(inner: RolloutWorld, name: DeviceId) -> None:
        inner.runs(name, NEW)
        inner.new[name] = answers(right=920, wrong=80)
        for other in inner.fleet:
            if other != name and not inner.new.get(other):
                inner.change(other, online=False)

    world.run(middling, minutes=40)
    assert world.is_in(Phase.RUNNING)
    assert "the gates are undecided" in world.state.reason


@pytest.mark.parametrize("standing", ["quarantined", "revoked"])
def test_who_is_not_welcome_is_left_out_of_a_plan_and_offered_nothing(standing: str) -> None:
    world = RolloutWorld(devices=4, spec_fields={"stages": ["100%"]})
    barred = world.state.members[-1].device
    world.change(barred, standing=standing)
    chosen = planning.choose(world.fleet, world.state.spec, manifest=MANIFEST[NEW], taken={})
    assert barred not in chosen.eligible
    assert [(one.device, one.reason) for one in chosen.skipped] == [(barred, standing)]
    world.run(well, minutes=11)
    assert barred not in {member.device for member in wanting(world)}
    assert len(wanting(world)) == 3


def test_a_device_that_was_offered_it_and_is_quarantined_is_harmed() -> None:
    world = RolloutWorld(devices=4, spec_fields={"stages": ["100%"]})
    world.run(idles, minutes=1)
    barred = wanting(world)[0].device
    world.change(barred, standing="quarantined")
    world.look()
    member = next(one for one in world.state.members if one.device == barred)
    assert (member.condition, member.reason) == (Condition.HARMED, "it was quarantined")
