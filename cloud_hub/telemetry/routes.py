"""REST of the telemetry room: `/v1/telemetry/{device}`.

The desk is at `app.state.telemetry`, the devices' desk at `app.state.devices` (both set by main.py).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Final, Literal, get_args

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, Field

from cloud_hub.devices.desk import Desk as DevicesDesk
from cloud_hub.ground.auth import Principal, Role, require
from cloud_hub.telemetry.desk import Desk, StoredEffect, StreamSummary
from cloud_hub.telemetry.rules import class_named
from shared import limits
from shared.ids import DeviceId

router: Final = APIRouter(prefix="/v1/telemetry", tags=["telemetry"])

Viewer = Annotated[Principal, Depends(require(Role.VIEWER))]
ClassName = Literal["event", "outcome", "result", "reading"]
_MAX_RANGES: Final = 1000


class RecordOut(BaseModel):
    """A record; `at_ms` is the device's clock, `received_ms` the hub's."""

    id: int
    epoch: str
    class_: ClassName = Field(serialization_alias="class")
    seq: int
    at_ms: int
    received_ms: int
    kind: str
    body: dict[str, Any]


class RecordsOut(BaseModel):
    """A page of records in the order of arrival; `next` goes into `after` for the next page.

    A page of large records holds fewer than were asked for; only `next` says whether more follow.
    """

    items: list[RecordOut]
    next: str | None


class LostOut(BaseModel):
    """Record numbers, both ends inclusive, that the device said will not come, and why."""

    first: int
    last: int
    reason: str


class StreamOut(BaseModel):
    """What has arrived of one class of records since the device's outbox was made (its epoch).

    Each number up to the highest is here, or `lost`, or `missing`. Of both lists of ranges at most the first thousand
    are told. `lost_records` counts the `lost_folded` too: older ones, by reason, whose ranges are no longer kept.
    `watermark`: up to here nothing is missing. `duplicates` counts records that came again and were dropped;
    `conflicts` batches whose numbers are here with other content: two devices carry the same disk, or it was set back.
    """

    epoch: str
    class_: ClassName = Field(serialization_alias="class")
    records: int
    first: int
    last: int
    missing: list[tuple[int, int]]
    missing_ranges: int
    missing_records: int
    watermark: int
    lost: list[LostOut]
    lost_ranges: int
    lost_records: int
    lost_folded: dict[str, int]
    duplicates: int
    conflicts: int
    first_received_ms: int
    last_received_ms: int


class SummaryOut(BaseModel):
    """What has arrived of a device. More than one of `epochs` says that the device's store was lost or replaced.

    Of `streams_known` streams the newest are told, with their `epochs`; `records` are those of all.
    """

    device: str
    records: int
    epochs: list[str]
    streams_known: int
    streams: list[StreamOut]


@router.get("/{device}", operation_id="list_telemetry")
async def list_telemetry(
    request: Request,
    _principal: Viewer,
    device: str,
    klass: Annotated[ClassName | None, Query(alias="class")] = None,
    after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=limits.MAX_PAGE_ITEMS)] = 100,
) -> RecordsOut:
    """The device's records in the order of arrival."""
    name = await _known(request, device)
    wanted = None if klass is None else class_named(klass)
    page = await _desk(request).records(name, klass=wanted, after=after, limit=limit)
    following = str(page.items[-1].id) if page.has_more else None
    return RecordsOut(items=[_record(effect) for effect in page.items], next=following)


@router.get("/{device}/summary", operation_id="summarize_telemetry")
async def summarize_telemetry(request: Request, _principal: Viewer, device: str) -> SummaryOut:
    """How much has arrived of the device's records, and what is missing."""
    name = await _known(request, device)
    found = await _desk(request).summary(name)
    return SummaryOut(
        device=name,
        records=found.records,
        epochs=list(dict.fromkeys(stream.epoch for stream in found.streams)),
        streams_known=found.streams_known,
        streams=[_stream(stream) for stream in found.streams],
    )


async def _known(request: Request, device: str) -> DeviceId:
    """The device's name; raises NotFound for one that was never enrolled."""
    devices: DevicesDesk = request.app.state.devices
    return (await devices.get(device)).id


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.telemetry
    return desk


def _record(effect: StoredEffect) -> RecordOut:
    return RecordOut(
        id=effect.id,
        epoch=effect.epoch,
        class_=_class(effect.klass),
        seq=effect.seq,
        at_ms=effect.at_ms,
        received_ms=effect.received_ms,
        kind=effect.kind,
        body={name: _finite(value) for name, value in effect.body.items()},
    )


def _stream(stream: StreamSummary) -> StreamOut:
    return StreamOut(
        epoch=stream.epoch,
        class_=_class(stream.klass),
        records=stream.records,
        first=stream.first,
        last=stream.last,
        missing=list(stream.missing[:_MAX_RANGES]),
        missing_ranges=len(stream.missing),
        missing_records=sum(last - first + 1 for first, last in stream.missing),
        watermark=stream.watermark,
        lost=[LostOut(first=one.first, last=one.last, reason=one.reason) for one in stream.lost[:_MAX_RANGES]],
        lost_ranges=len(stream.lost),
        lost_records=sum(one.last - one.first + 1 for one in stream.lost) + sum(stream.folded.values()),
        lost_folded=dict(stream.folded),
        duplicates=stream.duplicates,
        conflicts=stream.conflicts,
        first_received_ms=stream.first_received_ms,
        last_received_ms=stream.last_received_ms,
    )


def _class(name: str) -> ClassName:
    return next(known for known in get_args(ClassName) if known == name)


def _finite(value: object) -> object:
    """JSON has no infinities; a reading that is one is told as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
