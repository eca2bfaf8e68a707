"""Faults of the journal and of the disk below it, as replacements of their parts (tests/sim/faults.py)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

from msgspec.structs import replace

from edge_agent.adapters import chain as chain_module
from edge_agent.adapters import journal as journal_module
from edge_agent.adapters import recovery
from edge_agent.adapters.chain import Chain
from edge_agent.adapters.journal import Journal
from edge_agent.core import frames
from edge_agent.core.frames import CURSOR_NAME, SegmentName
from edge_agent.core.journal import JournalBounds, StoreClock
from shared.telemetry import RecordClass
from tests.sim.disk import SimDisk
from tests.sim.fault import Patch

# Disks


class UnsyncedDisk(SimDisk):
    """`sync` returns at once."""

    def sync(self, name: str) -> None:
        """Save nothing."""


class UnsyncedNames(SimDisk):
    """`sync_names` returns at once."""

    def sync_names(self) -> None:
        """Save nothing."""


class UnsyncedCursor(SimDisk):
    """The cursor is written and not synced."""

    def sync(self, name: str) -> None:
        """Save all but the cursor."""
        if name != CURSOR_NAME:
            super().sync(name)


class DeafDisk(SimDisk):
    """A sync that fails is taken for one that did not."""

    def sync(self, name: str) -> None:
        """Save, or not."""
        try:
            super().sync(name)
        except OSError as error:
            if error.errno != errno.EIO:
                raise


class BlankDisk(SimDisk):
    """What cannot be read is taken for empty."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """What is there, or zeros."""
        try:
            return super().read(name, offset, size)
        except OSError:
            return bytes(size)


class LazyDisk(SimDisk):
    """Says that it has synced when it has not, while it is told to."""

    is_lazy = False

    def sync(self, name: str) -> None:
        """Save, or not yet."""
        if not self.is_lazy:
            super().sync(name)

    def sync_names(self) -> None:
        """Save, or not yet."""
        if not self.is_lazy:
            super().sync_names()


class HastyJournal(Journal):
    """Opens without syncing what it finds."""

    @classmethod
    def open(cls, disk: Any, bounds: Any, *, moment: Any, draw: Any) -> Journal:
        """Open on a disk that saves nothing meanwhile, unless the store is new."""
        disk.is_lazy = CURSOR_NAME in disk.names()
        try:
            return Journal.open(disk, bounds, moment=moment, draw=draw)
        finally:
            disk.is_lazy = False


# Frames


class _NoChecksum:
    """Stands where `zlib` does."""

    @staticmethod
    def crc32(data: Any, value: int = 0) -> int:
        """The same for all data."""
        return 0


def without_checksum() -> tuple[Patch, ...]:
    """Whatever lies where a frame should be is one."""
    return (Patch(frames, "zlib", lambda _: _NoChecksum),)


def without_generation() -> tuple[Patch, ...]:
    """A frame of a file's former life checks too."""

    def encoding(original: Callable[..., bytes]) -> Callable[..., bytes]:
        return lambda *args, **named: original(*args, **{**named, "generation": 0})

    def reading(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, segment: SegmentName, **named: Any) -> Any:
            return original(*args, segment=SegmentName(segment.klass, segment.base, 0), **named)

        return read

    return (
        Patch(chain_module, "encode_frame", encoding),
        Patch(chain_module, "read_frame", reading),
        Patch(chain_module, "find_frame", reading),
        Patch(frames, "read_frame", reading),
        Patch(frames, "find_frame", reading),
    )


# The cursor


def older_slot() -> tuple[Patch, ...]:
    """Of the two slots that check, the older one counts."""

    def choosing(_: Any) -> Callable[[bytes], Any]:
        return lambda data: min(frames.decode_slots(data), key=lambda found: found[1].generation, default=None)

    return (Patch(frames, "newest_slot", choosing),)


def settled_is_highest() -> tuple[Patch, ...]:
    """Whatever lies below an acknowledged number counts as acknowledged."""

    def settling(original: Callable[..., bool]) -> Callable[..., bool]:
        def settle(self: Chain, first: int, last: int) -> bool:
            done = original(self, first, last)
            before = self.standing
            if done and last > before.settled:
                early = tuple(one for one in before.early if one[0] > last)
                self.standing = replace(before, settled=last, early=early)
            return done

        return settle

    return (Patch(Chain, "settle", settling),)


def freed_before_cursor() -> tuple[Patch, ...]:
    """A segment is given back, and the cursor is written after that."""

    def freeing(original: Callable[..., None]) -> Callable[..., None]:
        def checkpoint(self: Journal, moment: Any) -> None:
            for chain in self._chains.values():
                while len(chain.segments) > 1 and chain.stop(0) - 1 <= chain.standing.settled:
                    self._spares.give_back(chain.take_oldest())
            self._disk.sync_names()
            original(self, moment)

        return checkpoint

    return (Patch(Journal, "_checkpoint", freeing),)


# Gaps


def gap_forgotten() -> tuple[Patch, ...]:
    """What is lost counts as settled."""

    def losing(_: Any) -> Callable[..., int]:
        def lose(self: Chain, first: int, last: int, reason: str) -> int:
            self.standing = self.standing.with_settled(first, last) or self.standing
            return 0

        return lose

    return (Patch(Chain, "lose", losing),)


def gap_after_unlink() -> tuple[Patch, ...]:
    """A segment is written over, and its gap gets into the cursor when that is due."""

    def losing(_: Any) -> Callable[..., int]:
        def lose(self: Journal, chain: Chain, first: int, last: int, reason: Any, moment: Any) -> int:
            self._unsaved += 1
            return chain.lose(first, last, reason)

        return lose

    return (Patch(Journal, "_lose", losing),)


# Batches, room, time


def no_start_mark() -> tuple[Patch, ...]:
    """What comes after a batch that was handed out is added to it."""
    return (Patch(Chain, "begin_batch", lambda _: lambda self: None),)


def overwrites_when_full() -> tuple[Patch, ...]:
    """After a new segment could not be had, the end of that one is taken for the end of the one before."""

    return (Patch(Chain, "leave", lambda _: lambda self: None),)


def tail_not_read() -> tuple[Patch, ...]:
    """On opening, the cursor is believed about the last number."""

    def reading(original: Callable[..., Any]) -> Callable[..., Any]:
        def last_frame(data: bytes, segment: Any) -> Any:
            return None, original(data, segment)[1]

        return last_frame

    return (Patch(recovery, "_last_frame", reading),)


def precious_evicted() -> tuple[Patch, ...]:
    """Events make room like everything else."""

    def choosing(original: Callable[..., Any]) -> Callable[..., Any]:
        def victim(segments: Any, newcomer: RecordClass) -> RecordClass | None:
            found = original(segments, newcomer)
            return RecordClass.EVENT if found is None and segments[RecordClass.EVENT] > 1 else found

        return victim

    return (Patch(journal_module, "victim", choosing),)


def room_miscounted() -> tuple[Patch, ...]:
    """Two files more than there may be."""

    def counting(original: property) -> property:
        assert original.fget is not None
        count: Callable[[JournalBounds], int] = original.fget
        return property(lambda self: count(self) + 2)

    return (Patch(JournalBounds, "segments", counting),)


def wall_clock() -> tuple[Patch, ...]:
    """Ages are counted by the wall clock."""
    return (Patch(StoreClock, "at", lambda _: lambda self, moment: moment.wall_ms),)


def clock_restarts() -> tuple[Patch, ...]:
    """The store's clock begins anew with each start."""
    return (Patch(recovery, "store_time", lambda _: lambda cursor, **named: 0),)


def epoch_anew() -> tuple[Patch, ...]:
    """Each start draws an epoch."""

    def drawing(original: Callable[..., str]) -> Callable[..., str]:
        def epoch(disk: Any, names: Sequence[str], draw: Any) -> str:
            return original(disk, [name for name in names if not name.startswith("epoch-")], draw)

        return epoch

    return (Patch(recovery, "_epoch", drawing),)
