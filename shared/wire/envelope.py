"""The envelope around every MQTT message: who, what, when, until when, in answer to what.

MessagePack map with short stable keys. Unknown keys survive a decode and encode, so that an older hub can pass on
what a newer device said. Everything that matters is in here; MQTT 5 properties only mirror it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from shared import limits
from shared.errors import ProtocolViolation

WIRE_VERSION: Final = 1


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message as it travels.

    Attributes:
        v: wire version; a receiver refuses a higher one.
        id: unique per message, 1 to 64 characters.
        kind: names the body's type (shared/wire/messages.py).
        device: sender or addressee.
        boot: the sender's boot counter; orders birth and death where arrival does not. 0 from the hub.
        wall_ms: sender's wall clock.
        mono_ms: sender's monotonic clock; differences hold within one boot.
        body: MessagePack of the body.
        deadline_ms: how long after sending the message is worth acting on; None for ever.
        correlation: id of the message that this one answers.
        trace: W3C traceparent, when sampled.
        extra: keys that this version does not know, kept as they came.
    """

    v: int
    id: str
    kind: str
    device: str
    boot: int
    wall_ms: int
    mono_ms: int
    body: msgspec.Raw
    deadline_ms: int | None = None
    correlation: str | None = None
    trace: str | None = None
    extra: dict[str, msgspec.Raw] = {}


_KNOWN: Final = frozenset(Envelope.__struct_fields__) - {"extra"}
_REQUIRED: Final = len(_KNOWN) - 3
_encoder = msgspec.msgpack.Encoder()
_as_map = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_as_envelope = msgspec.msgpack.Decoder(Envelope)


def encode_envelope(envelope: Envelope) -> bytes:
    """The bytes to publish; raises ProtocolViolation when they exceed what a broker would carry."""
    fields: dict[str, object] = {
        name: value
        for name in Envelope.__struct_fields__
        if name != "extra" and (value := getattr(envelope, name)) is not None
    }
    data = _encoder.encode({**envelope.extra, **fields})
    if len(data) > limits.MAX_MQTT_PACKET_BYTES - 1024:
        raise ProtocolViolation(f"message of {len(data)} bytes is too large to send", code="protocol.too_large")
    return data


def decode_envelope(data: bytes) -> Envelope:
    """Parse what arrived; raises ProtocolViolation for anything that is not an envelope of a version we speak."""
    if len(data) > limits.MAX_MQTT_PACKET_BYTES:
        raise ProtocolViolation(f"message of {len(data)} bytes", code="protocol.too_large")
    try:
        envelope = _as_envelope.decode(data)
        if data[0] != _map_of(envelope):
            envelope = _decode_with_extra(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolViolation(f"not an envelope: {error}", code="protocol.envelope") from error
    if not 1 <= envelope.v <= WIRE_VERSION:
        raise ProtocolViolation(f"wire version {envelope.v} is not spoken here", code="protocol.version")
    if not 0 < len(envelope.id) <= limits.MAX_ENVELOPE_ID_CHARS or len(envelope.kind) > limits.MAX_ENVELOPE_ID_CHARS:
        raise ProtocolViolation("envelope id or kind has an unusable length", code="protocol.envelope")
    return envelope


def _map_of(envelope: Envelope) -> int:
    """The first byte of a MessagePack map with just the keys that the envelope has, none of them unknown."""
    optional = (envelope.deadline_ms is not None) + (envelope.correlation is not None) + (envelope.trace is not None)
    return 0x80 + _REQUIRED + optional


def _decode_with_extra(data: bytes) -> Envelope:
    fields = _as_map.decode(data)
    extra = {key: msgspec.Raw(bytes(value)) for key, value in fields.items() if key not in _KNOWN}
    envelope = _as_envelope.decode(_encoder.encode({k: v for k, v in fields.items() if k in _KNOWN}))
    return msgspec.structs.replace(envelope, extra=extra)
