"""The offload room without a database: releases in memory behind the real desk, and the protocol's app around it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from cloud_hub.ground.auth import Gate, Principal, Role
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.rates import Buckets
from cloud_hub.offload.asgi import OffloadApp
from cloud_hub.offload.desk import Desk, OffloadSettings
from cloud_hub.offload.registry import Files, Release
from shared.errors import ModelError
from shared.ids import FamilyName
from shared.model import Manifest
from shared.wire.golden import decode_golden
from tests.fakes.releases import Build

PRINCIPAL = Principal(name="test", role=Role.VIEWER)


def now_us() -> int:
    """The machine's monotonic clock."""
    return time.monotonic_ns() // 1000


class Shelf:
    """Builds by family, as `registry.Registry` gives them; `opened` counts the loads."""

    def __init__(self, **builds: Build) -> None:
        self.builds = {
            family: msgspec.structs.replace(
                build, manifest=msgspec.structs.replace(build.manifest, family=FamilyName(family))
            )
            for family, build in builds.items()
        }
        self.opened: list[str] = []
        self.failing: Exception | None = None

    async def find(self, family: str, version: str, *, candidates: bool) -> Release:
        """The build of this family."""
        build = self.builds.get(family)
        if build is None or version not in ("", build.manifest.version):
            raise ModelError(f"no model {family}", code="model.unknown")
        return Release(manifest=build.manifest, versions=(build.manifest.version,))

    def files(self, manifest: Manifest) -> Files:
        """Its files."""
        self.opened.append(manifest.family)
        if self.failing is not None:
            raise self.failing
        build = self.builds[manifest.family]
        return Files(variant=build.variant, model=build.model, golden=decode_golden(build.golden, manifest.signature))


class OpenGate(Gate):
    """Knows everybody; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def identify(self, request: Any) -> Principal:
        """The one principal."""
        self.asked += 1
        return PRINCIPAL


@asynccontextmanager
async def running(
    shelf: Shelf, *, settings: OffloadSettings | None = None, clock: Callable[[], int] = now_us
) -> AsyncIterator[tuple[Desk, Metrics]]:
    """The desk with its loop."""
    metrics = Metrics()
    desk = Desk(releases=shelf, metrics=metrics, now_us=clock, settings=settings or OffloadSettings())
    async with asyncio.TaskGroup() as group:
        loop = group.create_task(desk.run())
        await asyncio.sleep(0)
        try:
            yield desk, metrics
        finally:
            loop.cancel()


def app_around(desk: Desk, *, gate: Gate | None = None, burst: int = 100_000) -> OffloadApp:
    """The protocol's application."""
    return OffloadApp(desk=desk, gate=gate or OpenGate(), rate=Buckets(burst=burst, per_minute=burst), now_us=now_us)
