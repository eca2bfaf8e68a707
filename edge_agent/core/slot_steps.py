"""The slot machine's steps: one function for each event, `(state, event) -> Decision`.

The rules are those of edge_agent/core/slots.py, which holds the table that says in which phase each step is taken.
"""

from __future__ import annotations

from typing import Final

from msgspec.structs import replace

from edge_agent.core.backoff import drawn_ms
from edge_agent.core.slot_values import (
    CRASH_LOOP,
    EXTENSION_MS,
    MAX_ERROR_CHARS,
    MAX_EXTENSIONS,
    MAX_FETCH_DELAY_MS,
    MAX_LOADS,
    MAX_QUARANTINED,
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
    Fetch,
    FetchDue,
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesVerified,
    HostFailed,
    HostReady,
    Installed,
    Note,
    Offered,
    OperatorRollback,
    Phase,
    ProbationTimedOut,
    Probe,
    RequestWarmUp,
    RestartDue,
    Restarted,
    Slot,
    StartHost,
    StartTimer,
    StopHost,
    StopTimer,
    SwitchTo,
    Timer,
    Trial,
    VerifyFiles,
    WarmUpAllowed,
    WarmUpDue,
    Withdrawn,
    backoff_ms,
)
from shared.ids import Digest
from shared.machine import Decision

Step = Decision[Slot, Effect]

CRASH_LOOP_CODE: Final = "model.crash_loop"
DAMAGED_CODE: Final = "storage.damaged"


# Offers


def offered(state: Slot, event: Offered) -> Step:
    """A release is named: the one that is here, the one on its way, one that may not run, or a new one."""
    offer = Installed(
        manifest=event.model.manifest,
        manifest_digest=event.model.manifest_digest,
        variant=event.variant,
        assignment_version=event.assignment_version,
        patches=event.patches,
    )
    known = [release for release in (state.active, state.candidate) if release is not None]
    if any(release.assignment_version > offer.assignment_version for release in known):
        return Decision(state, (_note("release.stale", offer),))
    if event.force and offer.manifest_digest in state.quarantine:
        rest = tuple(digest for digest in state.quarantine if digest != offer.manifest_digest)
        state = replace(state, quarantine=rest, refused=0)
    if offer.manifest_digest in state.quarantine:
        return _refused(state, offer)
    candidate, active = state.candidate, state.active
    if candidate is not None and candidate.key == offer.key and state.phase is not Phase.ROLLING_BACK:
        again = replace(candidate, assignment_version=offer.assignment_version, patches=offer.patches)
        return _named_again(state, candidate=again)
    if active is not None and active.key == offer.key:
        again = replace(active, assignment_version=offer.assignment_version)
        if candidate is None or state.phase is Phase.ROLLING_BACK:
            return _named_again(state, active=again)
        after = replace(_without_candidate(state), active=again)
        return Decision(after, (_note("release.superseded", candidate), *_leave(state), CollectGarbage()))
    return _begin(state, offer)


def _named_again(state: Slot, *, active: Installed | None = None, candidate: Installed | None = None) -> Step:
    """The assignment names what is here or on its way: only its version may be newer."""
    after = replace(state, active=active or state.active, candidate=candidate or state.candidate)
    return Decision(state if after == state else after)


def _refused(state: Slot, offer: Installed) -> Step:
    if state.refused >= offer.assignment_version:
        return Decision(state)
    note = _note("release.refused", offer, code="release.quarantined", message=state.error)
    after = replace(state, refused=offer.assignment_version)
    if not state.error_code or state.failed != offer.manifest_digest:
        after = _blame(after, offer, "release.quarantined", "this release failed here before")
    return Decision(after, (note,))


def _begin(state: Slot, offer: Installed) -> Step:
    after = replace(
        state,
        phase=Phase.FETCHING,
        candidate=offer,
        tries=0,
        fetch_tries=0,
        refetches=0,
        transitions=1,
        trial=Trial(),
    )
    leaving: tuple[Effect, ...] = ()
    if state.phase is Phase.ROLLING_BACK:
        leaving = (_ended("release.rolled_back", state),)
    elif state.candidate is not None:
        leaving = (_note("release.superseded", state.candidate), *_leave(state))
    return Decision(after, (*leaving, _fetch(offer)))


def withdrawn(state: Slot, _: Withdrawn) -> Step:
    """Nothing of this family shall run here any more."""
    if state.phase is Phase.IDLE:
        return Decision(state)
    effects: list[Effect] = []
    for release in (state.active, state.candidate):
        if release is not None:
            effects += [_note("release.withdrawn", release), CancelWork(release.key), StopHost(release.key)]
    after = replace(_without_candidate(state), phase=Phase.IDLE, active=None, previous=None)
    after = _without_error(after)
    stops = tuple(StopTimer(timer) for timer in Timer)
    return Decision(after, (SwitchTo(None), *effects, *stops, CollectGarbage()))


# Fetching and verifying


def files_here(state: Slot, event: FilesHere) -> Step:
    """The files are on the shelf: verify them."""
    candidate = _candidate(state)
    if event.key != candidate.key:
        return Decision(state)
    after = _enter(state, Phase.VERIFYING)
    return Decision(after, (StopTimer(Timer.FETCH), VerifyFiles(candidate.key, candidate.files)))


def fetch_failed(state: Slot, event: FetchFailed) -> Step:
    """Wait and try again, or end the attempt without blaming the release."""
    if event.key != _candidate(state).key:
        return Decision(state)
    if not event.retry:
        return _abandon(state, event.code, event.message, quarantine=state.quarantine)
    tries = state.fetch_tries + 1
    after = _blame(replace(state, fetch_tries=tries), _candidate(state), event.code, event.message)
    window_ms = backoff_ms(tries, most_ms=MAX_FETCH_DELAY_MS)
    delay_ms = drawn_ms(window_ms, jitter=event.jitter, shortest_ms=MIN_FETCH_DELAY_MS)
    return Decision(after, (StartTimer(Timer.FETCH, delay_ms),))


def fetch_due(state: Slot, _: FetchDue) -> Step:
    """Fetch again; what is on the shelf already is not fetched twice."""
    return Decision(state, (StopTimer(Timer.FETCH), _fetch(_candidate(state))))


def files_verified(state: Slot, event: FilesVerified) -> Step:
    """Staged: ask for room."""
    if event.key != _candidate(state).key:
        return Decision(state)
    return Decision(_enter(state, Phase.STAGED), (RequestWarmUp(event.key),))


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
        return _abandon(state, event.code, event.message, quarantine=state.quarantine)
    if state.phase not in (Phase.VERIFYING, Phase.WARMUP):
        return Decision(state)
    if state.refetches >= MAX_REFETCHES or state.transitions >= MAX_TRANSITIONS:
        return _abandon(state, DAMAGED_CODE, event.message, quarantine=state.quarantine)
    after = replace(_enter(state, Phase.FETCHING), fetch_tries=0, refetches=state.refetches + 1)
    return Decision(after, (*_leave(state), _fetch(candidate)))


def _active_damaged(state: Slot, damaged: Installed) -> Step:
    """The disk has lost the active release's files: it is no longer installed, so it is brought in anew."""
    after = replace(state, active=state.previous, previous=None, crashes=0)
    effects: tuple[Effect, ...] = (
        _note("release.damaged", damaged),
        StopTimer(Timer.RESTART),
        StopHost(damaged.key),
        *(() if state.phase is Phase.PROBATION else _serve(after)),
    )
    if state.phase not in (Phase.COMMITTED, Phase.ROLLING_BACK):
        return Decision(after, effects)
    begun = _begin(replace(after, phase=state.phase), damaged)
    return Decision(begun.state, (*effects, *begun.effects))


# Warming up


def warm_up_allowed(state: Slot, event: WarmUpAllowed) -> Step:
    """Load the candidate, counted before it happens."""
    candidate = _candidate(state)
    if event.key != candidate.key:
        return Decision(state)
    if state.tries >= MAX_LOADS or state.transitions >= MAX_TRANSITIONS:
        return _give_up(state, "release.loads", f"not committed after {state.tries} loads")
    after = replace(_enter(state, Phase.WARMUP), tries=state.tries + 1)
    return Decision(after, (StopTimer(Timer.WARM_UP), StartHost(candidate)))


def warm_up_due(state: Slot, _: WarmUpDue) -> Step:
    """Ask for room again."""
    return Decision(state, (RequestWarmUp(_candidate(state).key),))


def host_ready(state: Slot, event: HostReady) -> Step:
    """The candidate may serve on trial, or a rollback is done; a host that nobody wants is stopped."""
    active, candidate = state.active, state.candidate
    if candidate is not None and event.key == candidate.key:
        if state.phase is Phase.WARMUP:
            return _on_trial(state, candidate)
        if state.phase is Phase.PROBATION:
            return Decision(state)
    if active is not None and event.key == active.key and state.phase is not Phase.PROBATION:
        return _rolled_back(state) if state.phase is Phase.ROLLING_BACK else Decision(state)
    return Decision(state, (StopHost(event.key),))


def _on_trial(state: Slot, candidate: Installed) -> Step:
    trial = replace(state.trial, good=0, extensions=0, started=state.trial.started + 1)
    effects: list[Effect] = [SwitchTo(candidate.key), StopTimer(Timer.RESTART)]
    if state.active is not None:
        effects.append(StopHost(state.active.key))
    effects += [StartTimer(Timer.PROBATION, state.probation.duration_ms), _note("release.started", candidate)]
    return Decision(replace(_enter(state, Phase.PROBATION), trial=trial, crashes=0), tuple(effects))


def host_failed(state: Slot, event: HostFailed) -> Step:
    """A host did not come up or was lost."""
    active, candidate = state.active, state.candidate
    if candidate is not None and event.key == candidate.key:
        if state.phase is Phase.WARMUP:
            return _warm_up_failed(state, event)
        if state.phase is Phase.PROBATION:
            return _lost_on_trial(state, event)
    if active is not None and event.key == active.key and state.phase is not Phase.PROBATION:
        return _active_lost(state, active, event)
    return Decision(state)


def _warm_up_failed(state: Slot, event: HostFailed) -> Step:
    if not event.retry or state.tries >= MAX_LOADS:
        return _give_up(state, event.code, event.message)
    after = _blame(_enter(state, Phase.STAGED), _candidate(state), event.code, event.message)
    delay_ms = backoff_ms(state.tries, most_ms=MAX_RESTART_DELAY_MS)
    return Decision(after, (StopHost(event.key), StartTimer(Timer.WARM_UP, delay_ms)))


def _lost_on_trial(state: Slot, event: HostFailed) -> Step:
    failed = state.trial.failed + 1
    if failed >= max(1, state.probation.max_failures) or state.tries >= MAX_LOADS:
        return _give_up(state, event.code, event.message)
    after = replace(_enter(state, Phase.STAGED), trial=replace(state.trial, failed=failed, good=0))
    after = _blame(after, _candidate(state), event.code, event.message)
    return Decision(after, (*_leave(state), RequestWarmUp(event.key)))


def _active_lost(state: Slot, active: Installed, event: HostFailed) -> Step:
    """The committed release's host is gone: bring it back, at once at first and ever more slowly, without end."""
    crashes = state.crashes + 1
    after = replace(state, crashes=crashes)
    effects: list[Effect] = []
    if crashes in (1, CRASH_LOOP):
        name = "host.lost" if crashes == 1 else "host.crash_loop"
        effects.append(_note(name, active, code=event.code, message=event.message))
    if crashes >= CRASH_LOOP and state.candidate is None:
        after = _blame(after, active, CRASH_LOOP_CODE, event.message)
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
    """Start the committed release's host again."""
    return Decision(state, (StartHost(state.active),) if state.active is not None else ())


# Probation and its end


def answer_good(state: Slot, event: AnswerGood) -> Step:
    """Counts for the candidate on trial; ends the counting of crashes for the active release."""
    if state.phase is Phase.PROBATION:
        if event.key != _candidate(state).key or state.trial.good >= state.probation.good_answers:
            return Decision(state)
        return Decision(replace(state, trial=replace(state.trial, good=state.trial.good + 1)))
    if state.crashes == 0 or state.active is None or event.key != state.active.key:
        return Decision(state)
    after = replace(state, crashes=0)
    if state.error_code == CRASH_LOOP_CODE:
        after = _without_error(after)
    return Decision(after)


def answer_bad(state: Slot, event: AnswerBad) -> Step:
    """Counts against the candidate on trial."""
    if event.key != _candidate(state).key:
        return Decision(state)
    failed = state.trial.failed + 1
    if failed >= max(1, state.probation.max_failures):
        return _give_up(state, event.code, event.message)
    return Decision(replace(state, trial=replace(state.trial, failed=failed)))


def probation_timed_out(state: Slot, _: ProbationTimedOut) -> Step:
    """Commit, or ask for the answers that are missing."""
    missing = state.probation.good_answers - state.trial.good
    if missing <= 0:
        return _commit(state)
    if state.trial.extensions >= MAX_EXTENSIONS:
        return _give_up(
            state, "release.silent", f"{missing} good answers short after {MAX_EXTENSIONS} rounds of probes"
        )
    after = replace(state, trial=replace(state.trial, extensions=state.trial.extensions + 1))
    return Decision(after, (Probe(_candidate(state).key, missing), StartTimer(Timer.PROBATION, EXTENSION_MS)))


def _commit(state: Slot) -> Step:
    new = _candidate(state)
    before = state.active or state.previous
    if before is not None and (
        before.manifest.release_counter < new.manifest.min_release_counter or before.key == new.key
    ):
        before = None
    after = replace(_without_candidate(state), phase=Phase.COMMITTED, active=new, previous=before, crashes=0)
    after = _without_error(after)
    return Decision(after, (StopTimer(Timer.PROBATION), _note("release.committed", new), CollectGarbage()))


def _give_up(state: Slot, code: str, message: str) -> Step:
    """The candidate failed by its own fault: never again on this device, and back to what was before."""
    candidate, active = _candidate(state), state.active
    quarantine = (*(d for d in state.quarantine if d != candidate.manifest_digest), candidate.manifest_digest)
    quarantine = quarantine[-MAX_QUARANTINED:]
    if state.phase is not Phase.PROBATION or active is None:
        return _abandon(state, code, message, quarantine=quarantine)
    after = replace(_enter(state, Phase.ROLLING_BACK), quarantine=quarantine, crashes=0)
    return Decision(_blame(after, candidate, code, message), _leave(state))


def _abandon(state: Slot, code: str, message: str, *, quarantine: tuple[Digest, ...]) -> Step:
    """The candidate goes and the active release, if there is one, is what serves already."""
    failed = _blame(replace(state, quarantine=quarantine), _candidate(state), code, message)
    name = "release.rolled_back" if state.trial.started else "release.failed"
    return Decision(_without_candidate(failed), (_ended(name, failed), *_leave(state), CollectGarbage()))


def _rolled_back(state: Slot) -> Step:
    after = replace(_without_candidate(state), crashes=0)
    return Decision(after, (_ended("release.rolled_back", state), CollectGarbage()))


def _blame(state: Slot, release: Installed, code: str, message: str) -> Slot:
    """Keep why an attempt ended and of which release it was."""
    return replace(state, error_code=code, error=message[:MAX_ERROR_CHARS], failed=release.manifest_digest)


def _without_error(state: Slot) -> Slot:
    return replace(state, error_code="", error="", failed="")


def operator_rollback(state: Slot, _: OperatorRollback) -> Step:
    """Back to the release before, by hand."""
    code, message = "operator.rollback", "rolled back by the operator of the device"
    if state.phase is not Phase.COMMITTED and state.candidate is not None:
        return _give_up(state, code, message)
    active, previous = state.active, state.previous
    if active is None or previous is None:
        return Decision(
            state, (Note("release.rollback_refused", {"family": state.family, "code": "release.no_previous"}),)
        )
    leaving = replace(
        state,
        phase=Phase.PROBATION,
        active=previous,
        previous=None,
        candidate=active,
        transitions=0,
        trial=Trial(started=1),
    )
    return _give_up(leaving, code, message)


# Starting again


def restarted(state: Slot, event: Restarted) -> Step:
    """Resume: the active release serves, and the candidate goes on from its last safe step."""
    state = replace(state, probation=event.probation, crashes=0)
    serve = _serve(state) if state.active is not None else ()
    candidate = state.candidate
    if candidate is None or state.phase is Phase.ROLLING_BACK:
        return Decision(state, serve)
    if state.phase is Phase.FETCHING:
        return Decision(replace(state, fetch_tries=0), (*serve, _fetch(candidate)))
    if state.transitions >= MAX_TRANSITIONS:
        given_up = _give_up(state, "release.loops", f"not committed after {state.transitions} steps")
        return Decision(given_up.state, (*serve, *given_up.effects))
    if state.phase is Phase.VERIFYING:
        return Decision(_enter(state, Phase.VERIFYING), (*serve, VerifyFiles(candidate.key, candidate.files)))
    # The golden check belongs to this life: the active release serves until the candidate has passed it again.
    after = replace(_enter(state, Phase.STAGED), trial=replace(state.trial, good=0, extensions=0))
    return Decision(after, (*serve, RequestWarmUp(candidate.key)))


# Small parts


def _candidate(state: Slot) -> Installed:
    assert state.candidate is not None, f"{state.phase} without a candidate"
    return state.candidate


def _enter(state: Slot, phase: Phase) -> Slot:
    return replace(state, phase=phase, transitions=state.transitions + 1)


def _without_candidate(state: Slot) -> Slot:
    phase = Phase.COMMITTED if state.active is not None else Phase.IDLE
    return replace(
        state, phase=phase, candidate=None, tries=0, fetch_tries=0, refetches=0, transitions=0, trial=Trial()
    )


def _fetch(release: Installed) -> Fetch:
    return Fetch(release.key, release.files, release.patches)


def _serve(state: Slot) -> tuple[Effect, ...]:
    """Requests go to the active release, or nowhere."""
    if state.active is None:
        return (SwitchTo(None),)
    return SwitchTo(state.active.key), StartHost(state.active)


def _leave(state: Slot) -> tuple[Effect, ...]:
    """Undo whatever may be under way for the candidate; after PROBATION requests go back to the active release."""
    key = _candidate(state).key
    back = _serve(state) if state.phase is Phase.PROBATION else ()
    stops = (StopTimer(Timer.FETCH), StopTimer(Timer.WARM_UP), StopTimer(Timer.PROBATION))
    return (*back, CancelWork(key), *stops, StopHost(key))


def _note(name: str, release: Installed, *, code: str = "", message: str = "") -> Note:
    manifest = release.manifest
    detail = {"family": str(manifest.family), "version": str(manifest.version), "variant": release.variant}
    detail["manifest"] = release.manifest_digest
    if code:
        detail |= {"code": code, "message": message[:MAX_ERROR_CHARS]}
    return Note(name, detail)


def _ended(name: str, state: Slot) -> Note:
    return _note(name, _candidate(state), code=state.error_code, message=state.error)
