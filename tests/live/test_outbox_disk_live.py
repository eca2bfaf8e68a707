"""The outbox on real files: a file system that fills up under it, calls that fail, and bytes that rot.

The same on a disk in memory, call by call: tests/unit/edge_agent/test_outbox_faults.py. The small file system is a
tmpfs, which only root may mount.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from edge_agent.adapters.disk import PosixDisk
from edge_agent.adapters.outbox import JournalOutbox
from edge_agent.adapters.system import SystemClock
from edge_agent.core.journal import Moment, bounds_for
from edge_agent.ports import Disk
from shared.errors import StorageFull
from shared.limits import KIB, MIB
from shared.telemetry import RecordClass
from shared.wire.columns import decode_columns
from tests.fakes.fault_disks import Calls, FailingDisk
from tests.fakes.outbox_story import Place, Story, body_of, judge, value_of

pytestmark = pytest.mark.live

EVENT, OUTCOME, RESULT, READING = RecordClass
BOUNDS = bounds_for(16 * MIB)


@pytest.fixture
def small_disk(short_tmp: Path) -> Iterator[Path]:
    """A file system of 6 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = short_tmp / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def moment() -> Moment:
    return Moment("live", 5, 0, False)


async def opened(path: Path) -> JournalOutbox:
    return await JournalOutbox.open(path, bounds=BOUNDS, clock=SystemClock(), moments=moment, flush_ms=5)


class Promises:
    """What was put, what was promised, and how often there was no room."""

    def __init__(self) -> None:
        self.kept: dict[Place, int] = {}
        self.refused = dict.fromkeys(RecordClass, 0)
        self.settled = dict.fromkeys(RecordClass, 0)
        self._value = 0

    async def put(self, outbox: JournalOutbox, klass: RecordClass, *, records: int) -> bool:
        """Put so many records of 10 KB each; False when one is refused."""
        for _ in range(records):
            self._value += 1
            try:
                ticket = outbox.put(body_of(klass, self._value, "x" * 10_000), at_ms=self._value)
                self.kept[int(klass), await ticket.durable()] = self._value
            except StorageFull:
                self.refused[klass] += 1
                return False
        return True

    async def check(self, outbox: JournalOutbox, *classes: RecordClass) -> dict[Place, str]:
        """Drain these classes: everything promised comes, in order, or is in a gap; returns those."""
        found: dict[Place, int] = {}
        gaps: dict[Place, str] = {}
        for klass in classes:
            last = self.settled[klass]
            while (batch := await outbox.load(klass)) is not None:
                assert batch.batch.first == last + 1
                last = batch.batch.last
                if batch.gap is not None:
                    gaps |= dict.fromkeys(
                        ((int(klass), n) for n in range(batch.batch.first, last + 1)), batch.gap.reason
                    )
                for record in decode_columns(batch.columns) if batch.columns else ():
                    found[int(klass), record.seq] = value_of(record.body)
                assert await outbox.settle(batch.batch)
            self.settled[klass] = last
        promised = {place: self.kept.pop(place) for place in list(self.kept) if place[0] in classes}
        assert found == {place: value for place, value in promised.items() if place not in gaps}
        assert not any(klass == EVENT for klass, _ in gaps)
        assert set(gaps.values()) <= {"evicted"}
        return gaps


def test_a_full_disk_takes_readings_and_never_an_event(small_disk: Path) -> None:
    promises, path, other = Promises(), small_disk / "outbox", small_disk / "other"

    async def while_it_fills() -> None:
        outbox = await opened(path)
        for klass in RecordClass:
            assert await promises.put(outbox, klass, records=60)
        fill(other)
        # Each class makes room for itself at its own cost, or at that of a less precious one.
        for klass in (READING, RESULT, OUTCOME):
            assert await promises.put(outbox, klass, records=60)
        while await promises.put(outbox, EVENT, records=1):
            pass
        assert not await promises.put(outbox, EVENT, records=1)
        assert outbox.depth().lost["evicted"] > 0
        # There is room for what is settled, disk or no disk.
        await promises.check(outbox, EVENT)
        assert await promises.put(outbox, EVENT, records=10)
        other.unlink()
        for klass in RecordClass:
            assert await promises.put(outbox, klass, records=30)
        await outbox.close()

    async def afterwards() -> None:
        outbox = await opened(path)
        gaps = await promises.check(outbox, *RecordClass)
        assert outbox.depth().lost == {"evicted": len(gaps)}
        for klass in RecordClass:
            assert await promises.put(outbox, klass, records=1)
        await outbox.close()

    asyncio.run(while_it_fills())
    asyncio.run(afterwards())


def test_on_a_disk_that_is_full_from_the_beginning_there_is_no_store_until_there_is_room(small_disk: Path) -> None:
    other = small_disk / "other"
    fill(other)

    async def story() -> None:
        with pytest.raises(StorageFull):
            await opened(small_disk / "outbox")
        other.unlink()
        promises = Promises()
        outbox = await opened(small_disk / "outbox")
        assert await promises.put(outbox, EVENT, records=3)
        await promises.check(outbox, *RecordClass)
        await outbox.close()

    asyncio.run(story())


def fill(path: Path) -> None:
    """Leave no byte of the file system free."""
    with path.open("wb", buffering=0) as file:
        for size in (64 * KIB, 4 * KIB, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


@pytest.mark.parametrize("n", range(1, 200, 13))
def test_an_error_at_a_call_loses_nothing_on_real_files(tmp_path: Path, n: int) -> None:
    calls = Calls(lambda count, kind: OSError(errno.EIO, "planted") if n <= count < n + 3 else None)

    def disks() -> tuple[Disk, Disk]:
        outbox, aside = PosixDisk(tmp_path / "outbox"), PosixDisk(tmp_path / "aside")
        return FailingDisk(outbox, calls), FailingDisk(aside, calls)

    story = Story(disks=disks, seed=2, at=lambda: len(calls.kinds))
    story.tell()
    assert story.errors or n > len(calls.kinds) - 3
    calls.fault = None
    judge(story, story.open(), at=story.at())


def test_what_rotted_on_real_files_is_named_and_the_rest_comes(tmp_path: Path) -> None:
    chance = random.Random(3)
    for trial in range(20):
        folder = tmp_path / str(trial)
        story = Story(disks=partial(_both, folder), seed=trial % 4, at=lambda: 0)
        story.tell(steps=40)
        story.stop()
        victim = chance.choice(sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size))
        data = bytearray(victim.read_bytes())
        data[chance.randrange(len(data))] ^= chance.randint(1, 255)
        victim.write_bytes(data)
        judge(story, story.open(), at=0, may_be_damaged=True, may_repeat=True)


def _both(folder: Path) -> tuple[Disk, Disk]:
    return PosixDisk(folder), PosixDisk(folder / "aside")
