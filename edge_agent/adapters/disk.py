"""One directory of files, as `edge_agent.ports.Disk`, on the system's calls.

Rules of this file:
1. A few descriptors stay open; every file is private to the owner (0600).
2. Contents are synced with `fdatasync`: a segment's size and place are settled when it is made, so that a commit writes
   its data and nothing else.

Not here: what the files mean.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Final

MAX_OPEN: Final = 8
_ZEROS: Final = bytes(64 * 1024)
_UNKNOWN_BYTES: Final = 2**62


class PosixDisk:
    """The files of a directory, which is made if it is missing. Not for several threads at once."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open: OrderedDict[str, int] = OrderedDict()

    def names(self) -> list[str]:
        """The files there are."""
        return os.listdir(self._directory)  # noqa: PTH208 - by descriptor: the directory may be renamed under us

    def create(self, name: str, size: int, *, zeroed: bool) -> None:
        """Make a file of this size; one that could not be made whole is removed."""
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        try:
            if zeroed:
                for offset in range(0, size, len(_ZEROS)):
                    _write_all(descriptor, offset, _ZEROS[: size - offset])
            elif size:
                os.posix_fallocate(descriptor, 0, size)
            # The file's size and place go to the disk once, here, and not with the first commit.
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory)
            raise
        self._keep(name, descriptor)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Up to so many bytes from there; fewer at the end of the file."""
        return os.pread(self._descriptor(name), size, offset)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write all of it there, or raise."""
        _write_all(self._descriptor(name), offset, data)

    def sync(self, name: str) -> None:
        """Return once the file's contents are on the disk."""
        os.fdatasync(self._descriptor(name))

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, replacing what has it."""
        self._forget(new)
        os.rename(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        if old in self._open:
            self._keep(new, self._open.pop(old))

    def remove(self, name: str) -> None:
        """Remove a file."""
        self._forget(name)
        os.unlink(name, dir_fd=self._directory)

    def sync_names(self) -> None:
        """Return once creations, renames and removals are on the disk."""
        os.fsync(self._directory)

    def free_bytes(self) -> int:
        """What the file system has left for this user; without end where it does not say (some FUSE ones)."""
        state = os.fstatvfs(self._directory)
        return state.f_bavail * state.f_frsize if state.f_blocks else _UNKNOWN_BYTES

    def close(self) -> None:
        """Let go of open files. Safe to call twice."""
        while self._open:
            os.close(self._open.popitem()[1])
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def _descriptor(self, name: str) -> int:
        descriptor = self._open.get(name)
        if descriptor is None:
            descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=self._directory)
            self._keep(name, descriptor)
        else:
            self._open.move_to_end(name)
        return descriptor

    def _keep(self, name: str, descriptor: int) -> None:
        self._open[name] = descriptor
        while len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])

    def _forget(self, name: str) -> None:
        descriptor = self._open.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)


def _write_all(descriptor: int, offset: int, data: bytes) -> None:
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)
