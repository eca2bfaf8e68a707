"""The room's tables and the statements on them. Private to the room: others ask the desk.

Functions take a connection inside the caller's transaction; none of them begins, commits or decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from cloud_hub.ground.schema import metadata
from cloud_hub.rounds.rules import ACTIVE, Head, RoundResult, Spec, State
from shared.ids import DeviceId, Digest

ROUNDS_KEPT: Final = 2
"""Of these finished rounds the tasks are kept."""

round_runs = sa.Table(
    "round_runs",
    metadata,
    sa.Column("run", sa.String(32), primary_key=True),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("head", sa.Text, nullable=False),
    sa.Column("family", sa.String(63), nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("code", sa.String(64), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("hint", sa.Text, nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("created_by", sa.String(160), nullable=False),
    sa.Column("finished_ms", sa.BigInteger, nullable=True),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("crashes", sa.Integer, nullable=False),
    sa.Column("checkpoint", sa.String(64), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("model", sa.String(64), nullable=True),
)

round_nodes = sa.Table(
    "round_nodes",
    metadata,
    sa.Column("node", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("device", sa.String(63), nullable=False, unique=True),
)

round_tasks = sa.Table(
    "round_tasks",
    metadata,
    sa.Column("message", sa.String(64), primary_key=True),
    sa.Column("run", sa.String(32), sa.ForeignKey("round_runs.run"), nullable=False),
    sa.Column("grouping", sa.String(32), nullable=False),
    sa.Column("node", sa.BigInteger, nullable=False),
    sa.Column("device", sa.String(63), nullable=False),
    sa.Column("asked_ms", sa.BigInteger, nullable=False),
    sa.Column("replied_ms", sa.BigInteger, nullable=True),
    sa.Column("closed", sa.Boolean, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=True),
    sa.Column("file", sa.String(80), nullable=False),
    sa.Column("length", sa.BigInteger, nullable=False),
    sa.Column("round", sa.Integer, nullable=False, server_default="0"),
    sa.Index("ix_round_tasks_run", "run", "grouping"),
    sa.Index("ix_round_tasks_newest", "run", "round", "asked_ms"),
)

round_results = sa.Table(
    "round_results",
    metadata,
    sa.Column("run", sa.String(32), sa.ForeignKey("round_runs.run"), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("result", sa.Text, nullable=False),
)


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run.

    Attributes:
        round: the last one that is finished.
        crashes: how often the worker has ended by itself since then.
        checkpoint, digest: the file with the state after that round, and its SHA-256; empty before the first.
        model: digest of the graph with the learned head, once there is one.
    """

    run: str
    spec: Spec
    head: Head
    state: State
    code: str
    reason: str
    hint: str
    created_ms: int
    created_by: str
    finished_ms: int | None
    round: int
    crashes: int
    checkpoint: str
    digest: str
    model: Digest | None


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One device's task and what came back: bytes, or a file in the run's folder.

    Attributes:
        closed: its round is over, so that an answer is worth nothing any more.
    """

    message: str
    run: str
    group: str
    node: int
    device: DeviceId
    asked_ms: int
    replied_ms: int | None
    closed: bool
    content: bytes
    file: str


def add_run(conn: Connection, run: str, *, spec: Spec, head: Head, at_ms: int, actor: str) -> None:
    """Store a new run."""
    conn.execute(
        round_runs.insert().values(
            run=run,
            spec=msgspec.json.encode(spec).decode(),
            head=msgspec.json.encode(head).decode(),
            family=spec.family,
            state="running",
            code="",
            reason="",
            hint="",
            created_ms=at_ms,
            created_by=actor,
            round=0,
            crashes=0,
            checkpoint="",
            digest="",
        )
    )


def find_run(conn: Connection, run: str) -> RunRow | None:
    """The run, or None."""
    row = conn.execute(sa.select(round_runs).where(round_runs.c.run == run)).one_or_none()
    return None if row is None else _run(row)


def list_runs(conn: Connection, *, before: tuple[int, str] | None = None, limit: int) -> list[RunRow]:
    """Runs, newest first, older than (created_ms, run)."""
    query = sa.select(round_runs).order_by(round_runs.c.created_ms.desc(), round_runs.c.run.desc())
    if before is not None:
        query = query.where(sa.tuple_(round_runs.c.created_ms, round_runs.c.run) < sa.tuple_(*map(sa.literal, before)))
    return [_run(row) for row in conn.execute(query.limit(limit))]


def active_runs(conn: Connection) -> list[RunRow]:
    """Runs that have not ended, oldest first."""
    query = sa.select(round_runs).where(round_runs.c.state.in_(ACTIVE)).order_by(round_runs.c.created_ms)
    return [_run(row) for row in conn.execute(query)]


def set_state(
    conn: Connection,
    run: str,
    state: State,
    *,
    at_ms: int,
    code: str = "",
    reason: str = "",
    hint: str = "",
    model: str | None = None,
) -> bool:
    """Move an active run on; False when it has ended meanwhile."""
    values: dict[str, Any] = {"state": state, "code": code[:64], "reason": reason, "hint": hint}
    if state not in ACTIVE:
        values["finished_ms"] = at_ms
    if model is not None:
        values["model"] = model
    changed = conn.execute(
        round_runs.update().where(round_runs.c.run == run, round_runs.c.state.in_(ACTIVE)).values(**values)
    )
    return bool(changed.rowcount == 1)


def note_crash(conn: Connection, run: str) -> int:
    """Count that the worker ended by itself; returns how often since the last finished round."""
    conn.execute(round_runs.update().where(round_runs.c.run == run).values(crashes=round_runs.c.crashes + 1))
    return int(conn.execute(sa.select(round_runs.c.crashes).where(round_runs.c.run == run)).scalar_one())


def bind_nodes(conn: Connection, nodes: Mapping[int, DeviceId]) -> None:
    """Note which device a number stands for; a number of another device is refused by the database (Conflict)."""
    known = devices_of(conn, nodes)
    for node, device in nodes.items():
        if known.get(node) != device:
            conn.execute(round_nodes.insert().values(node=node, device=device))


def devices_of(conn: Connection, nodes: Iterable[int]) -> dict[int, DeviceId]:
    """The devices that these numbers stand for."""
    query = sa.select(round_nodes).where(round_nodes.c.node.in_(list(nodes)))
    return {row.node: DeviceId(row.device) for row in conn.execute(query)}


def add_tasks(
    conn: Connection, run: str, group: str, tasks: Mapping[str, tuple[int, DeviceId]], *, number: int, at_ms: int
) -> None:
    """Store the tasks of an attempt at this round, by message; those that are there already stay as they are."""
    known = set(conn.execute(sa.select(round_tasks.c.message).where(round_tasks.c.message.in_(list(tasks)))).scalars())
    for message, (node, device) in tasks.items():
        if message not in known:
            conn.execute(
                round_tasks.insert().values(
                    message=message,
                    run=run,
                    grouping=group,
                    round=number,
                    node=node,
                    device=device,
                    asked_ms=at_ms,
                    closed=False,
                    file="",
                    length=0,
                )
            )


def tasks_of(conn: Connection, run: str, group: str) -> list[TaskRow]:
    """The tasks of one attempt, by node."""
    query = sa.select(round_tasks).where(round_tasks.c.run == run, round_tasks.c.grouping == group)
    return [_task(row) for row in conn.execute(query.order_by(round_tasks.c.node))]


def find_task(conn: Connection, message: str) -> TaskRow | None:
    """The task of this name, or None."""
    row = conn.execute(sa.select(round_tasks).where(round_tasks.c.message == message)).one_or_none()
    return None if row is None else _task(row)


def set_reply(conn: Connection, message: str, *, content: bytes | None, file: str, length: int, at_ms: int) -> bool:
    """Keep a device's answer; False when there is one already, or the round is over."""
    changed = conn.execute(
        round_tasks.update()
        .where(
            round_tasks.c.message == message, round_tasks.c.replied_ms.is_(None), round_tasks.c.closed.is_(sa.false())
        )
        .values(content=content, file=file, length=length, replied_ms=at_ms)
    )
    return bool(changed.rowcount == 1)


def finish_round(conn: Connection, run: str, result: RoundResult, *, checkpoint: str, digest: str) -> bool:
    """Store a round's result, move the run on, and forget what devices sent; False when the run has ended."""
    changed = conn.execute(
        round_runs.update()
        .where(round_runs.c.run == run, round_runs.c.state == "running", round_runs.c.round == result.round - 1)
        .values(round=result.round, crashes=0, checkpoint=checkpoint, digest=digest)
    )
    if changed.rowcount != 1:
        return False
    conn.execute(
        round_results.insert().values(run=run, round=result.round, result=msgspec.json.encode(result).decode())
    )
    close_tasks(conn, run)
    # Those of the round before say who took part; older ones nobody asks for.
    conn.execute(
        round_tasks.delete().where(round_tasks.c.run == run, round_tasks.c.round < result.round - ROUNDS_KEPT + 1)
    )
    return True


def close_tasks(conn: Connection, run: str) -> None:
    """Nothing that comes for these is worth anything any more, and what came is not needed any more."""
    conn.execute(
        round_tasks.update()
        .where(round_tasks.c.run == run, round_tasks.c.closed.is_(sa.false()))
        .values(closed=True, content=None, file="")
    )


def drop_tasks(conn: Connection, run: str) -> None:
    """Forget all tasks of a run that has ended."""
    conn.execute(round_tasks.delete().where(round_tasks.c.run == run))


def results_of(conn: Connection, run: str) -> list[RoundResult]:
    """The finished rounds, in order."""
    query = sa.select(round_results.c.result).where(round_results.c.run == run).order_by(round_results.c.round)
    return [msgspec.json.decode(text, type=RoundResult) for text in conn.execute(query).scalars()]


def last_cohort(conn: Connection, run: str) -> Sequence[DeviceId]:
    """Who was asked most recently."""
    group = conn.execute(newest_group(run)).scalar_one_or_none()
    return [] if group is None else [task.device for task in tasks_of(conn, run, group)]


def newest_group(run: str) -> sa.Select[Any]:
    """The attempt that was asked for most recently; read from an index, whatever the number of tasks."""
    newest = sa.select(round_tasks.c.grouping).where(round_tasks.c.run == run)
    return newest.order_by(round_tasks.c.round.desc(), round_tasks.c.asked_ms.desc()).limit(1)


def _run(row: Row[Any]) -> RunRow:
    return RunRow(
        run=row.run,
        spec=msgspec.json.decode(row.spec, type=Spec),
        head=msgspec.json.decode(row.head, type=Head),
        state=row.state,
        code=row.code,
        reason=row.reason,
        hint=row.hint,
        created_ms=row.created_ms,
        created_by=row.created_by,
        finished_ms=row.finished_ms,
        round=row.round,
        crashes=row.crashes,
        checkpoint=row.checkpoint,
        digest=row.digest,
        model=row.model,
    )


def _task(row: Row[Any]) -> TaskRow:
    return TaskRow(
        message=row.message,
        run=row.run,
        group=row.grouping,
        node=row.node,
        device=DeviceId(row.device),
        asked_ms=row.asked_ms,
        replied_ms=row.replied_ms,
        closed=row.closed,
        content=row.content or b"",
        file=row.file,
    )
