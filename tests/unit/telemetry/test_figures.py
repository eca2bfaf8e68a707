"""Figures count each record once, per device, release and minute of arrival, and believe devices only so far."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_hub.ground import migrate
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.telemetry import tables
from cloud_hub.telemetry.desk import Desk
from cloud_hub.telemetry.figures import MAX_GROUPS, NEVER_US, Figures, tally
from cloud_hub.telemetry.rules import open_batch
from shared.errors import StorageFull
from shared.ids import DeviceId
from shared.telemetry import Body, Outcome, Record, Result
from shared.wire.messages import Ack, Batch
from tests.fakes.batches import Sent, batch_of
from tests.fakes.clock import FakeClock

ONE, TWO = DeviceId("pi-1"), DeviceId("pi-2")
MINUTE_MS = 60_000


def result(request: int, *, version: str = "1.0.0", rung: str = "full", took_us: int = 1000) -> Result:
    return Result(request=str(request), model="digits", version=version, variant="fp32", rung=rung, took_us=took_us)


def outcome(request: int, *, correct: bool | None, version: str = "1.0.0", source: str = "") -> Outcome:
    return Outcome(request=str(request), model="digits", version=version, correct=correct, source=source)


def numbered(*bodies: Body, first: int = 1) -> Batch:
    """A batch of these, all of one class."""
    records = [Record(seq=first + n, at_ms=5, body=body) for n, body in enumerate(bodies)]
    return batch_of(records)


class Room:
    """The desk on a real database."""

    def __init__(self, database: Database) -> None:
        self.clock = FakeClock()
        self.statuses: list[str] = []
        self._desk = Desk(database=database, clock=self.clock, metrics=Metrics(), send_ack=self._keep)

    async def _keep(self, _device: DeviceId, ack: Ack) -> None:
        self.statuses += [verdict.status for verdict in ack.verdicts]

    def take(self, *batches: Batch, device: DeviceId = ONE) -> list[str]:
        """Have them stored in one group and return what was answered."""
        self.statuses.clear()
        asyncio.run(self._desk.take([Sent(device, one) for one in batches]))
        return list(self.statuses)

    def figures(self, *, since_ms: int = 0, devices: list[DeviceId] | None = None) -> list[Figures]:
        """What the desk says of the family."""
        return asyncio.run(self._desk.figures(family="digits", since_ms=since_ms, devices=devices))


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    database = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    migrate.upgrade(database)
    yield Room(database)
    database.close()


def counts(figures: list[Figures]) -> list[tuple[str, str, int, int, int, int]]:
    return [(f.device, f.version, f.answered, f.right, f.wrong, f.latency.count) for f in figures]


def test_answers_and_what_was_true_of_them_are_counted_by_release(room: Room) -> None:
    room.take(numbered(result(1), result(2), result(3, version="1.1.0")))
    room.take(numbered(outcome(1, correct=True), outcome(2, correct=False), outcome(3, correct=None)))
    assert counts(room.figures()) == [("pi-1", "1.0.0", 2, 1, 1, 2), ("pi-1", "1.1.0", 1, 0, 0, 1)]


def test_a_record_that_comes_again_counts_once(room: Room) -> None:
    assert room.take(numbered(result(1), result(2)), numbered(result(1), result(2))) == ["stored", "duplicate"]
    assert room.take(numbered(result(2), result(3), first=2)) == ["stored"]
    assert counts(room.figures()) == [("pi-1", "1.0.0", 3, 0, 0, 3)]


def test_only_the_models_own_answers_are_timed(room: Room) -> None:
    rungs = ("full", "smaller", "cached", "cloud")
    room.take(numbered(*(result(n, rung=rung) for n, rung in enumerate(rungs))))
    assert counts(room.figures()) == [("pi-1", "1.0.0", 4, 0, 0, 2)]


def test_a_request_without_an_answer_is_a_time_without_end_and_no_answer(room: Room) -> None:
    room.take(numbered(*(result(n, took_us=1000) for n in range(90)), *(result(n, rung="refused") for n in range(10))))
    (figures,) = room.figures()
    assert (figures.answered, figures.latency.count) == (90, 100)
    assert figures.latency.quantile(0.5) == pytest.approx(1000, rel=0.05)
    assert figures.latency.quantile(0.95) == pytest.approx(NEVER_US, rel=0.05)


def test_what_the_hub_said_is_no_verdict(room: Room) -> None:
    room.take(numbered(outcome(1, correct=False, source="hub"), outcome(1, correct=True)))
    assert counts(room.figures()) == [("pi-1", "1.0.0", 0, 1, 0, 0)]


def test_quantiles_reach_over_minutes_and_devices(room: Room) -> None:
    room.take(numbered(*(result(n, took_us=1000) for n in range(50))))
    room.clock.advance(MINUTE_MS)
    room.take(numbered(*(result(n, took_us=9000) for n in range(50)), first=51))
    room.take(numbered(result(1, took_us=400)), device=TWO)
    first, second = room.figures()
    assert (first.device, first.latency.count, second.device, second.latency.count) == (ONE, 100, TWO, 1)
    assert first.latency.quantile(0.25) == pytest.approx(1000, rel=0.05)
    assert first.latency.quantile(0.95) == pytest.approx(9000, rel=0.05)
    assert first.latency.merge(second.latency).quantile(0.0) == pytest.approx(400, rel=0.05)


def test_a_question_is_from_a_minute_on_and_of_some_devices(room: Room) -> None:
    room.take(numbered(result(1)))
    room.take(numbered(result(1)), device=TWO)
    room.clock.advance(2 * MINUTE_MS)
    since_ms = room.clock.wall_ms()
    room.take(numbered(result(2), result(3), first=2))
    assert counts(room.figures(since_ms=since_ms)) == [("pi-1", "1.0.0", 2, 0, 0, 2)]
    assert counts(room.figures(devices=[TWO])) == [("pi-2", "1.0.0", 1, 0, 0, 1)]
    many = [DeviceId(f"pi-{n}") for n in range(2000)]
    assert [f.device for f in room.figures(devices=many)] == [ONE, TWO]
    assert room.figures(devices=[]) == []


def test_a_minute_without_new_times_keeps_the_old_ones(room: Room) -> None:
    room.take(numbered(result(1)), numbered(outcome(1, correct=True)), numbered(result(2, rung="cached"), first=2))
    assert counts(room.figures()) == [("pi-1", "1.0.0", 2, 1, 0, 1)]


def test_names_that_are_none_and_names_without_end_are_not_counted(room: Room) -> None:
    odd = result(1, version="x" * 500)
    many = [result(n, version=f"1.{n}.0") for n in range(3 * MAX_GROUPS)]
    assert room.take(numbered(odd, *many)) == ["stored"]
    assert len(room.figures()) == MAX_GROUPS


def test_figures_and_records_are_of_one_transaction(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise StorageFull("no room")

    with monkeypatch.context() as patched:
        patched.setattr(tables.SqlStore, "count", broken)
        with pytest.raises(StorageFull):
            room.take(numbered(result(1)))
    assert room.figures() == []
    assert room.take(numbered(result(1))) == ["stored"]
    assert counts(room.figures()) == [("pi-1", "1.0.0", 1, 0, 0, 1)]


def test_a_tally_of_nothing_is_nothing() -> None:
    opened = open_batch(ONE, numbered(outcome(1, correct=None)))
    assert opened.content is not None
    assert tally(opened.content) == {}
