"""Tasks are kept for as long as somebody may ask for them, and found without a walk over all that there ever were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command

from cloud_hub.ground import migrate
from cloud_hub.ground.database import Database
from cloud_hub.rounds import rules, tables
from cloud_hub.rounds.rules import Head, Phase, RoundResult
from shared.ids import DeviceId
from tests.fakes.hub_parts import hub_database
from tests.fakes.round_room import spec

RUN = "r-0123456789"
DEVICES = [DeviceId(f"dev-{number}") for number in range(3)]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with hub_database(tmp_path) as database:
        database.write_now(
            lambda conn: tables.add_run(
                conn, RUN, spec=spec(rounds=9), head=Head(features="r", width=2, classes=2), at_ms=1, actor="test"
            )
        )
        yield database


def ask(
    database: Database,
    number: int,
    *,
    devices: list[DeviceId] | None = None,
    phase: Phase = "train",
    attempt: int = 1,
    at_ms: int = 1,
) -> None:
    """Store the tasks of an attempt."""
    nodes = {rules.node_of(device): device for device in devices or DEVICES}
    names = {
        rules.message_of(RUN, number=number, phase=phase, attempt=attempt, node=node): (node, device)
        for node, device in nodes.items()
    }
    group = rules.group_of(number, phase=phase, attempt=attempt)
    database.write_now(lambda conn: tables.add_tasks(conn, RUN, group, names, number=number, at_ms=at_ms))


def finish(database: Database, number: int) -> bool:
    """Finish a round."""
    result = RoundResult(round=number, attempt=1, asked=3, answered=3, accepted=3, took_ms=1, metrics={})
    return database.write_now(lambda conn: tables.finish_round(conn, RUN, result, checkpoint="c", digest="d"))


def groups(database: Database) -> dict[str, set[bool]]:
    """Which attempts have tasks, and whether those are closed."""
    found: dict[str, set[bool]] = {}
    query = sa.select(tables.round_tasks.c.grouping, tables.round_tasks.c.closed)
    for row in database.read_now(lambda conn: conn.execute(query).all()):
        found.setdefault(row.grouping, set()).add(row.closed)
    return found


def test_tasks_go_two_rounds_later_and_with_the_run(database: Database) -> None:
    for number in range(1, 5):
        ask(database, number)
        ask(database, number, phase="evaluate")
        assert finish(database, number)
    assert groups(database) == {"3t1": {True}, "3e1": {True}, "4t1": {True}, "4e1": {True}}
    ask(database, 5)
    assert groups(database)["5t1"] == {False}
    database.write_now(lambda conn: tables.drop_tasks(conn, RUN))
    assert groups(database) == {}


def test_the_last_cohort_is_the_one_of_the_newest_attempt(database: Database) -> None:
    assert database.read_now(lambda conn: tables.last_cohort(conn, RUN)) == []
    ask(database, 1, at_ms=10)
    ask(database, 2, devices=DEVICES[:2], at_ms=20)
    ask(database, 2, devices=DEVICES[1:2], attempt=2, at_ms=30)
    # The wall's clock may be set back between rounds, and the number of the round is what counts.
    ask(database, 3, devices=DEVICES[2:], at_ms=5)
    assert database.read_now(lambda conn: tables.last_cohort(conn, RUN)) == DEVICES[2:]


def test_the_newest_attempt_is_found_without_sorting(database: Database) -> None:
    def plan(conn: Any) -> str:
        query = tables.newest_group(RUN).compile(dialect=conn.dialect, compile_kwargs={"literal_binds": True})
        return str(conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}").all())

    told = database.read_now(plan)
    assert "ix_round_tasks_newest" in told
    assert "TEMP B-TREE" not in told


def test_a_database_from_before_learns_the_rounds_of_its_tasks(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'old.db'}")
    try:

        def old(conn: Any) -> None:
            config = migrate._config()
            config.attributes["connection"] = conn
            command.upgrade(config, "0007_rounds")
            conn.exec_driver_sql(
                "INSERT INTO round_runs (run, spec, head, family, state, code, reason, hint, created_ms, created_by, "
                "round, crashes, checkpoint, digest) VALUES ('r', '', '', 'f', 'running', '', '', '', 1, 't', 11, 0, "
                "'', '')"
            )
            conn.exec_driver_sql(
                "INSERT INTO round_tasks (message, run, grouping, node, device, asked_ms, closed, file, length) "
                "VALUES ('m', 'r', '12t1', 1, 'dev-1', 1, 0, '', 0)"
            )

        database.write_now(old)
        migrate.upgrade(database)
        found = database.read_now(lambda conn: conn.exec_driver_sql("SELECT round FROM round_tasks").scalar_one())
        assert found == 12
    finally:
        database.close()
