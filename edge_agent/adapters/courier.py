"""The MQTT link, as `edge_agent.ports.Courier`; the agent's only importer of paho.

Rules of this file:
1. One fresh paho client per connection: no session, no queue and no packet id outlives the link, and reconnecting is
   the driver's decision, not the library's. What an old client still calls is ignored.
2. paho's thread only enqueues to the event loop; all state here belongs to the loop.
3. Small windows: 20 messages in flight, 64 handed over in all. The durable queue is the outbox, never paho's.
4. A message counts as sent only to the broker; that the *hub* has it is said by the hub's own acknowledgement.

Not here: topics and messages (`shared/wire`), when to connect again (`edge_agent/core/link.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.adapters.tls import DatedSocket, dated_context, refused_certificate
from shared.errors import TransferError, TransferRefused, Unreachable
from shared.ids import DeviceId
from shared.limits import MAX_MQTT_PACKET_BYTES
from shared.telemetry import BatchId

CONNECT_MS: Final = 10_000
DISCONNECT_MS: Final = 2_000
KEEPALIVE_S: Final = 20
VERDICT_MS: Final = 500
MAX_INFLIGHT: Final = 20
MAX_WAITING: Final = 64
PACKET_TOO_LARGE: Final = 0x95

_TRY_LATER: Final = frozenset({0x83, 0x88, 0x89, 0x8B, 0x97, 0x9C, 0x9D, 0x9F})
"""CONNACK reasons that pass by themselves (MQTT 5.0, section 3.2.2.2): busy, unavailable, quota, moved, rate."""


def broker_context(
    *, ca_path: Path, certificate_path: Path, key_path: Path, now_ms: Callable[[], int]
) -> ssl.SSLContext:
    """TLS 1.3 with the device's certificate, trusting this CA only, dated by `now_ms`; raises TransferRefused."""
    return dated_context(
        ca_path,
        now_ms=now_ms,
        certificate_path=certificate_path,
        key_path=key_path,
        minimum=ssl.TLSVersion.TLSv1_3,
        sockets=_BrokerSocket,
    )


class _BrokerSocket(DatedSocket):
    """A TLS socket that knows the broker's verdict on the device's certificate when its handshake returns.

    In TLS 1.3 the client is done before the server has looked at its certificate (RFC 8446, section 2). A broker
    never speaks first, so what arrives now is its session tickets or its alert; had we sent CONNECT meanwhile, the
    alert would often be lost to a reset. A failed handshake closes the socket; paho leaves that to the collector.
    """

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
            self._hear_verdict()
        except BaseException:
            self.close()
            raise

    def _hear_verdict(self) -> None:
        readable, _, _ = select.select([self], [], [], VERDICT_MS / 1000)
        if not readable:  # a broker without session tickets; its verdict shows at the first read
            return
        before = self.gettimeout()
        self.setblocking(False)
        try:
            if self.read(1) == b"":
                raise ConnectionResetError("closed right after the handshake")
        except ssl.SSLWantReadError:
            pass
        finally:
            self.settimeout(before)


@dataclass(slots=True, eq=False)
class _Link:
    """One connection attempt and, when it succeeds, the connection; compared by identity."""

    client: Client
    ready: asyncio.Future[None]
    online: bool = False
    leaving: bool = False
    window: int = MAX_WAITING
    packet_bytes: int = MAX_MQTT_PACKET_BYTES
    sent: dict[int, tuple[str, BatchId | None]] = field(default_factory=dict)

    def heed(self, properties: Properties | None) -> None:
        """Keep to what the broker said of itself in its CONNACK (MQTT 5.0, sections 3.2.2.3.3 and 3.2.2.3.6)."""
        self.packet_bytes = min(MAX_MQTT_PACKET_BYTES, getattr(properties, "MaximumPacketSize", MAX_MQTT_PACKET_BYTES))
        at_once = getattr(properties, "ReceiveMaximum", MAX_INFLIGHT)
        # paho would send MAX_INFLIGHT at once whatever the broker says; where that is too much, nothing waits in it.
        self.window = MAX_WAITING if at_once >= MAX_INFLIGHT else at_once


class MqttCourier:
    """`Courier` on paho-mqtt, MQTT 5, mutual TLS.

    `on_message(topic, payload)` and `on_lost(reason)` run on the event loop; `on_lost` once per lost connection and
    never after `disconnect`. `on_refused(topic, ref, code, reason)` tells of a message that the broker acknowledged
    with a failure (not allowed, quota), or that is larger than it takes, which it is never shown: it will not arrive.
    `on_taken(ref)` tells of one with a ref that it acknowledged without a failure.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        device: DeviceId,
        context: ssl.SSLContext,
        on_message: Callable[[str, bytes], None],
        on_lost: Callable[[str], None],
        on_refused: Callable[[str, BatchId | None, int, str], None] | None = None,
        on_taken: Callable[[BatchId], None] | None = None,
        connect_ms: int = CONNECT_MS,
        keepalive_s: int = KEEPALIVE_S,
    ) -> None:
        self._host = host
        self._port = port
        self._device = device
        self._context = context
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._on_taken = on_taken
        self._connect_ms = connect_ms
        self._keepalive_s = keepalive_s
        self._link: _Link | None = None
        self._starting: asyncio.Future[None] | None = None

    async def connect(self, *, will_topic: str, will_payload: bytes, subscribe: str) -> None:
        """Connect, subscribe and return once the broker has granted the subscription.

        Raises:
            Unreachable: nobody answered within the deadline, or the broker asks to try later.
            TransferRefused: the broker refuses this device, its certificate or the subscription.
        """
        await self.disconnect()
        await self._earlier_attempt()
        loop = asyncio.get_running_loop()
        link = _Link(client=self._client(will_topic, will_payload), ready=loop.create_future())
        self._link = link
        self._wire(link, loop, subscribe)
        try:
            async with asyncio.timeout(self._connect_ms / 1000):
                self._starting = loop.run_in_executor(None, self._start, link)
                self._starting.add_done_callback(_look_at)
                await asyncio.shield(self._starting)
                await link.ready
        except TimeoutError as error:
            raise Unreachable(
                f"the broker at {self._host}:{self._port} did not answer within {self._connect_ms} ms"
            ) from error
        except ssl.SSLError as error:
            raise self._refused_tls(error) from error
        except (OSError, ValueError) as error:
            raise Unreachable(f"the broker at {self._host}:{self._port} cannot be reached: {error}") from error
        finally:
            if not link.online:
                link.leaving = True
                self._link = None
                await _end(link, within_ms=0)

    async def _earlier_attempt(self) -> None:
        """Wait for an attempt that was given up: its thread may yet connect, and the broker takes the newer of two."""
        if self._starting is None:
            return
        done, _ = await asyncio.wait([self._starting], timeout=self._connect_ms / 1000)
        if not done:
            raise Unreachable(f"an earlier attempt to reach the broker at {self._host}:{self._port} has not ended")
        self._starting = None

    def adopt(self, context: ssl.SSLContext) -> None:
        """Use this context from the next connection on: there is a new certificate."""
        self._context = context

    def publish(self, topic: str, payload: bytes, *, ref: BatchId | None = None) -> bool:
        """Hand over one QoS 1 message; False when not connected or the window is full: keep it and try later.

        What is larger than the broker takes is not sent: `on_refused` is told soon after this returned.
        """
        link = self._link
        if link is None or not link.online or len(link.sent) >= link.window:
            return False
        if _packet_bytes(topic, payload) > link.packet_bytes:
            reason = f"Packet too large: the broker takes {link.packet_bytes} bytes"
            asyncio.get_running_loop().call_soon(self._tell_refused, link, topic, ref, PACKET_TOO_LARGE, reason)
            return True
        info = link.client.publish(topic, payload, qos=1)
        # Anything but success is not promised: a client that lost its link is never used again, queue and all.
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        link.sent[info.mid] = (topic, ref)
        return True

    def holds(self, ref: BatchId) -> bool:
        """Whether a message of this ref was handed over on this connection and the broker has yet to acknowledge it."""
        return self._link is not None and any(ref == own for _, own in self._link.sent.values())

    async def disconnect(self) -> None:
        """Leave without triggering the last will, after what was handed over where the broker still takes it."""
        link = self._link
        self._link = None
        if link is not None:
            link.leaving = True
            await _end(link, within_ms=DISCONNECT_MS)

    def _client(self, will_topic: str, will_payload: bytes) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._device,
            protocol=MQTTProtocolVersion.MQTTv5,
            reconnect_on_failure=False,
        )
        client.tls_set_context(self._context)
        client.max_inflight_messages_set(MAX_INFLIGHT)
        client.max_queued_messages_set(MAX_WAITING)
        client.connect_timeout = max(1.0, self._connect_ms / 1000)
        client.will_set(will_topic, will_payload, qos=1, retain=False)
        return client

    def _start(self, link: _Link) -> None:
        """In a thread of its own: name resolution, TCP and TLS block, each within paho's connect timeout."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho leaves this one bare
        properties.MaximumPacketSize = MAX_MQTT_PACKET_BYTES
        properties.SessionExpiryInterval = 0
        link.client.connect(
            self._host, self._port, keepalive=self._keepalive_s, clean_start=True, properties=properties
        )
        if not link.leaving:
            link.client.loop_start()
        if link.leaving:  # given up while the handshake was under way
            _cut(link.client)

    def _wire(self, link: _Link, loop: asyncio.AbstractEventLoop, subscribe: str) -> None:
        """Make paho's callbacks enqueue, and nothing else."""

        def enqueue(step: Callable[..., None], *arguments: object) -> None:
            # The loop may have been closed under a thread that is still saying something; nobody listens any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(step, link, *arguments)

        def on_connect(client: Client, _: Any, __: ConnectFlags, reason: ReasonCode, said: Properties | None) -> None:
            if reason.is_failure:
                enqueue(self._refused, reason.value, f"the broker refuses this device: {reason}")
            else:
                enqueue(_Link.heed, said)
                client.subscribe(subscribe, options=SubscribeOptions(qos=1))

        def on_subscribe(_: Client, __: Any, ___: int, reasons: list[ReasonCode], ____: Properties | None) -> None:
            if any(reason.is_failure for reason in reasons):
                enqueue(self._refused, reasons[0].value, f"the broker refuses the subscription: {reasons[0]}")
            else:
                enqueue(self._came_online)

        def on_disconnect(
            _: Client, __: Any, ___: DisconnectFlags, reason: ReasonCode, ____: Properties | None
        ) -> None:
            enqueue(self._lost, str(reason))

        def on_publish(_: Client, __: Any, mid: int, reason: ReasonCode, ___: Properties | None) -> None:
            enqueue(self._acknowledged, mid, reason.value if reason.is_failure else 0, str(reason))

        def on_message(_: Client, __: Any, message: MQTTMessage) -> None:
            enqueue(self._arrived, message.topic, bytes(message.payload))

        def on_socket_open(_: Client, __: Any, sock: Any) -> None:
            # Small messages in a window: with Nagle's algorithm each would wait for the answer to the one before.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        link.client.on_connect = on_connect
        link.client.on_subscribe = on_subscribe
        link.client.on_disconnect = on_disconnect
        link.client.on_publish = on_publish
        link.client.on_message = on_message
        link.client.on_socket_open = on_socket_open

    def _refused(self, link: _Link, reason_code: int, message: str) -> None:
        if not link.ready.done():
            hint = "run `outrider-agent doctor`; the device may have been revoked or renamed"
            error = Unreachable(message) if reason_code in _TRY_LATER else TransferRefused(message, hint=hint)
            link.ready.set_exception(error)

    def _came_online(self, link: _Link) -> None:
        if link is self._link and not link.ready.done():
            link.online = True
            link.ready.set_result(None)

    def _lost(self, link: _Link, reason: str) -> None:
        if not link.ready.done():
            link.ready.set_exception(Unreachable(f"the broker closed the connection: {reason}"))
        elif link is self._link and link.online:
            self._link = None
            _silence(link.client)
            self._on_lost(reason)

    def _acknowledged(self, link: _Link, mid: int, failure: int, reason: str) -> None:
        topic, ref = link.sent.pop(mid, ("", None))
        if failure and topic:
            self._tell_refused(link, topic, ref, failure, reason)
        elif ref is not None and link is self._link and self._on_taken is not None:
            self._on_taken(ref)

    def _tell_refused(self, link: _Link, topic: str, ref: BatchId | None, code: int, reason: str) -> None:
        if link is self._link and self._on_refused is not None:
            self._on_refused(topic, ref, code, reason)

    def _arrived(self, link: _Link, topic: str, payload: bytes) -> None:
        if link is self._link:
            self._on_message(topic, payload)

    def _refused_tls(self, error: ssl.SSLError) -> TransferError:
        where = f"{self._host}:{self._port}"
        if isinstance(error, ssl.SSLCertVerificationError):
            return refused_certificate(f"the broker at {where}", error, code="transfer.broker_certificate")
        if "ALERT" in (error.reason or ""):
            return TransferRefused(
                f"the broker at {where} refused this device's certificate: {error.reason}",
                code="transfer.device_certificate",
                hint="run `outrider-agent doctor`; the certificate may have expired or been revoked",
            )
        return Unreachable(f"the broker at {where} cannot be reached: {error.reason or error}")


def _packet_bytes(topic: str, payload: bytes) -> int:
    """What a PUBLISH of QoS 1 without properties takes on the wire (MQTT 5.0, section 3.3)."""
    remaining = 2 + len(topic.encode()) + 2 + 1 + len(payload)
    length_bytes = 1
    while remaining >> (7 * length_bytes):
        length_bytes += 1
    return 1 + length_bytes + remaining


def _look_at(starting: asyncio.Future[None]) -> None:
    """What became of an attempt was told, or nobody waits for it any more; asyncio need not report it."""
    if not starting.cancelled():
        starting.exception()


async def _end(link: _Link, *, within_ms: int) -> None:
    """Say goodbye, wait that long for the thread to end by itself, then cut the socket under it."""
    if not link.ready.cancel() and not link.ready.cancelled():
        link.ready.exception()  # looked at, so that asyncio does not report it as forgotten
    client = link.client
    try:
        if within_ms:
            client.disconnect()
            if await _joined(client, within_ms=within_ms):
                return
        _cut(client)
        await _joined(client, within_ms=DISCONNECT_MS)
    finally:
        _silence(client)


async def _joined(client: Client, *, within_ms: int) -> bool:
    try:
        async with asyncio.timeout(within_ms / 1000):
            await asyncio.to_thread(client.loop_stop)
    except TimeoutError:
        return False
    return True


def _silence(client: Client) -> None:
    """Take the callbacks away: what an old client still has to say is void.

    The cycle that they form with it would also keep its sockets open until the garbage collector comes round.
    """
    client.on_connect = None
    client.on_subscribe = None
    client.on_disconnect = None
    client.on_publish = None
    client.on_message = None
    client.on_socket_open = None


def _cut(client: Client) -> None:
    """End the connection without a word, which makes paho's thread return whatever it waits for."""
    sock: Any = client.socket()
    if isinstance(sock, socket.socket):
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
