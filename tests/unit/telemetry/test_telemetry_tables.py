"""What the statements of the room cost, and what they say of rows that are damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_hub.ground import migrate
from cloud_hub.ground.database import Database
from cloud_hub.telemetry import tables
from cloud_hub.telemetry.rules import Stream
from cloud_hub.telemetry.taking import Received
from shared.errors import StorageError
from shared.ids import DeviceId
from shared.telemetry import RecordClass
from tests.fakes.batches import EPOCH

STREAMS = [Stream(DeviceId(f"pi-{n}"), EPOCH, RecordClass.READING) for n in range(200)]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    migrate.upgrade(made)
    made.write_now(lambda conn: tables.SqlStore(conn).write({one: Received(here=((1, 5),)) for one in STREAMS}))
    yield made
    made.close()


@pytest.mark.parametrize("many", [1, 2, 200])
def test_streams_are_looked_up_one_by_one_and_not_by_reading_all(database: Database, many: int) -> None:
    keys = tuple(value for one in STREAMS[:many] for value in (one.device, one.epoch, int(one.klass)))
    statement = "EXPLAIN QUERY PLAN " + tables._select_streams(many, "?")
    plan = [row[-1] for row in database.read_now(lambda conn: conn.exec_driver_sql(statement, keys).all())]
    of_table = [step for step in plan if "telemetry_streams" in step]
    assert of_table
    assert all(step.startswith("SEARCH") for step in of_table), plan
    found = database.write_now(lambda conn: tables.SqlStore(conn).read(STREAMS[:many]))
    assert set(found) == set(STREAMS[:many])


@pytest.mark.parametrize("column", ["ranges", "lost", "folded"])
def test_a_damaged_row_is_an_error_of_storage_with_what_to_do(database: Database, column: str) -> None:
    database.write_now(lambda conn: conn.exec_driver_sql(f"UPDATE telemetry_streams SET {column} = x'c1'") and None)
    with pytest.raises(StorageError, match="pi-3") as caught:
        database.write_now(lambda conn: tables.SqlStore(conn).read([STREAMS[3]]))
    assert caught.value.hint
