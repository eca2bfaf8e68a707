"""Rollouts on a real hub with signed releases and devices on MQTT; the hub is killed in the middle of each."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import classifier
from tests.fakes.hub_process import HubProcess, wait_until
from tests.fakes.rollout_device import ANSWERS, ObedientDevice

pytestmark = [pytest.mark.live, pytest.mark.timeout(180)]

VERSIONS = ("1.0.0", "1.1.0", "1.2.0")
WRONG = {"1.0.0": 4, "1.1.0": 4, "1.2.0": ANSWERS // 4}


@pytest.fixture
def hub(short_tmp: Path, mosquitto_path: str) -> Iterator[HubProcess]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    hub = HubProcess(short_tmp, port=ports[0], broker_port=ports[1])
    hub.init()
    hub.start()
    yield hub
    hub.stop()


class Operator:
    """`outrider`, as an operator types it."""

    def __init__(self, hub: HubProcess) -> None:
        self.hub = hub
        self.env = {**os.environ, "OUTRIDER_CONFIG": str(hub.folder / "contexts.json")}
        ca = str(hub.data / "ca" / "ca.pem")
        self("login", f"https://localhost:{hub.port}", "--token-file", str(hub.folder / "token"), "--ca", ca)

    def __call__(self, *words: str, expect: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cloud_hub.cli", *words],
            cwd=self.hub.folder,
            env={**self.env, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == expect, (words, done.stdout, done.stderr, self.hub.log[-3000:])
        return done.stdout


def put(hub: HubProcess, data: bytes) -> str:
    """Upload a file."""
    digest = hashlib.sha256(data).hexdigest()
    request = urllib.request.Request(f"https://localhost:{hub.port}/v1/blobs/{digest}", data=data, method="PUT")
    request.add_header("Authorization", f"Bearer {hub.admin}")
    with urllib.request.urlopen(request, context=hub.context(), timeout=20) as response:
        assert response.status in (200, 201)
    return digest


def release_all(hub: HubProcess, operator: Operator) -> None:
    """Push, build, sign and publish every version; all of them hold the same model."""
    body = {
        "family": "digits",
        "model": put(hub, classifier.export(classifier.train(rounds=40))),
        "golden": put(hub, classifier.golden(100, seed=99)),
        "labels": [str(number) for number in range(10)],
        "preparations": [
            {"input": "pixels", "scale": classifier.SCALE, "mean": [classifier.MEAN], "std": [classifier.STD]}
        ],
        "gate": {"max_drop_pt": 5},
    }
    for version in VERSIONS:
        assert hub.call("POST", "/v1/models", {**body, "version": version}, token=hub.admin).status == 202
    for version in VERSIONS:
        path = f"/v1/models/digits/{version}"
        wait_until(
            lambda path=path: hub.call("GET", path, token=hub.admin).body["state"] == "ready",  # type: ignore[misc]
            "the build",
            within_s=60,
        )
        operator("release", "sign", f"digits/{version}", "--keys", str(hub.folder / "offline"), "--yes")
        operator("release", "publish", f"digits-{version}.release.json")


def rollout(hub: HubProcess, name: str) -> dict[str, Any]:
    found: dict[str, Any] = hub.call("GET", f"/v1/rollouts/{name}", token=hub.admin).body
    return found


def killed_in_the_middle(hub: HubProcess, operator: Operator, version: str) -> str:
    """Start a rollout, kill the hub as soon as a device has been offered the release, and start it again."""
    operator(
        "rollout", "start", f"digits/{version}", "--stages", "1,100%", "--soak", "1", "--deadline", "60",
        "--max-harmed", "0", "--min-answers", "50",
    )  # fmt: skip
    name = f"digits-{version}-1"
    wait_until(lambda: rollout(hub, name)["devices"]["waiting"] < 3, "the first offer")
    hub.stop(signal.SIGKILL)
    hub.start()
    return name


def test_rollouts_go_on_to_the_right_end_when_the_hub_is_killed(hub: HubProcess) -> None:
    operator = Operator(hub)
    release_all(hub, operator)
    devices = [ObedientDevice(hub.enrol(f"dev-{number}"), wrong=WRONG) for number in range(3)]
    try:
        wait_until(lambda: all(hub.device(one.name)["online"] for one in devices), "the devices")
        operator("release", "publish", "digits/1.0.0", "--assign", "all")
        wait_until(lambda: [one.version for one in devices] == ["1.0.0"] * 3, "the first release")

        good = killed_in_the_middle(hub, operator, "1.1.0")
        operator("rollout", "status", good, "--wait", "--timeout", "90")
        assert rollout(hub, good)["phase"] == "completed"
        assert [one.version for one in devices] == ["1.1.0"] * 3

        bad = killed_in_the_middle(hub, operator, "1.2.0")
        operator("rollout", "status", bad, "--wait", "--timeout", "90", expect=7)
        view = rollout(hub, bad)
        assert (view["phase"], view["returned"], view["devices"]["waiting"]) == ("rolled_back", 1, 2)
        assert view["reason"].startswith("outcomes")
        assert [one.version for one in devices] == ["1.1.0"] * 3
        assert sorted(one.ran for one in devices) == [
            ["1.0.0", "1.1.0"],
            ["1.0.0", "1.1.0"],
            ["1.0.0", "1.1.0", "1.2.0", "1.1.0"],
        ]
        assert "worse than before" in operator("rollout", "explain", bad)
    finally:
        for device in devices:
            device.close()
