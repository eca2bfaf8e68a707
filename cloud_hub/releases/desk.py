"""The releases room's one public face: blobs, models and their builds, signed metadata, assignments, time.

`Desk` puts the room's parts together and runs them; each part keeps its own rules:

    blobs        files by digest                       blobs.py
    catalogue    pushed models, built one by one       catalogue.py (workbench.py, builder.py)
    publishing   proposals, signed metadata            publishing.py (learning.py: what the hub signs by itself)
    patches      shorter ways to new files             patches.py (patch_job.py)
    assigning    who shall run what                    assigning.py
    attesting    what time it is, signed               attesting.py
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloud_hub.ground.bus import Bus
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.post import Post
from cloud_hub.releases.assigning import Assigned, Assigning, Fleet, Outcome
from cloud_hub.releases.attesting import Attesting
from cloud_hub.releases.blobs import Blob, Blobs
from cloud_hub.releases.catalogue import Catalogue
from cloud_hub.releases.counts import Counts
from cloud_hub.releases.keychange import Changed, change_keys, newest_root, read_published
from cloud_hub.releases.online import KeySource, OnlineKeys
from cloud_hub.releases.patches import OfferedPatch, Patches
from cloud_hub.releases.publishing import Proposal, Publishing, found
from cloud_hub.releases.rules import Push, Selector
from cloud_hub.releases.tables import ModelRow
from cloud_hub.releases.workbench import Workbench
from shared.clock import Clock

__all__ = [
    "Assigned",
    "Blob",
    "Changed",
    "Desk",
    "Fleet",
    "KeySource",
    "ModelRow",
    "OfferedPatch",
    "OnlineKeys",
    "Outcome",
    "Proposal",
    "Push",
    "ReleaseSettings",
    "Selector",
    "change_keys",
    "found",
    "newest_root",
    "read_published",
]

MINUTE_MS: Final = 60_000
DAY_MS: Final = 24 * 60 * MINUTE_MS
GIB: Final = 1024**3


@dataclass(frozen=True, slots=True)
class ReleaseSettings:
    """What an operator may choose.

    Attributes:
        assignment_ttl_ms: how long an assignment is worth installing; it is renewed at half of that.
        build_deadline_ms: how long a build may take.
        build_max_rss_bytes: how much memory a build may hold; the same for a patch, beside the two files.
    """

    assignment_ttl_ms: int = 30 * DAY_MS
    build_deadline_ms: int = 20 * MINUTE_MS
    build_max_rss_bytes: int = 4 * GIB


class Desk:
    """The releases room.

    Args:
        data: the hub's data folder; `blobs/`, `builds/` and `patches/` in it are this room's.
        database, clock, metrics: the hub's.
        keys: the online keys, by root.
        fleet: the devices room.
        post: sends to devices.
        bus: tells of births and reports.
        settings: what an operator may choose.

    Attributes:
        blobs, catalogue, publishing, patches, assigning, attesting: the room's parts, each with its own methods.
        counts: the room's figures.
    """

    def __init__(
        self,
        *,
        data: Path,
        database: Database,
        clock: Clock,
        metrics: Metrics,
        keys: KeySource,
        fleet: Fleet,
        post: Post,
        bus: Bus,
        settings: ReleaseSettings,
    ) -> None:
        self.counts = Counts(metrics)
        self.blobs = Blobs(data / "blobs")
        self._workbench = Workbench(
            data / "builds",
            clock=clock,
            deadline_ms=settings.build_deadline_ms,
            max_rss_bytes=settings.build_max_rss_bytes,
        )
        self.patches = Patches(
            data / "patches",
            database=database,
            clock=clock,
            blobs=self.blobs,
            counts=self.counts,
            fleet=fleet,
            deadline_ms=settings.build_deadline_ms,
            memory_bytes=settings.build_max_rss_bytes,
        )
        self.catalogue = Catalogue(
            database=database,
            clock=clock,
            blobs=self.blobs,
            workbench=self._workbench,
            counts=self.counts,
            keys=keys,
            on_ready=self._on_ready,
        )
        self.publishing = Publishing(
            database=database,
            clock=clock,
            blobs=self.blobs,
            counts=self.counts,
            keys=keys,
            on_published=self.patches.look_soon,
        )
        self.assigning = Assigning(
            database=database,
            clock=clock,
            counts=self.counts,
            fleet=fleet,
            post=post,
            keys=keys,
            ttl_ms=settings.assignment_ttl_ms,
        )
        self.assigning.listen(bus)
        self.attesting = Attesting(database=database, clock=clock, keys=keys)

    def open(self) -> None:
        """Make the room's folders and clear what an interrupted run left; blocks, once, before anything else."""
        self.blobs.open()
        self._workbench.open()
        self.patches.open()

    def _on_ready(self) -> None:
        self.patches.look_soon()
        self.publishing.look_soon()

    async def root(self) -> str:
        """The newest TUF root as JSON text, for devices that join."""
        return await self.publishing.root()

    async def run(self) -> None:
        """Build, renew and send until cancelled; belongs into the hub's task group."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.catalogue.run())
            group.create_task(self.publishing.run())
            group.create_task(self.patches.run())
            group.create_task(self.assigning.run())
