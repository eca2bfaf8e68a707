"""The door with its clients: a real socket, and where it matters a real model behind it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.adapters import door as door_module
from edge_agent.adapters.door import Door
from edge_agent.adapters.hosts import LiveHost, LiveHosts
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.waiting import Handle
from edge_agent.client import AsyncClient, Client
from edge_agent.framing import Buffer, FrameReader, build_frame
from shared import limits
from shared.errors import (
    ConfigError,
    Conflict,
    HostLost,
    InputRefused,
    ModelError,
    OutriderError,
    ProtocolViolation,
    StorageFull,
    Unreachable,
)
from shared.inference import (
    Done,
    Feedback,
    Infer,
    Measure,
    Refusal,
    Reply,
    Request,
    Status,
    TensorHead,
    decode_reply,
    encode_header,
)
from shared.wire import frames
from tests.fakes.door_core import handle_for
from tests.fakes.releases import sign_classifier

pytestmark = pytest.mark.live
Answered = tuple[Reply, Sequence[Buffer]]


async def accept(request: Request, _payload: bytearray, _arrived: float) -> Answered:
    """Says yes to everything."""
    return Done(id=request.id), ()


def at_door(path: Path, handle: Handle, work: Callable[[Door], Coroutine[Any, Any, None]]) -> None:
    """Open a door, do the work, close it."""

    async def main() -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            door = Door(path=path, handle=handle, tasks=tasks)
            await door.open()
            try:
                await work(door)
            finally:
                await door.close()
                await door.close()

    asyncio.run(main())
    assert not path.exists()


def with_model(path: Path, work: Callable[[LiveHost], Coroutine[Any, Any, None]]) -> None:
    """The same with a real model host."""

    async def main() -> None:
        made = sign_classifier()
        hosts = LiveHosts(directory=path.parent / "hosts", clock=SystemClock())
        model_fd, golden_fd = made.open(path.parent)
        host, _ = await hosts.start(
            manifest=made.manifest, variant=made.variant, model_fd=model_fd, golden_fd=golden_fd, on_lost=lambda _: None
        )
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            door = Door(path=path, handle=handle_for(host, made.manifest, made.variant), tasks=tasks)
            await door.open()
            try:
                await work(host)
            finally:
                await door.close()
                await host.stop()

    asyncio.run(main())


class Raw:
    """A bare socket that speaks frames, for what the clients would never send."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self._reader = FrameReader()

    def send(self, *parts: Buffer) -> None:
        for part in parts:
            self.socket.sendall(part)

    def receive(self) -> Reply | None:
        while (frame := self._reader.next_frame()) is None:
            count = self.socket.recv_into(self._reader.buffer())
            if count == 0:
                return None
            self._reader.received(count)
        return decode_reply(frame[0])


@contextlib.asynccontextmanager
async def raw(path: Path) -> AsyncIterator[Raw]:
    link = await asyncio.to_thread(Raw, path)
    try:
        yield link
    finally:
        link.socket.close()


def test_both_clients_get_the_models_answers(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"

    async def work(host: LiveHost) -> None:
        def blocking() -> None:
            with Client(path) as agent:
                answer = agent.infer("sample", {"x": np.array([[1, 2], [5, 3]], dtype=np.float32)}, id="mine")
                assert (answer.id, answer.label, answer.labels) == ("mine", "high", ("high", "low"))
                assert answer.confidence == answer.confidences[0] == pytest.approx(0.8808, abs=1e-4)
                assert answer.outputs["scores"].tolist() == [[-1, 1], [2, -2]]
                assert (answer.model, answer.version, answer.variant) == ("sample", "1.0.0", "fp32")
                assert (answer.rung, answer.degraded, answer.deadline_met) == ("full", False, True)
                assert answer.digest == sign_classifier().variant.file.digest
                assert agent.infer("sample", {"x": [[3, 1]]}).label == "low"
                agent.feedback(answer.id, label="high")
                agent.reading("temperature", 21.5)

        await asyncio.to_thread(blocking)
        async with AsyncClient(path) as agent:
            assert (await agent.infer("sample", {"x": [[1, 2]]})).label == "high"
            assert (await agent.describe()).models[0].family == "sample"
            await agent.feedback("mine", correct=True)
            await agent.reading("temperature", 21.5)

    with_model(path, work)


def test_wrong_requests_are_refused_precisely_and_nothing_breaks(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    good = np.array([[1, 2]], dtype=np.float32)

    async def work(host: LiveHost) -> None:
        async with AsyncClient(path) as agent:
            for inputs, words in (
                ({"y": good}, r"\['y'\] were sent, \['x'\] are expected"),
                ({"x": good.astype(np.float64)}, "'x' is fp64, expected fp32"),
                ({"x": good.reshape(2, 1)}, "shape"),
                ({"x": np.zeros((1, 2, 1), dtype=np.float32)}, "shape"),
                ({"x": np.zeros((0, 2), dtype=np.float32)}, "shape"),
                ({"x": [["a", "b"]]}, "cannot be made fp32"),
                ({"x": np.array([["a", "b"]])}, "cannot be sent"),
                ({}, "are expected"),
            ):
                with pytest.raises(InputRefused, match=words):
                    await agent.infer("sample", inputs)
                assert (await agent.infer("sample", {"x": good})).label == "high"
            with pytest.raises(ModelError) as caught:
                await agent.infer("other", {"x": good})
            assert caught.value.code == "model.unknown"
            heads = (TensorHead(name="x", dtype="fp32", shape=(-1, -2)),)
            async with raw(path) as link:
                link.send(*build_frame(encode_header(Infer(model="sample", inputs=heads, id="a")), (b"12345678",)))
                reply = await asyncio.to_thread(link.receive)
                assert isinstance(reply, Refusal)
                assert reply.code == "model.input"
        assert await host.probe()

    with_model(path, work)


def test_a_hundred_requests_at_once_over_one_connection(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"

    async def work(host: LiveHost) -> None:
        async with AsyncClient(path) as agent, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(
                    agent.infer("sample", {"x": np.array([[0, number]], dtype=np.float32)}, deadline_ms=20_000)
                )
                for number in range(1, 101)
            ]
        for number, task in enumerate(tasks, start=1):
            assert task.result().outputs["scores"].tolist() == [[-number, number]]

    with_model(path, work)


def test_losing_the_host_is_a_typed_error(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"

    async def work(host: LiveHost) -> None:
        async with AsyncClient(path) as agent:
            os.kill(host.pid, signal.SIGSTOP)
            async with asyncio.TaskGroup() as group:
                task = group.create_task(outcome(agent.infer("sample", {"x": np.ones((1, 2), np.float32)})))
                await asyncio.sleep(0.05)
                os.kill(host.pid, signal.SIGKILL)
            error = task.result()
            assert isinstance(error, HostLost)
            assert error.retry
            assert error.hint

    with_model(path, work)


async def outcome(asked: Coroutine[Any, Any, object]) -> OutriderError | None:
    try:
        await asked
    except OutriderError as error:
        return error
    return None


def test_bytes_that_are_no_frame_end_the_connection_with_a_word(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"

    async def work(door: Door) -> None:
        for sent, code in (
            (frames._PREFIX.pack(0xF1, 1, 0, 10, limits.MAX_FRAME_PAYLOAD_BYTES + 1) + b"x" * 150_000, "too_large"),
            (frames._PREFIX.pack(0xF1, 1, 0, limits.MAX_FRAME_HEADER_BYTES + 1, 0), "too_large"),
            (frames._PREFIX.pack(0xF1, 9, 0, 1, 0), "protocol.frame"),
        ):
            async with raw(path) as link:
                link.send(sent)
                reply = await asyncio.to_thread(link.receive)
                assert isinstance(reply, Refusal)
                assert code in reply.code
                assert await asyncio.to_thread(link.receive) is None
        async with AsyncClient(path) as agent:
            await agent.reading("still", 1.0)

    at_door(path, accept, work)


def test_a_request_that_does_not_parse_leaves_the_connection_alive(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"

    async def work(door: Door) -> None:
        async with raw(path) as link:
            for header, named in (
                (b"\xc1 garbage", ""),
                (msgspec.msgpack.encode({"type": "infer", "id": "me", "model": 7}), "me"),
                (msgspec.msgpack.encode({"type": "no such thing", "id": "you"}), "you"),
                (b"\x91" * 5000 + b"\xc0", ""),
                (b"", ""),
            ):
                link.send(*build_frame(header))
                reply = await asyncio.to_thread(link.receive)
                assert isinstance(reply, Refusal)
                assert (reply.code, reply.id) == ("model.request", named)
            link.send(*build_frame(encode_header(Status(id="good"))))
            assert await asyncio.to_thread(link.receive) == Done(id="good")

    at_door(path, accept, work)


def test_errors_become_refusals_and_typed_exceptions(short_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = short_tmp / "door.sock"

    async def fail(request: Request, _payload: bytearray, _arrived: float) -> Answered:
        assert isinstance(request, Measure)
        if request.name == "full":
            raise StorageFull("no room", hint="make some")
        if request.name == "late":
            raise TimeoutError
        raise RuntimeError("a defect")

    async def work(door: Door) -> None:
        async with AsyncClient(path) as agent:
            with pytest.raises(StorageFull) as full:
                await agent.reading("full", 1.0)
            assert (full.value.message, full.value.hint, full.value.retry) == ("no room", "make some", True)
            with pytest.raises(OutriderError) as late:
                await agent.reading("late", 1.0)
            assert (late.value.code, late.value.retry) == ("deadline", True)
            with pytest.raises(OutriderError) as defect:
                await agent.reading("defect", 1.0)
            assert defect.value.code == "internal"
            assert "a defect" not in defect.value.message

    at_door(path, fail, work)
    assert "a request at the door failed" in caplog.text


def test_large_payloads_pass_both_ways(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    data = os.urandom(5 * limits.MIB + 3)

    async def echo(request: Request, payload: bytearray, _arrived: float) -> Answered:
        assert payload == data
        return Done(id=request.id), (payload,)

    async def work(door: Door) -> None:
        def both() -> tuple[Reply, bytearray]:
            with Client(path) as agent:
                return agent._call(Status(id="a"), (data[:100], data[100:]), 20_000)

        reply, payload = await asyncio.to_thread(both)
        assert reply == Done(id="a")
        assert payload == data

    at_door(path, echo, work)


def test_a_request_larger_than_a_frame_is_refused_before_it_is_sent(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    large = np.zeros(limits.MAX_FRAME_PAYLOAD_BYTES + 1, dtype=np.uint8)

    async def work(door: Door) -> None:
        async with AsyncClient(path) as agent:
            with pytest.raises(ProtocolViolation) as caught:
                await agent.infer("any", {"x": large})
            assert caught.value.code == "protocol.too_large"
            await agent.reading("still", 1.0)

    at_door(path, accept, work)


def test_many_waiting_requests_are_bounded(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = short_tmp / "door.sock"
    monkeypatch.setattr(limits, "MAX_WAITING_REQUESTS", 20)

    async def work(door: Door) -> None:
        async with AsyncClient(path) as agent, asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome(agent.reading("x", 1.0))) for _ in range(30)]
            async with asyncio.timeout(20):
                while sum(task.done() for task in tasks) < 10:
                    await asyncio.sleep(0.005)
            release.set()
        refused = [task.result() for task in tasks if task.result() is not None]
        assert len(refused) == 10
        assert all(error is not None and error.code == "overload" and error.retry for error in refused)

    release = asyncio.Event()

    async def wait(request: Request, _payload: bytearray, _arrived: float) -> Answered:
        await release.wait()
        return Done(id=request.id), ()

    at_door(path, wait, work)


def test_one_connection_cannot_take_all_places(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    release = asyncio.Event()
    begun = 0

    async def wait(request: Request, _payload: bytearray, _arrived: float) -> Answered:
        nonlocal begun
        begun += 1
        if isinstance(request, Measure):
            await release.wait()
        return Done(id=request.id), ()

    async def work(door: Door) -> None:
        async with AsyncClient(path) as greedy, AsyncClient(path) as other, asyncio.TaskGroup() as group:
            tasks = [group.create_task(greedy.reading("x", 1.0)) for _ in range(3 * door_module.PIPELINE)]
            async with asyncio.timeout(20):
                while begun < door_module.PIPELINE:
                    await asyncio.sleep(0.005)
            await other.feedback("x", correct=True)
            assert begun == door_module.PIPELINE + 1
            release.set()
        assert all(task.done() for task in tasks)

    at_door(path, wait, work)


def test_who_does_not_read_is_not_read_from_and_then_cut_off(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = short_tmp / "door.sock"
    monkeypatch.setattr(door_module, "CLOGGED_S", 0.2)
    answered = 0

    async def flood(request: Request, _payload: bytearray, _arrived: float) -> Answered:
        nonlocal answered
        answered += 1
        return Done(id=request.id), (bytes(limits.MIB),)

    async def work(door: Door) -> None:
        async with raw(path) as link:
            frame = b"".join(bytes(part) for part in build_frame(encode_header(Status(id="s"))))
            with contextlib.suppress(OSError):
                await asyncio.to_thread(link.send, frame * 100_000)
            async with asyncio.timeout(20):
                while door._connections:
                    await asyncio.sleep(0.01)
        assert answered <= 2 * door_module.PIPELINE

    at_door(path, flood, work)


def test_connections_are_bounded(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = short_tmp / "door.sock"
    monkeypatch.setattr(limits, "MAX_DOOR_CONNECTIONS", 2)

    async def work(door: Door) -> None:
        async with AsyncClient(path) as one, AsyncClient(path) as two:
            await one.reading("x", 1.0)
            await two.reading("x", 1.0)

            def third() -> None:
                with Client(path) as agent:
                    agent.reading("x", 1.0)

            with pytest.raises(OutriderError) as caught:
                await asyncio.to_thread(third)
            assert caught.value.code == "overload.connections"
            await one.reading("x", 1.0)

    at_door(path, accept, work)


def test_arriving_payloads_are_bounded_together(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = short_tmp / "door.sock"
    monkeypatch.setattr(door_module, "MAX_ARRIVING_BYTES", 3 * limits.MIB)

    async def work(door: Door) -> None:
        async with raw(path) as link:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(
                    link.send, frames.prefix(1, 60 * limits.MIB), b"x", bytes(8 * limits.MIB), bytes(8 * limits.MIB)
                )
            reply = await asyncio.to_thread(link.receive)
            assert isinstance(reply, Refusal)
            assert reply.code == "overload.memory"
            assert door.arriving_bytes() <= 5 * limits.MIB

    at_door(path, accept, work)


def test_the_socket_is_private_and_a_stale_one_is_replaced(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(path))
    stale.close()

    async def work(door: Door) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with asyncio.TaskGroup() as tasks:
            with pytest.raises(Conflict, match="another agent is running"):
                await Door(path=path, handle=accept, tasks=tasks).open()
        async with AsyncClient(path) as agent:
            await agent.reading("still", 1.0)

    at_door(path, accept, work)


@pytest.mark.parametrize("name", ["x" * 100, "missing/door.sock", "file"])
def test_a_path_that_cannot_hold_a_socket_is_a_configuration_error(short_tmp: Path, name: str) -> None:
    (short_tmp / "file").write_text("precious")

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            with pytest.raises(ConfigError) as caught:
                await Door(path=short_tmp / name, handle=accept, tasks=tasks).open()
            assert caught.value.code == "config.door_path"
            assert caught.value.hint

    asyncio.run(main())
    assert (short_tmp / "file").read_text() == "precious"


def test_clients_without_an_agent_say_so(short_tmp: Path) -> None:
    with Client(short_tmp / "none.sock") as agent, pytest.raises(Unreachable, match=r"none\.sock") as caught:
        agent.status()
    assert "outrider-agent run" in caught.value.hint

    async def main() -> None:
        async with AsyncClient(short_tmp / "none.sock") as agent:
            with pytest.raises(Unreachable):
                await agent.status()

    asyncio.run(main())


def test_clients_do_not_wait_for_ever(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    ended = asyncio.Event()

    async def never(request: Request, _payload: bytearray, _arrived: float) -> Answered:
        await ended.wait()
        return Done(id=request.id), ()

    async def work(door: Door) -> None:
        def blocking() -> None:
            with Client(path, timeout_ms=50) as agent, pytest.raises(Unreachable) as caught:
                agent.reading("x", 1.0)
            assert caught.value.code == "transfer.timeout"

        await asyncio.to_thread(blocking)
        async with AsyncClient(path, timeout_ms=50) as agent:
            with pytest.raises(Unreachable) as caught:
                await agent.reading("x", 1.0)
            assert caught.value.code == "transfer.timeout"
        ended.set()

    at_door(path, never, work)


def test_feedback_is_sent_once_and_the_next_call_connects_anew(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    received: list[str] = []

    async def take(request: Request, _payload: bytearray, _arrived: float) -> Answered:
        if isinstance(request, Feedback):
            received.append(request.request)
            if request.request == "hang-up":
                for connection in list(current[0]._connections):
                    connection.link.abort()
        return Done(id=request.id), ()

    current: list[Door] = []

    async def work(door: Door) -> None:
        current.append(door)
        with Client(path) as blocking:
            await asyncio.to_thread(blocking.feedback, "one")
            with pytest.raises(Unreachable) as lost:
                await asyncio.to_thread(blocking.feedback, "hang-up")
            assert lost.value.code == "transfer.lost"
            await asyncio.to_thread(blocking.feedback, "two")
            for connection in list(door._connections):  # an agent that restarts between two calls
                connection.link.abort()
            await asyncio.sleep(0)
            await asyncio.to_thread(blocking.feedback, "three")
        async with AsyncClient(path) as agent:
            with pytest.raises(Unreachable):
                await agent.feedback("hang-up")
            await agent.feedback("four")
        assert received == ["one", "hang-up", "two", "three", "hang-up", "four"]

    at_door(path, take, work)
