"""The broker and the lines to it: what is sent may arrive, later, twice, in another order, or never.

Rules of this file:
1. A line is TCP: in order, and when it is cut what was under way is gone. On a `wild` net single messages are lost,
   repeated and overtaken too, which no MQTT promises to prevent across reconnects and two subscribers.
2. The broker says that it has a message (PUBACK) before the hub has seen it, and keeps everything in memory: when it
   dies, all of that is gone.
3. Both ends of a cut line hear of it at their own time. Until then they talk to nobody.

Messages are the wire's structs, not their bytes: what bytes do is tried elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from shared.telemetry import BatchId
from shared.wire.messages import Ack, Batch
from tests.sim.heap import World

MAX_HELD: Final = 200
"""Messages the broker keeps for a hub that is away."""
REFUSALS: Final = (0x97, 0x97, 0x97, 0x83, 0x87, 0x95, 0x99)
"""PUBACK reasons: quota exceeded, implementation specific, not authorized, packet too large, payload format."""


@dataclass(frozen=True, slots=True)
class Weather:
    """What the lines are like.

    Attributes:
        delay_ms: of one message, on average.
        notice_ms: until an end hears of a cut, on average.
        loss, repeat, overtake: chances of a single message; all zero where lines are plain TCP.
        refuse: the chance that the broker answers a publish with a reason code that says no, for now or for good.
        holds: the broker keeps messages for an absent hub (a session that does not expire); else they are dropped.
        redeliver: what a hub had not acknowledged to the broker when it died comes again.
    """

    delay_ms: float = 20.0
    notice_ms: float = 500.0
    loss: float = 0.0
    repeat: float = 0.0
    overtake: float = 0.0
    refuse: float = 0.0
    holds: bool = True
    redeliver: bool = True

    @property
    def calm(self) -> Weather:
        """The same lines with nothing going wrong on them."""
        return Weather(delay_ms=min(self.delay_ms, 50.0), notice_ms=min(self.notice_ms, 500.0), holds=self.holds)


class Sender(Protocol):
    """A device, as the broker knows it."""

    name: str

    def acked(self, line: Line, ack: Ack) -> None:
        """The hub's answer came."""

    def puback(self, line: Line, ref: BatchId) -> None:
        """The broker has the message."""

    def refused(self, line: Line, ref: BatchId, code: int) -> None:
        """The broker does not take the message."""

    def lost(self, line: Line) -> None:
        """The line is gone."""


class Receiver(Protocol):
    """A hub process, as the broker knows it."""

    name: str

    def receive(self, message: Carried) -> None:
        """A message for the hub; to be `done` with when it is acknowledged to the broker."""


@dataclass(slots=True)
class Carried:
    """A message on its way to the hub."""

    device: str
    batch: Batch
    repeated: bool = False


class Line:
    """One connection of a device; a new connect is a new line."""

    __slots__ = ("cut", "down_at", "number", "sender", "up_at")

    def __init__(self, sender: Sender, number: int) -> None:
        self.sender = sender
        self.number = number
        self.cut = False
        self.up_at = 0
        self.down_at = 0


@dataclass(slots=True)
class Seat:
    """A hub's subscription: what was handed to it and not yet acknowledged to the broker."""

    hub: Receiver
    next_at: int
    open: list[Carried]


class Broker:
    """Takes from devices, gives to the hubs that share the subscription, and back.

    Attributes:
        disorder: is told of a device whose message vanished or was overtaken while its line held.
    """

    def __init__(self, world: World, weather: Weather, *, disorder: Callable[[str], None]) -> None:
        self.world = world
        self.weather = weather
        self.up = True
        self.lines: dict[str, Line] = {}
        self.disorder = disorder
        self._life = 0
        self._seats: dict[str, Seat] = {}
        self._held: list[Carried] = []
        self._numbers = 0

    # Devices

    def connect(self, sender: Sender, *, answer: Callable[[Line | None], None]) -> None:
        """Open a line; the answer comes later, and is None when there is no broker."""
        self.world.after(self._delay() * 2 + 1, self._connected, sender, answer)

    def _connected(self, sender: Sender, answer: Callable[[Line | None], None]) -> None:
        if not self.up:
            answer(None)
            return
        before = self.lines.get(sender.name)
        if before is not None:
            self.cut(before)  # taken over: a client id has one connection
        self._numbers += 1
        line = self.lines[sender.name] = Line(sender, self._numbers)
        answer(line)

    def cut(self, line: Line) -> None:
        """The line breaks now; its device hears of it later."""
        if not line.cut:
            line.cut = True
            self.world.after(self.world.span(self.weather.notice_ms), line.sender.lost, line)

    def hang_up(self, line: Line) -> None:
        """The device is gone; nobody is told."""
        line.cut = True

    def publish(self, line: Line, batch: Batch) -> None:
        """A device sends."""
        world, weather = self.world, self.weather
        if world.chance(weather.loss):
            self.disorder(line.sender.name)
            world.say("net", "loses", line.sender.name, _name(batch.batch))
            return
        when = world.now + self._delay()
        if world.chance(weather.overtake):
            when += world.span(weather.delay_ms * 20)
            self.disorder(line.sender.name)
        else:
            when = line.up_at = max(when, line.up_at)
        world.at(when, self._arrived, line, batch, self._life)
        if world.chance(weather.repeat):
            world.at(when + world.span(weather.delay_ms * 20), self._arrived, line, batch, self._life)

    def _arrived(self, line: Line, batch: Batch, life: int) -> None:
        if line.cut or life != self._life:
            return
        world = self.world
        ref = batch.batch
        if world.chance(self.weather.refuse):
            self.disorder(line.sender.name)
            self._down(line, line.sender.refused, ref, world.random.choice(REFUSALS))
            return
        self._down(line, line.sender.puback, ref)
        self._forward(Carried(line.sender.name, batch))

    def _down(self, line: Line, action: Callable[..., None], *args: object) -> None:
        when = line.down_at = max(self.world.now + self._delay(), line.down_at)
        self.world.at(when, self._deliver, line, self._life, action, args)

    def _deliver(self, line: Line, life: int, action: Callable[..., None], args: tuple[object, ...]) -> None:
        if not line.cut and life == self._life:
            action(line, *args)

    # Hubs

    def subscribe(self, hub: Receiver) -> bool:
        """A hub process takes its share from now on; False when there is no broker."""
        if not self.up:
            return False
        self._seats[hub.name] = Seat(hub, 0, [])
        held, self._held = self._held, []
        for message in held:
            self._forward(message)
        return True

    def leave(self, hub: Receiver) -> None:
        """A hub process is gone: what it had not acknowledged goes to another, waits, or is lost."""
        seat = self._seats.pop(hub.name, None)
        if seat is None:
            return
        for message in seat.open:
            self.disorder(message.device)
            if self.weather.redeliver:
                self._forward(message)

    def done(self, hub: Receiver, message: Carried) -> None:
        """The hub acknowledges the message to the broker (not to the device)."""
        seat = self._seats.get(hub.name)
        if seat is not None and message in seat.open:
            seat.open.remove(message)

    def answer(self, device: str, ack: Ack) -> None:
        """The hub sends to a device; it is lost when the device is not there."""
        if self.up and not self.world.chance(self.weather.loss):
            self.world.after(self._delay(), self._answer, device, ack, self._life)
            if self.world.chance(self.weather.repeat):
                self.world.after(self.world.span(self.weather.delay_ms * 20), self._answer, device, ack, self._life)

    def _answer(self, device: str, ack: Ack, life: int) -> None:
        line = self.lines.get(device)
        if life == self._life and line is not None and not line.cut:
            self._down(line, line.sender.acked, ack)

    def _forward(self, message: Carried) -> None:
        world = self.world
        if not self._seats:
            if self.weather.holds and len(self._held) < MAX_HELD:
                self._held.append(message)
            else:
                self.disorder(message.device)
            return
        names = list(self._seats)
        if len(names) > 1:
            self.disorder(message.device)
        seat = self._seats[names[0] if len(names) == 1 else world.random.choice(names)]
        seat.open.append(message)
        when = seat.next_at = max(world.now + self._delay(), seat.next_at)
        world.at(when, self._hand, seat, message, self._life)

    def _hand(self, seat: Seat, message: Carried, life: int) -> None:
        if life == self._life and self._seats.get(seat.hub.name) is seat:
            seat.hub.receive(message)

    # The broker itself

    def die(self) -> list[Receiver]:
        """The broker is gone with all that it held; returns the hubs that lost it."""
        self.world.say("broker", "dies", f"held={len(self._held)}")
        self.up = False
        self._life += 1
        for message in self._held:
            self.disorder(message.device)
        self._held.clear()
        for line in self.lines.values():
            self.cut(line)
        self.lines.clear()
        hubs = [seat.hub for seat in self._seats.values()]
        self._seats.clear()
        return hubs

    def rise(self) -> None:
        """A new broker, which knows nothing."""
        self.world.say("broker", "starts")
        self.up = True

    def _delay(self) -> int:
        return self.world.span(self.weather.delay_ms)


def _name(batch: BatchId) -> str:
    return f"{batch.klass}/{batch.first}-{batch.last}"
