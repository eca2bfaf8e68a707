"""Finds PUBLISH packets in the bytes of an MQTT 5 connection, so that the client below is spared them.

The client makes a dozen objects of each message and looks for the one who wants it in a tree of filters. The hub wants
all of them, by the thousand a second (`scripts/bench ingest`), and needs topic, payload and number. Everything else on
the line, and whatever is not as it should be, goes to the client as it came.

MQTT 5.0 sections: 2.1.4 (lengths), 3.3 (PUBLISH), 3.4 (PUBACK), 3.12 (PINGREQ).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from shared import limits
from shared.errors import ProtocolViolation

PINGREQ: Final = b"\xc0\x00"
_PUBLISH: Final = 0x30
_PUBACK: Final = 0x40
_MAX_LENGTH_BYTES: Final = 4


class Published(NamedTuple):
    """A message; `mid` is its number, 0 when it needs no acknowledgement."""

    topic: str
    payload: bytes
    mid: int


class PacketStream:
    """Bytes that have come, and what of them is for the client."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._passing = 0

    def feed(self, data: bytes) -> None:
        """More has come."""
        if self._at:
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def take(self, most: int) -> list[Published]:
        """Messages that come next, up to so many, as far as they are here whole and nothing for the client is between.

        Raises:
            ProtocolViolation: a packet is larger than the broker was told that we take.
        """
        found: list[Published] = []
        while not self._passing and len(found) < most:
            bounds = self._next()
            if bounds is None:
                break
            body, end = bounds
            message = None
            if self._buffer[self._at] & 0xF0 == _PUBLISH:
                message = _parse(self._buffer, self._at, body, end)
            if message is None:
                self._passing = end - self._at
                break
            found.append(message)
            self._at = end
        return found

    def read(self, most: int) -> bytes:
        """Bytes for the client, none when there are none now; only what `take` has left for it."""
        count = min(most, self._passing)
        data = bytes(self._buffer[self._at : self._at + count])
        self._at += count
        self._passing -= count
        return data

    def _next(self) -> tuple[int, int] | None:
        """Where the next packet's body begins and ends; None while it is not here whole."""
        length = 0
        for place in range(_MAX_LENGTH_BYTES):
            at = self._at + 1 + place
            if at >= len(self._buffer):
                return None
            byte = self._buffer[at]
            length |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                end = at + 1 + length
                if end - self._at > limits.MAX_MQTT_PACKET_BYTES:
                    raise ProtocolViolation(f"a packet of {length} bytes", code="protocol.too_large")
                return None if end > len(self._buffer) else (at + 1, end)
        # No length at all: the client says what is to be said of it.
        return self._at + 1, len(self._buffer)


def puback(mid: int) -> bytes:
    """The acknowledgement of a message: success, no properties."""
    return bytes((_PUBACK, 2, mid >> 8, mid & 0xFF))


def _parse(buffer: bytearray, start: int, body: int, end: int) -> Published | None:
    """The message, None for what the client should see: QoS 2, and what is no message."""
    qos = buffer[start] >> 1 & 3
    topic_end = body + 2 + (buffer[body] << 8 | buffer[body + 1]) if body + 2 <= end else end
    at = topic_end + (2 if qos else 0)
    if qos > 1 or at >= end:
        return None
    mid = buffer[topic_end] << 8 | buffer[topic_end + 1] if qos else 0
    # Properties are skipped: what matters is in the payload. Their length has one byte, or more.
    properties = buffer[at]
    if properties >= 0x80:
        properties, shift = 0, 0
        while at < end and shift < 7 * _MAX_LENGTH_BYTES:
            properties |= (buffer[at] & 0x7F) << shift
            shift += 7
            if buffer[at] < 0x80:
                break
            at += 1
    payload = at + 1 + properties
    if payload > end or (qos and not mid):
        return None
    try:
        topic = buffer[body + 2 : topic_end].decode()
    except UnicodeDecodeError:
        return None
    return Published(topic, bytes(buffer[payload:end]), mid)
