"""Files named by their SHA-256: what is uploaded, what builds produce, what devices fetch.

Rules: a file appears under its name only when every byte of it is on the disk and hashes to that name (it arrives in
`incoming/`, ground/arrivals.py), and it never changes afterwards. So a reader needs no lock, a second upload of the
same bytes is free, and a crash leaves nothing but a stray temporary file, which `open` removes.

Not here: who may read or write (routes), which files a release needs (desk), deleting what nobody refers to.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterable
from dataclasses import dataclass
from pathlib import Path

from cloud_hub.files import sync
from cloud_hub.ground import arrivals
from cloud_hub.ground.arrivals import BUFFER_BYTES, Arrival
from shared import limits
from shared.errors import InvalidValue, StorageError, TransferCorrupt
from shared.ids import Digest


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
        with arrivals.translated():
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
        with arrivals.translated():
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
        with arrivals.translated(), self._arrival() as upload:
            upload.write(data)
            return self._keep(upload)

    def forget(self, digest: Digest) -> None:
        """Remove a file of which the caller knows that nobody else refers to it; one that is gone already is no error.

        Who reads it at the moment reads it to its end.
        """
        with arrivals.translated():
            self._path(digest).unlink(missing_ok=True)

    def adopt(self, file: Path) -> Blob:
        """Copy a file into the store under its digest; the original stays."""
        with arrivals.translated(), self._arrival() as upload, file.open("rb") as source:
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
            await arrivals.fill(upload, length, chunks)
            await asyncio.to_thread(self._finish, upload, digest)
        finally:
            # Shielded by being synchronous: a cancelled upload must not leave its file behind.
            upload.discard()
        return True

    def _begin(self) -> Arrival:
        with arrivals.translated():
            return self._arrival()

    def _arrival(self) -> Arrival:
        return Arrival(self._incoming / secrets.token_hex(16), max_bytes=self._max_bytes)

    def _finish(self, upload: Arrival, digest: Digest) -> None:
        if upload.digest != digest:
            raise TransferCorrupt(
                f"the bytes that arrived hash to {upload.digest}, not to {digest}",
                hint="send the SHA-256 of the file's bytes in the address",
            )
        with arrivals.translated():
            self._keep(upload)

    def _keep(self, upload: Arrival) -> Blob:
        digest = upload.digest
        path = self._path(digest)
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            sync(self._root)
        upload.settle(path)
        return Blob(digest, upload.length, path)

    def _path(self, digest: Digest) -> Path:
        return self._root / digest[:2] / digest
