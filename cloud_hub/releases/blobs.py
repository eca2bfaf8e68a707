"""Files named by their SHA-256: what is uploaded, what builds produce, what devices fetch.

Rules: a file appears under its name only when every byte of it is on the disk and hashes to that name (written to
`incoming/`, synced, renamed, directory synced), and it never changes afterwards. So a reader needs no lock, a second
upload of the same bytes is free, and a crash leaves nothing but a stray temporary file, which `sweep` removes.
Nothing is held in memory beyond one buffer.

Not here: who may read or write (routes), which files a release needs (desk), deleting what nobody refers to.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared import limits
from shared.errors import InvalidValue, StorageError, StorageFull, TransferCorrupt
from shared.ids import Digest

BUFFER_BYTES: Final = 1024 * 1024
"""How much of an upload is gathered before a thread hashes and writes it."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of the store: where it is and how many bytes it has."""

    digest: Digest
    length: int
    path: Path


class Blobs:
    """The store below one folder.

    Args:
        root: the folder; made by `open`.
        max_bytes: the longest file that is taken.
    """

    def __init__(self, root: Path, *, max_bytes: int = limits.MAX_MODEL_BYTES) -> None:
        self._root = root
        self._incoming = root / "incoming"
        self._max_bytes = max_bytes

    def open(self) -> None:
        """Make the folders and remove what an interrupted upload left; call once, before the first upload."""
        with _translated():
            self._incoming.mkdir(parents=True, exist_ok=True)
            for stray in self._incoming.iterdir():
                stray.unlink(missing_ok=True)

    def find(self, digest: Digest) -> Blob | None:
        """The file of this name, or None."""
        path = self._path(digest)
        try:
            length = path.stat().st_size
        except FileNotFoundError:
            return None
        return Blob(digest, length, path)

    def read(self, digest: Digest, *, max_bytes: int) -> bytes:
        """A small file's bytes, hashed again; raises StorageError when it is missing, longer, or has rotted."""
        blob = self.find(digest)
        if blob is None or blob.length > max_bytes:
            raise StorageError(f"blob {digest} is missing or longer than {max_bytes} bytes", code="storage.blob")
        with _translated():
            data = blob.path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise StorageError(
                f"blob {digest} no longer has its digest", code="storage.corrupt", hint="upload it again"
            )
        return data

    def put(self, data: bytes) -> Blob:
        """Store bytes that are in memory already."""
        digest = Digest(hashlib.sha256(data).hexdigest())
        found = self.find(digest)
        if found is not None:
            return found
        with _translated(), _Upload(self._incoming, self._max_bytes) as upload:
            upload.write(data)
            return self._keep(upload)

    def forget(self, digest: Digest) -> None:
        """Remove a file of which the caller knows that nobody else refers to it; one that is gone already is no error.

        Who reads it at the moment reads it to its end.
        """
        with _translated():
            self._path(digest).unlink(missing_ok=True)

    def adopt(self, file: Path) -> Blob:
        """Copy a file into the store under its digest; the original stays."""
        with _translated(), _Upload(self._incoming, self._max_bytes) as upload, file.open("rb") as source:
            while chunk := source.read(BUFFER_BYTES):
                upload.write(chunk)
            return self._keep(upload)

    async def receive(self, digest: Digest, length: int, chunks: AsyncIterable[bytes]) -> bool:
        """Store an upload as it arrives; False when the store had it already (nothing is read then).

        Raises:
            InvalidValue: the announced length is zero or above the cap.
            TransferCorrupt: more, fewer or other bytes arrived than were announced.
            StorageFull: the disk has no room.
        """
        if not 0 < length <= self._max_bytes:
            raise InvalidValue(
                f"a file of {length} bytes is not taken; 1 to {self._max_bytes} are possible", code="invalid.length"
            )
        if self.find(digest) is not None:
            return False
        upload = await asyncio.to_thread(self._begin)
        try:
            await self._fill(upload, length, chunks)
            await asyncio.to_thread(self._finish, upload, digest)
        finally:
            # Shielded by being synchronous: a cancelled upload must not leave its file behind.
            upload.discard()
        return True

    async def _fill(self, upload: _Upload, length: int, chunks: AsyncIterable[bytes]) -> None:
        buffer = bytearray()
        announced = length
        async for chunk in chunks:
            length -= len(chunk)
            if length < 0:
                raise TransferCorrupt(f"more than the announced {announced} bytes arrived")
            buffer += chunk
            if len(buffer) >= BUFFER_BYTES:
                await asyncio.to_thread(_write, upload, bytes(buffer))
                buffer.clear()
        if length:
            raise TransferCorrupt(f"{length} of the announced {announced} bytes did not arrive")
        await asyncio.to_thread(_write, upload, bytes(buffer))

    def _begin(self) -> _Upload:
        with _translated():
            return _Upload(self._incoming, self._max_bytes)

    def _finish(self, upload: _Upload, digest: Digest) -> None:
        if upload.digest != digest:
            raise TransferCorrupt(
                f"the bytes that arrived hash to {upload.digest}, not to {digest}",
                hint="send the SHA-256 of the file's bytes in the address",
            )
        with _translated():
            self._keep(upload)

    def _keep(self, upload: _Upload) -> Blob:
        digest = upload.digest
        path = self._path(digest)
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            _sync_folder(self._root)
        upload.settle(path)
        return Blob(digest, upload.length, path)

    def _path(self, digest: Digest) -> Path:
        return self._root / digest[:2] / digest


class _Upload:
    """A temporary file that is hashed while it is written, and is gone unless it was settled."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._path = folder / secrets.token_hex(16)
        self._file = self._path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._max_bytes = max_bytes
        self.length = 0

    def __enter__(self) -> _Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def digest(self) -> Digest:
        """SHA-256 of what was written so far."""
        return Digest(self._hash.hexdigest())

    def write(self, data: bytes) -> None:
        """Append; raises InvalidValue above the cap."""
        self.length += len(data)
        if self.length > self._max_bytes:
            raise InvalidValue(f"the file exceeds {self._max_bytes} bytes", code="invalid.length")
        self._hash.update(data)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    def settle(self, path: Path) -> None:
        """Make the file durable under its final name."""
        os.fsync(self._file.fileno())
        self._path.rename(path)
        _sync_folder(path.parent)

    def discard(self) -> None:
        """Close, and remove the temporary file unless it was settled; may be called twice."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def _write(upload: _Upload, data: bytes) -> None:
    with _translated():
        upload.write(data)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn the operating system's refusals into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(
                "the blob store has no room left", hint="free disk space in the hub's data folder and send it again"
            ) from error
        raise StorageError(f"the blob store failed: {error.strerror}", code="storage.blob") from error
