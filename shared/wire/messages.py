"""The bodies of MQTT messages, one struct per kind, and the registry from kind to struct.

New fields are added with a default and old ones never change their meaning; that is what keeps version 1 one version.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal, TypeVar

import msgspec

from shared.errors import ProtocolViolation
from shared.telemetry import BatchId, Gap
from shared.wire.envelope import Envelope


class RunningModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model slot as the device reports it.

    Attributes:
        family: which model.
        phase: the slot machine's phase, lower case (`committed`, `probation`, …).
        version, variant, digest: what serves now; empty when nothing does.
        manifest: SHA-256 of the manifest that serves now.
        candidate: version in progress, if any.
        error_code, error: why the last attempt ended, until the next one succeeds.
        failed: SHA-256 of the manifest which that attempt was for; empty from an agent that does not say.
    """

    family: str
    phase: str
    version: str = ""
    variant: str = ""
    digest: str = ""
    manifest: str = ""
    candidate: str = ""
    error_code: str = ""
    error: str = ""
    failed: str = ""


class Birth(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The device is here. Sent after each connect, before anything else.

    Attributes:
        session: counts the connects of this boot from 1, as in the last will of the same connect.
    """

    boot: int
    epoch: str
    agent_version: str
    profile: str
    assignment_version: int = 0
    models: tuple[RunningModel, ...] = ()
    session: int = 0
    wire: tuple[int, int] = (1, 1)


class Death(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The device is gone: the last will, or said on a clean stop. Void when a newer (boot, session) was born."""

    boot: int
    session: int
    reason: Literal["lost", "stopped"] = "lost"


class Batch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Records first to last of a class, as columns (shared/wire/columns.py), or a gap.

    Attributes:
        columns: the records; empty for a gap. The id's digest is theirs, and for a gap that of its encoding.
        gap: set when the numbers first to last will not come.
    """

    batch: BatchId
    columns: bytes = b""
    gap: Gap | None = None


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one batch.

    Attributes:
        status: `stored` and `duplicate` let the device delete; `refused` too, after it put the batch aside with `code`.
        code: why it was refused.
    """

    batch: BatchId
    status: Literal["stored", "duplicate", "refused"]
    code: str = ""


class Ack(msgspec.Struct, frozen=True, kw_only=True):
    """The hub has committed these batches (or had them already, or will never take them), in one message."""

    verdicts: tuple[Verdict, ...]


class Reported(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The device's state; the newest (boot, revision) wins."""

    revision: int
    assignment_version: int
    models: tuple[RunningModel, ...]
    queue_records: int = 0
    queue_bytes: int = 0


class Assign(msgspec.Struct, frozen=True, kw_only=True):
    """A signed assignment (shared/trust/assignment.py), byte for byte as signed."""

    document: bytes


class RoundTask(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message of a federated run for the device: inline, or as a blob to fetch over HTTPS.

    Attributes:
        run: the run's name.
        message: unique per message; the reply names it, and a repeated task is answered from what is kept.
        content: a Flower Message in its protobuf form (shared/wire/flower.py); empty when it is a blob.
        blob, length: SHA-256 and size of the content, when it is too large to travel here.
        deadline_ms: the reply is worth something this many milliseconds after the task was sent.
    """

    run: str
    message: str
    deadline_ms: int
    content: bytes = b""
    blob: str = ""
    length: int = 0


class RoundReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The device's answer to a RoundTask: inline, or uploaded before to `/v1/rounds/{run}/replies/{message}`."""

    run: str
    message: str
    content: bytes = b""
    blob: str = ""
    length: int = 0


Message = Birth | Death | Batch | Ack | Reported | Assign | RoundTask | RoundReply

KINDS: Final[dict[str, type[Message]]] = {
    "birth": Birth,
    "death": Death,
    "batch": Batch,
    "ack": Ack,
    "reported": Reported,
    "assign": Assign,
    "round_task": RoundTask,
    "round_reply": RoundReply,
}
KIND_OF: Final[dict[type[Message], str]] = {struct: kind for kind, struct in KINDS.items()}

_Body = TypeVar("_Body", Birth, Death, Batch, Ack, Reported, Assign, RoundTask, RoundReply)
_encoder = msgspec.msgpack.Encoder()


def encode_body(message: Message) -> msgspec.Raw:
    """The body's bytes for an envelope."""
    return msgspec.Raw(_encoder.encode(message))


def decode_body(envelope: Envelope) -> Message:
    """The envelope's body, by its kind; raises ProtocolViolation when kind or body is not understood."""
    struct = KINDS.get(envelope.kind)
    if struct is None:
        raise ProtocolViolation(f"unknown kind {envelope.kind!r}", code="protocol.kind")
    try:
        return msgspec.msgpack.decode(envelope.body, type=struct)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"body of {envelope.kind!r}: {error}", code="protocol.body") from error


def expect(envelope: Envelope, struct: type[_Body]) -> _Body:
    """The envelope's body, which must be of this type."""
    message = decode_body(envelope)
    if not isinstance(message, struct):
        raise ProtocolViolation(f"expected {KIND_OF[struct]!r}, got {envelope.kind!r}", code="protocol.kind")
    return message


def digest_of(*, columns: bytes, gap: Gap | None) -> str:
    """SHA-256, hex, of what a batch carries: its columns, or its gap's encoding."""
    return hashlib.sha256(columns if gap is None else _encoder.encode(gap)).hexdigest()
