"""Federated rounds: a real hub with its broker and devices that only learn, against Flower's own engine.

    round_s_10x1mb        seconds of a round with 10 devices and a head of 1 MiB, TLS, certificates, all on disk
    vs_flower_superlink   how many times longer Flower's SuperLink and SuperNodes take, 3 of them, in the same run
    aggregate_vs_read_floor   aggregating 10 checked answers of 1 MiB, over reading them once with numpy
    aggregate_vs_flower   Flower's own aggregation over ours; this version uses it and checks its result, so below 1
    upload_ratio_topk     bytes of a float32 head over bytes sent; this version sends it whole, so about 1
    accuracy_loss_pt      points lost by what is sent instead of the head itself; nothing else is sent, so 0

Ten SuperNodes do not finish a round within minutes on two cores, so the comparison is made with three on both sides,
with our rounds measured before and after. What a peer cannot do here is told on stderr, and its key is left out.
"""

from __future__ import annotations

import hashlib
import io
import logging
import statistics
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from scripts.story.stage import free_ports
from shared.federated import Array, ArrayRecord, FlowerRecord, MetricRecord, reply_to
from shared.wire.flower import decode_message, encode_message
from shared.wire.golden import GoldenSet, GoldenTensor, encode_golden
from tests.bench import _rounds_peer
from tests.fakes.hub_process import HubProcess, wait_until
from tests.fakes.light_fleet import LightDevice

FAMILY: Final = "bench"
BASE: Final = "1.0.0"
CLASSES: Final = 10
WIDTH: Final = 26_214
"""With 10 classes and 4 bytes each: a head of 1 MiB."""
PIXELS: Final = 8
DEVICES: Final = 10
FEW: Final = 3
ROUNDS: Final = 12
PEER_ROUNDS: Final = 4
REPEATS: Final = 60


def run() -> dict[str, float]:
    """Measure all of it; the peer as far as it comes."""
    figures: dict[str, float] = {}
    sent: list[int] = []
    with _hub() as hub, ExitStack() as stack:
        _push_base(hub)
        answer = _answerer(sent)
        for number in range(FEW):
            stack.callback(_join(hub, number, answer).close)
        ours = _rounds(hub, "2.0.0", devices=FEW)
        peer = _peer()
        ours += _rounds(hub, "2.1.0", devices=FEW)
        for number in range(FEW, DEVICES):
            stack.callback(_join(hub, number, answer).close)
        figures["round_s_10x1mb"] = statistics.median(_rounds(hub, "2.2.0", devices=DEVICES))
        if peer is not None:
            figures["vs_flower_superlink"] = peer / statistics.median(ours)
    figures |= _aggregation()
    print("rounds: answers travel uncompressed in this version", file=sys.stderr)
    figures["upload_ratio_topk"] = (WIDTH + 1) * CLASSES * 4 / statistics.median(sent)
    figures["accuracy_loss_pt"] = 0.0
    return figures


def _peer() -> float | None:
    try:
        return _rounds_peer.round_s(nodes=FEW, rounds=PEER_ROUNDS)
    except (_rounds_peer.PeerLate, OSError) as error:
        print(f"rounds: no figure against Flower's SuperLink: {error}", file=sys.stderr)
        return None


@contextmanager
def _hub() -> Iterator[HubProcess]:
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as place:
        port, broker_port = free_ports(2)
        hub = HubProcess(Path(place), port=port, broker_port=broker_port)
        hub.init()
        hub.start()
        try:
            yield hub
        finally:
            hub.stop()


def _rounds(hub: HubProcess, version: str, *, devices: int) -> list[float]:
    """Seconds of the rounds of one run, the first left out: it waits for the worker's start."""
    body = {
        "family": FAMILY, "base": BASE, "version": version, "rounds": ROUNDS, "min_devices": devices,
        "round_timeout_s": 60,
    }  # fmt: skip
    started = hub.call("POST", "/v1/rounds", body, token=hub.admin)
    if started.status != 201:
        raise RuntimeError(f"the run did not start: {started.body}")
    path = f"/v1/rounds/{started.body['run']}"

    def status() -> Any:
        return hub.call("GET", path, token=hub.admin).body

    wait_until(lambda: status()["round"] == ROUNDS or status()["finished_ms"] is not None, "the rounds", within_s=90)
    # What follows (the result is built and measured) is not a round, and would disturb the next measurement.
    wait_until(lambda: status()["finished_ms"] is not None, "the run's end", within_s=90)
    ended = status()
    if ended["state"] != "finished" or any(one["accepted"] != devices for one in ended["rounds"]):
        raise RuntimeError(f"the run went wrong: {ended['state']} {ended['reason']}")
    return [one["took_ms"] / 1000 for one in ended["rounds"][1:]]


def _join(hub: HubProcess, number: int, answer: Callable[[bytes], bytes]) -> LightDevice:
    device = hub.enrol(f"light-{number}")
    return LightDevice(device, hub_port=hub.port, family=FAMILY, version=BASE, answer=answer)


def _answerer(sent: list[int]) -> Callable[[bytes], bytes]:
    """A device's work: read the arrays, add one, write them."""

    def answer(content: bytes) -> bytes:
        message = decode_message(content)
        arrays = {}
        for name, array in (message.arrays("arrays") or {}).items():
            file = io.BytesIO()
            np.save(file, np.load(io.BytesIO(bytes(array.data))) + np.float32(1), allow_pickle=False)
            arrays[name] = Array(dtype="float32", shape=array.shape, data=file.getvalue())
        outcome: dict[str, FlowerRecord] = {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        data = encode_message(reply_to(message.metadata, outcome, created_at=message.metadata.created_at))
        sent.append(len(data))
        return data

    return answer


def _push_base(hub: HubProcess) -> None:
    random = np.random.default_rng(0)
    weights = {
        "w0": random.normal(size=(PIXELS, WIDTH)),
        "w1": random.normal(size=(WIDTH, CLASSES)) / WIDTH,
        "b1": np.zeros(CLASSES),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["s"]),
            helper.make_node("Relu", ["s"], ["features"]),
            helper.make_node("Gemm", ["features", "w1", "b1"], ["scores"]),
        ],
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", PIXELS])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", CLASSES]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", WIDTH]),
        ],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    rows = random.normal(size=(20, PIXELS)).astype(np.float32)
    golden = GoldenSet(
        samples=len(rows),
        labels=tuple(int(label) for label in random.integers(0, CLASSES, len(rows))),
        inputs=(GoldenTensor(name="x", dtype="fp32", shape=rows.shape, data=rows.tobytes()),),
    )
    body = {
        "family": FAMILY,
        "version": BASE,
        "model": _put(hub, model.SerializeToString()),
        "golden": _put(hub, encode_golden(golden)),
        "labels": [str(number) for number in range(CLASSES)],
        "gate": {"max_drop_pt": 100.0},
    }
    pushed = hub.call("POST", "/v1/models", body, token=hub.admin)
    if pushed.status != 202:
        raise RuntimeError(f"the base was refused: {pushed.body}")

    def state() -> Any:
        return hub.call("GET", f"/v1/models/{FAMILY}/{BASE}", token=hub.admin).body

    wait_until(lambda: state()["state"] != "building", "the base's build", within_s=90)
    if state()["state"] != "ready":
        raise RuntimeError(f"the base was rejected: {state()['report']}")


def _put(hub: HubProcess, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    request = urllib.request.Request(f"https://localhost:{hub.port}/v1/blobs/{digest}", data=data, method="PUT")
    request.add_header("Authorization", f"Bearer {hub.admin}")
    with urllib.request.urlopen(request, context=hub.context(), timeout=30):
        return digest


def _aggregation() -> dict[str, float]:
    """Our step from checked answers to the next head, the floor of reading them, and Flower's step alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from flwr.app import Array as FlowerArray
        from flwr.app import ArrayRecord as FlowerArrays
        from flwr.app import Message, RecordDict
        from flwr.app import MetricRecord as FlowerMetrics
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
        from flwr.supercore.task_identity import TaskIdentity

        from cloud_hub.rounds import replies, rules, strategies
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    random = np.random.default_rng(0)
    template = {"head": np.zeros(_rounds_peer.FLOATS, np.float32)}
    arrays = [random.normal(size=_rounds_peer.FLOATS).astype(np.float32) for _ in range(DEVICES)]
    spec = rules.Spec(family=FAMILY, base=BASE, version="2.0.0")  # type: ignore[arg-type]
    strategy = strategies.make(spec)
    messages = []
    for number, array in enumerate(arrays):
        request = Message(RecordDict({}), number + 2, "train")
        record = RecordDict({
            "arrays": FlowerArrays({"head": FlowerArray(array)}), "metrics": FlowerMetrics({"num-examples": 1.0})
        })  # fmt: skip
        messages.append(Message(record, reply_to=request))

    def ours() -> None:
        made, _ = strategy.aggregate_train(1, messages)
        assert made is not None
        replies.restored(made, template)

    def floor() -> None:
        for array in arrays:
            array.sum()

    def flower() -> None:
        aggregate_arrayrecords([message.content for message in messages], "num-examples")

    ours_s, floor_s, flower_s = _interleaved(ours, floor, flower)
    return {"aggregate_vs_read_floor": ours_s / floor_s, "aggregate_vs_flower": flower_s / ours_s}


def _interleaved(*works: Callable[[], None]) -> Sequence[float]:
    """The least seconds of each, in turns and in turning order: what else runs here only ever adds to them."""
    times: list[list[float]] = [[] for _ in works]
    for turn in range(REPEATS):
        for place, work in (*list(enumerate(works))[turn % len(works) :], *list(enumerate(works))[: turn % len(works)]):
            began = time.perf_counter()
            work()
            times[place].append(time.perf_counter() - began)
    return [min(one) for one in times]
