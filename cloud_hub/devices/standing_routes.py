"""REST of who is welcome: `/v1/devices/{device}/revoke` and `/v1/devices/{device}/quarantine`.

The desk is at `app.state.devices` (set by main.py).
"""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from cloud_hub.devices.desk import Changed, Desk
from cloud_hub.devices.rules import MAX_REASON_CHARS
from cloud_hub.ground.auth import Principal, Role, require

router: Final = APIRouter(prefix="/v1", tags=["devices"])

Operator = Annotated[Principal, Depends(require(Role.OPERATOR))]


class ReasonIn(BaseModel):
    """Why; one line, which is kept and audited."""

    model_config = ConfigDict(extra="forbid")
    reason: str = Field(default="", max_length=MAX_REASON_CHARS)


class StandingOut(BaseModel):
    """What became of a device's standing; `enforced` says whether the broker has shown that it knows."""

    id: str
    standing: str
    reason: str
    enforced: bool


@router.post("/devices/{device}/revoke", operation_id="revoke_device")
async def revoke(request: Request, principal: Operator, device: str, body: ReasonIn) -> StandingOut:
    """Let a device in nowhere from now on; answers when its session has ended, or after a few seconds."""
    desk: Desk = request.app.state.devices
    return _out(device, await desk.standings.revoke(device, reason=body.reason, actor=principal.actor))


@router.post("/devices/{device}/quarantine", operation_id="quarantine_device")
async def quarantine(request: Request, principal: Operator, device: str, body: ReasonIn) -> StandingOut:
    """Give a device nothing and take nothing of it, until that is lifted; it keeps its certificate."""
    desk: Desk = request.app.state.devices
    return _out(device, await desk.standings.quarantine(device, reason=body.reason, actor=principal.actor))


@router.delete("/devices/{device}/quarantine", operation_id="lift_quarantine")
async def lift(request: Request, principal: Operator, device: str) -> StandingOut:
    """End a device's quarantine."""
    desk: Desk = request.app.state.devices
    return _out(device, await desk.standings.lift(device, actor=principal.actor))


def _out(device: str, changed: Changed) -> StandingOut:
    return StandingOut(id=device, standing=changed.standing.value, reason=changed.reason, enforced=changed.is_enforced)
