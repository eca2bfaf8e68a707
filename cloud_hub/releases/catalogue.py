"""Pushed models: takes them in, has them built one after another, and writes the manifest of what passed.

A row is `building` until its build has ended one way or another. The hub may be killed at any moment: what is still
`building` at the next start is built again, a few times at most, because a build could be what takes the hub down.

Not here: how a build is done (workbench.py, builder.py), signing and publishing (publishing.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.ground import audit
from cloud_hub.ground.database import Database
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases import learning, rules, tables
from cloud_hub.releases.blobs import Blob, Blobs
from cloud_hub.releases.counts import Counts
from cloud_hub.releases.learning import LearnedOn
from cloud_hub.releases.online import KeySource
from cloud_hub.releases.rules import BuildReport, Push
from cloud_hub.releases.tables import ModelRow
from cloud_hub.releases.workbench import Built, Materials, Workbench
from shared import limits
from shared.clock import Clock
from shared.errors import ConfigError, Conflict, InvalidValue, OutriderError, StorageError, TrustError
from shared.ids import Digest, ModelVersion
from shared.model import (
    FileRef,
    Golden,
    Lineage,
    Manifest,
    Variant,
    check_manifest,
    encode_manifest,
    manifest_path,
    target_path,
)

logger = logging.getLogger(__name__)

MAX_RESTARTS: Final = 3
RETRY_S: Final = 5.0
GOLDEN_FILE: Final = "golden.bin"
VARIANT_NAMES: Final = ("int8", "fp32")
"""In the order of preference in which the manifest lists them."""
ACTOR: Final = "hub"


class Catalogue:
    """What was pushed, and the loop that builds it.

    Args:
        database, clock, blobs, workbench, counts: what it works with.
        keys: the online keys, by root.
        on_ready: told when a version has become ready.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        blobs: Blobs,
        workbench: Workbench,
        counts: Counts,
        keys: KeySource,
        on_ready: Callable[[], None],
    ) -> None:
        self._database = database
        self._clock = clock
        self._blobs = blobs
        self._workbench = workbench
        self._counts = counts
        self._keys = keys
        self._on_ready = on_ready
        self._wake = asyncio.Event()

    async def push(self, push: Push, *, actor: str) -> ModelRow:
        """Take a model in and have it built; the same push again returns what became of the first.

        A rejected version may be pushed anew, changed or not: nobody has seen a release of it.

        Raises:
            InvalidValue: a field is unusable, or a file that it names was not uploaded.
            Conflict: the version is taken by another push.
        """
        rules.check_push(push)
        return await self._take(push, actor=actor)

    async def require_base(self, family: str, version: str) -> LearnedOn:
        """The release that something may be learned on; raises as `learning.require_base`."""
        return await self._database.read(
            lambda conn: learning.require_base(conn, self._blobs, self._keys, family=family, version=version)
        )

    async def learn(
        self, family: str, base: str, *, version: ModelVersion, model: Digest, lineage: Lineage, actor: str
    ) -> ModelRow:
        """Take in a model that was learned on a base, have it measured, and then signed by the hub and published.

        Raises:
            NotFound, Conflict, ConfigError: as `require_base`; Conflict also when the version is taken.
            InvalidValue: it is another graph than its base's, or moved further than that allows.
        """
        ground = await self.require_base(family, base)
        push = rules.learned_push(ground.row.push, version=version, model=model, lineage=lineage)
        await asyncio.to_thread(learning.hold_against, ground, self._blobs, model=model)
        return await self._take(push, actor=actor)

    async def _take(self, push: Push, *, actor: str) -> ModelRow:
        await asyncio.to_thread(self._require_blobs, push)
        at_ms = self._clock.wall_ms()

        def work(conn: Connection) -> ModelRow:
            found = tables.find_model(conn, push.family, push.version)
            if found is None or found.state == "rejected":
                counters, present = tables.family_counters(conn, push.family)
                rules.release_floor(
                    wanted=push.min_release_counter, present=present, counter=rules.next_counter(counters)
                )
                tables.begin_build(conn, push, build=found.build + 1 if found else 1, at_ms=at_ms, actor=actor)
                audit.record(
                    conn,
                    at_ms=at_ms,
                    actor=actor,
                    action="model.pushed",
                    subject=f"model:{push.family}/{push.version}",
                    detail={"model": push.model, "golden": push.golden},
                )
            elif found.push != push:
                raise Conflict(
                    f"{push.family}/{push.version} was pushed before with other content",
                    code="conflict.version",
                    hint="a version never changes; choose the next version number",
                )
            row = tables.find_model(conn, push.family, push.version)
            assert row is not None
            return row

        row = await self._database.write(work)
        self._wake.set()
        return row

    async def get(self, family: str, version: str) -> ModelRow:
        """The pushed version; raises NotFound."""
        row = await self._database.read(lambda conn: tables.find_model(conn, family, version))
        if row is None:
            raise NotFound(f"there is no model {family}/{version}", hint="`outrider ls models` lists them")
        return row

    async def page(
        self, *, family: str | None = None, after: tuple[str, str] = ("", ""), limit: int, published: bool = False
    ) -> Sequence[ModelRow]:
        """Pushed versions, or only those that are published, by name."""
        return await self._database.read(
            lambda conn: tables.list_models(conn, family=family, after=after, limit=limit, published=published)
        )

    async def run(self) -> None:
        """Build what waits, until cancelled."""
        await self._after_restart()
        while True:
            self._wake.clear()
            try:
                for row in await self._database.read(tables.list_building):
                    await self._build(row)
            except OutriderError as error:
                # A full disk or a locked database passes; the rows are still `building` and are tried again.
                logger.error("builds are held up: %s: %s", error.code, error.message)
                await asyncio.sleep(RETRY_S)
                continue
            await self._wake.wait()

    def manifest(self, row: ModelRow) -> bytes:
        """The manifest of a version that is ready; blocks."""
        return self._blobs.read(row.files[0].digest, max_bytes=limits.MAX_MANIFEST_BYTES)

    def _require_blobs(self, push: Push) -> None:
        for field, digest, max_bytes in (
            ("model", push.model, limits.MAX_MODEL_BYTES),
            ("golden", push.golden, limits.MAX_GOLDEN_BYTES),
            ("calibration", push.calibration, limits.MAX_GOLDEN_BYTES),
        ):
            if digest is None:
                continue
            blob = self._blobs.find(digest)
            if blob is None:
                raise InvalidValue(
                    f"{field}: no file {digest} was uploaded",
                    code="invalid.blob_missing",
                    hint=f"PUT /v1/blobs/{digest} first",
                )
            if blob.length > max_bytes:
                raise InvalidValue(
                    f"{field}: the file has {blob.length} bytes, {max_bytes} are possible", code="invalid.length"
                )

    async def _after_restart(self) -> None:
        at_ms = self._clock.wall_ms()

        def work(conn: Connection) -> None:
            for row in tables.list_building(conn):
                if row.restarts < MAX_RESTARTS:
                    tables.note_restart(conn, row)
                else:
                    report = BuildReport(
                        code="model.build_interrupted",
                        reason=f"the hub stopped {row.restarts + 1} times during this build",
                        hint="push it again when the hub runs steadily; if it stops again, the build is the cause",
                    )
                    self._reject(conn, row, report, at_ms=at_ms)

        await self._database.write(work)

    async def _build(self, row: ModelRow) -> None:
        push = row.push
        model, golden = self._blobs.find(push.model), self._blobs.find(push.golden)
        calibration = self._blobs.find(push.calibration) if push.calibration else None
        if model is None or golden is None or (push.calibration and calibration is None):
            gone = BuildReport(
                code="model.blob_missing", reason="an uploaded file is gone", hint="upload and push again"
            )
            await self._end(row, gone)
            return
        materials = Materials(model.path, golden.path, calibration.path if calibration else None)

        async def on_step(step: str) -> None:
            try:
                await self._database.write(lambda conn: tables.set_step(conn, row, step))
            except StorageError as error:
                logger.warning("progress of a build was not stored: %s", error.message)

        logger.info("build begins: %s/%s", row.family, row.version)
        async with self._workbench.build(push, materials, on_step=on_step) as built:
            self._counts.build_seconds.observe(built.took_ms / 1000)
            if built.report.code:
                await self._end(row, built.report)
            else:
                await self._conclude(row, built, model=model, golden=golden)

    async def _conclude(self, row: ModelRow, built: Built, *, model: Blob, golden: Blob) -> None:
        """Take the variants' files in, then manifest, counter and state in one transaction."""
        try:
            variants = await asyncio.to_thread(self._variants, row, built, model)
            at_ms = self._clock.wall_ms()
            if row.push.learned_on is not None:
                base = await self.require_base(row.family, row.push.learned_on)
                moved = await asyncio.to_thread(learning.hold_against, base, self._blobs, model=model.digest)
                manifest = learning.learned_manifest(moved, row, variants[0])
                counters: tuple[int | None, int] = None, manifest.min_release_counter
                await self._database.write(
                    lambda conn: self._keep(conn, row, built.report, manifest, counters=counters, at_ms=at_ms)
                )
            else:
                await self._database.write(
                    lambda conn: self._make_ready(
                        conn, row, built.report, variants=variants, golden=golden, at_ms=at_ms
                    )
                )
        except (InvalidValue, Conflict, ConfigError, NotFound, TrustError) as error:
            # Of a learned release also that its base, the delegation or the key has gone meanwhile.
            report = BuildReport(code=error.code, reason=error.message, hint=error.hint)
            await self._end(row, report)
            return
        self._counts.builds.labels("ready").inc()
        logger.info("build is ready: %s/%s", row.family, row.version)
        self._on_ready()

    def _variants(self, row: ModelRow, built: Built, model: Blob) -> tuple[Variant, ...]:
        measured = {variant.name: variant for variant in built.report.variants if variant.released}
        variants = []
        names = VARIANT_NAMES if row.push.learned_on is None else (rules.LEARNED_VARIANT,)
        for name in names:
            variant = measured.get(name)
            if variant is None:
                continue
            # The names of files are ours and not the report's: the child has read hostile input.
            blob = model if name == "fp32" else self._blobs.adopt(_plain_file(built.folder, f"{name}.onnx"))
            variants.append(
                Variant(
                    name=name,
                    runtime="onnx",
                    file=_file(row, f"{name}.onnx", blob.digest, blob.length),
                    accuracy=variant.accuracy,
                    answers=variant.answers,
                    ram_bytes=variant.ram_bytes,
                )
            )
        if not variants:
            raise InvalidValue("the model itself did not pass its gate", code="model.gate")
        return tuple(variants)

    def _make_ready(
        self,
        conn: Connection,
        row: ModelRow,
        report: BuildReport,
        *,
        variants: tuple[Variant, ...],
        golden: Blob,
        at_ms: int,
    ) -> None:
        push = row.push
        counters, present = tables.family_counters(conn, row.family)
        counter = rules.next_counter(counters)
        floor = rules.release_floor(wanted=push.min_release_counter, present=present, counter=counter)
        if report.signature is None:
            raise InvalidValue("the build reported no signature", code="invalid.manifest")
        manifest = Manifest(
            family=row.family,
            version=row.version,
            release_counter=counter,
            min_release_counter=floor,
            task=push.task,
            signature=report.signature,
            preparations=push.preparations,
            labels=push.labels,
            golden=Golden(
                file=_file(row, GOLDEN_FILE, golden.digest, golden.length),
                samples=report.samples,
                min_agreement=push.gate.min_agreement,
            ),
            variants=variants,
            lineage=push.lineage,
            learning=push.learning,
        )
        self._keep(conn, row, report, manifest, counters=(counter, floor), at_ms=at_ms)

    def _keep(
        self,
        conn: Connection,
        row: ModelRow,
        report: BuildReport,
        manifest: Manifest,
        *,
        counters: tuple[int | None, int],
        at_ms: int,
    ) -> None:
        check_manifest(manifest)
        data = encode_manifest(manifest)
        if len(data) > limits.MAX_MANIFEST_BYTES:
            raise InvalidValue(
                f"the manifest has {len(data)} bytes, {limits.MAX_MANIFEST_BYTES} are possible",
                code="invalid.manifest",
                hint="use fewer golden samples or shorter labels",
            )
        blob = self._blobs.put(data)
        files = (
            FileRef(path=manifest_path(row.family, row.version), length=blob.length, digest=blob.digest),
            manifest.golden.file,
            *(variant.file for variant in manifest.variants),
        )
        if tables.finish_build(conn, row, state="ready", report=report, at_ms=at_ms, counters=counters, files=files):
            audit.record(
                conn,
                at_ms=at_ms,
                actor=ACTOR,
                action="model.built",
                subject=f"model:{row.family}/{row.version}",
                detail={"manifest": blob.digest, "release_counter": manifest.release_counter},
            )

    async def _end(self, row: ModelRow, report: BuildReport) -> None:
        at_ms = self._clock.wall_ms()
        await self._database.write(lambda conn: self._reject(conn, row, report, at_ms=at_ms))
        self._counts.builds.labels("rejected").inc()
        logger.warning("build rejected: %s/%s: %s: %s", row.family, row.version, report.code, report.reason)

    def _reject(self, conn: Connection, row: ModelRow, report: BuildReport, *, at_ms: int) -> None:
        if tables.finish_build(conn, row, state="rejected", report=report, at_ms=at_ms):
            audit.record(
                conn,
                at_ms=at_ms,
                actor=ACTOR,
                action="model.rejected",
                subject=f"model:{row.family}/{row.version}",
                detail={"code": report.code, "reason": report.reason[:500]},
            )


def _file(row: ModelRow, name: str, digest: Digest, length: int) -> FileRef:
    return FileRef(path=target_path(row.family, row.version, name), length=length, digest=digest)


def _plain_file(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise InvalidValue(f"the build left no file {name}", code="invalid.build")
    return path
