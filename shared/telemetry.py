"""Records: what a device keeps until the hub has it.

A record is one fact, numbered densely within its (epoch, class). Classes are priorities: class 0 is never evicted.
Three kinds of effects must not be confused: a *result* is what the model said, an *outcome* is what turned out to be
true of it, a *reading* is a number from the world, an *event* is something that happened to the device.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final, Literal

import msgspec


class RecordClass(IntEnum):
    """Priority of a record; lower is more precious. EVENT is never evicted, READING is the first to go."""

    EVENT = 0
    OUTCOME = 1
    RESULT = 2
    READING = 3


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="result", tag_field="kind"):
    """A request was answered, or a release was asked for it in vain.

    Attributes:
        request: its id.
        model, version, variant: what answered, or should have.
        rung: where the answer came from; `refused` when the release missed the deadline, failed or was lost.
        label, confidence: of an answer of one row; confidence is 0 to 1, or -1 where the task has none.
        took_us: what the model took for it on this device, without any wait for the hub; 0 where it did not run for
            it. For an answer of the hub (`cloud`), from the request to the answer.
    """

    request: str
    model: str
    version: str
    variant: str
    rung: str
    label: str = ""
    confidence: float = -1.0
    took_us: int = 0


class Reading(msgspec.Struct, frozen=True, kw_only=True, tag="reading", tag_field="kind"):
    """A number from the world, in the unit that the name says (`cpu_temp_c`)."""

    name: str
    value: float


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="outcome", tag_field="kind"):
    """What the application told us was true of an answer.

    Attributes:
        request: id of the answered request.
        model, version, variant: what had answered, filled in by the agent; empty when the agent no longer knows.
        label: the true label, when the application knows it.
        correct: whether the answer was right; derived from `label` where only that was given.
        value: a business figure attached to the answer, unit by agreement.
        latency_us: how long the answer had taken.
        source: who says so: empty for the application, `hub` for a late answer of the hub's larger model.
    """

    request: str
    model: str = ""
    version: str = ""
    variant: str = ""
    label: str | None = None
    correct: bool | None = None
    value: float | None = None
    latency_us: int = 0
    source: str = ""


class DeviceEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="event", tag_field="kind"):
    """Something happened to the device: `release.committed`, `release.refused`, `release.rolled_back`, `host.lost`."""

    name: str
    detail: dict[str, str] = {}


Body = Result | Reading | Outcome | DeviceEvent

CLASS_OF: Final[dict[type, RecordClass]] = {
    DeviceEvent: RecordClass.EVENT,
    Outcome: RecordClass.OUTCOME,
    Result: RecordClass.RESULT,
    Reading: RecordClass.READING,
}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A numbered fact.

    Attributes:
        seq: 1, 2, 3 … within (device, epoch, class), without holes unless a gap record says so.
        at_ms: the device's wall clock when it happened; may be wrong, the hub keeps its own time of arrival beside it.
        body: the fact.
    """

    seq: int
    at_ms: int
    body: Body


class BatchId(msgspec.Struct, frozen=True, kw_only=True):
    """The unit that is sent, acknowledged and deduplicated.

    Attributes:
        epoch: 16 hex digits drawn when the outbox was created; a new disk is a new epoch.
        klass: RecordClass as a number.
        first, last: record numbers, both inclusive.
        digest: SHA-256 over the batch's columns as sent, hex.
    """

    epoch: str
    klass: int
    first: int
    last: int
    digest: str


class Grade(Enum):
    """How much a record is worth to whoever puts it.

    DURABLE: on the disk when its ticket says so. BUFFERED: within the flush interval. MEMORY: with whatever is written
    next, or after thirty seconds; it causes no write of its own. What a crash takes of the last two was never numbered.
    """

    DURABLE = "durable"
    BUFFERED = "buffered"
    MEMORY = "memory"


GapReason = Literal["evicted", "expired", "dropped", "damaged", "refused"]


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Records that will not come; travels as a `Batch` without columns, and is settled like one.

    Attributes:
        reason: `evicted` for room, `expired` by their time to live, `dropped` by a person, `damaged` on the disk,
            `refused` by the hub or the broker for good.
        records: how many of the numbers first to last were waiting; the others had been settled before.
    """

    reason: GapReason
    records: int
