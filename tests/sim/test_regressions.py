"""What the simulator has found: each as a script of its own, so that it stays found when the seeds' meaning changes."""

from __future__ import annotations

import contextlib
from random import Random

import pytest

from edge_agent.adapters.journal import Journal
from edge_agent.core.frames import CURSOR_NAME, Cursor, encode_slot, newest_slot
from edge_agent.core.journal import JournalBounds, Moment, store_time
from edge_agent.core.standing import Standing
from shared.errors import StorageError, StorageFull
from shared.limits import KIB
from shared.telemetry import RecordClass
from tests.sim.disk import ProcessKilled, SimDisk, Strike

NOW = Moment("boot", 1_000, 1_760_000_000_000, False)
READING, EVENT = RecordClass.READING, RecordClass.EVENT


def bounds(segments: int) -> JournalBounds:
    """A small journal, of files of 1 KiB."""
    return JournalBounds(
        total_bytes=segments * KIB + 16 * KIB, segment_bytes=KIB, batch_bytes=512, batch_records=8, spares=0
    )


def opened(disk: SimDisk, *, segments: int = 12) -> Journal:
    """The journal on this disk."""
    return Journal.open(disk, bounds(segments), moment=NOW, draw=Random(1).randbytes)


def killed(disk: SimDisk, *, calls_ahead: int) -> None:
    """Let an agent open the journal and put records until it is killed in this call."""
    disk.arm(Strike.KILL, calls_ahead=calls_ahead)
    with pytest.raises(ProcessKilled):
        fill(opened(disk), READING, b"x" * 100)


def fill(journal: Journal, klass: RecordClass, data: bytes) -> None:
    """Put records until something is raised."""
    while True:
        journal.append(klass, [(1, data)], moment=NOW)


@pytest.mark.parametrize("calls_ahead", range(1, 40))
def test_what_a_killed_process_had_written_is_on_the_disk_before_it_is_handed_out(calls_ahead: int) -> None:
    # Found as `undurable` in "crashes": sent, then taken back by a power cut, and the number was given again.
    for seed in range(4):
        disk = SimDisk(random=Random(seed))
        killed(disk, calls_ahead=calls_ahead)
        handed = numbers(opened(disk))
        disk.lose_power()
        assert numbers(opened(disk)) == handed


@pytest.mark.parametrize("calls_ahead", range(1, 40))
def test_the_names_that_a_killed_process_gave_are_on_the_disk_before_more_is_promised(calls_ahead: int) -> None:
    # Found as `undurable` in "line": records were durable in a file whose name was not.
    for seed in range(4):
        disk = SimDisk(random=Random(seed))
        killed(disk, calls_ahead=calls_ahead)
        number = opened(disk).append(READING, [(2, b"promised")], moment=NOW)
        disk.lose_power()
        assert number in numbers(opened(disk))


@pytest.mark.parametrize("calls_ahead", range(1, 40))
def test_what_a_failed_sync_left_in_memory_is_on_the_disk_before_it_is_handed_out(calls_ahead: int) -> None:
    # Found as `undurable` in "fullness": the next process found the records, and syncing them saved nothing.
    for seed in range(4):
        disk = SimDisk(random=Random(seed), capacity=17 * KIB + 100)
        disk.arm(Strike.IO, calls_ahead=calls_ahead)
        with contextlib.suppress(StorageError):
            journal = opened(disk)
            while True:
                journal.append(EVENT, [(1, b"x" * 100)], moment=NOW)
        disk.disarm()
        handed = numbers(opened(disk), EVENT)
        disk.lose_power()
        assert numbers(opened(disk), EVENT) == handed


@pytest.mark.parametrize("calls_ahead", range(1, 30))
def test_a_cursor_that_is_not_on_the_disk_gives_no_segment_back(calls_ahead: int) -> None:
    # Found as `spoiled` in "mixed": opening removed what a cursor in memory called settled; the power took that cursor.
    for seed in range(4):
        disk = SimDisk(random=Random(seed))
        journal = opened(disk)
        for _ in range(5):
            number = journal.append(READING, [(1, b"x" * 400)], moment=NOW)
            assert journal.load(READING, after=number - 1, moment=NOW) is not None
            journal.settle(READING, number, number)
        disk.arm(Strike.IO, calls_ahead=calls_ahead)
        with contextlib.suppress(StorageError):
            journal.close(NOW)
        for strike in (Strike.FULL, Strike.IO):
            disk.arm(strike, calls_ahead=1 + calls_ahead % 7)
            with contextlib.suppress(StorageError):
                opened(disk)
        disk.lose_power()
        portion = opened(disk).load(READING, after=0, moment=NOW)
        assert portion is None or portion.reason is None


def numbers(journal: Journal, klass: RecordClass = READING) -> list[int]:
    """The numbers of all records that the journal hands out."""
    found: list[int] = []
    after = 0
    while (portion := journal.load(klass, after=after, moment=NOW)) is not None:
        found += range(portion.first, portion.first + len(portion.entries))
        after = portion.last
    return found


def test_a_new_segment_that_finds_no_room_does_not_send_the_next_records_over_older_ones() -> None:
    # Found as `spoiled` in "fullness": events that were durable were overwritten.
    disk = SimDisk(random=Random(1))
    journal = opened(disk, segments=6)
    kept = [journal.append(EVENT, [(1, b"x" * 600)], moment=NOW) for _ in range(2)]
    disk.capacity = disk.used - KIB
    disk.arm(Strike.FULL, calls_ahead=1)
    for _ in range(2):
        with pytest.raises(StorageFull):
            journal.append(EVENT, [(2, b"y" * 600)], moment=NOW)
    for number in kept:
        portion = journal.load(EVENT, after=number - 1, moment=NOW)
        assert portion is not None
        assert portion.reason is None
        assert portion.entries[0][1] == b"x" * 600


@pytest.mark.parametrize("size_kib", [1, 4, 64])
def test_all_files_together_stay_within_the_budget(size_kib: int) -> None:
    # Found as `quota` in "fullness": the cursor was counted as one file of a segment's size.
    size = size_kib * KIB
    small = JournalBounds(total_bytes=6 * size + 16 * KIB, segment_bytes=size, batch_bytes=size // 2, batch_records=8)
    disk = SimDisk(random=Random(1))
    journal = Journal.open(disk, small, moment=NOW, draw=Random(1).randbytes)
    with pytest.raises(StorageFull):
        fill(journal, EVENT, b"x" * (size // 2))
    assert disk.most_used <= small.total_bytes


@pytest.mark.parametrize("calls_ahead", range(1, 60))
def test_files_that_an_error_left_behind_still_count(calls_ahead: int) -> None:
    # Found as `quota` in "fullness": a new file whose name could not be synced belonged to nobody.
    disk = SimDisk(random=Random(1))
    journal = opened(disk, segments=5)
    later = calls_ahead
    for turn in range(60):
        if turn % 8 == 0:
            disk.arm(Strike.IO, calls_ahead=later)
            later = later % 7 + 1
        with contextlib.suppress(StorageError):
            journal.append(RecordClass(turn % 4), [(1, b"x" * 300)], moment=NOW)
        assert disk.most_used <= bounds(5).total_bytes


def test_the_time_since_the_start_counts_for_what_was_written_last_before_it() -> None:
    # Found as `late` in "mixed": it was added to the cursor's time, and the frames behind the cursor got less of it.
    cursor = encode_slot(Cursor(1, 49_000, "boot 1", 49_000, 0, False, KIB, (Standing(0, 1, (), ()),) * 4, {}))
    found = newest_slot(cursor)
    assert found is not None
    now = Moment("boot 2", 24_000, 0, False)
    assert store_time(found[1], newest_ms=56_000, now=now) == 80_000


class UnmadeFiles(SimDisk):
    """Files are as long as what was written to them: their making was interrupted."""

    def create(self, name: str, size: int, *, zeroed: bool) -> None:
        """Make an empty file."""
        super().create(name, size if name == CURSOR_NAME else 0, zeroed=zeroed)


def test_a_file_that_was_not_made_whole_is_read_to_its_new_end() -> None:
    # Found as `spoiled` in "io_errors": cut within the padding of a frame, it was read to where it had ended before.
    for seed in range(300):
        disk = UnmadeFiles(random=Random(seed))
        journal = opened(disk)
        journal.append(READING, [(1, b"x" * 100)], moment=NOW)
        disk.arm(Strike.KILL, calls_ahead=1)
        with pytest.raises(ProcessKilled):
            journal.append(READING, [(1, b"x" * 100)], moment=NOW)
        journal = opened(disk)
        numbers(journal)
        number = journal.append(READING, [(1, b"y" * 100)], moment=NOW)
        portion = journal.load(READING, after=number - 1, moment=NOW)
        assert portion is not None
        assert portion.reason is None
