"""What a broken disk means: rows that cannot be read, floors that are gone, and what lifts that again."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge_agent.adapters.database import DATABASE_NAME, Database
from edge_agent.adapters.ledger import SqliteLedger, forget_lost_floors
from shared.errors import StorageError
from shared.release import Floors, VerifiedAssignment
from tests.contracts.test_ledger_contract import verified
from tests.fakes.clock import FakeClock

FLOORS = Floors(assignment_version=9, roles={"root": 3}, time_ms=5)


def with_ledger(folder: Path, act: Callable[[SqliteLedger], Awaitable[object]]) -> None:
    """One life of the agent's ledger."""

    async def run() -> None:
        database = await Database.open(folder / DATABASE_NAME, clock=FakeClock())
        try:
            await act(SqliteLedger(database))
        finally:
            await database.close()

    asyncio.run(run())


def damage(folder: Path, key: str) -> None:
    """A row of the table of small values holds something else."""
    with sqlite3.connect(folder / DATABASE_NAME) as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = ?", (b"\xc1\xff\x00", key))
    connection.close()


async def are_lost(ledger: SqliteLedger) -> None:
    """Nobody gets floors, and nothing that was verified against none is taken for accepted."""
    for act in (ledger.load_floors(), ledger.raise_floors(FLOORS), ledger.save_verified(verified(1, floors=FLOORS))):
        with pytest.raises(StorageError) as caught:
            await act
        assert caught.value.code == "storage.floors_lost"
    assert await ledger.load_verified() is None


def test_floors_that_cannot_be_read_are_lost_and_not_zero(tmp_path: Path) -> None:
    with_ledger(tmp_path, lambda ledger: ledger.raise_floors(FLOORS))
    damage(tmp_path, "floors")
    with_ledger(tmp_path, are_lost)


@pytest.mark.parametrize("content", [b"", b"never a database\n" * 400])
def test_floors_of_a_file_that_is_damaged_from_the_start_are_lost_and_not_zero(tmp_path: Path, content: bytes) -> None:
    with_ledger(tmp_path, lambda ledger: ledger.raise_floors(FLOORS))
    path = tmp_path / DATABASE_NAME
    data = path.read_bytes()
    path.write_bytes((content + b"\x07" * len(data))[: len(data)])
    with pytest.raises(StorageError, match="nothing new is installed"):
        with_ledger(tmp_path, are_lost)
    with_ledger(tmp_path, are_lost)


def test_enrolling_anew_lets_lost_floors_begin_at_zero_and_keeps_those_that_can_be_read(tmp_path: Path) -> None:
    async def are(ledger: SqliteLedger, floors: Floors) -> None:
        assert await ledger.load_floors() == floors

    with_ledger(tmp_path, lambda ledger: ledger.raise_floors(FLOORS))
    forget_lost_floors(tmp_path / DATABASE_NAME)
    with_ledger(tmp_path, lambda ledger: are(ledger, FLOORS))
    damage(tmp_path, "floors")
    forget_lost_floors(tmp_path / DATABASE_NAME)
    with_ledger(tmp_path, lambda ledger: are(ledger, Floors()))


def test_a_ledger_that_takes_the_place_of_a_lost_one_says_so(tmp_path: Path) -> None:
    with_ledger(tmp_path, lambda ledger: ledger.lose_floors())
    with_ledger(tmp_path, are_lost)


def test_floors_that_are_there_cannot_be_marked_as_lost(tmp_path: Path) -> None:
    async def act(ledger: SqliteLedger) -> None:
        await ledger.raise_floors(FLOORS)
        await ledger.lose_floors()
        assert await ledger.load_floors() == FLOORS

    with_ledger(tmp_path, act)


def test_an_accepted_assignment_that_cannot_be_read_is_awaited_from_the_hub(tmp_path: Path) -> None:
    async def act(ledger: SqliteLedger) -> VerifiedAssignment | None:
        return await ledger.load_verified()

    with_ledger(tmp_path, lambda ledger: ledger.save_verified(verified(1, floors=FLOORS)))
    damage(tmp_path, "verified")

    async def is_none(ledger: SqliteLedger) -> None:
        assert await act(ledger) is None
        assert await ledger.load_floors() == FLOORS

    with_ledger(tmp_path, is_none)
