"""The slot machine: how a signed release of one model family comes to serve on this device, or goes away again.

    decision = decide(state, event)        save decision.state, then carry out decision.effects in order

The driver's part: keep one `Slot` per family; save it with `encode_state` before the effects unless
`decision.state is state`; answer effects with events; at the start decode each slot, say `Restarted`, then offer what
the newest verified assignment names. Handing in an event twice, or late, does no harm.

Rules of this file:
1. What serves was verified: a release is switched to only after its files were verified and its host has passed the
   golden check in this life of the process.
2. `active` is never provisional. Until a release has committed, the one before it is what every failure leads back to.
3. Loads are counted before they happen and steps have a budget, so that no crash and no power cut can make a loop.
4. A release that failed by its own fault is quarantined by its manifest's digest; one that could not be fetched is not.
5. Every pair of phase and event is in the table; what may come late is listed there as ignored.

Not here: timers, hosts, files, the outbox (edge_agent/driver); whether a release may be trusted (shared/trust).
The drawing in docs/slots.md is made from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from msgspec.structs import replace

from edge_agent.core import set_steps
from edge_agent.core import slot_steps as steps
from edge_agent.core.slot_moves import Step
from edge_agent.core.slot_values import (
    AnswerBad,
    AnswerGood,
    CommitAllowed,
    Effect,
    Event,
    FetchDue,
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesRefused,
    FilesVerified,
    Gathered,
    HostFailed,
    HostReady,
    Installed,
    NoLongerTrusted,
    Offered,
    OperatorRollback,
    Phase,
    ProbationTimedOut,
    Report,
    RestartDue,
    Restarted,
    SetFailed,
    SetRolledBack,
    Slot,
    SteppedBack,
    Stopping,
    SwitchAllowed,
    WaitOver,
    WarmUpAllowed,
    WarmUpDue,
    Withdrawn,
)
from shared.ids import Digest, FamilyName
from shared.machine import Decision, Row, Table
from shared.model import FileRef
from shared.profile import Probation

Rows = dict[tuple[Phase, type[Event]], Row[Phase, Slot, Effect]]


def new_slot(family: FamilyName, *, probation: Probation) -> Slot:
    """A slot in which nothing was ever installed."""
    return Slot(family=family, probation=probation)


def decide(state: Slot, event: Event) -> Step:
    """What to save and what to do about this event; `decision.state is state` means that nothing has changed."""
    decision = TABLE.decide(state, event)
    after = decision.state
    if after is state or _shown(after) == _shown(state):
        return decision
    return Decision(replace(after, revision=state.revision + 1), (*decision.effects, Report()))


def serving(state: Slot) -> Installed | None:
    """The release whose host requests go to."""
    return state.candidate if state.phase is Phase.PROBATION else state.active


def kept_files(states: Iterable[Slot]) -> dict[Digest, FileRef]:
    """Every file that some slot runs, may go back to, or is bringing in."""
    return {
        file.digest: file
        for state in states
        for release in (state.active, state.previous, state.candidate)
        if release is not None
        for file in (release.brought if release is state.candidate else release.files)
    }


def files_to_keep(states: Iterable[Slot]) -> frozenset[Digest]:
    """Digests of those files, and of the patches to them that are on their way and what these start from."""
    states = list(states)
    patches = [patch for state in states if state.candidate is not None for patch in state.candidate.patches]
    return frozenset({*kept_files(states), *(patch.base for patch in patches), *(patch.digest for patch in patches)})


def counts_answers(state: Slot) -> bool:
    """Whether a good answer would change anything; while it would not, AnswerGood need not be said."""
    if state.phase is Phase.PROBATION:
        return state.trial.good < state.probation.good_answers
    return state.crashes > 0


def can_roll_back(state: Slot) -> bool:
    """Whether OperatorRollback would change anything."""
    if state.phase is Phase.COMMITTED:
        return state.previous is not None
    return state.phase not in (Phase.IDLE, Phase.ROLLING_BACK)


def _shown(state: Slot) -> tuple[object, ...]:
    """What the hub is told of a slot."""
    active, candidate = state.active, state.candidate
    return state.phase, active and active.key, candidate and candidate.key, state.error_code, state.error, state.failed


# The table

_IDLE, _FETCHING, _VERIFYING, _STAGED = Phase.IDLE, Phase.FETCHING, Phase.VERIFYING, Phase.STAGED
_WARMUP, _READY, _PROBATION = Phase.WARMUP, Phase.READY, Phase.PROBATION
_COMMITTED, _BACK = Phase.COMMITTED, Phase.ROLLING_BACK
_ENDS: Final = (_IDLE, _COMMITTED)
_ON_THE_WAY: Final = (_FETCHING, _VERIFYING, _STAGED, _WARMUP, _READY, _PROBATION)


def _rows(
    kind: type[Event], step: Callable[[Slot, Any], Step], leads: Mapping[Phase, tuple[Phase, ...]], *, stays: str = ""
) -> Rows:
    """The row of one event in every phase: `leads` says where it moves; elsewhere it stays, for the reason given."""
    staying = [phase for phase in Phase if phase not in leads]
    assert not staying or stays, f"{kind.__name__} has no row in {staying} and no reason why"
    moving: Rows = {(phase, kind): Row(leads_to=targets, step=step) for phase, targets in leads.items()}
    return moving | {(phase, kind): Row(leads_to=(phase,), step=_stay) for phase in staying}


def _stay(state: Slot, _: Event) -> Step:
    return Decision(state)


_TABLE_ROWS: Final[tuple[Rows, ...]] = (
    _rows(
        Offered,
        steps.offered,
        {phase: (phase, _FETCHING, _COMMITTED) for phase in _ON_THE_WAY}
        | {phase: (phase, _FETCHING, _COMMITTED, _STAGED) for phase in (_STAGED, _WARMUP, _READY, _PROBATION)}
        | {_IDLE: (_IDLE, _FETCHING), _COMMITTED: (_COMMITTED, _FETCHING), _BACK: (_BACK, _FETCHING)},
    ),
    _rows(Withdrawn, steps.withdrawn, dict.fromkeys(Phase, (_IDLE,))),
    _rows(FilesHere, steps.files_here, {_FETCHING: (_FETCHING, _VERIFYING)}, stays="late: the fetch was given up"),
    _rows(FetchFailed, steps.fetch_failed, {_FETCHING: (_FETCHING, *_ENDS)}, stays="late: the fetch was given up"),
    _rows(FetchDue, steps.fetch_due, {_FETCHING: (_FETCHING,)}, stays="late, or the link came back: nothing waits"),
    _rows(FilesVerified, steps.files_verified, {_VERIFYING: (_VERIFYING, _STAGED)}, stays="late"),
    _rows(
        FilesBad,
        steps.files_bad,
        {
            _FETCHING: (_FETCHING,),
            _VERIFYING: (_FETCHING, *_ENDS),
            _STAGED: (_STAGED,),
            _WARMUP: (_WARMUP, _FETCHING, *_ENDS),
            _READY: (_READY,),
            _PROBATION: (_PROBATION,),
            _COMMITTED: (_COMMITTED, _FETCHING),
            _BACK: (_BACK, _FETCHING, _COMMITTED),
        },
        stays="late: nothing is installed",
    ),
    _rows(FilesRefused, steps.files_refused, {_VERIFYING: (_VERIFYING, *_ENDS)}, stays="late"),
    _rows(WarmUpAllowed, steps.warm_up_allowed, {_STAGED: (_STAGED, _WARMUP, *_ENDS)}, stays="late"),
    _rows(WarmUpDue, steps.warm_up_due, {_STAGED: (_STAGED,)}, stays="late"),
    _rows(
        HostReady,
        steps.host_ready,
        {phase: (phase,) for phase in Phase} | {_WARMUP: (_WARMUP, _READY, _PROBATION), _BACK: (_BACK, _COMMITTED)},
    ),
    _rows(
        HostFailed,
        steps.host_failed,
        {phase: (phase,) for phase in Phase}
        | {
            _WARMUP: (_WARMUP, _STAGED, *_ENDS),
            _READY: (_READY, _STAGED, *_ENDS),
            _PROBATION: (_PROBATION, _STAGED, _BACK, _IDLE),
            _BACK: (_BACK, _COMMITTED),
        },
    ),
    _rows(
        RestartDue,
        steps.restart_due,
        {phase: (phase,) for phase in Phase if phase not in (_IDLE, _PROBATION)},
        stays="late: the candidate serves, or nothing does",
    ),
    _rows(AnswerGood, steps.answer_good, {phase: (phase,) for phase in Phase}),
    _rows(
        AnswerBad,
        steps.answer_bad,
        {_PROBATION: (_PROBATION, _BACK, _IDLE)},
        stays="a committed release is not judged by its answers on the device",
    ),
    _rows(
        ProbationTimedOut,
        steps.probation_timed_out,
        {_PROBATION: (_PROBATION, _COMMITTED, _BACK, _IDLE)},
        stays="late",
    ),
    _rows(
        Restarted,
        steps.restarted,
        {
            _IDLE: (_IDLE,),
            _FETCHING: (_FETCHING,),
            _VERIFYING: (_VERIFYING, *_ENDS),
            _STAGED: (_STAGED, *_ENDS),
            _WARMUP: (_STAGED, *_ENDS),
            _READY: (_STAGED, *_ENDS),
            _PROBATION: (_STAGED, _BACK, _IDLE),
            _COMMITTED: (_COMMITTED,),
            _BACK: (_BACK,),
        },
    ),
    _rows(
        OperatorRollback,
        steps.operator_rollback,
        dict.fromkeys(_ON_THE_WAY, _ENDS)
        | {_PROBATION: (_BACK, _IDLE), _COMMITTED: (_COMMITTED, _BACK), _IDLE: (_IDLE,)},
        stays="a rollback is under way",
    ),
    _rows(
        NoLongerTrusted,
        set_steps.no_longer_trusted,
        {phase: (phase, *_ENDS) for phase in _ON_THE_WAY}
        | {_PROBATION: (_PROBATION, _BACK, _IDLE), _COMMITTED: (_COMMITTED, _BACK), _BACK: (_BACK,)},
        stays="nothing is installed",
    ),
    _rows(Gathered, set_steps.gathered, {_STAGED: (_STAGED,)}, stays="late"),
    _rows(SwitchAllowed, set_steps.switch_allowed, {_READY: (_READY, _PROBATION)}, stays="late"),
    _rows(SteppedBack, set_steps.stepped_back, {_PROBATION: (_PROBATION, _READY)}, stays="late"),
    _rows(
        CommitAllowed,
        set_steps.commit_allowed,
        {_PROBATION: (_PROBATION, _COMMITTED), _COMMITTED: (_COMMITTED,)},
        stays="late",
    ),
    _rows(Stopping, steps.stopping, {phase: (phase,) for phase in Phase}),
    _rows(
        SetFailed,
        set_steps.set_failed,
        {phase: (phase, *_ENDS) for phase in _ON_THE_WAY} | {_PROBATION: (_PROBATION, _BACK, _IDLE)},
        stays="late: it has left the set",
    ),
    _rows(
        WaitOver,
        set_steps.wait_over,
        {_STAGED: (_STAGED, *_ENDS), _READY: _ENDS},
        stays="late: it waits no longer",
    ),
    _rows(
        SetRolledBack,
        set_steps.set_rolled_back,
        {_COMMITTED: (_COMMITTED, _BACK)},
        stays="late: what was committed is not here any more",
    ),
)

TABLE: Final[Table[Phase, Slot, Event, Effect]] = Table(
    "slot", phase_of=lambda state: state.phase, rows={pair: row for rows in _TABLE_ROWS for pair, row in rows.items()}
)


def drawing() -> str:
    """The table as a Mermaid diagram, without the rows that never leave their phase."""
    moves = {
        (phase, kind): Row(leads_to=tuple(target for target in row.leads_to if target is not phase), step=row.step)
        for (phase, kind), row in TABLE.rows.items()
    }
    return Table("slot", phase_of=lambda state: state.phase, rows=moves).mermaid()
