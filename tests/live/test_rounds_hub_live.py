"""A federated run on a real hub: its own process, its broker, TLS, certificates; the hub is killed in the middle."""

from __future__ import annotations

import hashlib
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.fakes import classifier
from tests.fakes.hub_process import HubProcess, wait_until
from tests.fakes.light_fleet import LightDevice
from tests.fakes.round_room import Learner, base_model

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]

LABELS = [str(number) for number in range(10)]


@pytest.fixture
def hub(short_tmp: Path, mosquitto_path: str) -> Iterator[HubProcess]:
    import socket

    ports = []
    probes = [socket.socket() for _ in range(2)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
        ports.append(probe.getsockname()[1])
    for probe in probes:
        probe.close()
    hub = HubProcess(short_tmp, port=ports[0], broker_port=ports[1])
    hub.init()
    hub.start()
    yield hub
    hub.stop()


def put(hub: HubProcess, data: bytes) -> str:
    """Upload a file."""
    digest = hashlib.sha256(data).hexdigest()
    request = urllib.request.Request(f"https://localhost:{hub.port}/v1/blobs/{digest}", data=data, method="PUT")
    request.add_header("Authorization", f"Bearer {hub.admin}")
    with urllib.request.urlopen(request, context=hub.context(), timeout=20) as response:
        assert response.status in (200, 201)
    return digest


def push_base(hub: HubProcess, weights: classifier.Weights) -> None:
    """Push the base and wait until it is built."""
    body = {
        "family": "digits",
        "version": "1.0.0",
        "model": put(hub, base_model(weights)),
        "golden": put(hub, classifier.golden(300, seed=99)),
        "calibration": put(hub, classifier.golden(100, seed=98)),
        "labels": LABELS,
        "preparations": [
            {"input": "pixels", "scale": classifier.SCALE, "mean": [classifier.MEAN], "std": [classifier.STD]}
        ],
    }
    assert hub.call("POST", "/v1/models", body, token=hub.admin).status == 202
    wait_until(lambda: model(hub, "1.0.0")["state"] != "building", "the base's build", within_s=60)
    assert model(hub, "1.0.0")["state"] == "ready", model(hub, "1.0.0")


def model(hub: HubProcess, version: str) -> Any:
    return hub.call("GET", f"/v1/models/digits/{version}", token=hub.admin).body


def fleet(hub: HubProcess, weights: classifier.Weights) -> list[LightDevice]:
    """Three devices, each with some of the classes."""
    made = []
    for number, classes in enumerate([(0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 9)]):
        pixels, labels = classifier.samples(1000, seed=10 + number)
        chosen = np.isin(labels, classes)
        x = (pixels[chosen] * classifier.SCALE - classifier.MEAN) / classifier.STD
        learner = Learner(np.maximum(x @ weights.w1 + weights.b1, 0).astype(np.float32), labels[chosen])
        device = hub.enrol(f"dev-{number}")
        made.append(LightDevice(device, hub_port=hub.port, family="digits", version="1.0.0", answer=learner.answer))
    return made


def start(hub: HubProcess, version: str) -> str:
    body = {
        "family": "digits", "base": "1.0.0", "version": version, "rounds": 12, "min_devices": 3,
        "round_timeout_s": 30, "learning_rate": 0.2, "seed": 3,
    }  # fmt: skip
    answer = hub.call("POST", "/v1/rounds", body, token=hub.admin)
    assert answer.status == 201, answer
    name: str = answer.body["run"]
    return name


def status(hub: HubProcess, run: str) -> Any:
    return hub.call("GET", f"/v1/rounds/{run}", token=hub.admin).body


def head_of(hub: HubProcess, version: str) -> dict[str, bytes]:
    digest = model(hub, version)["push"]["model"]
    file = hub.data / "blobs" / digest[:2] / digest
    graph = onnx.load(str(file)).graph
    return {tensor.name: numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer}


def test_a_hub_that_is_killed_in_a_run_goes_on_to_the_same_result(hub: HubProcess) -> None:
    weights = classifier.train(rounds=30)
    push_base(hub, weights)
    devices = fleet(hub, weights)
    try:
        calm = start(hub, "1.1.0")
        wait_until(lambda: status(hub, calm)["finished_ms"] is not None, "the calm run", within_s=60)
        assert status(hub, calm)["state"] == "finished", (status(hub, calm), hub.log)
        run = start(hub, "1.2.0")
        wait_until(lambda: status(hub, run)["round"] >= 2, "two rounds", within_s=30)
        assert hub.stop(signal.SIGKILL) == -signal.SIGKILL
        hub.start()
        killed_after = status(hub, run)["round"]
        assert killed_after < 12, "the kill came too late to show anything"
        wait_until(lambda: status(hub, run)["finished_ms"] is not None, "the killed run", within_s=90)
        ended = status(hub, run)
    finally:
        for device in devices:
            device.close()
    assert ended["state"] == "finished", (ended, hub.log)
    assert [one["round"] for one in ended["rounds"]] == list(range(1, 13))
    assert all(one["accepted"] == 3 for one in ended["rounds"])
    assert ended["accuracy"] > 0.9
    assert model(hub, "1.2.0")["state"] == "ready"
    assert head_of(hub, "1.2.0") == head_of(hub, "1.1.0")
    assert hub.messages("round").get("failed", 0) == 0
