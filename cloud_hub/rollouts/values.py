"""The words of the rollout machine: what is persisted, what happens, what is noted.

Rules of this file:
1. The state says what every device shall run (`Member.wish`); carrying that out can be tried any number of times, so
   nothing has to be remembered between a decision and its effect but the state.
2. Times are the hub's wall clock: a rollout outlives the process that runs it.

Not here: what leads to what (rules.py, stages.py), tables, time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from cloud_hub.rollouts.answers import Answers, Expected
from shared.ids import DeviceId
from shared.rollout import Condition, Phase, Reading, Spec, StagePhase, Wish


class Member(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device of a rollout.

    Attributes:
        position: its place in the order in which devices are chosen, from 0.
        cohort: which one it was offered the release with, 0 before; each stage that begins is a new cohort.
        before: the version that it ran when it was offered the release, None when it ran none.
        wish: what it shall run; `assignment_version` is the assignment that says so, 0 until there is one.
        offered_ms: when the release was offered, 0 before.
        resolved_ms: when its condition became what it is.
        reason: why it is in that condition.
        acknowledged: somebody resumed the rollout knowing that it is harmed or unresolved.
        settled: it shall go back and runs again what it ran before.
        stranded: its wish cannot be carried out, `reason` says why.
        expected_wrong, expected_weight: share of wrong answers that is expected of it, and for how many answers that
            counts; the weight is 0 until it is known. Made once: what is measured against must not move.
    """

    device: DeviceId
    position: int
    profile: str = ""
    cohort: int = 0
    condition: Condition = Condition.WAITING
    wish: Wish = Wish.NONE
    before: str | None = None
    assignment_version: int = 0
    offered_ms: int = 0
    resolved_ms: int = 0
    reason: str = ""
    acknowledged: bool = False
    settled: bool = False
    stranded: bool = False
    expected_wrong: float = 0.0
    expected_weight: float = 0.0

    @property
    def is_touched(self) -> bool:
        """Whether it was offered the release while it could be watched."""
        return self.condition is not Condition.WAITING

    @property
    def is_outstanding(self) -> bool:
        """Whether its wish has no assignment yet."""
        return self.wish is not Wish.NONE and self.assignment_version == 0 and not self.stranded

    @property
    def expected(self) -> Expected | None:
        """What is expected of it, None while that is not known."""
        return Expected(self.expected_wrong, self.expected_weight) if self.expected_weight else None


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """The present stage: `index` into the sizes, since when it is in its phase, and the cohort that it offers to."""

    index: int
    phase: StagePhase
    since_ms: int
    cohort: int = 1


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout's whole state.

    Attributes:
        manifest: SHA-256 of the release's manifest.
        sizes: how many devices are offered by the end of each stage.
        members: by position; kept in a table of their own.
        reverting: an abort gives the devices back what they ran before.
        ending_since_ms: when it began to roll back or to abort, 0 before.
        readings: what the gates said last.
        revision: grows with every change that is stored.
    """

    id: str
    spec: Spec
    manifest: str
    created_ms: int
    created_by: str
    phase: Phase = Phase.DRAFT
    reason: str = ""
    sizes: tuple[int, ...] = ()
    stage: Stage | None = None
    members: tuple[Member, ...] = ()
    reverting: bool = False
    started_ms: int = 0
    ended_ms: int = 0
    ending_since_ms: int = 0
    readings: tuple[Reading, ...] = ()
    revision: int = 0


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """A device as the devices room knows it now, with its slot of the rollout's family.

    Attributes:
        phase: of the slot, empty where there is none.
        version, manifest: what serves now, empty when nothing does.
        candidate: what is on its way in.
        error_code: why the last attempt ended; `failed` is the manifest that it was for, empty from a device that does
            not say.
        standing: `quarantined` or `revoked` where it shall have nothing; empty else.
    """

    device: DeviceId
    profile: str = ""
    labels: Mapping[str, str] = {}
    online: bool = False
    last_seen_ms: int = 0
    assignment_version: int = 0
    phase: str = ""
    version: str = ""
    manifest: str = ""
    candidate: str = ""
    error_code: str = ""
    error: str = ""
    failed: str = ""
    standing: str = ""


class Seen(msgspec.Struct, frozen=True):
    """Figures of one version on one device."""

    device: DeviceId
    version: str
    answers: Answers


# Events


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """An operator starts it with these devices, in the order of offers."""

    at_ms: int
    actor: str
    members: tuple[Member, ...]


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """The controller has looked at the fleet.

    Attributes:
        watching_since_ms: since when births and deaths are heard without a break; silence before that says nothing.
        sightings: of every member that still exists.
        new: figures of devices that were offered the release, since then; of some others, the control, since the start.
        old: figures since the baseline's beginning.
    """

    at_ms: int
    watching_since_ms: int
    sightings: Mapping[DeviceId, Sighting]
    new: Sequence[Seen] = ()
    old: Sequence[Seen] = ()


class WishesDone(msgspec.Struct, frozen=True, kw_only=True):
    """Assignments were made for these devices (by version), or cannot be made (by reason)."""

    at_ms: int
    wish: Wish
    assigned: Mapping[DeviceId, int]
    impossible: Mapping[DeviceId, str] = {}


class PauseAsked(msgspec.Struct, frozen=True, kw_only=True):
    """An operator wants it to wait."""

    at_ms: int
    actor: str
    reason: str = ""


class ResumeAsked(msgspec.Struct, frozen=True, kw_only=True):
    """An operator wants it to go on, and has seen what failed so far."""

    at_ms: int
    actor: str


class AbortAsked(msgspec.Struct, frozen=True, kw_only=True):
    """An operator ends it; `reverting` gives the devices back what they ran before."""

    at_ms: int
    actor: str
    reverting: bool


Event = Started | Looked | WishesDone | PauseAsked | ResumeAsked | AbortAsked


# Effects


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """A decision to keep with its evidence, in the transaction that stores the state.

    Attributes:
        kind: `drafted`, `started`, `offered`, `device`, `stage`, `waits`, `paused`, `resumed`, `failed`, `aborting`,
            `returned`, `ended`.
    """

    at_ms: int
    actor: str
    kind: str
    text: str
    readings: tuple[Reading, ...] = ()
    detail: dict[str, str | int | float | bool | None] = {}


Effect = Note
HUB: Final = "hub"
"""The actor of decisions that no person took."""
