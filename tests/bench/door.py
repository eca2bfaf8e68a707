"""The door's price: a model asked through the socket against the same file in this process; memory; start.

`framed_vs_inprocess`: p50 of a blocking client's `infer` (client -> door -> model host and back, three processes)
over p50 of the bare engine's `run` on the very file that is served, blocks of both taken in turns, a net of about
2 ms on 16 kB, one thread, no cache. `oip_vs_inprocess`: the same over HTTP on the same socket, the Open Inference
Protocol with binary tensors, asked with Python's http.client over one connection. `host_start_ms`: median from the
start of a model host's process to its first answer, golden check included. `core_rss_mb`, `with_model_rss_mb`: of a
daemon that has verified, committed and served that release (tests/bench/_served.py), alone and together with its
model host; PSS beside it. `core_rss_oip_mb`: of the core once it has spoken HTTP as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_agent.adapters.hosts import LiveHosts
from edge_agent.adapters.system import SystemClock
from edge_agent.client import Client
from edge_agent.runtimes import find_loader
from shared.inference import TensorHead
from shared.wire.oip import JSON_LENGTH_HEADER, OipRequest, Parameters, decode_response, encode_request
from tests.bench._served import Served, served
from tests.fakes.releases import Build, build

ROOT = Path(__file__).resolve().parent.parent.parent
SIDE = 64
BLOCKS = 20
BLOCK = 25
STARTS = 7
WANTED_MS = 2.0


def run() -> dict[str, float]:
    """Measure; takes about half a minute."""
    made = two_ms_model()
    figures = {"host_start_ms": host_start_ms(made)}
    with served(made) as agent:
        figures |= framed_vs_inprocess(agent.door, made, agent.model)
        figures |= memory(agent)
        figures |= oip_vs_inprocess(agent.door, made, agent.model)
        return figures | {"core_rss_oip_mb": sizes_mb(agent.pid)[0]}


def two_ms_model() -> Build:
    """A convolution net whose int8 variant takes about 2 ms here, on one 64 x 64 image of float32 (16 kB).

    The hub's variant is what will be served and timed; how much faster it is than float32 is tried on a small one.
    """
    speed_up = _int8_speed_up(convolutions(8))
    layers = 1
    while True:
        made = convolutions(layers)
        took = statistics.median(_timed(_runner(made.model), 15)[5:]) / speed_up
        if took >= WANTED_MS * 0.9 or layers >= 64:
            return made
        layers = max(layers + 1, round(layers * min(WANTED_MS / took, 4)))


def _int8_speed_up(made: Build) -> float:
    """How many times faster a static QDQ variant is than float32, as the hub builds it."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class OneImage(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest = [{"x": np.ones((1, 1, SIDE, SIDE), dtype=np.float32)}]

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return self._rest.pop() if self._rest else None

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(made.model)
        quantize_static(
            source,
            target,
            OneImage(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        int8 = target.read_bytes()
    slow, fast = (statistics.median(_timed(_runner(model), 30)[10:]) for model in (made.model, int8))
    return slow / fast


def convolutions(layers: int) -> Build:
    """`layers` 3 x 3 convolutions of 16 channels, pooled and turned into ten scores."""
    random = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> TensorProto:
        scale = (2 / np.prod(shape[1:])) ** 0.5
        return numpy_helper.from_array((random.standard_normal(shape) * scale).astype(np.float32), name)

    weights, nodes, last = [], [], "x"
    for layer in range(layers + 1):
        weights.append(weight(f"w{layer}", 16, 1 if layer == 0 else 16, 3, 3))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    weights.append(weight("head", 16, 10))
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 1, SIDE, SIDE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 10])],
        weights,
    )
    images = random.standard_normal((4, 1, SIDE, SIDE)).astype(np.float32)
    draft = build(graph, golden={"x": images})
    scores = find_loader("onnx")(draft.model, threads=1).run({"x": images})["scores"]
    answers = tuple(int(winner) for winner in scores.argmax(axis=1))
    return build(graph, golden={"x": images}, answers=answers, labels=tuple("0123456789"))


def framed_vs_inprocess(door: Path, made: Build, model: bytes) -> dict[str, float]:
    """Blocks of both in turns; p50 in milliseconds and their ratio."""
    image = np.random.default_rng(2).standard_normal((1, 1, SIDE, SIDE)).astype(np.float32)
    with Client(door) as client:

        def ask() -> None:
            client.infer(made.manifest.family, {"x": image}, deadline_ms=1000)

        framed, bare = _in_turns(ask, _runner(model, image))
    framed_ms, bare_ms = statistics.median(framed), statistics.median(bare)
    return {
        "framed_vs_inprocess": framed_ms / bare_ms,
        "framed_p50_ms": framed_ms,
        "framed_p99_ms": statistics.quantiles(framed, n=100)[98],
        "inprocess_p50_ms": bare_ms,
        "inprocess_p99_ms": statistics.quantiles(bare, n=100)[98],
    }


def oip_vs_inprocess(door: Path, made: Build, model: bytes) -> dict[str, float]:
    """The same over HTTP."""
    image = np.random.default_rng(2).standard_normal((1, 1, SIDE, SIDE)).astype(np.float32)
    head = TensorHead(name="x", dtype="fp32", shape=image.shape)
    path = f"/v2/models/{made.manifest.family}/infer"
    with socket.socket(socket.AF_UNIX) as stream, contextlib.closing(http.client.HTTPConnection("door")) as link:
        stream.connect(str(door))
        link.sock = stream

        def ask() -> None:
            parameters: Parameters = {"timeout": 1_000_000, "binary_data_output": True}
            asked = OipRequest(inputs=(head,), payload=(image.tobytes(),), parameters=parameters)
            length, parts = encode_request(asked)
            link.request("POST", path, body=b"".join(parts), headers={JSON_LENGTH_HEADER: str(length)})
            got = link.getresponse()
            answer = decode_response(got.read(), json_length=int(got.headers[JSON_LENGTH_HEADER]))
            np.frombuffer(answer.payload[0], np.float32).reshape(answer.outputs[0].shape)

        asked, bare = _in_turns(ask, _runner(model, image))
    return {
        "oip_vs_inprocess": statistics.median(asked) / statistics.median(bare),
        "oip_p50_ms": statistics.median(asked),
        "oip_p99_ms": statistics.quantiles(asked, n=100)[98],
    }


def _in_turns(ask: Callable[[], object], inprocess: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Milliseconds of each call of both, in blocks that alternate."""
    asked: list[float] = []
    bare: list[float] = []
    for block in range(BLOCKS + 1):
        both = _timed(ask, BLOCK), _timed(inprocess, BLOCK)
        if block > 0:  # the first block warms both up
            asked += both[0]
            bare += both[1]
    return asked, bare


def host_start_ms(made: Build) -> float:
    """Median milliseconds from starting a host's process to its first answer."""
    heads = (TensorHead(name="x", dtype="fp32", shape=(1, 1, SIDE, SIDE)),)

    async def start_once(folder: Path) -> float:
        hosts = LiveHosts(directory=folder / "hosts", clock=SystemClock())
        model_fd, golden_fd = made.open(folder)
        began = time.perf_counter()
        host, _ = await hosts.start(
            manifest=made.manifest, variant=made.variant, model_fd=model_fd, golden_fd=golden_fd, on_lost=print
        )
        await host.infer(heads, bytes(SIDE * SIDE * 4), deadline_ms=5000)
        took = (time.perf_counter() - began) * 1000
        await host.stop()
        return took

    with tempfile.TemporaryDirectory() as folder:
        return statistics.median(asyncio.run(start_once(Path(folder))) for _ in range(STARTS))


def memory(agent: Served) -> dict[str, float]:
    """Resident and proportional size of the core alone and with its model host.

    In MB of 1,048,576 bytes, as free(1) counts.
    """
    core_rss, core_pss = sizes_mb(agent.pid)
    host_rss, host_pss = sizes_mb(agent.host_pid)
    return {
        "core_rss_mb": core_rss,
        "core_pss_mb": core_pss,
        "with_model_rss_mb": core_rss + host_rss,
        "with_model_pss_mb": core_pss + host_pss,
    }


def sizes_mb(pid: int) -> tuple[float, float]:
    """Resident and proportional size of a process (proc(5), smaps_rollup)."""
    fields = dict.fromkeys(("Rss", "Pss"), 0.0)
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name in fields:
            fields[name] = int(rest.split()[0]) / 1024
    return fields["Rss"], fields["Pss"]


def _runner(model: bytes, image: NDArray[np.float32] | None = None) -> Callable[[], object]:
    """A call of the bare engine in this process."""
    engine = find_loader("onnx")(model, threads=1)
    feeds = {"x": np.zeros((1, 1, SIDE, SIDE), dtype=np.float32) if image is None else image}
    return lambda: engine.run(feeds)


def _timed(work: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of each call."""
    took = []
    for _ in range(times):
        began = time.perf_counter_ns()
        work()
        took.append((time.perf_counter_ns() - began) / 1e6)
    return took


if __name__ == "__main__":
    for key, figure in run().items():
        sys.stdout.write(f"{key} {figure:.3f}\n")
