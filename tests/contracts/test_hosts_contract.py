"""What every implementation of ports.Hosts must do, the fake and the real one."""

from __future__ import annotations

import asyncio
import math
import os
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge_agent.adapters.hosts import HostOptions, LiveHosts
from edge_agent.adapters.system import SystemClock
from edge_agent.ports import HostAnswer, HostReady, Hosts, ModelHost
from shared.errors import HostLost, InputRefused, ModelError
from shared.inference import TensorHead
from shared.model import Manifest, Variant
from tests.fakes.hosts import FakeHost, FakeHosts
from tests.fakes.releases import Build, sign_classifier

pytestmark = pytest.mark.live


def head(rows: int = 1, *, name: str = "x", dtype: str = "fp32", width: int = 2) -> tuple[TensorHead, ...]:
    return (TensorHead(name=name, dtype=dtype, shape=(rows, width)),)  # type: ignore[arg-type]


def pairs(*rows: tuple[float, float]) -> bytes:
    return b"".join(struct.pack("<2f", *row) for row in rows)


def sign(_manifest: Manifest, _variant: Variant, inputs: tuple[TensorHead, ...], payload: bytes) -> HostAnswer:
    """The sign classifier of tests/fakes/releases.py in plain Python."""
    labels, confidences, scores = [], [], []
    for low, high in struct.iter_unpack("<2f", payload):
        difference = high - low
        labels.append("high" if difference > 0 else "low")
        confidences.append(1 / (1 + math.exp(-2 * abs(difference))))
        scores += [-difference, difference]
    return HostAnswer(
        labels=tuple(labels),
        confidences=tuple(confidences),
        outputs=(TensorHead(name="scores", dtype="fp32", shape=inputs[0].shape),),
        payload=struct.pack(f"<{len(scores)}f", *scores),
    )


@pytest.fixture(params=["fake", "live"])
def hosts(request: pytest.FixtureRequest, tmp_path: Path) -> Hosts:
    if request.param == "fake":
        return FakeHosts(sign)
    return LiveHosts(directory=tmp_path / "hosts", clock=SystemClock(), options=HostOptions())


Work = Callable[[ModelHost, HostReady, list[str]], Awaitable[None]]


def run(hosts: Hosts, tmp_path: Path, work: Work, build: Build | None = None) -> list[str]:
    """Start a host, do the work, stop it; returns what `on_lost` was told."""
    lost: list[str] = []
    made = build or sign_classifier()

    async def main() -> None:
        model_fd, golden_fd = made.open(tmp_path)
        host, ready = await hosts.start(
            manifest=made.manifest,
            variant=made.variant,
            model_fd=model_fd,
            golden_fd=golden_fd,
            on_lost=lost.append,
        )
        try:
            await work(host, ready, lost)
        finally:
            await host.stop()
            await host.stop()

    asyncio.run(main())
    return lost


def test_answers_carry_labels_confidences_and_outputs(hosts: Hosts, tmp_path: Path) -> None:
    async def work(host: ModelHost, ready: HostReady, _: list[str]) -> None:
        assert ready.agreement == 1.0
        assert ready.rss_bytes > 0
        assert host.pid > 0
        answer = await host.infer(head(2), pairs((1, 2), (5, 3)), deadline_ms=5000)
        assert answer.labels == ("high", "low")
        assert answer.confidences == pytest.approx((1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-4))), rel=1e-5)
        assert answer.outputs == (TensorHead(name="scores", dtype="fp32", shape=(2, 2)),)
        assert struct.unpack("<4f", answer.payload) == (-1, 1, 2, -2)

    assert run(hosts, tmp_path, work) == []


@pytest.mark.parametrize(
    ("inputs", "payload", "words"),
    [
        (head(name="y"), pairs((1, 2)), "'y'"),
        (head(dtype="fp64"), pairs((1, 2), (1, 2)), "fp64"),
        (head(width=3), pairs((1, 2)) + b"1234", "shape"),
        (head(2), pairs((1, 2)), "16 bytes, 8 were sent"),
        (head(0), b"", "shape"),
        ((), b"", "are expected"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_one_works(
    hosts: Hosts, tmp_path: Path, inputs: tuple[TensorHead, ...], payload: bytes, words: str
) -> None:
    async def work(host: ModelHost, _ready: HostReady, _: list[str]) -> None:
        with pytest.raises(InputRefused, match=words):
            await host.infer(inputs, payload, deadline_ms=5000)
        assert (await host.infer(head(), pairs((1, 2)), deadline_ms=5000)).labels == ("high",)

    assert run(hosts, tmp_path, work) == []


def test_a_hundred_requests_at_once_each_get_their_own_row(hosts: Hosts, tmp_path: Path) -> None:
    async def work(host: ModelHost, _ready: HostReady, _: list[str]) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(host.infer(head(), pairs((0, number - 50.5)), deadline_ms=20_000))
                for number in range(100)
            ]
        for number, task in enumerate(tasks):
            assert struct.unpack("<2f", task.result().payload)[1] == number - 50.5

    assert run(hosts, tmp_path, work) == []


def test_probe_answers(hosts: Hosts, tmp_path: Path) -> None:
    async def work(host: ModelHost, _ready: HostReady, _: list[str]) -> None:
        assert await host.probe() is True
        await host.stop()
        with pytest.raises(HostLost):
            await host.probe()

    assert run(hosts, tmp_path, work) == []


def test_a_stopped_host_answers_no_more(hosts: Hosts, tmp_path: Path) -> None:
    async def work(host: ModelHost, _ready: HostReady, _: list[str]) -> None:
        await host.stop()
        with pytest.raises(HostLost):
            await host.infer(head(), pairs((1, 2)), deadline_ms=1000)

    assert run(hosts, tmp_path, work) == []


def test_descriptors_are_closed(hosts: Hosts, tmp_path: Path) -> None:
    build = sign_classifier()

    async def main() -> None:
        descriptors = build.open(tmp_path)
        host, _ = await hosts.start(
            manifest=build.manifest,
            variant=build.variant,
            model_fd=descriptors[0],
            golden_fd=descriptors[1],
            on_lost=lambda _: None,
        )
        for descriptor in descriptors:
            try:
                name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            except FileNotFoundError:
                continue
            assert str(tmp_path) not in name
        await host.stop()

    asyncio.run(main())


def test_a_model_that_answers_otherwise_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    if isinstance(hosts, FakeHosts):
        hosts.agreement = 0.5
    build = sign_classifier(altered=(1, 0, 0))

    async def work(host: ModelHost, _ready: HostReady, _: list[str]) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(ModelError) as caught:
        run(hosts, tmp_path, work, build)
    assert caught.value.code == "model.golden"


def test_losing_the_host_fails_what_waits_and_is_told_once(hosts: Hosts, tmp_path: Path) -> None:
    async def work(host: ModelHost, _ready: HostReady, lost: list[str]) -> None:
        async with asyncio.TaskGroup() as group:
            if isinstance(host, FakeHost):
                host.hang = True
            else:
                os.kill(host.pid, 19)  # SIGSTOP: the request arrives and is not answered
            tasks = [group.create_task(_outcome(host)) for _ in range(5)]
            await asyncio.sleep(0)
            if isinstance(host, FakeHost):
                host.crash()
            else:
                os.kill(host.pid, 9)
        assert all(isinstance(task.result(), HostLost) for task in tasks)
        assert "SIGKILL" in str(tasks[0].result())
        assert lost == ["ended by SIGKILL"]

    assert run(hosts, tmp_path, work) == ["ended by SIGKILL"]


def test_a_late_answer_is_a_timeout(hosts: Hosts, tmp_path: Path) -> None:
    async def work(host: ModelHost, _ready: HostReady, _: list[str]) -> None:
        if isinstance(host, FakeHost):
            host.hang = True
        else:
            os.kill(host.pid, 19)
        with pytest.raises(TimeoutError):
            await host.infer(head(), pairs((1, 2)), deadline_ms=20)
        if isinstance(host, FakeHost):
            host.hang = False
        else:
            os.kill(host.pid, 18)
        assert (await host.infer(head(), pairs((2, 1)), deadline_ms=5000)).labels == ("low",)

    assert run(hosts, tmp_path, work) == []


async def _outcome(host: ModelHost) -> HostAnswer | Exception:
    try:
        return await host.infer(head(), pairs((1, 2)), deadline_ms=10_000)
    except HostLost as error:
        return error
