"""Signed metadata: what an operator's signature is held against, and what the hub signs itself (snapshot, timestamp).

Rules: metadata is added, never changed; a release appears in one transaction with its role, its snapshot, its
timestamp and its audit row, so that no reader ever sees a half of it; the online keys can make a release neither
appear nor disappear, they only say which signed files are the newest. Renewal of the two online roles happens when
half of their life is over.

Not here: the checks of signatures, thresholds and versions (shared/trust/publication.py), the offline keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.ground import audit
from cloud_hub.ground.database import Database
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases import learning, rules, tables
from cloud_hub.releases.blobs import Blobs
from cloud_hub.releases.counts import Counts
from cloud_hub.releases.keychange import Changed, change_keys
from cloud_hub.releases.online import KeySource, OnlineKeys, sign_learned, sign_online
from cloud_hub.releases.tables import MetadataRow, ModelRow
from shared import limits
from shared.clock import Clock
from shared.errors import ConfigError, Conflict, OutriderError, StorageError, TrustError
from shared.ids import FamilyName
from shared.trust import publication, repository
from shared.trust.library import Metadata, Signer, Targets
from shared.trust.metadata import check_signatures, expires_ms
from shared.trust.roles import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, family_role, parse_file_name

logger = logging.getLogger(__name__)

RENEW_EVERY_S: Final = 60.0
KEPT_VERSIONS: Final = 16
"""Old snapshots and timestamps that stay, for devices that are in the middle of a refresh."""
ACTOR: Final = "hub"


@dataclass(frozen=True, slots=True)
class Proposal:
    """What there is to sign: the manifest's text and all files, beside the metadata that the signature builds on.

    Attributes:
        role: the current metadata of the family's role; None before its first release.
    """

    manifest: str
    release: ModelRow
    root: str
    root_version: int
    targets: str
    role: str | None


def found(
    database: Database,
    *,
    root: bytes,
    targets: bytes,
    snapshot: Signer,
    timestamp: Signer,
    now_ms: int,
    actor: str = "outrider-hub init",
) -> None:
    """Begin the repository with its first signed root and targets; blocks (for the command line).

    Raises:
        TrustError: the root is not signed by its own keys, or the targets are not signed by the root's.
        Conflict: the database has a root already.
    """
    trusted, top = repository.read_root(root), repository.read_targets(targets)
    check_signatures(trusted.signed, TARGETS, top)

    def work(conn: Connection) -> None:
        if tables.find_metadata(conn, ROOT) is not None:
            raise Conflict("this hub has a root already", code="conflict.root", hint="start in an empty data folder")
        rows = [
            MetadataRow(ROOT, trusted.signed.version, root, now_ms, expires_ms(trusted.signed)),
            MetadataRow(TARGETS, top.signed.version, targets, now_ms, expires_ms(top.signed)),
        ]
        tables.add_metadata(conn, rows)
        current = {row.role: row for row in rows}
        tables.add_metadata(conn, sign_online(current, snapshot=snapshot, timestamp=timestamp, now_ms=now_ms))
        audit.record(
            conn,
            at_ms=now_ms,
            actor=actor,
            action="repository.founded",
            subject="repository",
            detail={"root_version": trusted.signed.version},
        )

    database.write_now(work)


class Publishing:
    """The repository of signed metadata.

    Args:
        database, clock, blobs, counts: what it works with.
        keys: the online keys, by root.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        blobs: Blobs,
        counts: Counts,
        keys: KeySource,
        on_published: Callable[[], None],
    ) -> None:
        self._database = database
        self._clock = clock
        self._blobs = blobs
        self._counts = counts
        self._keys = keys
        self._on_published = on_published
        self._wake = asyncio.Event()
        self._unsigned: set[str] = set()

    async def root(self) -> str:
        """The newest root, for devices that join."""
        row = await self._database.read(lambda conn: tables.find_metadata(conn, ROOT))
        if row is None:
            raise _unfounded()
        return row.document.decode()

    async def metadata(self, name: str) -> bytes:
        """A metadata file by its consistent-snapshot name; raises InvalidValue or NotFound."""
        role, version = parse_file_name(name)
        row = await self._database.read(lambda conn: tables.find_metadata(conn, role, version))
        if row is None:
            raise NotFound(f"there is no metadata {name[:160]!r}", code="not_found.metadata")
        return row.document

    async def proposal(self, family: str, version: str) -> Proposal:
        """What an operator is asked to sign; raises NotFound, or Conflict when the model is not ready."""

        def work(conn: Connection) -> tuple[ModelRow, dict[str, MetadataRow]]:
            return _ready(conn, family, version), tables.newest_metadata(conn)

        row, current = await self._database.read(work)
        if ROOT not in current or TARGETS not in current:
            raise _unfounded()
        manifest = await asyncio.to_thread(self._blobs.read, row.files[0].digest, max_bytes=limits.MAX_MANIFEST_BYTES)
        role = current.get(family_role(row.family))
        return Proposal(
            manifest=manifest.decode(),
            release=row,
            root=current[ROOT].document.decode(),
            root_version=current[ROOT].version,
            targets=current[TARGETS].document.decode(),
            role=None if role is None else role.document.decode(),
        )

    async def publish(self, family: str, version: str, *, targets: str | None, role: str, actor: str) -> ModelRow:
        """Make a signed release available; the same request again changes nothing.

        Raises:
            NotFound: there is no such model.
            Conflict: it is not ready, or something else was published since the proposal was fetched.
            TrustError: a signature, a version, an expiry or a file does not hold.
        """
        now_ms = self._clock.wall_ms()
        top = None if targets is None else targets.encode()
        try:
            row, is_new = await self._database.write(
                lambda conn: self._publish(
                    conn, family, version, targets=top, role=role.encode(), actor=actor, now_ms=now_ms
                )
            )
        except OutriderError as error:
            self._counts.publications.labels("refused").inc()
            logger.warning("release refused: %s/%s: %s: %s", family[:80], version[:80], error.code, error.message)
            raise
        self._counts.publications.labels("published" if is_new else "repeated").inc()
        self._on_published()
        if is_new:
            logger.info("release published: %s/%s", row.family, row.version)
        await self._watch_expiry()
        return row

    async def change_keys(self, parts: Mapping[str, str], *, actor: str) -> Changed:
        """Make a signed change of keys take effect; the same change again changes nothing.

        Raises:
            TrustError, Conflict, InvalidValue: as `shared.trust.ceremony.check_change`.
            ConfigError: the hub does not have the online keys that the new root lists.
        """
        now_ms = self._clock.wall_ms()
        pieces = {role: text.encode() for role, text in parts.items()}
        try:
            changed = await self._database.write(
                lambda conn: change_keys(conn, pieces, keys=self._keys, actor=actor, now_ms=now_ms)
            )
        except OutriderError as error:
            logger.warning("change of keys refused: %s: %s", error.code, error.message)
            raise
        if changed.is_new:
            logger.info("keys changed: %s", ", ".join(f"{role} {number}" for role, number in changed.versions.items()))
        await self._watch_expiry()
        return changed

    async def run(self) -> None:
        """Renew what the hub signs in time, and publish what it learned, until cancelled."""
        while True:
            self._wake.clear()
            for work, what in ((self.renew, "metadata was not renewed"), (self.publish_learned, "not published")):
                try:
                    await work()
                except OutriderError as error:
                    # Devices go on with what they have until it expires; the next try is a minute away.
                    logger.error("%s: %s: %s", what, error.code, error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RENEW_EVERY_S):
                    await self._wake.wait()

    def look_soon(self) -> None:
        """Something may be ready that the hub learned."""
        self._wake.set()

    async def publish_learned(self) -> bool:
        """Sign and publish what the hub learned and is ready; returns whether there was anything."""
        now_ms = self._clock.wall_ms()
        done = await self._database.write(
            lambda conn: learning.publish_ready(conn, self._blobs, self._keys, now_ms=now_ms)
        )
        for row, error in done.refused:
            name = f"{row.family}/{row.version}"
            if name not in self._unsigned:
                logger.error("learned release not published: %s: %s: %s", name, error.code, error.message)
        self._unsigned = {f"{row.family}/{row.version}" for row, _ in done.refused}
        for row in done.rows:
            self._counts.publications.labels("learned").inc()
            logger.info("learned release published: %s/%s", row.family, row.version)
        if done.rows:
            self._on_published()
            await self._watch_expiry()
        return bool(done.rows)

    async def renew(self) -> bool:
        """Sign the online roles again if one of them has lived half its life; returns whether that was so."""
        now_ms = self._clock.wall_ms()

        def work(conn: Connection) -> bool:
            current = tables.newest_metadata(conn)
            if not {ROOT, TARGETS} <= set(current):
                raise _unfounded()
            keys = self._keys(current[ROOT].document)
            rows = _learned_rows(current, keys=keys, now_ms=now_ms)
            due = [role for role in (SNAPSHOT, TIMESTAMP) if role not in current or _is_due(current[role], now_ms)]
            if not due and not rows:
                return False
            current.update({row.role: row for row in rows})
            rows += sign_online(
                current,
                snapshot=keys.snapshot if SNAPSHOT in due or rows else None,
                timestamp=keys.timestamp,
                now_ms=now_ms,
            )
            tables.add_metadata(conn, rows)
            for row in rows:
                tables.forget_metadata(conn, row.role, below=row.version - KEPT_VERSIONS)
            audit.record(
                conn,
                at_ms=now_ms,
                actor=ACTOR,
                action="metadata.renewed",
                subject="repository",
                detail={row.role: row.version for row in rows},
            )
            return True

        renewed = await self._database.write(work)
        await self._watch_expiry()
        return renewed

    def _publish(
        self,
        conn: Connection,
        family: str,
        version: str,
        *,
        targets: bytes | None,
        role: bytes,
        actor: str,
        now_ms: int,
    ) -> tuple[ModelRow, bool]:
        row = _ready(conn, family, version)
        if row.published_ms is not None:
            _require_same(conn, row, targets=targets, role=role)
            return row, False
        current = tables.newest_metadata(conn)
        if not {ROOT, TARGETS, SNAPSHOT, TIMESTAMP} <= set(current):
            raise _unfounded()
        name = family_role(row.family)
        before = current.get(name)
        found = publication.check_publication(
            current[ROOT].document,
            family=row.family,
            current_targets=current[TARGETS].document,
            current_role=None if before is None else before.document,
            targets=targets,
            role=role,
            now_ms=now_ms,
        )
        if targets is not None:
            _check_other_families(current[TARGETS].document, targets, family=row.family)
        rules.check_listed(found.files, release=row.files)
        self._require_files(row)
        rows = [_row(repository.read_targets(role, role=name), name, role, now_ms)]
        if targets is not None:
            rows.append(_row(repository.read_targets(targets), TARGETS, targets, now_ms))
        current.update({added.role: added for added in rows})
        keys = self._keys(current[ROOT].document)
        rows += sign_online(current, snapshot=keys.snapshot, timestamp=keys.timestamp, now_ms=now_ms)
        tables.add_metadata(conn, rows)
        tables.mark_published(conn, row.family, row.version, at_ms=now_ms, actor=actor)
        audit.record(
            conn,
            at_ms=now_ms,
            actor=actor,
            action="release.published",
            subject=f"release:{row.family}/{row.version}",
            detail={"manifest": row.files[0].digest, **{added.role: added.version for added in rows}},
        )
        return _ready(conn, family, version), True

    def _require_files(self, row: ModelRow) -> None:
        for file in row.files:
            blob = self._blobs.find(file.digest)
            if blob is None or blob.length != file.length:
                raise StorageError(
                    f"{file.path} is not in the blob store as it was built",
                    code="storage.blob",
                    hint=f"upload the file with the digest {file.digest} again",
                )
        self._blobs.read(row.files[0].digest, max_bytes=limits.MAX_MANIFEST_BYTES)

    async def _watch_expiry(self) -> None:
        current = await self._database.read(tables.newest_metadata)
        families = [row.expires_ms for role, row in current.items() if role.startswith("models/")]
        for role in (ROOT, TARGETS, SNAPSHOT, TIMESTAMP):
            if role in current:
                self._counts.metadata_expires.labels(role).set(current[role].expires_ms / 1000)
        if families:
            self._counts.metadata_expires.labels("families").set(min(families) / 1000)


def _ready(conn: Connection, family: str, version: str) -> ModelRow:
    row = tables.find_model(conn, family, version)
    if row is None:
        raise NotFound(f"there is no model {family[:80]}/{version[:80]}", hint="`outrider model ls` lists them")
    if row.state != "ready":
        raise Conflict(
            f"{family}/{version} is {row.state} and cannot be released",
            code="conflict.not_ready",
            hint=f"`outrider model show {family}/{version}` says why",
        )
    return row


def _require_same(conn: Connection, row: ModelRow, *, targets: bytes | None, role: bytes) -> None:
    """Raise Conflict unless exactly this was published before."""
    for name, document in ((family_role(row.family), role), (TARGETS, targets)):
        if document is None:
            continue
        version = repository.read_targets(document, role=name).signed.version
        stored = tables.find_metadata(conn, name, version)
        if stored is None or stored.document != document:
            raise Conflict(
                f"{row.family}/{row.version} is published already, with another signature",
                code="conflict.published",
                hint="there is nothing left to do; a released version never changes",
            )


def _check_other_families(before: bytes, after: bytes, *, family: FamilyName) -> None:
    """Raise TrustError unless new targets leave the delegations of all other families as they are.

    Whose keys sign a family is a change of its own: made in passing, it would cut off that family's releases.
    """
    old, new = (_delegations(repository.read_targets(document)) for document in (before, after))
    for role, delegation in old.items():
        if role != family_role(family) and new.get(role) != delegation:
            raise TrustError(
                f"the new targets change who signs {role!r}",
                code="trust.delegation",
                hint="change one family at a time",
            )
    extra = sorted(set(new) - set(old) - {family_role(family)})
    if extra:
        raise TrustError(
            f"the new targets delegate {extra[0]!r}, which this release does not need", code="trust.delegation"
        )


def _delegations(targets: Metadata[Targets]) -> dict[str, object]:
    delegations = targets.signed.delegations
    roles = (delegations.roles or {}) if delegations is not None else {}
    return {name: role.to_dict() for name, role in roles.items()}


def _row(metadata: Metadata[Targets], role: str, document: bytes, now_ms: int) -> MetadataRow:
    return MetadataRow(role, metadata.signed.version, document, now_ms, expires_ms(metadata.signed))


def _learned_rows(current: Mapping[str, MetadataRow], *, keys: OnlineKeys, now_ms: int) -> list[MetadataRow]:
    """The hub's own roles that are due. A lost key of theirs must not hold up what all devices wait for."""
    try:
        return sign_learned(current, keys=keys, now_ms=now_ms)
    except ConfigError as error:
        logger.error("learned releases are not signed again: %s: %s", error.code, error.message)
        return []


def _is_due(row: MetadataRow, now_ms: int) -> bool:
    return rules.is_due(issued_ms=row.stored_ms, expires_ms=row.expires_ms, now_ms=now_ms)


def _unfounded() -> StorageError:
    return StorageError(
        "the hub has no signed metadata",
        code="storage.no_repository",
        hint="run `outrider-hub init` for this data folder",
    )
