"""What every courier does, on the fake and against a real mosquitto with mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_agent.adapters.courier import MqttCourier, broker_context
from edge_agent.adapters.system import SystemClock
from edge_agent.ports import Courier
from shared.errors import TransferError, Unreachable
from shared.ids import DeviceId
from shared.telemetry import BatchId
from shared.wire import topics
from tests.fakes.broker import Mosquitto
from tests.fakes.courier import FakeBroker, FakeCourier
from tests.fakes.pki import TestCa

A, B = DeviceId("dev-a"), DeviceId("dev-b")
BATCH = BatchId(epoch="0123456789abcdef", klass=3, first=1, last=500, digest="00" * 32)
PACKET_BYTES = 262_144
"""What both brokers are told to take."""


class Ear:
    """Collects what a courier says; `until` polls with a deadline."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.lost: list[str] = []
        self.refused: list[tuple[str, BatchId | None, int]] = []
        self.taken: list[BatchId] = []

    async def until(self, done: Callable[[Ear], bool]) -> None:
        async with asyncio.timeout(15):
            while not done(self):
                await asyncio.sleep(0.01)


class Kit:
    """Makes couriers and plays the hub: sees all that devices send, sends anywhere, cuts the broker."""

    def __init__(self, *, real: bool, folder: Path, binary: Callable[[], str], port: int) -> None:
        self._real = real
        self._folder = folder
        self._port = port
        self._fake = FakeBroker()
        self._broker: Mosquitto | None = None
        if real:
            self._ca = TestCa(folder)
            self._broker = Mosquitto(folder, binary=binary(), port=port, ca=self._ca)
            self._broker.start()
        self.couriers: list[Courier] = []
        self.hub_heard: list[tuple[str, bytes]] = []

    def courier(self, device: DeviceId, ear: Ear) -> Courier:
        made: Courier
        if self._real:
            made = self._real_courier(device, ear)
        else:
            made = FakeCourier(
                self._fake,
                device=device,
                on_message=lambda topic, payload: ear.messages.append((topic, payload)),
                on_lost=ear.lost.append,
                on_refused=lambda topic, ref, code, _: ear.refused.append((topic, ref, code)),
                on_taken=ear.taken.append,
            )
        self.couriers.append(made)
        return made

    def _real_courier(self, device: str, ear: Ear, *, up: bool = True) -> MqttCourier:
        pair = self._ca.client(device)
        return MqttCourier(
            host="localhost",
            port=self._port,
            device=DeviceId(device),
            context=broker_context(
                ca_path=self._ca.path,
                certificate_path=pair.certificate,
                key_path=pair.key,
                now_ms=SystemClock().wall_ms,
            ),
            on_message=lambda topic, payload: ear.messages.append((topic, payload)),
            on_lost=ear.lost.append,
            on_refused=lambda topic, ref, code, _: ear.refused.append((topic, ref, code)),
            on_taken=ear.taken.append,
        )

    @asynccontextmanager
    async def hub(self) -> AsyncIterator[Ear]:
        """The hub's ear while it is connected."""
        ear = Ear()
        if not self._real:
            ear.messages = self._fake.published
            yield ear
            return
        courier = self._real_courier("hub", ear)
        await courier.connect(will_topic="outrider/1/none", will_payload=b"", subscribe=topics.up_filter())
        self._hub = courier
        try:
            yield ear
        finally:
            await courier.disconnect()

    def send(self, topic: str, payload: bytes) -> None:
        if self._real:
            assert self._hub.publish(topic, payload)
        else:
            self._fake.route(topic, payload)

    def kill_broker(self) -> None:
        if self._broker is not None:
            self._broker.kill()
        else:
            self._fake.go_down()

    def close(self) -> None:
        if self._broker is not None:
            self._broker.kill()


@pytest.fixture(params=["fake", pytest.param("mosquitto", marks=pytest.mark.live)])
def kit(request: pytest.FixtureRequest, tmp_path: Path, free_port: int) -> Iterator[Kit]:
    made = Kit(
        real=request.param == "mosquitto",
        folder=tmp_path,
        binary=lambda: str(request.getfixturevalue("mosquitto_path")),
        port=free_port,
    )
    yield made
    made.close()


async def online(courier: Courier, device: DeviceId, *, will: bytes = b"gone") -> None:
    await courier.connect(
        will_topic=topics.up(device, "death"), will_payload=will, subscribe=topics.down_filter(device)
    )


def test_messages_go_both_ways_in_order(kit: Kit) -> None:
    async def story() -> None:
        ear = Ear()
        courier = kit.courier(A, ear)
        async with kit.hub() as hub:
            await online(courier, A)
            for number in range(30):
                assert courier.publish(topics.up(A, "telemetry"), bytes([number]))
            await hub.until(lambda ear: len(ear.messages) >= 30)
            assert hub.messages == [(topics.up(A, "telemetry"), bytes([n])) for n in range(30)]
            kit.send(topics.down(A, "ack"), b"\x00one")
            kit.send(topics.down(A, "assignment"), b"two")
            await ear.until(lambda ear: len(ear.messages) == 2)
            assert ear.messages == [(topics.down(A, "ack"), b"\x00one"), (topics.down(A, "assignment"), b"two")]
            await courier.disconnect()
            assert ear.lost == []

    asyncio.run(story())


def test_nothing_is_taken_without_a_link(kit: Kit) -> None:
    async def story() -> None:
        courier = kit.courier(A, Ear())
        assert not courier.publish(topics.up(A, "birth"), b"x")
        await courier.disconnect()
        await online(courier, A)
        assert courier.publish(topics.up(A, "birth"), b"x")
        await courier.disconnect()
        await courier.disconnect()
        assert not courier.publish(topics.up(A, "birth"), b"x")

    asyncio.run(story())


def test_a_device_hears_only_what_is_for_it_and_cannot_speak_as_another(kit: Kit) -> None:
    async def story() -> None:
        ear_a, ear_b = Ear(), Ear()
        a, b = kit.courier(A, ear_a), kit.courier(B, ear_b)
        async with kit.hub() as hub:
            await online(a, A)
            await online(b, B)
            kit.send(topics.down(B, "ack"), b"for b")
            kit.send(topics.down(A, "ack"), b"for a")
            assert a.publish(topics.up(B, "birth"), b"forged", ref=BATCH)
            assert a.publish(topics.up(A, "birth"), b"honest")
            await ear_a.until(lambda ear: bool(ear.messages) and bool(ear.refused))
            await ear_b.until(lambda ear: bool(ear.messages))
            await hub.until(lambda ear: (topics.up(A, "birth"), b"honest") in ear.messages)
            assert (topics.up(B, "birth"), b"forged") not in hub.messages
            assert ear_a.messages == [(topics.down(A, "ack"), b"for a")]
            assert ear_b.messages == [(topics.down(B, "ack"), b"for b")]
            assert ear_a.refused == [(topics.up(B, "birth"), BATCH, 0x87)]
            assert ear_a.taken == []
            assert not a.holds(BATCH)
            await a.disconnect()
            await b.disconnect()

    asyncio.run(story())


def test_what_is_larger_than_the_broker_takes_is_told_and_breaks_nothing(kit: Kit) -> None:
    topic = topics.up(A, "telemetry")
    room = PACKET_BYTES - len(topic) - 9  # header 1, length 3, topic length 2, packet id 2, property length 1

    async def story() -> None:
        ear = Ear()
        courier = kit.courier(A, ear)
        async with kit.hub() as hub:
            await online(courier, A)
            assert courier.publish(topic, b"x" * (room + 1), ref=BATCH)
            assert ear.refused == [], "told after the publish returned"
            await ear.until(lambda ear: bool(ear.refused))
            assert ear.refused == [(topic, BATCH, 0x95)]
            assert courier.publish(topic, b"y" * room, ref=BATCH)
            await hub.until(lambda ear: bool(ear.messages))
            assert hub.messages == [(topic, b"y" * room)]
            await ear.until(lambda ear: ear.taken == [BATCH])
            assert not courier.holds(BATCH)
            assert (len(ear.refused), ear.lost) == (1, [])
            await courier.disconnect()

    asyncio.run(story())


def test_a_clean_goodbye_sends_no_will(kit: Kit) -> None:
    async def story() -> None:
        courier = kit.courier(A, Ear())
        async with kit.hub() as hub:
            await online(courier, A)
            await courier.disconnect()
            await online(courier, A)
            assert courier.publish(topics.up(A, "birth"), b"again")
            await hub.until(lambda ear: bool(ear.messages))
            assert hub.messages == [(topics.up(A, "birth"), b"again")]
            await courier.disconnect()

    asyncio.run(story())


def test_a_lost_broker_is_told_once_and_is_unreachable(kit: Kit) -> None:
    async def story() -> None:
        ear = Ear()
        courier = kit.courier(A, ear)
        await online(courier, A)
        kit.kill_broker()
        await ear.until(lambda ear: bool(ear.lost))
        assert not courier.publish(topics.up(A, "birth"), b"x")
        with pytest.raises(Unreachable) as caught:
            await online(courier, A)
        assert caught.value.retry
        assert isinstance(caught.value, TransferError)
        assert len(ear.lost) == 1

    asyncio.run(story())


def test_a_new_link_of_the_same_device_takes_over(kit: Kit) -> None:
    async def story() -> None:
        ear_old, ear_new = Ear(), Ear()
        old, new = kit.courier(A, ear_old), kit.courier(A, ear_new)
        await online(old, A)
        await online(new, A)
        await ear_old.until(lambda ear: bool(ear.lost))
        assert not old.publish(topics.up(A, "birth"), b"x")
        assert new.publish(topics.up(A, "birth"), b"x")
        assert ear_new.lost == []
        await new.disconnect()

    asyncio.run(story())
