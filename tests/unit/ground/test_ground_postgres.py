"""The same database on PostgreSQL: one writer at a time unless it says otherwise, retries, errors in our words."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection

from cloud_hub.devices import tables as _devices
from cloud_hub.ground import audit, auth, database, migrate
from cloud_hub.ground.database import Database, Lock, lock
from cloud_hub.ground.schema import metadata
from cloud_hub.releases import tables as _releases
from cloud_hub.rollouts import tables as _rollouts
from cloud_hub.rounds import tables as _rounds
from cloud_hub.telemetry import tables as _telemetry
from shared.errors import ConfigError, Conflict, StorageError
from tests.fakes.postgres import Postgres

assert all((_devices, _releases, _rollouts, _rounds, _telemetry, auth))


@pytest.fixture
def hub(postgres_url: str) -> Iterator[Database]:
    made = Database(postgres_url)
    migrate.upgrade(made)
    yield made
    made.close()


def add(conn: Connection, name: str) -> None:
    audit.record(conn, at_ms=1, actor="a", action="b", subject=name)


def count(conn: Connection) -> int:
    return int(conn.execute(sa.select(sa.func.count()).select_from(audit.audit)).scalar_one())


def test_a_write_is_there_and_work_that_raises_leaves_nothing(hub: Database) -> None:
    def work(conn: Connection) -> None:
        add(conn, "x")
        raise ValueError("later")

    asyncio.run(hub.write(lambda conn: add(conn, "x")))
    with pytest.raises(ValueError, match="later"):
        hub.write_now(work)
    assert asyncio.run(hub.read(count)) == 1


def test_reads_cannot_write_and_see_one_moment(hub: Database) -> None:
    def look(conn: Connection) -> tuple[int, int]:
        before = count(conn)
        hub.write_now(lambda writer: add(writer, "x"))
        return before, count(conn)

    assert hub.read_now(look) == (0, 0)
    assert hub.read_now(count) == 1
    with pytest.raises(StorageError, match="read-only"):
        hub.read_now(lambda conn: add(conn, "x"))


@pytest.mark.parametrize("beside", [False, True])
def test_the_audit_chain_holds_whoever_writes_at_the_same_time(hub: Database, *, beside: bool) -> None:
    others = [hub, Database(hub.url)]

    def write(database: Database) -> None:
        for _ in range(25):
            database.write_now(lambda conn: add(conn, "x"), beside=beside)

    threads = [threading.Thread(target=write, args=(database,)) for database in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    others[1].close()
    assert hub.read_now(count) == 50
    assert hub.read_now(audit.verify).broken_at is None


def test_what_is_locked_waits_and_what_is_beside_does_not(hub: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 200)
    other = Database(hub.url)

    def work(_conn: Connection) -> str:
        with pytest.raises(StorageError) as caught:
            other.write_now(count)
        assert other.write_now(count, beside=True) == 0
        return caught.value.code

    try:
        assert hub.write_now(work) == "storage.busy"
    finally:
        other.close()


def test_two_who_stand_in_each_others_way_both_get_through(hub: Database) -> None:
    """Each takes its first lock, then wants the other's: the server ends one, and it is run again."""
    first_taken = threading.Barrier(2)
    tries = []

    def work(keys: tuple[str, str]) -> None:
        def take(conn: Connection) -> None:
            tries.append(keys)
            lock(conn, Lock.TELEMETRY, [keys[0]])
            if len(tries) <= 2:
                first_taken.wait(10)
            lock(conn, Lock.TELEMETRY, [keys[1]])

        hub.write_now(take, beside=True)

    threads = [threading.Thread(target=work, args=(keys,)) for keys in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tries) == 3


def test_tries_have_an_end(hub: Database) -> None:
    tries = []

    def work(conn: Connection) -> None:
        tries.append(1)
        conn.execute(sa.text("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$"))

    with pytest.raises(StorageError) as caught:
        hub.write_now(work)
    assert (caught.value.code, caught.value.retry, len(tries)) == ("storage.busy", True, database.MAX_TRIES)


def show(conn: Connection, *names: str) -> dict[str, str]:
    return {name: str(conn.exec_driver_sql(f"SHOW {name}").scalar_one()) for name in names}


def test_every_connection_has_deadlines(hub: Database) -> None:
    """On the server as on our side, where libpq tells what it was told."""
    names = ("statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout", "synchronous_commit")
    wanted = dict(zip(names, ("30s", "30s", "5s", "on"), strict=True))
    assert hub.write_now(lambda conn: show(conn, *names)) == wanted
    assert hub.read_now(lambda conn: show(conn, *names)) == wanted

    def told(conn: Connection) -> dict[str, str]:
        parameters = conn.connection.dbapi_connection.info.get_parameters()  # type: ignore[union-attr]
        return {name: value for name, value in parameters.items() if name.startswith(("keepalives", "tcp_user"))}

    assert hub.read_now(told) == {
        "keepalives": "1",
        "keepalives_idle": "5",
        "keepalives_interval": "5",
        "keepalives_count": "3",
        "tcp_user_timeout": "20000",
    }


def test_over_tcp_both_sides_watch_the_connection(postgres: Postgres) -> None:
    made = Database(postgres.database(over_tcp=True))
    try:
        found = made.read_now(
            lambda conn: show(
                conn, "tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout"
            )
        )
    finally:
        made.close()
    assert list(found.values()) == ["5", "5", "3", "20000"]


def test_a_holder_that_does_nothing_is_ended_and_others_go_on(hub: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hub that froze in a transaction: what it had done is undone, and it is told that it may try again."""
    monkeypatch.setattr(database, "IDLE_MS", 300)
    frozen = Database(hub.url)
    holds, goes_on = threading.Event(), threading.Event()
    ended: list[StorageError] = []

    def freeze(conn: Connection) -> None:
        add(conn, "frozen")
        holds.set()
        goes_on.wait(30)

    def hold() -> None:
        with pytest.raises(StorageError) as caught:
            frozen.write_now(freeze)
        ended.append(caught.value)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert holds.wait(30)
        hub.write_now(lambda conn: add(conn, "other"))
    finally:
        goes_on.set()
        holder.join()
    assert [(error.code, error.retry) for error in ended] == [("storage.unreachable", True)]
    assert hub.read_now(count) == 1
    assert frozen.read_now(count) == 1
    frozen.close()


def test_a_statement_that_takes_too_long_is_ended_unless_deadlines_are_lifted(
    hub: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_MS", 100)
    slow = Database(hub.url)

    def wait(conn: Connection) -> None:
        conn.exec_driver_sql("SELECT pg_sleep(0.4)")

    def wait_on(conn: Connection) -> None:
        database.lift_deadlines(conn)
        wait(conn)

    try:
        with pytest.raises(StorageError) as caught:
            slow.write_now(wait)
        assert (caught.value.code, caught.value.retry) == ("storage.unreachable", True)
        slow.write_now(wait_on)
        with pytest.raises(StorageError):
            slow.write_now(wait)
    finally:
        slow.close()


def test_one_hub_holds_the_database(hub: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after the server has ended the connection that held it; telemetry is stored beside it all the time."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 200)
    other = Database(hub.url)
    end_others = sa.text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    try:
        hub.claim()
        hub.claim()
        with pytest.raises(Conflict) as caught:
            other.claim()
        assert caught.value.code == "conflict.running"
        other.write_now(lambda conn: add(conn, "beside"), beside=True)
        other.read_now(lambda conn: conn.execute(end_others) and None)
        hub.claim()
        with pytest.raises(Conflict):
            other.claim()
        other.read_now(lambda conn: conn.execute(end_others) and None)
        other.claim()
        with pytest.raises(Conflict):
            hub.claim()
        other.close()
        hub.claim()
    finally:
        other.close()


def test_constraints_are_conflicts(hub: Database) -> None:
    insert = auth.api_tokens.insert().values(id="a", name="n", role="viewer", secret_sha256="x", created_ms=1)
    hub.write_now(lambda conn: conn.execute(insert) and None)
    with pytest.raises(Conflict):
        hub.write_now(lambda conn: conn.execute(insert) and None)


def test_migrations_make_what_the_tables_declare(hub: Database) -> None:
    assert hub.read_now(lambda conn: compare_metadata(MigrationContext.configure(conn), metadata)) == []
    assert migrate.upgrade(hub) == (migrate.head(), migrate.head())
    migrate.require_current(hub)


def test_an_empty_database_says_what_to_do(postgres_url: str) -> None:
    empty = Database(postgres_url)
    with pytest.raises(StorageError) as caught:
        empty.read_now(count)
    assert caught.value.code == "storage.schema"
    empty.close()


def test_a_server_that_is_not_there_is_told(tmp_path: object) -> None:
    pytest.importorskip("psycopg")
    nowhere = Database(f"postgresql+psycopg://hub@/hub?host={tmp_path}")
    with pytest.raises(StorageError) as caught:
        nowhere.read_now(count)
    assert (caught.value.code, caught.value.retry) == ("storage.unreachable", True)
    nowhere.close()


@pytest.mark.parametrize("url", ["mysql://x/y", "postgresql://hub@/hub", "nonsense"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Database(url)
    assert caught.value.code == "config.database"
