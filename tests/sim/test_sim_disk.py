"""The simulated disk keeps what was synced, some of what was not, and errs when it is told to."""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random

import pytest

from tests.sim.disk import SECTOR_BYTES, PowerLost, ProcessKilled, SimDisk, Strike, Tearing


def fresh(seed: int = 1, *, tearing: Tearing = Tearing.PREFIX, capacity: int = 1 << 20) -> SimDisk:
    """A disk with one synced file `a` of 2 KiB."""
    disk = SimDisk(random=Random(seed), tearing=tearing, capacity=capacity)
    disk.create("a", 2048, zeroed=True)
    disk.sync("a")
    disk.sync_names()
    return disk


def lives(count: int, act: Callable[[SimDisk], None], *, tearing: Tearing = Tearing.PREFIX) -> list[SimDisk]:
    """So many disks that each lost power after the act."""
    disks = []
    for seed in range(count):
        disk = fresh(seed, tearing=tearing)
        act(disk)
        disk.lose_power()
        disks.append(disk)
    return disks


@pytest.mark.parametrize("tearing", Tearing)
def test_what_was_synced_is_there_after_every_cut(tearing: Tearing) -> None:
    def act(disk: SimDisk) -> None:
        disk.write("a", 100, b"kept")
        disk.sync("a")
        disk.write("a", 1024, b"lost" * 100)

    assert all(disk.read("a", 100, 4) == b"kept" for disk in lives(50, act, tearing=tearing))


def test_of_what_was_not_synced_a_prefix_stays_torn_at_any_byte() -> None:
    def act(disk: SimDisk) -> None:
        disk.write("a", 0, b"1" * 100)
        disk.write("a", 500, b"2" * 100)

    seen = set()
    for disk in lives(200, act):
        first, second = disk.read("a", 0, 100).rstrip(b"\0"), disk.read("a", 500, 100).rstrip(b"\0")
        assert first == b"1" * len(first)
        assert second == b"2" * len(second)
        assert not second or len(first) == 100, "the second write never overtakes the first"
        seen.add((len(first), len(second)))
    assert (0, 0) in seen
    assert (100, 100) in seen
    assert any(0 < first < 100 for first, _ in seen)


def test_a_disk_that_writes_in_no_order_keeps_any_sectors() -> None:
    def act(disk: SimDisk) -> None:
        disk.write("a", 0, b"x" * 2048)

    kept = {
        tuple(disk.read("a", at, 1) == b"x" for at in range(0, 2048, SECTOR_BYTES))
        for disk in lives(200, act, tearing=Tearing.SECTORS)
    }
    assert len(kept) == 16, "each of four sectors is kept or not, independently"


def test_a_killed_process_loses_nothing_that_was_written() -> None:
    disk = fresh()
    disk.write("a", 0, b"here")
    disk.arm(Strike.KILL, calls_ahead=1)
    with pytest.raises(ProcessKilled):
        disk.sync("a")
    assert disk.read("a", 0, 4) == b"here"


def test_names_that_were_not_synced_are_kept_in_their_order() -> None:
    def act(disk: SimDisk) -> None:
        disk.create("b", 10, zeroed=True)
        disk.rename("a", "c")
        disk.remove("b")

    seen = {tuple(disk.names()) for disk in lives(100, act)}
    assert seen == {("a",), ("a", "b"), ("b", "c"), ("c",)}


def test_a_new_file_whose_content_was_not_synced_may_be_short() -> None:
    def act(disk: SimDisk) -> None:
        disk.create("b", 1000, zeroed=True)
        disk.sync_names()

    lengths = {len(disk.read("b", 0, 1000)) for disk in lives(100, act)}
    assert min(lengths) < 1000
    assert max(lengths) == 1000


def test_the_power_goes_inside_the_call_that_was_armed() -> None:
    disk = fresh()
    disk.arm(Strike.POWER, calls_ahead=2)
    disk.write("a", 0, b"one")
    with pytest.raises(PowerLost):
        disk.write("a", 3, b"two")
    disk.lose_power()
    disk.write("a", 0, b"and on it goes")


def test_a_failed_sync_forgets_what_waited_and_the_next_one_saves_nothing() -> None:
    lost = 0
    for seed in range(50):
        disk = fresh(seed)
        disk.write("a", 0, b"data")
        disk.arm(Strike.IO, calls_ahead=1)
        with pytest.raises(OSError, match="Input/output") as caught:
            disk.sync("a")
        assert caught.value.errno == errno.EIO
        assert disk.read("a", 0, 4) == b"data"
        disk.sync("a")
        disk.lose_power()
        lost += disk.read("a", 0, 4) != b"data"
    assert 0 < lost < 50


def test_a_failed_write_leaves_a_part() -> None:
    disk = fresh()
    disk.arm(Strike.FULL, calls_ahead=1)
    with pytest.raises(OSError, match="No space") as caught:
        disk.write("a", 0, b"x" * 1000)
    assert caught.value.errno == errno.ENOSPC
    assert 0 < len(disk.read("a", 0, 1000).rstrip(b"\0")) < 1000


def test_a_full_disk_takes_no_new_file_and_still_renames_and_removes() -> None:
    disk = fresh(capacity=4096)
    disk.others = 1500
    with pytest.raises(OSError, match="No space"):
        disk.create("b", 1000, zeroed=False)
    disk.rename("a", "b")
    disk.write("b", 0, b"in place")
    disk.remove("b")
    disk.create("c", 2500, zeroed=False)
    assert disk.used == 2500
    assert disk.most_used == 2500
    assert disk.free_bytes() == 96


def test_bits_rot_in_what_is_on_the_disk_but_not_in_the_last_write() -> None:
    changed = 0
    for seed in range(100):
        disk = fresh(seed)
        disk.write("a", 0, b"old." * 300)
        disk.write("a", 1200, b"new!")
        disk.sync("a")
        changed += disk.rot() is not None
        assert disk.read("a", 1200, 4) == b"new!"
    assert changed > 50


def test_what_it_holds_is_what_a_cut_would_leave() -> None:
    disk = fresh()
    disk.write("a", 0, b"token")
    assert not disk.holds(b"token")
    disk.sync("a")
    assert disk.holds(b"token")
    disk.create("b", 64, zeroed=True)
    disk.write("b", 0, b"other")
    disk.sync("b")
    assert not disk.holds(b"other"), "its name is not on the disk"
    disk.sync_names()
    assert disk.holds(b"other")


def test_a_copied_disk_has_what_was_durable_and_goes_its_own_way() -> None:
    disk, twin = fresh(), SimDisk(random=Random(2))
    disk.write("a", 0, b"unsynced")
    twin.replace_with(disk)
    assert twin.read("a", 0, 8) == bytes(8)
    twin.write("a", 0, b"own")
    assert disk.read("a", 0, 8) == b"unsynced"
    twin.wipe()
    assert twin.names() == []
