"""Sets as scripts: what happens to the members, where all of them stand then, and who is blamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from edge_agent.core import offering, sets, slots
from edge_agent.core.health import running_model
from edge_agent.core.slot_bytes import decode_state, encode_state
from edge_agent.core.slot_values import (
    MAX_GATHERING_MS,
    MAX_READY_MS,
    MAX_REFETCHES,
    AnswerBad,
    AnswerGood,
    CollectGarbage,
    Effect,
    Event,
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesVerified,
    HostFailed,
    HostReady,
    NoLongerTrusted,
    OperatorRollback,
    Phase,
    ProbationTimedOut,
    RequestWarmUp,
    RestartDue,
    Restarted,
    Slot,
    StartTimer,
    StopHost,
    SwitchTo,
    Timer,
    WaitOver,
    WarmUpAllowed,
    Withdrawn,
)
from edge_agent.core.variants import Misfit
from shared.ids import FamilyName
from shared.limits import MIB
from shared.profile import MemoryBudget
from tests.machines.set_world import HOST_MIB, ROOMY, Assigned, key, verified
from tests.machines.slot_parts import PROBATION

A, B, C = FamilyName("a"), FamilyName("b"), FamilyName("c")
PAIR, THREE = (("a", "b"),), (("a", "b", "c"),)
FIRST = Assigned({"a": "1.0.0", "b": "1.0.0"}, PAIR)
SECOND = Assigned({"a": "2.0.0", "b": "2.0.0"}, PAIR)


class Device:
    """Slots, and what they wanted done since something was last said."""

    def __init__(self) -> None:
        self.slots: dict[FamilyName, Slot] = {}
        self.effects: list[tuple[FamilyName, Effect]] = []
        self.targets: dict[FamilyName, str | None] = {}
        self.saved: list[set[FamilyName]] = []
        self.version = 0

    def assign(
        self, assigned: Assigned, *, memory: MemoryBudget = ROOMY, misfit: str = "", again: bool = False
    ) -> Device:
        """An assignment is accepted, or offered again."""
        self.version += not again
        document = verified(assigned, version=self.version)
        chosen = {one.manifest.family: one.manifest.variants[0] for one in document.models}
        fits = {family: Misfit("too large") if family == misfit else variant for family, variant in chosen.items()}
        return self._happen(offering.offers(document, fits, self.slots, memory))

    def say(self, family: FamilyName, *events: Event) -> Device:
        """Events of one slot, one after the other."""
        effects: list[tuple[FamilyName, Effect]] = []
        for event in events:
            effects += self._happen([(family, event)]).effects
        self.effects = effects
        return self

    def hear(self, events: Sequence[sets.ForFamily]) -> Device:
        """What has happened at once."""
        self._happen(events)
        return self

    def restart(self) -> Device:
        """The process starts again."""
        return self._happen([(family, Restarted(PROBATION)) for family in self.slots])

    def bring(self, phase: Phase, *names: tuple[FamilyName, str]) -> Device:
        """Bring these candidates as far as this phase, step by step."""
        steps: list[tuple[Phase, Callable[[str], Event]]] = [
            (Phase.VERIFYING, FilesHere),
            (Phase.STAGED, FilesVerified),
            (Phase.WARMUP, WarmUpAllowed),
            (Phase.PROBATION, HostReady),
        ]
        for after, event in steps:
            for family, version in names:
                self.say(family, event(key(family, version)))
            if after is phase:
                return self
        for family, version in names:
            self.say(family, *[AnswerGood(key(family, version))] * PROBATION.good_answers, ProbationTimedOut())
        return self

    def runs(self, assigned: Assigned) -> Device:
        """This assignment is carried out."""
        names = [(FamilyName(family), version) for family, version in assigned.models.items()]
        return self.assign(assigned).bring(Phase.COMMITTED, *names)

    def stand(self, **phases: Phase) -> None:
        """These slots are in these phases."""
        assert {family: self.slots[FamilyName(family)].phase for family in phases} == phases

    def serving(self) -> dict[str, str]:
        """The version that requests go to, of each family."""
        return {
            family: release.manifest.version
            for family, slot in self.slots.items()
            if (release := slots.serving(slot)) is not None and release.key == self.targets.get(family)
        }

    def wants(self, family: FamilyName, effect: Effect) -> bool:
        """Whether this was wanted."""
        return (family, effect) in self.effects

    def _happen(self, events: Sequence[sets.ForFamily]) -> Device:
        before = dict(self.slots)
        for family, _ in events:
            before.setdefault(family, slots.new_slot(family, probation=PROBATION))
        change = sets.decide(before, events)
        self.saved.append(set(change.slots))
        self.slots = before | {family: decode_state(encode_state(slot)) for family, slot in change.slots.items()}
        self.effects = list(change.effects)
        self.targets |= {family: effect.key for family, effect in change.effects if isinstance(effect, SwitchTo)}
        return self


TWO_NAMED = ((A, "2.0.0"), (B, "2.0.0"))
ALL_OLD, ALL_NEW = {"a": "1.0.0", "b": "1.0.0"}, {"a": "2.0.0", "b": "2.0.0"}


def lost(family: FamilyName, version: str) -> HostFailed:
    """The host is gone."""
    return HostFailed(key=key(family, version), code="model.host_lost", message="signal 9", retry=True)


# Forward


def test_hosts_are_loaded_only_once_all_files_are_here() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.STAGED, (A, "2.0.0"))
    device.stand(a=Phase.STAGED, b=Phase.FETCHING)
    assert device.wants(A, StartTimer(Timer.WAIT, MAX_GATHERING_MS))
    device.say(A, WarmUpAllowed(key("a", "2.0.0")))
    device.stand(a=Phase.STAGED)
    device.bring(Phase.STAGED, (B, "2.0.0"))
    assert device.wants(A, RequestWarmUp(key("a", "2.0.0")))
    assert device.wants(B, RequestWarmUp(key("b", "2.0.0")))


def test_a_host_that_is_up_serves_nobody_until_all_are() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.WARMUP, *TWO_NAMED)
    device.say(A, HostReady(key("a", "2.0.0")))
    device.stand(a=Phase.READY, b=Phase.WARMUP)
    assert device.effects[0] == (A, StartTimer(Timer.WAIT, MAX_READY_MS))
    assert not [effect for _, effect in device.effects if isinstance(effect, (SwitchTo, StopHost))]
    assert device.serving() == ALL_OLD
    device.say(B, HostReady(key("b", "2.0.0")))
    device.stand(a=Phase.PROBATION, b=Phase.PROBATION)
    assert device.saved[-1] == {A, B}
    assert device.wants(A, SwitchTo(key("a", "2.0.0")))
    assert device.wants(B, SwitchTo(key("b", "2.0.0")))


def test_all_commit_in_one_step_when_the_last_has_passed() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.PROBATION, *TWO_NAMED)
    device.say(A, *[AnswerGood(key("a", "2.0.0"))] * PROBATION.good_answers, ProbationTimedOut())
    device.stand(a=Phase.PROBATION, b=Phase.PROBATION)
    device.say(A, AnswerBad(key=key("a", "2.0.0"), code="model.run", message="judged on"))
    assert device.slots[A].trial.failed == 1
    device.say(B, *[AnswerGood(key("b", "2.0.0"))] * PROBATION.good_answers, ProbationTimedOut())
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert device.saved[-1] == {A, B}
    assert device.serving() == ALL_NEW


def test_a_member_that_runs_its_release_already_is_ready() -> None:
    device = Device().runs(FIRST).runs(Assigned({"a": "1.0.0", "b": "2.0.0"}, PAIR))
    assert device.serving() == {"a": "1.0.0", "b": "2.0.0"}
    assert not sets.can_roll_back(device.slots, A)
    assert device.say(B, OperatorRollback(), HostReady(key("b", "1.0.0"))).serving() == ALL_OLD


def test_sets_do_not_wait_for_each_other_s_memory() -> None:
    device = Device().assign(Assigned(dict.fromkeys("abcd", "1.0.0"), (("a", "b"), ("c", "d"))))
    device.bring(Phase.STAGED, *[(FamilyName(family), "1.0.0") for family in "abcd"])
    assert all(sets.may_warm_up(device.slots, FamilyName(family)) for family in "abcd")
    device.say(A, WarmUpAllowed(key("a", "1.0.0")), HostReady(key("a", "1.0.0")))
    assert [family for family in "abcd" if sets.may_warm_up(device.slots, FamilyName(family))] == ["a", "b"]


# Back


FAILURES: dict[str, tuple[Phase, Event, bool]] = {
    "fetch": (
        Phase.FETCHING,
        FetchFailed(key=key("b", "2.0.0"), code="transfer.refused", message="404", retry=False),
        False,
    ),
    "disk": (Phase.VERIFYING, FilesBad(key=key("b", "2.0.0"), code="transfer.corrupt", message="another hash"), False),
    "golden check": (
        Phase.WARMUP,
        HostFailed(key=key("b", "2.0.0"), code="model.golden", message="7 of 10", retry=False),
        True,
    ),
    "probation": (Phase.PROBATION, AnswerBad(key=key("b", "2.0.0"), code="model.run", message="cannot"), True),
    "rollback by hand": (Phase.PROBATION, OperatorRollback(), True),
}


@pytest.mark.parametrize("what", FAILURES)
def test_attack_17_partial_bundle_the_second_of_three_fails_and_none_is_switched(what: str) -> None:
    phase, event, is_blamed = FAILURES[what]
    device = Device().runs(Assigned(dict.fromkeys("abc", "1.0.0"), THREE))
    device.assign(Assigned(dict.fromkeys("abc", "2.0.0"), THREE))
    if phase is Phase.WARMUP:
        device.bring(Phase.STAGED, *((name, "2.0.0") for name in (A, B, C)))
        device.say(A, WarmUpAllowed(key("a", "2.0.0")), HostReady(key("a", "2.0.0")))
        device.say(B, WarmUpAllowed(key("b", "2.0.0")))
    elif phase is Phase.PROBATION:
        device.bring(phase, *((name, "2.0.0") for name in (A, B, C)))
        assert device.serving() == dict.fromkeys("abc", "2.0.0")
    else:
        device.bring(Phase.STAGED, (A, "2.0.0"), (C, "2.0.0"))
        if phase is Phase.VERIFYING:
            here = FilesHere(key("b", "2.0.0"))
            device.say(B, *[here, event] * MAX_REFETCHES, here)
    device.stand(b=phase)
    device.say(B, *[event] * (PROBATION.max_failures if isinstance(event, AnswerBad) else 1))
    assert device.saved[-1] == {A, B, C}
    assert device.serving() == dict.fromkeys("abc", "1.0.0")
    for family in (A, B, C):
        device.say(family, HostReady(key(family, "1.0.0")))
    assert {slot.phase for slot in device.slots.values()} == {Phase.COMMITTED}
    assert [family for family, slot in device.slots.items() if slot.quarantine] == ([B] if is_blamed else [])
    told = running_model(device.slots[C], None)
    assert (told.error_code, told.failed) == ("set.member_failed", key("c", "2.0.0"))
    assert told.error.startswith(f"b: {device.slots[B].error_code}: ")


def test_a_host_lost_on_trial_takes_all_back_until_it_is_up_again() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.PROBATION, *TWO_NAMED)
    device.say(B, lost(B, "2.0.0"))
    device.stand(a=Phase.READY, b=Phase.STAGED)
    assert device.serving() == ALL_OLD
    assert device.saved[-1] == {A, B}
    assert device.wants(A, SwitchTo(key("a", "1.0.0")))
    assert not device.wants(A, StopHost(key("a", "2.0.0")))
    device.say(B, WarmUpAllowed(key("b", "2.0.0")), HostReady(key("b", "2.0.0")))
    device.stand(a=Phase.PROBATION, b=Phase.PROBATION)
    device.say(B, lost(B, "2.0.0"), WarmUpAllowed(key("b", "2.0.0")), HostReady(key("b", "2.0.0")))
    device.say(B, lost(B, "2.0.0"))
    assert (device.slots[B].quarantine, device.slots[A].quarantine) == ((key("b", "2.0.0"),), ())
    assert device.serving() == ALL_OLD


def test_a_host_lost_while_it_waits_is_loaded_again_and_not_for_ever() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.STAGED, *TWO_NAMED)
    for _ in range(4):
        device.stand(a=Phase.STAGED)
        device.say(A, WarmUpAllowed(key("a", "2.0.0")), HostReady(key("a", "2.0.0")), lost(A, "2.0.0"))
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert (len(device.slots[A].quarantine), len(device.slots[B].quarantine)) == (1, 0)


@pytest.mark.parametrize("phase", [Phase.STAGED, Phase.READY])
def test_nobody_waits_for_ever(phase: Phase) -> None:
    device = Device().runs(FIRST).assign(SECOND)
    if phase is Phase.STAGED:
        device.bring(phase, (A, "2.0.0"))
    else:
        device.bring(Phase.STAGED, *TWO_NAMED)
        device.say(A, WarmUpAllowed(key("a", "2.0.0")), HostReady(key("a", "2.0.0")))
    device.stand(a=phase)
    device.say(A, WaitOver())
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert {slot.error_code for slot in device.slots.values()} == {"set.timeout"}
    assert not any(slot.quarantine for slot in device.slots.values())
    device.assign(SECOND, again=True).stand(a=Phase.FETCHING, b=Phase.FETCHING)


def test_restarts_while_files_are_awaited_are_no_circle() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.STAGED, (A, "2.0.0"))
    for _ in range(100):
        device.restart()
    device.stand(a=Phase.STAGED, b=Phase.FETCHING)


def test_a_restart_on_trial_begins_with_all_old() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.PROBATION, *TWO_NAMED).restart()
    device.stand(a=Phase.STAGED, b=Phase.STAGED)
    assert device.serving() == ALL_OLD
    assert device.wants(A, RequestWarmUp(key("a", "2.0.0")))


# Afterwards


def test_a_rollback_by_hand_of_one_takes_all_back_and_blames_that_one() -> None:
    device = Device().runs(FIRST).runs(SECOND)
    assert sets.can_roll_back(device.slots, B)
    device.say(B, OperatorRollback())
    device.stand(a=Phase.ROLLING_BACK, b=Phase.ROLLING_BACK)
    assert device.serving() == ALL_OLD
    assert (len(device.slots[A].quarantine), len(device.slots[B].quarantine)) == (0, 1)
    device.say(A, HostReady(key("a", "1.0.0"))).say(B, HostReady(key("b", "1.0.0")))
    device.assign(SECOND, again=True).stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert device.slots[A].error_code == "set.member_failed"


def test_nobody_goes_back_alone_from_what_came_together() -> None:
    device = Device().runs(FIRST).runs(SECOND).runs(Assigned({"a": "2.0.0", "b": "3.0.0"}))
    assert not sets.can_roll_back(device.slots, A)
    assert device.say(A, OperatorRollback()).serving() == {"a": "2.0.0", "b": "3.0.0"}
    assert sets.can_roll_back(device.slots, B)


@pytest.mark.parametrize(
    "event",
    [
        NoLongerTrusted(key=key("b", "2.0.0"), code="trust.rollback", message="below the floor"),
        FilesBad(key=key("b", "2.0.0"), code="transfer.corrupt", message="the disk has changed it"),
    ],
)
def test_attack_35_bit_rot_or_distrust_of_one_takes_all_back_without_quarantine(event: Event) -> None:
    device = Device().runs(FIRST).runs(SECOND).say(B, event)
    assert device.serving() == ALL_OLD
    assert device.saved[-1] == {A, B}
    device.say(A, HostReady(key("a", "1.0.0"))).say(B, HostReady(key("b", "1.0.0")))
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert not any(slot.quarantine for slot in device.slots.values())
    device.assign(SECOND, again=True).stand(a=Phase.FETCHING, b=Phase.FETCHING)


def test_what_cannot_go_back_together_serves_nothing_rather_than_a_mixture() -> None:
    device = Device().runs(FIRST).runs(SECOND).runs(Assigned({"a": "2.0.0", "b": "3.0.0"}))
    device.say(A, NoLongerTrusted(key=key("a", "2.0.0"), code="trust.rollback", message="below the floor"))
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert device.serving() == {"b": "3.0.0"}
    assert not device.wants(A, CollectGarbage())
    assert device.wants(A, StopHost(key("a", "2.0.0")))
    device.say(A, RestartDue())
    assert device.serving() == {"a": "2.0.0", "b": "3.0.0"}


def test_of_a_set_that_cannot_go_back_none_is_served_and_all_keep_their_releases() -> None:
    device = Device().runs(FIRST)
    events, withheld = sets.distrusted(device.slots, {key("b", "1.0.0"): ("trust.signature", "revoked")})
    assert withheld == {key("a", "1.0.0"), key("b", "1.0.0")}
    device.hear(events)
    assert device.serving() == {}
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert device.slots[A].error == "b: trust.signature: revoked"
    assert not device.wants(A, CollectGarbage())
    assert not device.wants(B, CollectGarbage())
    device.assign(FIRST, again=True)
    assert [slot.error_code for slot in device.slots.values()] == ["", ""]


def test_of_a_set_one_of_which_has_lost_what_was_before_it_none_goes_back_alone() -> None:
    device = Device().runs(FIRST).runs(SECOND)
    reason = ("trust.signature", "revoked")
    events, withheld = sets.distrusted(device.slots, {key("b", "1.0.0"): reason, key("a", "2.0.0"): reason})
    assert key("b", "2.0.0") in withheld
    device.hear(events)
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert device.serving() == {}


def test_of_a_set_that_can_go_back_all_do() -> None:
    device = Device().runs(FIRST).runs(SECOND)
    events, _ = sets.distrusted(device.slots, {key("b", "2.0.0"): ("trust.signature", "revoked")})
    device.hear(events)
    device.stand(a=Phase.ROLLING_BACK, b=Phase.ROLLING_BACK)
    assert device.serving() == ALL_OLD
    assert device.slots[B].error_code == "trust.signature"


# Assignments


def test_a_set_that_memory_does_not_hold_is_refused_before_it_is_fetched() -> None:
    device = Device().runs(FIRST)
    just = offering.AGENT_BYTES + 4 * HOST_MIB * MIB
    device.assign(SECOND, memory=MemoryBudget(host_bytes=HOST_MIB * MIB, total_bytes=just - 1))
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert {slot.error_code for slot in device.slots.values()} == {"set.no_room"}
    device.assign(SECOND, memory=MemoryBudget(host_bytes=HOST_MIB * MIB, total_bytes=just))
    device.stand(a=Phase.FETCHING, b=Phase.FETCHING)


def test_a_member_that_does_not_fit_the_device_keeps_the_others_out() -> None:
    device = Device().runs(FIRST).assign(SECOND, misfit="b")
    device.stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert device.slots[A].error == "b: release.misfit: too large"


def test_force_lifts_the_quarantine_of_the_family_that_it_names() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.STAGED, *TWO_NAMED)
    device.say(B, WarmUpAllowed(key("b", "2.0.0")))
    device.say(B, HostFailed(key=key("b", "2.0.0"), code="model.golden", message="7 of 10", retry=False))
    device.assign(SECOND).stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    assert device.slots[B].error_code == "model.golden"
    device.assign(Assigned(SECOND.models, PAIR, force=("a",))).stand(a=Phase.COMMITTED, b=Phase.COMMITTED)
    device.assign(Assigned(SECOND.models, PAIR, force=("b",))).stand(a=Phase.FETCHING, b=Phase.FETCHING)


@pytest.mark.parametrize("phase", [Phase.STAGED, Phase.PROBATION])
def test_a_set_that_is_dissolved_goes_on_one_by_one(phase: Phase) -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(phase, *TWO_NAMED)
    device.assign(Assigned(SECOND.models)).stand(a=Phase.STAGED, b=Phase.STAGED)
    device.say(A, WarmUpAllowed(key("a", "2.0.0")), HostReady(key("a", "2.0.0")))
    device.stand(a=Phase.PROBATION, b=Phase.STAGED)


def test_what_is_on_trial_alone_begins_again_when_it_is_to_change_with_another() -> None:
    device = Device().runs(FIRST).assign(Assigned({"a": "2.0.0", "b": "1.0.0"})).bring(Phase.PROBATION, (A, "2.0.0"))
    device.assign(SECOND).stand(a=Phase.STAGED, b=Phase.FETCHING)
    assert device.serving() == ALL_OLD


def test_a_member_that_is_withdrawn_ends_the_set() -> None:
    device = Device().runs(FIRST).assign(SECOND).bring(Phase.PROBATION, *TWO_NAMED).say(B, Withdrawn())
    assert device.slots[A].error == "b: release.superseded: it is not on its way any more"
    assert device.serving() == {"a": "1.0.0"}


def test_a_release_that_is_no_longer_trusted_stops_serving_in_every_phase() -> None:
    gone = NoLongerTrusted(key=key("a", "2.0.0"), code="trust.rollback", message="below the floor")
    for phase in (Phase.VERIFYING, Phase.STAGED, Phase.WARMUP, Phase.PROBATION, Phase.COMMITTED):
        device = Device().runs(Assigned({"a": "1.0.0"})).assign(Assigned({"a": "2.0.0"}))
        device.bring(phase, (A, "2.0.0")).say(A, gone)
        assert device.serving() == {"a": "1.0.0"}, phase
        assert device.slots[A].error_code == "trust.rollback"
        assert not device.slots[A].quarantine
    only = Device().runs(Assigned({"a": "2.0.0"})).say(A, gone)
    only.stand(a=Phase.COMMITTED)
    assert only.wants(A, SwitchTo(None))
    assert only.wants(A, StopHost(key("a", "2.0.0")))
    assert not only.wants(A, CollectGarbage())
    during = Device().runs(Assigned({"a": "2.0.0"})).assign(Assigned({"a": "3.0.0"})).say(A, gone)
    during.stand(a=Phase.FETCHING)
    assert during.serving() == {}
