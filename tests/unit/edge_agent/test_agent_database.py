"""The database thread: groups, failures that stay with their owner, damaged and foreign files."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge_agent.adapters.database import Connection, Database
from edge_agent.adapters.ledger import SqliteLedger
from shared.errors import StorageError
from shared.release import Floors
from tests.fakes.clock import FakeClock


def in_database(path: Path, act: Callable[[Database], Awaitable[object]]) -> None:
    async def run() -> None:
        database = await Database.open(path / "agent.db", clock=FakeClock(wall_ms=77))
        try:
            await act(database)
        finally:
            await database.close()

    asyncio.run(run())


def insert(family: str) -> Callable[[Connection], int]:
    def work(connection: Connection) -> int:
        connection.execute("INSERT INTO slots VALUES (?, X'00')", (family,))
        count: int = connection.execute("SELECT COUNT(*) FROM slots").fetchone()[0]
        return count

    return work


def test_every_commit_is_synced(tmp_path: Path) -> None:
    async def act(database: Database) -> None:
        def modes(connection: Connection) -> tuple[object, object]:
            journal = connection.execute("PRAGMA journal_mode").fetchone()[0]
            return journal, connection.execute("PRAGMA synchronous").fetchone()[0]

        assert await database.write(modes) == ("wal", 2)

    in_database(tmp_path, act)


def test_work_that_fails_undoes_only_itself(tmp_path: Path) -> None:
    async def act(database: Database) -> None:
        def failing(connection: Connection) -> None:
            connection.execute("INSERT INTO slots VALUES ('bad', X'00')")
            raise ValueError("of its own")

        results = await asyncio.gather(
            database.write(insert("a")), database.write(failing), database.write(insert("b")), return_exceptions=True
        )
        assert isinstance(results[1], ValueError)
        assert (results[0], results[2]) == (1, 2)

    in_database(tmp_path, act)
    with sqlite3.connect(tmp_path / "agent.db") as connection:
        assert [row[0] for row in connection.execute("SELECT family FROM slots")] == ["a", "b"]
    connection.close()


def test_waiting_work_shares_commits(tmp_path: Path) -> None:
    async def act(database: Database) -> None:
        commits: list[str] = []
        await database.write(lambda connection: connection.set_trace_callback(commits.append))
        await asyncio.gather(*(database.write(insert(f"family-{number}")) for number in range(200)))
        await database.write(lambda connection: connection.set_trace_callback(None))
        assert 1 <= sum(line == "COMMIT" for line in commits) < 100

    in_database(tmp_path, act)


def test_a_cancelled_caller_leaves_memory_in_step_with_the_disk(tmp_path: Path) -> None:
    async def act(database: Database) -> None:
        counted: list[int] = []
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(database.write(insert("a"), after=counted.append))
            await asyncio.sleep(0)
            task.cancel()
        await database.write(lambda _: None)
        assert counted == [1]

    in_database(tmp_path, act)


def test_a_closed_database_refuses(tmp_path: Path) -> None:
    async def run() -> None:
        database = await Database.open(tmp_path / "agent.db", clock=FakeClock())
        await database.close()
        await database.close()
        with pytest.raises(StorageError) as caught:
            await database.write(insert("a"))
        assert caught.value.code == "storage.closed"

    asyncio.run(run())


def test_a_damaged_file_is_moved_aside_and_the_next_start_works(tmp_path: Path) -> None:
    (tmp_path / "agent.db").write_bytes(b"this was never a database\n" * 400)
    with pytest.raises(StorageError) as caught:
        in_database(tmp_path, lambda database: database.write(insert("a")))
    assert caught.value.code == "storage.corrupt"
    assert "agent.db.corrupt-77" in str(caught.value)
    assert caught.value.hint
    assert (tmp_path / "agent.db.corrupt-77").read_bytes().startswith(b"this was never")

    async def act(database: Database) -> None:
        with pytest.raises(StorageError) as lost:
            await SqliteLedger(database).load_floors()
        assert lost.value.code == "storage.floors_lost"

    in_database(tmp_path, act)


@pytest.mark.parametrize("name", ["plain", "50%20 #1?x"])
def test_the_floors_survive_damage_elsewhere_in_the_file(tmp_path: Path, name: str) -> None:
    tmp_path = tmp_path / name
    tmp_path.mkdir()
    floors = Floors(assignment_version=9, roles={"root": 3}, time_ms=5)

    async def fill(database: Database) -> None:
        await SqliteLedger(database).raise_floors(floors)
        await asyncio.gather(*(database.write(insert(f"{number:03}" * 100)) for number in range(500)))

    in_database(tmp_path, fill)
    path = tmp_path / "agent.db"
    data = bytearray(path.read_bytes())
    data[-8192:-4096] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(StorageError) as caught:
        in_database(tmp_path, lambda database: database.write(insert("a")))
    assert caught.value.code == "storage.corrupt"

    async def look(database: Database) -> None:
        assert await SqliteLedger(database).load_floors() == floors

    in_database(tmp_path, look)


def test_a_file_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    in_database(tmp_path, lambda database: database.write(insert("a")))
    with sqlite3.connect(tmp_path / "agent.db") as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StorageError) as caught:
        in_database(tmp_path, lambda database: database.write(insert("b")))
    assert caught.value.code == "storage.schema"
    assert [path.name for path in tmp_path.iterdir() if "corrupt" in path.name] == []


def test_a_state_directory_that_is_not_there_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        in_database(tmp_path / "nowhere", lambda database: database.write(insert("a")))
    assert caught.value.hint
