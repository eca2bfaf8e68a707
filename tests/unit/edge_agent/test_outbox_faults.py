"""The outbox on disks that fail, that lose power and that rot: what it promised is kept, or said to be lost."""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Callable
from functools import partial

import pytest

from edge_agent.core.frames import CURSOR_NAME, SLOT_BYTES, SLOTS
from edge_agent.ports import Disk
from shared.errors import StorageError, StorageFull
from tests.fakes.fault_disks import Calls, CutDisk, FailingDisk, Fault, RecordingDisk
from tests.fakes.memory_disk import MemoryDisk
from tests.fakes.outbox_story import BOUNDS, Story, judge

SEEDS = (2, 5)
NO_ROOM = SLOTS * SLOT_BYTES + 5 * BOUNDS.segment_bytes
"""Of a disk that is smaller than what the outbox may take."""


def told(seed: int, *, calls: Calls | None = None, disk: MemoryDisk | None = None) -> Story:
    """A story on a disk in memory, with faults where there are calls."""
    calls, kept, aside = calls or Calls(), disk or MemoryDisk(), MemoryDisk()
    story = Story(
        disks=lambda: (FailingDisk(kept, calls), FailingDisk(aside, calls)), seed=seed, at=lambda: len(calls.kinds)
    )
    story.tell()
    # From here on everything works.
    story.disks = lambda: (kept, aside)
    return story


@pytest.mark.parametrize("size", [2**30, NO_ROOM])
def test_the_stories_cover_what_they_are_about(size: int) -> None:
    stories = [told(seed, disk=MemoryDisk(size=size)) for seed in range(30)]
    for story in stories:
        judge(story, story.open(), at=story.at())
        assert all(isinstance(error, StorageFull) for error in story.errors)
    reasons = {reason for story in stories for reason in story.told.values()}
    assert reasons == {"evicted", "expired", "dropped", "refused"}
    assert all(any(getattr(story, what) for story in stories) for what in ("settling", "handed", "buried", "errors"))


# Errors


def once(n: int, number: int, *kinds: str) -> Fault:
    """The n-th call fails, if it is of such a kind."""
    return lambda count, kind: OSError(number, "planted") if count == n and kind in kinds else None


def from_on(n: int, number: int, *kinds: str) -> Fault:
    """All such calls fail from the n-th call on."""
    return lambda count, kind: OSError(number, "planted") if count >= n and kind in kinds else None


ANY = ("names", "create", "read", "write", "sync", "rename", "remove", "sync_names", "free_bytes")
WRITING = ("create", "write", "rename", "sync_names")
FAULTS: dict[str, Callable[[int], Fault]] = {
    "any call once": lambda n: once(n, errno.EIO, *ANY),
    "any call from then on": lambda n: from_on(n, errno.EIO, *ANY),
    "syncs from then on": lambda n: from_on(n, errno.EIO, "sync", "sync_names"),
    "no room once": lambda n: once(n, errno.ENOSPC, *WRITING),
    "no room from then on": lambda n: from_on(n, errno.EDQUOT, *WRITING),
}


@pytest.mark.parametrize(
    ("fault", "seed"), [*((fault, 6) for fault in FAULTS), ("any call once", 5), ("syncs from then on", 5)]
)
def test_an_error_at_any_call_loses_nothing(fault: str, seed: int) -> None:
    n, failed = 1, 0
    while True:
        calls = Calls(FAULTS[fault](n))
        story = told(seed, calls=calls)
        try:
            judge(story, story.open(), at=story.at())
        except Exception as error:
            raise AssertionError(f"{fault} at call {n} of story {seed}") from error
        failed += any(not isinstance(error, StorageFull) or "no room left" in error.message for error in story.errors)
        if n > len(calls.kinds):
            break
        n += 1
    assert failed > 10


# Power


@pytest.mark.parametrize("seed", SEEDS)
def test_the_power_may_go_at_any_call(seed: int) -> None:
    disk = RecordingDisk()
    story = Story(disks=lambda: (disk, MemoryDisk()), seed=seed, at=lambda: len(disk.log))
    story.tell()
    calls = list(disk.log)
    legit = {**story.told, **judge(story, story.open(), at=len(calls))}
    cut, looked = CutDisk(), 0
    for at, call in enumerate(calls, 1):
        cut.follow(call)
        for left in cut.left():
            story.disks = partial(_both, left)
            story.uptime_ms = max(uptime_ms for since, uptime_ms in story.uptimes_ms if since <= at)
            try:
                judge(story, story.open(), at=at, legit=legit)
            except Exception as error:
                raise AssertionError(f"the power went behind call {at}, {call}, of story {seed}") from error
            looked += 1
    assert looked > 2 * len(calls)


# Rot


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("chosen", [r".*\.seg", r"(\d-.*)\.seg", "cursor"])
def test_what_rotted_is_named_and_the_rest_comes(seed: int, chosen: str) -> None:
    whole = MemoryDisk()
    story = told(seed, disk=whole)
    story.stop()
    for trial in range(100):
        story.disks = partial(_both, rotten(whole, random.Random(trial), chosen))
        judge(story, story.open(), at=story.at(), may_be_damaged=True, may_repeat=True)


def test_without_any_cursor_what_lies_in_no_file_is_said_to_be_damaged() -> None:
    # In these, every class that had records has a file. Of one whose last file was given to a more precious class,
    # only the cursor knows from where numbers go on.
    gaps = 0
    for seed in (1, 2, 4):
        disk = MemoryDisk()
        story = told(seed, disk=disk)
        story.stop()
        disk.files[CURSOR_NAME][:] = bytes(SLOTS * SLOT_BYTES)
        gaps += len(judge(story, story.open(), at=story.at(), may_be_damaged=True, may_repeat=True))
    assert gaps


def _both(disk: Disk) -> tuple[Disk, Disk]:
    return disk, MemoryDisk()


def rotten(disk: MemoryDisk, chance: random.Random, chosen: str) -> MemoryDisk:
    """A copy, in which up to five bytes of one such file are others."""
    copy = MemoryDisk()
    copy.files = {name: bytearray(data) for name, data in disk.files.items()}
    data = copy.files[chance.choice(sorted(name for name in copy.files if re.fullmatch(chosen, name)))]
    for _ in range(chance.randint(1, 5)):
        data[chance.randrange(len(data))] ^= chance.randint(1, 255)
    return copy


def test_the_errors_are_the_trees() -> None:
    story = told(0, calls=Calls(from_on(1, errno.EIO, *ANY)))
    assert not story.promised
    assert {type(error) for error in story.errors} == {StorageError}
