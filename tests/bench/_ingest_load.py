"""Devices that send batches through bare sockets: each keeps a window on the way, and sends when one is answered.

Everything that is sent is made before the clock starts. A device's batches are readings, a hundred to a batch, as a
device with four sensors makes them. `counted` lets the devices of a run be paced by the hub's own answers, or by the
progress that the bare consumer tells.
"""

from __future__ import annotations

import itertools
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from shared.ids import DeviceId
from shared.telemetry import BatchId, Reading, Record, RecordClass
from shared.wire import topics
from shared.wire.columns import encode_columns
from shared.wire.envelope import Envelope, encode_envelope
from shared.wire.messages import Ack, Batch, digest_of, encode_body

RECORDS = 100
EPOCH = "0123456789abcdef"
_QUIET_S = 30.0

_envelopes = msgspec.msgpack.Decoder(Envelope)
_acks = msgspec.msgpack.Decoder(Ack)


@dataclass
class Run:
    """What one run gave.

    Attributes:
        batches: how many were answered.
        seconds: from the first that was sent to the last answer.
        waits_s: how long each answer took.
    """

    batches: int = 0
    seconds: float = 0.0
    waits_s: list[float] = field(default_factory=list)


def packets(device: DeviceId, count: int) -> list[bytes]:
    """A device's batches as PUBLISH packets of QoS 1, numbered from 1."""
    return [_publish(topics.up(device, "telemetry"), _message(device, number), number + 1) for number in range(count)]


def _message(device: DeviceId, number: int) -> bytes:
    first = number * RECORDS + 1
    records = [
        Record(
            seq=first + n,
            at_ms=1_800_000_000_000 + 1000 * ((first + n) // 4) + n % 4,
            body=Reading(name=f"sensor_{n % 4}_c", value=20 + (first + n) / 7),
        )
        for n in range(RECORDS)
    ]
    columns = encode_columns(records)
    claim = BatchId(
        epoch=EPOCH,
        klass=int(RecordClass.READING),
        first=first,
        last=first + RECORDS - 1,
        digest=digest_of(columns=columns, gap=None),
    )
    envelope = Envelope(
        v=1,
        id=f"{number:016x}",
        kind="batch",
        device=device,
        boot=1,
        wall_ms=1_800_000_000_000,
        mono_ms=number,
        body=encode_body(Batch(batch=claim, columns=columns)),
    )
    return encode_envelope(envelope)


class Sender:
    """One device's connection."""

    def __init__(self, device: DeviceId, port: int, sent: Sequence[bytes], *, listen: str) -> None:
        self._packets = sent
        self._next = 0
        self._sent_at: dict[int, float] = {}
        self._buffer = bytearray()
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(_connect(device))
        self.socket.sendall(_subscribe(listen))
        # Both answers, so that no message comes before there is someone to hear it.
        while [kind >> 4 for kind, _ in self.read()] != [9]:
            pass
        self.socket.setblocking(False)

    @property
    def on_the_way(self) -> int:
        """Batches that are not answered."""
        return len(self._sent_at)

    def send(self, many: int, now: float) -> int:
        """Send the next ones; how many there were."""
        begin, end = self._next, min(self._next + many, len(self._packets))
        if begin == end:
            return 0
        for number in range(begin, end):
            self._sent_at[number * RECORDS + 1] = now
        self._next = end
        self.socket.setblocking(True)
        self.socket.sendall(b"".join(self._packets[begin:end]))
        self.socket.setblocking(False)
        return end - begin

    def answered(self, first: int, now: float) -> float | None:
        """The batch that begins here is answered: how long it took; None for one that was answered before."""
        sent_at = self._sent_at.pop(first, None)
        return None if sent_at is None else now - sent_at

    def read(self) -> list[tuple[int, bytes]]:
        """Packets that have come: first byte, and what follows the length."""
        data = self.socket.recv(65536)
        if not data:
            raise RuntimeError("the broker closed the connection")
        self._buffer += data
        found = []
        at = 0
        while (packet := _packet(self._buffer, at)) is not None:
            kind, body, at = packet
            found.append((kind, body))
        del self._buffer[:at]
        return [packet for packet in found if packet[0] >> 4 != 4 and packet[0] >> 4 != 2]


def paced_by_answers(senders: Sequence[Sender], *, window: int) -> Run:
    """Send all batches of all devices, each device with a window, until all are answered by the hub."""
    run, began = Run(), time.perf_counter()
    for sender in senders:
        sender.send(window, began)
    with selectors.DefaultSelector() as selector:
        for sender in senders:
            selector.register(sender.socket, selectors.EVENT_READ, sender)
        while any(sender.on_the_way for sender in senders):
            ready = selector.select(_QUIET_S)
            if not ready:
                raise RuntimeError(f"no answer for {_QUIET_S} s after {run.batches} batches")
            for key, _ in ready:
                sender = key.data
                packets_in = sender.read()
                now = time.perf_counter()
                waits = [
                    wait
                    for _, body in packets_in
                    for first in _firsts(body)
                    if (wait := sender.answered(first, now)) is not None
                ]
                run.batches += len(waits)
                run.waits_s += waits
                sender.send(len(waits), now)
    run.seconds = time.perf_counter() - began
    return run


def paced_by_progress(senders: Sequence[Sender], listener: Sender, *, window: int, batches: int) -> Run:
    """Send batches with so many on the way in total, until the consumer has had this many."""
    run, began = Run(), time.perf_counter()
    turn = itertools.cycle(senders)
    sent = had = 0
    listener.socket.setblocking(True)
    listener.socket.settimeout(_QUIET_S)
    while had < batches:
        while sent < batches and sent - had < window * len(senders):
            sent += next(turn).send(window // 2, 0.0)
        for _, body in listener.read():
            had = max(had, int(_payload(body, qos=0)))
        for sender in senders:
            try:
                sender.read()
            except BlockingIOError:
                continue
    run.seconds, run.batches = time.perf_counter() - began, had
    return run


def _firsts(body: bytes) -> list[int]:
    envelope = _envelopes.decode(_payload(body, qos=0))
    firsts = []
    for verdict in _acks.decode(envelope.body).verdicts:
        if verdict.status != "stored":
            raise RuntimeError(f"a batch was not stored: {verdict}")
        firsts.append(verdict.batch.first)
    return firsts


def _payload(body: bytes, *, qos: int) -> bytes:
    """Of a PUBLISH: behind topic, number and properties."""
    at = 2 + int.from_bytes(body[:2], "big") + (2 if qos else 0)
    return body[at + 1 + body[at] :]


def _packet(buffer: bytearray, at: int) -> tuple[int, bytes, int] | None:
    if len(buffer) < at + 2:
        return None
    length, shift, place = 0, 0, at + 1
    while True:
        if place >= len(buffer):
            return None
        byte = buffer[place]
        length |= (byte & 127) << shift
        place += 1
        if not byte & 128:
            break
        shift += 7
    if len(buffer) < place + length:
        return None
    return buffer[at], bytes(buffer[place : place + length]), place + length


def _framed(kind: int, body: bytes) -> bytes:
    length, rest = bytearray(), len(body)
    while True:
        rest, digit = rest >> 7, rest & 127
        length.append(digit | (128 if rest else 0))
        if not rest:
            return bytes([kind]) + bytes(length) + body


def _text(text: str) -> bytes:
    return len(text).to_bytes(2, "big") + text.encode()


def _connect(name: str) -> bytes:
    # MQTT 5, clean start, keepalive 0, no properties.
    return _framed(0x10, _text("MQTT") + bytes([5, 2, 0, 0, 0]) + _text(name))


def _subscribe(topic: str) -> bytes:
    return _framed(0x82, (1).to_bytes(2, "big") + b"\0" + _text(topic) + b"\0")


def _publish(topic: str, payload: bytes, mid: int) -> bytes:
    return _framed(0x32, _text(topic) + mid.to_bytes(2, "big") + b"\0" + payload)
