"""What every outbox does, on the fake and on a directory with its thread."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from edge_agent.adapters.outbox import JournalOutbox
from edge_agent.core.journal import Moment, bounds_for
from edge_agent.ports import Outbox
from shared import limits
from shared.errors import InvalidValue, StorageError, StorageFull
from shared.limits import KIB, MIB
from shared.telemetry import Body, DeviceEvent, Gap, Grade, Outcome, Reading, Record, RecordClass, Result
from shared.wire.columns import decode_columns
from shared.wire.messages import Batch, digest_of
from tests.fakes.clock import FakeClock
from tests.fakes.outbox import FakeOutbox

Story = Callable[[Outbox], Awaitable[None]]
Play = Callable[..., None]
EVENT, OUTCOME, RESULT, READING = RecordClass


@pytest.fixture(params=["fake", "journal"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Runs acts one after the other, each after a restart of the agent."""

    def run(*acts: Story, total_bytes: int = 16 * MIB) -> None:
        fake = FakeOutbox(total_bytes=total_bytes) if request.param == "fake" else None

        async def one(act: Story) -> None:
            if fake is not None:
                await act(fake)
                fake.restart()
                return
            outbox = await JournalOutbox.open(
                tmp_path / "outbox", bounds=bounds_for(total_bytes), clock=FakeClock(), moments=moment, flush_ms=0
            )
            try:
                await act(outbox)
            finally:
                await outbox.close()

        for act in acts:
            asyncio.run(one(act))

    return run


def moment() -> Moment:
    return Moment(boot="b", uptime_ms=5, wall_ms=0, synchronised=False)


def reading(value: float) -> Reading:
    return Reading(name="cpu_temp_c", value=value)


def event(name: str = "host.lost", **detail: str) -> DeviceEvent:
    return DeviceEvent(name=name, detail=detail)


async def put(outbox: Outbox, body: Body, *, at_ms: int = 1) -> int:
    return await outbox.put(body, at_ms=at_ms).durable()


async def drained(outbox: Outbox, klass: RecordClass) -> list[Record]:
    """Every record of the class, settled batch by batch; gaps are settled and left out."""
    records: list[Record] = []
    while (batch := await outbox.load(klass)) is not None:
        if batch.gap is None:
            records.extend(decode_columns(batch.columns))
        assert await outbox.settle(batch.batch)
    return records


async def first_batch(outbox: Outbox, klass: RecordClass, *, after: int = 0) -> Batch:
    batch = await outbox.load(klass, after=after)
    assert batch is not None
    return batch


def span(batch: Batch) -> tuple[int, int]:
    return batch.batch.first, batch.batch.last


def test_numbers_are_dense_by_class_and_bodies_come_back(play: Play) -> None:
    bodies: tuple[Body, ...] = (
        reading(1.5),
        Result(request="r1", model="digits", version="1.0.0", variant="int8", rung="full", label="7", confidence=0.9),
        Outcome(request="r1", correct=True),
        event("release.committed", version="1.0.0"),
        reading(2.5),
    )

    async def story(outbox: Outbox) -> None:
        numbers = [await put(outbox, body, at_ms=1000 + i) for i, body in enumerate(bodies)]
        assert numbers == [1, 1, 1, 1, 2]
        assert await drained(outbox, READING) == [
            Record(seq=1, at_ms=1000, body=bodies[0]),
            Record(seq=2, at_ms=1004, body=bodies[4]),
        ]
        assert await drained(outbox, RESULT) == [Record(seq=1, at_ms=1001, body=bodies[1])]
        assert await drained(outbox, OUTCOME) == [Record(seq=1, at_ms=1002, body=bodies[2])]
        assert await drained(outbox, EVENT) == [Record(seq=1, at_ms=1003, body=bodies[3])]

    play(story)


def test_the_epoch_is_sixteen_hex_digits_and_stays(play: Play) -> None:
    seen: list[str] = []

    async def look(outbox: Outbox) -> None:
        seen.append(outbox.epoch)

    play(look, look)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 16
    assert int(seen[0], 16) >= 0


@pytest.mark.parametrize("grade", list(Grade))
def test_what_is_put_in_any_grade_is_there_after_a_clean_stop(play: Play, grade: Grade) -> None:
    async def leave(outbox: Outbox) -> None:
        for value in range(3):
            outbox.put(reading(value), at_ms=1, grade=grade)

    async def look(outbox: Outbox) -> None:
        assert [record.body for record in await drained(outbox, READING)] == [reading(0), reading(1), reading(2)]

    play(leave, look)


def test_flush_returns_when_all_that_was_put_is_durable(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        outbox.put(reading(1), at_ms=1, grade=Grade.MEMORY)
        outbox.put(event(), at_ms=1, grade=Grade.MEMORY)
        await outbox.flush()
        assert outbox.depth().records[READING] == 1
        assert outbox.depth().records[EVENT] == 1

    play(story)


def test_the_same_batch_comes_back_byte_for_byte_until_it_is_settled(play: Play) -> None:
    seen: list[Batch] = []

    async def seal(outbox: Outbox) -> None:
        for value in range(3):
            await put(outbox, reading(value), at_ms=value)
        seen.append(await first_batch(outbox, READING))
        await put(outbox, reading(9), at_ms=9)
        assert await first_batch(outbox, READING) == seen[0]

    async def again(outbox: Outbox) -> None:
        batch = await first_batch(outbox, READING)
        assert batch == seen[0]
        assert batch.batch.digest == digest_of(columns=batch.columns, gap=None)
        assert (batch.batch.klass, *span(batch)) == (3, 1, 3)
        assert batch.batch.epoch == outbox.epoch
        assert await outbox.settle(batch.batch)
        assert span(await first_batch(outbox, READING)) == (4, 4)

    play(seal, again)


def test_several_batches_may_be_on_their_way_and_are_settled_in_any_order(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        batches: list[Batch] = []
        for value in range(4):
            await put(outbox, reading(value))
            batches.append(await first_batch(outbox, READING, after=value))
        assert [span(batch) for batch in batches] == [(1, 1), (2, 2), (3, 3), (4, 4)]
        assert await outbox.load(READING, after=4) is None
        for index in (2, 0):
            assert await outbox.settle(batches[index].batch)
        assert outbox.depth().records[READING] == 2
        assert span(await first_batch(outbox, READING)) == (2, 2)
        assert span(await first_batch(outbox, READING, after=2)) == (4, 4)

    async def after_a_restart(outbox: Outbox) -> None:
        left = [record.seq for record in await drained(outbox, READING)]
        assert {2, 4} <= set(left)
        assert await put(outbox, reading(5)) == 5

    play(story, after_a_restart)


def test_an_answer_that_fits_no_open_batch_settles_nothing(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        await put(outbox, reading(1))
        batch = await first_batch(outbox, READING)
        replace = msgspec.structs.replace
        for wrong in (
            replace(batch.batch, epoch="f" * 16),
            replace(batch.batch, klass=1),
            replace(batch.batch, klass=77),
            replace(batch.batch, first=0),
            replace(batch.batch, last=2),
            replace(batch.batch, digest="0" * 64),
        ):
            assert not await outbox.settle(wrong)
            assert not await outbox.bury(wrong, reason="telemetry.numbers")
        assert outbox.depth().records[READING] == 1
        assert await outbox.settle(batch.batch)
        assert not await outbox.settle(batch.batch)

    play(story)


def test_a_batch_that_nobody_takes_is_put_aside_and_its_numbers_are_a_gap(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        await put(outbox, reading(1))
        refused = await first_batch(outbox, READING)
        await put(outbox, reading(2))
        assert await outbox.bury(refused.batch, reason="telemetry.columns")
        assert outbox.depth().buried == 1
        assert outbox.depth().lost == {"refused": 1}
        assert not await outbox.settle(refused.batch)
        assert not await outbox.bury(refused.batch, reason="telemetry.columns")

    async def later(outbox: Outbox) -> None:
        assert outbox.depth().buried == 1
        gap = await first_batch(outbox, READING)
        assert (span(gap), gap.gap) == ((1, 1), Gap(reason="refused", records=1))
        assert await outbox.settle(gap.batch)
        assert span(await first_batch(outbox, READING)) == (2, 2)

    play(story, later)


def test_a_gap_that_nobody_takes_is_let_go_of(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        await put(outbox, reading(1))
        assert await outbox.bury((await first_batch(outbox, READING)).batch, reason="telemetry.columns")
        assert await outbox.bury((await first_batch(outbox, READING)).batch, reason="telemetry.gap")
        assert await outbox.load(READING) is None
        assert outbox.depth().lost == {"refused": 1}
        assert outbox.depth().records[READING] == 0

    play(story)


def test_numbers_go_on_after_everything_was_settled_and_after_a_restart(play: Play) -> None:
    async def empty(outbox: Outbox) -> None:
        for value in range(4):
            await put(outbox, reading(value))
        assert len(await drained(outbox, READING)) == 4
        assert outbox.depth().records[READING] == 0

    async def on(outbox: Outbox) -> None:
        assert await outbox.load(READING) is None
        assert await put(outbox, reading(5)) == 5

    play(empty, on)


def test_depth_counts_records_through_everything(play: Play) -> None:
    async def fill(outbox: Outbox) -> None:
        for value in range(5):
            await put(outbox, reading(value))
        await put(outbox, event())
        await outbox.load(READING)
        await put(outbox, reading(6))
        assert dict(outbox.depth().records) == {EVENT: 1, OUTCOME: 0, RESULT: 0, READING: 6}
        assert set(outbox.depth().oldest_ms) == {EVENT, READING}
        assert outbox.depth().bytes > 0

    async def empty(outbox: Outbox) -> None:
        assert dict(outbox.depth().records) == {EVENT: 1, OUTCOME: 0, RESULT: 0, READING: 6}
        await drained(outbox, READING)
        await drained(outbox, EVENT)
        assert dict(outbox.depth().records) == dict.fromkeys(RecordClass, 0)
        assert not outbox.depth().oldest_ms

    play(fill, empty)


def test_batches_keep_to_the_bounds_of_the_wire(play: Play) -> None:
    async def many(outbox: Outbox) -> None:
        count = limits.MAX_BATCH_RECORDS + 7
        tickets = [outbox.put(reading(i), at_ms=i) for i in range(count)]
        assert [await ticket.durable() for ticket in tickets] == list(range(1, count + 1))
        found = []
        while (batch := await outbox.load(READING)) is not None:
            assert batch.batch.last - batch.batch.first < limits.MAX_BATCH_RECORDS
            found += decode_columns(batch.columns)
            await outbox.settle(batch.batch)
        assert [record.seq for record in found] == list(range(1, count + 1))

    async def large(outbox: Outbox) -> None:
        bodies = [event(str(i), text=chr(97 + i) * 30_000) for i in range(15)]
        for body in bodies:
            await put(outbox, body)
        batch = await first_batch(outbox, EVENT)
        assert len(batch.columns) <= limits.MAX_BATCH_BYTES
        assert [record.body for record in await drained(outbox, EVENT)] == bodies

    play(many, large)


def test_a_record_that_is_too_large_is_refused_and_takes_no_number(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        with pytest.raises(InvalidValue):
            outbox.put(event(text="x" * limits.MAX_RECORD_BYTES), at_ms=1)
        assert await put(outbox, event()) == 1

    play(story)


def test_the_oldest_readings_make_room_and_the_gap_comes_first(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        for value in range(200):
            await put(outbox, Reading(name="n" * 20_000, value=value))
            assert outbox.depth().bytes <= MIB
        gap = await first_batch(outbox, READING)
        assert gap.gap is not None
        assert (gap.gap.reason, gap.batch.first, gap.gap.records) == ("evicted", 1, gap.batch.last)
        assert gap.batch.digest == digest_of(columns=b"", gap=gap.gap)
        assert outbox.depth().lost == {"evicted": gap.gap.records}

    async def later(outbox: Outbox) -> None:
        gap = await first_batch(outbox, READING)
        assert gap.gap is not None
        kept = [record.seq for record in await drained(outbox, READING)]
        assert kept == list(range(gap.batch.last + 1, 201))
        assert len(kept) > 20

    play(story, later, total_bytes=MIB)


def test_what_was_on_its_way_when_it_was_evicted_still_counts_as_settled(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        await put(outbox, reading(1))
        await put(outbox, reading(2))
        sent = await first_batch(outbox, READING)
        for value in range(200):
            await put(outbox, Reading(name="n" * 20_000, value=value))
        assert await outbox.settle(sent.batch)
        assert (await first_batch(outbox, READING)).batch.first == sent.batch.last + 1

    play(story, total_bytes=MIB)


def test_readings_never_displace_events_and_events_displace_readings(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        stored = 0
        for value in range(100):
            await put(outbox, Reading(name="n" * 20_000, value=value))
        before = outbox.depth().records[READING]
        for _ in range(100):
            try:
                await put(outbox, event(text="x" * 20_000))
            except StorageFull:
                break
            stored += 1
        assert 10 < stored < 100
        assert outbox.depth().records[READING] < before
        for value in range(100):
            await put(outbox, Reading(name="n" * 20_000, value=value))
        assert [record.seq for record in await drained(outbox, EVENT)] == list(range(1, stored + 1))
        assert await put(outbox, event("after")) == stored + 1

    play(story, total_bytes=MIB)


def test_dropping_leaves_a_gap_and_events_cannot_be_dropped(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        for value in range(5):
            await put(outbox, reading(value))
        assert await outbox.drop(READING) == 5
        await put(outbox, reading(6))
        with pytest.raises(InvalidValue):
            await outbox.drop(EVENT)

    async def later(outbox: Outbox) -> None:
        gap = await first_batch(outbox, READING)
        assert gap.gap is not None
        assert (gap.gap.reason, *span(gap)) == ("dropped", 1, 5)
        assert [record.seq for record in await drained(outbox, READING)] == [6]

    play(story, later)


def test_a_burst_of_small_records_is_kept_within_the_smallest_budget(play: Play) -> None:
    async def story(outbox: Outbox) -> None:
        tickets = [outbox.put(reading(i), at_ms=i % 2 * 2**40, grade=Grade.BUFFERED) for i in range(3_000)]
        await outbox.flush()
        assert [await ticket.durable() for ticket in tickets] == list(range(1, 3_001))

    play(story, total_bytes=MIB)


def test_more_than_the_memory_may_hold_is_refused_not_kept(tmp_path: Path) -> None:
    async def story() -> None:
        outbox = await JournalOutbox.open(
            tmp_path / "outbox", bounds=bounds_for(16 * MIB), clock=FakeClock(), moments=moment
        )
        kept = 0
        try:
            for _ in range(10_000):
                outbox.put(Reading(name="n" * 20 * KIB, value=1), at_ms=1, grade=Grade.MEMORY)
                kept += 1
        except StorageFull as refused:
            assert refused.code == "storage.behind"
        await outbox.flush()
        assert outbox.depth().records[READING] == kept < 10_000
        await outbox.close()

    asyncio.run(story())


def test_a_defect_in_the_thread_reaches_those_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        outbox = await JournalOutbox.open(
            tmp_path / "outbox", bounds=bounds_for(16 * MIB), clock=FakeClock(), moments=moment
        )

        def broken(*_: object) -> None:
            raise RuntimeError("defect")

        with monkeypatch.context() as patched:
            patched.setattr(outbox._store, "depth", broken)
            patched.setattr(outbox._store, "load", broken)
            async with asyncio.timeout(20):
                assert await put(outbox, reading(1)) == 1
                with pytest.raises(StorageError, match="defect"):
                    await outbox.load(READING)
        assert await put(outbox, reading(2)) == 2
        await outbox.close()

    asyncio.run(story())
