"""Answers that can be given again: a bounded store, and the key under which a result is found.

Rules of this file:
1. A result belongs to the bytes of the served file and the bytes of the request: the key is the file's digest and
   BLAKE2 over the tensors' heads and elements. A release switch changes the digest, so nothing has to be invalidated.
2. The store is bounded in entries and in bytes; the least recently used goes first, and what alone would take more
   than a quarter of the bytes is not kept.

It is off unless it is configured (`cache.entries`): a sensor seldom says the same thing twice, and hashing every
request would cost each of them some twenty microseconds for nothing. There is no difference between classifiers and
raw models: a file gives the same outputs for the same inputs, and large outputs are bounded by the bytes.

Not here: single flight, which has to wait (edge_agent/driver/answering.py), and when a hit counts as the rung
`cached` (edge_agent/core/ladder.py).
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import Final, Generic, TypeVar

import msgspec

from shared.inference import TensorHead
from shared.limits import MIB

Value = TypeVar("Value")

MAX_KEYED_BYTES: Final = 1 * MIB
"""Hashing happens on the event loop; a larger request would hold up all others for longer than it saves."""
_KEY_BYTES: Final = 32


def key_of(digest: str, inputs: tuple[TensorHead, ...], payload: bytes | bytearray | memoryview) -> str | None:
    """The key of this request to this file; None for one that is too large to be kept."""
    if len(payload) > MAX_KEYED_BYTES:
        return None
    hashed = blake2b(msgspec.msgpack.encode(inputs), digest_size=_KEY_BYTES)
    hashed.update(payload)
    return f"{digest}:{hashed.hexdigest()}"


class Store(Generic[Value]):
    """Values by key, bounded; not safe for threads."""

    def __init__(self, *, entries: int, size_bytes: int) -> None:
        """Hold at most this many values of this many bytes together; zero entries hold nothing."""
        self._entries = entries
        self._size_bytes = size_bytes
        self._held: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def held_bytes(self) -> int:
        """The sizes of all values together."""
        return self._held_bytes

    @property
    def is_off(self) -> bool:
        """Whether it holds nothing by configuration."""
        return self._entries == 0

    def get(self, key: str) -> Value | None:
        """The value, which is now the most recently used."""
        found = self._held.get(key)
        if found is None:
            return None
        self._held.move_to_end(key)
        return found[0]

    def put(self, key: str, value: Value, *, size_bytes: int) -> None:
        """Keep a value in the place of an earlier one, unless it is too large."""
        self._drop(key)
        if size_bytes > self._size_bytes // 4:
            return
        self._held[key] = (value, size_bytes)
        self._held_bytes += size_bytes
        while len(self._held) > self._entries or self._held_bytes > self._size_bytes:
            self._drop(next(iter(self._held)))

    def _drop(self, key: str) -> None:
        found = self._held.pop(key, None)
        if found is not None:
            self._held_bytes -= found[1]
