"""The stage machine, and the judgement of one device: healthy, harmed, or not yet known.

Rules of this file:
1. Healthy is what the device shows, not what was sent: its newest report says that the release's manifest is
   committed and serves, and telemetry has its good answers.
2. A device that reports a failure, or was offered the release and then stays silent, is harmed. What failed for want
   of a network or a disk is not the release's doing: such a device is unresolved.
3. Silence is judged only by who was listening: time before `watching_since_ms` does not count.
4. Harmed stays harmed, whatever comes later: evidence is not taken back.

Not here: stages as a whole and gates (rules.py).
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec.structs import replace

from cloud_hub.rollouts.gates import Answers
from cloud_hub.rollouts.values import Member, Rollout, Sighting, Stage
from shared.machine import Decision, Row, Table
from shared.rollout import Condition, StagePhase

COMMITTED: Final = "committed"
SETTLED_PHASES: Final = frozenset({"", "idle", COMMITTED})
"""Phases of a device's slot in which nothing is on its way in or out."""
ENDED_PHASES: Final = frozenset({"idle", COMMITTED, "rolling_back"})
NOT_ITS_FAULT: Final = ("transfer.", "storage.")


class Opened(msgspec.Struct, frozen=True):
    """Its turn has come."""

    at_ms: int


class Settled(msgspec.Struct, frozen=True):
    """Every device that was offered the release is healthy, harmed or unresolved, and one at least is healthy."""

    at_ms: int


class Unsettled(msgspec.Struct, frozen=True):
    """No device is healthy any more."""

    at_ms: int


class Proved(msgspec.Struct, frozen=True):
    """It was watched long enough and every gate passes."""

    at_ms: int


class Disproved(msgspec.Struct, frozen=True):
    """A gate failed."""

    at_ms: int


StageEvent = Opened | Settled | Unsettled | Proved | Disproved


def _to(phase: StagePhase) -> Row[StagePhase, Stage, None]:
    def step(stage: Stage, event: StageEvent) -> Decision[Stage, None]:
        return Decision(replace(stage, phase=phase, since_ms=event.at_ms))

    return Row(leads_to=(phase,), step=step)


STAGE: Final[Table[StagePhase, Stage, StageEvent, None]] = Table(
    "rollout stage",
    phase_of=lambda stage: stage.phase,
    rows={
        (StagePhase.PENDING, Opened): _to(StagePhase.APPLYING),
        (StagePhase.APPLYING, Settled): _to(StagePhase.SOAKING),
        (StagePhase.SOAKING, Unsettled): _to(StagePhase.APPLYING),
        (StagePhase.SOAKING, Proved): _to(StagePhase.PASSED),
        (StagePhase.PENDING, Disproved): _to(StagePhase.FAILED),
        (StagePhase.APPLYING, Disproved): _to(StagePhase.FAILED),
        (StagePhase.SOAKING, Disproved): _to(StagePhase.FAILED),
        (StagePhase.PASSED, Disproved): _to(StagePhase.FAILED),
    },
    ends=(StagePhase.FAILED,),
)


def can_be_offered(sighting: Sighting | None) -> bool:
    """Whether a device is here, nothing is on its way in or out of the slot, and what it runs can be told."""
    if sighting is None or not sighting.online or sighting.candidate or sighting.phase not in SETTLED_PHASES:
        return False
    return sighting.phase != COMMITTED or bool(sighting.version)


def judge(
    member: Member, sighting: Sighting | None, answers: Answers, *, rollout: Rollout, at_ms: int, watching_since_ms: int
) -> Member:
    """The member with what is known of it now; the same object when nothing has changed."""
    if member.assignment_version == 0 or member.condition in (Condition.WAITING, Condition.HARMED):
        return member
    spec = rollout.spec
    if sighting is None:
        return _become(member, Condition.HARMED, "it is no longer in the fleet", at_ms=at_ms)
    if sighting.assignment_version >= member.assignment_version:
        failure = _failure(sighting)
        if failure:
            return _become(member, Condition.HARMED, failure, at_ms=at_ms)
        runs_it = sighting.manifest == rollout.manifest and sighting.phase == COMMITTED
        if runs_it and answers.good >= spec.min_answers:
            return _become(member, Condition.HEALTHY, "", at_ms=at_ms)
    if member.condition is Condition.HEALTHY:
        return member
    deadline_ms = spec.deadline_s * 1000
    if not sighting.online:
        heard_ms = max(member.offered_ms, sighting.last_seen_ms, watching_since_ms)
        if at_ms - heard_ms >= deadline_ms:
            why = f"silent for {(at_ms - heard_ms) // 1000} s since it was offered the release"
            return _become(member, Condition.HARMED, why, at_ms=at_ms)
    elif at_ms - member.offered_ms >= deadline_ms:
        return _become(member, Condition.UNRESOLVED, _where(sighting, answers, rollout), at_ms=at_ms)
    return member


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


def _failure(sighting: Sighting) -> str:
    """Why the device gave the release up, in its own words; empty while it has not."""
    code = sighting.error_code
    if not code or sighting.candidate or sighting.phase not in ENDED_PHASES or code.startswith(NOT_ITS_FAULT):
        return ""
    return f"{code}: {sighting.error[:200]}" if sighting.error else code


def _where(sighting: Sighting, answers: Answers, rollout: Rollout) -> str:
    """How far an unresolved device got."""
    if sighting.manifest == rollout.manifest and sighting.phase == COMMITTED:
        return f"runs it, with {answers.good} good answers of {rollout.spec.min_answers}"
    error = f" ({sighting.error_code})" if sighting.error_code else ""
    return f"{sighting.phase or 'nothing installed'}{error} when the deadline passed"
