"""A real agent that serves a real release: hub, broker, signature, verification, probation, as in the field.

Memory is only worth telling of a daemon that has done its work, so the benchmark goes the whole way: the model is
pushed, quantized, signed with the offline keys, published, verified and committed; then it is asked.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from scripts.story.cast import Cloud, Device, Operator
from scripts.story.folder import Folder, claim
from scripts.story.stage import Stage, free_ports
from scripts.story.telling import NotTrue, until
from shared.ids import FamilyName
from shared.inference import ModelState
from shared.model import Manifest, Variant
from shared.wire.golden import decode_golden
from tests.fakes.releases import Build

VERSION = "1.0.0"
COMMITTED_S = 60.0


class Served:
    """The agent, and the file that it serves."""

    def __init__(self, device: Device, model: bytes) -> None:
        self.door = device.door
        self.pid = device.pid
        self.host_pid = device.host_pids()[0]
        self.model = model


@contextlib.contextmanager
def served(made: Build) -> Iterator[Served]:
    """A hub and one agent (profile `x86-gateway`) that has committed this release; all of it ends with the context."""
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as place:
        folder = claim(Path(place) / "h")
        stage = Stage(folder)
        port, broker_port = free_ports(2)
        cloud = Cloud(stage=stage, port=port, broker_port=broker_port)
        device = Device(stage=stage, name="bench", profile="x86-gateway")
        try:
            yield _serve(made, folder, stage, cloud, device)
        finally:
            stage.stop_all()


def _serve(made: Build, folder: Folder, stage: Stage, cloud: Cloud, device: Device) -> Served:
    token = folder.operator / "admin.token"
    fingerprint = cloud.init(token)["ca_fingerprint"]
    cloud.start()
    operator = Operator(stage=stage)
    operator.run("login", cloud.url, "--token-file", str(token), "--fingerprint", fingerprint)
    joined = stage.run("outrider-hub", "token", "create", "--data", str(cloud.folder), "--kind", "join", "--json").out
    join_file = folder.operator / "join.token"
    join_file.write_text(json.loads(joined)["token"], encoding="ascii")
    device.enrol(join_file)
    device.start()
    device.wait_online()
    release = f"{made.manifest.family}/{VERSION}"
    _push(made, folder, operator)
    operator.run("release", "sign", release, "--keys", str(folder.offline), "--yes")
    operator.run("release", "publish", release, "--assign", "all")
    until("the agent has committed the release", lambda: _slot(device, made).phase == "committed", seconds=COMMITTED_S)
    digest = _slot(device, made).digest
    return Served(device, (device.state / "blobs" / digest).read_bytes())


def _push(made: Build, folder: Folder, operator: Operator) -> None:
    manifest: Manifest = made.manifest
    variant: Variant = made.variant
    golden = decode_golden(made.golden, manifest.signature)
    (folder.operator / "model.onnx").write_bytes(made.model)
    arrays = {tensor.name: np.frombuffer(tensor.data, np.float32).reshape(tensor.shape) for tensor in golden.inputs}
    np.savez(folder.operator / "golden.npz", labels=np.array(variant.answers), **arrays)  # type: ignore[arg-type]
    operator.run(
        "model", "push", "model.onnx", "--family", manifest.family, "--version", VERSION,
        "--golden", "golden.npz", "--labels", ",".join(manifest.labels), "--wait",
    )  # fmt: skip


def _slot(device: Device, made: Build) -> ModelState:
    for model in device.status().models:
        if model.family == FamilyName(made.manifest.family):
            return model
    raise NotTrue(f"{device.name} has no slot for {made.manifest.family}")
