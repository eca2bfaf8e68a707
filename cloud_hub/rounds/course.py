"""Sees runs through: starts their workers, goes on after whatever was killed, and hands results to the releases room.

A worker that ends by itself without finishing a round is started anew a few times, then the run has failed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.ground import audit
from cloud_hub.ground.database import Database
from cloud_hub.ground.post import Post
from cloud_hub.releases.desk import Desk as Releases
from cloud_hub.releases.desk import Push
from cloud_hub.rounds import frames, process, rules, tables
from cloud_hub.rounds.counts import Counts
from cloud_hub.rounds.process import WorkerLost
from cloud_hub.rounds.rules import Head, Spec
from cloud_hub.rounds.session import RunFailed, Session, Surroundings
from cloud_hub.rounds.tables import RunRow
from shared import limits
from shared.clock import Clock
from shared.errors import Conflict, OutriderError
from shared.ids import DeviceId, Digest
from shared.model import Lineage

logger = logging.getLogger(__name__)

BUILD_LOOK_S: Final = 0.5
BUILD_S: Final = 1800.0
INSPECT_S: Final = 20.0
RETRY_S: Final = 2.0
ACTOR: Final = "hub"
FLOAT_BYTES: Final = 4
_FIELDS_OF_LINEAGE: Final = ("rounds", "strategy", "learning_rate", "epochs", "batch_size", "seed", "min_devices")


class Course:
    """The runs' way from their start to their end.

    Args:
        root: the room's folder; each run has one of its name in it.
        present: the devices that can be asked now.
    """

    def __init__(
        self,
        root: Path,
        *,
        database: Database,
        clock: Clock,
        counts: Counts,
        post: Post,
        releases: Releases,
        present: Callable[[Spec], Awaitable[tuple[DeviceId, ...]]],
    ) -> None:
        self._root = root
        self._database = database
        self._clock = clock
        self._counts = counts
        self._releases = releases
        self._around = Surroundings(
            database=database, clock=clock, post=post, store=releases.blobs, counts=counts, present=present
        )
        self._sessions: dict[str, Session] = {}
        self._looking: set[str] = set()

    def born(self, device: DeviceId) -> None:
        """A device has connected."""
        for session in self._sessions.values():
            session.born(device)

    def stir(self) -> None:
        """Something about the fleet has changed."""
        for session in self._sessions.values():
            session.stir()

    def replied(self, run: str, message: str) -> None:
        """An answer was stored."""
        session = self._sessions.get(run)
        if session is not None:
            session.replied(message)

    def open(self, active: set[str]) -> None:
        """Make the room's folder; blocks, once, before anything else.

        Folders of runs that have ended are removed, and what uploads left that a killed hub was taking.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in self._root.iterdir():
            if folder.name not in active and folder.name not in self._looking:
                shutil.rmtree(folder, ignore_errors=True)
        for unfinished in self._root.glob("*/*.part"):
            unfinished.unlink(missing_ok=True)

    async def hold(self, run: str) -> None:
        """See one run to its end, however often its worker has to be started, and whatever fails meanwhile."""
        ended = False
        while not ended:
            try:
                ended = await self._go_on(run)
                continue
            except OutriderError as error:
                # A full disk or a locked database passes; the run goes on where it is.
                logger.error("a run is held up: %s: %s: %s", run, error.code, error.message)
            except Exception:
                # A defect that one run meets must not end the hub for all devices; the log has it in full.
                logger.exception("a run is held up")
            await asyncio.sleep(RETRY_S)

    async def _go_on(self, run: str) -> bool:
        """Take the run a stretch further; True when it has ended.

        Raises:
            OutriderError: the disk, the database or the network refused; what was done is stored or will be done again.
        """
        row = await self._database.read(lambda conn: tables.find_run(conn, run))
        if row is None or row.state not in rules.ACTIVE:
            await asyncio.to_thread(shutil.rmtree, self._root / run, ignore_errors=True)
            return True
        try:
            if row.state == "running":
                await self._train(row)
            else:
                await self._await_build(row)
        except WorkerLost as error:
            await self._lost(run, error)
        except OutriderError as error:
            if not isinstance(error, RunFailed) and error.code.startswith(("storage", "transfer")):
                raise
            await self._end(run, "failed", code=error.code, reason=error.message, hint=error.hint)
        except Exception as error:
            # A defect here ends this run and not the hub; the log has it in full.
            logger.exception("a run failed")
            await self._end(run, "failed", code="internal", reason=f"{type(error).__name__}; see the hub's log")
        return False

    async def _train(self, row: RunRow) -> None:
        folder = self._root / row.run
        await asyncio.to_thread(folder.mkdir, mode=0o700, exist_ok=True)
        begin = await self._begin(row, folder)
        async with process.worker("run", folder=folder) as worker:
            session = Session(row, worker=worker, folder=folder, around=self._around)
            self._sessions[row.run] = session
            try:
                await worker.send(begin)
                result = await session.serve()
            finally:
                del self._sessions[row.run]
        await self._push(row, result)

    async def _begin(self, row: RunRow, folder: Path) -> frames.Begin:
        spec = row.spec
        base = await self._releases.catalogue.get(spec.family, spec.base)
        model, golden = (self._releases.blobs.find(digest) for digest in (base.push.model, base.push.golden))
        if model is None or golden is None or base.report is None or base.report.signature is None:
            raise RunFailed(f"the files of {spec.family}/{spec.base} are gone", code="rounds.base")
        return frames.Begin(
            run=row.run,
            number=rules.run_number(row.run),
            spec=spec,
            head=row.head,
            signature=base.report.signature,
            preparations=base.push.preparations,
            labels=base.push.labels,
            model=str(model.path.absolute()),
            golden=str(golden.path.absolute()),
            folder=str(folder.absolute()),
            checkpoint=row.checkpoint,
            digest=row.digest,
        )

    async def inspect(self, run: str, spec: Spec) -> Head:
        """The head that a run would learn; a short-lived worker looks, because the hub itself reads no graph."""
        if spec.learned:
            await self._releases.catalogue.require_base(spec.family, spec.base)
        base = await self._releases.catalogue.get(spec.family, spec.base)
        if base.state != "ready":
            raise Conflict(f"{spec.family}/{spec.base} is {base.state}, not ready", code="conflict.base")
        unknown = Head(features="", width=1, classes=1)
        row = RunRow(run, spec, unknown, "running", "", "", "", 0, "", None, 0, 0, "", "", None)
        folder = self._root / run
        self._looking.add(run)
        await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True)
        try:
            begin = await self._begin(row, folder)
            async with asyncio.timeout(INSPECT_S), process.worker("inspect", folder=folder) as worker:
                await worker.send(begin)
                answer = await worker.receive()
        except TimeoutError as error:
            raise OutriderError("the base could not be looked at in time", code="timeout.inspect") from error
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            self._looking.discard(run)
        if isinstance(answer, frames.Failed):
            raise OutriderError(answer.reason, code=answer.code, hint=answer.hint)
        assert isinstance(answer, frames.Inspected)
        if answer.head.classes != len(base.push.labels):
            raise OutriderError(
                f"the last layer has {answer.head.classes} outputs for {len(base.push.labels)} labels",
                code="rounds.head",
            )
        if answer.head.width * answer.head.classes * FLOAT_BYTES > limits.MAX_ROUND_MESSAGE_BYTES - limits.MIB:
            raise OutriderError(
                f"a head of {answer.head.width} by {answer.head.classes} does not fit into a message",
                code="rounds.head",
                hint=f"messages have up to {limits.MAX_ROUND_MESSAGE_BYTES} bytes; use narrower features",
            )
        return answer.head

    async def _push(self, row: RunRow, result: Path) -> None:
        """Hand the trained graph to the releases room, under the base's labels, golden set and gate."""
        spec = row.spec
        blob = await asyncio.to_thread(self._releases.blobs.adopt, result)
        base = (await self._releases.catalogue.get(spec.family, spec.base)).push
        results = await self._database.read(lambda conn: tables.results_of(conn, row.run))
        lineage = Lineage(
            training_data=f"federated run {row.run}",
            parent=f"{spec.family}/{spec.base}",
            parameters={"run": row.run, **{name: str(getattr(spec, name)) for name in _FIELDS_OF_LINEAGE}},
            metrics=results[-1].metrics,
            license=base.lineage.license,
            owner=base.lineage.owner,
        )
        actor = f"round:{row.run}"
        if spec.learned:
            await self._releases.catalogue.learn(
                spec.family, spec.base, version=spec.version, model=blob.digest, lineage=lineage, actor=actor
            )
        else:
            await self._releases.catalogue.push(_pushed(spec, base, blob.digest, lineage), actor=actor)
        at_ms = self._clock.wall_ms()
        await self._database.write(
            lambda conn: tables.set_state(conn, row.run, "building", at_ms=at_ms, model=blob.digest)
        )

    async def _await_build(self, row: RunRow) -> None:
        spec = row.spec
        try:
            async with asyncio.timeout(BUILD_S):
                while True:
                    model = await self._releases.catalogue.get(spec.family, spec.version)
                    if model.state != "building":
                        break
                    await asyncio.sleep(BUILD_LOOK_S)
        except TimeoutError as error:
            raise RunFailed("the result is still being built", code="timeout.build") from error
        if model.state == "ready":
            await self._end(row.run, "finished")
        else:
            report = model.report
            raise RunFailed(
                f"the result was rejected: {report.reason if report else ''}",
                code=report.code if report else "model.rejected",
                hint=report.hint if report else "",
            )

    async def _lost(self, run: str, error: WorkerLost) -> None:
        self._counts.workers_lost.inc()
        crashes = await self._database.write(lambda conn: tables.note_crash(conn, run))
        logger.warning("the worker of a run is started again: %s: %s", run, error.message)
        if crashes > rules.MAX_CRASHES:
            await self._end(
                run, "failed", code=error.code, reason=f"{error.message} ({crashes} times without a finished round)"
            )

    async def _end(self, run: str, state: rules.State, *, code: str = "", reason: str = "", hint: str = "") -> None:
        at_ms = self._clock.wall_ms()

        def work(conn: Connection) -> bool:
            moved = tables.set_state(conn, run, state, at_ms=at_ms, code=code, reason=reason, hint=hint)
            if moved:
                tables.drop_tasks(conn, run)
                audit.record(
                    conn,
                    at_ms=at_ms,
                    actor=ACTOR,
                    action=f"round.{state}",
                    subject=f"round:{run}",
                    detail={"code": code, "reason": reason[:500]} if code else {},
                )
            return moved

        if await self._database.write(work):
            self._counts.runs.labels(state).inc()
            logger.info("a run has ended: %s: %s %s", run, state, reason)


def _pushed(spec: Spec, base: Push, model: Digest, lineage: Lineage) -> Push:
    """What goes to the releases room: the trained graph, all else as the base was pushed."""
    return Push(
        family=spec.family,
        version=spec.version,
        model=model,
        golden=base.golden,
        calibration=base.calibration,
        labels=base.labels,
        task=base.task,
        signature=base.signature,
        preparations=base.preparations,
        gate=base.gate,
        lineage=lineage,
    )
