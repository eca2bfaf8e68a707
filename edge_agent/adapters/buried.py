"""Batches that the hub or the broker will never take: put aside, with the reason, so that a person can look at them.

A file each, named by a running number and what it holds; MessagePack of {reason, batch, columns, gap}. Bounded by
bytes, and by what the file system has: the oldest go first.
"""

from __future__ import annotations

import contextlib
import errno
import re
from typing import Final

import msgspec

from edge_agent.ports import Disk
from shared.errors import StorageError, StorageFull
from shared.telemetry import BatchId, Gap
from shared.wire.messages import Batch

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)
_NAME: Final = re.compile(r"(\d{10})-(\d+)-[0-3]-\d+-\d+\.batch")


class BuriedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A file's content."""

    reason: str
    batch: BatchId
    columns: bytes
    gap: Gap | None = None


class Buried:
    """The batches that were put aside on this disk.

    Attributes:
        given_up: of those that were kept, how many went to make room since this was opened.
    """

    def __init__(self, disk: Disk, *, most_bytes: int) -> None:
        self._disk = disk
        self._most_bytes = most_bytes
        try:
            names = sorted(disk.names())
        except OSError as error:
            raise StorageError(f"the refused batches cannot be looked for: {error.strerror}") from error
        # The size is in the name, so that knowing how much there is needs no look at each file.
        self._sizes = {name: int(found[2]) for name in names if (found := _NAME.fullmatch(name)) is not None}
        self._number = int(max(self._sizes, default="0-").partition("-")[0])
        self._newest: BatchId | None = None
        self.given_up = 0

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._sizes)

    def put(self, batch: Batch, *, reason: str) -> None:
        """Keep this batch; it is on the disk when this returns.

        Raises:
            StorageFull: there is no room for it, although all others are gone.
            StorageError: the disk refused.
        """
        if batch.batch == self._newest:
            return  # what was to follow this failed, and is tried again
        data = msgspec.msgpack.encode(
            BuriedBatch(reason=reason, batch=batch.batch, columns=batch.columns, gap=batch.gap)
        )
        try:
            while self._sizes and sum(self._sizes.values()) + len(data) > self._most_bytes:
                self._give_up_oldest()
            while not self._write(batch.batch, data):
                if not self._sizes:
                    raise StorageFull("no room left for a refused batch", hint="free disk space")
                self._give_up_oldest()
        except OSError as error:
            raise StorageError(f"a refused batch cannot be put aside: {error.strerror}") from error
        self._newest = batch.batch

    def close(self) -> None:
        """Let go of the files. Safe to call twice."""
        self._disk.close()

    def _write(self, claim: BatchId, data: bytes) -> bool:
        """Write a file of its own; False when the file system has no room. Leaves nothing when it fails."""
        # Each try has its own number: what a failed one left may be there, and may not go away.
        self._number += 1
        name = f"{self._number:010d}-{len(data)}-{claim.klass}-{claim.first}-{claim.last}.batch"
        try:
            self._disk.create(name, len(data), zeroed=False)
            self._disk.write(name, 0, data)
            self._disk.sync(name)
            self._disk.sync_names()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._disk.remove(name)
            if error.errno in _NO_ROOM:
                return False
            raise
        self._sizes[name] = len(data)
        return True

    def _give_up_oldest(self) -> None:
        oldest = next(iter(self._sizes))
        # One that a person has taken away is gone as well.
        with contextlib.suppress(FileNotFoundError):
            self._disk.remove(oldest)
        del self._sizes[oldest]
        self.given_up += 1
