"""The slot machine's steps that several slots take as one, and those of a release that is no longer trusted.

When they are taken is decided in edge_agent/core/sets.py; the table of phases is in edge_agent/core/slots.py.
"""

from __future__ import annotations

from msgspec.structs import replace

from edge_agent.core.slot_moves import (
    Step,
    abandon,
    ask_for_room,
    await_others,
    blame,
    candidate_of,
    commit,
    give_up,
    go_back,
    note,
    on_trial,
    serve,
    uncommit,
)
from edge_agent.core.slot_values import (
    MAX_LOADS,
    CancelWork,
    CollectGarbage,
    CommitAllowed,
    Effect,
    Gathered,
    Installed,
    NoLongerTrusted,
    Phase,
    SetFailed,
    SetRolledBack,
    Slot,
    SteppedBack,
    StopHost,
    StopTimer,
    SwitchAllowed,
    SwitchTo,
    Timer,
    WaitOver,
)
from shared.machine import Decision


def gathered(state: Slot, event: Gathered) -> Step:
    """Every member has its files: ask for room."""
    if event.key != candidate_of(state).key or state.is_gathered:
        return Decision(state)
    after = replace(state, is_gathered=True)
    return Decision(after, (StopTimer(Timer.WAIT), *ask_for_room(after)))


def switch_allowed(state: Slot, event: SwitchAllowed) -> Step:
    """Every member's host is up: go on trial, counted like a load before it happens."""
    if event.key != candidate_of(state).key:
        return Decision(state)
    return on_trial(replace(state, tries=state.tries + 1))


def stepped_back(state: Slot, event: SteppedBack) -> Step:
    """Another member has lost its host: the release before serves, and the candidate's host waits again."""
    if event.key != candidate_of(state).key:
        return Decision(state)
    trial = replace(state.trial, good=0, extensions=0, passed=False)
    waiting = await_others(replace(state, trial=trial, tries=state.tries + 1))
    return Decision(waiting.state, (*serve(state), CancelWork(event.key), StopTimer(Timer.PROBATION), *waiting.effects))


def commit_allowed(state: Slot, event: CommitAllowed) -> Step:
    """Every member has passed: commit. A member that ran its release already can be gone back from no longer alone."""
    if state.phase is Phase.COMMITTED:
        return Decision(replace(state, previous=None) if state.previous is not None else state)
    if event.key != candidate_of(state).key or not state.trial.passed:
        return Decision(state)
    return commit(state, changed=event.changed)


def set_failed(state: Slot, event: SetFailed) -> Step:
    """Another member failed. This one is not to blame, unless its own loads are used up in the same way."""
    if event.key != candidate_of(state).key:
        return Decision(state)
    if event.by_count and state.tries >= MAX_LOADS:
        return give_up(state, event.code, event.message)
    return go_back(state, event.code, event.message, quarantine=state.quarantine)


def wait_over(state: Slot, _: WaitOver) -> Step:
    """The others took too long; nobody here is to blame."""
    if state.phase is Phase.STAGED and (state.is_gathered or not state.together):
        return Decision(state)
    what = "files" if state.phase is Phase.STAGED else "hosts"
    message = f"the {what} of the other models of the set were not ready in time"
    return abandon(state, "set.timeout", message, quarantine=state.quarantine)


def set_rolled_back(state: Slot, event: SetRolledBack) -> Step:
    """Back to the release before, because a member that came in the same step goes back."""
    if state.active is None or state.previous is None:
        return Decision(state)
    leaving = uncommit(state, state.active, state.previous)
    return go_back(leaving, event.code, event.message, quarantine=state.quarantine)


def no_longer_trusted(state: Slot, event: NoLongerTrusted) -> Step:
    """Stop serving this release. What was before it serves, if it still holds; else it stays, unserved, with its files.

    Whether it comes back is the next verification's to say, and what it was left for an accepted assignment's.
    """
    if state.previous is not None and state.previous.key == event.key:
        state = replace(state, previous=None)
    candidate, active = state.candidate, state.active
    if candidate is not None and candidate.key == event.key and state.phase is not Phase.ROLLING_BACK:
        left = go_back(state, event.code, event.message, quarantine=state.quarantine)
        return Decision(left.state, tuple(effect for effect in left.effects if not isinstance(effect, CollectGarbage)))
    if active is None or active.key != event.key:
        return Decision(state)
    if state.phase is Phase.COMMITTED and state.previous is not None:
        return go_back(uncommit(state, active, state.previous), event.code, event.message, quarantine=state.quarantine)
    return _active_distrusted(state, active, event)


def _active_distrusted(state: Slot, active: Installed, event: NoLongerTrusted) -> Step:
    after = replace(state, crashes=0)
    serving: tuple[Effect, ...] = (SwitchTo(None),)
    if state.previous is not None:
        after = replace(after, active=state.previous, previous=None, changed_with=())
        serving = serve(after)
    elif state.candidate is None:
        after = blame(after, active, event.code, event.message)
    return Decision(
        after,
        (
            *(() if state.phase is Phase.PROBATION else serving),
            StopTimer(Timer.RESTART),
            StopHost(active.key),
            note("release.distrusted", active, code=event.code, message=event.message),
        ),
    )
