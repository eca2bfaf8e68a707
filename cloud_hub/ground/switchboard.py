"""Takes what devices send, checks whom it is from and what it is, and hands it to the room that deals with it.

Rules:
1. The topic's device is vouched for by the broker; an envelope that names another is refused.
2. Presence (birth, death, reported) and rounds go through lanes: messages of one device are dealt with in order, and
   different devices do not wait for each other. Batches of records need no order; all that have come are handed over
   together, unopened, so that a busy hub opens and stores many in one step.
3. Whatever is not understood or not wanted is counted by leaf and outcome, and never dropped in silence.
4. Of who is not welcome nothing is taken that `takes` does not allow; it is counted as `barred`, and not answered.
5. A message is settled with the broker whatever came of it: what the hub failed to store is not answered, and the
   device sends it again. A batch is settled after it was stored, so that a slow database slows the senders.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, assert_never

from cloud_hub.ground.metrics import Metrics
from shared.errors import OutriderError, ProtocolViolation
from shared.ids import DeviceId
from shared.wire import topics
from shared.wire.envelope import Envelope, decode_envelope
from shared.wire.messages import KIND_OF, Batch, Birth, Death, Message, Reported, RoundReply, decode_body

logger = logging.getLogger(__name__)

LANES: Final = 32
LANE_DEPTH: Final = 256
MAX_GROUP: Final = 256
"""Batches that are handed over together."""
MAX_WAITING: Final = 4096
"""Batches that wait to be. The courier's window keeps them far below."""
_MAX_NOTED: Final = 1000
_PRESENCE: Final = frozenset({"birth", "death", "reported"})
_BATCHES: Final = frozenset({"telemetry", "outcome", "event"})

Handled = Birth | Death | Reported | RoundReply
_TAKES: Final[Mapping[str, type[Handled]]] = {
    "birth": Birth,
    "death": Death,
    "reported": Reported,
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
    batches: Callable[[Sequence[Sealed]], Awaitable[None]]
    round_reply: Callable[[DeviceId, Envelope, RoundReply], Awaitable[None]]


Takes = Callable[[str, str], bool]
"""Whether anything is taken of this device on this leaf; devices and leaves are as the topic says."""


def everything(_device: str, _leaf: str) -> bool:
    """Take everything of everybody."""
    return True


class Sealed:
    """A batch as it came in; opened by whoever stores it, in a thread of theirs."""

    __slots__ = ("_delivery", "error")

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self.error: OutriderError | None = None

    @property
    def topic(self) -> str:
        """Where it came in."""
        return self._delivery.topic

    def open(self) -> tuple[DeviceId, Batch] | None:
        """Whom it is from, and what; None, with `error` set, when it is not what may come in there."""
        try:
            device, _, message = _open(self._delivery.topic, self._delivery.payload)
            if not isinstance(message, Batch):
                raise _unexpected(message, self._delivery.topic)
        except OutriderError as error:
            self.error = error
            return None
        return device, message

    def settle(self) -> None:
        """It has been dealt with."""
        self._delivery.settle()


class Switchboard:
    """Lanes of messages, the batches beside them, and the workers that empty both."""

    def __init__(self, *, rooms: Rooms, metrics: Metrics, takes: Takes = everything) -> None:
        self._rooms = rooms
        self._takes = takes
        self._metrics = metrics
        self._lanes: tuple[asyncio.Queue[Delivery], ...] = tuple(asyncio.Queue(LANE_DEPTH) for _ in range(LANES))
        self._batches: deque[Sealed] = deque()
        self._batches_came = asyncio.Event()
        self._noted: set[tuple[str, str]] = set()
        self._waiting = metrics.gauge("outrider_hub_batches_waiting", "Batches that wait to be stored.")

    def put(self, deliveries: Sequence[Delivery]) -> None:
        """Take messages; called on the loop. Counts and settles at once what is more than may wait."""
        for delivery in deliveries:
            device, leaf = _sender(delivery.topic)
            if not self._takes(device, leaf):
                self._count(leaf, "barred", device=device, detail="the device is in quarantine or revoked")
                delivery.settle()
                continue
            if leaf in _BATCHES:
                is_taken = len(self._batches) < MAX_WAITING
                if is_taken:
                    self._batches.append(Sealed(delivery))
            else:
                is_taken = self._put_in_lane(delivery, device, leaf)
            if not is_taken:
                self._count(leaf, "overflow", device=device, detail="more arrives than can be dealt with")
                delivery.settle()
        if self._batches:
            self._batches_came.set()

    def _put_in_lane(self, delivery: Delivery, device: str, leaf: str) -> bool:
        lane = "presence" if leaf in _PRESENCE else leaf
        number = zlib.crc32(f"{device}/{lane}".encode()) % LANES
        try:
            self._lanes[number].put_nowait(delivery)
        except asyncio.QueueFull:
            return False
        return True

    async def run(self) -> None:
        """Deal with messages until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._empty_batches())
            for lane in self._lanes:
                group.create_task(self._empty(lane))

    async def _empty(self, lane: asyncio.Queue[Delivery]) -> None:
        while True:
            delivery = await lane.get()
            try:
                await self.receive(delivery.topic, delivery.payload)
            finally:
                delivery.settle()

    async def _empty_batches(self) -> None:
        while True:
            await self._batches_came.wait()
            group = [self._batches.popleft() for _ in range(min(MAX_GROUP, len(self._batches)))]
            self._waiting.set(len(self._batches))
            if not self._batches:
                self._batches_came.clear()
            try:
                await self._store(group)
            finally:
                for sealed in group:
                    sealed.settle()

    async def _store(self, group: Sequence[Sealed]) -> None:
        try:
            await self._rooms.batches(group)
        except OutriderError as error:
            self._count_failed(group, f"{error.code}: {error.message}")
            return
        except Exception:
            # As below: a defect must not end the hub for all devices.
            logger.exception("batches failed")
            self._count_failed(group, "defect")
            return
        stored: Counter[str] = Counter()
        for sealed in group:
            device, leaf = _sender(sealed.topic)
            if sealed.error is None:
                stored[leaf] += 1
            else:
                self._count(leaf, sealed.error.code, device=device, detail=sealed.error.message)
        for leaf, many in stored.items():
            self._metrics.messages.labels(leaf, "ok").inc(many)

    def _count_failed(self, group: Sequence[Sealed], detail: str) -> None:
        for sealed in group:
            device, leaf = _sender(sealed.topic)
            self._count(leaf, "failed", device=device, detail=detail)

    async def receive(self, topic: str, payload: bytes) -> None:
        """Deal with one message; never raises for what is in it."""
        sender, leaf = _sender(topic)
        try:
            device, envelope, message = _open(topic, payload)
            wanted = _TAKES.get(leaf)
            if wanted is None or not isinstance(message, wanted):
                raise _unexpected(message, topic)
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


def _open(topic: str, payload: bytes) -> tuple[DeviceId, Envelope, Message]:
    address = topics.parse_up(topic)
    envelope = decode_envelope(payload)
    if envelope.device != address.device:
        raise ProtocolViolation(
            f"the envelope names {envelope.device[:80]!r}, the topic {address.device!r}", code="protocol.misaddressed"
        )
    return address.device, envelope, decode_body(envelope)


def _unexpected(message: Message, topic: str) -> ProtocolViolation:
    return ProtocolViolation(f"{KIND_OF[type(message)]!r} is not taken on {topic[:120]!r}", code="protocol.unexpected")
