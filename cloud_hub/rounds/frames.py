"""What the hub and a run's worker say to each other over a socket pair: length, then MessagePack of one struct.

The worker asks, the hub answers; only answers of devices and `Closed` come without being asked for one by one. All
values; light enough for both sides to import.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from cloud_hub.rounds.rules import Head, Phase, Spec
from shared.errors import ProtocolViolation
from shared.limits import MIB
from shared.model import Preparation, Signature

MODULE: Final = "cloud_hub.rounds.worker"
MAX_FRAME_BYTES: Final = 1024 * MIB
"""Both sides are ours; a larger one means that they have lost their place."""
LENGTH: Final = struct.Struct(">I")


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The run to hold, sent first.

    Attributes:
        number: the run's number in Flower messages.
        model, golden: files of the base: its fp32 graph and its golden set.
        folder: where the worker may write checkpoints and the result.
        checkpoint, digest: the newest checkpoint's file and SHA-256; empty for a new run.
    """

    run: str
    number: int
    spec: Spec
    head: Head
    signature: Signature
    preparations: tuple[Preparation, ...]
    labels: tuple[str, ...]
    model: str
    golden: str
    folder: str
    checkpoint: str = ""
    digest: str = ""


class Cohort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Who can be asked, in ascending order: the answer to Gather."""

    nodes: tuple[int, ...]


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A device's answer to one task: the bytes, or a file that holds them."""

    message: str
    content: bytes = b""
    file: str = ""


class Closed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nothing more comes to the last Ask: everybody answered, or its time is over."""


class Stored(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The finished round is durable: the answer to RoundDone."""


class Gather(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Who takes part in this attempt at a round?"""

    round: int
    phase: Phase
    attempt: int


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One device's message; `content` counts into the contents of its Ask."""

    message: str
    node: int
    content: int


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Send these and bring the answers; what was answered before is not sent again."""

    round: int
    phase: Phase
    attempt: int
    tasks: tuple[Task, ...]
    contents: tuple[bytes, ...]


class RoundDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A round was aggregated and its checkpoint lies in the folder.

    Attributes:
        refused: message to reason.
    """

    round: int
    attempt: int
    answered: int
    accepted: int
    metrics: dict[str, float]
    refused: dict[str, str]
    checkpoint: str
    digest: str


class Trained(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All rounds are done; the file is the base with the learned head."""

    model: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The run cannot go on; trying again would not help."""

    code: str
    reason: str
    hint: str = ""


class Inspected(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The base has a head that can be learned."""

    head: Head


ToWorker = Begin | Cohort | Reply | Closed | Stored
ToHub = Gather | Ask | RoundDone | Trained | Failed | Inspected

_encoder = msgspec.msgpack.Encoder()
_to_worker: Final = msgspec.msgpack.Decoder(ToWorker)
_to_hub: Final = msgspec.msgpack.Decoder(ToHub)


def encode(frame: ToWorker | ToHub) -> bytes:
    """The frame's bytes, its length in front."""
    body = _encoder.encode(frame)
    return LENGTH.pack(len(body)) + body


def length_of(prefix: bytes) -> int:
    """How many bytes follow; raises ProtocolViolation for more than a frame has."""
    (length,) = LENGTH.unpack(prefix)
    if length > MAX_FRAME_BYTES:
        raise ProtocolViolation(f"a frame of {length} bytes", code="protocol.too_large")
    return int(length)


def for_worker(body: bytes) -> ToWorker:
    """A frame from the hub; raises ProtocolViolation."""
    try:
        frame: ToWorker = _to_worker.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"not a frame: {error}", code="protocol.frame") from error
    return frame


def for_hub(body: bytes) -> ToHub:
    """A frame from the worker; raises ProtocolViolation."""
    try:
        frame: ToHub = _to_hub.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"not a frame: {error}", code="protocol.frame") from error
    return frame
