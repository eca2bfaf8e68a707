"""A device whose clock is wrong by decades, against a real hub and its broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.client import Client
from edge_agent.identity import load_identity
from shared.errors import OutriderError
from shared.inference import AgentState
from tests.fakes.hub_process import HubProcess, wait_until

pytestmark = pytest.mark.live
ROOT = Path(__file__).resolve().parents[2]
YEAR_1970_MS, YEAR_2099_MS = 1_000, 4_083_000_000_000

DAEMON = """
import sys
from edge_agent.adapters import system
from edge_agent.daemon import main
system.SystemClock.wall_ms = lambda self: WALL_MS
sys.exit(main())
"""
RUN = """
import os, sys
from edge_agent.__main__ import main
become, daemon = os.execve, sys.argv.pop(1)
os.execve = lambda path, command, env: become(path, [path, "-I", "-c", daemon, command[-1]], env)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def hub(short_tmp: Path, mosquitto_path: str, free_port: int) -> Iterator[HubProcess]:
    folder = short_tmp / "hub"
    folder.mkdir()
    made = HubProcess(folder, port=free_port, broker_port=free_port + 1)
    made.init()
    made.start()
    yield made
    made.stop()


def agent(*words: str, state: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *words, "--state", str(state)],
        input=stdin, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
    )  # fmt: skip


@contextmanager
def running(state: Path, *, wall_ms: int) -> Iterator[None]:
    """The daemon in a process that believes to live at this time."""
    daemon_program = DAEMON.replace("WALL_MS", str(wall_ms))
    command = [sys.executable, "-c", RUN, daemon_program, "run", "--state", str(state)]
    with (state / "agent.log").open("ab") as log, subprocess.Popen(command, stderr=log, cwd=ROOT) as daemon:
        try:
            yield
        finally:
            os.kill(daemon.pid, signal.SIGTERM)
            daemon.wait(timeout=30)


def status(state: Path) -> AgentState | None:
    """What the daemon says of itself; None while it says nothing."""
    try:
        with Client(state / "door.sock") as client:
            return client.status()
    except OutriderError:
        return None


def is_well(found: AgentState | None) -> bool:
    return found is not None and (found.link, found.time_basis) == ("online", "attested")


def test_a_device_that_lives_in_1970_or_in_2099_finds_the_time_and_its_hub(hub: HubProcess, short_tmp: Path) -> None:
    state = short_tmp / "agent"
    done = agent("enroll", "-", "--name", "dev-a", "--profile", "x86-gateway", state=state, stdin=hub.join_token())
    assert done.returncode == 0, done.stderr
    for wall_ms in (YEAR_1970_MS, YEAR_2099_MS):
        with running(state, wall_ms=wall_ms):
            wait_until(lambda: is_well(status(state)), f"online with a clock of {wall_ms}: see {state / 'agent.log'}")
            found = status(state)
            assert found is not None
            assert found.clock_error_ms == wall_ms - found.time_ms
            wait_until(lambda: hub.device("dev-a")["online"], "the hub knows")
            if wall_ms == YEAR_1970_MS:
                continue
            report = json.loads(agent("doctor", "--json", state=state).stdout)
            by_check = {item["check"]: item for item in report["findings"]}
            assert by_check["time"]["result"] == "warn"
            assert "the system clock is" in by_check["time"]["text"]
            assert {by_check[name]["result"] for name in ("identity", "hub", "broker")} == {"ok"}


def test_a_device_with_a_dead_clock_and_an_expired_certificate_comes_back(hub: HubProcess, short_tmp: Path) -> None:
    """It asks for the time without a certificate, renews by that time, and connects with the new one."""
    hub.stop()
    hub.start(env={"OUTRIDER_HUB_CERTIFICATES__DEVICE_DAYS": str(6 / 86_400)})
    state = short_tmp / "agent"
    done = agent("enroll", "-", "--name", "dev-a", "--profile", "x86-gateway", state=state, stdin=hub.join_token())
    assert done.returncode == 0, done.stderr
    first = load_identity(state)
    wait_until(lambda: time.time() * 1000 > first.not_after_ms + 500, "the end of the certificate")
    with running(state, wall_ms=YEAR_1970_MS):
        wait_until(lambda: is_well(status(state)), f"online: see {state / 'agent.log'}")
        found = status(state)
        assert found is not None
        assert found.certificate_expires_ms > first.not_after_ms
        assert found.certificate_trouble == ""
    assert load_identity(state).not_before_ms > first.not_before_ms
    rows = hub.call("GET", "/v1/audit", token=hub.admin).body["items"]
    assert any(row["action"] == "certificate.renewed" and row["detail"]["had_expired"] for row in rows)
