"""Model hosts as real processes: crashes, hangs, hostile models, limits, and nothing left behind."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.adapters.children import sweep_orphans
from edge_agent.adapters.hosts import HostOptions, LiveHost, LiveHosts
from edge_agent.adapters.system import SystemClock
from edge_agent.client import Client
from edge_agent.ports import HostReady
from shared.errors import HostLost, ModelError, OutriderError
from shared.inference import TensorHead
from shared.model import Signature, TensorSpec, encode_manifest
from tests.conftest import ROOT
from tests.fakes import hostile_models as hostile
from tests.fakes.releases import Build, build, sign_classifier

pytestmark = pytest.mark.live
HEAD = (TensorHead(name="x", dtype="fp32", shape=(1, 2)),)
ROW = struct.pack("<2f", 1, 2)

Work = Callable[[LiveHost, HostReady], Awaitable[None]]


LITERT = importlib.util.find_spec("ai_edge_litert") is not None


def play(
    tmp_path: Path,
    made: Build,
    work: Work,
    *,
    stuck_ms: int = 10_000,
    memory_bytes: int = 0,
    python: str = sys.executable,
) -> list[str]:
    """Start a host, do the work, stop it; returns what `on_lost` was told."""
    lost: list[str] = []

    async def main() -> None:
        options = HostOptions(stuck_ms=stuck_ms, memory_bytes=memory_bytes, python=python)
        hosts = LiveHosts(directory=tmp_path / "hosts", clock=SystemClock(), options=options)
        model_fd, golden_fd = made.open(tmp_path)
        host, ready = await hosts.start(
            manifest=made.manifest,
            variant=made.variant,
            model_fd=model_fd,
            golden_fd=golden_fd,
            on_lost=lost.append,
        )
        try:
            await work(host, ready)
        finally:
            await host.stop()
        assert not Path(f"/proc/{host.pid}").exists()
        assert [path.name for path in (tmp_path / "hosts").iterdir()] == ["empty"]

    asyncio.run(main())
    return lost


def refused(tmp_path: Path, made: Build) -> ModelError:
    async def work(host: LiveHost, ready: HostReady) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(ModelError) as caught:
        play(tmp_path, made, work)
    assert [path.name for path in (tmp_path / "hosts").iterdir()] == ["empty"]
    return caught.value


def until(condition: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def spinner() -> Build:
    """Answers small numbers at once; loops as many times as its input says."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["sum", "one"], ["sum_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, None),
        ],
        [numpy_helper.from_array(np.array([1], dtype=np.float32), "one")],
    )
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["turns"], ["most"], keepdims=0),
            helper.make_node("Loop", ["most", "always", "zero"], ["total"], body=body),
        ],
        "spinner",
        [helper.make_tensor_value_info("turns", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, [1])],
        [
            numpy_helper.from_array(np.array(True), "always"),
            numpy_helper.from_array(np.array([0], dtype=np.float32), "zero"),
        ],
    )
    return build(graph, golden={"turns": np.array([1, 2], dtype=np.int64)})


def test_an_endless_loop_times_out_and_is_killed(tmp_path: Path) -> None:
    async def work(host: LiveHost, ready: HostReady) -> None:
        heads = (TensorHead(name="turns", dtype="int64", shape=(1,)),)
        answer = await host.infer(heads, struct.pack("<q", 7), deadline_ms=5000)
        assert struct.unpack("<f", answer.payload) == (7.0,)
        with pytest.raises(TimeoutError):
            await host.infer(heads, struct.pack("<q", 2**60), deadline_ms=50)
        with pytest.raises(HostLost, match="more than 400 ms"):
            await host.infer(heads, struct.pack("<q", 1), deadline_ms=20_000)

    lost = play(tmp_path, spinner(), work, stuck_ms=400)
    assert lost == ["it worked on one request for more than 400 ms"]


def test_requests_that_nobody_waits_for_any_more_take_no_place(tmp_path: Path) -> None:
    async def work(host: LiveHost, ready: HostReady) -> None:
        heads = (TensorHead(name="turns", dtype="int64", shape=(1,)),)

        async def give_up() -> None:
            with pytest.raises(TimeoutError):
                await host.infer(heads, struct.pack("<q", 2**60), deadline_ms=50)

        for _ in range(2):
            async with asyncio.TaskGroup() as group:
                for _ in range(200):
                    group.create_task(give_up())

    play(tmp_path, spinner(), work, stuck_ms=20_000)


def test_a_stuck_host_does_not_hold_up_stop_for_long(tmp_path: Path) -> None:
    async def work(host: LiveHost, ready: HostReady) -> None:
        heads = (TensorHead(name="turns", dtype="int64", shape=(1,)),)
        with pytest.raises(TimeoutError):
            await host.infer(heads, struct.pack("<q", 2**60), deadline_ms=20)

    assert play(tmp_path, spinner(), work) == []


def test_kill_in_the_middle_of_a_request(tmp_path: Path) -> None:
    async def work(host: LiveHost, ready: HostReady) -> None:
        heads = (TensorHead(name="turns", dtype="int64", shape=(1,)),)
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(_lost(host, heads, struct.pack("<q", 2**60)))
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.05, os.kill, host.pid, signal.SIGSEGV)
        assert "SIGSEGV" in asked.result()

    assert play(tmp_path, spinner(), work) == ["ended by SIGSEGV"]


async def _lost(host: LiveHost, heads: tuple[TensorHead, ...], payload: bytes) -> str:
    with pytest.raises(HostLost) as caught:
        await host.infer(heads, payload, deadline_ms=20_000)
    return caught.value.message


def test_signals_for_the_whole_group_do_not_end_a_host(tmp_path: Path) -> None:
    async def work(host: LiveHost, ready: HostReady) -> None:
        os.kill(host.pid, signal.SIGTERM)
        os.kill(host.pid, signal.SIGINT)
        assert (await host.infer(HEAD, ROW, deadline_ms=5000)).labels == ("high",)

    assert play(tmp_path, sign_classifier(), work) == []


def test_a_host_gives_up_its_rights(tmp_path: Path) -> None:
    async def work(host: LiveHost, ready: HostReady) -> None:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{host.pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert int(status["CapEff"], 16) == 0
        assert status["NoNewPrivs"] == "1"
        assert Path(f"/proc/{host.pid}/cwd").readlink() == (tmp_path / "hosts" / "empty").resolve()
        assert Path(f"/proc/{host.pid}/oom_score_adj").read_text().strip() == "500"
        assert "Max core file size        0 " in Path(f"/proc/{host.pid}/limits").read_text()
        assert not any(b"OUTRIDER" in entry for entry in Path(f"/proc/{host.pid}/environ").read_bytes().split(b"\0"))
        descriptors = [path.readlink().name for path in Path(f"/proc/{host.pid}/fd").iterdir()]
        assert not any(name.startswith(("model-", "golden-")) for name in descriptors)

    assert play(tmp_path, sign_classifier(), work) == []


def test_more_memory_than_allowed_ends_the_host(tmp_path: Path) -> None:
    async def work(host: LiveHost, ready: HostReady) -> None:
        heads = (TensorHead(name="size", dtype="int64", shape=(1,)),)
        assert 1_000_000 < host.rss_bytes() < 150_000_000

        async def ask_on() -> None:
            while True:
                await host.infer(heads, struct.pack("<q", 64_000_000), deadline_ms=20_000)

        with pytest.raises(HostLost, match="are allowed"):
            await asyncio.wait_for(ask_on(), 20)

    lost = play(tmp_path, growing(), work, memory_bytes=150_000_000, stuck_ms=20_000)
    assert len(lost) == 1
    assert "150000000 are allowed" in lost[0]


def growing() -> Build:
    """Takes four bytes for each that its input asks for."""
    graph = helper.make_graph(
        [
            helper.make_node("Expand", ["one", "size"], ["big"]),
            helper.make_node("ReduceSum", ["big"], ["y"], keepdims=0),
        ],
        "growing",
        [helper.make_tensor_value_info("size", TensorProto.INT64, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(np.array([1], dtype=np.float32), "one")],
    )
    return build(graph, golden={"size": np.array([8], dtype=np.int64)})


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (sign_classifier(altered=(1, 0, 0, 1)), "model.golden"),
        (sign_classifier(model=b"\x08\x09this is no model"), "model.admission"),
        (sign_classifier(model=hostile.FOREIGN["a pickle of protocol 4"].make()), "model.admission"),
        (sign_classifier(model=hostile.external("hardlink.bin")), "model.admission"),
        (sign_classifier(runtime="litert"), "model.admission" if LITERT else "model.runtime_missing"),
    ],
)
def test_a_release_that_does_not_hold_is_refused(tmp_path: Path, made: Build, code: str) -> None:
    error = refused(tmp_path, made)
    assert error.code == code
    assert error.hint


@pytest.mark.skipif(not LITERT, reason="pip install 'outrider[litert]'")
def test_an_honest_litert_model_passes_the_gate_and_serves(tmp_path: Path) -> None:
    rows = Signature(
        inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1, 2)),),
        outputs=(TensorSpec(name="y", dtype="fp32", shape=(-1, 2)),),
    )

    async def work(host: LiveHost, ready: HostReady) -> None:
        assert ready.agreement == 1.0
        head = TensorHead(name="x", dtype="fp32", shape=(1, 2))
        answer = await host.infer((head,), np.array([[1, 4]], np.float32).tobytes(), deadline_ms=10_000)
        assert answer.labels == ("high",)
        assert np.frombuffer(answer.payload, np.float32).tolist() == [2, 8]

    play(tmp_path, sign_classifier(runtime="litert", model=hostile.litert(), signature=rows), work)


def test_a_file_of_another_length_is_refused(tmp_path: Path) -> None:
    made = sign_classifier()
    other = Build(manifest=made.manifest, model=made.model + b"x", golden=made.golden)
    assert refused(tmp_path, other).code == "model.corrupt"


def test_a_raw_model_with_values_that_are_no_numbers_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Log", ["x"], ["y"])],
        "log",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 1])],
    )
    bad = build(graph, golden={"x": np.array([[-1.0]], dtype=np.float32)})
    assert refused(tmp_path, bad).code == "model.golden"
    good = build(graph, golden={"x": np.array([[1.0]], dtype=np.float32)})

    async def work(host: LiveHost, ready: HostReady) -> None:
        heads = (TensorHead(name="x", dtype="fp32", shape=(1, 1)),)
        answer = await host.infer(heads, struct.pack("<f", -1), deadline_ms=5000)
        assert np.isnan(np.frombuffer(answer.payload, dtype="<f4")).all()
        assert answer.labels == ()

    assert play(tmp_path, good, work) == []


def test_a_python_that_cannot_start_a_host_is_named(tmp_path: Path) -> None:
    async def main(python: str) -> None:
        made = sign_classifier()
        hosts = LiveHosts(directory=tmp_path / "hosts", clock=SystemClock(), options=HostOptions(python=python))
        model_fd, golden_fd = made.open(tmp_path)
        await hosts.start(
            manifest=made.manifest, variant=made.variant, model_fd=model_fd, golden_fd=golden_fd, on_lost=lambda _: None
        )

    with pytest.raises(ModelError, match="cannot be started") as caught:
        asyncio.run(main("/nowhere/python"))
    assert caught.value.code == "model.host_start"
    with pytest.raises(HostLost, match="exit status 1"):
        asyncio.run(main("/bin/false"))


def test_a_host_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o700)

    async def main() -> None:
        made = sign_classifier()
        options = HostOptions(python=str(sleeper), start_ms=100)
        hosts = LiveHosts(directory=tmp_path / "hosts", clock=SystemClock(), options=options)
        model_fd, golden_fd = made.open(tmp_path)
        await hosts.start(
            manifest=made.manifest, variant=made.variant, model_fd=model_fd, golden_fd=golden_fd, on_lost=lambda _: None
        )

    with pytest.raises(ModelError) as caught:
        asyncio.run(main())
    assert caught.value.code == "model.load_timeout"


def core(directory: Path, made: Build) -> tuple[subprocess.Popen[bytes], int]:
    """A core process with one host; returns it and the host's process id."""
    (directory / "manifest.json").write_bytes(encode_manifest(made.manifest))
    (directory / "model").write_bytes(made.model)
    (directory / "golden").write_bytes(made.golden)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.door_core", str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    return process, int(json.loads(line)["host_pid"])


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(timeout=10)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


def test_kill_9_of_the_core_takes_its_host_with_it(short_tmp: Path) -> None:
    process, host_pid = core(short_tmp, sign_classifier())
    assert is_alive(host_pid)
    end(process)
    until(lambda: not is_alive(host_pid))
    assert (short_tmp / "hosts" / str(host_pid)).exists()
    assert sweep_orphans(short_tmp / "hosts") == 0
    assert not (short_tmp / "hosts" / str(host_pid)).exists()


def test_kill_9_of_the_core_takes_a_busy_host_with_it(short_tmp: Path) -> None:
    process, host_pid = core(short_tmp, spinner())
    with Client(short_tmp / "door.sock", timeout_ms=100) as agent, pytest.raises(OutriderError) as caught:
        agent.infer("sample", {"turns": np.array([2**60], dtype=np.int64)}, deadline_ms=50)
    assert caught.value.code == "deadline"
    assert is_alive(host_pid)
    end(process)
    until(lambda: not is_alive(host_pid))


def test_the_end_of_the_pipe_ends_a_host_too(short_tmp: Path) -> None:
    process, host_pid = core(short_tmp, sign_classifier())
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=10) == 0
    until(lambda: not is_alive(host_pid))
    assert process.stdout is not None
    process.stdout.close()


def test_orphans_are_swept_and_strangers_are_left_alone(tmp_path: Path) -> None:
    lookalike = [sys.executable, "-c", "import time; time.sleep(60)", "edge_agent.host"]
    stranger, orphan, successor = (subprocess.Popen(command) for command in (["sleep", "60"], lookalike, lookalike))
    try:
        for process in (orphan, successor):
            until(lambda pid=process.pid: b"edge_agent.host" in Path(f"/proc/{pid}/cmdline").read_bytes())  # type: ignore[misc]
        for process in (stranger, orphan):
            birth = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
            (tmp_path / str(process.pid)).write_text(birth + "\n")
        (tmp_path / str(successor.pid)).write_text("1\n")
        assert sweep_orphans(tmp_path) == 1
        assert orphan.wait(timeout=10) == -signal.SIGKILL
        assert stranger.poll() is None
        assert successor.poll() is None
        assert list(tmp_path.iterdir()) == []
    finally:
        for process in (stranger, orphan, successor):
            process.kill()
            process.wait()


HOSTILE = """#!{python}
import socket, sys, time
from edge_agent.framing import FrameReader, build_frame
from edge_agent.host import protocol
link = socket.socket(fileno=int(sys.argv[sys.argv.index("edge_agent.host") + 1]))
reader = FrameReader()
def receive():
    while (frame := reader.next_frame()) is None:
        reader.received(link.recv_into(reader.buffer()))
    return protocol.decode_to_host(frame[0])
def send(header, payload=b""):
    for part in build_frame(header, (payload,)):
        link.sendall(part)
receive()
send(protocol.encode(protocol.Loaded(agreement=1.0, rss_bytes=1, network=False)))
run = receive()
scores = (dict(name="scores", dtype="fp32", shape=(1, 2)),)
def ran(**changes):
    fields = dict(id=run.id, labels=("high",), confidences=(1.0,), outputs=()) | changes
    return protocol.encode(protocol.Ran(**fields))
{what}
time.sleep(60)
"""


@pytest.mark.parametrize(
    "what",
    [
        "send(ran(id=run.id + 1))",
        "send(ran(), b'more')",
        "send(ran(labels=()))",
        "send(ran(outputs=(protocol.TensorHead(name='s', dtype='fp32', shape=(-1, -2)),)), b'12345678')",
        "send(b'garbage')",
        "link.sendall(b'this is no frame')",
        "link.close()",
        "send(ran()); send(ran())",
    ],
)
def test_a_host_that_was_taken_over_is_killed(tmp_path: Path, what: str) -> None:
    python = tmp_path / "python"
    python.write_text(HOSTILE.format(python=sys.executable, what=what))
    python.chmod(0o700)

    async def work(host: LiveHost, ready: HostReady) -> None:
        async def ask_twice() -> None:
            for _ in range(2):
                await host.infer(HEAD, ROW, deadline_ms=20_000)

        with pytest.raises(HostLost):
            await ask_twice()

    lost = play(tmp_path, sign_classifier(), work, python=str(python))
    assert len(lost) == 1
    assert "worked on one request" not in lost[0], "it was only noticed because it went on to say nothing"
