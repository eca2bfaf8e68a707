"""Takes what devices send, checks whom it is from and what it is, and hands it to the room that deals with it.

Rules:
1. The topic's device is vouched for by the broker; an envelope that names another is refused.
2. Messages of one device are dealt with in order, within presence (birth, death, reported) and within each class of
   records; different devices do not wait for each other.
3. Whatever is not understood or not wanted is counted by leaf and outcome, and never dropped in silence.
4. A message is settled with the broker whatever came of it: what the hub failed to store is not answered, and the
   device sends it again.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, assert_never

from cloud_hub.ground.metrics import Metrics
from shared.errors import OutriderError, ProtocolViolation
from shared.ids import DeviceId
from shared.wire import topics
from shared.wire.envelope import Envelope, decode_envelope
from shared.wire.messages import Batch, Birth, Death, Message, Reported, RoundReply, decode_body

logger = logging.getLogger(__name__)

LANES: Final = 32
LANE_DEPTH: Final = 256
_MAX_NOTED: Final = 1000
_PRESENCE: Final = frozenset({"birth", "death", "reported"})

Handled = Birth | Death | Reported | Batch | RoundReply
_TAKES: Final[Mapping[str, type[Handled]]] = {
    "birth": Birth,
    "death": Death,
    "reported": Reported,
    "telemetry": Batch,
    "outcome": Batch,
    "event": Batch,
    "round": RoundReply,
}


class Delivery(Protocol):
    """A message as the courier hands it over (`courier.Inbound`)."""

    @property
    def topic(self) -> str:
        """Where it came in."""
        ...

    @property
    def payload(self) -> bytes:
        """The envelope's bytes."""
        ...

    @property
    def settle(self) -> Callable[[], None]:
        """To be called once it has been dealt with."""
        ...


@dataclass(frozen=True, slots=True)
class Rooms:
    """Who deals with what. Each raises OutriderError when it cannot; repeated messages must do no harm."""

    birth: Callable[[DeviceId, Envelope, Birth], Awaitable[None]]
    death: Callable[[DeviceId, Envelope, Death], Awaitable[None]]
    reported: Callable[[DeviceId, Envelope, Reported], Awaitable[None]]
    batch: Callable[[DeviceId, Envelope, Batch], Awaitable[None]]
    round_reply: Callable[[DeviceId, Envelope, RoundReply], Awaitable[None]]


class Switchboard:
    """Lanes of messages and the workers that empty them."""

    def __init__(self, *, rooms: Rooms, metrics: Metrics) -> None:
        self._rooms = rooms
        self._metrics = metrics
        self._lanes: tuple[asyncio.Queue[Delivery], ...] = tuple(asyncio.Queue(LANE_DEPTH) for _ in range(LANES))
        self._noted: set[tuple[str, str]] = set()

    def put(self, delivery: Delivery) -> None:
        """Take a message; called on the loop. Counts and settles it at once when its lane is full."""
        device, leaf = _sender(delivery.topic)
        lane = "presence" if leaf in _PRESENCE else leaf
        number = zlib.crc32(f"{device}/{lane}".encode()) % LANES
        try:
            self._lanes[number].put_nowait(delivery)
        except asyncio.QueueFull:
            self._count(leaf, "overflow", device=device, detail="more arrives than can be dealt with")
            delivery.settle()

    async def run(self) -> None:
        """Deal with messages until cancelled."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._empty(lane))

    async def _empty(self, lane: asyncio.Queue[Delivery]) -> None:
        while True:
            delivery = await lane.get()
            try:
                await self.receive(delivery.topic, delivery.payload)
            finally:
                delivery.settle()

    async def receive(self, topic: str, payload: bytes) -> None:
        """Deal with one message; never raises for what is in it."""
        sender, leaf = _sender(topic)
        try:
            device, envelope, message = _open(topic, payload)
        except OutriderError as error:
            self._count(leaf, error.code, device=sender, detail=error.message)
            return
        try:
            await self._hand_over(device, envelope, message)
        except OutriderError as error:
            self._count(leaf, "failed", device=sender, detail=f"{error.code}: {error.message}")
        except Exception:
            # A defect in a room must not end the hub for all devices: it is counted, and the log has it in full.
            logger.exception("message failed")
            self._count(leaf, "failed", device=sender, detail="defect")
        else:
            self._metrics.messages.labels(leaf, "ok").inc()

    async def _hand_over(self, device: DeviceId, envelope: Envelope, message: Handled) -> None:
        match message:
            case Birth():
                await self._rooms.birth(device, envelope, message)
            case Death():
                await self._rooms.death(device, envelope, message)
            case Reported():
                await self._rooms.reported(device, envelope, message)
            case Batch():
                await self._rooms.batch(device, envelope, message)
            case RoundReply():
                await self._rooms.round_reply(device, envelope, message)
            case _:
                assert_never(message)

    def _count(self, leaf: str, outcome: str, *, device: str, detail: str) -> None:
        self._metrics.messages.labels(leaf, outcome).inc()
        # Once per device and outcome: a device that sends nonsense must not fill the log.
        if (device, outcome) not in self._noted and len(self._noted) < _MAX_NOTED:
            self._noted.add((device, outcome))
            logger.warning("message not taken: %s from %s: %s (%s)", leaf, device, outcome, detail)


def _sender(topic: str) -> tuple[str, str]:
    """Device and leaf as far as the topic tells, for counting; the leaf is `other` unless it is a known one."""
    parts = topic.split("/")
    device = parts[2] if len(parts) > 2 else ""
    leaf = parts[4] if len(parts) == 5 and parts[4] in topics.UP_LEAVES else "other"
    return device, leaf


def _open(topic: str, payload: bytes) -> tuple[DeviceId, Envelope, Handled]:
    address = topics.parse_up(topic)
    envelope = decode_envelope(payload)
    if envelope.device != address.device:
        raise ProtocolViolation(
            f"the envelope names {envelope.device[:80]!r}, the topic {address.device!r}", code="protocol.misaddressed"
        )
    message: Message = decode_body(envelope)
    wanted = _TAKES.get(address.leaf)
    if wanted is None or not isinstance(message, wanted):
        raise ProtocolViolation(f"{envelope.kind!r} is not taken on {address.leaf!r}", code="protocol.unexpected")
    return address.device, envelope, message
