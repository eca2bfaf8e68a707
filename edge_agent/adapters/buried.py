"""Batches that the hub or the broker will never take: put aside, with the reason, so that a person can look at them.

A file each, named by a running number and what it holds; MessagePack of {reason, batch, columns, gap}. Bounded by
bytes: the oldest go first.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from edge_agent.ports import Disk
from shared.errors import StorageError
from shared.telemetry import BatchId, Gap
from shared.wire.messages import Batch

_NAME: Final = re.compile(r"(\d{10})-(\d+)-[0-3]-\d+-\d+\.batch")


class BuriedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A file's content."""

    reason: str
    batch: BatchId
    columns: bytes
    gap: Gap | None = None


class Buried:
    """The batches that were put aside on this disk."""

    def __init__(self, disk: Disk, *, most_bytes: int) -> None:
        self._disk = disk
        self._most_bytes = most_bytes
        try:
            names = sorted(disk.names())
        except OSError as error:
            raise StorageError(f"the refused batches cannot be looked for: {error.strerror}") from error
        # The size is in the name, so that knowing how much there is needs no look at each file.
        self._sizes = {name: int(found[2]) for name in names if (found := _NAME.fullmatch(name)) is not None}

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._sizes)

    def put(self, batch: Batch, *, reason: str) -> None:
        """Keep this batch; it is on the disk when this returns. Raises StorageError."""
        data = msgspec.msgpack.encode(
            BuriedBatch(reason=reason, batch=batch.batch, columns=batch.columns, gap=batch.gap)
        )
        number = int(max(self._sizes, default="0-").partition("-")[0]) + 1
        claim = batch.batch
        name = f"{number:010d}-{len(data)}-{claim.klass}-{claim.first}-{claim.last}.batch"
        try:
            while self._sizes and sum(self._sizes.values()) + len(data) > self._most_bytes:
                oldest = next(iter(self._sizes))
                self._disk.remove(oldest)
                del self._sizes[oldest]
            self._disk.create(name, len(data), zeroed=False)
            self._disk.write(name, 0, data)
            self._disk.sync(name)
            self._disk.sync_names()
        except OSError as error:
            raise StorageError(f"a refused batch cannot be put aside: {error.strerror}") from error
        self._sizes[name] = len(data)

    def close(self) -> None:
        """Let go of the files. Safe to call twice."""
        self._disk.close()
