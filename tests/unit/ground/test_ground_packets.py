"""Messages are found in any bytes, however they are cut; the client gets all else as it came, hostile bytes too."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.ground.packets import PacketStream, Published, puback
from shared import limits
from shared.errors import ProtocolViolation


def length_of(number: int) -> bytes:
    """A length as MQTT writes it."""
    out = bytearray()
    while True:
        number, digit = number >> 7, number & 127
        out.append(digit | (128 if number else 0))
        if not number:
            return bytes(out)


def packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + length_of(len(body)) + body


def publish(topic: str, payload: bytes, mid: int, *, properties: bytes = b"", flags: int = 0) -> bytes:
    name = topic.encode()
    number = mid.to_bytes(2, "big") if mid else b""
    body = len(name).to_bytes(2, "big") + name + number + length_of(len(properties)) + properties + payload
    return packet(0x30 | (2 if mid else 0) | flags, body)


@dataclass(frozen=True)
class Other:
    """What is the client's."""

    data: bytes


PUBLISHED = st.builds(Published, st.text(max_size=40), st.binary(max_size=300), st.integers(0, 65535))
OTHERS = st.builds(
    lambda first, body: Other(packet(first, body)),
    st.sampled_from([0x20, 0x40, 0x90, 0xD0, 0xE0]),
    st.binary(max_size=200),
)
PROPERTIES = st.sampled_from([b"", b"\x01\x01", b"\x26\x00\x01a" + b"\x00\x90" + b"v" * 0x90])


def drained(stream: PacketStream, *, most: int = 1000) -> list[Published | bytes]:
    """All that can be had now, in order; bytes for the client in one piece each time."""
    found: list[Published | bytes] = []
    while True:
        messages = stream.take(most)
        found += messages
        data = b""
        while piece := stream.read(7):
            data += piece
        if data:
            found.append(data)
        elif not messages:
            return found


@dataclass(frozen=True)
class Sent:
    """A message with what does not matter of it."""

    message: Published
    properties: bytes
    flags: int


SENT = st.builds(Sent, PUBLISHED, PROPERTIES, st.sampled_from([0, 8, 1]))


@given(st.lists(SENT | OTHERS, max_size=12), st.data())
def test_messages_come_out_whole_and_in_order_however_the_bytes_are_cut(
    sent: list[Sent | Other], data: st.DataObject
) -> None:
    line, expected = b"", list[Published | bytes]()
    for one in sent:
        if isinstance(one, Other):
            line += one.data
            expected.append(one.data)
        else:
            assert isinstance(one, Sent)
            topic, payload, mid = one.message
            line += publish(topic, payload, mid, properties=one.properties, flags=one.flags)
            expected.append(one.message)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(line)), max_size=6)))
    stream, found = PacketStream(), list[Published | bytes]()
    for begin, end in zip([0, *cuts], [*cuts, len(line)], strict=True):
        stream.feed(line[begin:end])
        found += drained(stream)
    assert [one for one in found if isinstance(one, Published)] == [
        one for one in expected if isinstance(one, Published)
    ]
    # Bytes of packets that follow each other may come in one piece.
    assert joined(found) == joined(expected)


def messages_in(found: list[Published | bytes]) -> list[Published]:
    return [one for one in found if isinstance(one, Published)]


def joined(found: list[Published | bytes]) -> list[Published | bytes]:
    out: list[Published | bytes] = []
    for one in found:
        if isinstance(one, bytes) and out and isinstance(out[-1], bytes):
            out[-1] += one
        else:
            out.append(one)
    return out


def test_no_more_messages_are_taken_than_were_asked_for() -> None:
    stream = PacketStream()
    stream.feed(publish("a", b"1", 1) * 5)
    assert [len(stream.take(2)) for _ in range(4)] == [2, 2, 1, 0]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(packet(0x34, b"\0\1a\0\1\0x"), id="QoS 2"),
        pytest.param(packet(0x36, b"\0\1a\0\1\0x"), id="QoS 3"),
        pytest.param(packet(0x32, b"\0\1a\0\0\0x"), id="number 0"),
        pytest.param(packet(0x32, b"\0\1a\0\1"), id="ends before the properties"),
        pytest.param(packet(0x30, b""), id="empty"),
        pytest.param(packet(0x30, b"\0"), id="half a length"),
        pytest.param(packet(0x30, b"\xff\xffa\0"), id="topic longer than the packet"),
        pytest.param(packet(0x30, b"\0\1a\x7fx"), id="properties longer than the packet"),
        pytest.param(packet(0x30, b"\0\1a\xff\xff\xff\xff\x7fx"), id="properties without an end"),
        pytest.param(packet(0x30, b"\0\1a\x80"), id="half a length of properties"),
        pytest.param(packet(0x30, b"\0\1\xff\0x"), id="topic that is no text"),
        pytest.param(b"\x30\xff\xff\xff\xff\xff", id="a length without an end"),
    ],
)
def test_what_is_no_message_is_left_to_the_client(data: bytes) -> None:
    stream = PacketStream()
    stream.feed(data)
    assert drained(stream) == [data]


def test_a_packet_that_is_too_large_is_refused_before_it_is_here() -> None:
    stream = PacketStream()
    stream.feed(b"\x30" + length_of(limits.MAX_MQTT_PACKET_BYTES + 1))
    with pytest.raises(ProtocolViolation):
        stream.take(1)


@given(st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_are_messages_or_the_clients(pieces: list[bytes]) -> None:
    stream = PacketStream()
    for piece in pieces:
        stream.feed(piece)
        try:
            drained(stream)
        except ProtocolViolation:
            return


def test_an_acknowledgement_has_four_bytes() -> None:
    assert puback(0x1234) == b"\x40\x02\x12\x34"
