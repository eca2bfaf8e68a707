"""A disk in memory that forgets what was not synced, as disks do when the power goes.

Rules of this file:
1. Each file is there twice: as programs see it (`view`) and as it would be found after a power cut (`synced`). A write
   changes the view and waits; `sync` carries what waits over to the other side.
2. Names wait as well: creations, renames and removals reach the disk, in their order, with `sync_names`.
3. A power cut keeps of every file a random prefix of what waited (the last write torn at any byte), or, on a disk that
   writes in no order, a random choice of its sectors; and of the names a prefix. A killed process loses none of it.
4. A sync that failed has dropped what waited: the pages count as clean, the next sync succeeds and saves nothing.
5. What shall happen is armed for a number of calls ahead, so that it strikes inside any call of the journal.

Not here: when anything is armed (tests/sim/chaos.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Final

SECTOR_BYTES: Final = 512
NEVER: Final = 1 << 62


class Interrupted(BaseException):
    """The process ends inside a call of the disk. Not an Exception: no handler of the product may catch it."""


class PowerLost(Interrupted):
    """The power is gone; `SimDisk.lose_power` says what is left."""


class ProcessKilled(Interrupted):
    """The process is gone; the disk is as the system sees it."""


class Tearing(Enum):
    """What a power cut keeps of what waited: a prefix of the writes in their order, or any of their sectors."""

    PREFIX = "prefix"
    SECTORS = "sectors"


class Strike(Enum):
    """What happens at the armed call."""

    POWER = "power"
    KILL = "kill"
    IO = "io"
    FULL = "full"


@dataclass(slots=True)
class SimFile:
    """One file; `waiting` holds writes (offset, data) since the last sync, in order.

    `shields` are the places, begin and end, of what may be the file's last write.
    """

    view: bytearray
    synced: bytearray = field(default_factory=bytearray)
    waiting: list[tuple[int, bytes]] = field(default_factory=list)
    shields: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class NameChange:
    """`file` gets the name `new`, and `old` is no longer one; either may be empty."""

    old: str
    new: str
    file: SimFile | None


def put_at(content: bytearray, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write into a content, growing it as a file grows."""
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


class SimDisk:
    """Implements `edge_agent.ports.Disk`, and is what the world does to it.

    Attributes:
        calls: how many calls there were; `syncs` of them saved contents.
        used: bytes of all files, as programs see them; `most_used` is the highest that it ever was.
        capacity: bytes of the file system; `others` of them are taken by someone else.
        told: is told of each call that changes something, for a trace.
    """

    def __init__(self, *, random: Random, capacity: int = 1 << 40, tearing: Tearing = Tearing.PREFIX) -> None:
        self.capacity = capacity
        self.others = 0
        self.told: Callable[[str], None] | None = None
        self.tearing = tearing
        self.calls = 0
        self.syncs = 0
        self.used = 0
        self.most_used = 0
        self._random = random
        self._files: dict[str, SimFile] = {}
        self._named: dict[str, SimFile] = {}
        self._changes: list[NameChange] = []
        self._armed_at = NEVER
        self._strike = Strike.POWER

    # What programs see (the port)

    def names(self) -> list[str]:
        """The files there are."""
        self._enter()
        return sorted(self._files)

    def create(self, name: str, size: int, *, zeroed: bool) -> None:
        """Make a file of this size; one that was there is replaced."""
        if self.told is not None:
            self.told(f"create {name} {size}")
        struck = self._enter(changes=True, grows=True)
        before = self._files.get(name)
        freed = 0 if before is None else len(before.view)
        if size - freed > self.free_bytes():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        file = SimFile(view=bytearray(size), waiting=[(0, bytes(size))])
        self._name(NameChange("", name, file))
        self._use(size - freed)
        if struck is Strike.KILL:
            kept = self._random.randrange(size + 1)
            self._use(kept - size)
            del file.view[kept:]
            file.waiting = [(0, bytes(kept))]
        self._leave(struck)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to so many bytes from there; fewer at the end of the file."""
        self._enter()
        return bytes(memoryview(self._file(name).view)[offset : offset + size])

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write all of it there, or raise; a failed or interrupted write leaves a part."""
        if self.told is not None:
            self.told(f"write {name} {offset}+{len(data)}")
        file = self._file(name)
        struck = self._enter(changes=True, file=file, offset=offset, data=data)
        if struck is Strike.KILL:
            data = data[: self._random.randrange(len(data) + 1)]
        self._write(file, offset, bytes(data), name)
        self._leave(struck)

    def sync(self, name: str) -> None:
        """Return once the file's contents are on the disk."""
        if self.told is not None:
            self.told(f"sync {name}")
        file = self._file(name)
        struck = self._enter(changes=True, file=file)
        if struck is None or (struck is Strike.KILL and self._random.random() < 0.5):
            for offset, data in file.waiting:
                put_at(file.synced, offset, data)
            if file.waiting:
                offset, data = file.waiting[-1]
                file.shields = [(offset, offset + len(data))]
                self.syncs += 1
                file.waiting.clear()
        self._leave(struck)

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, replacing what has it."""
        if self.told is not None:
            self.told(f"rename {old} {new}")
        struck = self._enter(changes=True)
        file = self._file(old)
        replaced = self._files.get(new)
        if replaced is not None and replaced is not file:
            self._use(-len(replaced.view))
        self._name(NameChange(old, new, file))
        self._leave(struck)

    def remove(self, name: str) -> None:
        """Remove a file."""
        if self.told is not None:
            self.told(f"remove {name}")
        struck = self._enter(changes=True)
        file = self._file(name)
        self._name(NameChange(name, "", None))
        self._use(-len(file.view))
        self._leave(struck)

    def sync_names(self) -> None:
        """Return once creations, renames and removals are on the disk."""
        if self.told is not None:
            self.told("sync names")
        struck = self._enter(changes=True)
        if struck is None or (struck is Strike.KILL and self._random.random() < 0.5):
            self._settle_names(len(self._changes))
        self._leave(struck)

    def free_bytes(self) -> int:
        """What the file system has left."""
        return max(0, self.capacity - self.others - self.used)

    def close(self) -> None:
        """Let go of open files."""

    # What the world does

    def arm(self, strike: Strike, *, calls_ahead: int) -> None:
        """Let this happen inside the n-th call from now that it can happen in, 1 being the next."""
        self._strike = strike
        self._armed_at = self.calls + calls_ahead

    def elsewhere(self) -> None:
        """Something else is written to the machine's disk, whole or not at all: what is armed may strike here too."""
        if self._strike is Strike.POWER or self._strike is Strike.KILL:
            self._enter()

    def disarm(self) -> None:
        """Nothing happens any more."""
        self._armed_at = NEVER

    def lose_power(self) -> None:
        """Keep what the disk has, and a random part of what waited; from here on that is what programs see."""
        self.disarm()
        files = self._all()
        self._settle_names(self._random.randrange(len(self._changes) + 1))
        self._changes.clear()
        for file in files:
            if file.waiting:
                self._tear(file)
            file.view = bytearray(file.synced)
        self._files = dict(self._named)
        self.used = sum(len(file.view) for file in self._files.values())

    def rot(self) -> str | None:
        """Change one byte of what is on the disk, outside each file's last write; returns the file's name.

        The last write is left alone because its loss cannot be told from a write that was cut.
        """
        names = sorted(name for name, file in self._named.items() if self._files.get(name) is file and file.synced)
        if not names:
            return None
        name = self._random.choice(names)
        file = self._named[name]
        at = self._random.randrange(len(file.synced))
        if file.waiting or any(begin <= at < end for begin, end in file.shields):
            return None
        flipped = file.synced[at] ^ (1 << self._random.randrange(8))
        file.synced[at] = flipped
        file.view[at] = flipped
        return name

    def replace_with(self, other: SimDisk) -> None:
        """Become a copy of another disk's durable state (a cloned card, an older image)."""
        self._named = {
            name: SimFile(view=bytearray(f.synced), synced=bytearray(f.synced)) for name, f in other.durable()
        }
        self._files = dict(self._named)
        self._changes.clear()
        self.used = sum(len(file.view) for file in self._files.values())

    def wipe(self) -> None:
        """Become empty: a new card."""
        self._named, self._files, self.used = {}, {}, 0
        self._changes.clear()

    # What the oracle asks

    def durable(self) -> list[tuple[str, SimFile]]:
        """The files whose names are on the disk; their `synced` is what a power cut at this moment surely leaves."""
        return sorted(self._named.items())

    def holds(self, text: bytes, *, prefix: str = "") -> bool:
        """Whether these bytes are in a file whose name, which begins like that, and content are both on the disk."""
        return any(text in file.synced for name, file in self._named.items() if name.startswith(prefix))

    # Inside

    def _all(self) -> list[SimFile]:
        found = {id(file): file for file in self._named.values()}
        found.update((id(file), file) for file in self._files.values())
        found.update((id(change.file), change.file) for change in self._changes if change.file is not None)
        return list(found.values())

    def _file(self, name: str) -> SimFile:
        file = self._files.get(name)
        if file is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return file

    def _enter(
        self,
        *,
        changes: bool = False,
        grows: bool = False,
        file: SimFile | None = None,
        offset: int = 0,
        data: bytes = b"",
    ) -> Strike | None:
        """Count the call; raise an armed error; return an interruption that the call carries out as it ends."""
        self.calls += 1
        if self.calls < self._armed_at:
            return None
        strike = self._strike
        if strike is Strike.FULL and not (grows or data):
            return None
        self.disarm()
        if self.told is not None:
            self.told(f"here strikes: {strike.value}")
        if strike is Strike.POWER or strike is Strike.KILL:
            if changes:
                return strike
            raise PowerLost if strike is Strike.POWER else ProcessKilled
        if file is not None:
            self._fail(file, offset, data)
        code = errno.ENOSPC if strike is Strike.FULL else errno.EIO
        raise OSError(code, os.strerror(code))

    def _fail(self, file: SimFile, offset: int, data: bytes) -> None:
        if data:
            self._write(file, offset, data[: self._random.randrange(len(data))], "")
            return
        # A sync: some of it may have arrived, and the system forgets about the rest.
        kept = self._random.randrange(len(file.waiting) + 1)
        for at, written in file.waiting[:kept]:
            put_at(file.synced, at, written)
        file.waiting.clear()

    def _leave(self, struck: Strike | None) -> None:
        if struck is Strike.POWER:
            raise PowerLost
        if struck is Strike.KILL:
            raise ProcessKilled

    def _write(self, file: SimFile, offset: int, data: bytes, name: str) -> None:
        end = offset + len(data)
        grown = end - len(file.view)
        if grown > 0:
            if grown > self.free_bytes():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            self._use(grown)
        put_at(file.view, offset, data)
        file.waiting.append((offset, data))

    def _use(self, size: int) -> None:
        self.used += size
        if self.used > self.most_used:
            self.most_used = self.used

    def _name(self, change: NameChange) -> None:
        self._changes.append(change)
        self._apply(change, self._files)

    def _settle_names(self, count: int) -> None:
        for change in self._changes[:count]:
            self._apply(change, self._named)
        del self._changes[:count]

    @staticmethod
    def _apply(change: NameChange, names: dict[str, SimFile]) -> None:
        if change.old:
            names.pop(change.old, None)
        if change.new and change.file is not None:
            names[change.new] = change.file

    def _tear(self, file: SimFile) -> None:
        """Carry a random part of what waited over to the disk."""
        waiting, random = file.waiting, self._random
        file.shields.extend((offset, offset + len(data)) for offset, data in waiting)
        if self.tearing is Tearing.PREFIX:
            whole = random.randrange(len(waiting) + 1)
            for offset, data in waiting[:whole]:
                put_at(file.synced, offset, data)
            if whole < len(waiting) and random.random() < 0.5:
                offset, data = waiting[whole]
                put_at(file.synced, offset, data[: random.randrange(len(data) + 1)])
        else:
            sectors: set[int] = set()
            for offset, data in waiting:
                sectors.update(range(offset // SECTOR_BYTES, (offset + max(len(data), 1) - 1) // SECTOR_BYTES + 1))
            for sector in sorted(sectors):
                if random.random() < 0.5:
                    start = sector * SECTOR_BYTES
                    put_at(file.synced, start, memoryview(file.view)[start : start + SECTOR_BYTES])
        waiting.clear()
