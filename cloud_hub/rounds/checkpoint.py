"""A run's state after a round: the arrays and what the strategy remembers, as one file that is whole or not there.

MessagePack of .npy bytes by name: typed, no code in it. Read back by its SHA-256 only.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from cloud_hub import files
from shared.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shared.tensors import Array


UNWRITTEN: Final = "storage.unwritten"
"""The disk refused; it may take the same later."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The state after `round`; arrays as .npy bytes."""

    round: int
    arrays: dict[str, bytes]
    memory: dict[str, dict[str, bytes]] = {}


def pack(number: int, arrays: Mapping[str, Array], memory: Mapping[str, Mapping[str, Array]]) -> bytes:
    """The checkpoint's bytes."""
    return msgspec.msgpack.encode(
        Checkpoint(
            round=number,
            arrays={name: npy(array) for name, array in arrays.items()},
            memory={kind: {name: npy(array) for name, array in of.items()} for kind, of in memory.items()},
        )
    )


def unpack(data: bytes) -> tuple[int, dict[str, Array], dict[str, dict[str, Array]]]:
    """Round, arrays and memory; raises StorageError when these are not a checkpoint's bytes."""
    try:
        held = msgspec.msgpack.decode(data, type=Checkpoint)
        memory = {kind: {name: _array(data) for name, data in of.items()} for kind, of in held.memory.items()}
        return held.round, {name: _array(data) for name, data in held.arrays.items()}, memory
    except (msgspec.MsgspecError, ValueError) as error:
        raise StorageError(f"the checkpoint does not parse: {error}", code="storage.checkpoint") from error


def write(file: Path, data: bytes) -> str:
    """Make the bytes durable under this name and return their SHA-256."""
    try:
        files.replace(file, data)
    except OSError as error:
        raise StorageError(f"{file.name} cannot be written: {error}", code=UNWRITTEN) from error
    return hashlib.sha256(data).hexdigest()


def read(file: Path, *, digest: str) -> bytes:
    """The file's bytes; raises StorageError unless they have this SHA-256."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{file.name} cannot be read: {error}", code="storage.checkpoint") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise StorageError(f"{file.name} no longer has its digest", code="storage.corrupt")
    return data


def npy(array: Array) -> bytes:
    """The array as an .npy file's bytes."""
    import numpy as np

    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _array(data: bytes) -> Array:
    import numpy as np

    loaded: Array = np.load(io.BytesIO(data), allow_pickle=False)
    return loaded
