"""The stage machine, and the judgement of one device: healthy, harmed, or not yet known.

Rules of this file:
1. Healthy is what the device shows, not what was sent: its newest report says that the release's manifest is
   committed and serves, and telemetry has its good answers.
2. A device that reports a failure, or was offered the release and then stays silent, is harmed, also when it was
   healthy before: a release may kill late. What failed for want of a network or a disk is not the release's doing:
   such a device is unresolved.
3. Silence is judged only by who was listening: time before `watching_since_ms` does not count.
4. Harmed stays harmed, whatever comes later: evidence is not taken back.

Not here: what moves a stage (progress.py), gates (gates.py).
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec.structs import replace

from cloud_hub.rollouts.answers import Answers
from cloud_hub.rollouts.values import Member, Rollout, Sighting, Stage
from shared.machine import Decision, Row, Table
from shared.results import Blame, blame
from shared.rollout import Condition, StagePhase

COMMITTED: Final = "committed"
SETTLED_PHASES: Final = frozenset({"", "idle", COMMITTED})
"""Phases of a device's slot in which nothing is on its way in or out."""
ENDED_PHASES: Final = frozenset({"idle", COMMITTED, "rolling_back"})


class Opened(msgspec.Struct, frozen=True):
    """Its turn has come."""

    at_ms: int


class Settled(msgspec.Struct, frozen=True):
    """Every device that was offered the release is healthy, harmed or unresolved; of this cohort one is healthy."""

    at_ms: int


class Unsettled(msgspec.Struct, frozen=True):
    """No device of its cohort is healthy any more, or another one is needed."""

    at_ms: int


class Proved(msgspec.Struct, frozen=True):
    """It was watched long enough and every gate passes."""

    at_ms: int


class Reopened(msgspec.Struct, frozen=True):
    """It had passed, and devices that could not be reached then are here now: a new cohort."""

    at_ms: int


class Disproved(msgspec.Struct, frozen=True):
    """A gate failed."""

    at_ms: int


StageEvent = Opened | Settled | Unsettled | Proved | Reopened | Disproved


def _to(phase: StagePhase) -> Row[StagePhase, Stage, None]:
    def step(stage: Stage, event: StageEvent) -> Decision[Stage, None]:
        return Decision(replace(stage, phase=phase, since_ms=event.at_ms))

    return Row(leads_to=(phase,), step=step)


def _reopened(stage: Stage, event: Reopened) -> Decision[Stage, None]:
    return Decision(replace(stage, phase=StagePhase.APPLYING, since_ms=event.at_ms, cohort=stage.cohort + 1))


STAGE: Final[Table[StagePhase, Stage, StageEvent, None]] = Table(
    "rollout stage",
    phase_of=lambda stage: stage.phase,
    rows={
        (StagePhase.PENDING, Opened): _to(StagePhase.APPLYING),
        (StagePhase.APPLYING, Settled): _to(StagePhase.SOAKING),
        (StagePhase.SOAKING, Unsettled): _to(StagePhase.APPLYING),
        (StagePhase.SOAKING, Proved): _to(StagePhase.PASSED),
        (StagePhase.PASSED, Reopened): Row(leads_to=(StagePhase.APPLYING,), step=_reopened),
        (StagePhase.PENDING, Disproved): _to(StagePhase.FAILED),
        (StagePhase.APPLYING, Disproved): _to(StagePhase.FAILED),
        (StagePhase.SOAKING, Disproved): _to(StagePhase.FAILED),
        (StagePhase.PASSED, Disproved): _to(StagePhase.FAILED),
    },
    ends=(StagePhase.FAILED,),
)


def can_be_offered(sighting: Sighting | None) -> bool:
    """Whether a device is here, nothing is on its way in or out of the slot, and what it runs can be told."""
    if sighting is None or not sighting.online or sighting.standing:
        return False
    if sighting.candidate or sighting.phase not in SETTLED_PHASES:
        return False
    return sighting.phase != COMMITTED or bool(sighting.version)


def judge(
    member: Member, sighting: Sighting | None, answers: Answers, *, rollout: Rollout, at_ms: int, watching_since_ms: int
) -> Member:
    """The member with what is known of it now; the same object when nothing has changed."""
    if member.assignment_version == 0 or member.condition in (Condition.WAITING, Condition.HARMED):
        return member
    if sighting is None:
        return _become(member, Condition.HARMED, "it is no longer in the fleet", at_ms=at_ms)
    if sighting.standing:
        return _become(member, Condition.HARMED, f"it was {sighting.standing}", at_ms=at_ms)
    has_it = sighting.assignment_version >= member.assignment_version
    if has_it and (failure := _failure(sighting, rollout.manifest)):
        return _become(member, Condition.HARMED, failure, at_ms=at_ms)
    deadline_ms = rollout.spec.deadline_s * 1000
    since_ms = max(member.offered_ms, watching_since_ms)
    silent_ms = silence_ms(sighting, since_ms=since_ms, at_ms=at_ms)
    if silent_ms >= deadline_ms:
        why = f"silent for {silent_ms // 1000} s since it was offered the release"
        return _become(member, Condition.HARMED, why, at_ms=at_ms)
    if has_it and _runs_it(sighting, rollout) and answers.good >= rollout.spec.min_answers:
        return _become(member, Condition.HEALTHY, "", at_ms=at_ms)
    if sighting.online and member.condition is Condition.OFFERED and at_ms - since_ms >= deadline_ms:
        return _become(member, Condition.UNRESOLVED, _where(sighting, answers, rollout), at_ms=at_ms)
    return member


def silence_ms(sighting: Sighting, *, since_ms: int, at_ms: int) -> int:
    """How long nothing was heard of a device, counted from `since_ms` at the earliest; zero while it is online."""
    return 0 if sighting.online else at_ms - max(since_ms, sighting.last_seen_ms)


def is_back(member: Member, sighting: Sighting | None) -> bool:
    """Whether a device that shall go back runs again what it ran before."""
    return (
        sighting is not None
        and member.assignment_version > 0
        and sighting.assignment_version >= member.assignment_version
        and sighting.version == member.before
        and sighting.phase == COMMITTED
    )


def _become(member: Member, condition: Condition, reason: str, *, at_ms: int) -> Member:
    if member.condition is condition:
        return member
    return replace(member, condition=condition, reason=reason, resolved_ms=at_ms, acknowledged=False)


def _runs_it(sighting: Sighting, rollout: Rollout) -> bool:
    return sighting.manifest == rollout.manifest and sighting.phase == COMMITTED


def _failure(sighting: Sighting, manifest: str) -> str:
    """Why the device gave the release up, in its own words; empty while it has not, and for another one's failure."""
    code = sighting.error_code
    if sighting.failed not in ("", manifest):
        return ""
    if not code or sighting.candidate or sighting.phase not in ENDED_PHASES or blame(code) is Blame.ELSEWHERE:
        return ""
    return f"{code}: {sighting.error[:200]}" if sighting.error else code


def _where(sighting: Sighting, answers: Answers, rollout: Rollout) -> str:
    """How far an unresolved device got."""
    if _runs_it(sighting, rollout):
        return f"runs it, with {answers.good} good answers of {rollout.spec.min_answers}"
    error = f" ({sighting.error_code})" if sighting.error_code else ""
    return f"{sighting.phase or 'nothing installed'}{error} when the deadline passed"
