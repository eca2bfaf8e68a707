"""Disks that fail at a call of one's choice, and disks of which every state that a power cut may leave can be made."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edge_agent.ports import Disk
from tests.fakes.memory_disk import MemoryDisk

SECTOR_BYTES = 512

Fault = Callable[[int, str], OSError | None]
"""What happens at the n-th call (from 1), which is of this kind."""


Call = tuple[str | int | bytes, ...]
"""What a disk was told, and with what."""


class Calls:
    """A count of calls over several disks, and what is to happen at which."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.kinds: list[str] = []
        self.fault = fault

    def count(self, kind: str) -> OSError | None:
        """One more call."""
        self.kinds.append(kind)
        return None if self.fault is None else self.fault(len(self.kinds), kind)


class FailingDisk:
    """`edge_agent.ports.Disk` over another, whose calls raise what `calls` says.

    A write that fails leaves half of its bytes; a sync that fails leaves all that was written, since nobody knows.
    Removing, renaming and the like fail before anything happened.
    """

    def __init__(self, disk: Disk, calls: Calls) -> None:
        self._disk = disk
        self._calls = calls

    def _check(self, kind: str) -> None:
        error = self._calls.count(kind)
        if error is not None:
            raise error

    def names(self) -> list[str]:
        """As the other, or the fault."""
        self._check("names")
        return self._disk.names()

    def create(self, name: str, size: int, *, zeroed: bool) -> None:
        """As the other, or the fault."""
        self._check("create")
        self._disk.create(name, size, zeroed=zeroed)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """As the other, or the fault."""
        self._check("read")
        return self._disk.read(name, offset, size)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """As the other, or half of it and the fault."""
        error = self._calls.count("write")
        if error is not None:
            self._disk.write(name, offset, data[: len(data) // 2])
            raise error
        self._disk.write(name, offset, data)

    def sync(self, name: str) -> None:
        """As the other, or the fault."""
        self._check("sync")
        self._disk.sync(name)

    def rename(self, old: str, new: str) -> None:
        """As the other, or the fault."""
        self._check("rename")
        self._disk.rename(old, new)

    def remove(self, name: str) -> None:
        """As the other, or the fault."""
        self._check("remove")
        self._disk.remove(name)

    def sync_names(self) -> None:
        """As the other, or the fault."""
        self._check("sync_names")
        self._disk.sync_names()

    def free_bytes(self) -> int:
        """As the other, or the fault."""
        self._check("free_bytes")
        return self._disk.free_bytes()

    def close(self) -> None:
        """As the other."""
        self._disk.close()


class RecordingDisk(MemoryDisk):
    """A disk in memory that keeps every call that changes it, in order."""

    def __init__(self, *, size: int = 2**30) -> None:
        super().__init__(size=size)
        self.log: list[Call] = []

    def create(self, name: str, size: int, *, zeroed: bool) -> None:
        """Kept when it worked."""
        super().create(name, size, zeroed=zeroed)
        self.log.append(("create", name, size))

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Kept when it worked."""
        super().write(name, offset, data)
        self.log.append(("write", name, offset, bytes(data)))

    def sync(self, name: str) -> None:
        """Kept when it worked."""
        super().sync(name)
        self.log.append(("sync", name))

    def rename(self, old: str, new: str) -> None:
        """Kept when it worked."""
        super().rename(old, new)
        self.log.append(("rename", old, new))

    def remove(self, name: str) -> None:
        """Kept when it worked."""
        super().remove(name)
        self.log.append(("remove", name))

    def sync_names(self) -> None:
        """Kept when it worked."""
        super().sync_names()
        self.log.append(("sync_names",))


@dataclass
class _File:
    """What a file surely holds, and what was written to it since."""

    kept: bytearray = field(default_factory=bytearray)
    loose: list[tuple[int, bytes]] = field(default_factory=list)


class CutDisk:
    """Follows the calls of a `RecordingDisk` and makes the disks that a power cut may leave behind them.

    What was not synced is there, or is not, or one half of each write is, cut between sectors. Of the names since the
    last `sync_names`, a beginning of their changes is there.
    """

    def __init__(self) -> None:
        self._names: dict[str, _File] = {}
        self._kept_names: dict[str, _File] = {}
        self._changes: list[dict[str, _File]] = []

    def follow(self, call: Call) -> None:
        """One call more."""
        match call:
            case ("create", str(name), int(size)):
                self._names[name] = _File(loose=[(0, bytes(size))])
            case ("write", str(name), int(offset), bytes(data)):
                self._names[name].loose.append((offset, data))
                return
            case ("sync", str(name)):
                file = self._names[name]
                file.kept = _content(file, _whole)
                file.loose.clear()
                return
            case ("rename", str(old), str(new)):
                self._names[new] = self._names.pop(old)
            case ("remove", str(name)):
                del self._names[name]
            case ("sync_names",):
                self._kept_names = dict(self._names)
                self._changes.clear()
                return
        self._changes.append(dict(self._names))

    def left(self) -> Iterator[MemoryDisk]:
        """Every disk that may be left now; some are the same."""
        loose = any(file.loose for file in self._names.values())
        parts = (_nothing, _whole, _first_half, _second_half) if loose else (_whole,)
        for names, part in itertools.product([self._kept_names, *self._changes], parts):
            disk = MemoryDisk()
            disk.files = {name: _content(file, part) for name, file in names.items()}
            yield disk


Part = Callable[[int, bytes], tuple[int, bytes]]


def _content(file: _File, part: Part) -> bytearray:
    content = bytearray(file.kept)
    for offset, data in file.loose:
        at, some = part(offset, data)
        content.extend(bytes(max(0, at + len(some) - len(content))))
        content[at : at + len(some)] = some
    return content


def _whole(offset: int, data: bytes) -> tuple[int, bytes]:
    return offset, data


def _nothing(offset: int, data: bytes) -> tuple[int, bytes]:
    return 0, b""


def _first_half(offset: int, data: bytes) -> tuple[int, bytes]:
    return offset, data[: _middle(offset, data)]


def _second_half(offset: int, data: bytes) -> tuple[int, bytes]:
    middle = _middle(offset, data)
    return offset + middle, data[middle:]


def _middle(offset: int, data: bytes) -> int:
    """Where a sector ends in the midst of the data; its beginning where it lies in one."""
    return max(0, (offset + len(data) // 2) // SECTOR_BYTES * SECTOR_BYTES - offset)
