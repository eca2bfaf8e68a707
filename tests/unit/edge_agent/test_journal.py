"""The journal on a disk in memory: room, order of what is written, gaps, time to live, and what is found again."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from msgspec.structs import replace

from edge_agent.adapters.journal import Journal
from edge_agent.core import frames
from edge_agent.core.frames import parse_segment_name
from edge_agent.core.journal import JournalBounds, Moment, bounds_for, store_time, victim
from shared.errors import StorageError, StorageFull
from shared.limits import KIB, MIB
from shared.telemetry import RecordClass
from tests.fakes.memory_disk import MemoryDisk

EVENT, OUTCOME, RESULT, READING = RecordClass
DAY_MS = 86_400_000


@dataclass
class Bench:
    """A journal on a disk in memory, with clocks that the test moves."""

    disk: MemoryDisk = field(default_factory=MemoryDisk)
    bounds: JournalBounds = field(default_factory=lambda: bounds_for(MIB))
    now: Moment = field(default_factory=lambda: Moment("first", 1_000, 1_800_000_000_000, True))
    draws: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.journal = self.open()

    def open(self) -> Journal:
        return Journal.open(
            self.disk, self.bounds, moment=self.now, draw=lambda size: next(self.draws).to_bytes(size, "big")
        )

    def crash(self) -> None:
        self.journal = self.open()

    def pass_ms(self, ms: int, *, wall_ms: int | None = None) -> None:
        self.now = replace(
            self.now, uptime_ms=self.now.uptime_ms + ms, wall_ms=self.now.wall_ms + (ms if wall_ms is None else wall_ms)
        )

    def put(self, klass: RecordClass, *sizes: int) -> int:
        return self.journal.append(klass, [(5, bytes(size)) for size in sizes], moment=self.now)

    def load(self, klass: RecordClass, after: int = 0) -> tuple[int, int, str | None] | None:
        portion = self.journal.load(klass, after=after, moment=self.now)
        return None if portion is None else (portion.first, portion.last, portion.reason)

    def drain(self, klass: RecordClass) -> list[tuple[int, int, str | None]]:
        found = []
        while (portion := self.load(klass)) is not None:
            found.append(portion)
            assert self.journal.settle(klass, *portion[:2])
        return found

    def segments(self, klass: RecordClass) -> list[str]:
        return sorted(name for name in self.disk.files if (s := parse_segment_name(name)) and s.klass == klass)


def test_a_commit_is_one_write_and_one_sync() -> None:
    bench = Bench()
    bench.put(READING, 200)
    bench.disk.calls.clear()
    bench.put(READING, *[200] * 100)
    assert [call[0] for call in bench.disk.calls] == ["write", "sync"]


def test_handing_a_batch_out_costs_no_write_and_ends_it_for_good() -> None:
    bench = Bench()
    bench.put(READING, 10)
    bench.put(READING, 10)
    bench.disk.calls.clear()
    assert bench.load(READING) == (1, 2, None)
    assert all(call[0] == "read" for call in bench.disk.calls)
    bench.put(READING, 10)
    bench.crash()
    assert bench.load(READING) == (1, 2, None)
    assert bench.load(READING, after=2) == (3, 3, None)


def test_the_cursor_is_written_once_in_a_thousand_records_or_a_second() -> None:
    bench = Bench()
    for _ in range(30):
        bench.put(READING, *[10] * 100)
    bench.disk.calls.clear()
    for number in range(30):
        portion = bench.load(READING)
        assert portion is not None
        bench.journal.settle(READING, *portion[:2])
        bench.journal.tick(bench.now)
        assert bench.disk.calls.count(("sync", "cursor")) <= 1 + number // 2
        if bench.load(READING) is None:
            break
    writes = bench.disk.calls.count(("sync", "cursor"))
    assert writes == 3
    bench.put(READING, 10)
    assert bench.drain(READING)
    bench.journal.tick(bench.now)
    assert bench.disk.calls.count(("sync", "cursor")) == writes
    bench.pass_ms(1_000)
    bench.journal.tick(bench.now)
    assert bench.disk.calls.count(("sync", "cursor")) == writes + 1


def test_what_was_settled_before_the_cursor_was_written_is_only_sent_again() -> None:
    bench = Bench()
    bench.put(READING, 10)
    assert bench.drain(READING) == [(1, 1, None)]
    bench.crash()
    assert bench.load(READING) == (1, 1, None)


def test_segments_are_recycled_and_given_back_after_draining() -> None:
    bench = Bench(bounds=bounds_for(16 * MIB))
    for _ in range(40):
        bench.put(READING, *[30_000] * 8)
    grown = len(bench.disk.files)
    bench.drain(READING)
    bench.pass_ms(1_000)
    bench.journal.tick(bench.now)
    assert len(bench.segments(READING)) == 1
    assert sum(map(len, bench.disk.files.values())) <= 4 * MIB < grown * 512 * KIB
    bench.disk.calls.clear()
    for _ in range(6):
        bench.put(READING, *[30_000] * 8)
    assert "create" not in {call[0] for call in bench.disk.calls}


def test_a_recycled_file_does_not_bring_back_its_former_life() -> None:
    bench = Bench()
    while len(bench.segments(READING)) < 4:
        bench.put(READING, *[500] * 20)
    bench.drain(READING)
    bench.pass_ms(1_000)
    bench.journal.tick(bench.now)
    last = max(int(name.split("-")[1], 16) for name in bench.segments(READING))
    while max(int(name.split("-")[1], 16) for name in bench.segments(READING)) == last:
        bench.put(READING, *[500] * 20)
    number = bench.put(READING, 7)
    bench.crash()
    assert bench.put(READING, 7) == number + 1


def test_a_gap_is_durable_before_its_segment_is_written_over() -> None:
    bench = Bench()
    while not bench.journal.depth(bench.now).lost:
        bench.disk.calls.clear()
        bench.put(READING, 30_000)
    done = [call[0] + ":" + call[1].split("-")[0] for call in bench.disk.calls if call[0] in {"sync", "rename"}]
    assert done.index("sync:cursor") < done.index("rename:3")
    bench.crash()
    gap = bench.load(READING)
    assert gap is not None
    assert gap[2] == "evicted"


def test_events_take_the_reserve_at_the_end_and_then_push_back() -> None:
    bench = Bench(disk=MemoryDisk(size=400 * KIB))
    for _ in range(2):
        bench.put(EVENT, 30_000)
    stored = 2
    with contextlib.suppress(StorageFull):
        while True:
            stored = bench.put(EVENT, 30_000)
    assert stored < 100
    assert frames.RESERVE_NAME not in bench.disk.files
    assert bench.journal.depth(bench.now).lost == {}
    kept = bench.drain(EVENT)
    assert all(reason is None for _, _, reason in kept)
    bench.pass_ms(1_000)
    bench.journal.tick(bench.now)
    assert bench.put(EVENT, 30_000) == kept[-1][1] + 1
    assert frames.RESERVE_NAME in bench.disk.files


def test_the_minimum_of_free_disk_is_left_free() -> None:
    bench = Bench(disk=MemoryDisk(size=MIB), bounds=replace(bounds_for(MIB), min_free_bytes=512 * KIB))
    for _ in range(60):
        bench.put(READING, 20_000)
        assert bench.disk.free_bytes() >= 512 * KIB
    assert bench.journal.depth(bench.now).lost["evicted"] > 0


@pytest.mark.parametrize(
    ("newcomer", "held", "loser"),
    [
        (READING, (1, 1, 1, 1), READING),
        (READING, (1, 1, 1, 0), None),
        (OUTCOME, (1, 1, 1, 0), RESULT),
        (OUTCOME, (1, 1, 0, 0), OUTCOME),
        (EVENT, (1, 0, 0, 1), READING),
        (EVENT, (9, 0, 0, 0), None),
    ],
)
def test_room_is_taken_from_the_least_precious(
    newcomer: RecordClass, held: tuple[int, ...], loser: RecordClass | None
) -> None:
    assert victim(dict(zip(RecordClass, held, strict=True)), newcomer) is loser


# Errors of the disk


class Flaky(MemoryDisk):
    """Fails calls of one kind on segments, as often as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.failing: dict[str, int] = {}

    def write(self, name: str, offset: int, data: bytes) -> None:
        """As told."""
        self._fail("write", name)
        super().write(name, offset, data)

    def sync(self, name: str) -> None:
        """As told; what was written is there all the same."""
        self._fail("sync", name)
        super().sync(name)

    def remove(self, name: str) -> None:
        """As told."""
        self._fail("remove", name)
        super().remove(name)

    def sync_names(self) -> None:
        """As told; the names are there all the same."""
        self._fail("sync_names", ".seg")
        super().sync_names()

    def _fail(self, kind: str, name: str) -> None:
        if name.endswith(".seg") and self.failing.get(kind, 0):
            self.failing[kind] -= 1
            raise OSError(errno.EIO, "failed", name)


def test_a_file_whose_sync_failed_is_left_and_what_was_not_durable_is_written_anew() -> None:
    disk = Flaky()
    bench = Bench(disk=disk)
    assert bench.put(READING, 100, 100) == 1
    disk.failing["sync"] = 1
    assert bench.put(READING, 50, 50) == 3
    assert len(bench.segments(READING)) == 2
    bench.crash()
    assert bench.drain(READING) == [(1, 2, None), (3, 4, None)]


def test_a_disk_that_fails_twice_is_told_and_no_number_is_used() -> None:
    disk = Flaky()
    bench = Bench(disk=disk)
    assert bench.put(READING, 100) == 1
    for _ in range(5):
        disk.failing["write"] = 2
        with pytest.raises(StorageError):
            bench.put(READING, 100)
    assert len(bench.disk.files) < 8
    assert bench.put(READING, 100) == 2
    bench.crash()
    assert [portion[:2] for portion in bench.drain(READING)] == [(1, 1), (2, 2)]


def test_a_file_that_failed_and_stays_leads_nobody_to_write_over_the_one_before() -> None:
    disk = Flaky()
    bench = Bench(disk=disk)
    bench.put(READING, 30_000)
    (name,) = bench.segments(READING)
    before = bytes(disk.files[name])
    disk.failing |= {"sync": 1, "remove": 1}
    with pytest.raises(StorageError):
        bench.put(READING, *[30_000] * 2)
    assert bench.put(READING, 10) == 2
    assert bytes(disk.files[name]) == before
    bench.crash()
    assert [portion[1:] for portion in bench.drain(READING)] == [(1, None), (2, None)]


def test_numbers_do_not_go_on_in_the_file_before_a_new_one_that_may_have_its_name() -> None:
    disk = Flaky()
    bench = Bench(disk=disk)
    bench.put(READING, 30_000)
    disk.failing["sync_names"] = 1
    with pytest.raises(StorageError):
        bench.put(READING, *[30_000] * 2)
    assert bench.put(READING, 10) == 2
    assert bench.put(READING, *[30_000] * 2) == 3
    bench.crash()
    assert [portion[2] for portion in bench.drain(READING)] == [None] * 3


def test_what_failed_is_not_found_later_as_a_part_of_a_batch_that_was_handed_out() -> None:
    disk = Flaky()
    bench = Bench(disk=disk)
    bench.put(READING, 100)
    disk.failing |= {"sync": 1, "sync_names": 1}
    with pytest.raises(StorageError):
        bench.put(READING, 100)
    disk.failing["sync_names"] = 1
    with pytest.raises(StorageError):
        bench.load(READING)
    assert bench.load(READING) == (1, 1, None)
    bench.crash()
    assert bench.load(READING) == (1, 1, None)


# Damage


def test_damage_in_the_middle_is_a_gap_and_the_rest_comes() -> None:
    bench = Bench()
    for number in range(5):
        bench.put(READING, *[100] * 10)
        assert bench.load(READING, after=number * 10) is not None
    (name,) = bench.segments(READING)
    size = frames.frame_bytes(10, 1_000)
    bench.disk.files[name][2 * size + 40] ^= 1
    bench.crash()
    portions = bench.drain(READING)
    assert portions == [(1, 10, None), (11, 20, None), (21, 30, "damaged"), (31, 40, None), (41, 50, None)]
    assert bench.journal.depth(bench.now).lost == {"damaged": 10}


def test_a_segment_that_vanished_is_a_gap() -> None:
    bench = Bench()
    while len(bench.segments(READING)) < 3:
        bench.put(READING, 30_000)
    del bench.disk.files[bench.segments(READING)[0]]
    bench.crash()
    lost = bench.journal.depth(bench.now).lost
    bench.crash()
    portions = bench.drain(READING)
    assert portions[0][2] == "damaged"
    assert bench.journal.depth(bench.now).lost == lost == {"damaged": portions[0][1]}
    assert [portion[2] for portion in portions[1:]] == [None] * (len(portions) - 1)


def test_without_any_cursor_everything_is_sent_again_under_the_same_epoch() -> None:
    bench = Bench()
    epoch = bench.journal.epoch
    bench.put(READING, 10)
    bench.drain(READING)
    bench.pass_ms(1_000)
    bench.journal.tick(bench.now)
    bench.disk.files["cursor"][:] = bytes(len(bench.disk.files["cursor"]))
    bench.crash()
    assert bench.journal.epoch == epoch
    assert bench.drain(READING) == [(1, 1, None)]
    assert bench.put(READING, 10) == 2


@pytest.mark.parametrize("place", [0, 1])
def test_numbers_go_on_though_the_last_file_was_taken_and_a_cursor_slot_is_damaged(place: int) -> None:
    bench = Bench()
    bench.put(READING, 10, 10)
    bench.disk.size = sum(map(len, bench.disk.files.values()))
    while bench.segments(READING):
        bench.put(EVENT, 30_000)
    bench.disk.size *= 2
    bench.disk.files["cursor"][place * frames.SLOT_BYTES + 10] ^= 1
    bench.crash()
    assert bench.put(READING, 10) == 3


def test_a_torn_tail_is_written_over() -> None:
    bench = Bench()
    bench.put(READING, 100)
    (name,) = bench.segments(READING)
    good = bytes(bench.disk.files[name])
    bench.put(READING, 100)
    torn = bytearray(bench.disk.files[name])
    torn[150:] = good[150:]
    bench.disk.files[name][:] = torn
    bench.disk.files["cursor"][:] = bytes(len(bench.disk.files["cursor"]))
    bench.crash()
    assert bench.put(READING, 70) == 2
    assert bench.drain(READING) == [(1, 1, None), (2, 2, None)]


# Other sizes


def test_a_store_of_other_sizes_is_read_to_the_end_and_its_files_are_not_reused() -> None:
    bench = Bench(bounds=bounds_for(16 * MIB))
    for _ in range(10):
        bench.put(READING, *[30_000] * 8)
    bench.bounds = bounds_for(2 * MIB)
    bench.crash()
    for _ in range(3):
        bench.put(READING, 30_000)
    found = bench.drain(READING)
    assert found[-1][1] == 83
    assert [reason for _, _, reason in found if reason] == []
    bench.pass_ms(1_000)
    bench.journal.tick(bench.now)
    assert {len(file) for name, file in bench.disk.files.items() if name.endswith(".seg")} == {128 * KIB}


# Time to live


def aged(bench: Bench) -> str | None:
    found = bench.load(READING)
    assert found is not None
    return found[2]


def ttl_bench() -> Bench:
    return Bench(bounds=replace(bounds_for(MIB), ttl_ms={READING: DAY_MS}))


def test_records_expire_by_the_time_that_the_machine_was_up() -> None:
    bench = ttl_bench()
    bench.put(READING, 10)
    bench.put(EVENT, 10)
    bench.pass_ms(DAY_MS - 1)
    assert aged(bench) is None
    bench.pass_ms(1)
    assert aged(bench) == "expired"
    assert bench.load(EVENT) == (1, 1, None)


@pytest.mark.parametrize("jump_ms", [-3_600_000, 3 * DAY_MS, -50 * 365 * DAY_MS])
def test_a_wall_clock_that_jumps_moves_nothing(jump_ms: int) -> None:
    bench = ttl_bench()
    bench.put(READING, 10)
    bench.pass_ms(1_000, wall_ms=jump_ms)
    bench.crash()
    assert aged(bench) is None
    bench.pass_ms(DAY_MS - 1_001, wall_ms=-jump_ms)
    assert aged(bench) is None
    bench.pass_ms(1, wall_ms=0)
    assert aged(bench) == "expired"


def test_time_without_power_counts_where_both_clocks_were_synchronised() -> None:
    bench = ttl_bench()
    bench.put(READING, 10)
    bench.now = Moment("second", 10, bench.now.wall_ms + 2 * DAY_MS, True)
    bench.crash()
    assert aged(bench) == "expired"


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (False, False)])
def test_time_without_power_does_not_count_where_a_clock_may_be_wrong(before: bool, after: bool) -> None:
    bench = Bench(bounds=replace(bounds_for(MIB), ttl_ms={READING: DAY_MS}), now=Moment("first", 1_000, 10**12, before))
    bench.put(READING, 10)
    bench.now = Moment("second", 10, 10**12 + 900 * DAY_MS, after)
    bench.crash()
    assert aged(bench) is None
    bench.pass_ms(DAY_MS)
    assert aged(bench) == "expired"


def test_whole_segments_expire_by_the_clock_without_being_asked_for() -> None:
    bench = ttl_bench()
    while len(bench.segments(READING)) < 4:
        bench.put(READING, 30_000)
    bench.pass_ms(DAY_MS + 1)
    bench.journal.tick(bench.now)
    assert len(bench.segments(READING)) == 1
    assert set(bench.journal.depth(bench.now).lost) == {"expired"}


def test_the_stores_clock_never_goes_back() -> None:
    bench = Bench()
    bench.put(READING, 10)
    found = frames.newest_slot(bytes(bench.disk.files["cursor"]))
    assert found is not None
    cursor = found[1]
    for now in (
        Moment("second", 0, 0, True),
        Moment("second", 0, 0, False),
        Moment("first", 0, 0, False),
        Moment("second", 5, 2**50, True),
    ):
        assert store_time(cursor, newest_ms=7, now=now) >= max(cursor.store_ms, 7)
