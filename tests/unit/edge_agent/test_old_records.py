"""Records that an agent before the journal left in SQLite: they move, and none is lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from edge_agent.adapters.database import Connection, Database
from edge_agent.adapters.old_records import SqliteOldRecords
from edge_agent.driver import records as records_module
from edge_agent.driver.events import ForPump
from edge_agent.driver.loop import Loop
from edge_agent.driver.records import Records
from shared.errors import StorageFull
from shared.telemetry import Body, DeviceEvent, Grade, Outcome, Reading, Record, RecordClass, Result
from shared.wire.columns import decode_columns, encode_columns
from tests.fakes.clock import FakeClock
from tests.fakes.outbox import FakeOutbox, KeptTicket

OLD_TELEMETRY = 2


def result(number: int) -> Result:
    return Result(request=f"r{number}", model="digits", version="1.0.0", variant="int8", rung="full")


def fill(connection: Connection) -> None:
    """As the earlier version left it: a sealed batch of mixed telemetry, and single records of each class."""
    sealed = [Record(seq=1, at_ms=11, body=result(1)), Record(seq=2, at_ms=12, body=Reading(name="t_c", value=2.0))]
    connection.execute("INSERT INTO batches VALUES (?, 1, 2, 'digest', ?)", (OLD_TELEMETRY, encode_columns(sealed)))
    rows: list[tuple[int, int, int, Body]] = [
        (0, 7, 70, DeviceEvent(name="release.committed", detail={"version": "1.0.0"})),
        (1, 1, 10, Outcome(request="r1", correct=True)),
        *((OLD_TELEMETRY, number, 10 + number, result(number)) for number in range(3, 1_003)),
    ]
    connection.executemany(
        "INSERT INTO records VALUES (?, ?, ?, ?)",
        [(klass, seq, at_ms, msgspec.msgpack.encode(body)) for klass, seq, at_ms, body in rows],
    )


def left(connection: Connection) -> int:
    """How many rows the old tables hold."""
    counts = [connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in ("batches", "records")]
    return sum(counts)


async def stored(outbox: FakeOutbox) -> dict[RecordClass, list[tuple[int, Body]]]:
    """What the outbox would send, by class."""
    found: dict[RecordClass, list[tuple[int, Body]]] = {}
    for klass in RecordClass:
        after, rows = 0, []
        while (batch := await outbox.load(klass, after=after)) is not None:
            rows += [(record.at_ms, record.body) for record in decode_columns(batch.columns)]
            after = batch.batch.last
        found[klass] = rows
    return found


def with_old_records(
    folder: Path, act: Callable[[Database, Loop, Records], Awaitable[None]], *, outbox: FakeOutbox
) -> None:
    async def story() -> None:
        database = await Database.open(folder / "agent.db", clock=FakeClock())
        try:
            await database.write(fill)
            async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
                loop = Loop(tasks)
                await act(database, loop, Records(clock=FakeClock(), loop=loop, outbox=outbox))
        finally:
            await database.close()

    asyncio.run(story())


def test_all_move_with_their_times_and_the_pump_is_woken(tmp_path: Path) -> None:
    outbox = FakeOutbox(total_bytes=8 * 2**20)

    async def act(database: Database, loop: Loop, records: Records) -> None:
        await records.adopt(SqliteOldRecords(database))
        assert await database.write(left) == 0
        woken = await loop.inbox.next()
        assert isinstance(woken, ForPump)
        await records.adopt(SqliteOldRecords(database))

    with_old_records(tmp_path, act, outbox=outbox)
    found = asyncio.run(stored(outbox))
    assert found[RecordClass.EVENT] == [(70, DeviceEvent(name="release.committed", detail={"version": "1.0.0"}))]
    assert found[RecordClass.OUTCOME] == [(10, Outcome(request="r1", correct=True))]
    assert found[RecordClass.READING] == [(12, Reading(name="t_c", value=2.0))]
    assert found[RecordClass.RESULT] == [(10 + n, result(n)) for n in (1, *range(3, 1_003))]
    assert set(outbox.grades) == {Grade.DURABLE}


def test_what_the_new_outbox_does_not_take_stays_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = FakeOutbox(total_bytes=8 * 2**20)
    put, taken = outbox.put, 0

    def full(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> KeptTicket:
        nonlocal taken
        taken += 1
        if 300 < taken <= 2_000:
            return KeptTicket(error=StorageFull("no room"))
        return put(body, at_ms=at_ms, grade=grade)

    async def act(database: Database, loop: Loop, records: Records) -> None:
        outbox.put = full  # type: ignore[method-assign]
        task = asyncio.create_task(records.adopt(SqliteOldRecords(database)))
        await asyncio.sleep(0)
        while await database.write(left) > 0:
            await asyncio.sleep(0)
        await task

    monkeypatch.setattr(records_module, "ADOPT_AGAIN_S", 0.001)
    with_old_records(tmp_path, act, outbox=outbox)
    found = asyncio.run(stored(outbox))
    assert found[RecordClass.RESULT] == [(10 + n, result(n)) for n in (1, *range(3, 1_003))]
    assert sum(map(len, found.values())) == 1_004


def test_what_the_outbox_takes_behind_what_it_does_not_is_not_put_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = FakeOutbox(total_bytes=8 * 2**20)
    put, refusals = outbox.put, 3

    def full_for_events(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> KeptTicket:
        nonlocal refusals
        if isinstance(body, DeviceEvent) and refusals:
            refusals -= 1
            return KeptTicket(error=StorageFull("no room for events"))
        return put(body, at_ms=at_ms, grade=grade)

    async def act(database: Database, loop: Loop, records: Records) -> None:
        outbox.put = full_for_events  # type: ignore[method-assign]
        await records.adopt(SqliteOldRecords(database))
        assert await database.write(left) == 0

    monkeypatch.setattr(records_module, "ADOPT_AGAIN_S", 0.001)
    with_old_records(tmp_path, act, outbox=outbox)
    found = asyncio.run(stored(outbox))
    assert [len(found[klass]) for klass in RecordClass] == [1, 1, 1_001, 1]


def test_what_was_put_before_the_outbox_had_no_more_room_is_not_put_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = FakeOutbox(total_bytes=8 * 2**20)
    put, behind = outbox.put, 0

    def slow(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> KeptTicket:
        nonlocal behind
        behind += 1
        if 100 < behind <= 102:
            raise StorageFull("the disk is slower", code="storage.behind")
        return put(body, at_ms=at_ms, grade=grade)

    async def act(database: Database, loop: Loop, records: Records) -> None:
        outbox.put = slow  # type: ignore[method-assign]
        await records.adopt(SqliteOldRecords(database))

    monkeypatch.setattr(records_module, "ADOPT_AGAIN_S", 0.001)
    with_old_records(tmp_path, act, outbox=outbox)
    found = asyncio.run(stored(outbox))
    assert [len(found[klass]) for klass in RecordClass] == [1, 1, 1_001, 1]


def test_a_crash_between_leaves_every_record_in_one_place_at_least(tmp_path: Path) -> None:
    outbox = FakeOutbox(total_bytes=8 * 2**20)

    async def act(database: Database, loop: Loop, records: Records) -> None:
        task = asyncio.create_task(records.adopt(SqliteOldRecords(database)))
        while await database.write(left) > 700:
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await records.adopt(SqliteOldRecords(database))
        assert await database.write(left) == 0

    with_old_records(tmp_path, act, outbox=outbox)
    found = asyncio.run(stored(outbox))
    assert {at_ms for at_ms, _ in found[RecordClass.RESULT]} == {10 + n for n in (1, *range(3, 1_003))}


def test_what_cannot_be_read_is_given_up_and_holds_up_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outbox = FakeOutbox(total_bytes=8 * 2**20)

    def spoil(connection: Connection) -> None:
        connection.execute("UPDATE batches SET columns = X'c1'")
        connection.execute("UPDATE records SET body = X'c1' WHERE klass = 1")

    async def act(database: Database, loop: Loop, records: Records) -> None:
        await database.write(spoil)
        await records.adopt(SqliteOldRecords(database))
        assert await database.write(left) == 0

    with_old_records(tmp_path, act, outbox=outbox)
    found = asyncio.run(stored(outbox))
    assert [len(found[klass]) for klass in RecordClass] == [1, 0, 1_000, 0]
    told = [record.message for record in caplog.records]
    assert told.count("an old batch cannot be read") == told.count("an old record cannot be read") == 1
