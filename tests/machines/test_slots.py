"""The slot machine as scripts: what is said to it, where it stands then, and what it wants done."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from edge_agent.core import slots
from edge_agent.core.health import running_model
from edge_agent.core.slot_steps import CRASH_LOOP_CODE
from edge_agent.core.slot_values import (
    CRASH_LOOP,
    MAX_EXTENSIONS,
    MAX_FETCH_DELAY_MS,
    MAX_REFETCHES,
    MAX_ROLLBACK_STARTS,
    MAX_TRANSITIONS,
    MIN_FETCH_DELAY_MS,
    AnswerBad,
    AnswerGood,
    CancelWork,
    CollectGarbage,
    Event,
    Fetch,
    FetchDue,
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesVerified,
    HostFailed,
    HostReady,
    OperatorRollback,
    Phase,
    ProbationTimedOut,
    Probe,
    Report,
    RequestWarmUp,
    RestartDue,
    Restarted,
    StartHost,
    StartTimer,
    StopHost,
    Stopping,
    SwitchTo,
    Timer,
    VerifyFiles,
    WarmUpAllowed,
    WarmUpDue,
    Withdrawn,
)
from shared.ids import Digest
from shared.release import Patch
from tests.machines.slot_parts import PROBATION, file, installed, key, offer
from tests.machines.slot_script import Script, committed, host_lost, on_probation

V1, V2, V3 = key("1.0.0"), key("2.0.0"), key("3.0.0")


# Coming in


def test_orderly_restarts_are_not_held_against_what_is_on_trial() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2))
    for _ in range(MAX_TRANSITIONS):
        script.say(Stopping(), Restarted(PROBATION))
        script.stands(Phase.STAGED)
        script.say(WarmUpAllowed(V2), *on_probation("2.0.0", at=2)[-1:])
        script.stands(Phase.PROBATION)
    assert script.slot.quarantine == ()
    assert script.slot.tries == 1


def test_crashes_between_orderly_restarts_still_count() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2))
    for _ in range(4):
        script.say(Stopping(), Restarted(PROBATION), WarmUpAllowed(V2), *on_probation("2.0.0", at=2)[-1:])
        script.say(Restarted(PROBATION), WarmUpAllowed(V2))
        if script.slot.phase is Phase.WARMUP:
            script.say(*on_probation("2.0.0", at=2)[-1:])
    assert script.slot.quarantine == (V2,)


def test_a_first_release_goes_through_every_phase() -> None:
    script = Script()
    script.say(offer("1.0.0", at=1))
    script.stands(Phase.FETCHING)
    files = (file("1.0.0", "int8.onnx"), file("1.0.0", "golden.bin"))
    script.wants(Fetch(V1, files), Report())
    script.say(FilesHere(V1))
    script.stands(Phase.VERIFYING)
    script.wants(VerifyFiles(V1, files))
    script.say(FilesVerified(V1))
    script.stands(Phase.STAGED)
    script.wants(RequestWarmUp(V1))
    script.say(WarmUpAllowed(V1))
    script.stands(Phase.WARMUP)
    assert script.slot.tries == 1
    script.wants(StartHost(installed("1.0.0", at=1)))
    script.wants_no(SwitchTo)
    script.say(HostReady(V1))
    script.stands(Phase.PROBATION)
    script.wants(SwitchTo(V1), StartTimer(Timer.PROBATION, PROBATION.duration_ms))
    script.say(AnswerGood(V1), AnswerGood(V1), ProbationTimedOut())
    script.stands(Phase.COMMITTED)
    assert script.slot.active == installed("1.0.0", at=1)
    assert script.notes == ["release.committed"]
    script.wants(CollectGarbage(), Report())


def test_the_active_release_serves_until_the_switch_and_its_host_goes_after() -> None:
    script = Script().say(*committed("1.0.0", at=1))
    before_the_switch = on_probation("2.0.0", at=2)[:-1]
    script.say(*before_the_switch)
    assert slots.serving(script.slot) == installed("1.0.0", at=1)
    script.wants_no(SwitchTo, StopHost)
    script.say(HostReady(V2))
    script.wants(SwitchTo(V2), StopHost(V1))
    assert slots.serving(script.slot) == installed("2.0.0", at=2)


def test_the_same_release_again_changes_only_the_assignment_version() -> None:
    script = Script().say(*committed("1.0.0", at=1))
    script.say(offer("1.0.0", at=5))
    assert script.effects == []
    assert script.slot.active == installed("1.0.0", at=5)
    before = script.slot
    assert slots.decide(before, offer("1.0.0", at=5)).state is before


@pytest.mark.parametrize("steps", range(1, 6))
def test_the_candidate_offered_again_goes_on(steps: int) -> None:
    script = Script().say(*on_probation("1.0.0", at=1)[:steps])
    phase = script.slot.phase
    script.say(offer("1.0.0", at=1))
    assert (script.slot.phase, script.effects) == (phase, [])


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_newer_offer_supersedes_without_blame(steps: int) -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2)[:steps])
    script.say(offer("3.0.0", at=3))
    script.stands(Phase.FETCHING)
    assert script.slot.candidate == installed("3.0.0", at=3)
    assert script.slot.quarantine == ()
    assert script.notes == ["release.superseded"]
    script.wants(CancelWork(V2), StopHost(V2), Fetch(V3, installed("3.0.0", at=3).files))
    if steps == 5:
        script.wants(SwitchTo(V1), StartHost(installed("1.0.0", at=1)), StopHost(V2))


def test_the_active_release_offered_again_ends_the_candidate() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2))
    script.say(offer("1.0.0", at=3))
    script.stands(Phase.COMMITTED)
    assert script.slot.active == installed("1.0.0", at=3)
    script.wants(SwitchTo(V1), StartHost(installed("1.0.0", at=1)), StopHost(V2))


def test_what_the_trust_rules_have_accepted_is_the_newest_whatever_its_version() -> None:
    """New assignment keys count their versions anew; a thief's may have been as high as numbers go."""
    script = Script().say(*committed("2.0.0", at=2**53 - 2))
    script.say(*committed("1.0.0", at=1))
    script.stands(Phase.COMMITTED)
    assert slots.serving(script.slot) == installed("1.0.0", at=1)


# Fetching


def test_a_fetch_without_a_link_is_tried_again_for_ever_and_ever_more_slowly() -> None:
    script = Script().say(offer("1.0.0", at=1))
    delays = []
    for _ in range(100):
        script.say(FetchFailed(key=V1, code="transfer.unreachable", message="no route", retry=True))
        delays += [effect.delay_ms for effect in script.effects if isinstance(effect, StartTimer)]
        script.say(FetchDue())
        script.wants(Fetch(V1, installed("1.0.0", at=1).files))
    assert delays[:4] == [1_000, 2_000, 4_000, 8_000]
    assert max(delays) == delays[-1] == MAX_FETCH_DELAY_MS
    script.stands(Phase.FETCHING)
    assert script.slot.error_code == "transfer.unreachable"
    script.say(FilesHere(V1))
    script.stands(Phase.VERIFYING)


def test_restarts_while_fetching_do_not_use_up_the_release() -> None:
    script = Script().say(offer("1.0.0", at=1), *[Restarted(PROBATION)] * (MAX_TRANSITIONS * 2))
    script.stands(Phase.FETCHING)


def test_what_the_hub_does_not_have_ends_without_quarantine() -> None:
    script = Script().say(*committed("1.0.0", at=1), offer("2.0.0", at=2))
    script.say(FetchFailed(key=V2, code="transfer.refused", message="404", retry=False))
    script.stands(Phase.COMMITTED)
    assert script.slot.quarantine == ()
    assert script.slot.error_code == "transfer.refused"
    assert script.notes == ["release.failed"]
    script.say(offer("2.0.0", at=2))
    script.stands(Phase.FETCHING)


def test_answers_of_work_that_was_given_up_are_ignored() -> None:
    script = Script().say(*committed("1.0.0", at=1), offer("2.0.0", at=2), offer("3.0.0", at=3))
    slot = script.slot
    late: list[Event] = [
        FilesHere(V2),
        FetchFailed(key=V2, code="transfer.refused", message="404", retry=False),
        FilesVerified(V2),
        FilesBad(key=V2, code="trust.digest", message=""),
        WarmUpAllowed(V2),
        host_lost(V2),
        AnswerGood(V2),
        AnswerBad(key=V2, code="model", message=""),
        ProbationTimedOut(),
        WarmUpDue(),
    ]
    script.say(*late)
    assert (script.slot, script.effects) == (slot, [])
    script.say(HostReady(V2))
    assert script.effects == [StopHost(V2)]


# Failing


@pytest.mark.parametrize("phase", [Phase.VERIFYING, Phase.WARMUP])
def test_files_that_the_disk_changes_are_fetched_again_and_then_given_up_without_blame(phase: Phase) -> None:
    script = Script().say(*committed("1.0.0", at=1), offer("2.0.0", at=2))
    for times in range(MAX_REFETCHES + 1):
        assert script.slot.refetches == times
        script.say(FilesHere(V2))
        if phase is Phase.WARMUP:
            script.say(FilesVerified(V2), WarmUpAllowed(V2))
        script.stands(phase)
        script.say(FilesBad(key=V2, code="transfer.corrupt", message="another hash"))
        if times < MAX_REFETCHES:
            script.stands(Phase.FETCHING)
            script.wants(CancelWork(V2), Fetch(V2, installed("2.0.0", at=2).files))
    script.stands(Phase.COMMITTED)
    assert (script.slot.quarantine, script.slot.error_code) == ((), "storage.damaged")
    assert script.notes == ["release.failed"]
    script.say(offer("2.0.0", at=2))
    assert (script.slot.phase, script.slot.refetches) == (Phase.FETCHING, 0)


def test_patches_come_with_the_fetch_and_are_kept_with_what_they_start_from() -> None:
    model, base = installed("2.0.0", at=2).served.file, Digest("b" * 64)
    patch = Patch(base=base, result=model.digest, digest=Digest("c" * 64), length=10)
    script = Script().say(*committed("1.0.0", at=1), replace(offer("2.0.0", at=2), patches=(patch,)))
    script.wants(Fetch(V2, installed("2.0.0", at=2).files, (patch,)))
    running = {file.digest for file in installed("1.0.0", at=1).files}
    coming = {file.digest for file in installed("2.0.0", at=2).files}
    assert slots.files_to_keep([script.slot]) == {*running, *coming, base, patch.digest}
    script.say(*on_probation("2.0.0", at=2)[1:], *[AnswerGood(V2)] * PROBATION.good_answers, ProbationTimedOut())
    script.stands(Phase.COMMITTED)
    assert slots.files_to_keep([script.slot]) == {*running, *coming}


def test_devices_that_fail_together_do_not_try_again_together() -> None:
    delays = set()
    for jitter in (0.0, 0.25, 1.0):
        script = Script().say(offer("1.0.0", at=1))
        for _ in range(5):
            script.say(
                FetchFailed(key=V1, code="transfer.unreachable", message="503", retry=True, jitter=jitter), FetchDue()
            )
        script.say(FetchFailed(key=V1, code="transfer.unreachable", message="503", retry=True, jitter=jitter))
        delays |= {effect.delay_ms for effect in script.effects if isinstance(effect, StartTimer)}
    assert delays == {MIN_FETCH_DELAY_MS, 8_000, 32_000}


def test_a_failed_golden_check_is_not_tried_twice() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2)[:-1])
    script.say(HostFailed(key=V2, code="model.golden", message="7 of 10", retry=False))
    script.stands(Phase.COMMITTED)
    assert script.slot.quarantine == (V2,)
    assert (script.slot.error_code, script.slot.error) == ("model.golden", "7 of 10")
    script.wants(StopHost(V2))
    script.wants_no(SwitchTo)


def test_an_error_names_the_release_that_it_is_of() -> None:
    script = Script().say(*committed("1.0.0", at=1))
    for _ in range(CRASH_LOOP):
        script.say(HostFailed(key=V1, code="host.exited", message="gone", retry=True))
    assert script.slot.failed == V1
    script.say(*on_probation("2.0.0", at=2)[:-1])
    script.say(HostFailed(key=V2, code="model.golden", message="7 of 10", retry=False))
    assert script.slot.failed == V2
    script.say(*committed("3.0.0", at=3))
    assert (script.slot.error_code, script.slot.failed) == ("", "")
    script.say(offer("2.0.0", at=4))
    assert (script.slot.error_code, script.slot.failed) == ("release.quarantined", V2)
    assert running_model(script.slot, None).failed == V2


def test_a_quarantined_release_is_refused_once_per_assignment_unless_forced() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2)[:-1])
    script.say(HostFailed(key=V2, code="model.golden", message="7 of 10", retry=False))
    script.say(offer("2.0.0", at=3))
    assert script.notes == ["release.refused"]
    script.stands(Phase.COMMITTED)
    assert script.slot.error_code == "model.golden"
    script.say(offer("2.0.0", at=3))
    assert script.notes == []
    script.say(offer("2.0.0", at=4, force=True))
    script.stands(Phase.FETCHING)
    assert script.slot.quarantine == ()


def test_a_host_that_is_lost_while_loading_is_tried_four_times() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2)[:-1])
    for delay_ms in (1_000, 2_000, 4_000):
        script.say(host_lost(V2))
        script.stands(Phase.STAGED)
        script.wants(StartTimer(Timer.WARM_UP, delay_ms))
        script.say(WarmUpDue())
        script.wants(RequestWarmUp(V2))
        script.say(WarmUpAllowed(V2))
    script.say(host_lost(V2))
    script.stands(Phase.COMMITTED)
    assert script.slot.quarantine == (V2,)


# Probation


def test_probation_without_answers_asks_for_probes_then_commits() -> None:
    script = Script().say(*on_probation("1.0.0", at=1), AnswerGood(V1))
    script.say(ProbationTimedOut())
    script.stands(Phase.PROBATION)
    script.wants(Probe(V1, 1), StartTimer(Timer.PROBATION, 2_000))
    script.say(AnswerGood(V1), ProbationTimedOut())
    script.stands(Phase.COMMITTED)


def test_probation_without_answers_ends_in_the_end() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2))
    script.say(*[ProbationTimedOut()] * MAX_EXTENSIONS)
    script.stands(Phase.PROBATION)
    script.say(ProbationTimedOut())
    script.stands(Phase.ROLLING_BACK)
    assert script.slot.error_code == "release.silent"


def test_enough_bad_answers_end_probation_and_requests_go_back_at_once() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2))
    bad = AnswerBad(key=V2, code="model.run", message="no such operator")
    script.say(bad, AnswerGood(V2), bad)
    script.stands(Phase.PROBATION)
    script.say(bad)
    script.stands(Phase.ROLLING_BACK)
    assert script.slot.quarantine == (V2,)
    assert slots.serving(script.slot) == installed("1.0.0", at=1)
    script.wants(SwitchTo(V1), StartHost(installed("1.0.0", at=1)), StopHost(V2))
    script.say(HostReady(V1))
    script.stands(Phase.COMMITTED)
    assert script.notes == ["release.rolled_back"]


def test_without_a_release_before_a_failed_probation_leaves_nothing() -> None:
    script = Script().say(*on_probation("1.0.0", at=1))
    script.say(*[AnswerBad(key=V1, code="model.run", message="")] * PROBATION.max_failures)
    script.stands(Phase.IDLE)
    assert script.slot.quarantine == (V1,)
    script.wants(SwitchTo(None), StopHost(V1))


def test_a_crash_in_probation_goes_through_a_new_golden_check() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2), AnswerGood(V2))
    script.say(host_lost(V2))
    script.stands(Phase.STAGED)
    assert (script.slot.trial.failed, script.slot.trial.good) == (1, 0)
    script.wants(SwitchTo(V1), StartHost(installed("1.0.0", at=1)), RequestWarmUp(V2))
    script.say(WarmUpAllowed(V2), HostReady(V2))
    script.stands(Phase.PROBATION)
    assert script.slot.trial.failed == 1


def test_good_answers_beyond_the_needed_need_no_saving() -> None:
    slot = Script().say(*on_probation("1.0.0", at=1), AnswerGood(V1), AnswerGood(V1)).slot
    assert not slots.counts_answers(slot)
    assert slots.decide(slot, AnswerGood(V1)).state is slot


def test_going_back_works_though_the_old_host_does_not_come_up_at_once() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2), OperatorRollback())
    script.stands(Phase.ROLLING_BACK)
    script.say(host_lost(V1))
    script.wants(StartHost(installed("1.0.0", at=1)))
    script.say(host_lost(V1))
    script.wants(StartTimer(Timer.RESTART, 1_000))
    script.say(host_lost(V1))
    script.stands(Phase.COMMITTED)
    script.wants(StartTimer(Timer.RESTART, 2_000))
    assert script.notes == ["release.rolled_back"]


# The committed release


def test_a_committed_release_is_started_again_without_end() -> None:
    script = Script().say(*committed("1.0.0", at=1))
    script.say(host_lost(V1))
    assert script.notes == ["host.lost"]
    script.wants(StartHost(installed("1.0.0", at=1)))
    for _ in range(CRASH_LOOP - 1):
        script.say(host_lost(V1))
    assert script.notes == ["host.crash_loop"]
    assert script.slot.error_code == CRASH_LOOP_CODE
    for _ in range(50):
        script.say(host_lost(V1))
        assert script.notes == []
        script.say(RestartDue())
        script.wants(StartHost(installed("1.0.0", at=1)))
    script.stands(Phase.COMMITTED)
    script.say(HostReady(V1), AnswerGood(V1))
    assert (script.slot.crashes, script.slot.error_code) == (0, "")


def test_a_committed_release_whose_files_the_disk_has_changed_is_fetched_again() -> None:
    script = Script().say(*committed("1.0.0", at=1), *committed("2.0.0", at=2))
    script.say(FilesBad(key=V2, code="transfer.corrupt", message="another hash"))
    script.stands(Phase.FETCHING)
    assert script.slot.active == installed("1.0.0", at=1)
    assert script.slot.quarantine == ()
    script.wants(
        StopHost(V2), SwitchTo(V1), StartHost(installed("1.0.0", at=1)), Fetch(V2, installed("2.0.0", at=2).files)
    )


def test_the_operator_goes_back_to_the_release_before() -> None:
    script = Script().say(*committed("1.0.0", at=1), *committed("2.0.0", at=2))
    assert slots.can_roll_back(script.slot)
    script.say(OperatorRollback())
    script.wants(SwitchTo(V1), StartHost(installed("1.0.0", at=1)), StopHost(V2))
    script.say(HostReady(V1))
    assert script.slot.active == installed("1.0.0", at=1)
    assert script.slot.quarantine == (V2,)
    assert not slots.can_roll_back(script.slot)
    script.say(OperatorRollback())
    assert script.notes == ["release.rollback_refused"]


def test_nobody_goes_back_below_the_signed_floor() -> None:
    script = Script().say(*committed("1.0.0", at=1), *committed("2.0.0", at=2, floor=2))
    assert script.slot.previous is None
    assert not slots.can_roll_back(script.slot)


def test_a_withdrawn_family_serves_nothing() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2), Withdrawn())
    script.stands(Phase.IDLE)
    assert slots.files_to_keep([script.slot]) == frozenset()
    script.say(Withdrawn())
    assert script.effects == []


# Restarts


@pytest.mark.parametrize(
    ("steps", "phase"),
    [(1, Phase.FETCHING), (2, Phase.VERIFYING), (3, Phase.STAGED), (4, Phase.STAGED), (5, Phase.STAGED)],
)
def test_after_a_restart_the_active_release_serves_first(steps: int, phase: Phase) -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2)[:steps])
    script.say(Restarted(PROBATION))
    script.stands(phase)
    assert script.effects[:2] == [SwitchTo(V1), StartHost(installed("1.0.0", at=1))]
    assert slots.serving(script.slot) == installed("1.0.0", at=1)


def test_a_restart_takes_over_the_profile_s_probation() -> None:
    stricter = msgspec.structs.replace(PROBATION, good_answers=50)
    assert Script().say(Restarted(stricter)).slot.probation == stricter


def test_steps_have_a_budget() -> None:
    script = Script().say(*committed("1.0.0", at=1), offer("2.0.0", at=2), FilesHere(V2))
    script.say(*[Restarted(PROBATION)] * MAX_TRANSITIONS)
    script.stands(Phase.COMMITTED)
    assert script.slot.error_code == "release.loops"
    assert script.slot.quarantine == (V2,)


def unreadable(name: str) -> FilesBad:
    """The disk refuses to show the files."""
    return FilesBad(key=name, code="storage", message="too many open files", retry=True)


def test_a_disk_that_refuses_for_a_moment_does_not_cost_the_active_release() -> None:
    script = Script().say(*committed("1.0.0", at=1), host_lost(V1))
    script.say(unreadable(V1))
    script.stands(Phase.COMMITTED)
    assert script.slot.active == installed("1.0.0", at=1)
    script.wants(StartTimer(Timer.RESTART, 1_000))
    script.wants_no(Fetch, SwitchTo)


def test_a_disk_that_refuses_for_long_ends_a_rollback_where_it_leads() -> None:
    script = Script().say(*committed("1.0.0", at=1), *on_probation("2.0.0", at=2), OperatorRollback())
    script.stands(Phase.ROLLING_BACK)
    script.say(*[unreadable(V1)] * MAX_ROLLBACK_STARTS)
    script.stands(Phase.COMMITTED)
    assert script.slot.active == installed("1.0.0", at=1)


@pytest.mark.parametrize("before", [Phase.VERIFYING, Phase.WARMUP])
def test_a_candidate_whose_files_the_disk_refuses_to_show_is_not_quarantined(before: Phase) -> None:
    script = Script().say(*committed("1.0.0", at=1), offer("2.0.0", at=2), FilesHere(V2))
    if before is Phase.WARMUP:
        script.say(FilesVerified(V2), WarmUpAllowed(V2))
    script.stands(before)
    script.say(unreadable(V2))
    script.stands(Phase.COMMITTED)
    assert (script.slot.quarantine, script.slot.candidate) == ((), None)
    assert script.notes == ["release.failed"]
    script.say(offer("2.0.0", at=2))
    script.stands(Phase.FETCHING)
