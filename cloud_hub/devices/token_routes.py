"""REST of tokens: `POST /v1/tokens`. Operators make join tokens, administrators also API tokens.

From `app.state`: `devices`, `database`, `clock` and `token_ttl` (defaults in milliseconds by kind).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from cloud_hub.devices.desk import Desk
from cloud_hub.ground.auth import Principal, Role, issue_api_token, parse_role, require
from cloud_hub.ground.database import Database
from cloud_hub.ground.refusals import NotAllowed
from shared.clock import Clock
from shared.errors import InvalidValue

router: Final = APIRouter(prefix="/v1", tags=["tokens"])


class TokenIn(BaseModel):
    """A token to make: `device`, `profile` and `uses` are for join tokens, `role` is for API tokens."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["join", "api"]
    name: str = Field(default="", max_length=64)
    role: str | None = None
    device: str | None = Field(default=None, max_length=63)
    profile: str | None = Field(default=None, max_length=63)
    uses: int | None = None
    ttl_s: int | None = Field(default=None, gt=0, le=3660 * 24 * 3600)


class TokenOut(BaseModel):
    """The new token. Its text is shown this once."""

    kind: Literal["join", "api"]
    name: str
    token: str
    role: str | None
    expires_ms: int | None


@router.post("/tokens", status_code=201, operation_id="create_token")
async def create_token(
    request: Request, body: TokenIn, principal: Annotated[Principal, Depends(require(Role.OPERATOR))]
) -> TokenOut:
    """Make a token."""
    clock: Clock = request.app.state.clock
    ttl_ms = request.app.state.token_ttl[body.kind] if body.ttl_s is None else body.ttl_s * 1000
    now_ms = clock.wall_ms()
    if body.kind == "join":
        if body.role is not None:
            raise InvalidValue("a join token has no role", code="invalid.request")
        desk: Desk = request.app.state.devices
        text = await desk.create_join_token(
            name=body.name,
            device=body.device,
            profile=body.profile,
            uses=1 if body.uses is None else body.uses,
            ttl_ms=ttl_ms,
            actor=principal.actor,
        )
        return TokenOut(kind="join", name=body.name, token=text, role=None, expires_ms=now_ms + ttl_ms)
    if principal.role is not Role.ADMIN:
        raise NotAllowed(
            f"this needs the role admin; {principal.name} has {principal.role.value}",
            code="auth.role",
            hint="use a token made with `--role admin`",
        )
    if body.device is not None or body.profile is not None or body.uses is not None:
        raise InvalidValue("device, profile and uses are for join tokens", code="invalid.request")
    role = parse_role(body.role or Role.VIEWER.value)
    database: Database = request.app.state.database
    issued = await database.write(
        lambda conn: issue_api_token(
            conn, name=body.name or role.value, role=role, at_ms=now_ms, ttl_ms=ttl_ms, actor=principal.actor
        )
    )
    return TokenOut(kind="api", name=issued.name, token=issued.text, role=role.value, expires_ms=issued.expires_ms)
