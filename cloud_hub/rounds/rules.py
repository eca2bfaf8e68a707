"""What a federated run may be, who takes part, and what its states mean: decisions only, over plain values.

A run's states:

    running ──> building ──> finished      trained; its release candidate is built and measured; it stands
       │           │
       ├───────────┴──> failed             with a code and a reason
       └──────────────> stopped            by an operator

Not here: arithmetic on weights (a Flower strategy, in the worker), storage, sending.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec

from shared.errors import InvalidValue
from shared.ids import DeviceId, FamilyName, ModelVersion, parse_family, parse_version
from shared.model import is_learned

State = Literal["running", "building", "finished", "failed", "stopped"]
Phase = Literal["train", "evaluate"]

ACTIVE: Final[tuple[State, ...]] = ("running", "building")
STRATEGIES: Final = (
    "fedavg",
    "fedprox",
    "fedadam",
    "fedyogi",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
)
WEIGHT: Final = "head.weight"
BIAS: Final = "head.bias"

MAX_ROUNDS: Final = 1000
MAX_COHORT: Final = 10_000
MAX_ROUND_TIMEOUT_S: Final = 7 * 24 * 3600
MAX_ATTEMPTS: Final = 3
"""How often a round is asked for when too few good answers came."""
MAX_CRASHES: Final = 3
"""How often the worker may end by itself between two finished rounds."""
MAX_ACTIVE: Final = 4
"""Runs at a time: each has a process of its own that holds Flower."""
MAX_REASONS: Final = 20
MAX_REASON_CHARS: Final = 300
_MESSAGE: Final = re.compile(r"(?P<run>.+)-(?P<number>[1-9][0-9]{0,5})[te][1-9]-(?P<node>[0-9a-f]{16})")


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run that somebody wants.

    Attributes:
        family, base: the published release whose features are kept and whose head is learned anew.
        version: what the result will be called.
        min_devices: so many must be there before a round begins.
        quorum: so many good answers make a round; None asks for as many as `min_devices`.
        round_timeout_s: a round's answers are worth something for so long.
        learning_rate, epochs, batch_size: how devices train.
        seed: of everything that is drawn, here and on devices.
        selector: labels that a device must carry to take part.
        features: the output that holds the features; None finds it.
        evaluate: whether devices also measure each round's result on what they hold.
        learned: whether it starts from the base's own head and its result is a learned release: signed by the hub,
            within the bounds that the base's manifest sets.
    """

    family: FamilyName
    base: ModelVersion
    version: ModelVersion
    rounds: int = 10
    strategy: str = "fedavg"
    min_devices: int = 2
    quorum: int | None = None
    round_timeout_s: float = 120.0
    learning_rate: float = 0.1
    epochs: int = 1
    batch_size: int = 16
    seed: int = 0
    selector: dict[str, str] = {}
    features: str | None = None
    evaluate: bool = False
    learned: bool = False

    @property
    def needed(self) -> int:
        """The good answers that make a round."""
        return self.min_devices if self.quorum is None else self.quorum


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """The last layer of the base: the output that feeds it, how wide that is, and how many classes come out."""

    features: str
    width: int
    classes: int


class RoundResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a round.

    Attributes:
        attempt: 1 unless it had to be asked for again.
        asked, answered, accepted: devices that got the task, sent anything in time, and sent something usable.
        took_ms: from the first task to the stored result.
        metrics: `accuracy` and `loss` on the base's golden set; `train.…` and `evaluate.…` as the devices measured,
            weighted by what they hold.
        refused: device to reason, for answers that were errors or not usable; the first few.
    """

    round: int
    attempt: int
    asked: int
    answered: int
    accepted: int
    took_ms: int
    metrics: dict[str, float]
    refused: dict[str, str] = {}


def check_spec(spec: Spec) -> None:
    """Raise InvalidValue naming the field unless such a run can be held."""
    parse_family(spec.family)
    parse_version(spec.base)
    parse_version(spec.version)
    if spec.version == spec.base:
        _refuse("version", "the result needs a version of its own")
    if spec.learned != is_learned(spec.version):
        _refuse("version", "a learned result, and no other, has a version like 1.2.0-learned.1")
    if spec.strategy not in STRATEGIES:
        raise InvalidValue(
            f"there is no strategy {spec.strategy[:40]!r}",
            code="invalid.strategy",
            hint=f"one of {', '.join(STRATEGIES)}",
        )
    if not 1 <= spec.rounds <= MAX_ROUNDS:
        _refuse("rounds", f"give 1 to {MAX_ROUNDS}")
    if not 1 <= spec.min_devices <= MAX_COHORT:
        _refuse("min_devices", f"give 1 to {MAX_COHORT}")
    if not 1 <= spec.needed <= spec.min_devices:
        _refuse("quorum", f"give 1 to {spec.min_devices}, the least number of devices that a round begins with")
    if not 1 <= spec.round_timeout_s <= MAX_ROUND_TIMEOUT_S:
        _refuse("round_timeout_s", f"give 1 to {MAX_ROUND_TIMEOUT_S} seconds")
    if not (math.isfinite(spec.learning_rate) and 0 < spec.learning_rate <= 1000):
        _refuse("learning_rate", "give a number above 0, at most 1000")
    if not 1 <= spec.epochs <= 1000:
        _refuse("epochs", "give 1 to 1000")
    if not 1 <= spec.batch_size <= 65_536:
        _refuse("batch_size", "give 1 to 65536")
    if not 0 <= spec.seed < 2**31:
        _refuse("seed", "give a whole number from 0 to 2147483647")
    if len(spec.selector) > 16:
        _refuse("selector", "give at most 16 labels")


def node_of(device: DeviceId) -> int:
    """The device's number in Flower messages: the same in every run, so that sums are formed in the same order."""
    return int.from_bytes(hashlib.sha256(device.encode()).digest()[:8], "big") >> 1 | 1


def run_number(run: str) -> int:
    """The run's number in Flower messages."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "big") >> 1 | 1


def message_of(run: str, *, number: int, phase: Phase, attempt: int, node: int) -> str:
    """The name of a task: the same whenever the same round is asked for again, so that answers are never doubled."""
    return f"{run}-{number}{phase[0]}{attempt}-{node:016x}"


def round_of(message: str, *, run: str, node: int) -> int | None:
    """The round of a task by its name; None when that is no task of this run for this node."""
    match = _MESSAGE.fullmatch(message)
    if match is None or match["run"] != run or int(match["node"], 16) != node:
        return None
    return int(match["number"])


def group_of(number: int, *, phase: Phase, attempt: int) -> str:
    """The name of all tasks of one attempt at a phase of a round."""
    return f"{number}{phase[0]}{attempt}"


def takes_part(
    spec: Spec, *, labels: Mapping[str, str], online: bool, reported: Mapping[str, Any], standing: str = ""
) -> bool:
    """Whether a device can be asked now: it is here and welcome, it carries the labels, and it serves the base."""
    if standing or not online or not spec.selector.items() <= labels.items():
        return False
    return any(
        model.get("family") == spec.family and model.get("version") == spec.base for model in reported.get("models", ())
    )


def may_begin(spec: Spec, present: Iterable[DeviceId], *, expected: Iterable[DeviceId], waited: bool) -> bool:
    """Whether a round begins with these devices: enough are here, and nobody of the last round is on their way back.

    Args:
        expected: who took part in the last round. After a restart of the hub they come back one by one, and a round
            with the first few of them would learn something else than the run that was not disturbed.
        waited: whether they were given their time to come back.
    """
    here = set(present)
    return len(here) >= spec.min_devices and (waited or here >= set(expected))


def _refuse(field: str, message: str) -> None:
    raise InvalidValue(f"{field}: {message}", code="invalid.round")
