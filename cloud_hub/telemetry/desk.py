"""The telemetry desk: takes batches, stores each record once, acknowledges after the commit, and answers questions.

Rules:
1. Batches, what is known of their streams and the figures that gates read are written in one transaction; the
   acknowledgements go out after it. A hub that dies in between is sent the batches again and answers `duplicate`.
2. What cannot be stored now is not answered: the device has it and sends it again.
3. What can never be stored is answered `refused` with the reason.
4. Batches that came together are opened and stored together, in one step of one thread and one commit, and answered
   in one message for each device: more load makes larger groups, not more of them.

Not here: MQTT, envelopes, devices, what a batch adds (`taking.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
from sqlalchemy.engine import Connection

from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.telemetry import rules, tables
from cloud_hub.telemetry.figures import Figures, minute_of
from cloud_hub.telemetry.rules import CLASS_NAMES, MAX_SPAN, Opened, Stream, TelemetryRefused
from cloud_hub.telemetry.taking import Lost, Received, Taken, take_all
from shared import limits, ranges
from shared.clock import Clock
from shared.errors import OutriderError, ProtocolViolation, StorageError
from shared.ids import DeviceId
from shared.telemetry import BatchId, Record, RecordClass
from shared.wire.messages import Ack, Batch, Verdict

logger = logging.getLogger(__name__)

PAUSE_S: Final = 0.5
"""After a failed commit, so that a full disk does not make a busy loop."""
_MAX_NOTED: Final = 1000

SendAck = Callable[[DeviceId, Ack], Awaitable[None]]


class Parcel(Protocol):
    """A batch that has come in and is not opened yet."""

    def open(self) -> tuple[DeviceId, Batch] | None:
        """Whom it is from, and what; None when it is nothing that can be answered. May be called in any thread."""
        ...


@dataclass(frozen=True, slots=True)
class StoredEffect:
    """A record as the desk tells it; `id` grows in the order of arrival: the batch's, then the place in it."""

    id: int
    epoch: str
    klass: str
    seq: int
    at_ms: int
    received_ms: int
    kind: str
    body: dict[str, object]


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """What has arrived of one stream.

    Attributes:
        records: how many, each counted once.
        first, last: lowest and highest number; 0 when there are none.
        watermark: up to here no number is waited for: each is here, or declared lost.
        missing: ranges from 1 to `last` that have not arrived and are not declared lost.
        lost: what the device said will not come.
        duplicates: records that came again and were dropped.
        conflicts: batches refused because their numbers are here with other content: a copied disk, or one set back.
    """

    epoch: str
    klass: str
    records: int
    first: int
    last: int
    watermark: int
    missing: ranges.Ranges
    lost: tuple[Lost, ...]
    duplicates: int
    conflicts: int
    first_received_ms: int
    last_received_ms: int


@dataclass(frozen=True, slots=True)
class _Group:
    """What became of parcels that were stored together; `opened` and `taken` in the same order, without refusals."""

    verdicts: dict[DeviceId, list[Verdict]]
    opened: list[Opened]
    taken: list[Taken]
    refused: list[tuple[DeviceId, str]]


class Desk:
    """The one face of the room.

    Args:
        database: with the schema of this version.
        clock: for the time of arrival.
        metrics: gets the room's figures.
        send_ack: hands an acknowledgement to the link; raises OutriderError when it cannot.
    """

    def __init__(self, *, database: Database, clock: Clock, metrics: Metrics, send_ack: SendAck) -> None:
        self._database = database
        self._clock = clock
        self._send_ack = send_ack
        self._failing = False
        self._noted: set[tuple[DeviceId, str]] = set()
        self._batches = metrics.counter("outrider_hub_batches_total", "Batches from devices by outcome.", ("outcome",))
        self._records = metrics.counter("outrider_hub_records_total", "Records stored, each once.", ("klass",))
        self._duplicates = metrics.counter("outrider_hub_duplicate_records_total", "Records that came again.")
        self._lost = metrics.counter("outrider_hub_lost_records_total", "Records that devices declared lost.")
        self._commit_seconds = metrics.histogram("outrider_hub_commit_seconds", "Time to store a group of batches.")

    # Taking

    async def take(self, parcels: Sequence[Parcel]) -> None:
        """Store these in one commit and answer them; raises OutriderError when they cannot be stored now."""
        began_ms, at_ms = self._clock.mono_ms(), self._clock.wall_ms()
        try:
            group = await self._database.write(lambda conn: _store(conn, parcels, at_ms=at_ms), beside=True)
        except OutriderError as error:
            await self._pause(len(parcels), error)
            raise
        if self._failing:
            self._failing = False
            logger.info("telemetry is stored again")
        self._commit_seconds.observe((self._clock.mono_ms() - began_ms) / 1000)
        for device, verdicts in group.verdicts.items():
            await self._acknowledge(device, Ack(verdicts=tuple(verdicts)))
        self._count(group)

    def _count(self, group: _Group) -> None:
        outcomes = Counter(verdict.status for verdicts in group.verdicts.values() for verdict in verdicts)
        for status, many in outcomes.items():
            self._batches.labels(status).inc(many)
        fresh: Counter[RecordClass] = Counter()
        for opened, taken in zip(group.opened, group.taken, strict=True):
            fresh[opened.stream.klass] += taken.fresh
        for klass, many in fresh.items():
            self._records.labels(CLASS_NAMES[klass]).inc(many)
        self._duplicates.inc(sum(taken.duplicates for taken in group.taken))
        self._lost.inc(sum(taken.lost for taken in group.taken))
        for device, code in group.refused:
            # Once per device and code: a device that sends nonsense must not fill the log.
            if (device, code) not in self._noted and len(self._noted) < _MAX_NOTED:
                self._noted.add((device, code))
                logger.warning("batch refused", extra={"device": device, "code": code})

    async def _pause(self, batches: int, error: OutriderError) -> None:
        self._batches.labels("failed").inc(batches)
        if not self._failing:
            self._failing = True
            logger.error("telemetry cannot be stored: %s: %s", error.code, error.message)
        await asyncio.sleep(PAUSE_S)

    async def _acknowledge(self, device: DeviceId, ack: Ack) -> None:
        try:
            await self._send_ack(device, ack)
        except OutriderError:
            # The device sends the batches again after its reconnect and gets `duplicate` then.
            self._batches.labels("unacknowledged").inc(len(ack.verdicts))

    # Questions

    async def records(
        self, device: DeviceId, *, klass: RecordClass | None = None, after: int = 0, limit: int
    ) -> tuple[StoredEffect, ...]:
        """The device's records in the order of arrival, from after the one with this id."""
        from_id = after // MAX_SPAN
        # The first batch may have been told already, up to its last record.
        wanted = limit + limits.MAX_BATCH_RECORDS
        return await self._database.read(
            lambda conn: _effects(
                tables.list_batches(conn, device, klass=klass, from_id=from_id, records=wanted),
                after=after,
                limit=limit,
            )
        )

    async def summary(self, device: DeviceId) -> tuple[StreamSummary, ...]:
        """What has arrived of each of the device's streams, oldest epoch first."""
        streams = await self._database.read(lambda conn: tables.list_streams(conn, device))
        return tuple(_summary(stream, received) for stream, received in streams)

    async def figures(self, *, family: str, since_ms: int, devices: Iterable[DeviceId] | None = None) -> list[Figures]:
        """What the fleet said of a family's releases, one entry per device and version.

        Args:
            family: the model family.
            since_ms: by the hub's clock: what arrived in the minute of this time or later.
            devices: only these; None for all.
        """
        wanted = None if devices is None else sorted(set(devices))
        return await self._database.read(
            lambda conn: tables.read_figures(conn, family, since_minute=minute_of(since_ms), devices=wanted)
        )


def _store(conn: Connection, parcels: Sequence[Parcel], *, at_ms: int) -> _Group:
    """Open and store, in the caller's transaction; the verdicts are good once it is committed."""
    group = _Group(verdicts={}, opened=[], taken=[], refused=[])
    claims: list[tuple[DeviceId, BatchId, str | None]] = []
    for parcel in parcels:
        found = parcel.open()
        if found is None:
            continue
        device, batch = found
        try:
            group.opened.append(rules.open_batch(device, batch))
            claims.append((device, batch.batch, None))
        except TelemetryRefused as refused:
            claims.append((device, batch.batch, refused.code))
    group.taken.extend(take_all(tables.SqlStore(conn), group.opened, at_ms=at_ms))
    results = iter(group.taken)
    for device, claim, code in claims:
        taken = next(results) if code is None else Taken("refused", code=code)
        is_refused = taken.status == "refused"
        if is_refused:
            group.refused.append((device, taken.code))
        told = _echo(claim) if is_refused else claim
        group.verdicts.setdefault(device, []).append(Verdict(batch=told, status=taken.status, code=taken.code))
    return group


def _echo(claim: BatchId) -> BatchId:
    """The id for the answer, with what a hostile device could have blown up cut short."""
    return BatchId(
        epoch=claim.epoch[:64], klass=claim.klass, first=claim.first, last=claim.last, digest=claim.digest[:128]
    )


def _effects(batches: Iterable[tables.StoredColumns], *, after: int, limit: int) -> tuple[StoredEffect, ...]:
    """The records of these batches one by one, as many as are wanted."""
    found: list[StoredEffect] = []
    for batch in batches:
        for record in _explode(batch):
            number = batch.id * MAX_SPAN + record.seq - batch.first
            if number > after:
                found.append(_effect(number, batch, record))
        if len(found) >= limit:
            break
    return tuple(found[:limit])


def _explode(batch: tables.StoredColumns) -> list[Record]:
    try:
        return rules.explode(batch.columns)
    except ProtocolViolation as error:
        raise StorageError(
            f"telemetry batch {batch.id} is damaged: {error.message}", hint="run `outrider-hub doctor`"
        ) from error


def _effect(number: int, batch: tables.StoredColumns, record: Record) -> StoredEffect:
    fields = msgspec.structs.asdict(record.body)
    return StoredEffect(
        id=number,
        epoch=batch.stream.epoch,
        klass=CLASS_NAMES[batch.stream.klass],
        seq=record.seq,
        at_ms=record.at_ms,
        received_ms=batch.received_ms,
        kind=str(record.body.__struct_config__.tag),
        body={name: value for name, value in fields.items() if value is not None},
    )


def _summary(stream: Stream, received: Received) -> StreamSummary:
    here, settled = received.here, received.settled
    return StreamSummary(
        epoch=stream.epoch,
        klass=CLASS_NAMES[stream.klass],
        records=received.records,
        first=here[0][0] if here else 0,
        last=here[-1][1] if here else 0,
        watermark=ranges.watermark(settled),
        missing=ranges.holes(settled),
        lost=received.lost,
        duplicates=received.duplicates,
        conflicts=received.conflicts,
        first_received_ms=received.first_received_ms,
        last_received_ms=received.last_received_ms,
    )
