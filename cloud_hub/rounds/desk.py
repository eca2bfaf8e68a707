"""The rounds room's one public face: starts, holds, stops and tells of federated runs.

A run is a row and a worker process. The row says what the run is and how far it has come; the worker may be killed at
any moment, and so may the hub: the next worker goes on from the last finished round. A worker that ends by itself
without finishing a round is started anew a few times, then the run has failed.

When a run is trained, its result is pushed as a model like any other: built, measured, and then signed by a person.

Not here: questions and answers of one run (session.py), Flower (worker.py), signing.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import secrets
import shutil
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.devices.desk import Desk as Devices
from cloud_hub.ground import audit
from cloud_hub.ground.bus import Bus, DeviceBorn, DeviceDied, DeviceReported, DeviceStandingChanged
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.post import Post
from cloud_hub.ground.refusals import NotFound
from cloud_hub.releases.desk import Desk as Releases
from cloud_hub.rounds import rules, tables
from cloud_hub.rounds.counts import Counts
from cloud_hub.rounds.course import Course
from cloud_hub.rounds.inbox import Inbox
from cloud_hub.rounds.rules import RoundResult, Spec
from cloud_hub.rounds.tables import RunRow
from shared import limits
from shared.clock import Clock
from shared.errors import Conflict, OutriderError
from shared.ids import DeviceId
from shared.wire.envelope import Envelope
from shared.wire.messages import RoundReply

__all__ = ["Desk", "Run", "Spec"]

logger = logging.getLogger(__name__)

LOOK_S: Final = 60.0
RETRY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Run:
    """A run and its finished rounds."""

    row: RunRow
    results: Sequence[RoundResult]


class Desk:
    """The rounds room.

    Args:
        data: the hub's data folder; `rounds/` in it is this room's.
        database, clock, metrics, post, bus: the hub's.
        devices: tells who is here and what they serve.
        releases: keeps the base and takes the result.
    """

    def __init__(
        self,
        *,
        data: Path,
        database: Database,
        clock: Clock,
        metrics: Metrics,
        post: Post,
        bus: Bus,
        devices: Devices,
        releases: Releases,
    ) -> None:
        self._root = data / "rounds"
        self._database = database
        self._clock = clock
        self._devices = devices
        self._releases = releases
        self._counts = Counts(metrics)
        self._course = Course(
            self._root,
            database=database,
            clock=clock,
            counts=self._counts,
            post=post,
            releases=releases,
            present=self._present,
        )
        self._inbox = Inbox(self._root, database=database, clock=clock, counts=self._counts, tell=self._course.replied)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()
        bus.subscribe(DeviceBorn, self._born)
        bus.subscribe(DeviceReported, self._stirred)
        bus.subscribe(DeviceDied, self._stirred)
        bus.subscribe(DeviceStandingChanged, self._stirred)

    async def start(self, spec: Spec, *, actor: str) -> Run:
        """Begin a run.

        Raises:
            InvalidValue: a field is unusable.
            NotFound: there is no such base.
            Conflict: the result's version is taken, or too many runs are held.
            OutriderError: `rounds.flower_missing` without Flower; `rounds.features` and `rounds.head` when the base
                has no head that can be learned.
        """
        rules.check_spec(spec)
        if importlib.util.find_spec("flwr") is None:
            raise OutriderError(
                "this hub has no Flower, whose strategies hold federated runs",
                code="rounds.flower_missing",
                hint="install the extra `fl` on the hub: pip install 'outrider[fl]'",
            )
        await self._require_free(spec)
        run = f"r-{secrets.token_hex(5)}"
        head = await self._course.inspect(run, spec)
        at_ms = self._clock.wall_ms()

        def work(conn: Connection) -> None:
            active = tables.active_runs(conn)
            if len(active) >= rules.MAX_ACTIVE or any(row.spec.family == spec.family for row in active):
                names = ", ".join(row.run for row in active)
                raise Conflict(
                    f"there is a run of {spec.family} already, or {rules.MAX_ACTIVE} runs in all: {names}",
                    code="conflict.run",
                    hint="wait for it, or stop it: outrider round stop RUN",
                )
            tables.add_run(conn, run, spec=spec, head=head, at_ms=at_ms, actor=actor)
            audit.record(
                conn,
                at_ms=at_ms,
                actor=actor,
                action="round.started",
                subject=f"round:{run}",
                detail={
                    "base": f"{spec.family}/{spec.base}",
                    "version": spec.version,
                    "strategy": spec.strategy,
                    "rounds": spec.rounds,
                    "features": head.features,
                },
            )

        await self._database.write(work)
        self._wake.set()
        return await self.get(run)

    async def get(self, run: str) -> Run:
        """One run; raises NotFound."""

        def work(conn: Connection) -> Run | None:
            row = tables.find_run(conn, run)
            return None if row is None else Run(row, tables.results_of(conn, run))

        found = await self._database.read(work)
        if found is None:
            raise _unknown(run)
        return found

    async def page(self, *, after: str = "", limit: int) -> Sequence[RunRow]:
        """Runs, newest first, those that began before run `after`."""

        def work(conn: Connection) -> Sequence[RunRow]:
            mark = tables.find_run(conn, after) if after else None
            return tables.list_runs(conn, before=(mark.created_ms, mark.run) if mark else None, limit=limit)

        return await self._database.read(work)

    async def stop(self, run: str, *, actor: str) -> Run:
        """End a run for good; one that has ended stays as it is."""
        await self.get(run)
        at_ms = self._clock.wall_ms()

        def work(conn: Connection) -> bool:
            moved = tables.set_state(
                conn, run, "stopped", at_ms=at_ms, code="rounds.stopped", reason=f"stopped by {actor}"
            )
            if moved:
                tables.drop_tasks(conn, run)
                audit.record(conn, at_ms=at_ms, actor=actor, action="round.stopped", subject=f"round:{run}")
            return moved

        if await self._database.write(work):
            self._counts.runs.labels("stopped").inc()
            task = self._tasks.get(run)
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
            await asyncio.to_thread(shutil.rmtree, self._root / run, ignore_errors=True)
        return await self.get(run)

    async def replied(self, device: DeviceId, envelope: Envelope, reply: RoundReply) -> None:
        """Take a device's answer from a message."""
        await self._inbox.replied(device, envelope, reply)

    async def upload(
        self, device: DeviceId, *, run: str, message: str, length: int, pieces: AsyncIterable[bytes]
    ) -> bool:
        """Take a large answer over HTTPS; False when there was one already. Raises NotFound, InvalidValue, Conflict."""
        return await self._inbox.upload(device, run=run, message=message, length=length, pieces=pieces)

    async def run(self) -> None:
        """Hold all runs that have not ended, until cancelled; belongs into the hub's task group."""
        async with asyncio.TaskGroup() as group:
            opened = False
            while True:
                self._wake.clear()
                pause_s = LOOK_S
                try:
                    rows = await self._database.read(tables.active_runs)
                    if not opened:
                        await asyncio.to_thread(self._course.open, {row.run for row in rows})
                        opened = True
                except OutriderError as error:
                    logger.error("runs cannot be read: %s: %s", error.code, error.message)
                    rows, pause_s = [], RETRY_S
                for row in rows:
                    if row.run not in self._tasks:
                        task = group.create_task(self._course.hold(row.run))
                        self._tasks[row.run] = task
                        task.add_done_callback(partial(self._let_go, row.run))
                self._counts.active.set(len(self._tasks))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()

    def _let_go(self, run: str, _task: asyncio.Task[None]) -> None:
        self._tasks.pop(run, None)
        self._wake.set()

    async def _require_free(self, spec: Spec) -> None:
        with contextlib.suppress(NotFound):
            taken = await self._releases.catalogue.get(spec.family, spec.version)
            if taken.state != "rejected":
                raise Conflict(
                    f"{spec.family}/{spec.version} is there already",
                    code="conflict.version",
                    hint="a version never changes; choose the next version number",
                )

    async def _present(self, spec: Spec) -> tuple[DeviceId, ...]:
        found: list[DeviceId] = []
        after = ""
        while len(found) < rules.MAX_COHORT:
            page = await self._devices.list(after=after, limit=limits.MAX_PAGE_ITEMS, labels=spec.selector)
            found += [
                device.id
                for device in page
                if rules.takes_part(
                    spec,
                    labels=device.labels,
                    online=device.online,
                    reported=device.reported,
                    standing=device.standing.value,
                )
            ]
            if len(page) < limits.MAX_PAGE_ITEMS:
                break
            after = page[-1].id
        return tuple(found[: rules.MAX_COHORT])

    async def _born(self, event: DeviceBorn) -> None:
        self._course.born(event.device)

    async def _stirred(self, _event: DeviceReported | DeviceDied | DeviceStandingChanged) -> None:
        self._course.stir()


def _unknown(run: str) -> NotFound:
    return NotFound(f"there is no run {run[:40]!r}", code="not_found.run", hint="`outrider round ls` lists them")
