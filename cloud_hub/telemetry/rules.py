"""What a batch must be: checks only.

A stream is the records of one (device, epoch, class). A batch is taken only if what it carries is exactly what its id
says: digest, first and last number, class. Nothing is unpacked for that, because what a batch holds is stored as it
came.

Not here: what is here already (`taking.py`), tables, acknowledgements, time.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from typing import Final

import msgspec

from shared import limits
from shared.errors import OutriderError, ProtocolViolation
from shared.ids import DeviceId
from shared.telemetry import BatchId, Gap, Record, RecordClass
from shared.wire.columns import Columns, open_columns
from shared.wire.messages import Batch, digest_of

MAX_SEQ: Final = 2**53
MAX_SPAN: Final = 2048
"""From the first to the last number of a batch with records, holes included."""

CLASS_NAMES: Final[dict[RecordClass, str]] = {klass: klass.name.lower() for klass in RecordClass}

_EPOCH: Final = re.compile(r"[0-9a-f]{16}")
_CLASSES: Final = {int(klass): klass for klass in RecordClass}

assert MAX_SPAN >= limits.MAX_BATCH_RECORDS


class TelemetryRefused(OutriderError):
    """The hub will never take this batch; the device puts it aside with the code and goes on."""

    code = "telemetry"


class Stream(msgspec.Struct, frozen=True, order=True):
    """Whose records, and of which class."""

    device: DeviceId
    epoch: str
    klass: RecordClass


@dataclass(frozen=True, slots=True)
class Opened:
    """A batch that is what its id says.

    Attributes:
        columns: as they came; empty for a gap.
        content: what the columns hold; None for a gap.
        gap: why the numbers will not come; None for records.
    """

    stream: Stream
    id: BatchId
    columns: bytes
    content: Columns | None
    gap: Gap | None


def class_named(name: str) -> RecordClass | None:
    """The class of this name (`event`, `outcome`, `result`, `reading`), None for any other."""
    return next((klass for klass, known in CLASS_NAMES.items() if known == name), None)


def open_batch(device: DeviceId, batch: Batch) -> Opened:
    """The batch, checked; raises TelemetryRefused when it is not what its id says."""
    claim, gap = batch.batch, batch.gap
    klass = _CLASSES.get(claim.klass)
    if klass is None or not _EPOCH.fullmatch(claim.epoch):
        raise TelemetryRefused("the batch's epoch or class is not one", code="telemetry.malformed")
    if not 1 <= claim.first <= claim.last < MAX_SEQ:
        raise TelemetryRefused("the batch's record numbers are out of order", code="telemetry.numbers")
    digest = digest_of(columns=batch.columns, gap=gap)
    if not hmac.compare_digest(digest.encode(), claim.digest.encode()):
        raise TelemetryRefused("what the batch carries is not what its digest says", code="telemetry.digest")
    stream = Stream(device, claim.epoch, klass)
    if gap is None:
        content = _open_columns(claim, batch.columns, klass)
        return Opened(stream=stream, id=claim, columns=batch.columns, content=content, gap=None)
    if batch.columns:
        raise TelemetryRefused("the batch holds records and says that they will not come", code="telemetry.malformed")
    if not 0 <= gap.records <= claim.last - claim.first + 1:
        raise TelemetryRefused("the gap counts more records than it has numbers", code="telemetry.numbers")
    return Opened(stream=stream, id=claim, columns=b"", content=None, gap=gap)


def explode(columns: bytes) -> list[Record]:
    """The records of a stored batch; raises ProtocolViolation when they were damaged."""
    return open_columns(columns).records()


def _open_columns(claim: BatchId, columns: bytes, klass: RecordClass) -> Columns:
    try:
        content = open_columns(columns)
    except ProtocolViolation as error:
        code = "telemetry.too_large" if error.code == "protocol.too_large" else "telemetry.columns"
        raise TelemetryRefused(f"the batch does not parse: {error.message}", code=code) from error
    if not content.count:
        raise TelemetryRefused("the batch holds no records", code="telemetry.numbers")
    # Class and kind have the same name.
    if content.kinds != (CLASS_NAMES[klass],):
        raise TelemetryRefused(f"the batch holds records that are not of class {klass}", code="telemetry.class")
    if (content.runs[0][0], content.runs[-1][1]) != (claim.first, claim.last):
        raise TelemetryRefused("the batch's records are not numbered as its id says", code="telemetry.numbers")
    if claim.last - claim.first >= MAX_SPAN:
        raise TelemetryRefused("the batch's records lie too far apart", code="telemetry.numbers")
    return content
