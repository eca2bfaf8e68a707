"""The telemetry desk: takes batches, stores each record once, acknowledges after the commit, and answers questions.

Rules:
1. Records, the stream's ranges, the batch's digest and the figures that gates read are written in one transaction;
   the acknowledgement goes out after it. A hub that dies in between is sent the batch again and answers `duplicate`.
2. What cannot be stored now is dropped without an answer and counted: the device has it and sends it again.
3. What can never be stored is answered `refused` with the reason.
4. Batches that wait are committed together: one disk sync for all, so more load makes larger commits, not more.

Not here: MQTT, envelopes, devices.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from sqlalchemy.engine import Connection

from cloud_hub.ground import audit
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.telemetry import rules, tables
from cloud_hub.telemetry.figures import Figures, minute_of, tally
from cloud_hub.telemetry.rules import OpenBatch, Received, TelemetryRefused
from shared.clock import Clock
from shared.errors import OutriderError
from shared.ids import DeviceId
from shared.telemetry import BatchId, RecordClass
from shared.wire.envelope import Envelope
from shared.wire.messages import Ack, Batch

logger = logging.getLogger(__name__)

MAX_WAITING_BATCHES: Final = 512
MAX_GROUP_BATCHES: Final = 64
PAUSE_S: Final = 0.5
"""After a failed commit, so that a full disk does not make a busy loop."""

SendAck = Callable[[DeviceId, Ack], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A batch and whom it came from."""

    device: DeviceId
    batch: Batch


@dataclass(frozen=True, slots=True)
class StoredEffect:
    """A record as the desk tells it; `id` grows in the order of arrival."""

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
        missing: ranges from 1 to `last` that have not arrived.
        duplicates: records that came again and were dropped.
        conflicts: batches refused because their numbers are here with other content.
    """

    epoch: str
    klass: str
    records: int
    first: int
    last: int
    missing: tuple[tuple[int, int], ...]
    duplicates: int
    conflicts: int
    first_received_ms: int
    last_received_ms: int


class Desk:
    """The one face of the room.

    Args:
        database: with the schema of this version.
        clock: for the time of arrival.
        metrics: gets the room's figures.
        send_ack: hands an acknowledgement to the link; raises OutriderError when it cannot.
        max_waiting: how many batches may wait for a commit.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        metrics: Metrics,
        send_ack: SendAck,
        max_waiting: int = MAX_WAITING_BATCHES,
    ) -> None:
        self._database = database
        self._clock = clock
        self._send_ack = send_ack
        self._waiting: asyncio.Queue[Delivery] = asyncio.Queue(max_waiting)
        self._failing = False
        self._batches = metrics.counter("outrider_hub_batches_total", "Batches from devices by outcome.", ("outcome",))
        self._records = metrics.counter("outrider_hub_records_total", "Records stored, each once.", ("klass",))
        self._duplicates = metrics.counter("outrider_hub_duplicate_records_total", "Records that came again.")
        self._depth = metrics.gauge("outrider_hub_batches_waiting", "Batches that wait for a commit.")
        self._commit_seconds = metrics.histogram("outrider_hub_commit_seconds", "Time to store a group of batches.")

    # Taking

    async def received(self, device: DeviceId, _envelope: Envelope, batch: Batch) -> None:
        """A batch has come in (`switchboard.Rooms.batch`)."""
        self.submit(device, batch)

    def submit(self, device: DeviceId, batch: Batch) -> bool:
        """Queue a batch for the next commit; False when too many wait and it was dropped."""
        try:
            self._waiting.put_nowait(Delivery(device, batch))
        except asyncio.QueueFull:
            self._batches.labels("overflow").inc()
            return False
        self._depth.set(self._waiting.qsize())
        return True

    async def run(self) -> None:
        """Store and acknowledge until cancelled."""
        while True:
            group = [await self._waiting.get()]
            while len(group) < MAX_GROUP_BATCHES and not self._waiting.empty():
                group.append(self._waiting.get_nowait())
            self._depth.set(self._waiting.qsize())
            try:
                acks = await self._store(group)
            except OutriderError as error:
                await self._pause(group, error)
                continue
            if self._failing:
                self._failing = False
                logger.info("telemetry is stored again")
            for device, ack in acks:
                await self._acknowledge(device, ack)

    async def _store(self, group: list[Delivery]) -> list[tuple[DeviceId, Ack]]:
        began_ms = self._clock.mono_ms()
        opened = await asyncio.to_thread(_open_all, group)
        at_ms = self._clock.wall_ms()
        acks: list[tuple[DeviceId, Ack]] = []
        good = [batch for batch in opened if isinstance(batch, OpenBatch)]
        stored = await self._database.write(lambda conn: [_take(conn, batch, at_ms=at_ms) for batch in good])
        results = iter(stored)
        for delivery, batch in zip(group, opened, strict=True):
            result = next(results) if isinstance(batch, OpenBatch) else _Taken("refused", code=batch.code)
            self._batches.labels(result.status).inc()
            self._duplicates.inc(result.duplicates)
            if isinstance(batch, OpenBatch):
                self._records.labels(rules.CLASS_NAMES[batch.stream.klass]).inc(result.fresh)
            if result.status == "refused":
                logger.warning("batch refused", extra={"device": delivery.device, "code": result.code})
            ack = Ack(batch=_echo(delivery.batch.batch), status=result.status, code=result.code)
            acks.append((delivery.device, ack))
        self._commit_seconds.observe((self._clock.mono_ms() - began_ms) / 1000)
        return acks

    async def _pause(self, group: list[Delivery], error: OutriderError) -> None:
        self._batches.labels("failed").inc(len(group))
        if not self._failing:
            self._failing = True
            logger.error("telemetry cannot be stored: %s: %s", error.code, error.message)
        await asyncio.sleep(PAUSE_S)

    async def _acknowledge(self, device: DeviceId, ack: Ack) -> None:
        try:
            await self._send_ack(device, ack)
        except OutriderError:
            # The device sends the batch again after its reconnect and gets `duplicate` then.
            self._batches.labels("unacknowledged").inc()

    # Questions

    async def records(
        self, device: DeviceId, *, klass: RecordClass | None = None, after: int = 0, limit: int
    ) -> tuple[StoredEffect, ...]:
        """The device's records in the order of arrival, from after the one with this id."""
        rows = await self._database.read(
            lambda conn: tables.list_records(conn, device, klass=klass, after=after, limit=limit)
        )
        return tuple(
            StoredEffect(
                id=row.id,
                epoch=row.epoch,
                klass=rules.CLASS_NAMES[row.klass],
                seq=row.seq,
                at_ms=row.at_ms,
                received_ms=row.received_ms,
                kind=row.kind,
                body=rules.read_body(row.body),
            )
            for row in rows
        )

    async def summary(self, device: DeviceId) -> tuple[StreamSummary, ...]:
        """What has arrived of each of the device's streams, oldest epoch first."""
        rows = await self._database.read(lambda conn: tables.list_streams(conn, device))
        return tuple(_summary(row) for row in rows)

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


@dataclass(frozen=True, slots=True)
class _Taken:
    """What became of a batch."""

    status: Literal["stored", "duplicate", "refused"]
    fresh: int = 0
    duplicates: int = 0
    code: str = ""


def _open_all(group: list[Delivery]) -> list[OpenBatch | TelemetryRefused]:
    opened: list[OpenBatch | TelemetryRefused] = []
    for delivery in group:
        try:
            opened.append(rules.open_batch(delivery.device, delivery.batch))
        except TelemetryRefused as refused:
            opened.append(refused)
    return opened


def _take(conn: Connection, batch: OpenBatch, *, at_ms: int) -> _Taken:
    """Store what is new of the batch, in the caller's transaction."""
    received = tables.read_stream(conn, batch.stream)
    try:
        merged = _merge(conn, batch, received)
    except TelemetryRefused as refused:
        _note_conflict(conn, batch, received, at_ms=at_ms)
        return _Taken("refused", code=refused.code)
    numbers = rules.ranges_of(record.seq for record in merged.fresh)
    ranges = rules.union(received.ranges, numbers)
    if len(ranges) > rules.MAX_RANGES:
        return _Taken("refused", code="telemetry.scattered")
    if merged.fresh:
        tables.insert_batch(conn, batch)
        tables.insert_records(conn, batch.stream, merged.fresh, at_ms=at_ms)
        tables.add_figures(conn, batch.stream.device, tally(merged.fresh), minute=minute_of(at_ms))
    after = replace(
        received,
        ranges=ranges,
        records=received.records + len(merged.fresh),
        duplicates=received.duplicates + merged.duplicates,
    )
    tables.write_stream(conn, batch.stream, after, at_ms=at_ms)
    status: Literal["stored", "duplicate"] = "stored" if merged.fresh else "duplicate"
    return _Taken(status, fresh=len(merged.fresh), duplicates=merged.duplicates)


def _merge(conn: Connection, batch: OpenBatch, received: Received) -> rules.Merge:
    digest = tables.batch_digest(conn, batch)
    # Not by comparing records: a hub of another version may have stored the same batch with other fields.
    if digest == batch.id.digest:
        return rules.Merge(fresh=(), duplicates=len(batch.records))
    if digest is not None:
        raise rules.conflict(batch)
    here: list[rules.StoredRecord] = []
    if rules.meets(received.ranges, batch.id.first, batch.id.last):
        here = tables.records_between(conn, batch.stream, batch.id.first, batch.id.last)
    return rules.merge(batch, here)


def _note_conflict(conn: Connection, batch: OpenBatch, received: Received, *, at_ms: int) -> None:
    """Count it; the first of a stream is an audit event, the rest would only fill the log."""
    if received.conflicts == 0:
        stream = batch.stream
        audit.record(
            conn,
            at_ms=at_ms,
            actor=f"device:{stream.device}",
            action="telemetry.conflict",
            subject=f"device:{stream.device}",
            detail={
                "epoch": stream.epoch,
                "class": rules.CLASS_NAMES[stream.klass],
                "first": batch.id.first,
                "last": batch.id.last,
                "digest": batch.id.digest,
            },
        )
    tables.write_stream(conn, batch.stream, replace(received, conflicts=received.conflicts + 1), at_ms=at_ms)


def _echo(claim: BatchId) -> BatchId:
    """The id for the answer, with what a hostile device could have blown up cut short."""
    return BatchId(
        epoch=claim.epoch[:64], klass=claim.klass, first=claim.first, last=claim.last, digest=claim.digest[:128]
    )


def _summary(row: tables.StreamRow) -> StreamSummary:
    ranges = row.received.ranges
    return StreamSummary(
        epoch=row.stream.epoch,
        klass=rules.CLASS_NAMES[row.stream.klass],
        records=row.received.records,
        first=ranges[0][0] if ranges else 0,
        last=ranges[-1][1] if ranges else 0,
        missing=rules.missing(ranges),
        duplicates=row.received.duplicates,
        conflicts=row.received.conflicts,
        first_received_ms=row.first_received_ms,
        last_received_ms=row.last_received_ms,
    )
