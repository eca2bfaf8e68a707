"""The room's tables and the statements on them. Private to the room: others ask the desk.

Functions take a connection inside the caller's transaction; none of them begins, commits or decides. A rollout's
state is a document; its members have rows of their own, of which only those that changed are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy.engine import Connection, Row

from cloud_hub.ground.schema import metadata
from cloud_hub.rollouts.values import Member, Note, Rollout
from shared.errors import Conflict
from shared.ids import DeviceId
from shared.rollout import ACTIVE, Condition, DecisionView, Reading, Wish

rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("id", sa.String(160), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False, unique=True),
    sa.Column("family", sa.String(63), nullable=False, index=True),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
)

members = sa.Table(
    "rollout_members",
    metadata,
    sa.Column("rollout", sa.String(160), sa.ForeignKey("rollouts.id"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("device", sa.String(63), nullable=False),
    sa.Column("profile", sa.String(63), nullable=False),
    sa.Column("cohort", sa.Integer, nullable=False, server_default="0"),
    sa.Column("condition", sa.String(16), nullable=False),
    sa.Column("wish", sa.String(16), nullable=False),
    sa.Column("before", sa.String(64), nullable=True),
    sa.Column("assignment_version", sa.BigInteger, nullable=False),
    sa.Column("offered_ms", sa.BigInteger, nullable=False),
    sa.Column("resolved_ms", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("acknowledged", sa.Boolean, nullable=False),
    sa.Column("settled", sa.Boolean, nullable=False),
    sa.Column("stranded", sa.Boolean, nullable=False),
    sa.Column("expected_wrong", sa.Float, nullable=False, server_default="0"),
    sa.Column("expected_weight", sa.Float, nullable=False, server_default="0"),
    sa.UniqueConstraint("rollout", "device"),
)

decisions = sa.Table(
    "rollout_decisions",
    metadata,
    sa.Column("rollout", sa.String(160), sa.ForeignKey("rollouts.id"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Column("actor", sa.String(160), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("readings", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
)

_ACTIVE: Final = tuple(sorted(phase.value for phase in ACTIVE))


@dataclass(frozen=True, slots=True)
class Tally:
    """How the members of a rollout stand."""

    conditions: Mapping[str, int]
    returned: int
    outstanding: int
    stranded: int


def next_id(conn: Connection, family: str, version: str) -> tuple[str, int]:
    """A name for a new rollout of this release, and its number among all: `digits-1.1.0-1`."""
    number = (conn.execute(sa.select(sa.func.max(rollouts.c.number))).scalar_one() or 0) + 1
    taken = set(conn.execute(sa.select(rollouts.c.id).where(rollouts.c.family == family)).scalars())
    attempt = 1
    while f"{family}-{version}-{attempt}" in taken:
        attempt += 1
    return f"{family}-{version}-{attempt}", number


def add(conn: Connection, rollout: Rollout, *, number: int) -> None:
    """Store a new rollout, without members."""
    conn.execute(
        rollouts.insert().values(
            id=rollout.id,
            number=number,
            family=rollout.spec.family,
            phase=rollout.phase.value,
            state=_document(rollout),
            revision=rollout.revision,
        )
    )


def save(conn: Connection, before: Rollout, after: Rollout, notes: Sequence[Note]) -> None:
    """Store what became of a rollout and why; raises Conflict when somebody else has changed it since `before`."""
    changed = conn.execute(
        rollouts.update()
        .where(rollouts.c.id == before.id, rollouts.c.revision == before.revision)
        .values(phase=after.phase.value, state=_document(after), revision=after.revision)
    )
    if changed.rowcount != 1:
        raise Conflict(f"rollout {before.id} has moved on", code="conflict.rollout_moved", hint="look again")
    if not before.members:
        _add_members(conn, after)
    else:
        for old, new in zip(before.members, after.members, strict=True):
            if old != new:
                place = members.c.rollout == after.id, members.c.position == new.position
                conn.execute(members.update().where(*place).values(**_columns(new)))
    add_decisions(conn, after.id, notes)


def add_decisions(conn: Connection, rollout: str, notes: Sequence[Note]) -> None:
    """Append what was decided."""
    if not notes:
        return
    last = conn.execute(sa.select(sa.func.max(decisions.c.seq)).where(decisions.c.rollout == rollout)).scalar_one()
    rows = [
        {
            "rollout": rollout,
            "seq": seq,
            "at_ms": note.at_ms,
            "actor": note.actor,
            "kind": note.kind,
            "text": note.text,
            "readings": msgspec.json.encode(note.readings).decode(),
            "detail": msgspec.json.encode(note.detail).decode(),
        }
        for seq, note in enumerate(notes, start=(last or 0) + 1)
    ]
    conn.execute(decisions.insert(), rows)


def load(conn: Connection, rollout: str) -> Rollout | None:
    """One rollout with its members."""
    found = load_head(conn, rollout)
    if found is None:
        return None
    query = sa.select(members).where(members.c.rollout == rollout).order_by(members.c.position)
    return replace(found, members=tuple(_member(row) for row in conn.execute(query)))


def load_head(conn: Connection, rollout: str) -> Rollout | None:
    """One rollout without its members."""
    row = conn.execute(sa.select(rollouts.c.state).where(rollouts.c.id == rollout)).one_or_none()
    return None if row is None else msgspec.json.decode(row.state, type=Rollout)


def list_heads(conn: Connection, *, below: int, limit: int) -> list[tuple[int, Rollout]]:
    """Rollouts without members, with their numbers below this one, newest first."""
    query = sa.select(rollouts.c.number, rollouts.c.state).order_by(rollouts.c.number.desc()).limit(limit)
    rows = conn.execute(query.where(rollouts.c.number < below))
    return [(row.number, msgspec.json.decode(row.state, type=Rollout)) for row in rows]


def active_ids(conn: Connection) -> list[str]:
    """Rollouts that the controller looks after, oldest first."""
    query = sa.select(rollouts.c.id).where(rollouts.c.phase.in_(_ACTIVE)).order_by(rollouts.c.number)
    return list(conn.execute(query).scalars())


def taken(conn: Connection, family: str) -> dict[DeviceId, str]:
    """Devices that an active rollout of the family has, with its id."""
    query = (
        sa.select(members.c.device, members.c.rollout)
        .join(rollouts, rollouts.c.id == members.c.rollout)
        .where(rollouts.c.family == family, rollouts.c.phase.in_(_ACTIVE))
    )
    return {DeviceId(row.device): row.rollout for row in conn.execute(query)}


def phases(conn: Connection) -> dict[str, int]:
    """How many rollouts are in each phase."""
    query = sa.select(rollouts.c.phase, sa.func.count().label("number")).group_by(rollouts.c.phase)
    return {row.phase: row.number for row in conn.execute(query)}


def tally(conn: Connection, rollout: str) -> Tally:
    """How the members of a rollout stand."""
    what = (members.c.condition, members.c.wish, members.c.settled, members.c.stranded)
    query = sa.select(*what, sa.func.count().label("number")).where(members.c.rollout == rollout).group_by(*what)
    conditions = {condition.value: 0 for condition in Condition}
    returned = outstanding = stranded = 0
    for row in conn.execute(query):
        conditions[row.condition] += row.number
        stranded += row.number if row.stranded else 0
        if row.wish == Wish.BEFORE.value:
            returned += row.number if row.settled else 0
            outstanding += row.number if not row.settled and not row.stranded else 0
    return Tally(conditions=conditions, returned=returned, outstanding=outstanding, stranded=stranded)


def list_members(conn: Connection, rollout: str, *, after: int, limit: int) -> list[Member]:
    """Members behind a position, in the order of offers."""
    query = sa.select(members).where(members.c.rollout == rollout, members.c.position > after)
    return [_member(row) for row in conn.execute(query.order_by(members.c.position).limit(limit))]


def list_decisions(conn: Connection, rollout: str, *, after: int, limit: int) -> list[DecisionView]:
    """What was decided behind a number, oldest first."""
    query = sa.select(decisions).where(decisions.c.rollout == rollout, decisions.c.seq > after)
    return [
        DecisionView(
            seq=row.seq,
            at_ms=row.at_ms,
            actor=row.actor,
            kind=row.kind,
            text=row.text,
            readings=msgspec.json.decode(row.readings, type=tuple[Reading, ...]),
            detail=msgspec.json.decode(row.detail, type=dict[str, str | int | float | bool | None]),
        )
        for row in conn.execute(query.order_by(decisions.c.seq).limit(limit))
    ]


def _document(rollout: Rollout) -> str:
    return msgspec.json.encode(replace(rollout, members=())).decode()


def _add_members(conn: Connection, rollout: Rollout) -> None:
    rows = [{"rollout": rollout.id, "position": m.position, **_columns(m)} for m in rollout.members]
    if rows:
        conn.execute(members.insert(), rows)


def _columns(member: Member) -> dict[str, Any]:
    return {
        "device": member.device,
        "profile": member.profile,
        "cohort": member.cohort,
        "condition": member.condition.value,
        "wish": member.wish.value,
        "before": member.before,
        "assignment_version": member.assignment_version,
        "offered_ms": member.offered_ms,
        "resolved_ms": member.resolved_ms,
        "reason": member.reason,
        "acknowledged": member.acknowledged,
        "settled": member.settled,
        "stranded": member.stranded,
        "expected_wrong": member.expected_wrong,
        "expected_weight": member.expected_weight,
    }


def _member(row: Row[Any]) -> Member:
    return Member(
        device=DeviceId(row.device),
        position=row.position,
        profile=row.profile,
        cohort=row.cohort,
        condition=Condition(row.condition),
        wish=Wish(row.wish),
        before=row.before,
        assignment_version=row.assignment_version,
        offered_ms=row.offered_ms,
        resolved_ms=row.resolved_ms,
        reason=row.reason,
        acknowledged=row.acknowledged,
        settled=row.settled,
        stranded=row.stranded,
        expected_wrong=row.expected_wrong,
        expected_weight=row.expected_weight,
    )
