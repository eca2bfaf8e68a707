"""The hub's link to the broker. The only importer of the MQTT client in this process.

Rules:
1. The client's thread only hands over to the loop; nothing is decided in it.
2. A message is acknowledged to the broker after it was dealt with. So the broker never has more than `WINDOW` of them
   on their way to us, and a slow database slows the senders instead of filling our memory.
3. An acknowledgement belongs to the connection on which the message came: after a reconnect its number means another
   message, so it is dropped and the broker sends again.
4. Nothing rests on the broker keeping a message: both sides send again until the other's own answer is there.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from cloud_hub.ground.ca import HUB_NAME
from cloud_hub.ground.metrics import Metrics
from shared import limits
from shared.clock import Clock
from shared.errors import ConfigError, Unreachable
from shared.wire import topics

logger = logging.getLogger(__name__)

WINDOW: Final = 200
_KEEPALIVE_S: Final = 30
_SESSION_S: Final = 3600
_MAX_QUEUED: Final = 10_000
_TAKEN_OVER: Final = 0x8E


@dataclass(frozen=True, slots=True)
class Inbound:
    """A message from the broker; call `settle` once when it has been dealt with, whatever the outcome."""

    topic: str
    payload: bytes
    settle: Callable[[], None]


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Where the broker is, and the PEM files with which the hub proves itself."""

    host: str
    port: int
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
        on_message: called on the event loop for each message that a device sent; must not block.
        metrics: for the link's gauge.
        link: told how the connection stands.
    """

    def __init__(
        self, settings: LinkSettings, *, on_message: Callable[[Inbound], None], metrics: Metrics, link: Link
    ) -> None:
        self._settings = settings
        self._link = link
        self._on_message = on_message
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connected = asyncio.Event()
        self._generation = 0
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=HUB_NAME, protocol=mqtt.MQTTv5, manual_ack=True
        )
        self._client.max_inflight_messages_set(WINDOW)
        self._client.max_queued_messages_set(_MAX_QUEUED)
        self._client.reconnect_delay_set(min_delay=1, max_delay=10)

    @property
    def is_connected(self) -> bool:
        """Whether messages can go out now."""
        return self._connected.is_set()

    async def run(self, *, ready: asyncio.Event) -> None:
        """Connect, and connect again whenever the link is lost, until cancelled; sets `ready` when first connected."""
        self._loop = asyncio.get_running_loop()
        client = self._client
        client.tls_set_context(self._context())
        client.on_connect = self._connect_answered
        client.on_subscribe = self._subscribed
        client.on_disconnect = self._disconnected
        client.on_message = self._arrived
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.ReceiveMaximum = WINDOW
        properties.SessionExpiryInterval = _SESSION_S
        properties.MaximumPacketSize = limits.MAX_MQTT_PACKET_BYTES
        client.connect_async(
            self._settings.host,
            self._settings.port,
            keepalive=_KEEPALIVE_S,
            # An external broker keeps what devices say while the hub restarts; a managed one ends with it anyway.
            clean_start=False,
            properties=properties,
        )
        client.loop_start()
        try:
            await self._connected.wait()
            ready.set()
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.to_thread(self._leave)

    async def publish(self, topic: str, payload: bytes) -> None:
        """Hand a message to the connection, QoS 1; raises Unreachable when there is none or too much waits."""
        if not self._connected.is_set():
            raise Unreachable("the hub is not connected to the broker", code="transfer.broker")
        info = self._client.publish(topic, payload, qos=1)
        if info.rc not in (mqtt.MQTT_ERR_SUCCESS, mqtt.MQTT_ERR_NO_CONN):
            raise Unreachable(f"the broker takes no more: {mqtt.error_string(info.rc)}", code="transfer.broker")

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=str(self._settings.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(self._settings.certificate, self._settings.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"the hub's client certificate cannot be used: {error}", code="config.tls") from error
        return context

    def _leave(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    # Below: called in the client's thread.

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *arguments)

    def _connect_answered(
        self, client: mqtt.Client, _userdata: Any, _flags: mqtt.ConnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if reason.is_failure:
            logger.error("broker refused the hub: %s", reason)
            return
        self._generation += 1
        client.subscribe(topics.up_filter(), qos=1)

    def _subscribed(self, _client: mqtt.Client, _userdata: Any, _mid: int, reasons: list[ReasonCode], _p: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            logger.error("broker refused the hub's subscription: %s", reasons)
            return
        self._on_loop(self._set_link, True)

    def _disconnected(
        self, _client: mqtt.Client, _userdata: Any, _flags: mqtt.DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        if reason.value == _TAKEN_OVER:
            logger.error("another client with the hub's certificate took over the link; is a second hub running?")
        self._on_loop(self._set_link, False)

    def _arrived(self, client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        generation, mid, qos = self._generation, message.mid, message.qos

        def settle() -> None:
            if qos and generation == self._generation:
                client.ack(mid, qos)

        self._on_loop(self._on_message, Inbound(topic=message.topic, payload=bytes(message.payload), settle=settle))

    # On the loop again.

    def _set_link(self, is_up: bool) -> None:
        if is_up and not self._connected.is_set():
            logger.info("link to the broker is up")
            self._connected.set()
        elif not is_up and self._connected.is_set():
            logger.warning("link to the broker is lost")
            self._connected.clear()
        self._link.set(is_up=is_up)
        self._metrics.link_up.set(1 if is_up else 0)
