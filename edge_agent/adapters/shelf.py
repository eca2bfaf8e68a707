"""Content-addressed files below the state directory, as `edge_agent.ports.Shelf`.

    blobs/<sha256>                 read-only, verified
    blobs/partial/<sha256>.part    unfinished; its length is where a transfer resumes

Rules of this file:
1. A name in `blobs/` is only ever made by a rename of a file that was synced and then hashed through the same
   descriptor, and the directory is synced after it: after a power cut it is there whole or not at all.
2. `open` hashes again: what runs is what was signed, whatever the disk did meanwhile.
3. Symbolic links are not followed.

Calls block for as long as the disk takes; for large files the caller uses a thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from shared.errors import StorageError, StorageFull, TransferCorrupt
from shared.ids import Digest, parse_digest
from shared.limits import MIB
from shared.model import FileRef

_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW
_UNKNOWN_BYTES: Final = 2**62


class FileShelf:
    """`Shelf` in `<state>/blobs`; makes its directories."""

    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir / "blobs"
        self._partial = self._root / "partial"
        with _translated(self._root):
            self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)

    def has(self, digest: Digest) -> bool:
        """Whether a verified file with this digest is there; raises StorageError."""
        info = _look(self._path(digest))
        return info is not None and stat.S_ISREG(info.st_mode)

    def resume_at(self, digest: Digest) -> int:
        """How many bytes of an unfinished file are there; raises StorageError."""
        info = _look(self._part(digest))
        return 0 if info is None else info.st_size

    def append(self, digest: Digest, data: bytes, *, offset: int) -> None:
        """Write at this offset of the unfinished file and drop what lay behind it; raises StorageFull, StorageError."""
        path = self._part(digest)
        with _translated(path), _descriptor(path, os.O_RDWR | os.O_CREAT) as fd:
            os.ftruncate(fd, offset)
            view = memoryview(data)
            while view:
                written = os.pwrite(fd, view, offset)
                offset += written
                view = view[written:]

    def part(self, digest: Digest) -> int:
        """A descriptor for writing, of the unfinished file of this digest, which is empty then; raises StorageFull."""
        path = self._part(digest)
        with _translated(path):
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _FLAGS, 0o600)

    def publish(self, file: FileRef) -> None:
        """Sync, hash from the same descriptor, rename, sync the directory; TransferCorrupt drops the file."""
        if self.has(file.digest):
            return
        part, path = self._part(file.digest), self._path(file.digest)
        try:
            with _translated(part), _descriptor(part, os.O_RDWR) as fd:
                os.fsync(fd)
                hashed = os.fstat(fd)
                _verify(fd, file)
                os.fchmod(fd, 0o444)
                part.rename(path)
                _require_same(hashed, path, file)
                _sync_directory(self._root)
        except TransferCorrupt:
            _let_go(part)
            raise

    def open(self, file: FileRef) -> int:
        """A read-only descriptor whose content was just hashed again.

        Raises:
            TransferCorrupt: the disk changed the file; it is removed so that it can be fetched again.
            StorageError: `storage.missing` when it is not there.
        """
        path = self._path(file.digest)
        with _translated(path):
            fd = os.open(path, os.O_RDONLY | _FLAGS)
        try:
            with _translated(path):
                _verify(fd, file)
                os.lseek(fd, 0, os.SEEK_SET)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, TransferCorrupt):
                _let_go(path)
            raise
        return fd

    def drop(self, digest: Digest) -> None:
        """Remove this file, finished or not, if it is there."""
        for path in (self._path(digest), self._part(digest)):
            with _translated(path):
                path.unlink(missing_ok=True)

    def collect(self, keep: frozenset[Digest]) -> int:
        """Remove every file, finished or not, that is not to be kept and return how many bytes that freed."""
        freed = 0
        with _translated(self._root):
            for path in [*self._root.iterdir(), *self._partial.iterdir()]:
                info = path.lstat()
                if path.name.removesuffix(".part") in keep or stat.S_ISDIR(info.st_mode):
                    continue
                path.unlink(missing_ok=True)
                freed += info.st_size
        return freed

    def free_bytes(self) -> int:
        """What the file system has left for this user; without end where it does not say (some FUSE ones)."""
        with _translated(self._root):
            state = os.statvfs(self._root)
        return state.f_bavail * state.f_frsize if state.f_blocks else _UNKNOWN_BYTES

    def _path(self, digest: Digest) -> Path:
        return self._root / parse_digest(digest)

    def _part(self, digest: Digest) -> Path:
        return self._partial / f"{parse_digest(digest)}.part"


def _look(path: Path) -> os.stat_result | None:
    """What has this name, None where nothing has; raises StorageError where the disk does not say."""
    with _translated(path):
        try:
            return path.lstat()
        except FileNotFoundError:
            return None


def _let_go(path: Path) -> None:
    """Remove a file that is not what it should be, if the disk lets go of it: nobody gets it without a look at it."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _verify(fd: int, file: FileRef) -> None:
    """Hash the whole file through this descriptor; raises TransferCorrupt."""
    size = os.fstat(fd).st_size
    if size != file.length:
        raise TransferCorrupt(f"{file.path} has {size} bytes, {file.length} are signed")
    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(fd, MIB, offset):
        digest.update(chunk)
        offset += len(chunk)
    if digest.hexdigest() != file.digest:
        raise TransferCorrupt(f"{file.path} has SHA-256 {digest.hexdigest()}, {file.digest} is signed")


def _require_same(hashed: os.stat_result, path: Path, file: FileRef) -> None:
    """What has the name now must be what was hashed; raises TransferCorrupt, with the name taken away again."""
    if _as_written(path.lstat()) != _as_written(hashed):
        path.unlink(missing_ok=True)
        raise TransferCorrupt(f"{file.path} was exchanged while it was verified")


def _as_written(info: os.stat_result) -> tuple[int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _sync_directory(path: Path) -> None:
    with _descriptor(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


@contextlib.contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | _FLAGS, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"no room left for {path}", hint="free disk space; the transfer resumes") from error
        if error.errno == errno.ENOENT:
            raise StorageError(f"{path} is not there", code="storage.missing") from error
        raise StorageError(f"{path}: {error.strerror}", hint="check the disk and the rights of its folder") from error
