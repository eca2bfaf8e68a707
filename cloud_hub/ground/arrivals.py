"""Files that arrive: written to a temporary name piece by piece, and there under their own only when they are whole.

Rules: a file appears under its name when every byte of it is on the disk (written, synced, renamed, directory synced);
a crash leaves nothing but the temporary file, which the owner of the folder removes. Nothing is held in memory beyond
one buffer. Work on the disk is done in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncIterable, Iterator
from pathlib import Path
from typing import Final

from cloud_hub.files import sync
from shared.errors import InvalidValue, StorageError, StorageFull, TransferCorrupt
from shared.ids import Digest

BUFFER_BYTES: Final = 1024 * 1024
"""How much of an upload is gathered before a thread hashes and writes it."""
SLOWEST_BYTES_S: Final = 16 * 1024
"""A device gives an upload up that is slower than this (edge_agent/adapters/fetcher.py), so it has ended by then."""
BEGINNING_S: Final = 60.0

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Arrival:
    """A temporary file that is hashed while it is written, and is gone unless it was settled.

    Args:
        draft: the temporary name; nothing of that name is there.
        max_bytes: the longest file that is taken.

    Raises:
        OSError: from any method; `translated` makes ours of it.
    """

    def __init__(self, draft: Path, *, max_bytes: int) -> None:
        self._path = draft
        self._file = draft.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._max_bytes = max_bytes
        self.length = 0

    def __enter__(self) -> Arrival:
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
        sync(path.parent)

    def discard(self) -> None:
        """Close, and remove the temporary file unless it was settled; may be called twice."""
        self._file.close()
        self._path.unlink(missing_ok=True)


async def fill(arrival: Arrival, length: int, chunks: AsyncIterable[bytes], *, within_s: float | None = None) -> None:
    """Write what arrives until it is all there.

    Args:
        length: how many bytes were announced.
        within_s: how long the whole of it may take, None where only each piece has a deadline.

    Raises:
        TransferCorrupt: more or fewer bytes arrived than were announced, or not in time.
        StorageError: the disk refused; StorageFull when it has no room.
    """
    loop = asyncio.get_running_loop()
    deadline = None if within_s is None else loop.time() + within_s
    incoming = aiter(chunks)
    buffer, missing = bytearray(), length
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(incoming)
        except StopAsyncIteration:
            break
        except TimeoutError as error:
            raise TransferCorrupt(
                f"{missing} of {length} bytes had not arrived after {within_s:.0f} s", hint="send it again"
            ) from error
        missing -= len(chunk)
        if missing < 0:
            raise TransferCorrupt(f"more than the announced {length} bytes arrived")
        buffer += chunk
        if len(buffer) >= BUFFER_BYTES:
            await asyncio.to_thread(_write, arrival, bytes(buffer))
            buffer.clear()
    if missing:
        raise TransferCorrupt(f"{missing} of the announced {length} bytes did not arrive")
    await asyncio.to_thread(_write, arrival, bytes(buffer))


def longest_s(length: int) -> float:
    """How long a file of this length may take to arrive."""
    return BEGINNING_S + length / SLOWEST_BYTES_S


def _write(arrival: Arrival, data: bytes) -> None:
    with translated():
        arrival.write(data)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn the operating system's refusals into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(
                "there is no room left for files", hint="free disk space in the hub's data folder and send it again"
            ) from error
        raise StorageError(f"a file cannot be kept: {error.strerror}", code="storage.blob") from error
