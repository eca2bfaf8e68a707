"""The hub's courier against a real mosquitto: what is held is bounded, a frozen or lost broker loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud_hub.ground import courier as courier_module
from cloud_hub.ground.courier import HubCourier, Inbound, Link
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.system import SystemClock
from shared.errors import Unreachable
from tests.fakes.ingest_place import IngestPlace, ingest_place, link_settings

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]

TOPIC = "outrider/1/pi-1/up/telemetry"
WAIT_S = 30.0


@contextlib.asynccontextmanager
async def connected(place: IngestPlace, arrived: Callable[[Sequence[Inbound]], None]) -> AsyncIterator[HubCourier]:
    """A courier that is connected, for as long as the context lasts."""
    settings = link_settings(place.folder, "hub", place.hub_port)
    link = Link(SystemClock())
    courier, ready = HubCourier(settings, on_messages=arrived, metrics=Metrics(), link=link), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(courier.run(ready=ready))
        async with asyncio.timeout(WAIT_S):
            await ready.wait()
        yield courier
        task.cancel()


@contextlib.contextmanager
def device(place: IngestPlace) -> Iterator[mqtt.Client]:
    """A client that sends."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="pi-1", protocol=mqtt.MQTTv5)
    client.max_inflight_messages_set(500)
    client.connect("127.0.0.1", place.device_port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


async def until(holds: Callable[[], bool], what: str) -> None:
    """Wait until it holds."""
    try:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"still waiting: {what}") from None


def test_what_is_held_is_bounded_and_nothing_is_left_behind(
    mosquitto_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, many = 100_000, 60
    monkeypatch.setattr(courier_module, "MAX_HELD_BYTES", 10 * size)
    monkeypatch.setattr(courier_module, "READ_AT_ONCE", 4)
    held: list[Inbound] = []
    seen: set[bytes] = set()
    highest = 0

    def arrived(messages: Sequence[Inbound]) -> None:
        nonlocal highest
        held.extend(messages)
        seen.update(message.payload[:4] for message in messages)
        highest = max(highest, len(held))

    async def story() -> None:
        async with connected(place, arrived):
            for number in range(many):
                client.publish(TOPIC, number.to_bytes(4, "big") + bytes(size), qos=1)
            await until(lambda: len(held) >= 10, "it is full")
            await asyncio.sleep(0.3)
            assert highest <= 10 + 4
            while len(seen) < many:
                for message in held:
                    message.settle()
                held.clear()
                await asyncio.sleep(0.01)
            for message in held:
                message.settle()

    with ingest_place(mosquitto_path, hubs=["hub"]) as place, device(place) as client:
        asyncio.run(story())
    assert highest <= 10 + 4


def test_what_was_not_settled_comes_again_after_the_link_was_lost(mosquitto_path: str) -> None:
    payloads: list[bytes] = []
    settle_from = 5

    def arrived(messages: Sequence[Inbound]) -> None:
        for message in messages:
            payloads.append(message.payload)
            if int(message.payload) < settle_from:
                message.settle()

    async def story() -> None:
        nonlocal settle_from
        async with connected(place, arrived) as courier:
            for number in range(10):
                client.publish(TOPIC, str(number), qos=1)
            await until(lambda: len(payloads) == 10, "all have come")
            link = courier._socket
            assert link is not None
            settle_from = 100
            # As a cable that is pulled: no farewell.
            with socket.socket(fileno=os.dup(link.fileno())) as raw:
                raw.shutdown(socket.SHUT_RDWR)
            await until(lambda: len(payloads) >= 15, "those that were not settled come again")
            assert sorted(payloads[10:]) == [str(number).encode() for number in range(5, 10)]

    with ingest_place(mosquitto_path, hubs=["hub"]) as place, device(place) as client:
        asyncio.run(story())


def test_a_broker_that_is_frozen_fills_no_memory_and_goes_on(mosquitto_path: str) -> None:
    """Acknowledgements are then refused, which costs a repetition; the link is the same one afterwards."""
    arrived: list[Inbound] = []

    def keep(messages: Sequence[Inbound]) -> None:
        arrived.extend(messages)
        for message in messages:
            message.settle()

    async def many(courier: HubCourier) -> None:
        for _ in range(2000):
            await courier.publish("outrider/1/pi-1/down/ack", bytes(20_000), qos=0)
            await asyncio.sleep(0)

    async def story() -> None:
        async with connected(place, keep) as courier:
            os.kill(place.broker_pid, signal.SIGSTOP)
            try:
                with pytest.raises(Unreachable, match="slow"):
                    await many(courier)
            finally:
                os.kill(place.broker_pid, signal.SIGCONT)
            client.publish(TOPIC, b"after", qos=1)
            await until(lambda: [message.payload for message in arrived] == [b"after"], "it goes on")
            await until(lambda: courier._socket is not None and not courier._socket.waiting_bytes, "all is sent")
            assert courier.is_connected

    with ingest_place(mosquitto_path, hubs=["hub"]) as place, device(place) as client:
        asyncio.run(story())
