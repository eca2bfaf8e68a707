"""Makes patches between files of releases, for the files that the fleet really runs, one at a time in a child.

Looked at when a build has ended, when a release was published, and by a slow timer, because devices move on. A pair
is tried once: what does not pay is remembered with its reason, and so is a child that failed. A patch is a help and
nothing rests on it; an assignment that was signed before the patch was ready goes without.

Not here: what a patch is (shared/patch), which pairs are wanted and what pays (rules.py), who is told (assigning.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from sqlalchemy.engine import Connection

from cloud_hub.ground import arrivals
from cloud_hub.ground.database import Database
from cloud_hub.releases import rules, tables
from cloud_hub.releases.assigning import Fleet
from cloud_hub.releases.blobs import Blob, Blobs
from cloud_hub.releases.counts import Counts
from cloud_hub.releases.patch_job import MAX_REPORT_BYTES, MODULE, PATCH_FILE, REPORT_FILE, Job, Report
from cloud_hub.releases.rules import BuiltVersion, PatchPair
from cloud_hub.releases.tables import ModelRow, PatchRow
from shared import limits
from shared.clock import Clock
from shared.errors import OutriderError
from shared.ids import Digest

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class OfferedPatch:
    """A patch to a file of a version, for people: from which version, and what it saves.

    Attributes:
        path: of the file that it makes.
        base_version: the oldest version with the file that it starts from.
        length: bytes of the patch.
        share: of the whole file's bytes.
    """

    path: str
    base_version: str
    base: Digest
    digest: Digest
    length: int
    share: float


class Patches:
    """The loop that makes patches, and what it made.

    Args:
        root: a folder for the children's folders; emptied by `open`.
        database, clock, blobs, counts, fleet: what it works with.
        deadline_ms: how long one patch may take.
        memory_bytes: what a child may hold beside the two files.
    """

    def __init__(
        self,
        root: Path,
        *,
        database: Database,
        clock: Clock,
        blobs: Blobs,
        counts: Counts,
        fleet: Fleet,
        deadline_ms: int,
        memory_bytes: int,
    ) -> None:
        self._root = root
        self._database = database
        self._clock = clock
        self._blobs = blobs
        self._counts = counts
        self._fleet = fleet
        self._deadline_ms = deadline_ms
        self._memory_bytes = memory_bytes
        self._wake = asyncio.Event()

    def open(self) -> None:
        """Make the folder and remove what an interrupted run left; blocks."""
        with arrivals.translated():
            self._root.mkdir(parents=True, exist_ok=True)
            for stray in self._root.iterdir():
                shutil.rmtree(stray, ignore_errors=True)

    def look_soon(self) -> None:
        """Something was built or published."""
        self._wake.set()

    async def run(self) -> None:
        """Make what is wanted, until cancelled."""
        while True:
            self._wake.clear()
            try:
                await self.look()
            except OutriderError as error:
                # A full disk or a locked database passes; the timer comes again.
                logger.error("patches are held up: %s: %s", error.code, error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._wake.wait()

    async def look(self) -> None:
        """Forget what is of no use any more, then make what is wanted and was not tried."""
        versions, known = await self._database.read(lambda conn: (tables.list_ready(conn), tables.list_patches(conn)))
        known = await self._collect(versions, known)
        built = [
            BuiltVersion(row.family, row.version, row.release_counter, row.files)
            for row in versions
            if row.release_counter is not None
        ]
        tried = {(row.base, row.result) for row in known}
        for pair in rules.patch_pairs(built, await self._running()):
            if (pair.base.digest, pair.result.digest) in tried:
                continue
            row = await self._try(pair)
            if row is not None:
                await self._database.write(lambda conn, row=row: tables.add_patch(conn, row))  # type: ignore[misc]

    async def offered(self, row: ModelRow) -> tuple[OfferedPatch, ...]:
        """The patches to the files of a version."""
        paths = {file.digest: file for file in row.files}

        def work(conn: Connection) -> tuple[OfferedPatch, ...]:
            return tuple(
                OfferedPatch(
                    path=paths[found.result].path,
                    base_version=tables.version_of_file(conn, row.family, found.base) or "",
                    base=found.base,
                    digest=found.digest,
                    length=found.length,
                    share=found.length / found.full_length,
                )
                for found in tables.patches_to(conn, list(paths))
                if found.digest is not None
            )

        return await self._database.read(work)

    async def _running(self) -> Mapping[tuple[str, Digest], int]:
        counts: Counter[tuple[str, Digest]] = Counter()
        after = ""
        while page := await self._fleet.list(after=after, limit=limits.MAX_PAGE_ITEMS):
            for device in page:
                counts.update(rules.running_files(device.reported).items())
            after = page[-1].id
        return counts

    async def _collect(self, versions: list[ModelRow], known: list[PatchRow]) -> list[PatchRow]:
        """Removes rows whose base or result belongs to no version any more, or whose file is gone, and their
        files; returns the other rows."""
        files = {file.digest for row in versions for file in row.files}
        useless = [
            row
            for row in known
            if not {row.base, row.result} <= files
            or (row.digest is not None and await asyncio.to_thread(self._blobs.find, row.digest) is None)
        ]
        rest = [row for row in known if row not in useless]
        kept = {row.digest for row in rest} | files
        for row in useless:
            await self._database.write(lambda conn, row=row: tables.forget_patch(conn, row))  # type: ignore[misc]
            if row.digest is not None and row.digest not in kept:
                await asyncio.to_thread(self._blobs.forget, row.digest)
        return rest

    async def _try(self, pair: PatchPair) -> PatchRow | None:
        """How the pair came out; None when a file is not there, and it may be later."""
        base, result = self._blobs.find(pair.base.digest), self._blobs.find(pair.result.digest)
        if base is None or result is None:
            return None
        with arrivals.translated():
            folder = Path(tempfile.mkdtemp(dir=self._root))
        try:
            reason = await self._child(folder, base, result)
            report = None if reason else await asyncio.to_thread(_read_report, folder)
            if report is None:
                return self._row(pair, reason=reason or "the child left no report")
            if not rules.patch_pays(length=report.length, full_packed=report.full_packed):
                return self._row(pair, report=report, reason="it saves too little")
            patch = await asyncio.to_thread(self._blobs.adopt, folder / PATCH_FILE)
            return self._row(pair, report=report, patch=patch)
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _row(
        self, pair: PatchPair, *, report: Report | None = None, patch: Blob | None = None, reason: str = ""
    ) -> PatchRow:
        outcome = "made" if patch else "declined" if report else "failed"
        self._counts.patches.labels(outcome).inc()
        logger.info("patch %s: %s from %s: %s", outcome, pair.result.path, pair.base.path, reason or "kept")
        return PatchRow(
            base=pair.base.digest,
            result=pair.result.digest,
            digest=patch.digest if patch else None,
            length=report.length if report else 0,
            full_length=pair.result.length,
            full_packed=report.full_packed if report else 0,
            reason=reason,
            made_ms=self._clock.wall_ms(),
        )

    async def _child(self, folder: Path, base: Blob, result: Blob) -> str:
        """Why the child failed, empty when it did its work."""
        job = Job(
            parent=os.getpid(),
            base=str(base.path.absolute()),
            result=str(result.path.absolute()),
            cpu_s=self._deadline_ms // 1000 + 1,
            memory_bytes=self._memory_bytes,
        )
        # Started from the loop's own thread: the parent-death signal is bound to the thread that starts the child.
        with arrivals.translated():
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-m", MODULE,
                cwd=folder,
                env={"LANG": "C.UTF-8", "HOME": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1",
                     "OPENBLAS_NUM_THREADS": "1"},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        try:
            async with asyncio.timeout(self._deadline_ms / 1000):
                await child.communicate(msgspec.json.encode(job))
        except TimeoutError:
            return f"it took longer than {self._deadline_ms} ms"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
        return "" if child.returncode == 0 else f"the child ended with status {child.returncode}"


def _read_report(folder: Path) -> Report | None:
    path = folder / REPORT_FILE
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        if path.stat().st_size <= MAX_REPORT_BYTES:
            return msgspec.json.decode(path.read_bytes(), type=Report)
    return None
