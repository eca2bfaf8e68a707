"""The cursor's file: two slots that are written in turn, of which the newest that checks counts.

A write that fails leaves the other slot as it was, and is tried on the same one again.
"""

from __future__ import annotations

from edge_agent.core import frames
from edge_agent.core.frames import Cursor
from edge_agent.ports import Disk


class CursorFile:
    """What the journal remembers beside its segments, on the disk.

    Attributes:
        cursor: the one that counts; None in a new store, or when no slot checked.
        written_bytes, writes: what it has cost since it was opened.
    """

    def __init__(self, disk: Disk, *, cursor: Cursor | None = None, place: int = frames.SLOTS - 1) -> None:
        self.cursor = cursor
        self.written_bytes = 0
        self.writes = 0
        self._disk = disk
        self._place = place

    @classmethod
    def open(cls, disk: Disk, names: list[str]) -> CursorFile:
        """Read it, or make it where it is missing; raises OSError."""
        if frames.CURSOR_NAME not in names:
            disk.create(frames.CURSOR_NAME, frames.SLOTS * frames.SLOT_BYTES, zeroed=True)
            disk.sync(frames.CURSOR_NAME)
            disk.sync_names()
            return cls(disk)
        data = disk.read(frames.CURSOR_NAME, 0, frames.SLOTS * frames.SLOT_BYTES)
        found = frames.newest_slot(data)
        if found is None:
            return cls(disk)
        place, cursor = found
        begin = place * frames.SLOT_BYTES
        save_again(disk, frames.CURSOR_NAME, data[begin : begin + frames.SLOT_BYTES], offset=begin)
        return cls(disk, cursor=cursor, place=place)

    @property
    def generation(self) -> int:
        """Of the one that counts; 0 when there is none."""
        return self.cursor.generation if self.cursor is not None else 0

    def write(self, cursor: Cursor) -> None:
        """Write this one, which must have the next generation; it is on the disk when this returns. Raises OSError."""
        data = frames.encode_slot(cursor)
        place = (self._place + 1) % frames.SLOTS
        self._disk.write(frames.CURSOR_NAME, place * frames.SLOT_BYTES, data)
        self._disk.sync(frames.CURSOR_NAME)
        self._place, self.cursor = place, cursor
        self.written_bytes += len(data)
        self.writes += 1


def save_again(disk: Disk, name: str, data: bytes, *, offset: int) -> None:
    """Write what was found there once more, and sync it.

    It is about to be acted on, and it may not be on the disk: the process before may have been killed before its sync,
    or the sync may have failed, after which the system takes what it has in memory for saved. The same bytes again
    cannot tear.
    """
    disk.write(name, offset, data)
    disk.sync(name)
