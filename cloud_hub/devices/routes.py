"""REST of the devices room: `/v1/enroll`, `/v1/renew`, `/v1/devices`.

The desk is at `app.state.devices`, the limiters by address at `app.state.enrol_rate` and
`app.state.renew_rate` (set by the composition).
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from cloud_hub.devices.desk import Desk, Device, RenewalRequest
from cloud_hub.ground.auth import Principal, Role, require
from cloud_hub.ground.problems import Throttled
from cloud_hub.ground.rates import Buckets, source_of
from shared import join, limits
from shared.clock import Clock
from shared.errors import InvalidValue

router: Final = APIRouter(prefix="/v1", tags=["devices"])

Viewer = Annotated[Principal, Depends(require(Role.VIEWER))]
Operator = Annotated[Principal, Depends(require(Role.OPERATOR))]


class EnrolIn(BaseModel):
    """A device that wants to join."""

    model_config = ConfigDict(extra="forbid")
    token: str = Field(max_length=join.MAX_CHARS)
    csr_pem: str = Field(max_length=limits.MAX_CSR_BYTES)
    profile: str = Field(max_length=63)
    name: str | None = Field(default=None, max_length=63)


class BrokerOut(BaseModel):
    """Where the broker is."""

    host: str
    port: int


class EnrolledOut(BaseModel):
    """A device's identity and all it needs to begin."""

    device: str
    certificate_pem: str
    ca_pem: str
    hub_url: str
    broker: BrokerOut
    root: str


class RenewIn(BaseModel):
    """A device that wants a new certificate; `proof` is the old key's signature, Base64 (`shared/renewal.py`)."""

    model_config = ConfigDict(extra="forbid")
    certificate_pem: str = Field(max_length=limits.MAX_CSR_BYTES)
    csr_pem: str = Field(max_length=limits.MAX_CSR_BYTES)
    proof: str = Field(max_length=256)


class RenewedOut(BaseModel):
    """The new certificate, and what may have changed since the last one."""

    device: str
    certificate_pem: str
    ca_pem: str
    hub_url: str
    broker: BrokerOut


class DeviceOut(BaseModel):
    """A device as the hub knows it; times in milliseconds since 1970 by the hub's clock."""

    id: str
    profile: str
    labels: dict[str, str]
    online: bool
    last_seen_ms: int | None
    enrolled_ms: int
    boot: int
    agent_version: str
    assignment_version: int
    reported_ms: int | None
    reported: dict[str, Any]
    standing: str
    standing_reason: str
    standing_ms: int | None


class DevicesOut(BaseModel):
    """A page of devices; `next` goes into `after` for the next page."""

    items: list[DeviceOut]
    next: str | None


class LabelsIn(BaseModel):
    """Labels to set; null removes one."""

    model_config = ConfigDict(extra="forbid")
    labels: dict[str, str | None] = Field(max_length=64)


@router.post("/enroll", status_code=201, operation_id="enroll")
async def enroll(request: Request, body: EnrolIn) -> EnrolledOut:
    """Trade a join token and a certificate request for a device's identity. Needs no other proof."""
    address = request.client.host if request.client else "unknown"
    rate: Buckets = request.app.state.enrol_rate
    clock: Clock = request.app.state.clock
    wait_s = rate.take(source_of(address), now_ms=clock.mono_ms())
    if wait_s:
        raise Throttled("too many tries to enrol from this address", retry_after_s=wait_s, hint="wait and try again")
    enrolled = await _desk(request).enroll(
        token=body.token, csr_pem=body.csr_pem, profile=body.profile, name=body.name, address=address
    )
    return EnrolledOut(
        device=enrolled.device,
        certificate_pem=enrolled.certificate_pem,
        ca_pem=enrolled.ca_pem,
        hub_url=enrolled.hub_url,
        broker=BrokerOut(host=enrolled.broker.host, port=enrolled.broker.port),
        root=enrolled.root,
    )


@router.post("/renew", operation_id="renew_certificate")
async def renew(request: Request, body: RenewIn) -> RenewedOut:
    """Trade a certificate, in its time or expired, for one with a new key. The old key's signature is the proof."""
    address = request.client.host if request.client else "unknown"
    rate: Buckets = request.app.state.renew_rate
    clock: Clock = request.app.state.clock
    wait_s = rate.take(source_of(address), now_ms=clock.mono_ms())
    if wait_s:
        raise Throttled("too many tries to renew from this address", retry_after_s=wait_s, hint="wait and try again")
    renewed = await _desk(request).renew(
        RenewalRequest(certificate_pem=body.certificate_pem, csr_pem=body.csr_pem, proof=body.proof), address=address
    )
    return RenewedOut(
        device=renewed.device,
        certificate_pem=renewed.certificate_pem,
        ca_pem=renewed.ca_pem,
        hub_url=renewed.hub_url,
        broker=BrokerOut(host=renewed.broker.host, port=renewed.broker.port),
    )


@router.get("/devices", operation_id="list_devices")
async def list_devices(
    request: Request,
    _principal: Viewer,
    after: Annotated[str, Query(max_length=63)] = "",
    limit: Annotated[int, Query(ge=1, le=limits.MAX_PAGE_ITEMS)] = 100,
    label: Annotated[list[str] | None, Query(max_length=8)] = None,
) -> DevicesOut:
    """Devices by name; `label=key=value`, repeatable, keeps those that carry all of them."""
    found = await _desk(request).list(
        after=after, limit=limit + 1 if limit < limits.MAX_PAGE_ITEMS else limit, labels=_labels(label or [])
    )
    page = found[:limit]
    more = len(found) > limit or (limit == limits.MAX_PAGE_ITEMS and len(found) == limit)
    return DevicesOut(items=[_out(device) for device in page], next=page[-1].id if more else None)


@router.get("/devices/{device}", operation_id="get_device")
async def get_device(request: Request, _principal: Viewer, device: str) -> DeviceOut:
    """One device."""
    return _out(await _desk(request).get(device))


@router.patch("/devices/{device}", operation_id="label_device")
async def label_device(request: Request, principal: Operator, device: str, body: LabelsIn) -> DeviceOut:
    """Set or remove labels of a device."""
    return _out(await _desk(request).label(device, changes=body.labels, actor=principal.actor))


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.devices
    return desk


def _labels(pairs: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidValue(f"{pair[:80]!r} is not KEY=VALUE", code="invalid.labels")
        labels[key] = value
    return labels


def _out(device: Device) -> DeviceOut:
    return DeviceOut(
        id=device.id,
        profile=device.profile,
        labels=dict(device.labels),
        online=device.online,
        last_seen_ms=device.last_seen_ms,
        enrolled_ms=device.enrolled_ms,
        boot=device.boot,
        agent_version=device.agent_version,
        assignment_version=device.assignment_version,
        reported_ms=device.reported_ms,
        reported=dict(device.reported),
        standing=device.standing.value,
        standing_reason=device.standing_reason,
        standing_ms=device.standing_ms,
    )
