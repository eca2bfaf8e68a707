"""The hub's courier against a broker that refuses, falls silent or vanishes: it never stays deaf."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from cloud_hub.ground import courier as courier_module
from cloud_hub.ground.courier import HubCourier, Inbound, Link
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.system import SystemClock
from cloud_hub.ground.watch import ANSWER_LOOKS, PING_LOOKS, SILENT_LOOKS, Watch
from tests.fakes.pki import TestCa
from tests.fakes.scripted_broker import GRANTED, NOT_AUTHORIZED, QUOTA_EXCEEDED, ScriptedBroker, scripted_broker

WAIT_S = 15.0
SIZE = 1000


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks and pauses that a test has time for."""
    monkeypatch.setattr(courier_module, "LOOK_S", 0.04)
    monkeypatch.setattr(courier_module, "_PAUSES_S", (0.01,))
    monkeypatch.setattr(courier_module, "MAX_HELD_BYTES", 3 * SIZE)


@contextlib.asynccontextmanager
async def running(
    folder: Path, prepare: Callable[[ScriptedBroker], None] = lambda _: None
) -> AsyncIterator[tuple[ScriptedBroker, HubCourier, list[Inbound]]]:
    """A courier at a broker; the list holds what has come and was not settled."""
    held: list[Inbound] = []

    def arrived(messages: Sequence[Inbound]) -> None:
        held.extend(messages)

    async with scripted_broker(folder) as (broker, settings):
        prepare(broker)
        courier = HubCourier(settings, on_messages=arrived, metrics=Metrics(), link=Link(SystemClock()))
        task = asyncio.create_task(courier.run(ready=asyncio.Event()))
        try:
            yield broker, courier, held
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(holds: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"still waiting: {what}") from None


async def fill(broker: ScriptedBroker, held: list[Inbound]) -> None:
    """Send what fills the hub's hands, and one more that it cannot take."""
    for mid in range(1, 6):
        broker.publish(mid, bytes(SIZE))
    await until(lambda: len(held) >= 4, "its hands are full")


@pytest.mark.parametrize(
    ("connack", "suback"), [(NOT_AUTHORIZED, GRANTED), (None, GRANTED), (0, QUOTA_EXCEEDED), (0, None)]
)
def test_who_is_not_let_in_tries_again_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, connack: int | None, suback: int | None
) -> None:
    def refuse(broker: ScriptedBroker) -> None:
        broker.connack, broker.suback = connack, suback

    async def story() -> None:
        async with running(tmp_path, refuse) as (broker, courier, _):
            await until(lambda: broker.connections >= 3, "it tries again")
            assert not courier.is_connected
            assert [record.levelname for record in caplog.records] == ["ERROR"]
            broker.connack, broker.suback = 0, GRANTED
            await until(lambda: courier.is_connected, "it is let in")

    with caplog.at_level(logging.INFO, logger="cloud_hub.ground.courier"):
        asyncio.run(story())


def test_a_broker_that_falls_silent_is_left(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (broker, courier, _):
            await until(lambda: courier.is_connected, "it is connected")
            before = broker.connections
            await until(lambda: broker.pings > 2 * SILENT_LOOKS // PING_LOOKS, "it stays")
            assert broker.connections == before
            broker.answers_pings = False
            await until(lambda: broker.connections > before, "it comes anew")

    asyncio.run(story())


def test_the_link_is_made_with_the_files_of_now(tmp_path: Path) -> None:
    """A hub that has changed its CA, or whose first certificate has ended, must not go deaf until it is restarted."""
    next_folder = tmp_path / "next"
    next_folder.mkdir()
    following = TestCa(next_folder)
    server, client = following.server(), following.client("hub")

    async def story() -> None:
        async with running(tmp_path) as (broker, courier, _):
            await until(lambda: courier.is_connected, "it is connected")
            broker.context.verify_mode = ssl.CERT_REQUIRED
            broker.context.load_verify_locations(following.path)
            broker.context.load_cert_chain(server.certificate, server.key)
            # Half of the step: the broker has taken it, our own pair does not fit yet.
            (tmp_path / "hub.key").write_bytes(client.key.read_bytes())
            before = broker.connections
            broker.reset()
            await until(lambda: not courier.is_connected, "the link is lost")
            (tmp_path / "hub.pem").write_bytes(client.certificate.read_bytes())
            (tmp_path / "test-ca.pem").write_bytes(following.pem)
            await until(lambda: courier.is_connected, "it is connected again")
            assert broker.connections == before + 1

    asyncio.run(story())


def test_a_ca_of_before_is_not_believed_any_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other_folder = tmp_path / "other"
    other_folder.mkdir()
    other = TestCa(other_folder)

    async def story() -> None:
        async with running(tmp_path) as (broker, courier, _):
            await until(lambda: courier.is_connected, "it is connected")
            (tmp_path / "test-ca.pem").write_bytes(other.pem)
            before = broker.connections
            broker.reset()
            await until(lambda: "certificate verify failed" in caplog.text, "it tries, and does not believe")
            assert not courier.is_connected
            assert broker.connections == before

    with caplog.at_level(logging.DEBUG, logger="cloud_hub.ground.courier"):
        asyncio.run(story())


def test_full_hands_do_not_cost_the_link(tmp_path: Path) -> None:
    """Nothing is read meanwhile, so the broker's answers do not count; but it hears from us."""

    async def story() -> None:
        async with running(tmp_path) as (broker, courier, held):
            await until(lambda: courier.is_connected, "it is connected")
            await fill(broker, held)
            before, since = broker.connections, broker.pings
            await until(lambda: broker.pings - since > 2 * SILENT_LOOKS // PING_LOOKS, "the broker hears from us")
            for message in held:
                message.settle()
            broker.publish(9, b"after")
            await until(lambda: held[-1].payload == b"after", "it goes on")
            assert courier.is_connected
            assert broker.connections == before

    asyncio.run(story())


def test_a_connection_that_breaks_while_hands_are_full_is_noticed(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (broker, courier, held):
            await until(lambda: courier.is_connected, "it is connected")
            await fill(broker, held)
            before, broken = broker.connections, courier._socket
            assert broken is not None
            broker.reset()
            await until(lambda: not courier.is_connected, "it has noticed")
            assert broken.fileno() == -1
            assert broker.connections == before
            for message in held:
                message.settle()
            await until(lambda: courier.is_connected, "it is back")
            broker.publish(1, b"again")
            await until(lambda: held[-1].payload == b"again", "it hears")

    asyncio.run(story())


def test_acknowledgements_go_out_as_messages_are_dealt_with(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as (broker, courier, held):
            await until(lambda: courier.is_connected, "it is connected")
            for mid in (7, 8, 9):
                broker.publish(mid, b"x")
            await until(lambda: len(held) == 3, "all have come")
            for place in (1, 2, 0):
                held[place].settle()
            await until(lambda: broker.acknowledged == [8, 9, 7], "all are acknowledged")

    asyncio.run(story())


def test_the_watch_counts_only_what_says_something() -> None:
    watch = Watch()
    steps = [watch.look(is_up=True, has_heard=False, can_hear=False) for _ in range(2 * SILENT_LOOKS)]
    assert steps.count("ping") == 2 * SILENT_LOOKS // PING_LOOKS
    assert set(steps) == {"wait", "ping"}
    steps = [watch.look(is_up=True, has_heard=False, can_hear=True) for _ in range(SILENT_LOOKS)]
    assert steps.index("silent") == SILENT_LOOKS - 1
    watch = Watch()
    assert watch.look(is_up=False, has_heard=True, can_hear=False) == "wait"
    steps = [watch.look(is_up=False, has_heard=True, can_hear=True) for _ in range(ANSWER_LOOKS)]
    assert steps.index("unanswered") == ANSWER_LOOKS - 1
    assert watch.look(is_up=True, has_heard=True, can_hear=True) != "unanswered"
