"""The journal's files that hold no records: spare ones to be written over, and the one in reserve for class 0.

Rules of this file:
1. A file that cannot be renamed or removed now still takes its room: it counts, and is the next to be used.
2. A file of another size than files have now is not used again.

Not here: which records make room (`journal.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from edge_agent.core.frames import RESERVE_NAME, SegmentName
from edge_agent.core.journal import JournalBounds
from edge_agent.ports import Disk

SMALL_COMMIT_BYTES: Final = 32 * 1024
"""Commits below this go to a file of zeros, those above to one that only has its room set aside.

A commit to the latter also changes the file system's own records: that costs about 16 KiB on the device and, of a
commit of 20 KiB, a third of the time; zeros cost each byte twice, until the file is used again.
"""
_MEMORY: Final = 8
"""How many commits the mean size looks back on."""


class Spares:
    """Makes files and takes them back.

    Args:
        disk: where they are.
        bounds: how large a file is, and how many are kept.
        draw: random bytes, for names.
        names: those that there are.
        has_reserve: whether the one in reserve is there.
        foreign: segments of another size.

    Attributes:
        has_reserve: as given, and as it becomes.
        written_bytes: zeros that files were filled with.
    """

    def __init__(
        self,
        disk: Disk,
        bounds: JournalBounds,
        *,
        draw: Callable[[int], bytes],
        names: list[str],
        has_reserve: bool,
        foreign: set[SegmentName],
    ) -> None:
        self.has_reserve = has_reserve
        self.written_bytes = 0
        self._disk = disk
        self._bounds = bounds
        self._draw = draw
        self._names = names
        self._foreign = foreign
        self._commit_bytes = 0.0

    def count(self) -> int:
        """How many files there are, the reserve included."""
        return len(self._names) + int(self.has_reserve)

    def note_commit(self, size: int) -> None:
        """A commit of so many bytes was written."""
        self._commit_bytes += (size - self._commit_bytes) / _MEMORY

    def take(self) -> str | None:
        """A spare file to be renamed; None when there is none."""
        return self._names.pop() if self._names else None

    def take_reserve(self) -> str | None:
        """The file in reserve; None when it is gone."""
        if not self.has_reserve:
            return None
        self.has_reserve = False
        return RESERVE_NAME

    def put(self, name: str) -> None:
        """This file has no owner any more, whatever it is called."""
        self._names.append(name)

    def create(self, name: str) -> None:
        """Make a file of this name; raises OSError."""
        zeroed = self._commit_bytes < SMALL_COMMIT_BYTES
        self._disk.create(name, self._bounds.segment_bytes, zeroed=zeroed)
        self.written_bytes += self._bounds.segment_bytes if zeroed else 0

    def reuse(self, name: SegmentName) -> str:
        """The file of a segment that is needed no longer, to be renamed; another one where it has another size."""
        if name not in self._foreign:
            return str(name)
        self._foreign.discard(name)
        self._disk.remove(str(name))
        spare = self._new_name()
        self.create(spare)
        return spare

    def give_back(self, name: SegmentName) -> None:
        """Keep the file of a segment that is needed no longer, or remove it where enough are kept; raises OSError."""
        if name in self._foreign:
            self._foreign.discard(name)
            self._disk.remove(str(name))
            return
        try:
            if len(self._names) >= self._bounds.spares:
                self._disk.remove(str(name))
                return
            spare = self._new_name()
            self._disk.rename(str(name), spare)
        except OSError:
            self._names.append(str(name))
            raise
        self._names.append(spare)

    def restock(self, *, has_room: Callable[[], bool]) -> None:
        """Have a file in reserve again: a spare one, or a new one where there is room. Raises OSError."""
        if self.has_reserve:
            return
        if self._names:
            self._disk.rename(self._names[-1], RESERVE_NAME)
            self._names.pop()
        elif has_room():
            try:
                self._disk.create(RESERVE_NAME, self._bounds.segment_bytes, zeroed=False)
            except OSError:
                return  # it is tried again with the next cursor
        else:
            return
        self.has_reserve = True

    def _new_name(self) -> str:
        return f"spare-{self._draw(4).hex()}.seg"
