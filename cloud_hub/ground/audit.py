"""Who did what to what, and when: one row beside each mutation, each row bound to the one before by its hash.

`hash = SHA-256(previous hash, newline, canonical JSON of the row)`: whoever alters or removes a row in the middle has
to alter all that follow. Cutting off the end is not visible from here; whoever keeps a hash elsewhere sees that too.

The row is written in the transaction of the mutation that it tells of: either both are there or neither is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloud_hub.ground.database import Lock, lift_deadlines, lock
from cloud_hub.ground.schema import metadata

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

GENESIS: Final = "0" * 64

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("subject", sa.String(256), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sqlite_autoincrement=True,
)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One row: `actor` did `action` (`device.enrolled`) to `subject` (`device:pi-3`)."""

    seq: int
    at_ms: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Json]
    hash: str


@dataclass(frozen=True, slots=True)
class AuditVerdict:
    """What `verify` found: how many rows hold together, and the first that does not."""

    rows: int
    broken_at: int | None


def record(
    conn: Connection, *, at_ms: int, actor: str, action: str, subject: str, detail: Mapping[str, Json] | None = None
) -> None:
    """Append a row in the caller's write transaction. `detail` must not hold secrets."""
    lock(conn, Lock.AUDIT)
    previous = conn.execute(sa.select(audit.c.hash).order_by(audit.c.seq.desc()).limit(1)).scalar_one_or_none()
    text = _canonical(dict(detail or {}))
    conn.execute(
        audit.insert().values(
            at_ms=at_ms,
            actor=actor,
            action=action,
            subject=subject,
            detail=text,
            hash=_link(previous or GENESIS, at_ms=at_ms, actor=actor, action=action, subject=subject, detail=text),
        )
    )


def verify(conn: Connection) -> AuditVerdict:
    """Recompute the chain from the first row to the last."""
    # A long chain takes its time between the statement and the end of the transaction.
    lift_deadlines(conn)
    previous, rows = GENESIS, 0
    for row in conn.execute(sa.select(audit).order_by(audit.c.seq)):
        expected = _link(
            previous, at_ms=row.at_ms, actor=row.actor, action=row.action, subject=row.subject, detail=row.detail
        )
        if row.hash != expected:
            return AuditVerdict(rows=rows, broken_at=row.seq)
        previous, rows = row.hash, rows + 1
    return AuditVerdict(rows=rows, broken_at=None)


def entries(conn: Connection, *, after: int, limit: int) -> tuple[AuditEntry, ...]:
    """Rows with a number above `after`, oldest first."""
    query = sa.select(audit).where(audit.c.seq > after).order_by(audit.c.seq).limit(limit)
    return tuple(
        AuditEntry(
            seq=row.seq,
            at_ms=row.at_ms,
            actor=row.actor,
            action=row.action,
            subject=row.subject,
            detail=json.loads(row.detail),
            hash=row.hash,
        )
        for row in conn.execute(query)
    )


def newest_ms(conn: Connection) -> int | None:
    """When the row was written that came last; None before the first."""
    found = conn.execute(sa.select(audit.c.at_ms).order_by(audit.c.seq.desc()).limit(1)).scalar_one_or_none()
    return None if found is None else int(found)


def _canonical(detail: dict[str, Json]) -> str:
    return json.dumps(detail, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _link(previous: str, *, at_ms: int, actor: str, action: str, subject: str, detail: str) -> str:
    row = json.dumps([at_ms, actor, action, subject, detail], separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(f"{previous}\n{row}".encode()).hexdigest()
