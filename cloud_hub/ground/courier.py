"""The hub's link to the broker. The only importer of the MQTT client in this process.

Rules:
1. The client has no thread of its own: the event loop reads when there is something and writes what a turn of it has
   brought about, all in one piece. What has come in is handed over together, past the client (`packets.py`), which
   keeps the connection and sends.
2. A message is acknowledged to the broker after it was dealt with. So the broker never has more than `WINDOW` of them
   on their way to us, and we read no more while they hold `MAX_HELD_BYTES`: a slow database slows the senders instead
   of filling our memory. The link stays up meanwhile: the broker hears from us, and its silence is not counted.
3. An acknowledgement belongs to the connection on which the message came: after a reconnect its number means another
   message, so it is dropped and the broker sends again.
   Acknowledgements go out in the order in which messages were dealt with, not in that of their arrival: one that takes
   long must not hold up all others. MQTT 5 (4.6) wants the other order; brokers match them by number.
4. Nothing rests on the broker keeping a message: both sides send again until the other's own answer is there.
5. The subscription is shared: of several who take telemetry each message reaches one.
6. A broker that does not let us in, does not grant the subscription or falls silent is left, and tried again.
7. Each connection is made with the files as they are then: the CA may have changed since, and certificates end.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from cloud_hub.ground.linesocket import LineSocket
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.packets import Published
from cloud_hub.ground.watch import Watch
from shared import limits
from shared.clock import Clock
from shared.errors import ConfigError, Unreachable
from shared.wire import topics

logger = logging.getLogger(__name__)

WINDOW: Final = 1000
"""While some are stored, others have to be on their way (`scripts/bench ingest`)."""
MAX_HELD_BYTES: Final = 32 * limits.MIB
READ_AT_ONCE: Final = 64
"""Messages that are read before others have their turn."""
LOOK_S: Final = 1.0
"""How often the connection is looked at (`watch.py`)."""
_PAUSES_S: Final = (1.0, 2.0, 5.0, 10.0)
_KEEPALIVE_S: Final = 30
_SESSION_S: Final = 3600
_MAX_QUEUED: Final = 10_000
_TAKEN_OVER: Final = 0x8E


class Inbound:
    """A message from the broker; call `settle` once when it has been dealt with, whatever the outcome."""

    __slots__ = ("_courier", "_generation", "_mid", "payload", "topic")

    def __init__(self, topic: str, payload: bytes, *, courier: HubCourier, mid: int, generation: int) -> None:
        self.topic = topic
        self.payload = payload
        self._courier = courier
        self._mid = mid
        self._generation = generation

    def settle(self) -> None:
        """Acknowledge it to the broker."""
        self._courier.settle(self._mid, generation=self._generation, held_bytes=len(self.payload))


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Where the broker is, who the hub is there, and the PEM files with which it proves that."""

    host: str
    port: int
    name: str
    ca: Path
    certificate: Path
    key: Path


class Link:
    """Since when the hub hears its devices without a break: silence before that says nothing of them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_ms: int | None = None

    def set(self, *, is_up: bool) -> None:
        """The link has come up or is lost; saying the same again changes nothing."""
        if not is_up:
            self._since_ms = None
        elif self._since_ms is None:
            self._since_ms = self._clock.wall_ms()

    def up_since_ms(self) -> int | None:
        """When it came up; None while it is down."""
        return self._since_ms


class HubCourier:
    """An MQTT 5 client that stays connected as long as it runs.

    Args:
        settings: where and as whom.
        on_messages: called on the event loop with messages that devices sent; must not block.
        metrics: for the link's gauge.
        link: told how the connection stands.
    """

    def __init__(
        self,
        settings: LinkSettings,
        *,
        on_messages: Callable[[Sequence[Inbound]], None],
        metrics: Metrics,
        link: Link,
    ) -> None:
        self._settings = settings
        self._link = link
        self._on_messages = on_messages
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()
        self._ready = asyncio.Event()
        self._socket: LineSocket | None = None
        self._is_write_planned = False
        self._generation = 0
        self._arrived: list[Inbound] = []
        self._held_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._trouble = ""
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=settings.name, protocol=mqtt.MQTTv5, manual_ack=True
        )
        self._client.max_inflight_messages_set(WINDOW)
        self._client.max_queued_messages_set(_MAX_QUEUED)

    @property
    def is_connected(self) -> bool:
        """Whether messages can go out now."""
        return self._connected.is_set()

    async def run(self, *, ready: asyncio.Event) -> None:
        """Connect, and connect again whenever the link is lost, until cancelled; sets `ready` when first connected."""
        self._loop = asyncio.get_running_loop()
        self._ready = ready
        client = self._client
        # What cannot be used at the start cannot be used at all; later on it may be half of a change.
        _context(self._settings)
        client.tls_set_context(_ContextOfNow(self._settings))
        client.on_connect = self._connect_answered
        client.on_subscribe = self._subscribed
        client.on_disconnect = self._disconnected
        client.on_socket_register_write = self._plan_write
        client.on_socket_close = self._socket_closes
        failures = 0
        try:
            while True:
                # With full hands not even the broker's answer could be read.
                await self._room.wait()
                self._lost.clear()
                if await self._connect():
                    await self._attend()
                failures = 0 if self._connected.is_set() else failures + 1
                self._set_link(False)
                await asyncio.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
        finally:
            client.disconnect()
            self._write()

    async def publish(self, topic: str, payload: bytes, *, qos: Literal[0, 1] = 1) -> None:
        """Hand a message to the connection; raises Unreachable when there is none or too much waits.

        Args:
            topic, payload: what to send.
            qos: 0 for what its receiver asks for again when it does not come.
        """
        link = self._socket
        if link is None or not self._connected.is_set():
            raise Unreachable("the hub is not connected to the broker", code="transfer.broker")
        if not qos and link.waiting_bytes > limits.MAX_MQTT_PACKET_BYTES:
            raise Unreachable("the broker takes no more: it is slow", code="transfer.broker")
        info = self._client.publish(topic, payload, qos=qos)
        if info.rc not in (mqtt.MQTT_ERR_SUCCESS, mqtt.MQTT_ERR_NO_CONN):
            raise Unreachable(f"the broker takes no more: {mqtt.error_string(info.rc)}", code="transfer.broker")

    def settle(self, mid: int, *, generation: int, held_bytes: int) -> None:
        """Acknowledge a message of this connection; of another one it is forgotten."""
        self._held_bytes -= held_bytes
        if not self._room.is_set() and self._held_bytes < MAX_HELD_BYTES // 2:
            self._room.set()
            self._listen()
        link = self._socket
        if mid and generation == self._generation and link is not None:
            link.acknowledge(mid)
            self._plan_write()

    # The connection's life.

    async def _connect(self) -> bool:
        """Whether a connection is made and the broker is asked to let us in; takes a few seconds at most."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = WINDOW
        properties.SessionExpiryInterval = _SESSION_S
        properties.MaximumPacketSize = limits.MAX_MQTT_PACKET_BYTES

        def connect() -> None:
            # An external broker keeps what devices say while the hub restarts; a managed one ends with it anyway.
            self._client.connect(
                self._settings.host,
                self._settings.port,
                keepalive=_KEEPALIVE_S,
                clean_start=False,
                properties=properties,
            )

        try:
            await asyncio.to_thread(connect)
        except (OSError, ValueError) as error:
            logger.debug("the broker cannot be reached: %s", error)
            return False
        except ConfigError as error:
            self._tell(error.message)
            return False
        link = self._client.socket()
        assert isinstance(link, LineSocket)
        link.attach(self._published, most=READ_AT_ONCE)
        self._socket = link
        return True

    async def _attend(self) -> None:
        """Read and write until the link is lost."""
        self._generation += 1
        self._listen()
        self._write()
        watch = Watch()
        while not self._lost.is_set():
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._lost.wait()
            except TimeoutError:
                self._look(watch)

    def _look(self, watch: Watch) -> None:
        """See whether the broker is still there, and let it see that we are."""
        link = self._socket
        if link is None:
            return
        has_heard, link.has_heard = link.has_heard, False
        match watch.look(is_up=self._connected.is_set(), has_heard=has_heard, can_hear=self._room.is_set()):
            case "ping":
                link.ping()
                self._plan_write()
            case "unanswered":
                self._tell("the broker does not answer")
                self._lose()
            case "silent":
                self._tell("the broker has fallen silent")
                self._lose()
            case "wait":
                pass

    def _lose(self) -> None:
        """Give the connection up; the client finds it lost."""
        if self._socket is not None:
            self._socket.abandon()
            self._client.loop_read()

    def _listen(self) -> None:
        """Read whenever something comes, and what is in the buffer now: that does not make the socket readable."""
        if self._socket is not None and self._loop is not None:
            self._loop.add_reader(self._socket.fileno(), self._readable)
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        """Read what has come, but not for so long that others starve, nor more than may be held."""
        link, loop = self._socket, self._loop
        if link is None or loop is None or not self._room.is_set():
            return
        link.is_dry = False
        is_lost = self._client.loop_read() != mqtt.MQTT_ERR_SUCCESS
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            self._on_messages(arrived)
        if is_lost or self._socket is None:
            return
        if self._held_bytes > MAX_HELD_BYTES:
            self._room.clear()
            loop.remove_reader(link.fileno())
        elif not link.is_dry:
            loop.call_soon(self._readable)

    def _write(self) -> None:
        """Send what this turn of the loop has brought about; the rest when the broker takes it."""
        self._is_write_planned = False
        self._client.loop_write()
        link, loop = self._socket, self._loop
        if link is None or loop is None:
            return
        try:
            is_sent = link.flush()
        except OSError:
            # Reading would tell, but not while our hands are full; and a broken socket is writable without end.
            loop.remove_writer(link.fileno())
            self._lose()
            return
        if is_sent:
            loop.remove_writer(link.fileno())
        else:
            loop.add_writer(link.fileno(), self._write)

    # Called by the client, on the loop except while it connects.

    def _plan_write(self, *_: Any) -> None:
        if self._socket is not None and self._loop is not None and not self._is_write_planned:
            self._is_write_planned = True
            self._loop.call_soon(self._write)

    def _socket_closes(self, _client: mqtt.Client, _userdata: Any, _socket: Any) -> None:
        link, self._socket = self._socket, None
        if link is not None and self._loop is not None:
            self._loop.remove_reader(link.fileno())
            self._loop.remove_writer(link.fileno())
            self._lost.set()

    def _connect_answered(
        self, client: mqtt.Client, _userdata: Any, _flags: mqtt.ConnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if reason.is_failure:
            self._tell(f"the broker does not let the hub in: {reason}")
            return
        client.subscribe(topics.shared_up_filter(), qos=1)

    def _subscribed(self, _client: mqtt.Client, _userdata: Any, _mid: int, reasons: list[ReasonCode], _p: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._tell(f"the broker refuses the subscription: {', '.join(map(str, reasons))}")
            # Not here: the client is reading.
            asyncio.get_running_loop().call_soon(self._lose)
            return
        self._set_link(True)

    def _disconnected(
        self, _client: mqtt.Client, _userdata: Any, _flags: mqtt.DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if reason.value == _TAKEN_OVER:
            logger.error("another client took over the link: a second hub has the same broker.hub_name")

    def _published(self, messages: Sequence[Published]) -> None:
        for topic, payload, mid in messages:
            self._held_bytes += len(payload)
            self._arrived.append(Inbound(topic, payload, courier=self, mid=mid, generation=self._generation))

    def _tell(self, trouble: str) -> None:
        """Log what is wrong with the broker, once until it is something else."""
        if trouble != self._trouble:
            self._trouble = trouble
            logger.error("no link to the broker: %s", trouble)

    def _set_link(self, is_up: bool) -> None:
        if is_up and not self._connected.is_set():
            logger.info("link to the broker is up")
            self._trouble = ""
            self._connected.set()
            self._ready.set()
        elif not is_up and self._connected.is_set():
            logger.warning("link to the broker is lost")
            self._connected.clear()
        self._link.set(is_up=is_up)
        self._metrics.link_up.set(1 if is_up else 0)


class _ContextOfNow(ssl.SSLContext):
    """Reads the files for each connection: the client takes a context once and for all, and this one stands for many.

    Loading them into one context again would not do, which goes on trusting a CA that was there before.
    """

    _settings: LinkSettings

    def __new__(cls, settings: LinkSettings) -> Self:
        made = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        made._settings = settings
        return made

    def wrap_socket(self, sock: socket.socket, *arguments: Any, **named: Any) -> ssl.SSLSocket:
        """A socket of a new context; raises ConfigError."""
        try:
            return _context(self._settings).wrap_socket(sock, *arguments, **named)
        except ConfigError:
            # The client forgets what it could not wrap.
            sock.close()
            raise


def _context(settings: LinkSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(settings.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(settings.certificate, settings.key)
        context.sslsocket_class = LineSocket
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the hub's client certificate cannot be used: {error}", code="config.tls") from error
    return context
