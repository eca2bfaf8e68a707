"""Virtual time keeps its order; lines lose what comes last, or anything, as they are told to."""

from __future__ import annotations

from typing import Any

import pytest

from shared.telemetry import BatchId
from shared.wire.messages import Ack, Batch
from tests.sim.heap import MAX_EVENTS, Circles, World
from tests.sim.net import Broker, Carried, Line, Weather


class Device:
    """Notes what it hears."""

    name = "dev"

    def __init__(self) -> None:
        self.heard: list[str] = []

    def acked(self, line: Line, ack: Ack) -> None:
        self.heard.append("ack")

    def puback(self, line: Line, ref: BatchId) -> None:
        self.heard.append("puback")

    def refused(self, line: Line, ref: BatchId, code: int) -> None:
        self.heard.append("refused")

    def lost(self, line: Line) -> None:
        self.heard.append("lost")


class Receiver:
    """Keeps what it is handed."""

    def __init__(self, name: str = "hub") -> None:
        self.name = name
        self.numbers: list[int] = []

    def receive(self, message: Carried) -> None:
        self.numbers.append(message.batch.batch.first)


def batch(number: int) -> Batch:
    """A batch of one record."""
    return Batch(batch=BatchId(epoch="0" * 16, klass=3, first=number, last=number, digest=""))


def place(weather: Weather, *, hubs: int = 1) -> tuple[World, Broker, Device, list[Receiver], set[str]]:
    """A broker with a device on a line, and hubs."""
    world, disordered = World("test"), set[str]()
    broker = Broker(world, weather, disorder=disordered.add)
    receivers = [Receiver(f"hub{n}") for n in range(hubs)]
    for receiver in receivers:
        broker.subscribe(receiver)
    device = Device()
    broker.connect(device, answer=lambda line: None)
    world.run(10_000)
    return world, broker, device, receivers, disordered


def send(world: World, broker: Broker, count: int) -> None:
    """Publish so many, a little apart."""
    for number in range(1, count + 1):
        world.after(number, broker.publish, broker.lines["dev"], batch(number))


def test_time_moves_to_what_comes_next_and_keeps_the_order_of_one_moment() -> None:
    world, seen = World("a"), list[Any]()
    for name, delay in (("late", 20), ("first", 5), ("second", 5), ("now", 0)):
        world.after(delay, lambda name=name: seen.append((world.now, name)))
    world.run(10)
    assert seen == [(0, "now"), (5, "first"), (5, "second")]
    assert world.now == 10
    world.run(30, done=lambda: True)
    assert seen[-1] == (20, "late")
    assert world.now == 20


def test_a_world_that_goes_in_circles_is_stopped() -> None:
    world = World("a")

    def again() -> None:
        world.after(0, again)

    again()
    with pytest.raises(Circles, match=str(MAX_EVENTS)):
        world.run(1)


def test_a_line_keeps_its_order_whatever_its_delays() -> None:
    world, broker, device, (hub,), disordered = place(Weather(delay_ms=200.0))
    send(world, broker, 50)
    world.run(60_000)
    assert hub.numbers == list(range(1, 51))
    assert device.heard == ["puback"] * 50
    assert not disordered


def test_a_cut_line_loses_what_comes_last_and_its_device_hears_of_it() -> None:
    world, broker, device, (hub,), disordered = place(Weather(delay_ms=200.0))
    line = broker.lines["dev"]
    send(world, broker, 50)
    world.run(world.now + 120)
    broker.cut(line)
    world.run(60_000)
    assert hub.numbers == list(range(1, len(hub.numbers) + 1))
    assert len(hub.numbers) < 50
    assert device.heard[-1] == "lost"
    assert not disordered, "what comes last is sent again, in order"


def test_a_wild_net_loses_repeats_and_lets_overtake() -> None:
    world, broker, _, (hub,), disordered = place(Weather(loss=0.2, repeat=0.2, overtake=0.2))
    send(world, broker, 200)
    world.run(600_000)
    assert set(hub.numbers) < set(range(1, 201))
    assert len(hub.numbers) > len(set(hub.numbers))
    assert hub.numbers != sorted(hub.numbers)
    assert disordered == {"dev"}


def test_a_broker_that_dies_takes_everything_with_it() -> None:
    world, broker, device, (hub,), _ = place(Weather(delay_ms=500.0))
    send(world, broker, 50)
    world.run(world.now + 600)
    before = len(hub.numbers)
    assert broker.die() == [hub]
    world.run(60_000)
    assert len(hub.numbers) == before < 50
    assert device.heard[-1] == "lost"
    answers: list[Line | None] = []
    broker.connect(device, answer=answers.append)
    world.run(world.now + 60_000)
    assert answers == [None]
    assert not broker.subscribe(hub)


def test_an_absent_hub_finds_what_was_held_for_it_and_two_share() -> None:
    world, broker, _, (one, two), disordered = place(Weather(), hubs=2)
    broker.leave(one)
    broker.leave(two)
    send(world, broker, 40)
    world.run(world.now + 60_000)
    assert one.numbers == two.numbers == []
    broker.subscribe(one)
    world.run(world.now + 60_000)
    assert one.numbers == list(range(1, 41))
    assert not disordered
    broker.subscribe(two)
    send(world, broker, 40)
    world.run(world.now + 60_000)
    assert sorted(one.numbers[40:] + two.numbers) == list(range(1, 41))
    assert two.numbers
    assert disordered == {"dev"}, "two hubs keep no order"


def test_what_a_dead_hub_had_in_its_hands_goes_to_another() -> None:
    world, broker, _, (one, two), _ = place(Weather(), hubs=2)
    broker.leave(two)
    send(world, broker, 10)
    world.run(world.now + 60_000)
    broker.subscribe(two)
    broker.leave(one)
    world.run(world.now + 60_000)
    assert two.numbers == one.numbers == list(range(1, 11))
