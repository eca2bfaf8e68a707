"""The hub's answers under load, against the raw runtime and against peers, on this machine and in this run.

Throughput: 32 closed-loop clients in another process, one row each, an MLP of 3.8 million parameters, one runtime
thread. `vs_raw_batch32`: answers a second over rows a second of a bare loop of batches of 32 (client, HTTP and all that
a server does are what is missing to 1). `vs_mlserver`, `vs_litserve`: over the peer's answers a second, the same model
and load. Plain HTTP for all. All servers are up, all but the measured one are stopped; they take turns, and a ratio is
the median of the rounds' ratios, because neighbours on the machine come and go.

Overload: an open loop at two and four times the capacity (what 64 closed-loop clients get), a convolution net whose
batch of 32 takes tens of milliseconds, and a deadline of four such batches. `goodput_2x`, `goodput_4x`: answers in time
a second over the capacity. `late_share`: answers that came late over all answers, the worse of the two.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from scripts.story.stage import free_ports
from shared.inference import TensorHead
from shared.wire import oip
from tests.bench._offload_load import Plan, Report
from tests.bench._offload_peers import LITSERVE, MLSERVER, ROOT, Peer

WIDTH = 784
SIDE = 16
START_S = 40.0
RAW_S = 2.0
ROUNDS = 3
BATCHES_OF_PATIENCE = 4


def run() -> dict[str, float]:
    """Measure; takes about two minutes, and as much again when the peers are installed for the first time."""
    with tempfile.TemporaryDirectory(prefix="or-offload-") as place:
        folder = Path(place)
        mlp, net = folder / "mlp.onnx", folder / "net.onnx"
        mlp.write_bytes(multilayer())
        net.write_bytes(convolutions())
        with contextlib.ExitStack() as servers:
            own = servers.enter_context(ours(folder))
            figures = overload(own.port, net)
            row = Contender(own, row_request("mlp", (1, WIDTH)))
            peers = {peer.name: found for peer in (MLSERVER, LITSERVE) if (found := join(peer, servers, folder, mlp))}
            return figures | throughput(row, peers, mlp)


def throughput(own: Contender, peers: dict[str, Contender], mlp: Path) -> dict[str, float]:
    """Rounds in which all take turns."""
    raw: list[float] = []
    reports: list[Report] = []
    rates: dict[str, list[float]] = {name: [] for name in peers}
    for contender in (own, *peers.values()):
        contender.server.pause()
    for _ in range(ROUNDS):
        raw.append(raw_rows_per_s(mlp))
        reports.append(own.measure())
        for name, peer in peers.items():
            report = peer.measure()
            if report.failed:
                print(f"offload: {name} failed {report.failed} of {report.sent} requests", file=sys.stderr)
            rates[name].append(max(1, report.good) / report.seconds)
    mine = [report.good / report.seconds for report in reports]
    return {
        "vs_raw_batch32": _ratio(mine, raw),
        **{f"vs_{name}": _ratio(mine, found) for name, found in rates.items()},
        "answers_per_s": statistics.median(mine),
        "p50_ms": statistics.median(report.p50_ms for report in reports),
        "p99_ms": statistics.median(report.p99_ms for report in reports),
        "raw_rows_per_s": statistics.median(raw),
        **{f"{name}_per_s": statistics.median(found) for name, found in rates.items()},
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


class Server:
    """A running server with all its children: a process group of our making."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.port = port
        self._process = process

    def pause(self) -> None:
        """Stop it where it is, so that it takes nothing from who is measured."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        """End all of it: LitServe's workers outlive a signal to their parent."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)


class Contender:
    """A server, and what it is asked."""

    def __init__(self, server: Server, request: bytes) -> None:
        self.server = server
        self._request = request

    def measure(self) -> Report:
        """One turn."""
        self.server.go_on()
        try:
            return load(Plan(port=self.server.port, request=self._request, seconds=3.0, warm_up_s=1.0))
        finally:
            self.server.pause()


def overload(port: int, net: Path) -> dict[str, float]:
    """Capacity first, then twice and four times of it."""
    batch_ms = 32 / raw_rows_per_s(net, seconds=2.0) * 1000
    deadline_ms = BATCHES_OF_PATIENCE * batch_ms
    shape = (1, 1, SIDE, SIDE)
    calm = load(Plan(port=port, request=row_request("net", shape), clients=64, seconds=6.0))
    capacity = calm.good / calm.seconds
    request = row_request("net", shape, timeout=int(deadline_ms * 1000))
    figures = {"capacity_per_s": capacity, "deadline_ms": deadline_ms, "batch_ms": batch_ms}
    shares = []
    for times in (2, 4):
        plan = Plan(port=port, request=request, rate=times * capacity, deadline_ms=deadline_ms, seconds=8.0)
        report = load(plan)
        figures[f"goodput_{times}x"] = report.good / report.seconds / capacity
        figures[f"offered_{times}x"] = (report.sent + report.unsent) / report.seconds / capacity
        figures[f"failed_{times}x"] = float(report.failed + report.unsent)
        shares.append(report.late / max(1, report.good + report.late))
    return {**figures, "late_share": max(shares)}


def load(plan: Plan) -> Report:
    """The plan, carried out by the load generator's process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench._offload_load", msgspec.json.encode(plan).decode()],
        capture_output=True,
        text=True,
        timeout=plan.warm_up_s + plan.seconds + 60,
        check=True,
        cwd=ROOT,
    )
    return msgspec.json.decode(done.stdout, type=Report)


def raw_rows_per_s(model: Path, *, seconds: float = RAW_S) -> float:
    """A bare loop of batches of 32 in one thread, in a process of its own: the median of its tenths of a second."""
    script = f"""
import time, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession({str(model)!r}, options, providers=["CPUExecutionProvider"])
shape = [32, *session.get_inputs()[0].shape[1:]]
x = numpy.random.default_rng(0).standard_normal(shape).astype(numpy.float32)
end = time.perf_counter() + {seconds}
while (began := time.perf_counter()) < end:
    session.run(None, {{"x": x}})
    print(time.perf_counter() - began)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    times = [float(line) for line in done.stdout.split()]
    return 32 / statistics.median(times[len(times) // 4 :])


@contextlib.contextmanager
def ours(folder: Path) -> Iterator[Server]:
    """The hub's offload room."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.bench._offload_server", str(port), str(folder)]
    with started(command, cwd=ROOT, port=port, ready="/v2/health/ready") as server:
        yield server


def join(peer: Peer, servers: contextlib.ExitStack, folder: Path, model: Path) -> Contender | None:
    """A running peer; None, with a line on stderr, when it cannot be had."""
    place = folder / peer.name
    place.mkdir()
    ports = free_ports(2)
    row = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32).tobytes()
    try:
        command = peer.command(place, model=model, ports=ports, width=WIDTH)
        server = servers.enter_context(started(command, cwd=place, port=ports[0], ready=peer.ready))
    except (subprocess.SubprocessError, OSError) as error:
        reason = getattr(error, "stderr", b"") or error
        print(f"offload: {peer.name} could not be measured: {str(reason)[-400:]}", file=sys.stderr)
        return None
    return Contender(server, http_request(peer.path, peer.body(row)))


@contextlib.contextmanager
def started(command: list[str], *, cwd: Path, port: int, ready: str) -> Iterator[Server]:
    """A server from ready to gone."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, start_new_session=True)
        server = Server(process, port)
        try:
            _await_ready(process, f"http://127.0.0.1:{port}{ready}")
            yield server
        finally:
            server.end()


def _await_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OSError(f"the server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise TimeoutError(f"no answer from {url} within {START_S} s")


def row_request(model: str, shape: tuple[int, ...], **parameters: Any) -> bytes:
    """One row by the binary form of the protocol."""
    row = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    request = oip.OipRequest(
        inputs=(TensorHead(name="x", dtype="fp32", shape=shape),),
        payload=(row.tobytes(),),
        parameters={"binary_data_output": True, **parameters},
    )
    length, parts = oip.encode_request(request)
    path = f"/v2/models/{model}/infer"
    return http_request(path, b"".join(parts), f"{oip.JSON_LENGTH_HEADER}: {length}\r\n")


def http_request(path: str, body: bytes, headers: str = "Content-Type: application/json\r\n") -> bytes:
    """Head and body."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def multilayer() -> bytes:
    """784 numbers in, ten scores out, 3.8 million parameters between."""
    sizes = (WIDTH, 1600, 1600, 10)
    nodes, last = [], "x"
    random = np.random.default_rng(0)
    weights = []
    for layer, (inner, outer) in enumerate(itertools.pairwise(sizes)):
        final = layer == len(sizes) - 2
        values = (random.standard_normal((inner, outer)) * (2 / inner) ** 0.5).astype(np.float32)
        weights += [numpy_helper.from_array(values, f"w{layer}"), _zeros(f"b{layer}", outer)]
        nodes.append(helper.make_node("Gemm", [last, f"w{layer}", f"b{layer}"], ["scores" if final else f"h{layer}"]))
        if not final:
            nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    return _model("mlp", nodes, weights, [None, WIDTH])


def convolutions(*, layers: int = 8, channels: int = 96) -> bytes:
    """A 16 x 16 image in, ten scores out: tens of milliseconds for a batch of 32, and little to send."""
    random = np.random.default_rng(0)
    weights, nodes, last = [], [], "x"
    for layer in range(layers):
        inner = 1 if layer == 0 else channels
        values = (random.standard_normal((channels, inner, 3, 3)) * (2 / (inner * 9)) ** 0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    weights.append(numpy_helper.from_array(random.standard_normal((channels, 10)).astype(np.float32), "head"))
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["scores"]),
    ]
    return _model("net", nodes, weights, [None, 1, SIDE, SIDE])


def _zeros(name: str, size: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.zeros(size, dtype=np.float32), name)


def _model(name: str, nodes: list[Any], weights: list[Any], shape: list[Any]) -> bytes:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 10])],
        weights,
    )
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    ).SerializeToString()
    return data


if __name__ == "__main__":
    for key, figure in run().items():
        sys.stdout.write(f"{key} {figure:.3f}\n")
