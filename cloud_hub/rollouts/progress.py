"""How a rollout goes through its stages: whom it offers the release, when a stage settles, has soaked and is left.

Rules of this file:
1. Only devices that are here are offered the release, and only when the fleet is known: after the hub has begun to
   listen, every member was heard, or had the time of a heartbeat.
2. A stage is left on what its own devices showed. Devices that were healthy in an earlier stage prove nothing about it.
3. Nobody is given the release unwatched but a remainder that is small beside what was watched. While more are left, the
   rollout stays open for them.
4. A stage whose devices have said what they can and leave the gates undecided is made larger, device by device.
5. What cannot go on says so: it waits with a reason, or pauses with one when waiting would not help.

Not here: judging one device and a stage's transitions (stages.py), gates (gates.py), when all goes back (rules.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from cloud_hub.rollouts import stages
from cloud_hub.rollouts.gates import needs_others
from cloud_hub.rollouts.values import HUB, Looked, Member, Note, Rollout, Sighting, Stage
from shared.ids import DeviceId
from shared.rollout import Condition, Phase, Reading, StagePhase, Verdict, Wish, harmed_limit

HEARD_WITHIN_MS: Final = 45_000
"""Devices report every 30 s: after this long of listening, who was not heard is not here."""
UNWATCHED_SHARE: Final = 0.1
"""Devices that may be given the release without being watched, as a share of the healthy ones; or `max_harmed`."""
SHOWN: Final = 20

Moved = tuple[Rollout, tuple[Note, ...]]


def advance(state: Rollout, event: Looked) -> Moved:
    """As far as the stages go on what is known."""
    notes: list[Note] = []
    while is_fleet_known(state, event):
        assert state.stage is not None, "a rollout that runs has a stage"
        before = state
        match state.stage.phase:
            case StagePhase.PENDING:
                state = _move(state, stages.Opened(event.at_ms))
                more: tuple[Note, ...] = (_stage_note(state, event, "begins"),)
            case StagePhase.APPLYING:
                state, more = _apply(state, event)
            case StagePhase.SOAKING:
                state, more = _soak(state, event)
            case StagePhase.PASSED:
                state, more = _pass(state, event)
            case StagePhase.FAILED:
                more = ()  # the rollout has left RUNNING with it
        notes += more
        if state.phase is not Phase.RUNNING or state.stage == before.stage:
            break
    return state, tuple(notes)


def is_fleet_known(state: Rollout, event: Looked) -> bool:
    """Whether who is here is known: everybody was heard since the hub listens, or had the time to be."""
    since_ms = event.watching_since_ms
    if event.at_ms - since_ms >= HEARD_WITHIN_MS:
        return True
    sightings = (event.sightings.get(member.device) for member in state.members)
    return all(sighting is None or sighting.last_seen_ms >= since_ms for sighting in sightings)


def disprove(state: Rollout, event: Looked) -> Rollout:
    """The state with its stage failed."""
    return _move(state, stages.Disproved(event.at_ms))


# Applying


def _apply(state: Rollout, event: Looked) -> Moved:
    state, offers = _offer(state, event)
    if _is_settled(state, event):
        state = _move(state, stages.Settled(event.at_ms))
        return replace(state, reason=""), (*offers, _stage_note(state, event, f"soaks for {state.spec.soak_s} s"))
    if any(member.condition is Condition.OFFERED for member in state.members):
        return replace(state, reason=""), offers
    left = [member for member in state.members if member.condition is Condition.WAITING]
    if not left:
        reason = f"no device is healthy and none is left to be offered the release: {_counted(state.members)}"
        note = Note(at_ms=event.at_ms, actor=HUB, kind="paused", text=reason, readings=state.readings)
        return replace(state, phase=Phase.PAUSED, reason=reason), (*offers, note)
    state, more = _wait(state, event, f"waits for devices: of {len(left)} that are left none can be offered it now")
    return state, (*offers, *more)


def _offer(state: Rollout, event: Looked) -> Moved:
    """Offer the release to the next devices that are here, until the stage has its size and one that may be healthy."""
    assert state.stage is not None
    missing = state.sizes[state.stage.index] - sum(member.is_touched for member in state.members)
    if missing <= 0 and not any(one.condition in (Condition.OFFERED, Condition.HEALTHY) for one in _cohort(state)):
        missing = 1  # whether the release does any good is still to be seen, within what is borne
    return _offer_to(state, event, missing)


def _offer_to(state: Rollout, event: Looked, missing: int) -> Moved:
    assert state.stage is not None
    chosen: dict[DeviceId, Sighting] = {}
    for member in state.members:
        if len(chosen) >= missing:
            break
        sighting = event.sightings.get(member.device)
        if not member.is_touched and sighting is not None and stages.can_be_offered(sighting):
            chosen[member.device] = sighting
    if not chosen:
        return state, ()
    cohort = state.stage.cohort
    members = tuple(
        _wanting(member, chosen[member.device], cohort=cohort, at_ms=event.at_ms) if member.device in chosen else member
        for member in state.members
    )
    text = f"offered to {len(chosen)} devices: {_named(list(chosen))}"
    return replace(state, members=members), (Note(at_ms=event.at_ms, actor=HUB, kind="offered", text=text),)


def _wanting(member: Member, sighting: Sighting, *, cohort: int, at_ms: int) -> Member:
    return replace(
        member,
        cohort=cohort,
        condition=Condition.OFFERED,
        wish=Wish.TARGET,
        before=sighting.version or None,
        offered_ms=at_ms,
        resolved_ms=0,
    )


def _is_settled(state: Rollout, event: Looked) -> bool:
    assert state.stage is not None
    if any(member.condition is Condition.OFFERED for member in state.members) or not _bearers(state):
        return False
    if sum(member.is_touched for member in state.members) >= state.sizes[state.stage.index]:
        return True
    return not any(
        member.condition is Condition.WAITING and stages.can_be_offered(event.sightings.get(member.device))
        for member in state.members
    )


# Soaking


def _soak(state: Rollout, event: Looked) -> Moved:
    assert state.stage is not None
    if not _bearers(state):
        return _move(state, stages.Unsettled(event.at_ms)), ()
    over = event.at_ms - state.stage.since_ms >= state.spec.soak_s * 1000
    proved = all(reading.verdict is Verdict.PASS for reading in _deciding(state))
    if not (over and _is_watched(state, event)):
        return state, ()
    if not proved:
        return _widen(state, event)
    state = replace(_move(state, stages.Proved(event.at_ms)), reason="")
    return state, (_stage_note(state, event, "passed", state.readings),)


def _widen(state: Rollout, event: Looked) -> Moved:
    """Where only further devices can say more, offer it to one, though never to more than the next stage has."""
    assert state.stage is not None
    if not any(needs_others(reading) for reading in _deciding(state)):
        return replace(state, reason=""), ()
    touched = sum(member.is_touched for member in state.members)
    sizes = state.sizes
    most = sizes[min(state.stage.index + 1, len(sizes) - 1)]
    after, notes = _offer_to(state, event, 1) if touched < most else (state, ())
    if not notes:
        return _wait(state, event, f"waits: the gates are undecided, and of {most} devices none can be offered it now")
    return replace(_move(after, stages.Unsettled(event.at_ms)), reason=""), notes


def _is_watched(state: Rollout, event: Looked) -> bool:
    """Whether the devices that the stage rests on were there to its end: all within the deadline, half of them now."""
    deadline_ms = state.spec.deadline_s * 1000
    sightings = [event.sightings.get(member.device) for member in _bearers(state)]
    here = sum(sighting is not None and sighting.online for sighting in sightings)
    return 2 * here >= len(sightings) and all(
        sighting is not None and (sighting.online or event.at_ms - sighting.last_seen_ms < deadline_ms)
        for sighting in sightings
    )


def _deciding(state: Rollout) -> list[Reading]:
    """Readings of single profiles can stop a rollout; what lets it advance are those of all devices."""
    return [reading for reading in state.readings if ":" not in reading.gate]


def _bearers(state: Rollout) -> list[Member]:
    """The healthy devices that the stage rests on: of its own cohort, or of all once none is left to be offered it."""
    healthy = [member for member in _cohort(state) if member.condition is Condition.HEALTHY]
    if healthy or any(member.condition is Condition.WAITING for member in state.members):
        return healthy
    return [member for member in state.members if member.condition is Condition.HEALTHY]


def _cohort(state: Rollout) -> list[Member]:
    assert state.stage is not None
    cohort = state.stage.cohort
    return [member for member in state.members if member.is_touched and member.cohort == cohort]


# Leaving a stage


def _pass(state: Rollout, event: Looked) -> Moved:
    """On to the next stage; after the last one the few that were not reached are assigned the release as well."""
    stage = state.stage
    assert stage is not None
    if stage.index + 1 < len(state.sizes):
        following = Stage(
            index=stage.index + 1, phase=StagePhase.PENDING, since_ms=event.at_ms, cohort=stage.cohort + 1
        )
        return replace(state, stage=following, reason=""), ()
    late = [member for member in state.members if member.wish is Wish.NONE]
    if len(late) > _unwatched_limit(state):
        return _stay_open(state, event, late)
    if late:
        members = tuple(_late(member, event) if member.wish is Wish.NONE else member for member in state.members)
        text = f"{len(late)} devices were not reached; the release waits for them"
        note = Note(at_ms=event.at_ms, actor=HUB, kind="offered", text=text)
        return replace(state, members=members, reason=""), (note,)
    if any(member.is_outstanding for member in state.members):
        return state, ()
    text = f"completed: {_counted(state.members)}"
    note = Note(at_ms=event.at_ms, actor=HUB, kind="ended", text=text, readings=state.readings)
    return replace(state, phase=Phase.COMPLETED, reason="", ended_ms=event.at_ms), (note,)


def _unwatched_limit(state: Rollout) -> int:
    healthy = sum(member.condition is Condition.HEALTHY for member in state.members)
    return max(harmed_limit(state.spec, len(state.members)), int(healthy * UNWATCHED_SHARE))


def _stay_open(state: Rollout, event: Looked, late: list[Member]) -> Moved:
    if any(stages.can_be_offered(event.sightings.get(member.device)) for member in late):
        state = _move(state, stages.Reopened(event.at_ms))
        return replace(state, reason=""), (_stage_note(state, event, "goes on with devices that have come since"),)
    limit = _unwatched_limit(state)
    reason = f"waits for devices: {len(late)} were not reached, at most {limit} are given the release unwatched"
    return _wait(state, event, reason)


def _late(member: Member, event: Looked) -> Member:
    sighting = event.sightings.get(member.device)
    before = None if sighting is None else sighting.version or None
    return replace(member, wish=Wish.TARGET, before=before, reason="not reached")


# Small parts


def _wait(state: Rollout, event: Looked, reason: str) -> Moved:
    """Say why nothing goes on; noted once, until it goes on again."""
    note = Note(at_ms=event.at_ms, actor=HUB, kind="waits", text=reason)
    return replace(state, reason=reason), () if state.reason else (note,)


def _move(state: Rollout, event: stages.StageEvent) -> Rollout:
    assert state.stage is not None
    return replace(state, stage=stages.STAGE.decide(state.stage, event).state)


def _stage_note(state: Rollout, event: Looked, what: str, readings: tuple[Reading, ...] = ()) -> Note:
    assert state.stage is not None
    number, size = state.stage.index + 1, state.sizes[state.stage.index]
    text = f"stage {number} of {len(state.sizes)} ({size} devices) {what}"
    return Note(at_ms=event.at_ms, actor=HUB, kind="stage", text=text, readings=readings)


def _named(devices: list[DeviceId]) -> str:
    return ", ".join(devices[:SHOWN]) + (", …" if len(devices) > SHOWN else "")


def _counted(members: Iterable[Member]) -> str:
    counts: dict[str, int] = {}
    for member in members:
        counts[member.condition.value] = counts.get(member.condition.value, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
