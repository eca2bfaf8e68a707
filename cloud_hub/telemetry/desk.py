"""The telemetry desk: takes batches, stores each record once, acknowledges after the commit, and answers questions.

Rules:
1. Batches, what is known of their streams and the figures that gates read are written in one transaction; the
   acknowledgements go out after it. A hub that dies in between is sent the batches again and answers `duplicate`.
2. What cannot be stored now is not answered: the device has it and sends it again.
3. What can never be stored is answered `refused` with the reason.
4. Batches that came together are opened and stored together, in one step of one thread and one commit, and answered
   in one message for each device: more load makes larger groups, not more of them.
5. No batch stops others. A group that fails for another reason than a database that cannot write now is stored again
   device by device, then batch by batch. One that fails alone, by a defect, is refused; one over a damaged row waits.

Not here: MQTT, envelopes, devices, what a batch adds (`taking.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
from sqlalchemy.engine import Connection

from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.telemetry import apart, rules, tables
from cloud_hub.telemetry.apart import Failure, store_apart
from cloud_hub.telemetry.figures import Figures, minute_of
from cloud_hub.telemetry.rules import CLASS_NAMES, MAX_SPAN, Opened, Stream, TelemetryRefused
from cloud_hub.telemetry.taking import Lost, Received, Taken, take_all
from shared import ranges
from shared.clock import Clock
from shared.errors import OutriderError, ProtocolViolation, StorageError
from shared.ids import DeviceId
from shared.telemetry import BatchId, Record, RecordClass
from shared.wire.messages import Ack, Batch, Verdict

logger = logging.getLogger(__name__)

PAUSE_S: Final = 0.5
"""After a failed commit, so that a full disk does not make a busy loop."""
MAX_TOLD_STREAMS: Final = 64
"""Of a device in one answer, the newest: a device can make thousands."""
MAX_PAGE_BYTES: Final = 4 * 1024 * 1024
"""Of records in one answer, unpacked; at least one is told."""
_MAX_NOTED: Final = 1000

_encoder: Final = msgspec.msgpack.Encoder()

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
class RecordsPage:
    """Records in the order of arrival; `has_more` says that some follow the last of them."""

    items: tuple[StoredEffect, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class StreamSummary:
    """What has arrived of one stream.

    Attributes:
        records: how many, each counted once.
        first, last: lowest and highest number; 0 when there are none.
        watermark: up to here no number is waited for: each is here, or declared lost.
        missing: ranges from 1 to `last` that have not arrived and are not declared lost.
        lost: what the device said will not come, without what is folded.
        folded: how many older numbers were lost, by reason, whose ranges are no longer kept.
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
    folded: Mapping[str, int]
    duplicates: int
    conflicts: int
    first_received_ms: int
    last_received_ms: int


@dataclass(frozen=True, slots=True)
class DeviceSummary:
    """What has arrived of a device.

    Attributes:
        records: of all streams.
        streams_known: how many streams there are.
        streams: at most the newest `MAX_TOLD_STREAMS`, oldest epoch first.
    """

    records: int
    streams_known: int
    streams: tuple[StreamSummary, ...]


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A batch that came in: opened, or refused with this code."""

    device: DeviceId
    claim: BatchId
    opened: Opened | None
    code: str = ""


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
        self._damaged = metrics.counter(
            "outrider_hub_damaged_batches_total", "Stored batches that do not parse and could not be compared with."
        )
        self._lost = metrics.counter("outrider_hub_lost_records_total", "Records that devices declared lost.")
        self._commit_seconds = metrics.histogram("outrider_hub_commit_seconds", "Time to store a group of batches.")

    # Taking

    async def take(self, parcels: Sequence[Parcel]) -> None:
        """Store these in one commit and answer them; raises OutriderError when they cannot be stored now."""
        began_ms, at_ms = self._clock.mono_ms(), self._clock.wall_ms()
        # Before the transaction begins: what is parsed and hashed meanwhile holds no lock.
        arrived = await asyncio.to_thread(_open_all, parcels)
        opened = [one.opened for one in arrived if one.opened is not None]
        stored = await store_apart(opened, lambda some: self._store(some, at_ms=at_ms))
        for failure in stored.failures:
            self._tell_failure(failure)
        taken = iter(stored.taken)
        answers = [(one, Taken("refused", code=one.code) if one.opened is None else next(taken)) for one in arrived]
        if stored.error is None or any(one is not None for one in stored.taken):
            self._commit_seconds.observe((self._clock.mono_ms() - began_ms) / 1000)
            await self._answer([(one, said) for one, said in answers if said is not None])
        unanswered = sum(one is None for one in stored.taken)
        self._batches.labels("failed").inc(unanswered)
        if stored.error is not None:
            await self._pause(stored.error)
            raise stored.error
        if self._failing:
            self._failing = False
            logger.info("telemetry is stored again")

    async def _store(self, opened: Sequence[Opened], *, at_ms: int) -> list[Taken]:
        return await self._database.write(
            lambda conn: take_all(tables.SqlStore(conn), opened, at_ms=at_ms), beside=True
        )

    async def _answer(self, answers: Sequence[tuple[_Arrived, Taken]]) -> None:
        verdicts: dict[DeviceId, list[Verdict]] = {}
        for one, taken in answers:
            told = _echo(one.claim) if taken.status == "refused" else one.claim
            verdicts.setdefault(one.device, []).append(Verdict(batch=told, status=taken.status, code=taken.code))
        for device, of_device in verdicts.items():
            await self._acknowledge(device, Ack(verdicts=tuple(of_device)))
        self._count(answers)

    def _count(self, answers: Sequence[tuple[_Arrived, Taken]]) -> None:
        for status, many in Counter(taken.status for _, taken in answers).items():
            self._batches.labels(status).inc(many)
        fresh: Counter[RecordClass] = Counter()
        for one, taken in answers:
            if one.opened is not None:
                fresh[one.opened.stream.klass] += taken.fresh
        for klass, many in fresh.items():
            self._records.labels(CLASS_NAMES[klass]).inc(many)
        self._duplicates.inc(sum(taken.duplicates for _, taken in answers))
        self._lost.inc(sum(taken.lost for _, taken in answers))
        for one, taken in answers:
            if taken.status == "refused" and self._is_new(one.device, taken.code):
                logger.warning("batch refused", extra={"device": one.device, "code": taken.code})
            if taken.damaged:
                self._damaged.inc(taken.damaged)
                if self._is_new(one.device, "damaged"):
                    logger.error("stored batches are damaged", extra={"device": one.device, "batches": taken.damaged})

    def _tell_failure(self, failure: Failure) -> None:
        device = failure.batch.stream.device
        if self._is_new(device, failure.name):
            logger.error("batch cannot be stored", extra={"device": device}, exc_info=failure.error)

    def _is_new(self, device: DeviceId, what: str) -> bool:
        """Once per device and cause: a device that sends nonsense must not fill the log."""
        if (device, what) in self._noted or len(self._noted) >= _MAX_NOTED:
            return False
        self._noted.add((device, what))
        return True

    async def _pause(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            code = error.code if isinstance(error, OutriderError) else "defect"
            logger.error("telemetry cannot be stored: %s: %s", code, error)
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
    ) -> RecordsPage:
        """The device's records in the order of arrival, from after the one with this id; a page may be short."""
        # The first batch may have been told already, up to its last record.
        from_id = after // MAX_SPAN
        return await self._database.read(
            lambda conn: _page(
                tables.list_batches(conn, device, klass=klass, from_id=from_id), after=after, limit=limit
            )
        )

    async def summary(self, device: DeviceId) -> DeviceSummary:
        """What has arrived of the device, and of each of its newest streams."""
        return await self._database.read(lambda conn: _summaries(conn, device))

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


def _open_all(parcels: Sequence[Parcel]) -> list[_Arrived]:
    """Open what can be answered."""
    arrived: list[_Arrived] = []
    for parcel in parcels:
        found = parcel.open()
        if found is None:
            continue
        device, batch = found
        try:
            arrived.append(_Arrived(device, batch.batch, rules.open_batch(device, batch)))
        except TelemetryRefused as refused:
            arrived.append(_Arrived(device, batch.batch, None, refused.code))
        except Exception:
            # A defect in opening must not stop the others' batches.
            logger.exception("batch cannot be opened", extra={"device": device})
            arrived.append(_Arrived(device, batch.batch, None, apart.DEFECT))
    return arrived


def _echo(claim: BatchId) -> BatchId:
    """The id for the answer, with what a hostile device could have blown up cut short."""
    return BatchId(
        epoch=claim.epoch[:64], klass=claim.klass, first=claim.first, last=claim.last, digest=claim.digest[:128]
    )


def _page(batches: Iterable[tables.StoredColumns], *, after: int, limit: int) -> RecordsPage:
    """The records of these batches one by one, as many as are wanted and fit."""
    found: list[StoredEffect] = []
    room = MAX_PAGE_BYTES
    for batch in batches:
        for record in _explode(batch):
            number = batch.id * MAX_SPAN + record.seq - batch.first
            if number <= after:
                continue
            room -= len(_encoder.encode(record.body))
            if len(found) == limit or (found and room < 0):
                return RecordsPage(tuple(found), has_more=True)
            found.append(_effect(number, batch, record))
    return RecordsPage(tuple(found), has_more=False)


def _summaries(conn: Connection, device: DeviceId) -> DeviceSummary:
    known, records = tables.count_streams(conn, device)
    newest = tables.list_streams(conn, device, limit=MAX_TOLD_STREAMS)
    return DeviceSummary(records, known, tuple(_summary(stream, received) for stream, received in newest))


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
        folded=received.folded,
        duplicates=received.duplicates,
        conflicts=received.conflicts,
        first_received_ms=received.first_received_ms,
        last_received_ms=received.last_received_ms,
    )
