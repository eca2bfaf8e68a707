"""What every store of telemetry must hold, in memory and in each database; and what taking batches does over each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import msgspec
import pytest
import sqlalchemy as sa

from cloud_hub.ground import audit, migrate
from cloud_hub.ground.database import Database
from cloud_hub.telemetry import tables
from cloud_hub.telemetry.figures import Tally
from cloud_hub.telemetry.rules import Stream, explode, open_batch
from cloud_hub.telemetry.taking import CONFLICT, BatchRow, Lost, Note, Received, Store, Taken, take, take_all
from shared.ids import DeviceId
from shared.sketch import decode_sketch, sketch_of
from shared.telemetry import BatchId, Outcome, Reading, Record, RecordClass, Result
from shared.wire.messages import Batch, Verdict, digest_of
from tests.fakes.batches import EPOCH, batch_of, gap_of, readings
from tests.fakes.telemetry_store import MemoryTelemetry

T = TypeVar("T")

PI = DeviceId("pi-1")
OTHER = DeviceId("pi-2")
STREAM = Stream(PI, EPOCH, RecordClass.READING)
AT_MS = 1_800_000_000_000
MINUTE = AT_MS // 60_000


class Place(Protocol):
    """A store that is committed to, and what can be asked of it from outside."""

    def write(self, work: Callable[[Store], T]) -> T:
        """Run the work in a transaction."""
        ...

    def notes(self) -> list[tuple[str, str]]:
        """(device, action) of each audit event."""
        ...

    def figures(self, device: DeviceId, minute: int) -> dict[tuple[str, str], Tally]:
        """The figures of a device's minute."""
        ...


class Memory:
    """The fake."""

    def __init__(self) -> None:
        self._telemetry = MemoryTelemetry()

    def write(self, work: Callable[[Store], T]) -> T:
        with self._telemetry.transaction() as store:
            return work(store)

    def notes(self) -> list[tuple[str, str]]:
        return [(note.device, note.action) for note in self._telemetry.notes]

    def figures(self, device: DeviceId, minute: int) -> dict[tuple[str, str], Tally]:
        return dict(self._telemetry.figures.get((device, minute), {}))


class Sql:
    """The hub's tables in a database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        migrate.upgrade(database)

    def write(self, work: Callable[[Store], T]) -> T:
        return self._database.write_now(lambda conn: work(tables.SqlStore(conn)), beside=True)

    def notes(self) -> list[tuple[str, str]]:
        entries = self._database.read_now(lambda conn: audit.entries(conn, after=0, limit=100))
        return [(entry.subject.removeprefix("device:"), entry.action) for entry in entries]

    def figures(self, device: DeviceId, minute: int) -> dict[tuple[str, str], Tally]:
        c = tables.figures.c
        query = sa.select(tables.figures).where(c.device == device, c.minute == minute)
        rows = self._database.read_now(lambda conn: conn.execute(query).all())
        return {
            (row.family, row.version): Tally(row.answered, row.right, row.wrong, decode_sketch(bytes(row.latency)))
            for row in rows
        }


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "memory":
        yield Memory()
        return
    url = f"sqlite:///{tmp_path / 'hub.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    database = Database(url)
    try:
        yield Sql(database)
    finally:
        database.close()


def row(first: int, last: int, *, stream: Stream = STREAM, columns: bytes = b"c") -> BatchRow:
    """A batch of these numbers."""
    return BatchRow(stream, first, last, f"{first:064x}", last - first + 1, columns)


def known(place: Place, stream: Stream = STREAM) -> Received:
    """What is known of the stream; nothing for an unknown one."""
    return place.write(lambda store: store.read([stream]).get(stream, Received()))


def stored(place: Place, stream: Stream = STREAM) -> list[Record]:
    """All records of a stream, in the order of their numbers."""
    rows = overlapping(place, 1, 10_000, stream=stream)
    return sorted((record for each in rows for record in explode(each.columns)), key=lambda record: record.seq)


def overlapping(place: Place, first: int, last: int, *, stream: Stream = STREAM) -> Sequence[BatchRow]:
    """The batches that hold a number from first to last."""
    found = place.write(lambda store: store.overlapping(stream, first, last, most=10_000_000))
    assert found is not None
    return found


def send(place: Place, batch: Batch, *, at_ms: int = AT_MS) -> Verdict:
    """Take a batch of the device in a transaction of its own."""
    return place.write(lambda store: take(store, PI, batch, at_ms=at_ms))


# The store


def test_what_is_written_is_there_after_the_commit(place: Place) -> None:
    received = Received(
        here=((1, 5), (9, 12)),
        lost=(Lost(6, 7, "evicted"), Lost(8, 8, "damaged")),
        folded={"evicted": 2**40, "expired": 1},
        records=9,
        duplicates=2,
        conflicts=1,
        first_received_ms=AT_MS,
        last_received_ms=AT_MS + 1,
    )

    def work(store: Store) -> None:
        assert store.read([STREAM]) == {}
        store.write({STREAM: received})

    place.write(work)
    again = Received(here=((1, 12),), records=12, first_received_ms=AT_MS, last_received_ms=AT_MS + 2)
    assert known(place) == received
    place.write(lambda store: store.write({STREAM: again}))
    assert known(place) == again


def test_a_transaction_that_fails_leaves_nothing(place: Place) -> None:
    def work(store: Store) -> None:
        store.insert([row(1, 5)], at_ms=AT_MS)
        store.write({STREAM: Received(here=((1, 5),), records=5)})
        store.count(PI, {("digits", "1.0.0"): Tally(1, 0, 0, sketch_of([5]))}, minute=MINUTE)
        store.note(Note(PI, "telemetry.conflict", {"first": 1}), at_ms=AT_MS)
        assert store.read([STREAM])[STREAM].records == 5
        assert [found.first for found in store.overlapping(STREAM, 1, 5, most=100) or ()] == [1]
        assert store.holds(STREAM, 1, 5, f"{1:064x}")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        place.write(work)
    assert known(place) == Received()
    assert overlapping(place, 1, 5) == []
    assert (place.notes(), place.figures(PI, MINUTE)) == ([], {})


def test_streams_are_apart(place: Place) -> None:
    others = [Stream(OTHER, EPOCH, RecordClass.READING), Stream(PI, "f" * 16, RecordClass.READING),
              Stream(PI, EPOCH, RecordClass.EVENT)]  # fmt: skip

    def work(store: Store) -> None:
        for number, stream in enumerate([STREAM, *others], start=1):
            store.insert([row(number, number, stream=stream)], at_ms=AT_MS)
            store.write({stream: Received(here=((number, number),), records=1)})

    place.write(work)
    for number, stream in enumerate([STREAM, *others], start=1):
        assert known(place, stream).here == ((number, number),)
        assert [found.first for found in overlapping(place, 1, 9, stream=stream)] == [number]
    assert place.write(lambda store: store.epochs(PI)) == {EPOCH, "f" * 16}
    assert place.write(lambda store: store.epochs(DeviceId("nobody"))) == frozenset()
    assert set(place.write(lambda store: store.read([STREAM, *others]))) == {STREAM, *others}


def test_overlapping_finds_batches_by_any_of_their_numbers(place: Place) -> None:
    rows = [row(1, 500), row(501, 600), row(600, 2500), row(2501, 2501)]
    place.write(lambda store: store.insert(rows, at_ms=AT_MS))

    def found(first: int, last: int) -> set[int]:
        return {each.first for each in overlapping(place, first, last)}

    assert found(500, 500) == {1}
    assert found(500, 501) == {1, 501}
    assert found(600, 600) == {501, 600}
    assert found(2500, 2502) == {600, 2501}
    assert found(2502, 9000) == set()
    assert overlapping(place, 501, 501) == [rows[1]]


def test_a_claim_is_found_by_all_that_it_says(place: Place) -> None:
    place.write(lambda store: store.insert([row(1, 5), row(1, 7), row(1, 5)], at_ms=AT_MS))

    def holds(first: int, last: int, digest: int = 1, stream: Stream = STREAM) -> bool:
        return place.write(lambda store: store.holds(stream, first, last, f"{digest:064x}"))

    assert holds(1, 5)
    assert holds(1, 7)
    others = (holds(1, 6), holds(2, 5), holds(1, 5, 2), holds(1, 5, stream=Stream(OTHER, EPOCH, RecordClass.READING)))
    assert others == (False,) * 4


def test_more_than_may_be_compared_is_not_read(place: Place) -> None:
    place.write(lambda store: store.insert([row(1, 5, columns=b"x" * 60), row(6, 9, columns=b"x" * 40)], at_ms=AT_MS))
    assert len(place.write(lambda store: store.overlapping(STREAM, 5, 6, most=100)) or ()) == 2
    assert place.write(lambda store: store.overlapping(STREAM, 5, 6, most=99)) is None
    assert len(place.write(lambda store: store.overlapping(STREAM, 6, 6, most=99)) or ()) == 1


def test_figures_add_up(place: Place) -> None:
    one = {("digits", "1.0.0"): Tally(3, 1, 0, sketch_of([100, 200]))}
    two = {("digits", "1.0.0"): Tally(1, 0, 2, sketch_of([200])), ("digits", "1.1.0"): Tally(0, 1, 0, sketch_of([]))}
    place.write(lambda store: store.count(PI, one, minute=MINUTE))
    place.write(lambda store: store.count(PI, two, minute=MINUTE))
    place.write(lambda store: store.count(OTHER, one, minute=MINUTE + 1))
    assert place.figures(PI, MINUTE) == {
        ("digits", "1.0.0"): Tally(4, 1, 2, sketch_of([100, 200, 200])),
        ("digits", "1.1.0"): Tally(0, 1, 0, sketch_of([])),
    }
    assert place.figures(OTHER, MINUTE + 1) == one
    assert place.figures(OTHER, MINUTE) == {}


def test_a_minute_of_a_device_has_a_bounded_number_of_pairs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device can invent versions; those that came first go on being counted, and other devices are not touched."""
    monkeypatch.setattr("cloud_hub.telemetry.figures.MAX_PAIRS", 3)

    def count(*versions: str, device: DeviceId = PI, minute: int = MINUTE) -> None:
        tallies = {("digits", version): Tally(1, 0, 0, sketch_of([])) for version in versions}
        place.write(lambda store: store.count(device, tallies, minute=minute))

    count("1.0.0", "2.0.0")
    count("3.0.0", "1.0.0", "4.0.0", "5.0.0")
    count("6.0.0", "3.0.0")
    count("7.0.0")
    count("7.0.0", device=OTHER)
    count("7.0.0", minute=MINUTE + 1)
    counted = {version: tally.answered for (_, version), tally in place.figures(PI, MINUTE).items()}
    assert counted == {"1.0.0": 2, "2.0.0": 1, "3.0.0": 2}
    assert len(place.figures(OTHER, MINUTE)) == len(place.figures(PI, MINUTE + 1)) == 1


# Taking


def test_a_batch_is_stored_once_however_often_it_comes(place: Place) -> None:
    verdicts = [send(place, batch_of(readings(1, 2, 3)), at_ms=AT_MS + n) for n in range(3)]
    assert [verdict.status for verdict in verdicts] == ["stored", "duplicate", "duplicate"]
    assert verdicts[0].batch == batch_of(readings(1, 2, 3)).batch
    assert stored(place) == readings(1, 2, 3)
    assert known(place) == Received(
        here=((1, 3),), records=3, duplicates=6, first_received_ms=AT_MS, last_received_ms=AT_MS + 2
    )


def test_a_group_with_the_same_batch_twice_counts_it_once(place: Place) -> None:
    opened = [open_batch(PI, batch_of(readings(*numbers))) for numbers in ((4, 5), (1, 2, 3), (4, 5), (5, 6))]
    taken = place.write(lambda store: take_all(store, opened, at_ms=AT_MS))
    assert [one.status for one in taken] == ["stored", "stored", "duplicate", "stored"]
    assert taken[3] == Taken("stored", fresh=1, duplicates=1)
    assert stored(place) == readings(1, 2, 3, 4, 5, 6)
    assert known(place).here == ((1, 6),)


def test_other_boundaries_add_only_what_is_new(place: Place) -> None:
    for numbers in ((1, 2, 3), (2, 3, 4), (1, 2, 3, 4), (4, 5, 6, 7, 8)):
        send(place, batch_of(readings(*numbers)))
    assert stored(place) == readings(*range(1, 9))
    again = send(place, batch_of(readings(4, 5, 6, 7, 8)))
    assert again.status == "duplicate"
    assert known(place).records == 8


def test_a_reading_that_is_no_number_is_still_the_same_reading(place: Place) -> None:
    odd = [Record(seq=seq, at_ms=5, body=Reading(name="t", value=float("nan"))) for seq in (1, 2)]
    assert send(place, batch_of(odd)).status == "stored"
    assert send(place, batch_of(odd[:1])).status == "duplicate"


def test_other_content_under_a_known_number_is_refused_whole_and_told_once(place: Place) -> None:
    send(place, batch_of(readings(1, 2)))
    forged = [Record(seq=seq, at_ms=9, body=Reading(name="other", value=0.0)) for seq in (2, 3)]
    for _ in range(2):
        verdict = send(place, batch_of(forged))
        assert (verdict.status, verdict.code) == ("refused", "telemetry.conflict")
    assert stored(place) == readings(1, 2)
    assert known(place).conflicts == 2
    assert place.notes() == [("pi-1", "telemetry.conflict")]


def test_a_gap_declares_lost_what_is_not_here(place: Place) -> None:
    send(place, batch_of(readings(1, 2, 5)))
    gap = gap_of(2, 9, records=6)
    assert send(place, gap).status == "stored"
    assert send(place, gap).status == "duplicate"
    assert known(place).lost == (Lost(3, 4, "evicted"), Lost(6, 9, "evicted"))
    more = gap_of(8, 12, reason="expired", records=5)
    assert send(place, more).status == "stored"
    assert known(place).lost == (Lost(3, 4, "evicted"), Lost(6, 9, "evicted"), Lost(10, 12, "expired"))
    assert known(place).settled == ((1, 12),)
    assert stored(place) == readings(1, 2, 5)


def test_a_record_that_was_declared_lost_and_comes_is_stored_once(place: Place) -> None:
    send(place, gap_of(1, 9, records=9))
    statuses = [send(place, batch_of(readings(4, 5))).status for _ in range(2)]
    assert statuses == ["stored", "duplicate"]
    assert stored(place) == readings(4, 5)
    assert known(place).lost == (Lost(1, 3, "evicted"), Lost(6, 9, "evicted"))
    assert known(place).here == ((4, 5),)
    # The gap again changes nothing: what is here is not lost.
    assert send(place, gap_of(1, 9, records=9)).status == "duplicate"


def test_a_store_that_was_lost_is_told_once(place: Place) -> None:
    for epoch in ("a" * 16, "a" * 16, "b" * 16, "b" * 16):
        send(place, batch_of(readings(1), epoch=epoch))
    event = [Record(seq=1, at_ms=1, body=Outcome(request="r"))]
    send(place, batch_of(event, epoch="b" * 16))
    assert place.notes() == [("pi-1", "telemetry.new_epoch")]


def test_results_and_outcomes_are_counted_with_the_records_that_were_new(place: Place) -> None:
    def result(seq: int) -> Record:
        body = Result(request=f"r{seq}", model="digits", version="1.0.0", variant="int8", rung="full", took_us=100)
        return Record(seq=seq, at_ms=1, body=body)

    def outcome(seq: int, *, correct: bool | None) -> Record:
        return Record(seq=seq, at_ms=1, body=Outcome(request="r", model="digits", version="1.0.0", correct=correct))

    results = [result(seq) for seq in range(1, 6)]
    outcomes = [outcome(1, correct=True), outcome(2, correct=False), outcome(3, correct=None)]
    for batch in (batch_of(results[:3]), batch_of(results[1:]), batch_of(results), batch_of(outcomes)):
        send(place, batch)
    assert place.figures(PI, MINUTE) == {("digits", "1.0.0"): Tally(5, 1, 1, sketch_of([100] * 5))}


def test_a_stream_that_falls_into_pieces_is_refused_before_it_grows_without_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_hub.telemetry.taking.MAX_RANGES", 2)
    verdicts = [send(place, batch_of(readings(seq))) for seq in (1, 3, 5, 2)]
    assert [verdict.code for verdict in verdicts] == ["", "", "telemetry.scattered", ""]
    assert stored(place) == readings(1, 2, 3)


def test_losses_without_end_are_folded_and_an_honest_device_is_never_refused(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two records come, two are lost, for ever; of the oldest losses the hub keeps only how many there were."""
    monkeypatch.setattr("cloud_hub.telemetry.taking.MAX_RANGES", 6)
    reasons: tuple[Literal["evicted", "expired"], ...] = ("evicted", "expired")
    for n in range(20):
        assert send(place, batch_of(readings(4 * n + 1, 4 * n + 2))).status == "stored"
        gap = gap_of(4 * n + 3, 4 * n + 4, records=2, reason=reasons[n % 2])
        assert [send(place, gap).status for _ in range(2)] == ["stored", "duplicate"]
    now = known(place)
    assert len(now.here) + len(now.lost) <= 6
    assert (now.settled, now.records) == (((1, 80),), 40)
    kept = Counter({one.reason: 2 for one in now.lost[:1]})
    for one in now.lost[1:]:
        kept[one.reason] += 2
    assert kept + Counter(now.folded) == {"evicted": 20, "expired": 20}
    # What is folded counts as here: the gap again, the records again, and one that was lost and comes all the same.
    assert send(place, gap_of(3, 4, records=2)).status == "duplicate"
    assert send(place, batch_of(readings(1, 2))).status == "duplicate"
    assert send(place, batch_of(readings(2, 3, 4, 5))).status == "duplicate"
    assert send(place, batch_of([Record(seq=2, at_ms=1, body=Reading(name="t", value=0.5))])).code == CONFLICT
    assert known(place).records == 40


def test_a_batch_over_too_much_is_refused_unread(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    send(place, batch_of(readings(1, 3, 5)))
    send(place, batch_of(readings(2, 4)))
    monkeypatch.setattr("cloud_hub.telemetry.taking.MAX_OVERLAP_BYTES", 10)
    assert send(place, batch_of(readings(5, 6))).code == "telemetry.overlap"
    assert send(place, batch_of(readings(1, 3, 5))).status == "duplicate"
    assert known(place).here == ((1, 5),)


def test_a_gap_over_all_numbers_is_taken(place: Place) -> None:
    send(place, batch_of(readings(5)))
    gap = gap_of(1, 2**40, records=1)
    assert [send(place, gap).status for _ in range(2)] == ["stored", "duplicate"]
    assert known(place).lost == (Lost(1, 4, "evicted"), Lost(6, 2**40, "evicted"))


def test_what_grows_when_it_is_written_again_is_refused_and_spoils_no_other(place: Place) -> None:
    """A batch names long texts once each; of the part of it that is new each record has its own."""
    texts = [letter * 60_000 for letter in "abc"]
    places = [0, 0, 1, 2, 0]
    document = {"seq": [1, 5], "at": [5, 0, 0, 0, 0], "name": {"d": texts, "i": bytes(places)}, "value": [0.0] * 5}
    columns = msgspec.msgpack.encode({"v": 2, "reading": document})
    claim = BatchId(
        epoch=EPOCH, klass=int(RecordClass.READING), first=1, last=5, digest=digest_of(columns=columns, gap=None)
    )
    send(place, batch_of([Record(seq=1, at_ms=5, body=Reading(name=texts[0], value=0.0))]))
    opened = [open_batch(PI, Batch(batch=claim, columns=columns)), open_batch(OTHER, batch_of(readings(1)))]
    taken = place.write(lambda store: take_all(store, opened, at_ms=AT_MS))
    assert taken == [Taken("refused", code="telemetry.too_large"), Taken("stored", fresh=1)]


def test_epochs_without_end_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud_hub.telemetry.taking.MAX_EPOCHS", 2)
    verdicts = [send(place, batch_of(readings(1), epoch=epoch * 16)) for epoch in "abca"]
    assert [verdict.code for verdict in verdicts] == ["", "", "telemetry.epochs", ""]
