"""The desk on a real database: once each, in any order, with the power going between commit and answer."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cloud_hub.ground import audit, migrate
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.telemetry import desk as desk_module
from cloud_hub.telemetry import rules, tables
from cloud_hub.telemetry.desk import Desk, StoredEffect, StreamSummary
from cloud_hub.telemetry.figures import Tallies
from shared.errors import StorageError, StorageFull, Unreachable
from shared.ids import DeviceId
from shared.telemetry import DeviceEvent, Outcome, Reading, Record, RecordClass
from shared.wire.messages import Ack, Batch
from tests.fakes.batches import Sent, batch_of, gap_of, readings
from tests.fakes.clock import FakeClock

PI = DeviceId("pi-1")
OTHER = DeviceId("pi-2")


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
        return [verdict.status for _, ack in self.acks for verdict in ack.verdicts]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    migrate.upgrade(made)
    yield made
    made.close()


def made_desk(database: Database, answers: Answers) -> tuple[Desk, Metrics]:
    metrics = Metrics()
    return Desk(database=database, clock=FakeClock(), metrics=metrics, send_ack=answers.send), metrics


def take(database: Database, *batches: Batch, device: DeviceId = PI) -> tuple[list[str], Desk]:
    """Have batches stored in one group and return the answers, which are in one message, with the desk."""
    answers = Answers()
    desk, _ = made_desk(database, answers)
    asyncio.run(desk.take([Sent(device, one) for one in batches]))
    ((told, ack),) = answers.acks
    assert (told, [verdict.batch for verdict in ack.verdicts]) == (device, [one.batch for one in batches])
    return answers.statuses(), desk


def summary(database: Database, device: DeviceId = PI) -> StreamSummary:
    """The only stream of the device."""
    desk, _ = made_desk(database, Answers())
    (stream,) = asyncio.run(desk.summary(device)).streams
    return stream


def numbers(database: Database, device: DeviceId = PI) -> list[int]:
    """The numbers of the device's records, in the order of arrival."""
    desk, _ = made_desk(database, Answers())
    return [effect.seq for effect in asyncio.run(desk.records(device, limit=1000)).items]


def test_records_are_stored_and_acknowledged(database: Database) -> None:
    statuses, desk = take(database, batch_of(readings(1, 2, 3)))
    assert statuses == ["stored"]
    effects = asyncio.run(desk.records(PI, limit=10)).items
    assert [(e.klass, e.seq, e.at_ms, e.kind) for e in effects] == [
        ("reading", n, 1000 + n, "reading") for n in (1, 2, 3)
    ]
    assert effects[0].body == {"name": "t", "value": 1.0}
    stream = summary(database)
    assert (stream.records, stream.first, stream.last, stream.watermark, stream.missing) == (3, 1, 3, 3, ())


def test_a_batch_is_one_row_as_it_came(database: Database) -> None:
    batch = batch_of(readings(*range(1, 101)))
    take(database, batch)
    (row,) = database.read_now(lambda conn: conn.execute(sa.select(tables.batches)).all())
    assert (row.first, row.last, row.records, row.columns) == (1, 100, 100, batch.columns)


def test_the_same_batch_again_is_a_duplicate_with_one_effect(database: Database) -> None:
    statuses, _ = take(database, *[batch_of(readings(1, 2))] * 3)
    assert statuses == ["stored", "duplicate", "duplicate"]
    assert numbers(database) == [1, 2]
    assert summary(database).duplicates == 4


def test_a_batch_is_known_again_by_its_digest_though_it_is_stored_otherwise(database: Database) -> None:
    """A hub of another version may have kept less of a record than this one would."""
    take(database, batch_of(readings(1)))
    database.write_now(lambda conn: conn.execute(tables.batches.update().values(columns=b"damaged")) and None)
    statuses, desk = take(database, batch_of(readings(1)))
    assert statuses == ["duplicate"]
    # Under other boundaries it cannot be compared any more, and what is here stays counted once.
    assert take(database, batch_of(readings(1, 2)))[0] == ["stored"]
    answers = Answers()
    damaged, metrics = made_desk(database, answers)
    asyncio.run(damaged.take([Sent(PI, batch_of([Record(seq=1, at_ms=9, body=Reading(name="u", value=0.0))]))]))
    assert answers.statuses() == ["duplicate"]
    assert b"outrider_hub_damaged_batches_total 1.0" in metrics.text()
    assert summary(database).records == 2
    with pytest.raises(StorageError, match="damaged"):
        asyncio.run(desk.records(PI, limit=10))


def test_batches_may_come_in_any_order(database: Database) -> None:
    take(database, batch_of(readings(5, 6)), batch_of(readings(1, 2)))
    assert summary(database).missing == ((3, 4),)
    take(database, batch_of(readings(3, 4)))
    stream = summary(database)
    assert (stream.records, stream.missing) == (6, ())


def test_a_copied_disk_is_refused_counted_and_audited_once(database: Database) -> None:
    forged = [Record(seq=seq, at_ms=9, body=Reading(name="other", value=0.0)) for seq in (1, 2)]
    sent = [batch_of(readings(1, 2)), batch_of(forged), batch_of(forged[1:]), batch_of(readings(1, 2))]
    assert take(database, *sent)[0] == ["stored", "refused", "refused", "duplicate"]
    assert numbers(database) == [1, 2]
    assert summary(database).conflicts == 2
    entries = database.read_now(lambda conn: audit.entries(conn, after=0, limit=10))
    assert [(entry.action, entry.subject) for entry in entries] == [("telemetry.conflict", "device:pi-1")]
    assert entries[0].detail["first"] == 1


def test_a_store_that_was_lost_is_audited(database: Database) -> None:
    take(database, batch_of(readings(1)))
    take(database, batch_of(readings(1), epoch="f" * 16))
    entries = database.read_now(lambda conn: audit.entries(conn, after=0, limit=10))
    assert [(entry.action, entry.detail["epoch"]) for entry in entries] == [("telemetry.new_epoch", "f" * 16)]


def test_a_gap_is_declared_lost(database: Database) -> None:
    statuses, _ = take(database, batch_of(readings(1, 2, 6)), gap_of(2, 5, records=3), gap_of(2, 5, records=3))
    assert statuses == ["stored", "stored", "duplicate"]
    stream = summary(database)
    assert [(one.first, one.last, one.reason) for one in stream.lost] == [(3, 5, "evicted")]
    assert (stream.records, stream.watermark, stream.missing) == (3, 6, ())


def test_a_refused_batch_says_why_and_spoils_no_other(database: Database) -> None:
    answers = Answers()
    desk, metrics = made_desk(database, answers)
    forged = batch_of(readings(1), digest="0" * 64)
    asyncio.run(desk.take([Sent(PI, forged), Sent(PI, None), Sent(PI, batch_of(readings(1)))]))
    ((_, ack),) = answers.acks
    assert [(one.status, one.code) for one in ack.verdicts] == [("refused", "telemetry.digest"), ("stored", "")]
    assert ack.verdicts[0].batch == forged.batch
    for status in ("refused", "stored"):
        assert f'outrider_hub_batches_total{{outcome="{status}"}} 1.0'.encode() in metrics.text()


def test_what_a_refusal_echoes_is_cut_short(database: Database) -> None:
    answers = Answers()
    desk, _ = made_desk(database, answers)
    blown = batch_of(readings(1), epoch="e" * 100_000, digest="d" * 100_000)
    asyncio.run(desk.take([Sent(PI, blown)]))
    ((_, ack),) = answers.acks
    assert (len(ack.verdicts[0].batch.epoch), len(ack.verdicts[0].batch.digest)) == (64, 128)


def test_a_group_is_answered_in_one_message_for_each_device(database: Database) -> None:
    answers = Answers()
    desk, metrics = made_desk(database, answers)
    group = [Sent(device, batch_of(readings(number))) for number in range(1, 26) for device in (PI, OTHER)]
    asyncio.run(desk.take(group))
    assert [(device, len(ack.verdicts)) for device, ack in answers.acks] == [(PI, 25), (OTHER, 25)]
    assert b"outrider_hub_commit_seconds_count 1.0" in metrics.text()
    assert summary(database).records == summary(database, OTHER).records == 25


def test_devices_and_classes_are_apart(database: Database) -> None:
    event = [Record(seq=1, at_ms=5, body=DeviceEvent(name="host.lost"))]
    take(database, batch_of(readings(1)), batch_of(event))
    _, desk = take(database, batch_of(readings(1)), device=OTHER)
    assert [e.klass for e in asyncio.run(desk.records(PI, limit=10)).items] == ["reading", "event"]
    assert [e.klass for e in asyncio.run(desk.records(PI, klass=RecordClass.EVENT, limit=10)).items] == ["event"]
    assert [e.klass for e in asyncio.run(desk.records(OTHER, limit=10)).items] == ["reading"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_pages_follow_the_order_of_arrival_whatever_their_size(database: Database, size: int) -> None:
    sent = [
        batch_of(readings(4, 5)),
        gap_of(6, 9, records=4),
        batch_of(readings(1, 2, 3)),
        batch_of(readings(*range(10, 40))),
    ]
    event = [Record(seq=seq, at_ms=5, body=DeviceEvent(name="host.lost")) for seq in (1, 2, 3)]
    _, desk = take(database, *sent, batch_of(event))
    pages: list[StoredEffect] = []
    after = 0
    while page := asyncio.run(desk.records(PI, after=after, limit=size)).items:
        assert len(page) <= size
        pages += page
        after = page[-1].id
    assert [(e.klass, e.seq) for e in pages] == [
        *(("reading", seq) for seq in (4, 5, 1, 2, 3, *range(10, 40))),
        *(("event", seq) for seq in (1, 2, 3)),
    ]
    assert [e.id for e in pages] == sorted({e.id for e in pages})


def test_an_answer_that_is_lost_after_the_commit_costs_nothing(database: Database) -> None:
    """The hub stores, the link is gone; the device sends again, to a hub that was started anew."""
    answers = Answers()
    answers.down = True
    desk, metrics = made_desk(database, answers)
    asyncio.run(desk.take([Sent(PI, batch_of(readings(1, 2)))]))
    assert b'outcome="unacknowledged"} 1.0' in metrics.text()
    assert answers.acks == []
    assert take(database, batch_of(readings(1, 2)))[0] == ["duplicate"]
    assert numbers(database) == [1, 2]


def test_a_hub_that_is_killed_between_commit_and_answer_counts_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'hub.db'}"
    first = Database(url)
    migrate.upgrade(first)

    async def never(_device: DeviceId, _ack: Ack) -> None:
        raise Killed

    desk = Desk(database=first, clock=FakeClock(), metrics=Metrics(), send_ack=never)
    with pytest.raises(Killed):
        asyncio.run(desk.take([Sent(PI, batch_of(readings(1, 2)))]))
    # The first database is deliberately not closed before the second one opens the file.
    second = Database(url)
    try:
        assert take(second, batch_of(readings(1, 2)), batch_of(readings(3)))[0] == ["duplicate", "stored"]
        assert numbers(second) == [1, 2, 3]
    finally:
        second.close()
        first.close()


class Killed(Exception):
    """The process is gone."""


def test_a_commit_that_fails_leaves_nothing_and_is_not_answered(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "PAUSE_S", 0.0)
    answers = Answers()
    desk, metrics = made_desk(Full(database), answers)  # type: ignore[arg-type]
    sent = [Sent(PI, batch_of(readings(1, 2)))]
    with pytest.raises(StorageFull):
        asyncio.run(desk.take(sent))
    assert b'outcome="failed"} 1.0' in metrics.text()
    assert (answers.acks, numbers(database)) == ([], [])
    asyncio.run(desk.take(sent))
    assert answers.statuses() == ["stored"]


class Full:
    """A database whose first write finds no room, after the work was done in it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._failed = False

    async def write(self, work: Callable[[sa.Connection], object], *, beside: bool = False) -> object:
        """Fail once, then work."""

        def failing(conn: sa.Connection) -> object:
            work(conn)
            raise StorageFull("no room")

        once, self._failed = not self._failed, True
        return await self._database.write(failing if once else work, beside=beside)

    def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
        found: Callable[..., Awaitable[object]] = getattr(self._database, name)
        return found


def test_a_batch_that_meets_a_defect_stops_no_other(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In taking it or in opening it."""
    count, open_batch = tables.SqlStore.count, rules.open_batch

    def counting(store: tables.SqlStore, device: DeviceId, tallies: Tallies, *, minute: int) -> None:
        if device == PI:
            raise struct.error("argument out of range")
        count(store, device, tallies, minute=minute)

    def opening(device: DeviceId, batch: Batch) -> rules.Opened:
        if batch.batch.first == 13:
            raise ZeroDivisionError
        return open_batch(device, batch)

    monkeypatch.setattr(tables.SqlStore, "count", counting)
    monkeypatch.setattr(rules, "open_batch", opening)
    outcome = [Record(seq=1, at_ms=1, body=Outcome(request="r", model="m", version="1.0.0", correct=True))]
    answers = Answers()
    desk, metrics = made_desk(database, answers)
    group = [
        Sent(OTHER, batch_of(outcome)),
        Sent(PI, batch_of(outcome)),
        Sent(PI, batch_of(readings(13))),
        Sent(PI, batch_of(readings(1))),
    ]
    for _ in range(2):
        asyncio.run(desk.take(group))
    told = {device: [(one.status, one.code) for one in ack.verdicts] for device, ack in answers.acks[:2]}
    defect = ("refused", "telemetry.defect")
    assert told == {OTHER: [("stored", "")], PI: [defect, defect, ("stored", "")]}
    assert answers.statuses()[4:] == ["duplicate", "refused", "refused", "duplicate"]
    assert b'outrider_hub_batches_total{outcome="refused"} 4.0' in metrics.text()
    assert [entry.message for entry in caplog.records].count("batch cannot be stored") == 1


def test_a_damaged_row_of_one_device_stops_no_other_and_is_not_answered(database: Database) -> None:
    take(database, batch_of(readings(1)))
    database.write_now(lambda conn: conn.execute(tables.streams.update().values(ranges=b"damaged")) and None)
    answers = Answers()
    desk, metrics = made_desk(database, answers)
    asyncio.run(desk.take([Sent(PI, batch_of(readings(2))), Sent(OTHER, batch_of(readings(1)))]))
    assert [(device, len(ack.verdicts)) for device, ack in answers.acks] == [(OTHER, 1)]
    assert b'outrider_hub_batches_total{outcome="failed"} 1.0' in metrics.text()


def test_a_page_of_large_records_is_short_and_says_that_more_follow(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "MAX_PAGE_BYTES", 25_000)
    long = [Record(seq=seq, at_ms=5, body=Reading(name="x" * 10_000, value=0.0)) for seq in range(1, 6)]
    huge = [Record(seq=6, at_ms=5, body=Reading(name="x" * 30_000, value=0.0))]
    _, desk = take(database, batch_of(long), batch_of(huge))
    after, pages = 0, []
    while True:
        page = asyncio.run(desk.records(PI, after=after, limit=100))
        pages.append([effect.seq for effect in page.items])
        if not page.has_more:
            break
        after = page.items[-1].id
    assert pages == [[1, 2], [3, 4], [5], [6]]


def test_of_a_page_only_what_is_told_is_read(database: Database) -> None:
    _, desk = take(database, *(batch_of(readings(n)) for n in range(1, 100)))
    read = []

    def listed(conn: sa.Connection) -> None:
        batches = tables.list_batches(conn, PI, klass=None, from_id=0)
        sa.event.listen(conn, "before_cursor_execute", lambda *said: read.append(said[2]))
        assert [next(batches).first for _ in range(9)] == list(range(1, 10))

    database.read_now(listed)
    # Of each class the first portion, and of readings another.
    assert len(read) == len(RecordClass) + 1
    page = asyncio.run(desk.records(PI, limit=99))
    assert (len(page.items), page.has_more) == (99, False)


def test_a_summary_tells_the_newest_streams_and_counts_all(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "MAX_TOLD_STREAMS", 2)
    clock = FakeClock()
    desk = Desk(database=database, clock=clock, metrics=Metrics(), send_ack=Answers().send)
    for epoch in "cab":
        asyncio.run(desk.take([Sent(PI, batch_of(readings(1, 2), epoch=epoch * 16))]))
        clock.advance(1000)
    found = asyncio.run(desk.summary(PI))
    assert [stream.epoch[0] for stream in found.streams] == ["a", "b"]
    assert (found.records, found.streams_known) == (6, 3)
