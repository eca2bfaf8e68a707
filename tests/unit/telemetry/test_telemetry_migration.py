"""Records of the former schema become batches: none is lost, none is there twice, and what a stream holds is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from cloud_hub.ground import migrate
from cloud_hub.ground.database import Database
from cloud_hub.telemetry import tables
from cloud_hub.telemetry.rules import Stream, explode
from cloud_hub.telemetry.taking import take
from shared import limits
from shared.ids import DeviceId
from shared.telemetry import DeviceEvent, Outcome, Reading, Record, RecordClass, Result
from tests.fakes.batches import EPOCH, batch_of

PI, OTHER = DeviceId("pi-1"), DeviceId("pi-2")
BEFORE = "0009_round_tasks"
Row = tuple[DeviceId, str, int, Record, int]


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'hub.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    made = Database(url)
    made.write_now(lambda conn: _to(conn, BEFORE))
    yield made
    made.close()


def _to(conn: sa.Connection, revision: str, move: Callable[[Config, str], None] = command.upgrade) -> None:
    config = migrate._config()
    config.attributes["connection"] = conn
    move(config, revision)


def fill(conn: sa.Connection, rows: list[Row]) -> None:
    """As the former hub wrote: a row per record, fields without a value left out."""
    for device, epoch, klass, record, received_ms in rows:
        fields = msgspec.structs.asdict(record.body)
        body = msgspec.msgpack.encode({name: value for name, value in fields.items() if value is not None})
        conn.execute(
            sa.text(
                "INSERT INTO telemetry_records (device, epoch, klass, seq, at_ms, received_ms, kind, body)"
                " VALUES (:device, :epoch, :klass, :seq, :at_ms, :received_ms, :kind, :body)"
            ),
            {
                "device": device, "epoch": epoch, "klass": klass, "seq": record.seq, "at_ms": record.at_ms,
                "received_ms": received_ms, "kind": str(record.body.__struct_config__.tag), "body": body,
            },
        )  # fmt: skip
    numbers: dict[tuple[DeviceId, str, int], list[int]] = {}
    for device, epoch, klass, record, _ in rows:
        numbers.setdefault((device, epoch, klass), []).append(record.seq)
    for (device, epoch, klass), seqs in numbers.items():
        ranges = tables._encoder.encode([(seq, seq) for seq in sorted(seqs)][:1])
        conn.execute(
            sa.text(
                "INSERT INTO telemetry_streams (device, epoch, klass, ranges, records, duplicates, conflicts,"
                " first_received_ms, last_received_ms) VALUES (:device, :epoch, :klass, :ranges, :records, 3, 1, 5, 9)"
            ),
            {"device": device, "epoch": epoch, "klass": klass, "ranges": ranges, "records": len(seqs)},
        )


def test_all_records_are_carried_over(database: Database) -> None:
    long = Reading(name="x" * (limits.MAX_RECORD_BYTES - 100), value=1.0)
    rows: list[Row] = [
        *((PI, EPOCH, 2, Record(seq=n, at_ms=n, body=Reading(name="t", value=n / 7)), 5) for n in range(1, 1203)),
        *((PI, EPOCH, 2, Record(seq=n, at_ms=n, body=long), 7) for n in range(1300, 1320)),
        *((PI, EPOCH, 1, Record(seq=n, at_ms=n, body=Outcome(request=f"r{n}")), 6) for n in (1, 2, 3, 7)),
        (PI, "f" * 16, 0, Record(seq=1, at_ms=1, body=DeviceEvent(name="host.lost", detail={"a": "b"})), 6),
        (OTHER, EPOCH, 2, Record(seq=1, at_ms=1, body=Result(
            request="r", model="m", version="1.0.0", variant="int8", rung="full")), 6),
    ]  # fmt: skip
    database.write_now(lambda conn: fill(conn, rows))
    migrate.upgrade(database)
    stored = database.read_now(lambda conn: conn.execute(sa.select(tables.batches).order_by(tables.batches.c.id)).all())
    carried = [
        (row.device, row.epoch, row.klass, record, row.received_ms)
        for row in stored
        for record in explode(bytes(row.columns))
    ]
    assert sorted(carried, key=repr) == sorted(rows, key=repr)
    assert all(row.records <= limits.MAX_BATCH_RECORDS and row.last - row.first + 1 == row.records for row in stored)
    assert all(len(row.columns) <= limits.MAX_BATCH_BYTES for row in stored)


def test_the_way_back_loses_no_record_either(database: Database) -> None:
    rows: list[Row] = [
        (PI, EPOCH, 2, Record(seq=n, at_ms=n, body=Reading(name="t", value=n / 7)), 5) for n in range(1, 600)
    ]
    database.write_now(lambda conn: fill(conn, rows))
    migrate.upgrade(database)
    database.write_now(lambda conn: _to(conn, BEFORE, command.downgrade))
    count = sa.text("SELECT count(*), count(DISTINCT seq) FROM telemetry_records")
    assert tuple(database.read_now(lambda conn: conn.execute(count).one())) == (599, 599)
    migrate.upgrade(database)
    stored = database.read_now(lambda conn: conn.execute(sa.select(tables.batches)).all())
    assert [record for row in stored for record in explode(bytes(row.columns))] == [row[3] for row in rows]


def test_what_is_known_of_a_stream_is_kept_and_records_that_come_again_are_duplicates(database: Database) -> None:
    record = Record(seq=1, at_ms=5, body=Outcome(request="r", correct=True))
    database.write_now(lambda conn: fill(conn, [(PI, EPOCH, 1, record, 5)]))
    migrate.upgrade(database)
    stream = Stream(PI, EPOCH, RecordClass.OUTCOME)
    known = database.write_now(lambda conn: tables.SqlStore(conn).read([stream])[stream])
    assert (known.here, known.lost, known.records, known.duplicates, known.conflicts) == (((1, 1),), (), 1, 3, 1)
    assert (known.first_received_ms, known.last_received_ms) == (5, 9)
    more = batch_of([record, Record(seq=2, at_ms=6, body=Outcome(request="s"))])
    assert database.write_now(lambda conn: take(tables.SqlStore(conn), PI, more, at_ms=9)).status == "stored"
    again = database.write_now(lambda conn: take(tables.SqlStore(conn), PI, batch_of([record]), at_ms=9))
    assert again.status == "duplicate"


def test_the_order_of_arrival_is_kept(database: Database) -> None:
    """Over epochs and classes, and though streams are carried over one by one; what comes later has later ids."""
    old, new = "f" * 16, "a" * 16
    rows: list[Row] = [
        (PI, old, 3, Record(seq=5, at_ms=1, body=Reading(name="t", value=5.0)), 100),
        (PI, old, 1, Record(seq=1, at_ms=1, body=Outcome(request="r")), 100),
        (PI, old, 3, Record(seq=1, at_ms=1, body=Reading(name="t", value=1.0)), 101),
        (PI, old, 3, Record(seq=2, at_ms=1, body=Reading(name="t", value=2.0)), 101),
        (OTHER, new, 3, Record(seq=1, at_ms=1, body=Reading(name="t", value=1.0)), 101),
        (PI, new, 3, Record(seq=1, at_ms=1, body=Reading(name="t", value=1.0)), 102),
    ]
    database.write_now(lambda conn: fill(conn, rows))
    migrate.upgrade(database)
    late = batch_of([Record(seq=9, at_ms=1, body=Outcome(request="late"))])
    database.write_now(lambda conn: take(tables.SqlStore(conn), PI, late, at_ms=103))
    c = tables.batches.c
    query = sa.select(c.device, c.epoch, c.klass, c.first, c.last).order_by(c.id)
    assert [tuple(row) for row in database.read_now(lambda conn: conn.execute(query).all())] == [
        (PI, old, 3, 5, 5),
        (PI, old, 1, 1, 1),
        (PI, old, 3, 1, 2),
        (OTHER, new, 3, 1, 1),
        (PI, new, 3, 1, 1),
        (PI, EPOCH, 1, 9, 9),
    ]


def test_a_number_that_columns_do_not_hold_stops_nothing(database: Database) -> None:
    """The former hub took any that MessagePack has."""
    hostile = [
        Result(request="r", model="m", version="1.0.0", variant="int8", rung="full", took_us=took)
        for took in (2**63, 2**64 - 1, 5)
    ]
    rows: list[Row] = [(PI, EPOCH, 2, Record(seq=n, at_ms=n, body=body), 5) for n, body in enumerate(hostile, start=1)]
    database.write_now(lambda conn: fill(conn, rows))
    migrate.upgrade(database)
    (columns,) = database.read_now(lambda conn: conn.execute(sa.select(tables.batches.c.columns)).scalars().all())
    bodies = [record.body for record in explode(bytes(columns))]
    assert [body.took_us for body in bodies if isinstance(body, Result)] == [2**63 - 1, 2**63 - 1, 5]
