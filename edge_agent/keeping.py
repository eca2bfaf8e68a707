"""Small files that must be whole after a power cut: written aside, synced, and put in place in one step.

Errors of the disk become StorageError here, with the path and what to do.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from shared.errors import StorageError


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file that must not be there yet, synced; nobody else may open it, not even while it is written."""
    with translated(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def write_anew(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """The same for a file whose former content counts for nothing."""
    with translated(path):
        path.unlink(missing_ok=True)
    write_new(path, data, mode=mode)


def replace(path: Path, data: bytes) -> None:
    """Put these bytes in a file's place: after a power cut it holds the former or these, never a part."""
    aside = path.with_name(f"{path.name}.new")
    write_anew(aside, data)
    with translated(path):
        aside.rename(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Wait until the folder's entries are on the disk."""
    with translated(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_folder(path: Path) -> None:
    """Make the folder for its owner only, if it is missing."""
    with translated(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


class translated(contextlib.AbstractContextManager[None]):
    """Turns an OSError into a StorageError that names the path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StorageError(
                f"{self._path}: {error.strerror}",
                code="storage.state_dir",
                hint="run the command as the user that runs the agent, or choose another --state",
            ) from error
