"""The desk on a real database: once each, in any order, with the power going between commit and answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cloud_hub.ground import audit, migrate
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.telemetry import tables
from cloud_hub.telemetry.desk import Desk, StreamSummary
from shared.errors import StorageFull, Unreachable
from shared.ids import DeviceId
from shared.telemetry import DeviceEvent, Reading, Record, RecordClass
from shared.wire.messages import Ack, Batch
from tests.fakes.clock import FakeClock
from tests.unit.telemetry.test_telemetry_rules import batch, readings

PI = DeviceId("pi-1")
OTHER = DeviceId("pi-2")
EPOCH = "0123456789abcdef"


class Answers:
    """The link: keeps the acknowledgements; `down` makes it fail."""

    def __init__(self) -> None:
        self.acks: list[tuple[DeviceId, Ack]] = []
        self.down = False

    async def send(self, device: DeviceId, ack: Ack) -> None:
        """Keep it, or fail."""
        if self.down:
            raise Unreachable("no link")
        self.acks.append((device, ack))

    def statuses(self) -> list[str]:
        """What was answered, in order."""
        return [ack.status for _, ack in self.acks]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    migrate.upgrade(made)
    yield made
    made.close()


def made_desk(database: Database, answers: Answers, *, max_waiting: int = 512) -> tuple[Desk, Metrics]:
    metrics = Metrics()
    desk = Desk(database=database, clock=FakeClock(), metrics=metrics, send_ack=answers.send, max_waiting=max_waiting)
    return desk, metrics


async def working(desk: Desk, done: Callable[[], bool]) -> None:
    """Run the ingest loop until the condition holds, then stop it."""
    async with asyncio.timeout(20):
        async with asyncio.TaskGroup() as group:
            loop = group.create_task(desk.run())
            while not done():
                await asyncio.sleep(0.002)
            loop.cancel()


def take(database: Database, *batches: Batch, device: DeviceId = PI) -> tuple[list[str], Desk]:
    """Submit batches, wait for all answers, and return them with the desk."""

    async def story() -> tuple[list[str], Desk]:
        answers = Answers()
        desk, _ = made_desk(database, answers)
        for one in batches:
            assert desk.submit(device, one)
        await working(desk, lambda: len(answers.acks) == len(batches))
        assert [ack.batch for _, ack in answers.acks] == [one.batch for one in batches]
        return answers.statuses(), desk

    return asyncio.run(story())


def summary(database: Database, device: DeviceId = PI) -> StreamSummary:
    """The only stream of the device."""
    desk, _ = made_desk(database, Answers())
    (stream,) = asyncio.run(desk.summary(device))
    return stream


def rows(database: Database) -> list[tuple[str, int, int]]:
    """(device, class, number) of every record, in the order of arrival."""
    c = tables.records.c
    query = sa.select(c.device, c.klass, c.seq).order_by(c.id)
    return database.read_now(lambda conn: [(r.device, r.klass, r.seq) for r in conn.execute(query)])


def test_records_are_stored_and_acknowledged(database: Database) -> None:
    statuses, desk = take(database, batch(readings(1, 2, 3)))
    assert statuses == ["stored"]
    effects = asyncio.run(desk.records(PI, limit=10))
    assert [(e.klass, e.seq, e.at_ms, e.kind) for e in effects] == [
        ("telemetry", n, 1000 + n, "reading") for n in (1, 2, 3)
    ]
    assert effects[0].body == {"name": "t", "value": 1.0}
    stream = summary(database)
    assert (stream.records, stream.first, stream.last, stream.missing) == (3, 1, 3, ())


def test_the_same_batch_again_is_a_duplicate_with_one_effect(database: Database) -> None:
    statuses, _ = take(database, batch(readings(1, 2)), batch(readings(1, 2)), batch(readings(1, 2)))
    assert statuses == ["stored", "duplicate", "duplicate"]
    assert len(rows(database)) == 2
    assert summary(database).duplicates == 4


def test_a_batch_is_known_again_by_its_digest_though_bodies_are_stored_otherwise(database: Database) -> None:
    """A hub of another version may have written a record with fewer fields than this one would."""
    take(database, batch(readings(1)))
    database.write_now(lambda conn: conn.execute(tables.records.update().values(body=b"\x80")) and None)
    statuses, _ = take(database, batch(readings(1)))
    assert statuses == ["duplicate"]


def test_batches_may_come_in_any_order(database: Database) -> None:
    take(database, batch(readings(5, 6)), batch(readings(1, 2)))
    assert summary(database).missing == ((3, 4),)
    take(database, batch(readings(3, 4)))
    stream = summary(database)
    assert (stream.records, stream.missing) == (6, ())


def test_a_batch_that_overlaps_with_the_same_content_adds_what_is_new(database: Database) -> None:
    statuses, _ = take(database, batch(readings(1, 2, 3)), batch(readings(2, 3, 4)), batch(readings(1, 2, 3, 4)))
    assert statuses == ["stored", "stored", "duplicate"]
    assert [seq for _, _, seq in rows(database)] == [1, 2, 3, 4]


def test_a_copied_disk_is_refused_counted_and_audited_once(database: Database) -> None:
    forged = [Record(seq=seq, at_ms=9, body=Reading(name="other", value=0.0)) for seq in (1, 2)]
    statuses, _ = take(database, batch(readings(1, 2)), batch(forged), batch(forged[1:]), batch(readings(1, 2)))
    assert statuses == ["stored", "refused", "refused", "duplicate"]
    assert len(rows(database)) == 2
    assert summary(database).conflicts == 2
    entries = database.read_now(lambda conn: audit.entries(conn, after=0, limit=10))
    assert [(entry.action, entry.subject) for entry in entries] == [("telemetry.conflict", "device:pi-1")]
    assert entries[0].detail["first"] == 1


def test_a_refused_batch_says_why_and_spoils_no_other(database: Database) -> None:
    async def story() -> list[tuple[str, str]]:
        answers = Answers()
        desk, _ = made_desk(database, answers)
        desk.submit(PI, batch(readings(1), digest="0" * 64))
        desk.submit(PI, batch(readings(1)))
        await working(desk, lambda: len(answers.acks) == 2)
        return [(ack.status, ack.code) for _, ack in answers.acks]

    assert asyncio.run(story()) == [("refused", "telemetry.digest"), ("stored", "")]


def test_devices_and_classes_are_apart(database: Database) -> None:
    event = [Record(seq=1, at_ms=5, body=DeviceEvent(name="host.lost"))]
    take(database, batch(readings(1)), batch(event, klass=int(RecordClass.EVENT)))
    take(database, batch(readings(1)), device=OTHER)
    assert rows(database) == [("pi-1", 2, 1), ("pi-1", 0, 1), ("pi-2", 2, 1)]
    desk, _ = made_desk(database, Answers())
    assert [e.klass for e in asyncio.run(desk.records(PI, limit=10))] == ["telemetry", "event"]
    assert [e.klass for e in asyncio.run(desk.records(PI, klass=RecordClass.EVENT, limit=10))] == ["event"]


def test_pages_follow_the_order_of_arrival(database: Database) -> None:
    _, desk = take(database, batch(readings(4, 5)), batch(readings(1, 2, 3)))
    first = asyncio.run(desk.records(PI, limit=3))
    second = asyncio.run(desk.records(PI, after=first[-1].id, limit=3))
    assert [e.seq for e in (*first, *second)] == [4, 5, 1, 2, 3]


def test_an_answer_that_is_lost_after_the_commit_costs_nothing(database: Database) -> None:
    """The hub stores, the link is gone; the device sends again, to a hub that was started anew."""

    async def cut() -> None:
        answers = Answers()
        answers.down = True
        desk, metrics = made_desk(database, answers)
        desk.submit(PI, batch(readings(1, 2)))
        await working(desk, lambda: b'outcome="unacknowledged"' in metrics.text())
        assert answers.acks == []

    asyncio.run(cut())
    assert len(rows(database)) == 2
    statuses, _ = take(database, batch(readings(1, 2)))
    assert statuses == ["duplicate"]
    assert len(rows(database)) == 2


def test_a_hub_that_is_killed_between_commit_and_answer_counts_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hub.db'}"
    first = Database(url)
    migrate.upgrade(first)

    async def killed() -> None:
        async def never(_device: DeviceId, _ack: Ack) -> None:
            raise Killed

        desk = Desk(database=first, clock=FakeClock(), metrics=Metrics(), send_ack=never)
        desk.submit(PI, batch(readings(1, 2)))
        await desk.run()

    with pytest.raises(Killed):
        asyncio.run(killed())
    # The first database is deliberately not closed before the second one opens the file.
    second = Database(url)
    try:
        statuses, _ = take(second, batch(readings(1, 2)), batch(readings(3)))
        assert statuses == ["duplicate", "stored"]
        assert [seq for _, _, seq in rows(second)] == [1, 2, 3]
    finally:
        second.close()
        first.close()


class Killed(Exception):
    """The process is gone."""


def test_a_commit_that_fails_leaves_nothing_and_is_not_answered(database: Database) -> None:
    async def story() -> list[str]:
        answers = Answers()
        desk, metrics = made_desk(Full(database), answers)  # type: ignore[arg-type]
        desk.submit(PI, batch(readings(1, 2)))
        await working(desk, lambda: b'outcome="failed"' in metrics.text())
        assert answers.acks == []
        assert rows(database) == []
        desk.submit(PI, batch(readings(1, 2)))
        await working(desk, lambda: len(answers.acks) == 1)
        return answers.statuses()

    assert asyncio.run(story()) == ["stored"]


class Full:
    """A database whose first write finds no room, after the work was done in it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._failed = False

    async def write(self, work: Callable[[sa.Connection], object]) -> object:
        """Fail once, then work."""

        def failing(conn: sa.Connection) -> object:
            work(conn)
            raise StorageFull("no room")

        once, self._failed = not self._failed, True
        return await self._database.write(failing if once else work)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
        found: Callable[..., Awaitable[object]] = getattr(self._database, name)
        return found


def test_what_does_not_fit_into_the_queue_is_dropped_and_counted(database: Database) -> None:
    async def story() -> None:
        answers = Answers()
        desk, metrics = made_desk(database, answers, max_waiting=2)
        taken = [desk.submit(PI, batch(readings(number))) for number in (1, 2, 3)]
        assert taken == [True, True, False]
        assert b'outrider_hub_batches_total{outcome="overflow"} 1.0' in metrics.text()
        await working(desk, lambda: len(answers.acks) == 2)

    asyncio.run(story())
    assert len(rows(database)) == 2


def test_what_waits_is_committed_together(database: Database) -> None:
    async def story() -> int:
        answers = Answers()
        desk, metrics = made_desk(database, answers)
        for number in range(1, 51):
            desk.submit(PI, batch(readings(number)))
        await working(desk, lambda: len(answers.acks) == 50)
        line = next(row for row in metrics.text().splitlines() if row.startswith(b"outrider_hub_commit_seconds_count"))
        return int(float(line.split()[-1]))

    assert asyncio.run(story()) == 1
    assert summary(database).records == 50


def test_the_migration_makes_the_declared_tables(database: Database) -> None:
    declared = {
        table.name: {c.name for c in table.columns} for table in (tables.records, tables.streams, tables.batches)
    }
    inspector = database.read_now(
        lambda conn: {name: {c["name"] for c in sa.inspect(conn).get_columns(name)} for name in declared}
    )
    assert inspector == declared
