"""What answers on the HTTPS port: REST for people and devices, and the inference protocol beside it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from starlette.types import ASGIApp

from cloud_hub.composition.foundation import Foundation
from cloud_hub.ground import problems
from cloud_hub.ground.auth import Gate
from cloud_hub.ground.bounds import Bounds
from cloud_hub.ground.rates import Buckets
from cloud_hub.ground.system import SystemClock
from cloud_hub.offload import asgi as offload_routes
from cloud_hub.offload import desk as offload_room
from cloud_hub.offload.registry import Registry
from cloud_hub.releases import desk as releases_room
from cloud_hub.releases import routes as release_routes
from cloud_hub.rounds import routes as round_routes

ENROL_BURST: Final = 60
ENROL_PER_MINUTE: Final = 60
TIME_BURST: Final = 300
TIME_PER_MINUTE: Final = 300
"""Questions for the time from one address: a whole fleet may start behind one."""
RENEW_BURST: Final = 600
RENEW_PER_MINUTE: Final = 120
"""From one address, behind which there may be a fleet; each device has its own limit once it has proved itself."""
INFER_BURST: Final = 1000
INFER_PER_MINUTE: Final = 30_000
"""How often one principal may ask for answers: a fleet's devices share the engines."""


def offload(foundation: Foundation, releases: releases_room.Desk) -> offload_room.Desk:
    """The room that answers from released models."""
    now_us = SystemClock().mono_us
    return offload_room.Desk(
        releases=Registry(releases=releases, now_us=now_us),
        metrics=foundation.metrics,
        now_us=now_us,
        settings=offload_room.OffloadSettings(),
    )


def offload_app(desk: offload_room.Desk, gate: Gate) -> offload_routes.OffloadApp:
    """The inference protocol over that room."""
    return offload_routes.OffloadApp(
        desk=desk,
        gate=gate,
        rate=Buckets(burst=INFER_BURST, per_minute=INFER_PER_MINUTE),
        now_us=SystemClock().mono_us,
    )


def application(
    foundation: Foundation,
    *,
    offload: offload_routes.OffloadApp,
    routers: tuple[APIRouter, ...],
    state: Mapping[str, Any],
) -> ASGIApp:
    """Everything that answers, with the bounds on requests around it; `state` is what routes find in `app.state`."""
    config = foundation.config
    app = FastAPI(
        title="Outrider hub",
        version=version("outrider"),
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        # It would send callers to whatever host their request names.
        redirect_slashes=False,
    )
    problems.install(app)
    for router in routers:
        app.include_router(router)
    common: dict[str, Any] = {
        "database": foundation.database,
        "clock": foundation.clock,
        "metrics": foundation.metrics,
        "metrics_open": config.metrics.open,
        "authorities": foundation.authorities,
        "enrol_rate": Buckets(burst=ENROL_BURST, per_minute=ENROL_PER_MINUTE),
        "time_rate": Buckets(burst=TIME_BURST, per_minute=TIME_PER_MINUTE),
        "renew_rate": Buckets(burst=RENEW_BURST, per_minute=RENEW_PER_MINUTE),
        "token_ttl": {"join": config.tokens.join_ttl_s * 1000, "api": config.tokens.api_ttl_s * 1000},
    }
    for name, value in {**common, **state}.items():
        setattr(app.state, name, value)
    return Bounds(
        offload_routes.Beside(app, offload),
        metrics=foundation.metrics,
        clock=foundation.clock,
        streamed=(release_routes.STREAMED_PREFIX, offload_routes.STREAMED_PREFIX, round_routes.STREAMED_PREFIX),
    )
