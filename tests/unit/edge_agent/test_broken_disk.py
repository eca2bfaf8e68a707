"""What a broken disk means: rows that cannot be read, floors that are gone, and what lifts that again."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from sqlite3 import OperationalError
from typing import Any

import pytest

from edge_agent.adapters.database import DATABASE_NAME, Database
from edge_agent.adapters.ledger import SqliteLedger, forget_lost_floors
from edge_agent.core.spending import DAY_HOURS, HOUR_MS
from edge_agent.driver.metering import Meter
from edge_agent.main import open_database
from edge_agent.settings import AgentConfig
from shared.errors import StorageError
from shared.limits import MIB
from shared.release import Floors, VerifiedAssignment
from tests.contracts.test_ledger_contract import verified
from tests.fakes.clock import FakeClock, FakeMoments

LOST = "storage.floors_lost"
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


class PowerCut(BaseException):
    """Nothing after it is done."""


class Steps:
    """Lets so many steps on the disk happen and ends the next one."""

    def __init__(self, left: int, way: type[BaseException]) -> None:
        self.left, self.way = left, way

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.way("at this step")


@contextlib.contextmanager
def cutting(steps: int, way: type[BaseException]) -> Iterator[None]:
    """Every statement of a database and every change of a name is a step; from the given one on the disk is gone."""
    counted = Steps(steps, way)
    rename = Path.rename

    class Cut(sqlite3.Connection):
        def execute(self, *args: Any) -> sqlite3.Cursor:
            counted.step()
            return super().execute(*args)

    def renamed(path: Path, target: Path) -> Path:
        try:
            counted.step()
        except OperationalError as error:
            raise OSError(28, "No space left on device") from error
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Cut))
        patched.setattr(Path, "rename", renamed)
        yield


def accepts(folder: Path, *names: str) -> None:
    """What the trust directory holds."""
    (folder / "trust").mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / "trust" / name).write_bytes(b"{}")


def damaged(folder: Path, *, readable: bool) -> None:
    """A database with floors and much else, of which a part has become something else."""
    accepts(folder, "root.json", "timestamp.json")

    async def fill(ledger: SqliteLedger) -> None:
        await ledger.raise_floors(FLOORS)
        await ledger.save_slots({f"family-{number}": b"\x01" * 2000 for number in range(30)})

    with_ledger(folder, fill)
    path = folder / DATABASE_NAME
    data = path.read_bytes()
    path.write_bytes(data[:-8192] + b"\xff" * 8192 if readable else b"\x07" * len(data))


def start(folder: Path) -> Floors | str:
    """The floors as a start of the daemon finds them, or why it gets none."""

    async def run() -> Floors | str:
        database = await open_database(AgentConfig(state_dir=folder), FakeClock())
        try:
            return await SqliteLedger(database).load_floors()
        except StorageError as error:
            return error.code
        finally:
            await database.close()

    return asyncio.run(run())


def start_or_told(folder: Path) -> Floors | str:
    """The same; a start that ends because the file was damaged says so."""
    try:
        return start(folder)
    except StorageError as error:
        return error.code


async def are_lost(ledger: SqliteLedger) -> None:
    """Nobody gets floors, and nothing that was verified against none is taken for accepted."""
    for act in (ledger.load_floors(), ledger.raise_floors(FLOORS), ledger.save_verified(verified(1, floors=FLOORS))):
        with pytest.raises(StorageError) as caught:
            await act
        assert caught.value.code == LOST
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
    with_ledger(tmp_path, lambda ledger: ledger.settle_floors(accepted_before=True))
    with_ledger(tmp_path, are_lost)


def test_floors_that_are_there_cannot_be_marked_as_lost(tmp_path: Path) -> None:
    async def act(ledger: SqliteLedger) -> None:
        await ledger.raise_floors(FLOORS)
        await ledger.settle_floors(accepted_before=True)
        assert await ledger.load_floors() == FLOORS

    with_ledger(tmp_path, act)


def test_a_first_verification_that_a_restart_cut_short_loses_no_floors(tmp_path: Path) -> None:
    """Metadata is kept while a verification runs, the floors at its end: the zeros of a new device come before both."""
    accepts(tmp_path, "root.json")
    assert start(tmp_path) == Floors()
    accepts(tmp_path, "timestamp.json")
    assert start(tmp_path) == Floors()


def test_enrolling_anew_lifts_the_loss_though_metadata_is_still_there(tmp_path: Path) -> None:
    accepts(tmp_path, "root.json", "timestamp.json")
    assert start(tmp_path) == LOST
    forget_lost_floors(tmp_path / DATABASE_NAME)
    assert start(tmp_path) == Floors()


@pytest.mark.parametrize("way", [PowerCut, OperationalError])
@pytest.mark.parametrize("readable", [True, False], ids=["floors readable", "floors unreadable"])
def test_floors_are_never_zero_wherever_the_replacing_of_a_damaged_file_is_cut(
    tmp_path: Path, way: type[BaseException], readable: bool
) -> None:
    cuts = 0
    while True:
        folder = tmp_path / str(cuts)
        damaged(folder, readable=readable)
        is_cut = False
        with cutting(cuts, way):
            try:
                start(folder)
            except (PowerCut, StorageError) as error:
                is_cut = getattr(error, "code", "") != "storage.corrupt"
        told = [start_or_told(folder) for _ in range(3)]
        # A disk that shows the floors to nobody has lost them; a power cut has not.
        good = [FLOORS] if readable and way is PowerCut else [FLOORS, LOST] if readable else [LOST]
        assert told[-1] in good, f"cut at step {cuts}"
        assert all(one in (told[-1], "storage.corrupt") for one in told)
        if not is_cut:
            break
        cuts += 1
    assert cuts > 20


def test_floors_of_a_file_that_vanished_are_lost_wherever_the_making_of_a_new_one_is_cut(tmp_path: Path) -> None:
    cuts = 0
    while True:
        folder = tmp_path / str(cuts)
        accepts(folder, "root.json", "timestamp.json")
        is_cut = False
        with cutting(cuts, OperationalError):
            try:
                start(folder)
            except StorageError:
                is_cut = True
        assert start(folder) == LOST, f"cut at step {cuts}"
        if not is_cut:
            break
        cuts += 1
    assert cuts > 20


def test_a_record_of_what_was_fetched_that_cannot_be_read_is_a_day_that_is_spent(tmp_path: Path) -> None:
    moments = FakeMoments()
    told: list[str] = []

    def meter(ledger: SqliteLedger, daily_bytes: int = MIB) -> Meter:
        return Meter(
            ledger=ledger, moments=moments, daily_bytes=daily_bytes, note=lambda name, detail: told.append(name)
        )

    async def takes(ledger: SqliteLedger, least: int, most: int) -> None:
        assert least <= await meter(ledger).take(1000) <= most

    with_ledger(tmp_path, lambda ledger: takes(ledger, 1000, 1000))
    damage(tmp_path, "spending")
    moments.advance(30 * HOUR_MS)
    for _ in range(2):
        with_ledger(tmp_path, lambda ledger: takes(ledger, 0, 0))
    assert told == ["spending.unreadable"]
    moments.advance((DAY_HOURS + 1) * HOUR_MS)
    with_ledger(tmp_path, lambda ledger: takes(ledger, 1000, 1000))


def test_without_a_budget_a_damaged_record_stops_nothing(tmp_path: Path) -> None:
    async def takes(ledger: SqliteLedger) -> None:
        meter = Meter(ledger=ledger, moments=FakeMoments(), daily_bytes=0, note=lambda _name, _detail: None)
        assert await meter.take(1000) == 1000
        assert meter.figures()["day_bytes"] == 1000

    with_ledger(tmp_path, takes)
    damage(tmp_path, "spending")
    with_ledger(tmp_path, takes)


def test_an_accepted_assignment_that_cannot_be_read_is_awaited_from_the_hub(tmp_path: Path) -> None:
    async def act(ledger: SqliteLedger) -> VerifiedAssignment | None:
        return await ledger.load_verified()

    with_ledger(tmp_path, lambda ledger: ledger.save_verified(verified(1, floors=FLOORS)))
    damage(tmp_path, "verified")

    async def is_none(ledger: SqliteLedger) -> None:
        assert await act(ledger) is None
        assert await ledger.load_floors() == FLOORS

    with_ledger(tmp_path, is_none)
