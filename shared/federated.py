"""Flower's messages as values: what a device and the hub say to each other in a federated run.

Not here: their bytes (shared/wire/flower.py), and what a run's records mean (edge_agent/core/lessons.py).
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

Buffer: TypeAlias = bytes | bytearray | memoryview
MetricValue: TypeAlias = float | int | list[float] | list[int]
ListValue: TypeAlias = list[float] | list[int] | list[bool] | list[str] | list[bytes]
ConfigValue: TypeAlias = float | int | bool | str | bytes | ListValue

PRECONDITION: Final = 6
"""Flower's MOD_FAILED_PRECONDITION: the node could not do what was asked."""
FAILED: Final = 2
"""Flower's CLIENT_APP_RAISED_EXCEPTION: the node tried, and it went wrong."""


class Metadata(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a message comes from and goes to.

    Attributes:
        message_id: set by who sends; empty in a reply, which names the message that it answers.
        group_id: the round, as text.
        ttl: how many seconds after `created_at` the message is worth something.
        message_type: `train`, `evaluate`, `query`, each possibly with `.action`.
        created_at: Unix time in seconds.
    """

    run_id: int = 0
    message_id: str = ""
    src_node_id: int = 0
    dst_node_id: int = 0
    reply_to_message_id: str = ""
    group_id: str = ""
    ttl: float = 0.0
    message_type: str = ""
    created_at: float = 0.0
    src_task_id: int | None = None
    dst_task_id: int | None = None


class Array(msgspec.Struct, frozen=True, kw_only=True):
    """An array: what it says it is, and its bytes (`.npy` when `stype` is `numpy.ndarray`)."""

    dtype: str
    shape: tuple[int, ...]
    data: Buffer
    stype: str = "numpy.ndarray"


class ArrayRecord(msgspec.Struct, frozen=True):
    """Named arrays, in order."""

    arrays: dict[str, Array]


class MetricRecord(msgspec.Struct, frozen=True):
    """Named numbers."""

    metrics: dict[str, MetricValue]


class ConfigRecord(msgspec.Struct, frozen=True):
    """Named settings."""

    settings: dict[str, ConfigValue]


FlowerRecord: TypeAlias = ArrayRecord | MetricRecord | ConfigRecord


class FlowerError(msgspec.Struct, frozen=True):
    """Why a message has no answer: one of Flower's codes, and words."""

    code: int
    reason: str = ""


class FlowerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message: content by record name, or an error."""

    metadata: Metadata
    content: dict[str, FlowerRecord] | None = None
    error: FlowerError | None = None

    def arrays(self, name: str) -> dict[str, Array] | None:
        """The arrays of the record with this name; None when there is no such record of arrays."""
        record = (self.content or {}).get(name)
        return record.arrays if isinstance(record, ArrayRecord) else None

    def settings(self, name: str) -> dict[str, ConfigValue] | None:
        """The settings of the record with this name; None when there is no such record of settings."""
        record = (self.content or {}).get(name)
        return record.settings if isinstance(record, ConfigRecord) else None


def reply_to(metadata: Metadata, outcome: dict[str, FlowerRecord] | FlowerError, *, created_at: float) -> FlowerMessage:
    """The answer to the message with this metadata, as Flower makes it: sender and receiver change places."""
    answer = Metadata(
        run_id=metadata.run_id,
        src_node_id=metadata.dst_node_id,
        dst_node_id=metadata.src_node_id,
        reply_to_message_id=metadata.message_id,
        group_id=metadata.group_id,
        ttl=max(0.0, metadata.ttl - (created_at - metadata.created_at)),
        message_type=metadata.message_type,
        created_at=created_at,
        src_task_id=metadata.dst_task_id,
        dst_task_id=metadata.src_task_id,
    )
    if isinstance(outcome, FlowerError):
        return FlowerMessage(metadata=answer, error=outcome)
    return FlowerMessage(metadata=answer, content=outcome)
