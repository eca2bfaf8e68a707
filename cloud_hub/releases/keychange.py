"""A change of keys takes effect: held against what is published, stored with a snapshot and timestamp of the new keys.

In one transaction, so that no reader ever sees the new root without what must hold under it. The same change again
changes nothing. For the running hub (REST) and for the command line on its machine alike. Not here: whether a change
holds (shared/trust/ceremony.py), how one is made and signed (cloud_hub/commands).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from cloud_hub.ground import audit
from cloud_hub.ground.database import Database
from cloud_hub.releases import tables
from cloud_hub.releases.online import KeySource, sign_learned, sign_online
from cloud_hub.releases.tables import MetadataRow
from shared.errors import StorageError
from shared.trust import ceremony, repository
from shared.trust.metadata import expires_ms
from shared.trust.roles import ROOT, SNAPSHOT, TARGETS, TIMESTAMP


@dataclass(frozen=True, slots=True)
class Published:
    """What is published of roots, targets and families.

    Attributes:
        current: the newest signed metadata by role, without snapshot and timestamp.
        roots: every root, oldest first.
    """

    current: dict[str, bytes]
    roots: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change came to: versions by role, and whether it was new."""

    versions: dict[str, int]
    is_new: bool


def read_published(database: Database) -> Published:
    """What a change of keys builds on; blocks (for the command line)."""
    return database.read_now(published)


def published(conn: Connection) -> Published:
    """What a change of keys builds on; raises StorageError when there is no root yet."""
    current = tables.newest_metadata(conn)
    if not {ROOT, TARGETS} <= set(current):
        raise StorageError(
            "the hub has no signed metadata", code="storage.no_repository", hint="run `outrider-hub init` first"
        )
    roots = []
    for version in range(1, current[ROOT].version + 1):
        row = tables.find_metadata(conn, ROOT, version)
        if row is not None:
            roots.append(row.document)
    return Published(
        current={role: row.document for role, row in current.items() if role not in (SNAPSHOT, TIMESTAMP)},
        roots=tuple(roots),
    )


def newest_root(database: Database) -> bytes:
    """The newest root; blocks. Raises StorageError when there is none."""
    return read_published(database).current[ROOT]


def change_keys(conn: Connection, parts: Mapping[str, bytes], *, keys: KeySource, actor: str, now_ms: int) -> Changed:
    """Store a change of keys that is signed by all who must.

    Raises:
        TrustError, Conflict, InvalidValue: as `ceremony.check_change`.
        ConfigError: the hub does not have the online keys that the new root lists.
    """
    if parts and all(_is_stored(conn, role, document) for role, document in parts.items()):
        return Changed(_versions(parts), is_new=False)
    current = tables.newest_metadata(conn)
    ceremony.check_change({role: row.document for role, row in current.items()}, parts, now_ms=now_ms)
    rows = [_row(role, document, now_ms) for role, document in parts.items()]
    current.update({row.role: row for row in rows})
    online = keys(current[ROOT].document)
    learned = sign_learned(current, keys=online, now_ms=now_ms)
    rows += learned
    current.update({row.role: row for row in learned})
    rows += sign_online(current, snapshot=online.snapshot, timestamp=online.timestamp, now_ms=now_ms)
    tables.add_metadata(conn, rows)
    audit.record(
        conn,
        at_ms=now_ms,
        actor=actor,
        action="keys.changed",
        subject="repository",
        detail={row.role: row.version for row in rows},
    )
    return Changed(_versions(parts), is_new=True)


def _is_stored(conn: Connection, role: str, document: bytes) -> bool:
    """Whether exactly this was published; signatures that came later do not make it another."""
    if role not in ceremony.OFFLINE_ROLES and not role.startswith(ceremony.FAMILIES):
        return False
    version, _, content = _read(role, document)
    row = tables.find_metadata(conn, role, version)
    return row is not None and _read(role, row.document)[2] == content


def _versions(parts: Mapping[str, bytes]) -> dict[str, int]:
    return {role: _read(role, document)[0] for role, document in parts.items()}


def _row(role: str, document: bytes, now_ms: int) -> MetadataRow:
    version, expires, _ = _read(role, document)
    return MetadataRow(role, version, document, now_ms, expires)


def _read(role: str, document: bytes) -> tuple[int, int, bytes]:
    """Version, expiry in milliseconds since 1970, and what is signed."""
    if role == ROOT:
        root = ceremony.read_draft_root(document)
        return root.signed.version, expires_ms(root.signed), root.signed_bytes
    targets = repository.read_targets(document, role=role)
    return targets.signed.version, expires_ms(targets.signed), targets.signed_bytes
