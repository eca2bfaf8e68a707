"""The shelf in memory, with descriptors from memfd so that callers can read them like files."""

from __future__ import annotations

import hashlib
import os

from shared.errors import StorageError, TransferCorrupt
from shared.ids import Digest
from shared.model import FileRef


class FakeShelf:
    """`edge_agent.ports.Shelf` without a disk. `spoil` is what a failing disk does."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self._written: dict[str, int] = {}
        self.free = 2**40

    def has(self, digest: Digest) -> bool:
        """Whether the file is there."""
        return digest in self.files

    def resume_at(self, digest: Digest) -> int:
        """Length of the unfinished file."""
        self._look(digest)
        return len(self.parts.get(digest, b""))

    def append(self, digest: Digest, data: bytes, *, offset: int) -> None:
        """Write at this offset and drop what lay behind it."""
        self._let_go(digest)
        before = self.parts.get(digest, b"")[:offset]
        self.parts[digest] = before.ljust(offset, b"\0") + data

    def part(self, digest: Digest) -> int:
        """A descriptor for what becomes the unfinished file when it is published."""
        fd = os.memfd_create(digest[:16])
        self._let_go(digest)
        self.parts[digest] = b""
        self._written[digest] = os.dup(fd)
        return fd

    def publish(self, file: FileRef) -> None:
        """Check and keep."""
        if file.digest in self.files:
            return
        self._let_go(file.digest)
        if file.digest not in self.parts:
            raise StorageError("nothing to publish", code="storage.missing")
        data = self.parts.pop(file.digest)
        _check(data, file)
        self.files[file.digest] = data

    def open(self, file: FileRef) -> int:
        """A descriptor on a copy of the content."""
        if file.digest not in self.files:
            raise StorageError(f"{file.path} is not there", code="storage.missing")
        try:
            _check(self.files[file.digest], file)
        except TransferCorrupt:
            del self.files[file.digest]
            raise
        fd = os.memfd_create(file.digest[:16])
        os.write(fd, self.files[file.digest])
        os.lseek(fd, 0, os.SEEK_SET)
        return fd

    def collect(self, keep: frozenset[Digest]) -> int:
        """Forget everything else."""
        freed = 0
        for digest in list(self._written):
            self._let_go(Digest(digest))
        for store in (self.files, self.parts):
            for digest in [digest for digest in store if digest not in keep]:
                freed += len(store.pop(digest))
        return freed

    def free_bytes(self) -> int:
        """What the test says."""
        return self.free

    def drop(self, digest: Digest) -> None:
        """Forget this one."""
        self._let_go(digest)
        self.files.pop(digest, None)
        self.parts.pop(digest, None)

    def _look(self, digest: Digest) -> None:
        written = self._written.get(digest)
        if written is not None:
            self.parts[digest] = os.pread(written, os.fstat(written).st_size, 0)

    def _let_go(self, digest: Digest) -> None:
        """What was written by descriptor so far; the descriptor's further writes go nowhere."""
        self._look(digest)
        if digest in self._written:
            os.close(self._written.pop(digest))

    def spoil(self, digest: Digest, data: bytes) -> None:
        """Replace a kept file's content behind the shelf's back."""
        self.files[digest] = data


def _check(data: bytes, file: FileRef) -> None:
    if len(data) != file.length or hashlib.sha256(data).hexdigest() != file.digest:
        raise TransferCorrupt(f"{file.path} is not what is signed")
