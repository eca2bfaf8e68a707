"""REST of the ground: the CA, who am I, the audit log, health and metrics.

From `app.state`: `gate`, `database`, `metrics`, `authorities`, `metrics_open` and `parts` (what must be up for it to
be ready).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse, Response

from cloud_hub.ground import audit
from cloud_hub.ground.auth import Principal, Role, require, require_any
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import CONTENT_TYPE, Metrics
from shared import limits

router: Final = APIRouter(tags=["hub"])


class WhoAmIOut(BaseModel):
    """The caller as the hub sees it; `device` is set for devices."""

    name: str
    role: str
    device: str | None


class AuditOut(BaseModel):
    """One row of the audit log."""

    seq: int
    at_ms: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    hash: str


class AuditPageOut(BaseModel):
    """A page of the audit log; `next` goes into `after` for the next page."""

    items: list[AuditOut]
    next: str | None


@router.get("/v1/ca", operation_id="get_ca", response_class=PlainTextResponse)
async def get_ca(request: Request) -> PlainTextResponse:
    """The hub's CA certificate, PEM; two and what links them during a change. Compare the pin before you trust it."""
    authorities: Authorities = request.app.state.authorities
    return PlainTextResponse(authorities.published, media_type="application/x-pem-file")


@router.get("/v1/whoami", operation_id="whoami")
async def whoami(principal: Annotated[Principal, Depends(require_any())]) -> WhoAmIOut:
    """Who the hub takes the caller for."""
    return WhoAmIOut(name=principal.name, role=principal.role.value, device=principal.device)


@router.get("/v1/audit", operation_id="list_audit")
async def list_audit(
    request: Request,
    _principal: Annotated[Principal, Depends(require(Role.OPERATOR))],
    after: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    limit: Annotated[int, Query(ge=1, le=limits.MAX_PAGE_ITEMS)] = 100,
) -> AuditPageOut:
    """Who did what to what, oldest first; each row's hash binds it to the one before."""
    database: Database = request.app.state.database
    rows = await database.read(lambda conn: audit.entries(conn, after=after, limit=limit + 1))
    page = rows[:limit]
    return AuditPageOut(
        items=[
            AuditOut(
                seq=row.seq,
                at_ms=row.at_ms,
                actor=row.actor,
                action=row.action,
                subject=row.subject,
                detail=row.detail,
                hash=row.hash,
            )
            for row in page
        ],
        next=str(page[-1].seq) if len(rows) > limit else None,
    )


@router.get("/healthz", operation_id="healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", operation_id="readyz")
async def readyz(request: Request) -> JSONResponse:
    """Whether every part that the hub needs is up; 503 while one is not."""
    parts: Callable[[], Mapping[str, bool]] = request.app.state.parts
    up = parts()
    return JSONResponse({"ready": all(up.values()), "parts": dict(up)}, status_code=200 if all(up.values()) else 503)


@router.get("/metrics", operation_id="metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format; needs a viewer's token unless `metrics.open` is set."""
    if not request.app.state.metrics_open:
        await require(Role.VIEWER)(request)
    figures: Metrics = request.app.state.metrics
    return Response(figures.text(), media_type=CONTENT_TYPE)
