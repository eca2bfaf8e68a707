"""The moves that the steps of the slot machine are made of: entering a phase, leaving a candidate, giving it up.

Each is pure and holds whatever event led to it; which event does is the steps' matter (slot_steps.py, set_steps.py).
"""

from __future__ import annotations

from msgspec.structs import replace

from edge_agent.core.slot_values import (
    MAX_ERROR_CHARS,
    MAX_GATHERING_MS,
    MAX_QUARANTINED,
    MAX_READY_MS,
    CancelWork,
    CollectGarbage,
    Effect,
    Fetch,
    Installed,
    Note,
    Phase,
    RequestWarmUp,
    Slot,
    StartHost,
    StartTimer,
    StopHost,
    StopTimer,
    SwitchTo,
    Timer,
    Trial,
    VerifyFiles,
)
from shared.ids import Digest, FamilyName
from shared.machine import Decision

Step = Decision[Slot, Effect]


def give_up(state: Slot, code: str, message: str) -> Step:
    """The candidate failed by its own fault: never again on this device, and back to what was before."""
    digest = candidate_of(state).manifest_digest
    quarantine = (*(other for other in state.quarantine if other != digest), digest)
    return go_back(state, code, message, quarantine=quarantine[-MAX_QUARANTINED:])


def go_back(state: Slot, code: str, message: str, *, quarantine: tuple[Digest, ...]) -> Step:
    """The candidate goes; where it served on trial, requests go to the release before, whose host has to come up."""
    if state.phase is not Phase.PROBATION or state.active is None:
        return abandon(state, code, message, quarantine=quarantine)
    after = replace(enter(state, Phase.ROLLING_BACK), quarantine=quarantine, crashes=0)
    return Decision(blame(after, candidate_of(state), code, message), leave(state))


def on_trial(state: Slot) -> Step:
    """Requests go to the candidate from now on; the host of the release before is not needed any more."""
    trial = replace(state.trial, good=0, extensions=0, passed=False, started=state.trial.started + 1)
    candidate = candidate_of(state)
    effects: list[Effect] = [SwitchTo(candidate.key), StopTimer(Timer.RESTART), StopTimer(Timer.WAIT)]
    if state.active is not None:
        effects.append(StopHost(state.active.key))
    effects += [StartTimer(Timer.PROBATION, state.probation.duration_ms), note("release.started", candidate)]
    return Decision(replace(enter(state, Phase.PROBATION), trial=trial, crashes=0), tuple(effects))


def await_others(state: Slot) -> Step:
    """The host is up and serves nobody: the active release does, until every member of the set is as far."""
    # It stood the test, so this load is not held against it: another member may be the one that takes the power.
    after = replace(enter(state, Phase.READY), tries=max(0, state.tries - 1))
    return Decision(after, (StartTimer(Timer.WAIT, MAX_READY_MS),))


def commit(state: Slot, *, changed: tuple[FamilyName, ...] = ()) -> Step:
    """The candidate is what is gone back to from now on; `changed` are the families that commit in the same step."""
    new = candidate_of(state)
    before = state.active or state.previous
    if before is not None and (
        before.manifest.release_counter < new.manifest.min_release_counter or before.key == new.key
    ):
        before = None
    rest = replace(without_candidate(state), phase=Phase.COMMITTED, active=new, previous=before, crashes=0)
    after = without_error(replace(rest, changed_with=changed if len(changed) > 1 else ()))
    return Decision(after, (StopTimer(Timer.PROBATION), note("release.committed", new), CollectGarbage()))


def uncommit(state: Slot, active: Installed, previous: Installed) -> Slot:
    """As if the active release were still on trial, so that it can be gone back from."""
    return replace(
        state,
        phase=Phase.PROBATION,
        active=previous,
        previous=None,
        candidate=active,
        together=(),
        changed_with=(),
        transitions=0,
        trial=Trial(started=1),
    )


def abandon(state: Slot, code: str, message: str, *, quarantine: tuple[Digest, ...]) -> Step:
    """The candidate goes and the active release, if there is one, is what serves already."""
    failed = blame(replace(state, quarantine=quarantine), candidate_of(state), code, message)
    name = "release.rolled_back" if state.trial.started else "release.failed"
    return Decision(without_candidate(failed), (ended(name, failed), *leave(state), CollectGarbage()))


def blame(state: Slot, release: Installed, code: str, message: str) -> Slot:
    """Keep why an attempt ended and of which release it was."""
    return replace(state, error_code=code, error=message[:MAX_ERROR_CHARS], failed=release.manifest_digest)


def without_error(state: Slot) -> Slot:
    """Nothing is wrong any more."""
    return replace(state, error_code="", error="", failed="")


def candidate_of(state: Slot) -> Installed:
    """The candidate, in a phase that has one."""
    assert state.candidate is not None, f"{state.phase} without a candidate"
    return state.candidate


def enter(state: Slot, phase: Phase) -> Slot:
    """In this phase, one step of the budget further."""
    return replace(state, phase=phase, transitions=state.transitions + 1)


def without_candidate(state: Slot) -> Slot:
    """At rest, with the active release or with nothing."""
    phase = Phase.COMMITTED if state.active is not None else Phase.IDLE
    return replace(
        state,
        phase=phase,
        candidate=None,
        together=(),
        is_gathered=False,
        tries=0,
        fetch_tries=0,
        refetches=0,
        transitions=0,
        trial=Trial(),
    )


def fetch_of(release: Installed) -> Fetch:
    """Bring its files in."""
    return Fetch(release.key, release.brought, release.patches)


def verify_of(release: Installed) -> VerifyFiles:
    """Hash its files once more, and hold a learned one against its base."""
    return VerifyFiles(release.key, release.brought, release.ground)


def serve(state: Slot) -> tuple[Effect, ...]:
    """Requests go to the active release, or nowhere."""
    if state.active is None:
        return (SwitchTo(None),)
    return SwitchTo(state.active.key), StartHost(state.active)


def leave(state: Slot) -> tuple[Effect, ...]:
    """Undo whatever may be under way for the candidate; after PROBATION requests go back to the active release."""
    key = candidate_of(state).key
    back = serve(state) if state.phase is Phase.PROBATION else ()
    stops = (StopTimer(Timer.FETCH), StopTimer(Timer.WARM_UP), StopTimer(Timer.PROBATION), StopTimer(Timer.WAIT))
    return (*back, CancelWork(key), *stops, StopHost(key))


def ask_for_room(state: Slot) -> tuple[Effect, ...]:
    """Verified and at rest: ask for room, or wait first until the other members of the set have come as far."""
    if state.together and not state.is_gathered:
        return (StartTimer(Timer.WAIT, MAX_GATHERING_MS),)
    return (RequestWarmUp(candidate_of(state).key),)


def note(name: str, release: Installed, *, code: str = "", message: str = "") -> Note:
    """An event for the hub about this release."""
    manifest = release.manifest
    detail = {"family": str(manifest.family), "version": str(manifest.version), "variant": release.variant}
    detail["manifest"] = release.manifest_digest
    if code:
        detail |= {"code": code, "message": message[:MAX_ERROR_CHARS]}
    return Note(name, detail)


def ended(name: str, state: Slot) -> Note:
    """An event for the hub that the candidate's attempt is over, and why."""
    return note(name, candidate_of(state), code=state.error_code, message=state.error)
