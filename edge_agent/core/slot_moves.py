"""The moves that the steps of the slot machine are made of: entering a phase, leaving a candidate, giving it up.

Each is pure and holds whatever event led to it; which event does is the steps' matter (slot_steps.py, set_steps.py).
"""

from __future__ import annotations

from msgspec.structs import replace

from edge_agent.core.slot_values import (
    MAX_ERROR_CHARS,
    MAX_QUARANTINED,
    CancelWork,
    CollectGarbage,
    Effect,
    Installed,
    Note,
    Phase,
    Slot,
    StartHost,
    StopHost,
    StopTimer,
    SwitchTo,
    Timer,
    Trial,
)
from shared.ids import Digest
from shared.machine import Decision

Step = Decision[Slot, Effect]


def give_up(state: Slot, code: str, message: str) -> Step:
    """The candidate failed by its own fault: never again on this device, and back to what was before."""
    candidate, active = candidate_of(state), state.active
    quarantine = (*(d for d in state.quarantine if d != candidate.manifest_digest), candidate.manifest_digest)
    quarantine = quarantine[-MAX_QUARANTINED:]
    if state.phase is not Phase.PROBATION or active is None:
        return abandon(state, code, message, quarantine=quarantine)
    after = replace(enter(state, Phase.ROLLING_BACK), quarantine=quarantine, crashes=0)
    return Decision(blame(after, candidate, code, message), leave(state))


def abandon(state: Slot, code: str, message: str, *, quarantine: tuple[Digest, ...]) -> Step:
    """The candidate goes and the active release, if there is one, is what serves already."""
    failed = blame(replace(state, quarantine=quarantine), candidate_of(state), code, message)
    name = "release.rolled_back" if state.trial.started else "release.failed"
    return Decision(without_candidate(failed), (ended(name, failed), *leave(state), CollectGarbage()))


def blame(state: Slot, release: Installed, code: str, message: str) -> Slot:
    """Keep why an attempt ended and of which release it was."""
    return replace(state, error_code=code, error=message[:MAX_ERROR_CHARS], failed=release.manifest_digest)


def without_error(state: Slot) -> Slot:
    return replace(state, error_code="", error="", failed="")


def candidate_of(state: Slot) -> Installed:
    assert state.candidate is not None, f"{state.phase} without a candidate"
    return state.candidate


def enter(state: Slot, phase: Phase) -> Slot:
    return replace(state, phase=phase, transitions=state.transitions + 1)


def without_candidate(state: Slot) -> Slot:
    phase = Phase.COMMITTED if state.active is not None else Phase.IDLE
    return replace(state, phase=phase, candidate=None, tries=0, fetch_tries=0, transitions=0, trial=Trial())


def serve(state: Slot) -> tuple[Effect, ...]:
    """Requests go to the active release, or nowhere."""
    if state.active is None:
        return (SwitchTo(None),)
    return SwitchTo(state.active.key), StartHost(state.active)


def leave(state: Slot) -> tuple[Effect, ...]:
    """Undo whatever may be under way for the candidate; after PROBATION requests go back to the active release."""
    key = candidate_of(state).key
    back = serve(state) if state.phase is Phase.PROBATION else ()
    stops = (StopTimer(Timer.FETCH), StopTimer(Timer.WARM_UP), StopTimer(Timer.PROBATION))
    return (*back, CancelWork(key), *stops, StopHost(key))


def note(name: str, release: Installed, *, code: str = "", message: str = "") -> Note:
    manifest = release.manifest
    detail = {"family": str(manifest.family), "version": str(manifest.version), "variant": release.variant}
    detail["manifest"] = release.manifest_digest
    if code:
        detail |= {"code": code, "message": message[:MAX_ERROR_CHARS]}
    return Note(name, detail)


def ended(name: str, state: Slot) -> Note:
    return note(name, candidate_of(state), code=state.error_code, message=state.error)
