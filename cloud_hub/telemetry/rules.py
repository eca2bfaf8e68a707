"""What a batch must be, and which record numbers of a stream have arrived: checks and arithmetic only.

A stream is the records of one (device, epoch, class). Its received numbers are ranges: pairs (first, last), both
inclusive, ascending, neither touching nor overlapping, so that a stream without losses is one range however long.

Rules of this file:
1. A batch is taken only if its columns are exactly what its id says: digest, first and last number, class.
2. The same numbers with other content are a conflict: two devices carry the same epoch (a copied disk), or a device
   was set back to an older disk. Neither may overwrite what is here.

Not here: tables, acknowledgements, time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from shared import limits
from shared.errors import OutriderError, ProtocolViolation
from shared.ids import DeviceId
from shared.telemetry import CLASS_OF, BatchId, Body, DeviceEvent, Outcome, Reading, Record, RecordClass, Result
from shared.wire.columns import decode_columns
from shared.wire.messages import Batch

Range = tuple[int, int]
Ranges = tuple[Range, ...]

MAX_SEQ: Final = 2**53
MAX_STORED_BYTES: Final = 2 * limits.MAX_BATCH_BYTES
"""Of a batch's records once unpacked. Devices cut batches at `MAX_BATCH_BYTES` of unpacked records, and defaults add a
little; but columns can name one long text five hundred times, and would blow up into a hundred megabytes."""
MAX_RANGES: Final = 20_000
"""Gaps a stream may have; each batch rewrites the list, so it must not grow without bound."""

CLASS_NAMES: Final[dict[RecordClass, str]] = {klass: klass.name.lower() for klass in RecordClass}

_EPOCH: Final = re.compile(r"[0-9a-f]{16}")
_KINDS: Final[dict[type[Body], str]] = {Result: "result", Reading: "reading", Outcome: "outcome", DeviceEvent: "event"}
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(dict[str, object])


class TelemetryRefused(OutriderError):
    """The hub will never take this batch; the device keeps the code as an event and goes on."""

    code = "telemetry"


@dataclass(frozen=True, slots=True)
class Stream:
    """Whose records, and of which class."""

    device: DeviceId
    epoch: str
    klass: RecordClass


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it lies in the database; `body` is MessagePack without the kind."""

    seq: int
    at_ms: int
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class OpenBatch:
    """A batch that is what its id says."""

    stream: Stream
    id: BatchId
    records: tuple[StoredRecord, ...]


@dataclass(frozen=True, slots=True)
class Received:
    """What has arrived of a stream. `duplicates` counts records that came again and were dropped."""

    ranges: Ranges = ()
    records: int = 0
    duplicates: int = 0
    conflicts: int = 0


@dataclass(frozen=True, slots=True)
class Merge:
    """What a batch adds: `fresh` is to be inserted; `duplicates` records were here already, with the same content."""

    fresh: tuple[StoredRecord, ...]
    duplicates: int


def class_named(name: str) -> RecordClass | None:
    """The class of this name (`event`, `outcome`, `telemetry`), None for any other."""
    return next((klass for klass, known in CLASS_NAMES.items() if known == name), None)


def open_batch(device: DeviceId, batch: Batch) -> OpenBatch:
    """The batch's records; raises TelemetryRefused when they are not what the id says."""
    claim = batch.batch
    if not _EPOCH.fullmatch(claim.epoch) or claim.klass not in set(RecordClass):
        raise TelemetryRefused("the batch's epoch or class is not one", code="telemetry.malformed")
    if not 1 <= claim.first <= claim.last < MAX_SEQ:
        raise TelemetryRefused("the batch's record numbers are out of order", code="telemetry.numbers")
    digest = hashlib.sha256(batch.columns).hexdigest()
    if not hmac.compare_digest(digest.encode(), claim.digest.encode()):
        raise TelemetryRefused("the batch's columns are not those of its digest", code="telemetry.digest")
    try:
        records = decode_columns(batch.columns)
    except ProtocolViolation as error:
        raise TelemetryRefused(f"the batch does not parse: {error.message}", code="telemetry.columns") from error
    _check_numbers(claim, records)
    klass = RecordClass(claim.klass)
    if any(CLASS_OF[type(record.body)] is not klass for record in records):
        raise TelemetryRefused(f"the batch holds records that are not of class {klass}", code="telemetry.class")
    stream = Stream(device=device, epoch=claim.epoch, klass=klass)
    return OpenBatch(stream=stream, id=claim, records=_stored_all(records))


def _check_numbers(claim: BatchId, records: Sequence[Record]) -> None:
    numbers = [record.seq for record in records]
    if not numbers or len(numbers) > limits.MAX_BATCH_RECORDS:
        raise TelemetryRefused(f"the batch holds {len(numbers)} records", code="telemetry.numbers")
    if (numbers[0], numbers[-1]) != (claim.first, claim.last) or len(set(numbers)) != len(numbers):
        raise TelemetryRefused("the batch's records are not numbered as its id says", code="telemetry.numbers")


def _stored_all(records: Sequence[Record]) -> tuple[StoredRecord, ...]:
    stored: list[StoredRecord] = []
    length = 0
    for record in records:
        stored.append(_stored(record))
        length += len(stored[-1].body)
        if length > MAX_STORED_BYTES:
            raise TelemetryRefused(f"the batch unpacks to over {MAX_STORED_BYTES} bytes", code="telemetry.too_large")
    return tuple(stored)


def _stored(record: Record) -> StoredRecord:
    body = msgspec.structs.asdict(record.body)
    given = {name: value for name, value in body.items() if value is not None}
    return StoredRecord(seq=record.seq, at_ms=record.at_ms, kind=_KINDS[type(record.body)], body=_encoder.encode(given))


def read_body(body: bytes) -> dict[str, object]:
    """The fields of a stored record."""
    return _decoder.decode(body)


def merge(batch: OpenBatch, here: Iterable[StoredRecord]) -> Merge:
    """What the batch adds to these records of its stream; raises TelemetryRefused when one has other content here."""
    known = {record.seq: record for record in here}
    fresh = []
    for record in batch.records:
        if record.seq not in known:
            fresh.append(record)
        elif known[record.seq] != record:
            raise conflict(batch)
    return Merge(fresh=tuple(fresh), duplicates=len(batch.records) - len(fresh))


def conflict(batch: OpenBatch) -> TelemetryRefused:
    """The refusal of numbers that are here with other content."""
    return TelemetryRefused(
        f"records {batch.id.first} to {batch.id.last} of {batch.stream.device} are here with other content",
        code="telemetry.conflict",
        hint="two devices share a copied disk, or the device was set back: enrol it anew with an empty state directory",
    )


# Ranges


def ranges_of(numbers: Iterable[int]) -> Ranges:
    """The numbers, which must ascend, as ranges."""
    found: list[Range] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def union(ranges: Ranges, more: Ranges) -> Ranges:
    """All numbers of both."""
    found: list[Range] = []
    for first, last in sorted((*ranges, *more)):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


def covers(ranges: Ranges, first: int, last: int) -> bool:
    """Whether every number from first to last is in."""
    return any(low <= first and last <= high for low, high in ranges)


def meets(ranges: Ranges, first: int, last: int) -> bool:
    """Whether any number from first to last is in."""
    return any(low <= last and first <= high for low, high in ranges)


def missing(ranges: Ranges) -> Ranges:
    """The numbers from 1 to the highest that are not in."""
    found: list[Range] = []
    expected = 1
    for first, last in ranges:
        if first > expected:
            found.append((expected, first - 1))
        expected = last + 1
    return tuple(found)


def count(ranges: Ranges) -> int:
    """How many numbers are in."""
    return sum(last - first + 1 for first, last in ranges)


def encode_ranges(ranges: Ranges) -> bytes:
    """The ranges' bytes for the database."""
    return _encoder.encode(ranges)


def decode_ranges(data: bytes) -> Ranges:
    """The ranges in these bytes."""
    return msgspec.msgpack.decode(data, type=tuple[tuple[int, int], ...])
