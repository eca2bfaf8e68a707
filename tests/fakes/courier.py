"""The courier in memory, and the broker in memory that it talks to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from shared.errors import TransferRefused, Unreachable
from shared.telemetry import BatchId


@dataclass
class FakeBroker:
    """Carries messages between couriers on one event loop, confines topics, and can be away, silent, or refuse.

    `bounces` is the reason code that everything but presence and state is acknowledged with.
    """

    up: bool = True
    acknowledges: bool = True
    packet_bytes: int = 262_144
    bounces: int | None = None
    clients: dict[str, FakeCourier] = field(default_factory=dict)
    published: list[tuple[str, bytes]] = field(default_factory=list)

    def route(self, topic: str, payload: bytes) -> None:
        """Record, and deliver to whoever subscribed; a refused topic never gets here."""
        self.published.append((topic, payload))
        for client in list(self.clients.values()):
            client.deliver(topic, payload)

    def failure(self, device: str, topic: str, payload: bytes) -> tuple[int, str] | None:
        """Why the broker does not take this message, None when it does."""
        if self.bounces is not None and not topic.endswith(("/birth", "/reported")):
            return self.bounces, "as the test wants it"
        if len(topic) + len(payload) + 9 > self.packet_bytes:  # as many bytes of header as one so large has
            return 0x95, "Packet too large"
        if not topic.startswith(f"outrider/1/{device}/up/"):
            return 0x87, "Not authorized"
        return None

    def go_down(self) -> None:
        """Every link breaks and nobody can connect."""
        self.up = False
        for client in list(self.clients.values()):
            client.drop("broker gone")

    def acknowledge(self) -> None:
        """Let what waits in the windows through."""
        self.acknowledges = True
        for client in self.clients.values():
            client.acknowledged()


class FakeCourier:
    """`edge_agent.ports.Courier` against a `FakeBroker`; the name is what the certificate would say."""

    WINDOW = 64

    def __init__(
        self,
        broker: FakeBroker,
        *,
        device: str,
        on_message: Callable[[str, bytes], None],
        on_lost: Callable[[str], None],
        on_refused: Callable[[str, BatchId | None, int, str], None] | None = None,
        on_taken: Callable[[BatchId], None] | None = None,
        refused: bool = False,
    ) -> None:
        self._broker = broker
        self._device = device
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_refused = on_refused
        self._on_taken = on_taken
        self._refused = refused
        self._subscribed = ""
        self._will: tuple[str, bytes] | None = None
        self.window = 0
        self.held: list[BatchId | None] = []

    async def connect(self, *, will_topic: str, will_payload: bytes, subscribe: str) -> None:
        """Join the broker; takes over a link of the same name."""
        await self.disconnect()
        if not self._broker.up:
            raise Unreachable("the broker is away")
        if self._refused:
            raise TransferRefused("the broker refuses this device")
        before = self._broker.clients.get(self._device)
        if before is not None:
            before.drop("taken over")
        self._will, self._subscribed, self.window = (will_topic, will_payload), subscribe, 0
        self.held.clear()
        self._broker.clients[self._device] = self

    def publish(self, topic: str, payload: bytes, *, ref: BatchId | None = None) -> bool:
        """Hand over, or refuse without a link or room."""
        if self._broker.clients.get(self._device) is not self or self.window >= self.WINDOW:
            return False
        loop = asyncio.get_running_loop()
        failure = self._broker.failure(self._device, topic, payload)
        if failure is not None:
            if self._on_refused is not None:
                loop.call_soon(self._on_refused, topic, ref, *failure)
            return True
        if not self._broker.acknowledges:
            self.window += 1
            self.held.append(ref)
        elif ref is not None and self._on_taken is not None:
            loop.call_soon(self._on_taken, ref)
        loop.call_soon(self._broker.route, topic, payload)
        return True

    def holds(self, ref: BatchId) -> bool:
        """Whether it is in the window."""
        return ref in self.held

    def acknowledged(self) -> None:
        """The broker has everything in the window."""
        held, self.held, self.window = self.held, [], 0
        for ref in held:
            if ref is not None and self._on_taken is not None:
                self._on_taken(ref)

    async def disconnect(self) -> None:
        """Leave without the will."""
        if self._broker.clients.get(self._device) is self:
            del self._broker.clients[self._device]

    def drop(self, reason: str) -> None:
        """The link breaks: the will goes out and the owner is told."""
        del self._broker.clients[self._device]
        loop = asyncio.get_running_loop()
        loop.call_soon(self._on_lost, reason)
        if self._will is not None:
            loop.call_soon(self._broker.route, *self._will)

    def deliver(self, topic: str, payload: bytes) -> None:
        """Hand a message that matches the subscription (`…/+`) to the owner."""
        prefix = self._subscribed.removesuffix("+")
        if self._subscribed and topic.startswith(prefix) and "/" not in topic[len(prefix) :]:
            asyncio.get_running_loop().call_soon(self._on_message, topic, payload)
