"""The peer of the rounds benchmark: Flower's own SuperLink with SuperNodes on loopback, its stock FedAvg, its own app.

The same flwr as the hub's worker uses, started as its manual says, without TLS (which spares it work) and without
installing anything at run time. Its app does as little as our devices do: one array of a mebibyte, plus one.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

from scripts.story.stage import free_ports

FLOATS: Final = 262_144
READY_S: Final = 30.0
RUN_S: Final = 110.0
STOP_S: Final = 10.0


class PeerLate(Exception):
    """The peer did not get far enough in its time."""


def round_s(*, nodes: int, rounds: int) -> float:
    """Median seconds of a round with so many SuperNodes; raises PeerLate when not two rounds came in time."""
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as place:
        folder = Path(place)
        link, *node_ports = free_ports(nodes + 1)
        times = folder / "times"
        _write_app(folder, nodes=nodes, rounds=rounds, times=times)
        _write_config(folder, port=link)
        programs = [
            ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--host", "127.0.0.1",
             "--port", str(link)],
            *(
                ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port)]
                for port in node_ports
            ),
        ]  # fmt: skip
        with _started(folder, programs, port=link):
            done = subprocess.run(
                [_program("flwr"), "run", "app", "local"], cwd=folder, env=_environment(folder), timeout=READY_S * 2,
                capture_output=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise PeerLate(f"`flwr run` failed: {done.stdout[-300:]!r}")
            marks = _wait_for(times, rounds + 1)
    if len(marks) < 3:
        raise PeerLate(f"{max(0, len(marks) - 1)} rounds in {RUN_S:.0f} s")
    return statistics.median(after - before for before, after in pairwise(marks[1:]))


def _wait_for(times: Path, wanted: int) -> list[float]:
    """The moments at which rounds ended, the start first; what came until the deadline."""
    deadline = time.monotonic() + RUN_S
    marks: list[float] = []
    while len(marks) < wanted and time.monotonic() < deadline:
        time.sleep(0.1)
        if times.exists():
            marks = [float(line.split()[1]) for line in times.read_text().splitlines()]
    return marks


@contextmanager
def _started(folder: Path, programs: Sequence[list[str]], *, port: int) -> Iterator[None]:
    """All of them, in sessions of their own; gone with their children when the block is left."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, (name, *arguments) in enumerate(programs):
            with (folder / f"{number}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        [_program(name), *arguments], cwd=folder, env=_environment(folder), stdout=log, stderr=log,
                        start_new_session=True,
                    )
                )  # fmt: skip
            if number == 0:
                _wait_port(port)
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in reversed(running):
                _signal_group(process.pid, number)
            for process in running:
                try:
                    process.wait(timeout=STOP_S)
                except subprocess.TimeoutExpired:
                    continue


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def _wait_port(port: int) -> None:
    import socket

    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise PeerLate(f"the SuperLink did not listen within {READY_S:.0f} s")


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _environment(folder: Path) -> dict[str, str]:
    return {
        "HOME": str(folder),
        "FLWR_HOME": str(folder / ".flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "LANG": "C.UTF-8",
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _write_config(folder: Path, *, port: int) -> None:
    home = folder / ".flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )


def _write_app(folder: Path, *, nodes: int, rounds: int, times: Path) -> None:
    package = folder / "app" / "peer"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "client.py").write_text(_CLIENT)
    (package / "server.py").write_text(_SERVER)
    project = _PROJECT.format(nodes=nodes, rounds=rounds, floats=FLOATS, times=times)
    (folder / "app" / "pyproject.toml").write_text(project)


_PROJECT: Final = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "peer"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "outrider"

[tool.flwr.app.components]
serverapp = "peer.server:app"
clientapp = "peer.client:app"

[tool.flwr.app.config]
rounds = {rounds}
nodes = {nodes}
floats = {floats}
times = "{times}"
"""

_CLIENT: Final = """
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    arrays = ArrayRecord({name: Array(array.numpy() + 1) for name, array in message.content["arrays"].items()})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
"""

_SERVER: Final = """
import time

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    config = context.run_config
    nodes = int(config["nodes"])

    def mark(number, _arrays):
        with open(config["times"], "a") as file:
            file.write(f"{number} {time.monotonic()}\\n")

    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"head": Array(np.zeros(int(config["floats"]), np.float32))}),
        num_rounds=int(config["rounds"]),
        evaluate_fn=mark,
    )
"""
