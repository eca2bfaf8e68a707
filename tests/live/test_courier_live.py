"""The courier against a real mosquitto: last will, full windows, frozen and foreign brokers, deadlines."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.adapters.courier import MAX_WAITING, MqttCourier, broker_context
from edge_agent.adapters.system import SystemClock
from shared.errors import OutriderError, TransferRefused, Unreachable
from shared.ids import DeviceId
from shared.telemetry import BatchId
from shared.wire import topics
from tests.fakes.broker import Mosquitto
from tests.fakes.pki import TestCa

pytestmark = pytest.mark.live
A = DeviceId("dev-a")
BATCH = BatchId(epoch="0123456789abcdef", klass=3, first=1, last=500, digest="00" * 32)

DEVICE = """
import asyncio, sys
from pathlib import Path
from edge_agent.adapters.courier import MqttCourier, broker_context
from edge_agent.adapters.system import SystemClock

async def main(port, ca, certificate, key):
    courier = MqttCourier(
        host="localhost", port=int(port), device="dev-a",
        context=broker_context(
            ca_path=Path(ca), certificate_path=Path(certificate), key_path=Path(key), now_ms=SystemClock().wall_ms
        ),
        on_message=print, on_lost=print,
    )
    await courier.connect(
        will_topic="outrider/1/dev-a/up/death", will_payload=b"gone", subscribe="outrider/1/dev-a/down/+"
    )
    print("online", flush=True)
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def ca(tmp_path: Path) -> TestCa:
    return TestCa(tmp_path)


@pytest.fixture
def broker(tmp_path: Path, mosquitto_path: str, free_port: int, ca: TestCa) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path, binary=mosquitto_path, port=free_port, ca=ca) as running:
        yield running


class Line:
    """A courier and what it said."""

    def __init__(
        self,
        ca: TestCa,
        port: int,
        *,
        device: str = A,
        trusts: TestCa | None = None,
        days: int = 5,
        ahead_days: int = 0,
        within_ms: int = 5000,
    ) -> None:
        pair = ca.client(device, days=days)
        self.messages: list[tuple[str, bytes]] = []
        self.lost: list[str] = []
        self.refused: list[tuple[str, BatchId | None, int]] = []
        self.courier = MqttCourier(
            host="localhost",
            port=port,
            device=DeviceId(device),
            context=broker_context(
                ca_path=(trusts or ca).path,
                certificate_path=pair.certificate,
                key_path=pair.key,
                now_ms=lambda: SystemClock().wall_ms() + ahead_days * 86_400_000,
            ),
            on_message=lambda topic, payload: self.messages.append((topic, payload)),
            on_lost=self.lost.append,
            on_refused=lambda topic, ref, code, _: self.refused.append((topic, ref, code)),
            connect_ms=within_ms,
        )

    async def online(self, subscribe: str = topics.down_filter(A)) -> None:
        await self.courier.connect(will_topic=topics.up(A, "death"), will_payload=b"gone", subscribe=subscribe)


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.02)


def test_the_last_will_is_delivered_when_the_device_is_killed(broker: Mosquitto, ca: TestCa) -> None:
    pair = ca.client(A)

    async def story() -> None:
        hub = Line(ca, broker.port, device="hub")
        await hub.online(topics.up_filter())
        with subprocess.Popen(
            [sys.executable, "-c", DEVICE, str(broker.port), str(ca.path), str(pair.certificate), str(pair.key)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
        ) as device:
            assert device.stdout is not None
            assert await asyncio.to_thread(device.stdout.readline) == b"online\n"
            device.kill()
        await until(lambda: bool(hub.messages))
        assert hub.messages == [(topics.up(A, "death"), b"gone")]
        await hub.courier.disconnect()

    asyncio.run(story())


def test_a_frozen_broker_fills_the_window_and_goodbye_still_ends(broker: Mosquitto, ca: TestCa) -> None:
    async def story() -> None:
        hub, line = Line(ca, broker.port, device="hub"), Line(ca, broker.port)
        await hub.online(topics.up_filter())
        await line.online()
        broker.freeze()
        taken = [line.courier.publish(topics.up(A, "telemetry"), bytes([n])) for n in range(MAX_WAITING + 10)]
        assert taken == [True] * MAX_WAITING + [False] * 10
        broker.thaw()
        await until(lambda: len(hub.messages) == MAX_WAITING)
        await until(lambda: line.courier.publish(topics.up(A, "event"), b"room again"))
        await until(lambda: len(hub.messages) == MAX_WAITING + 1)
        assert [payload[0] for _, payload in hub.messages[:-1]] == list(range(MAX_WAITING))
        broker.freeze()
        assert line.courier.publish(topics.up(A, "event"), b"never answered")
        async with asyncio.timeout(15):
            await line.courier.disconnect()
        broker.thaw()
        await hub.courier.disconnect()
        assert line.lost == []

    asyncio.run(story())


def test_a_broker_that_takes_little_at_a_time_is_heeded(
    tmp_path: Path, mosquitto_path: str, free_port: int, ca: TestCa
) -> None:
    topic = topics.up(A, "telemetry")
    options = "max_packet_size 4000\nmax_inflight_messages 5\n"

    async def story(broker: Mosquitto) -> None:
        hub, line = Line(ca, free_port, device="hub"), Line(ca, free_port)
        await hub.online(topics.up_filter())
        await line.online()
        assert line.courier.publish(topic, bytes(4000), ref=BATCH)
        await until(lambda: bool(line.refused))
        assert line.refused == [(topic, BATCH, 0x95)]
        broker.freeze()
        assert [line.courier.publish(topic, bytes([n])) for n in range(8)] == [True] * 5 + [False] * 3
        broker.thaw()
        await until(lambda: len(hub.messages) == 5)
        await until(lambda: line.courier.publish(topic, bytes(3000)))
        await until(lambda: len(hub.messages) == 6)
        assert (line.lost, len(line.refused)) == ([], 1)
        await line.courier.disconnect()
        await hub.courier.disconnect()

    with Mosquitto(tmp_path, binary=mosquitto_path, port=free_port, ca=ca, options=options) as broker:
        asyncio.run(story(broker))


def test_a_topic_that_is_not_the_devices_comes_back_with_its_reason(broker: Mosquitto, ca: TestCa) -> None:
    async def story() -> None:
        line = Line(ca, broker.port)
        await line.online()
        assert line.courier.publish(topics.up(DeviceId("dev-b"), "telemetry"), b"x", ref=BATCH)
        await until(lambda: bool(line.refused))
        assert line.refused == [(topics.up(DeviceId("dev-b"), "telemetry"), BATCH, 0x87)]
        assert line.courier.publish(topics.up(A, "telemetry"), b"x")
        await line.courier.disconnect()
        assert line.lost == []

    asyncio.run(story())


def test_a_restarted_broker_takes_the_device_back(broker: Mosquitto, ca: TestCa) -> None:
    async def story() -> None:
        line = Line(ca, broker.port)
        for number in range(3):
            await line.online()
            broker.kill()
            await until(lambda: len(line.lost) == number + 1)  # noqa: B023 - awaited before the next round
            broker.start()
        await line.online()
        assert line.courier.publish(topics.up(A, "birth"), b"x")
        await line.courier.disconnect()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("foreign broker", "transfer.broker_certificate"),
        ("foreign device", "transfer.device_certificate"),
        ("expired device", "transfer.device_certificate"),
    ],
)
def test_whoever_is_not_of_this_hub_is_refused(
    broker: Mosquitto, ca: TestCa, tmp_path: Path, case: str, code: str
) -> None:
    foreign = TestCa(tmp_path, name="foreign-ca")
    line = {
        "foreign broker": lambda: Line(ca, broker.port, trusts=foreign),
        "foreign device": lambda: Line(foreign, broker.port, trusts=ca),
        "expired device": lambda: Line(ca, broker.port, days=-1),
    }[case]()

    async def story() -> OutriderError:
        with pytest.raises((TransferRefused, Unreachable)) as caught:
            await line.online()
        return caught.value

    error = asyncio.run(story())
    assert isinstance(error, TransferRefused), error
    assert error.code == code
    assert error.hint
    assert line.lost == []


@pytest.mark.parametrize("listens", [True, False], ids=["silent", "closed"])
def test_nobody_who_speaks_is_unreachable_within_the_deadline(ca: TestCa, listens: bool) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if listens:
            silent.listen()
        line = Line(ca, silent.getsockname()[1], within_ms=1000)

        async def story() -> None:
            async with asyncio.timeout(10):
                with pytest.raises(Unreachable):
                    await line.online()

        asyncio.run(story())


def test_giving_up_while_connecting_leaves_no_link(broker: Mosquitto, ca: TestCa) -> None:
    async def story() -> None:
        line = Line(ca, broker.port)
        broker.freeze()
        task = asyncio.get_running_loop().create_task(line.online())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        broker.thaw()
        assert not line.courier.publish(topics.up(A, "birth"), b"x")
        await line.online()
        assert line.courier.publish(topics.up(A, "birth"), b"x")
        await line.courier.disconnect()

    asyncio.run(story())


@pytest.mark.parametrize(
    ("since", "days", "ahead_days", "is_taken"),
    [
        (-20, 5, 6, False),  # expired, though this machine's own clock says otherwise
        (-20, 5, -21, False),
        (-20, -1, -2, True),  # this machine's clock is ahead
        (2, 5, 3, True),  # or behind
    ],
)
def test_the_trusted_time_decides_whether_the_brokers_certificate_is_valid(
    tmp_path: Path,
    mosquitto_path: str,
    free_port: int,
    ca: TestCa,
    since: int,
    days: int,
    ahead_days: int,
    is_taken: bool,
) -> None:
    pair = ca.server("dated", since=since, days=days)
    with Mosquitto(tmp_path, binary=mosquitto_path, port=free_port, ca=ca, pair=pair):
        line = Line(ca, free_port, ahead_days=ahead_days)

        async def story() -> str:
            try:
                await line.online()
            except TransferRefused as error:
                assert error.hint
                return error.code
            await line.courier.disconnect()
            return "online"

        assert asyncio.run(story()) == ("online" if is_taken else "transfer.certificate_dates")
