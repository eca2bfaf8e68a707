"""Learned releases: what the hub makes and signs by itself, within the bounds of a base that a person signed.

Rules: a base is one that is published, says what may be learned on it, and whose family people let the hub sign for;
the file is the base's with other numbers in the tensors that it names, and no device would take another; the manifest
is the base's but for version, lineage, and what was measured; it appears in one transaction with its role, snapshot,
timestamp and audit row, and goes to devices by assignments and rollouts like any other.

Not here: how the numbers are learned (cloud_hub/rounds), what devices check (shared/trust/refresh.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from msgspec.structs import replace
from sqlalchemy.engine import Connection

from cloud_hub.ground import audit
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases import rules, tables
from cloud_hub.releases.blobs import Blobs
from cloud_hub.releases.online import KeySource, OnlineKeys, add_learned, learned_signer, sign_online
from cloud_hub.releases.tables import MetadataRow, ModelRow
from shared import limits
from shared.errors import ConfigError, Conflict, InvalidValue, OutriderError, StorageError, TrustError
from shared.ids import Digest
from shared.learned import check_learned_file, check_learned_manifest
from shared.model import Learning, Lineage, Manifest, Variant, decode_manifest, target_path
from shared.trust import repository
from shared.trust.roles import ROOT, TARGETS

ACTOR: Final = "hub"


@dataclass(frozen=True, slots=True)
class LearnedOn:
    """What a release is learned on.

    Attributes:
        shift: how far the head moved from it.
    """

    row: ModelRow
    manifest: Manifest
    shift: float = 0.0

    @property
    def bounds(self) -> Learning:
        """What may be learned on it."""
        assert self.manifest.learning is not None, "looked at when it was read"
        return self.manifest.learning

    @property
    def variant(self) -> Variant:
        """Whose file is learned on."""
        return next(variant for variant in self.manifest.variants if variant.name == self.bounds.variant)


def require_base(conn: Connection, blobs: Blobs, keys: KeySource, *, family: str, version: str) -> LearnedOn:
    """The base of this name.

    Raises:
        NotFound: there is none.
        Conflict: it is not published, says nothing of learning, or nobody allowed the hub to sign for its family.
        ConfigError: the key for that is not here.
    """
    row = tables.find_model(conn, family, version)
    if row is None:
        raise NotFound(f"there is no model {family[:80]}/{version[:80]}", hint="`outrider model ls` lists them")
    if row.state != "ready" or row.published_ms is None:
        raise Conflict(f"{family}/{version} is not released", code="conflict.base", hint="sign and publish it first")
    manifest = decode_manifest(blobs.read(row.files[0].digest, max_bytes=limits.MAX_MANIFEST_BYTES))
    if manifest.learning is None or manifest.base is not None:
        raise Conflict(
            f"nothing may be learned on {family}/{version}",
            code="conflict.base",
            hint="push a base with --learn TENSOR,… --max-shift NORM, and have it signed",
        )
    current = tables.newest_metadata(conn)
    if not {ROOT, TARGETS} <= set(current):
        raise StorageError("the hub has no signed metadata", code="storage.no_repository")
    learned_signer(repository.read_targets(current[TARGETS].document), row.family, keys(current[ROOT].document))
    return LearnedOn(row, manifest)


def hold_against(base: LearnedOn, blobs: Blobs, *, model: Digest) -> LearnedOn:
    """The base with how far this model's head moved from it; blocks.

    Raises:
        InvalidValue: `trust.learned`, it is another graph, or moved further than the base allows.
        StorageError: a file is gone.
    """
    ours = blobs.read(base.variant.file.digest, max_bytes=limits.MAX_MODEL_BYTES)
    theirs = blobs.read(model, max_bytes=limits.MAX_MODEL_BYTES)
    try:
        shift = check_learned_file(
            memoryview(theirs), memoryview(ours), tensors=base.bounds.tensors, max_shift=base.bounds.max_shift
        )
    except TrustError as error:
        raise InvalidValue(
            error.message,
            code=error.code,
            hint="learn in smaller steps, or let a person release it: push it as a version of its own",
        ) from error
    return LearnedOn(base.row, base.manifest, shift)


def learned_manifest(base: LearnedOn, row: ModelRow, measured: Variant) -> Manifest:
    """The manifest of a learned release.

    Args:
        measured: its only variant, as the build measured it.

    Raises:
        InvalidValue: `model.gate`, it answers worse than its base by more than the gate lets a variant lose.
    """
    reason = rules.learned_verdict(row.push.gate, accuracy=measured.accuracy, base=base.variant.accuracy)
    if reason:
        raise InvalidValue(f"beside its base: {reason}", code="model.gate", hint="learn on more, or in smaller steps")
    manifest, golden = base.manifest, base.manifest.golden
    at = target_path(row.family, row.version, golden.file.path.rpartition("/")[2])
    made = replace(
        manifest,
        version=row.version,
        variants=(replace(measured, ram_bytes=base.variant.ram_bytes),),
        golden=replace(golden, file=replace(golden.file, path=at)),
        lineage=_with_shift(row.push.lineage, base.shift),
        learning=None,
        base=repository.manifest_ref(manifest),
    )
    check_learned_manifest(made, manifest)
    return made


def _with_shift(lineage: Lineage, shift: float) -> Lineage:
    return replace(lineage, metrics={**lineage.metrics, "head.shift": shift})


@dataclass(frozen=True, slots=True)
class Published:
    """What was published, and what could not be signed: people let the hub sign no more, or its key is gone."""

    rows: tuple[ModelRow, ...]
    refused: tuple[tuple[ModelRow, OutriderError], ...]


def publish_ready(conn: Connection, blobs: Blobs, keys: KeySource, *, now_ms: int) -> Published:
    """Sign and publish what was learned and is ready; raises StorageError when a file is gone."""
    published: list[ModelRow] = []
    refused: list[tuple[ModelRow, OutriderError]] = []
    for row in tables.list_ready(conn):
        if row.push.learned_on is None or row.published_ms is not None:
            continue
        current = tables.newest_metadata(conn)
        try:
            rows = _sign(current, row, blobs, keys(current[ROOT].document), now_ms=now_ms)
        except (Conflict, ConfigError) as error:
            refused.append((row, error))
            continue
        tables.add_metadata(conn, rows)
        tables.mark_published(conn, row.family, row.version, at_ms=now_ms, actor=ACTOR)
        audit.record(
            conn,
            at_ms=now_ms,
            actor=ACTOR,
            action="release.learned",
            subject=f"release:{row.family}/{row.version}",
            detail={
                "base": str(row.push.learned_on),
                "manifest": row.files[0].digest,
                **{added.role: added.version for added in rows},
            },
        )
        published.append(row)
    return Published(tuple(published), tuple(refused))


def _sign(
    current: Mapping[str, MetadataRow], row: ModelRow, blobs: Blobs, keys: OnlineKeys, *, now_ms: int
) -> list[MetadataRow]:
    manifest = decode_manifest(blobs.read(row.files[0].digest, max_bytes=limits.MAX_MANIFEST_BYTES))
    learned = add_learned(current, manifest, keys=keys, now_ms=now_ms)
    newest = {**current, learned.role: learned}
    return [learned, *sign_online(newest, snapshot=keys.snapshot, timestamp=keys.timestamp, now_ms=now_ms)]
