"""The rollout machine: when a stage begins, when it has passed, when everything goes back.

    decision = decide(state, event)        store decision.state with its notes in one transaction, then carry wishes out

Rules of this file:
1. The state says what every device shall run; a driver that dies anywhere reads the state and goes on from it.
2. Gates are read at every look, also while paused: a FAIL rolls back, at once and from wherever it stands. A stage
   advances only when every gate says PASS; too little evidence is waited for.
3. Resuming acknowledges the devices that are harmed or unresolved so far: they no longer count for `max_harmed` and
   `max_unresolved`. The sequential tests keep all their evidence.

Not here: how stages go on (progress.py), judging one device (stages.py), what gates are given (evidence.py), their
tests (gates.py, latency.py), clocks, tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from cloud_hub.rollouts import progress, stages
from cloud_hub.rollouts.answers import NOTHING_SEEN
from cloud_hub.rollouts.evidence import evidence_of, expected_of, read_gates, with_expectations
from cloud_hub.rollouts.values import (
    HUB,
    AbortAsked,
    Effect,
    Event,
    Looked,
    Member,
    Note,
    PauseAsked,
    ResumeAsked,
    Rollout,
    Stage,
    Started,
    WishesDone,
)
from shared.machine import Decision, Row, Table
from shared.rollout import (
    Condition,
    Phase,
    StagePhase,
    Verdict,
    Wish,
    harmed_limit,
    stage_sizes,
    unresolved_limit,
)

Step = Decision[Rollout, Effect]

RETURN_GRACE_MS: Final = 30_000
"""How long a rollback waits for devices that are not connected; their assignment waits for them as long as it takes."""


def decide(state: Rollout, event: Event) -> Step:
    """What to store and what to note; `decision.state is state` means that nothing has changed."""
    decision = TABLE.decide(state, event)
    after = decision.state
    if after is state or after == state:
        return Decision(state, decision.effects)
    return Decision(replace(after, revision=state.revision + 1), decision.effects)


def outstanding(state: Rollout) -> tuple[Member, ...]:
    """Members whose wish has no assignment yet."""
    return tuple(member for member in state.members if member.is_outstanding)


# Steps: what operators ask


def _started(state: Rollout, event: Started) -> Step:
    sizes = stage_sizes(state.spec, len(event.members))
    after = replace(
        state,
        phase=Phase.RUNNING,
        members=event.members,
        sizes=sizes,
        stage=Stage(index=0, phase=StagePhase.PENDING, since_ms=event.at_ms),
        started_ms=event.at_ms,
    )
    note = Note(
        at_ms=event.at_ms,
        actor=event.actor,
        kind="started",
        text=f"started for {len(event.members)} devices in stages of {', '.join(map(str, sizes))}",
        detail={"max_harmed": harmed_limit(state.spec, len(event.members)), "manifest": state.manifest},
    )
    return Decision(after, (note,))


def _pause_asked(state: Rollout, event: PauseAsked) -> Step:
    reason = f"paused by {event.actor}" + (f": {event.reason[:200]}" if event.reason else "")
    note = Note(at_ms=event.at_ms, actor=event.actor, kind="paused", text=reason, readings=state.readings)
    return Decision(replace(state, phase=Phase.PAUSED, reason=reason), (note,))


def _resume_asked(state: Rollout, event: ResumeAsked) -> Step:
    bad = (Condition.HARMED, Condition.UNRESOLVED)
    members = tuple(
        replace(member, acknowledged=True) if member.condition in bad and not member.acknowledged else member
        for member in state.members
    )
    seen = sum(member.condition in bad for member in members)
    text = f"resumed; {seen} harmed or unresolved devices acknowledged"
    note = Note(at_ms=event.at_ms, actor=event.actor, kind="resumed", text=text, readings=state.readings)
    return Decision(replace(state, phase=Phase.RUNNING, reason="", members=members), (note,))


def _abort_asked(state: Rollout, event: AbortAsked) -> Step:
    how = "devices go back to what they ran before" if event.reverting else "devices keep what they have"
    note = Note(
        at_ms=event.at_ms,
        actor=event.actor,
        kind="aborting",
        text=f"aborted: {how}",
        readings=state.readings,
        detail={"reverting": event.reverting},
    )
    after = replace(state, phase=Phase.ABORTING, reason=f"aborted by {event.actor}", reverting=event.reverting)
    after = replace(after, ending_since_ms=event.at_ms)
    return Decision(_send_back(after) if event.reverting else _kept(after), (note,))


def _draft_aborted(state: Rollout, event: AbortAsked) -> Step:
    note = Note(at_ms=event.at_ms, actor=event.actor, kind="ended", text="the draft was given up")
    reason = f"aborted by {event.actor}"
    return Decision(replace(state, phase=Phase.ABORTED, reason=reason, ended_ms=event.at_ms), (note,))


# Steps: what the controller saw and did


def _wishes_done(state: Rollout, event: WishesDone) -> Step:
    """Assignments exist now. The deadline of an offer runs from here: before, nobody could have answered it."""
    notes = tuple(
        Note(at_ms=event.at_ms, actor=HUB, kind="device", text=f"{device}: no assignment: {reason}")
        for device, reason in sorted(event.impossible.items())
    )
    return Decision(replace(state, members=tuple(_with_wish(member, event) for member in state.members)), notes)


def _with_wish(member: Member, event: WishesDone) -> Member:
    if member.wish is not event.wish or member.assignment_version != 0:
        return member
    if member.device in event.assigned:
        offered_ms = event.at_ms if event.wish is Wish.TARGET and member.is_touched else member.offered_ms
        return replace(member, assignment_version=event.assigned[member.device], offered_ms=offered_ms)
    if member.device in event.impossible:
        after = _stranded(member, event.impossible[member.device])
        if after.condition is Condition.OFFERED:
            return replace(after, condition=Condition.UNRESOLVED, resolved_ms=event.at_ms)
        return after
    return member


def _stranded(member: Member, why: str) -> Member:
    return replace(member, stranded=True, reason=f"{member.reason}; {why}" if member.reason else why)


def _looked_running(state: Rollout, event: Looked) -> Step:
    state, notes = _observe(state, event)
    if any(reading.verdict is Verdict.FAIL for reading in state.readings):
        return _fail(state, event, notes)
    unresolved = sum(member.condition is Condition.UNRESOLVED and not member.acknowledged for member in state.members)
    limit = unresolved_limit(state.spec, len(state.members))
    if unresolved > limit:
        reason = f"{unresolved} devices unresolved, {limit} are borne"
        note = Note(at_ms=event.at_ms, actor=HUB, kind="paused", text=reason, readings=state.readings)
        return Decision(replace(state, phase=Phase.PAUSED, reason=reason), (*notes, note))
    after, more = progress.advance(state, event)
    return Decision(after, (*notes, *more))


def _looked_paused(state: Rollout, event: Looked) -> Step:
    state, notes = _observe(state, event)
    if any(reading.verdict is Verdict.FAIL for reading in state.readings):
        return _fail(state, event, notes)
    return Decision(state, notes)


def _observe(state: Rollout, event: Looked) -> tuple[Rollout, tuple[Note, ...]]:
    """Judge every device, then read the gates."""
    new = {seen.device: seen.answers for seen in event.new if seen.version == state.spec.version}
    sightings, members, notes = event.sightings, [], []
    for member in state.members:
        judged = stages.judge(
            member,
            sightings.get(member.device),
            new.get(member.device, NOTHING_SEEN),
            rollout=state,
            at_ms=event.at_ms,
            watching_since_ms=event.watching_since_ms,
        )
        if judged is not member and judged.condition in (Condition.HARMED, Condition.UNRESOLVED):
            text = f"{judged.device} {judged.condition.value}: {judged.reason}"
            notes.append(Note(at_ms=event.at_ms, actor=HUB, kind="device", text=text))
        members.append(judged)
    state = replace(state, members=tuple(members))
    evidence = evidence_of(state, event)
    least = state.spec.gates.outcomes.min_baseline
    state = replace(state, members=with_expectations(state.members, evidence, least=least))
    evidence = replace(evidence, expected=expected_of(state.members))
    return replace(state, readings=read_gates(state, event, evidence)), tuple(notes)


def _fail(state: Rollout, event: Looked, notes: Iterable[Note]) -> Step:
    failing = [reading for reading in state.readings if reading.verdict is Verdict.FAIL]
    reason = "; ".join(f"{reading.gate}: {reading.why}" for reading in failing)
    note = Note(at_ms=event.at_ms, actor=HUB, kind="failed", text=f"rolls back: {reason}", readings=state.readings)
    state = progress.disprove(state, event)
    after = replace(state, phase=Phase.ROLLING_BACK, reason=reason, ending_since_ms=event.at_ms)
    return Decision(_send_back(after), (*notes, note))


def _send_back(state: Rollout) -> Rollout:
    """Every device that was or may have been assigned the release shall run what it ran before."""
    return replace(state, members=tuple(_sent_back(member) for member in state.members))


def _sent_back(member: Member) -> Member:
    if member.wish is not Wish.TARGET:
        return member
    if not member.before:
        return _stranded(member, "ran nothing before, keeps what it has")
    return replace(member, wish=Wish.BEFORE, assignment_version=0, stranded=False)


def _kept(state: Rollout) -> Rollout:
    """Every device keeps what it has: who has no assignment of the release yet is not given one any more."""
    members = tuple(replace(member, wish=Wish.NONE) if member.is_outstanding else member for member in state.members)
    return replace(state, members=members)


def _looked_ending(state: Rollout, event: Looked) -> Step:
    """See who is back, and end when all are that can be waited for."""
    back = {
        member.device
        for member in state.members
        if _is_waited_for(member) and stages.is_back(member, event.sightings.get(member.device))
    }
    members = tuple(replace(member, settled=True) if member.device in back else member for member in state.members)
    state = replace(state, members=members)
    notes = []
    if back:
        names = ", ".join(sorted(back)[:20]) + (", …" if len(back) > 20 else "")
        text = f"{len(back)} devices run again what they ran before: {names}"
        notes.append(Note(at_ms=event.at_ms, actor=HUB, kind="returned", text=text))
    waiting = [member for member in members if _is_waited_for(member)]
    if outstanding(state) or not _is_over(state, event, waiting):
        return Decision(state, tuple(notes))
    phase = Phase.ROLLED_BACK if state.phase is Phase.ROLLING_BACK else Phase.ABORTED
    returned = sum(member.wish is Wish.BEFORE and member.settled for member in members)
    text = f"{phase.value.replace('_', ' ')}: {returned} devices returned"
    if waiting:
        text += f", {len(waiting)} have not said so yet; their assignment waits for them"
    if stranded := sum(member.stranded for member in members):
        text += f", {stranded} cannot"
    notes.append(Note(at_ms=event.at_ms, actor=HUB, kind="ended", text=text, readings=state.readings))
    return Decision(replace(state, phase=phase, ended_ms=event.at_ms), tuple(notes))


def _is_over(state: Rollout, event: Looked, waiting: list[Member]) -> bool:
    since_ms = max(state.ending_since_ms, event.watching_since_ms)
    deadline_ms = state.spec.deadline_s * 1000
    if event.at_ms - since_ms >= deadline_ms:
        return True
    here = any((sighting := event.sightings.get(member.device)) is not None and sighting.online for member in waiting)
    return not waiting or (not here and event.at_ms - since_ms >= min(RETURN_GRACE_MS, deadline_ms))


# Small parts


def _is_waited_for(member: Member) -> bool:
    return member.wish is Wish.BEFORE and not member.settled and not member.stranded


_RUNNING, _PAUSED, _ABORTING, _BACK = Phase.RUNNING, Phase.PAUSED, Phase.ABORTING, Phase.ROLLING_BACK

TABLE: Final[Table[Phase, Rollout, Event, Effect]] = Table(
    "rollout",
    phase_of=lambda state: state.phase,
    rows={
        (Phase.DRAFT, Started): Row(leads_to=(_RUNNING,), step=_started),
        (Phase.DRAFT, AbortAsked): Row(leads_to=(Phase.ABORTED,), step=_draft_aborted),
        (_RUNNING, Looked): Row(leads_to=(_RUNNING, _PAUSED, _BACK, Phase.COMPLETED), step=_looked_running),
        (_RUNNING, WishesDone): Row(leads_to=(_RUNNING,), step=_wishes_done),
        (_RUNNING, PauseAsked): Row(leads_to=(_PAUSED,), step=_pause_asked),
        (_RUNNING, AbortAsked): Row(leads_to=(_ABORTING,), step=_abort_asked),
        (_PAUSED, Looked): Row(leads_to=(_PAUSED, _BACK), step=_looked_paused),
        (_PAUSED, WishesDone): Row(leads_to=(_PAUSED,), step=_wishes_done),
        (_PAUSED, ResumeAsked): Row(leads_to=(_RUNNING,), step=_resume_asked),
        (_PAUSED, AbortAsked): Row(leads_to=(_ABORTING,), step=_abort_asked),
        (_ABORTING, Looked): Row(leads_to=(_ABORTING, Phase.ABORTED), step=_looked_ending),
        (_ABORTING, WishesDone): Row(leads_to=(_ABORTING,), step=_wishes_done),
        (_BACK, Looked): Row(leads_to=(_BACK, Phase.ROLLED_BACK), step=_looked_ending),
        (_BACK, WishesDone): Row(leads_to=(_BACK,), step=_wishes_done),
    },
    ends=(Phase.COMPLETED, Phase.ABORTED, Phase.ROLLED_BACK),
)
