"""The slot machine's steps: one function for each event, `(state, event) -> Decision`.

The rules are those of edge_agent/core/slots.py, which holds the table that says in which phase each step is taken.
What steps have in common is in slot_moves.py.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from edge_agent.core.backoff import drawn_ms
from edge_agent.core.slot_moves import (
    Step,
    abandon,
    ask_for_room,
    await_others,
    blame,
    candidate_of,
    commit,
    ended,
    enter,
    fetch_of,
    give_up,
    leave,
    note,
    on_trial,
    serve,
    uncommit,
    verify_of,
    without_candidate,
    without_error,
)
from edge_agent.core.slot_values import (
    CRASH_LOOP,
    EXTENSION_MS,
    MAX_EXTENSIONS,
    MAX_FETCH_DELAY_MS,
    MAX_LOADS,
    MAX_REFETCHES,
    MAX_RESTART_DELAY_MS,
    MAX_ROLLBACK_STARTS,
    MAX_TRANSITIONS,
    MIN_FETCH_DELAY_MS,
    AnswerBad,
    AnswerGood,
    CancelWork,
    CollectGarbage,
    Effect,
    FetchDue,
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesRefused,
    FilesVerified,
    HostFailed,
    HostReady,
    Installed,
    Member,
    Note,
    Offered,
    OperatorRollback,
    Phase,
    ProbationTimedOut,
    Probe,
    RestartDue,
    Restarted,
    Slot,
    StartHost,
    StartTimer,
    StopHost,
    Stopping,
    StopTimer,
    SwitchTo,
    Timer,
    Trial,
    WarmUpAllowed,
    WarmUpDue,
    Withdrawn,
    backoff_ms,
)
from shared.machine import Decision

CRASH_LOOP_CODE: Final = "model.crash_loop"
_STEPS_OF_A_LIFE: Final = {Phase.WARMUP: 2, Phase.PROBATION: 3}
"""Steps from STAGED to here and, at the next start, back: they cost nothing when the agent ends in order."""
DAMAGED_CODE: Final = "storage.damaged"
_DISTRUST: Final = ("trust.", "set.member_failed")
"""How codes begin that a committed release is left with when it, or who came with it, is no longer trusted."""
_FOLLOWS: Final = ("release.quarantined", "set.member_failed")


# Offers


def offered(state: Slot, event: Offered) -> Step:
    """A release is named: the one that is here, the one on its way, one that may not run, or a new one.

    Which assignment is the newest is the trust rules' to say: new keys begin to count their versions anew.
    """
    offer = Installed(
        manifest=event.model.manifest,
        manifest_digest=event.model.manifest_digest,
        variant=event.variant,
        assignment_version=event.assignment_version,
        patches=event.patches,
        ground=event.model.ground,
    )
    if event.force and offer.manifest_digest in state.quarantine:
        rest = tuple(digest for digest in state.quarantine if digest != offer.manifest_digest)
        state = replace(state, quarantine=rest, refused=0)
    candidate, active = state.candidate, state.active
    if offer.manifest_digest in state.quarantine:
        return _refused(state, offer, "release.quarantined", "this release failed here before")
    if event.refusal_code and (active is None or active.key != offer.key):
        return _refused(state, offer, event.refusal_code, event.refusal)
    if candidate is not None and candidate.key == offer.key and state.phase is not Phase.ROLLING_BACK:
        named = replace(candidate, assignment_version=offer.assignment_version, patches=offer.patches)
        if event.together != state.together:
            return _set_changed(replace(state, candidate=named), event.together)
        return _named_again(state, candidate=named)
    if active is not None and active.key == offer.key:
        again = replace(active, assignment_version=offer.assignment_version)
        if candidate is None or state.phase is Phase.ROLLING_BACK:
            return _named_again(state, active=again)
        after = replace(without_candidate(state), active=again)
        return Decision(after, (note("release.superseded", candidate), *leave(state), CollectGarbage()))
    return _begin(state, offer, together=event.together)


def _set_changed(state: Slot, together: tuple[Member, ...]) -> Step:
    """The candidate is to change with others than before: what was tried without them counts for nothing."""
    after = replace(state, together=together, is_gathered=False)
    if state.phase in (Phase.FETCHING, Phase.VERIFYING):
        return Decision(after)
    after = replace(after, phase=Phase.STAGED, tries=0, trial=Trial())
    return Decision(after, (*leave(state), *ask_for_room(after)))


def _named_again(state: Slot, *, active: Installed | None = None, candidate: Installed | None = None) -> Step:
    """The assignment names what is here or on its way: its version may be newer, and it is trusted again."""
    after = replace(state, active=active or state.active, candidate=candidate or state.candidate)
    if active is not None and after.failed == active.manifest_digest and after.error_code.startswith(_DISTRUST):
        after = without_error(after)
    return Decision(state if after == state else after)


def _refused(state: Slot, offer: Installed, code: str, why: str) -> Step:
    """Not taken in: said once for each assignment."""
    if state.refused == offer.assignment_version:
        return Decision(state)
    after = replace(state, refused=offer.assignment_version)
    # Why it failed is kept where that is known already: the refusal only follows from it.
    if code not in _FOLLOWS or not state.error_code or state.failed != offer.manifest_digest:
        after = blame(after, offer, code, why)
    return Decision(after, (note("release.refused", offer, code=code, message=after.error),))


def _begin(state: Slot, offer: Installed, *, together: tuple[Member, ...] = ()) -> Step:
    after = replace(
        state,
        phase=Phase.FETCHING,
        candidate=offer,
        together=together,
        is_gathered=False,
        tries=0,
        fetch_tries=0,
        refetches=0,
        transitions=1,
        trial=Trial(),
    )
    leaving: tuple[Effect, ...] = ()
    if state.phase is Phase.ROLLING_BACK:
        leaving = (ended("release.rolled_back", state),)
    elif state.candidate is not None:
        leaving = (note("release.superseded", state.candidate), *leave(state))
    return Decision(after, (*leaving, fetch_of(offer)))


def withdrawn(state: Slot, _: Withdrawn) -> Step:
    """Nothing of this family shall run here any more."""
    if state.phase is Phase.IDLE:
        return Decision(state)
    effects: list[Effect] = []
    for release in (state.active, state.candidate):
        if release is not None:
            effects += [note("release.withdrawn", release), CancelWork(release.key), StopHost(release.key)]
    after = replace(without_candidate(state), phase=Phase.IDLE, active=None, previous=None, changed_with=())
    after = without_error(after)
    stops = tuple(StopTimer(timer) for timer in Timer)
    return Decision(after, (SwitchTo(None), *effects, *stops, CollectGarbage()))


# Fetching and verifying


def files_here(state: Slot, event: FilesHere) -> Step:
    """The files are on the shelf: verify them."""
    candidate = candidate_of(state)
    if event.key != candidate.key:
        return Decision(state)
    after = enter(state, Phase.VERIFYING)
    return Decision(after, (StopTimer(Timer.FETCH), verify_of(candidate)))


def fetch_failed(state: Slot, event: FetchFailed) -> Step:
    """Wait and try again, or end the attempt without blaming the release."""
    if event.key != candidate_of(state).key:
        return Decision(state)
    if not event.retry:
        return abandon(state, event.code, event.message, quarantine=state.quarantine)
    tries = state.fetch_tries + 1
    after = blame(replace(state, fetch_tries=tries), candidate_of(state), event.code, event.message)
    window_ms = backoff_ms(tries, most_ms=MAX_FETCH_DELAY_MS)
    delay_ms = drawn_ms(window_ms, jitter=event.jitter, shortest_ms=MIN_FETCH_DELAY_MS)
    return Decision(after, (StartTimer(Timer.FETCH, delay_ms),))


def fetch_due(state: Slot, _: FetchDue) -> Step:
    """Fetch again; what is on the shelf already is not fetched twice."""
    return Decision(state, (StopTimer(Timer.FETCH), fetch_of(candidate_of(state))))


def files_verified(state: Slot, event: FilesVerified) -> Step:
    """Staged: ask for room."""
    if event.key != candidate_of(state).key:
        return Decision(state)
    after = enter(state, Phase.STAGED)
    return Decision(after, ask_for_room(after))


def files_bad(state: Slot, event: FilesBad) -> Step:
    """The disk changed a file that was right when it was published: brought in anew, so often; no release is blamed."""
    candidate = state.candidate
    if state.active is not None and event.key == state.active.key:
        if event.retry:
            return host_failed(state, HostFailed(key=event.key, code=event.code, message=event.message, retry=True))
        return _active_damaged(state, state.active)
    if candidate is None or event.key != candidate.key:
        return Decision(state)
    if event.retry and state.phase in (Phase.VERIFYING, Phase.WARMUP):
        return abandon(state, event.code, event.message, quarantine=state.quarantine)
    if state.phase not in (Phase.VERIFYING, Phase.WARMUP):
        return Decision(state)
    if state.refetches >= MAX_REFETCHES or state.transitions >= MAX_TRANSITIONS:
        return abandon(state, DAMAGED_CODE, event.message, quarantine=state.quarantine)
    after = replace(enter(state, Phase.FETCHING), fetch_tries=0, refetches=state.refetches + 1)
    return Decision(after, (*leave(state), fetch_of(candidate)))


def files_refused(state: Slot, event: FilesRefused) -> Step:
    """What was learned is more than its base allows: never again here, and nothing of it was loaded."""
    if event.key != candidate_of(state).key:
        return Decision(state)
    return give_up(state, event.code, event.message)


def _active_damaged(state: Slot, damaged: Installed) -> Step:
    """The disk has lost the active release's files: it is no longer installed, so it is brought in anew."""
    after = replace(state, active=state.previous, previous=None, changed_with=(), crashes=0)
    effects: tuple[Effect, ...] = (
        note("release.damaged", damaged),
        StopTimer(Timer.RESTART),
        StopHost(damaged.key),
        *(() if state.phase is Phase.PROBATION else serve(after)),
    )
    if state.phase not in (Phase.COMMITTED, Phase.ROLLING_BACK):
        return Decision(after, effects)
    begun = _begin(replace(after, phase=state.phase), damaged)
    return Decision(begun.state, (*effects, *begun.effects))


# Warming up


def warm_up_allowed(state: Slot, event: WarmUpAllowed) -> Step:
    """Load the candidate, counted before it happens."""
    candidate = candidate_of(state)
    if event.key != candidate.key or (state.together and not state.is_gathered):
        return Decision(state)
    if state.tries >= MAX_LOADS or state.transitions >= MAX_TRANSITIONS:
        return give_up(state, "release.loads", f"not committed after {state.tries} loads")
    after = replace(enter(state, Phase.WARMUP), tries=state.tries + 1)
    return Decision(after, (StopTimer(Timer.WARM_UP), StartHost(candidate)))


def warm_up_due(state: Slot, _: WarmUpDue) -> Step:
    """Ask for room again."""
    return Decision(state, ask_for_room(state))


def host_ready(state: Slot, event: HostReady) -> Step:
    """The candidate may serve on trial, or a rollback is done; a host that nobody wants is stopped."""
    active, candidate = state.active, state.candidate
    if candidate is not None and event.key == candidate.key:
        if state.phase is Phase.WARMUP:
            return await_others(state) if state.together else on_trial(state)
        if state.phase in (Phase.READY, Phase.PROBATION):
            return Decision(state)
    if active is not None and event.key == active.key and state.phase is not Phase.PROBATION:
        return _rolled_back(state) if state.phase is Phase.ROLLING_BACK else Decision(state)
    return Decision(state, (StopHost(event.key),))


def host_failed(state: Slot, event: HostFailed) -> Step:
    """A host did not come up or was lost."""
    active, candidate = state.active, state.candidate
    if candidate is not None and event.key == candidate.key:
        if state.phase is Phase.WARMUP:
            return _warm_up_failed(state, event)
        if state.phase is Phase.READY:
            return _warm_up_failed(replace(state, tries=state.tries + 1), event)
        if state.phase is Phase.PROBATION:
            return _lost_on_trial(state, event)
    if active is not None and event.key == active.key and state.phase is not Phase.PROBATION:
        return _active_lost(state, active, event)
    return Decision(state)


def _warm_up_failed(state: Slot, event: HostFailed) -> Step:
    if not event.retry or state.tries >= MAX_LOADS:
        return give_up(state, event.code, event.message)
    after = blame(enter(state, Phase.STAGED), candidate_of(state), event.code, event.message)
    delay_ms = backoff_ms(state.tries, most_ms=MAX_RESTART_DELAY_MS)
    return Decision(after, (StopHost(event.key), StopTimer(Timer.WAIT), StartTimer(Timer.WARM_UP, delay_ms)))


def _lost_on_trial(state: Slot, event: HostFailed) -> Step:
    failed = state.trial.failed + 1
    if failed >= max(1, state.probation.max_failures) or state.tries >= MAX_LOADS:
        return give_up(state, event.code, event.message)
    after = replace(enter(state, Phase.STAGED), trial=replace(state.trial, failed=failed, good=0))
    after = blame(after, candidate_of(state), event.code, event.message)
    return Decision(after, (*leave(state), *ask_for_room(after)))


def _active_lost(state: Slot, active: Installed, event: HostFailed) -> Step:
    """The committed release's host is gone: bring it back, at once at first and ever more slowly, without end."""
    crashes = state.crashes + 1
    after = replace(state, crashes=crashes)
    effects: list[Effect] = []
    if crashes in (1, CRASH_LOOP):
        name = "host.lost" if crashes == 1 else "host.crash_loop"
        effects.append(note(name, active, code=event.code, message=event.message))
    if crashes >= CRASH_LOOP and state.candidate is None:
        after = blame(after, active, CRASH_LOOP_CODE, event.message)
    if crashes == 1:
        effects.append(StartHost(active))
    else:
        effects.append(StartTimer(Timer.RESTART, backoff_ms(crashes - 1, most_ms=MAX_RESTART_DELAY_MS)))
    if state.phase is Phase.ROLLING_BACK and crashes >= MAX_ROLLBACK_STARTS:
        # It is as far back as it can be; from here on it is a committed release whose host is in trouble.
        ended = _rolled_back(after)
        return Decision(replace(ended.state, crashes=crashes), (*effects, *ended.effects))
    return Decision(after, tuple(effects))


def restart_due(state: Slot, _: RestartDue) -> Step:
    """Start the committed release's host again; requests go to it from now on if they did not, because it was left."""
    return Decision(state, serve(state) if state.active is not None else ())


# Probation and its end


def answer_good(state: Slot, event: AnswerGood) -> Step:
    """Counts for the candidate on trial; ends the counting of crashes for the active release."""
    if state.phase is Phase.PROBATION:
        if event.key != candidate_of(state).key or state.trial.good >= state.probation.good_answers:
            return Decision(state)
        return Decision(replace(state, trial=replace(state.trial, good=state.trial.good + 1)))
    if state.crashes == 0 or state.active is None or event.key != state.active.key:
        return Decision(state)
    after = replace(state, crashes=0)
    if state.error_code == CRASH_LOOP_CODE:
        after = without_error(after)
    return Decision(after)


def answer_bad(state: Slot, event: AnswerBad) -> Step:
    """Counts against the candidate on trial."""
    if event.key != candidate_of(state).key:
        return Decision(state)
    failed = state.trial.failed + 1
    if failed >= max(1, state.probation.max_failures):
        return give_up(state, event.code, event.message)
    return Decision(replace(state, trial=replace(state.trial, failed=failed)))


def probation_timed_out(state: Slot, _: ProbationTimedOut) -> Step:
    """Commit, or wait for the other members of the set, or ask for the answers that are missing."""
    missing = state.probation.good_answers - state.trial.good
    if missing <= 0 and state.together:
        return Decision(replace(state, trial=replace(state.trial, passed=True)))
    if missing <= 0:
        return commit(state)
    if state.trial.extensions >= MAX_EXTENSIONS:
        return give_up(state, "release.silent", f"{missing} good answers short after {MAX_EXTENSIONS} rounds of probes")
    after = replace(state, trial=replace(state.trial, extensions=state.trial.extensions + 1))
    return Decision(after, (Probe(candidate_of(state).key, missing), StartTimer(Timer.PROBATION, EXTENSION_MS)))


def _rolled_back(state: Slot) -> Step:
    after = replace(without_candidate(state), crashes=0)
    return Decision(after, (ended("release.rolled_back", state), CollectGarbage()))


def stopping(state: Slot, _: Stopping) -> Step:
    """Restarts of a service are not the release's fault: what the next life has to do again is given back."""
    steps = _STEPS_OF_A_LIFE.get(state.phase, 0)
    if not steps:
        return Decision(state)
    return Decision(replace(state, tries=max(0, state.tries - 1), transitions=max(1, state.transitions - steps)))


def operator_rollback(state: Slot, _: OperatorRollback) -> Step:
    """Back to the release before, by hand."""
    code, message = "operator.rollback", "rolled back by the operator of the device"
    if state.phase is not Phase.COMMITTED and state.candidate is not None:
        return give_up(state, code, message)
    active, previous = state.active, state.previous
    if active is None or previous is None:
        return Decision(
            state, (Note("release.rollback_refused", {"family": state.family, "code": "release.no_previous"}),)
        )
    return give_up(uncommit(state, active, previous), code, message)


# Starting again


def restarted(state: Slot, event: Restarted) -> Step:
    """Resume: the active release serves, and the candidate goes on from its last safe step."""
    state = replace(state, probation=event.probation, crashes=0)
    serving = serve(state) if state.active is not None else ()
    candidate = state.candidate
    if candidate is None or state.phase is Phase.ROLLING_BACK:
        return Decision(state, serving)
    if state.phase is Phase.FETCHING:
        return Decision(replace(state, fetch_tries=0), (*serving, fetch_of(candidate)))
    # Whoever waits for the others of a set does not run in a circle, however often the device starts meanwhile.
    waits = state.phase is Phase.STAGED and state.together and not state.is_gathered
    if state.transitions >= MAX_TRANSITIONS and not waits:
        given_up = give_up(state, "release.loops", f"not committed after {state.transitions} steps")
        return Decision(given_up.state, (*serving, *given_up.effects))
    if state.phase is Phase.VERIFYING:
        return Decision(enter(state, Phase.VERIFYING), (*serving, verify_of(candidate)))
    # The golden check belongs to this life: the active release serves until the candidate has passed it again.
    trial = replace(state.trial, good=0, extensions=0, passed=False)
    after = replace(state if waits else enter(state, Phase.STAGED), is_gathered=False, trial=trial)
    return Decision(after, (*serving, *ask_for_room(after)))
