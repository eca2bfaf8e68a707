"""One writer, readers that cannot write, work that is done whole or not at all."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection

from cloud_hub.devices import tables as _devices
from cloud_hub.ground import audit, auth, migrate
from cloud_hub.ground.database import Database
from cloud_hub.ground.schema import metadata
from cloud_hub.releases import tables as _releases
from cloud_hub.rollouts import tables as _rollouts
from cloud_hub.rounds import tables as _rounds
from cloud_hub.telemetry import tables as _telemetry
from shared.errors import ConfigError, Conflict, StorageError
from tests.fakes.hub_parts import hub_database

assert all((_devices, _releases, _rollouts, _rounds, _telemetry, auth))


def add(conn: Connection, name: str) -> None:
    audit.record(conn, at_ms=1, actor="a", action="b", subject=name)


def count(conn: Connection) -> int:
    return int(conn.execute(sa.select(sa.func.count()).select_from(audit.audit)).scalar_one())


def test_a_write_is_there_after_a_restart(tmp_path: Path) -> None:
    with hub_database(tmp_path) as database:
        asyncio.run(database.write(lambda conn: add(conn, "x")))
    with hub_database(tmp_path) as database:
        assert asyncio.run(database.read(count)) == 1


def test_work_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def work(conn: Connection) -> None:
        add(conn, "x")
        raise ValueError("later")

    with hub_database(tmp_path) as database:
        with pytest.raises(ValueError, match="later"):
            database.write_now(work)
        assert database.read_now(count) == 0


def test_reads_cannot_write(tmp_path: Path) -> None:
    with hub_database(tmp_path) as database, pytest.raises(StorageError, match="readonly"):
        database.read_now(lambda conn: add(conn, "x"))


def test_writers_wait_for_each_other_and_lose_nothing(tmp_path: Path) -> None:
    with hub_database(tmp_path) as one, hub_database(tmp_path) as two:

        def write(database: Database) -> None:
            for _ in range(25):
                database.write_now(lambda conn: add(conn, "x"))

        threads = [threading.Thread(target=write, args=(database,)) for database in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.read_now(count) == 50
        assert one.read_now(audit.verify).broken_at is None


def test_a_read_sees_one_moment(tmp_path: Path) -> None:
    with hub_database(tmp_path) as database:

        def look(conn: Connection) -> tuple[int, int]:
            before = count(conn)
            database.write_now(lambda writer: add(writer, "x"))
            return before, count(conn)

        assert database.read_now(look) == (0, 0)
        assert database.read_now(count) == 1


def test_constraints_are_conflicts(tmp_path: Path) -> None:
    insert = auth.api_tokens.insert().values(id="a", name="n", role="viewer", secret_sha256="x", created_ms=1)

    def twice(conn: Connection) -> None:
        conn.execute(insert)
        conn.execute(insert)

    with hub_database(tmp_path) as database, pytest.raises(Conflict):
        database.write_now(twice)


def test_an_empty_database_says_what_to_do(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    try:
        with pytest.raises(StorageError) as caught:
            database.read_now(count)
        assert caught.value.code == "storage.schema"
        assert "migrate" in caught.value.hint
        with pytest.raises(ConfigError, match="revision none"):
            migrate.require_current(database)
    finally:
        database.close()


def test_commits_are_on_disk_and_foreign_keys_hold(tmp_path: Path) -> None:
    with hub_database(tmp_path) as database:

        def pragmas(conn: Connection) -> list[object]:
            return [
                conn.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]

        assert database.write_now(pragmas) == ["wal", 2, 1]


def test_migrations_make_what_the_tables_declare(tmp_path: Path) -> None:
    with hub_database(tmp_path) as database:
        differences = database.read_now(lambda conn: compare_metadata(MigrationContext.configure(conn), metadata))
    assert differences == []


def test_migrating_twice_changes_nothing(tmp_path: Path) -> None:
    with hub_database(tmp_path) as database:
        head = migrate.head()
        assert migrate.upgrade(database) == (head, head)
        migrate.require_current(database)
