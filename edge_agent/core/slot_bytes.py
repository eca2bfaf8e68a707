"""A slot's persisted state as bytes for the ledger, and back."""

from __future__ import annotations

import msgspec

from edge_agent.core.slot_values import STATE_SCHEMA, Slot
from shared.errors import StorageError


class _Head(msgspec.Struct):
    schema: int


def encode_state(state: Slot) -> bytes:
    """The state's bytes for the ledger."""
    return msgspec.msgpack.encode(state)


def decode_state(data: bytes) -> Slot:
    """The state in these bytes; raises StorageError when they are damaged or from an agent that is newer than this."""
    try:
        schema = msgspec.msgpack.decode(data, type=_Head).schema
        if schema != STATE_SCHEMA:
            raise StorageError(
                f"slot state has schema {schema}, this agent knows {STATE_SCHEMA}",
                code="storage.schema",
                hint="run the agent version that wrote the state directory, or a newer one",
            )
        return msgspec.msgpack.decode(data, type=Slot)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StorageError(f"slot state cannot be read: {error}", code="storage.slot") from error
