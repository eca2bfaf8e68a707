"""A run whose database, disk or code fails for a moment: the run waits, and the hub goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from sqlalchemy.engine import Connection

from cloud_hub.ground.bus import Bus
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import NotFound
from cloud_hub.ground.system import SystemClock
from cloud_hub.rounds import course, desk, tables
from cloud_hub.rounds.counts import Counts
from cloud_hub.rounds.course import Course
from cloud_hub.rounds.rules import Head
from cloud_hub.rounds.tables import RunRow
from shared.errors import StorageError
from shared.ids import DeviceId
from tests.fakes.hub_parts import hub_database
from tests.fakes.round_room import spec

RUN = "r-0123456789"
T = TypeVar("T")


class Moody(Database):
    """A database that refuses when it is told to; `refuse` says which calls ("read", "write"), one after the other."""

    def __init__(self, real: Database) -> None:
        self.real = real
        self.refuse: list[str] = []
        self.refused: list[str] = []
        self.error: Exception = StorageError("the database is locked", code="storage.busy")

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Read, or refuse."""
        self._perhaps("read")
        return await self.real.read(work)

    async def write(self, work: Callable[[Connection], T], *, beside: bool = False) -> T:
        """Write, or refuse."""
        self._perhaps("write")
        return await self.real.write(work, beside=beside)

    def _perhaps(self, kind: str) -> None:
        if self.refuse and self.refuse[0] == kind:
            self.refused.append(self.refuse.pop(0))
            raise self.error


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Moody]:
    with hub_database(tmp_path) as real:
        real.write_now(
            lambda conn: tables.add_run(
                conn, RUN, spec=spec(), head=Head(features="r", width=2, classes=2), at_ms=1, actor="test"
            )
        )
        yield Moody(real)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "RETRY_S", 0.01)
    monkeypatch.setattr(desk, "RETRY_S", 0.01)


def releases_without_the_base() -> Any:
    """A releases room in which the run's base is gone."""

    async def get(family: str, version: str) -> Any:
        raise NotFound(f"there is no {family}/{version}", code="not_found.model")

    return SimpleNamespace(blobs=None, catalogue=SimpleNamespace(get=get))


def make_course(database: Moody, folder: Path) -> Course:
    """The way of runs in a fleet without devices."""

    async def present(_spec: Any) -> Any:
        return ()

    return Course(
        folder,
        database=database,
        clock=SystemClock(),
        counts=Counts(Metrics()),
        post=None,  # type: ignore[arg-type]
        releases=releases_without_the_base(),
        present=present,
    )


def hold(database: Moody, folder: Path) -> RunRow:
    """Hold the run to its end; returns how it ended."""

    async def go() -> RunRow:
        made = make_course(database, folder)
        made.open({RUN})
        async with asyncio.timeout(20):
            await made.hold(RUN)
        row = await database.read(lambda conn: tables.find_run(conn, RUN))
        assert row is not None
        return row

    return asyncio.run(go())


@pytest.mark.parametrize(
    "refuse",
    [["read"], ["write"], ["read", "read", "write", "write"], ["write", "read"]],
    ids=["when the run is read", "when its end is stored", "again and again", "one after the other"],
)
def test_a_database_that_refuses_for_a_moment_holds_a_run_up_and_ends_nothing(
    database: Moody, tmp_path: Path, refuse: list[str]
) -> None:
    database.refuse = list(refuse)
    row = hold(database, tmp_path / "rounds")
    assert database.refused == refuse
    assert (row.state, row.code) == ("failed", "not_found.model")


def test_a_defect_in_one_run_does_not_end_the_hub(database: Moody, tmp_path: Path) -> None:
    database.refuse, database.error = ["read"], KeyError("a column of a later version")
    assert hold(database, tmp_path / "rounds").state == "failed"


def test_a_database_that_refuses_at_the_start_is_asked_again(database: Moody, tmp_path: Path) -> None:
    database.refuse = ["read", "read"]

    async def go() -> RunRow:
        row: RunRow | None = None
        room = desk.Desk(
            data=tmp_path,
            database=database,
            clock=SystemClock(),
            metrics=Metrics(),
            post=None,  # type: ignore[arg-type]
            bus=Bus(),
            devices=None,  # type: ignore[arg-type]
            releases=releases_without_the_base(),
        )
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            held = group.create_task(room.run())
            while row is None or row.finished_ms is None:
                await asyncio.sleep(0.01)
                row = await database.real.read(lambda conn: tables.find_run(conn, RUN))
            held.cancel()
        return row

    assert asyncio.run(go()).state == "failed"
    assert database.refused == ["read", "read"]


def test_a_start_removes_what_ended_runs_and_broken_uploads_left(database: Moody, tmp_path: Path) -> None:
    for name in (f"{RUN}/a.part", f"{RUN}/a.reply", f"{RUN}/round-1.checkpoint", "r-ended/a.reply"):
        (tmp_path / "rounds" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rounds" / name).touch()
    make_course(database, tmp_path / "rounds").open({RUN})
    left = {str(path.relative_to(tmp_path / "rounds")) for path in (tmp_path / "rounds").rglob("*")}
    assert left == {RUN, f"{RUN}/a.reply", f"{RUN}/round-1.checkpoint"}


def test_a_run_that_ends_takes_its_tasks_along(database: Moody, tmp_path: Path) -> None:
    task = {f"{RUN}-1t1-0000000000000001": (1, DeviceId("dev-1"))}
    database.real.write_now(lambda conn: tables.add_tasks(conn, RUN, "1t1", task, number=1, at_ms=1))
    assert hold(database, tmp_path / "rounds").state == "failed"
    assert database.real.read_now(lambda conn: tables.tasks_of(conn, RUN, "1t1")) == []
