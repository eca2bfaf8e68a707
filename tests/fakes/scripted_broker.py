"""A broker that does what a test says: it lets the hub in or not, and answers what comes or stays silent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from cloud_hub.ground.courier import LinkSettings
from tests.fakes.pki import TestCa

CONNECT, SUBSCRIBE, PINGREQ = 1, 8, 12
GRANTED = 1
QUOTA_EXCEEDED = 0x97
NOT_AUTHORIZED = 0x87


class ScriptedBroker:
    """Speaks as much MQTT 5 as the hub's courier needs.

    Attributes:
        connack: the reason that a CONNECT is answered with; None answers nothing.
        suback: the same for a SUBSCRIBE.
        answers_pings: whether a PINGREQ is answered.
        connections, pings: how many came.
        acknowledged: numbers of messages, in the order in which their PUBACK came.
        context: what the next connections are made with.
    """

    def __init__(self) -> None:
        self.connack: int | None = 0
        self.suback: int | None = GRANTED
        self.answers_pings = True
        self.connections = 0
        self.pings = 0
        self.acknowledged: list[int] = []
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._writer: asyncio.StreamWriter | None = None
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def end(self) -> None:
        """Hang up on everybody, and see the connections closed."""
        for writer in self._serving.values():
            writer.transport.abort()
        async with asyncio.timeout(5):
            await asyncio.gather(*self._serving, return_exceptions=True)

    def publish(self, mid: int, payload: bytes) -> None:
        """Send a message to the hub."""
        assert self._writer is not None
        topic = b"outrider/1/pi-1/up/telemetry"
        body = struct.pack("!H", len(topic)) + topic + struct.pack("!HB", mid, 0) + payload
        self._writer.write(bytes([0x32]) + _length(len(body)) + body)

    def reset(self) -> None:
        """End the connection as a machine does that knows nothing of it."""
        assert self._writer is not None
        raw: socket.socket = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until it ends."""
        self.connections += 1
        self._writer = writer
        task = asyncio.current_task()
        assert task is not None
        self._serving[task] = writer
        try:
            while True:
                kind, body = await _packet(reader)
                if answer := self._answer(kind, body):
                    writer.write(answer)
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        finally:
            del self._serving[task]

    def _answer(self, kind: int, body: bytes) -> bytes:
        if kind == CONNECT and self.connack is not None:
            return bytes([0x20, 3, 0, self.connack, 0])
        if kind == SUBSCRIBE and self.suback is not None:
            return bytes([0x90, 4, body[0], body[1], 0, self.suback])
        if kind == PINGREQ:
            self.pings += 1
            return b"\xd0\x00" if self.answers_pings else b""
        if kind == 4:
            self.acknowledged.append(body[0] << 8 | body[1])
        return b""


@contextlib.asynccontextmanager
async def scripted_broker(folder: Path) -> AsyncIterator[tuple[ScriptedBroker, LinkSettings]]:
    """A broker that listens, and how the hub comes in there."""
    pki = TestCa(folder)
    server, client = pki.server(), pki.client("hub")
    broker = ScriptedBroker()
    broker.context.load_cert_chain(server.certificate, server.key)
    listening = await asyncio.start_server(broker.serve, "127.0.0.1", 0, ssl=broker.context)
    try:
        yield (
            broker,
            LinkSettings(
                host="localhost",
                port=listening.sockets[0].getsockname()[1],
                name="hub",
                ca=pki.path,
                certificate=client.certificate,
                key=client.key,
            ),
        )
    finally:
        listening.close()
        await broker.end()


async def _packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    kind = (await reader.readexactly(1))[0] >> 4
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return kind, await reader.readexactly(length)


def _length(number: int) -> bytes:
    encoded = bytearray()
    while True:
        number, digit = number >> 7, number & 0x7F
        encoded.append(digit | (0x80 if number else 0))
        if not number:
            return bytes(encoded)
