"""The steps of a set and the moves that they are made of, each by itself: late words change nothing."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_agent.core import set_steps, slot_moves
from edge_agent.core.slot_values import (
    MAX_LOADS,
    CommitAllowed,
    Gathered,
    Member,
    Phase,
    SetFailed,
    Slot,
    SteppedBack,
    SwitchAllowed,
    Trial,
    WaitOver,
)
from tests.machines.slot_parts import FAMILY, empty_slot, installed

OTHER = "0" * 64
CANDIDATE = installed("2.0.0", at=2)


def standing(phase: Phase, **changes: object) -> Slot:
    """A member of a set in this phase."""
    together = (Member(family=FAMILY, manifest=CANDIDATE.manifest_digest),)
    slot = replace(empty_slot(), phase=phase, active=installed("1.0.0", at=1), candidate=CANDIDATE, together=together)
    return replace(slot, **changes)


def test_words_about_another_candidate_change_nothing() -> None:
    failed = SetFailed(key=OTHER, code="set.member_failed", message="")
    trial = standing(Phase.PROBATION, trial=Trial(passed=True))
    assert set_steps.gathered(standing(Phase.STAGED), Gathered(OTHER)).effects == ()
    assert set_steps.switch_allowed(standing(Phase.READY), SwitchAllowed(OTHER)).effects == ()
    assert set_steps.stepped_back(trial, SteppedBack(OTHER)).state is trial
    assert set_steps.commit_allowed(trial, CommitAllowed(key=OTHER, changed=())).state is trial
    assert set_steps.set_failed(trial, failed).state is trial


def test_nobody_commits_who_has_not_passed() -> None:
    trial = standing(Phase.PROBATION)
    assert set_steps.commit_allowed(trial, CommitAllowed(key=CANDIDATE.key, changed=(FAMILY,))).state is trial


def test_whoever_was_gathered_does_not_wait_in_staged() -> None:
    slot = standing(Phase.STAGED, is_gathered=True)
    assert set_steps.wait_over(slot, WaitOver()).state is slot


@pytest.mark.parametrize(("tries", "by_count", "blamed"), [(MAX_LOADS, True, 1), (1, True, 0), (MAX_LOADS, False, 0)])
def test_only_loads_that_are_used_up_in_the_same_way_are_held_against_another(
    tries: int, by_count: bool, blamed: int
) -> None:
    event = SetFailed(key=CANDIDATE.key, code="set.member_failed", message="", by_count=by_count)
    after = set_steps.set_failed(standing(Phase.STAGED, tries=tries), event).state
    assert (after.phase, len(after.quarantine)) == (Phase.COMMITTED, blamed)


def test_what_is_given_up_goes_without_a_trace_but_its_blame() -> None:
    after = slot_moves.give_up(standing(Phase.READY, tries=2), "model.golden", "7 of 10").state
    assert (after.candidate, after.together, after.tries) == (None, (), 0)
    assert (after.quarantine, after.failed) == ((CANDIDATE.key,), CANDIDATE.key)
