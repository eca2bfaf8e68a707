"""How long a device takes to a new release: a real hub with its broker, a real agent, everything on loopback.

Timed from the call that assigns a published release to the moment at which an application gets its answers from it and
the agent says that it is committed. How long a trial lasts is the operator's choice: here 300 ms, which count, in which
the application asks all the time. The int8 file has about 2 MB. Each release is new to the device.
"""

from __future__ import annotations

import hashlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from edge_agent.client import Client
from scripts.story.stage import free_ports
from shared.errors import OutriderError
from tests.fakes import classifier
from tests.fakes.hub_process import HubProcess, wait_until

ROUNDS: Final = 3
HIDDEN: Final = 26_000
"""75 numbers for each hidden unit: 2 MB in int8."""
BUILD_S: Final = 180.0
COMMIT_S: Final = 60.0
AGENT_TOML: Final = """\
profile = "x86-gateway"

[door]
path = "{door}"

[probation]
duration_ms = 300
good_answers = 1
"""


def median_ms() -> float:
    """Median over three releases, after a first one that is not counted."""
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as place:
        folder = Path(place)
        port, broker_port = free_ports(2)
        hub = HubProcess(folder, port=port, broker_port=broker_port)
        hub.init()
        hub.start()
        try:
            versions = [f"1.{number}.0" for number in range(ROUNDS + 1)]
            _release(hub, versions)
            with _agent(hub, folder / "device") as door:
                return statistics.median([_refresh_ms(hub, door, version) for version in versions][1:])
        finally:
            hub.stop()


def _release(hub: HubProcess, versions: list[str]) -> None:
    """Push, build, sign and publish versions of one model that differ a little."""
    weights = classifier.train(rounds=4, hidden=HIDDEN)
    noise = np.random.default_rng(3)
    for version in versions:
        shifted = replace(weights, w1=weights.w1 + noise.normal(0, 1e-4, weights.w1.shape).astype(np.float32))
        body = {
            "family": "digits",
            "version": version,
            "model": _put(hub, classifier.export(shifted)),
            "golden": _put(hub, classifier.golden(40, seed=99)),
            "labels": [str(number) for number in range(10)],
            "preparations": [
                {"input": "pixels", "scale": classifier.SCALE, "mean": [classifier.MEAN], "std": [classifier.STD]}
            ],
            "gate": {"max_drop_pt": 100, "min_agreement": 0.5},
        }
        assert hub.call("POST", "/v1/models", body, token=hub.admin).status == 202
        wait_until(lambda version=version: _is_ready(hub, version), f"the build of {version}", within_s=BUILD_S)  # type: ignore[misc]
        hub.publish(f"digits/{version}")


def _is_ready(hub: HubProcess, version: str) -> bool:
    found = hub.call("GET", f"/v1/models/digits/{version}", token=hub.admin).body
    assert found["state"] != "rejected", found["report"]
    return bool(found["state"] == "ready")


def _put(hub: HubProcess, data: bytes) -> str:
    digest = hashlib.sha256(data).hexdigest()
    request = urllib.request.Request(f"https://localhost:{hub.port}/v1/blobs/{digest}", data=data, method="PUT")
    request.add_header("Authorization", f"Bearer {hub.admin}")
    with urllib.request.urlopen(request, context=hub.context(), timeout=20):
        return digest


@contextmanager
def _agent(hub: HubProcess, state: Path) -> Iterator[Path]:
    """A device that has joined and is online; its door."""
    state.mkdir(mode=0o700)
    door = state / "door.sock"
    (state / "agent.toml").write_text(AGENT_TOML.format(door=door))
    command = [sys.executable, "-m", "edge_agent"]
    joined = subprocess.run(
        [*command, "enroll", "-", "--name", "dev", "--state", str(state)],
        input=hub.join_token(), text=True, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert joined.returncode == 0, joined.stderr
    with (state / "log").open("wb") as log:
        process = subprocess.Popen([*command, "run", "--state", str(state)], stdout=log, stderr=log, env=os.environ)
    try:
        wait_until(lambda: door.exists() and hub.device("dev")["online"], "the device", within_s=COMMIT_S)
        yield door
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


def _refresh_ms(hub: HubProcess, door: Path, version: str) -> float:
    row = np.zeros((1, 64), np.float32)
    body = {"family": "digits", "version": version, "all": True}
    began = time.perf_counter()
    assert hub.call("POST", "/v1/assignments", body, token=hub.admin).status == 201
    with Client(door, timeout_ms=5000) as client:

        def done() -> bool:
            try:
                answer = client.infer("digits", {"pixels": row})
            except OutriderError:
                return False
            serving = client.status().models[0]
            return answer.version == version and serving.phase == "committed" and serving.version == version

        wait_until(done, f"{version} on the device", within_s=COMMIT_S)
    return 1000 * (time.perf_counter() - began)
