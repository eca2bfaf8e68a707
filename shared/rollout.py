"""A rollout as both sides of REST name it: what is asked for, where it stands, what a gate says.

A rollout brings one release to many devices in stages. Each stage is the first so many devices of one fixed order, so
a later stage contains the earlier ones. Gates read evidence: harmed devices, right and wrong answers, latency.

Not here: what leads to what (cloud_hub/rollouts/rules.py), the tests behind the gates (cloud_hub/rollouts/gates.py).
"""

from __future__ import annotations

import math
import re
from enum import Enum
from itertools import pairwise
from typing import Annotated, Final

import msgspec

from shared.errors import InvalidValue
from shared.ids import DeviceId, FamilyName, ModelVersion, parse_device_id, parse_family, parse_version

DEFAULT_STAGES: Final = ("1%", "5%", "25%", "50%", "100%")
MAX_STAGES: Final = 20
MAX_DEVICES_NAMED: Final = 10_000
MAX_SECONDS: Final = 30 * 24 * 3600
HARMED_SHARE: Final = 0.05
"""Share of the eligible devices that may be harmed where nobody said a number; at least one."""

_PERCENT: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*%")

Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=MAX_SECONDS)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]


class Phase(Enum):
    """Where a rollout stands."""

    DRAFT = "draft"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    ABORTING = "aborting"
    ABORTED = "aborted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"


class StagePhase(Enum):
    """Where the present stage stands: offered, watched, left."""

    PENDING = "pending"
    APPLYING = "applying"
    SOAKING = "soaking"
    PASSED = "passed"
    FAILED = "failed"


class Condition(Enum):
    """What is known of one device.

    WAITING: not offered (it was not its turn, or it was not reachable). OFFERED: told to run the release. HEALTHY: runs
    it and has answered well often enough. HARMED: refused it, failed with it, or went silent over it. UNRESOLVED: is
    reachable and has not got there within the deadline.
    """

    WAITING = "waiting"
    OFFERED = "offered"
    HEALTHY = "healthy"
    HARMED = "harmed"
    UNRESOLVED = "unresolved"


class Wish(Enum):
    """What the rollout wants a device to run: nothing of its own, the release, or what it ran before."""

    NONE = "none"
    TARGET = "target"
    BEFORE = "before"


class Verdict(Enum):
    """What a gate says. WAIT is not a weak PASS: there is too little evidence to say either."""

    PASS = "pass"  # noqa: S105 (a verdict, no password)
    WAIT = "wait"
    FAIL = "fail"


ENDED: Final = frozenset({Phase.COMPLETED, Phase.ABORTED, Phase.ROLLED_BACK})
UNHEALTHY: Final = frozenset({Phase.ABORTED, Phase.ROLLED_BACK})
ACTIVE: Final = frozenset({Phase.RUNNING, Phase.PAUSED, Phase.ABORTING, Phase.ROLLING_BACK})
"""Phases in which no other rollout may touch the same family on the same device."""


class DeviceGate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Harmed devices: a sequential test of their share, beside the absolute `max_harmed`.

    Attributes:
        tolerated, unacceptable: shares of devices between which the test tells.
        alpha: chance to stop a release at or below the tolerated share.
    """

    enabled: bool = True
    tolerated: Share = 0.02
    unacceptable: Share = 0.10
    alpha: Share = 0.01


class OutcomeGate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Wrong answers, against the release before: a sequential test over answers.

    Attributes:
        tolerance: the share of wrong answers may rise by this much and still be called as good as before.
        margin: a rise by this much shall be found.
        alpha: chance to stop a release that is as good as before.
        beta: chance to let a stage advance although the rise is `margin`.
        min_baseline: answers with a known outcome that the release before must have, all devices together.
    """

    enabled: bool = True
    tolerance: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.01
    margin: Share = 0.05
    alpha: Share = 0.01
    beta: Share = 0.05
    min_baseline: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 50


class LatencyGate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """95th percentile of latency, as a ratio to the release before on the same devices.

    Attributes:
        max_ratio: what is still right.
        min_answers: timed answers that both sides must have.
    """

    enabled: bool = True
    max_ratio: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 1.5
    min_answers: Annotated[int, msgspec.Meta(ge=20, le=1_000_000)] = 50


class Gates(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a stage must pass."""

    devices: DeviceGate = DeviceGate()
    outcomes: OutcomeGate = OutcomeGate()
    latency: LatencyGate = LatencyGate()


class Selection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which devices: exactly one of all, those that carry all these labels, and those named."""

    all: bool = False
    labels: dict[str, str] = {}
    devices: tuple[str, ...] = ()


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rollout as an operator asks for it; also the shape of the TOML file.

    Attributes:
        stages: growing sizes, counts of devices or percent of the eligible ones, the last one `100%`.
        soak_s: how long a stage is watched after its last device has settled.
        max_harmed: harmed devices that are still borne, of the whole rollout; one more rolls it back. None takes
            5 % of the eligible devices, at least one.
        max_unresolved: unresolved devices with which a stage may still advance; more pause it. None: as max_harmed.
        min_answers: answers not known to be wrong that a device must give before it counts as healthy.
        deadline_s: after this long without getting there an offered device is unresolved, or harmed if it is silent.
        baseline_s: how far before the start the figures of the release before are read.
    """

    family: FamilyName
    version: ModelVersion
    select: Selection = Selection(all=True)
    stages: tuple[str | int, ...] = DEFAULT_STAGES
    soak_s: Seconds = 1800
    max_harmed: Count | None = None
    max_unresolved: Count | None = None
    min_answers: Count = 20
    deadline_s: Annotated[int, msgspec.Meta(ge=1, le=MAX_SECONDS)] = 1800
    baseline_s: Annotated[int, msgspec.Meta(ge=60, le=MAX_SECONDS)] = 3600
    gates: Gates = Gates()


def parse_spec(document: object) -> Spec:
    """The checked rollout in this document (parsed TOML or JSON); raises InvalidValue that names the field."""
    try:
        spec = msgspec.convert(document, type=Spec)
    except msgspec.ValidationError as error:
        raise InvalidValue(f"rollout: {error}", code="invalid.rollout") from error
    check_spec(spec)
    return spec


def check_spec(spec: Spec) -> None:
    """Raise InvalidValue, naming the field, unless the rollout makes sense."""
    parse_family(spec.family)
    parse_version(spec.version)
    select = spec.select
    if (select.all is True) + bool(select.labels) + bool(select.devices) != 1:
        raise _refused("select", "give exactly one of all = true, labels and devices")
    if len(select.devices) > MAX_DEVICES_NAMED:
        raise _refused("select.devices", f"name at most {MAX_DEVICES_NAMED} devices, or use labels")
    for name in select.devices:
        parse_device_id(name)
    if not 1 <= len(spec.stages) <= MAX_STAGES:
        raise _refused("stages", f"give 1 to {MAX_STAGES} stages")
    shares = [_stage(stage) for stage in spec.stages]
    if shares[-1] != 1.0:
        raise _refused("stages", "the last stage is 100%")
    for kind in (int, float):
        same = [share for share in shares if type(share) is kind]
        if any(after <= before for before, after in pairwise(same)):
            raise _refused("stages", "each stage is larger than the one before")
    devices, outcomes = spec.gates.devices, spec.gates.outcomes
    if devices.unacceptable <= devices.tolerated:
        raise _refused("gates.devices", "`unacceptable` must be above `tolerated`")
    if outcomes.margin <= outcomes.tolerance:
        raise _refused("gates.outcomes", "`margin` must be above `tolerance`")


def stage_sizes(spec: Spec, eligible: int) -> tuple[int, ...]:
    """How many devices are offered by the end of each stage; stages that would add none are left out."""
    sizes: list[int] = []
    for stage in spec.stages:
        share = _stage(stage)
        size = share if isinstance(share, int) else math.ceil(eligible * share - 1e-9)
        size = min(max(1, size), eligible)
        if size > (sizes[-1] if sizes else 0):
            sizes.append(size)
    return tuple(sizes)


def harmed_limit(spec: Spec, eligible: int) -> int:
    """How many harmed devices the rollout bears."""
    return max(1, math.ceil(eligible * HARMED_SHARE)) if spec.max_harmed is None else spec.max_harmed


def unresolved_limit(spec: Spec, eligible: int) -> int:
    """With how many unresolved devices a stage may advance."""
    return harmed_limit(spec, eligible) if spec.max_unresolved is None else spec.max_unresolved


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What one gate said, with the numbers that it said it from.

    Attributes:
        gate: `devices`, `outcomes`, `latency`; with `:PROFILE` where it looked at the devices of one profile.
        why: one sentence.
        figures: every number that went in or came out, by name.
    """

    gate: str
    verdict: Verdict
    why: str
    figures: dict[str, float] = {}


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    """The present stage: `number` counts from 1, `size` is how many devices it may have offered."""

    number: int
    of: int
    size: int
    phase: StagePhase
    since_ms: int


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a rollout."""

    device: DeviceId
    position: int
    condition: Condition
    wish: Wish
    before: str | None
    assignment_version: int
    offered_ms: int
    resolved_ms: int
    reason: str
    settled: bool
    stranded: bool


class RolloutView(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout as REST shows it.

    Attributes:
        devices: how many are in each condition.
        returned: touched devices that are back on what they ran before.
        outstanding: touched devices that shall go back and have not said so yet.
        stranded: devices that cannot be assigned what they should run.
        gates: what the gates said when it was last looked at.
    """

    id: str
    family: str
    version: str
    phase: Phase
    reason: str
    stage: StageView | None
    eligible: int
    devices: dict[str, int]
    returned: int
    outstanding: int
    stranded: int
    max_harmed: int
    gates: tuple[Reading, ...]
    created_ms: int
    created_by: str
    started_ms: int | None
    ended_ms: int | None
    spec: Spec


class DecisionView(msgspec.Struct, frozen=True, kw_only=True):
    """One decision that was taken of a rollout, by whom, and the readings that it was taken from."""

    seq: int
    at_ms: int
    actor: str
    kind: str
    text: str
    readings: tuple[Reading, ...] = ()
    detail: dict[str, str | int | float | bool | None] = {}


class SkippedView(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the rollout is not for, and why."""

    device: str
    reason: str


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage will be.

    Attributes:
        devices: how many will have been offered by its end; `added` how many are new in it.
        profiles: how many devices of each profile it contains.
        missed_rate: a share of harmed devices below this has a chance above 5 % to show not one in this stage.
        bytes: that its new devices fetch at most.
    """

    number: int
    devices: int
    added: int
    profiles: dict[str, int]
    missed_rate: float
    bytes: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a rollout would do, before it does anything.

    Attributes:
        unreachable: eligible devices that are not connected now; they are offered the release when they come.
        without_before: eligible devices that run nothing of the family and so cannot go back.
        before_told, before_wrong: answers of the release before with a known outcome, and how many were wrong.
        answers_to_find, answers_to_clear: answers with a known outcome that the outcome gate needs on average to find
            a rise by its margin, and to clear a release that is as good as before.
        least_s: the soaks alone take this long.
    """

    family: str
    version: str
    manifest: str
    eligible: tuple[str, ...]
    skipped: tuple[SkippedView, ...]
    unreachable: int
    without_before: int
    stages: tuple[StagePlan, ...]
    bytes_per_device: int
    bytes: int
    max_harmed: int
    before_told: int
    before_wrong: int
    answers_to_find: int
    answers_to_clear: int
    least_s: int
    warnings: tuple[str, ...]


def _stage(stage: str | int) -> int | float:
    """A stage's size: a count, or a share of the eligible devices."""
    if isinstance(stage, int):
        if not 1 <= stage <= 1_000_000:
            raise _refused("stages", f"{stage} is not a number of devices")
        return stage
    match = _PERCENT.fullmatch(stage.strip())
    if match is None:
        if stage.strip().isascii() and stage.strip().isdigit():
            return _stage(int(stage.strip()[:9]))
        raise _refused("stages", f"{stage[:20]!r} is neither a number of devices nor a percentage like '5%'")
    share = float(match.group(1)) / 100
    if not 0 < share <= 1:
        raise _refused("stages", f"{stage[:20]!r} is not between 0 and 100 %")
    return share


def _refused(field: str, message: str) -> InvalidValue:
    return InvalidValue(f"{field}: {message}", code="invalid.rollout", hint="see `outrider rollout start --help`")
