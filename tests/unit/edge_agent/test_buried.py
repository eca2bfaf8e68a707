"""Dead letters on disks that fail and fill up: they come onto the disk, or make room, and never block anything."""

from __future__ import annotations

import errno
import itertools
import logging

import msgspec
import pytest

from edge_agent.adapters.buried import Buried, BuriedBatch
from edge_agent.adapters.journal import Journal
from edge_agent.adapters.records import RecordStore, encode_record
from edge_agent.core.journal import Moment, bounds_for
from shared.errors import StorageError, StorageFull
from shared.limits import MIB
from shared.telemetry import BatchId, Reading, RecordClass
from shared.wire.messages import Batch
from tests.fakes.fault_disks import Calls, FailingDisk
from tests.fakes.memory_disk import MemoryDisk

READING = RecordClass.READING
NOW = Moment(boot="b", uptime_ms=1, wall_ms=0, synchronised=False)


def batch(number: int, size: int = 100) -> Batch:
    claim = BatchId(epoch="0123456789abcdef", klass=3, first=number, last=number, digest=f"{number}")
    return Batch(batch=claim, columns=bytes(size))


def kept(disk: MemoryDisk) -> list[int]:
    """First numbers of what lies there, oldest first; each is whole."""
    letters = [msgspec.msgpack.decode(disk.read(name, 0, MIB), type=BuriedBatch) for name in sorted(disk.names())]
    return [one.batch.first for one in letters]


@pytest.mark.parametrize("is_removed", [True, False], ids=["removed", "left"])
def test_what_failed_at_any_call_goes_at_the_next_try(is_removed: bool) -> None:
    for nth in itertools.count(2):  # the first looks for names
        disk, calls = MemoryDisk(), Calls()
        buried = Buried(FailingDisk(disk, calls), most_bytes=MIB)
        calls.fault = lambda n, kind, nth=nth: (
            OSError(errno.EIO, "input/output error") if n == nth or (kind == "remove" and not is_removed) else None
        )
        try:
            buried.put(batch(1), reason="telemetry.columns")
        except StorageError:
            calls.fault = None
            buried.put(batch(1), reason="telemetry.columns")
            assert buried.count == 1
            if is_removed:
                assert kept(disk) == [1]
        else:
            break
    assert nth > 5


def test_on_a_full_disk_the_oldest_make_room() -> None:
    room = 0
    disk, calls = MemoryDisk(), Calls()
    calls.fault = lambda _, kind: (
        OSError(errno.ENOSPC, "no space left") if kind == "create" and room and len(disk.names()) >= room else None
    )
    buried = Buried(FailingDisk(disk, calls), most_bytes=MIB)
    for number in range(1, 5):
        buried.put(batch(number), reason="r")
    room = 2
    buried.put(batch(5), reason="r")
    assert kept(disk) == [4, 5]
    assert (buried.count, buried.given_up) == (2, 3)


def test_beyond_the_bound_the_oldest_go_and_are_counted() -> None:
    disk = MemoryDisk()
    buried = Buried(disk, most_bytes=1_000)
    for number in range(1, 8):
        buried.put(batch(number, size=200), reason="r")
    assert (buried.count, buried.given_up) == (3, 4)
    assert kept(disk) == [5, 6, 7]


def test_without_any_room_that_is_said_once_all_others_are_gone() -> None:
    disk, calls = MemoryDisk(), Calls()
    buried = Buried(FailingDisk(disk, calls), most_bytes=MIB)
    buried.put(batch(1), reason="r")
    calls.fault = lambda _, kind: OSError(errno.EDQUOT, "quota exceeded") if kind == "create" else None
    with pytest.raises(StorageFull):
        buried.put(batch(2), reason="r")
    assert (kept(disk), buried.given_up) == ([], 1)


def store_with(aside: FailingDisk | MemoryDisk, disk: FailingDisk | MemoryDisk) -> RecordStore:
    journal = Journal.open(disk, bounds_for(MIB), moment=NOW, draw=lambda size: bytes(size))
    store = RecordStore(journal, buried=Buried(aside, most_bytes=MIB))
    for value in range(2):
        store.append(READING, [(0, encode_record(Reading(name="t", value=float(value))))], moment=NOW)
        store.load(READING, after=value, moment=NOW)
    return store


def test_a_refused_batch_without_room_for_its_file_blocks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    calls = Calls(lambda _, kind: OSError(errno.ENOSPC, "no space left") if kind == "create" else None)
    store = store_with(FailingDisk(MemoryDisk(), calls), MemoryDisk())
    refused = store.load(READING, after=0, moment=NOW)
    assert refused is not None
    with caplog.at_level(logging.ERROR):
        assert store.bury(refused.batch, reason="telemetry.columns", moment=NOW)
    assert [record.message for record in caplog.records] == ["refused records are gone, for lack of room"]
    depth = store.depth(NOW)
    assert (depth.buried, depth.lost["refused"], depth.records[READING]) == (0, 1, 1)


def test_when_the_gap_cannot_be_written_the_next_try_makes_no_second_file() -> None:
    aside, disk, calls = MemoryDisk(), MemoryDisk(), Calls()
    store = store_with(aside, FailingDisk(disk, calls))
    refused = store.load(READING, after=0, moment=NOW)
    assert refused is not None
    calls.fault = lambda _, kind: OSError(errno.EIO, "input/output error") if kind == "sync" else None
    with pytest.raises(StorageError):
        store.bury(refused.batch, reason="telemetry.columns", moment=NOW)
    calls.fault = None
    assert store.load(READING, after=0, moment=NOW) == refused
    assert store.bury(refused.batch, reason="telemetry.columns", moment=NOW)
    assert kept(aside) == [1]
    assert store.depth(NOW).lost == {"refused": 1}
