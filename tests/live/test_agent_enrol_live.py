"""The agent's commands against a real hub: enrol, examine, run, ask, and everything that is refused on the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.commands.exits import Exit
from tests.fakes.hub_process import HubProcess, wait_until

pytestmark = pytest.mark.live
ROOT = Path(__file__).resolve().parents[2]


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def hub(short_tmp: Path, mosquitto_path: str) -> Iterator[HubProcess]:
    folder = short_tmp / "hub"
    folder.mkdir()
    port, broker_port = free_ports(2)
    made = HubProcess(folder, port=port, broker_port=broker_port)
    made.init()
    made.start()
    yield made
    made.stop()


def agent(*words: str, state: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_agent", *words, "--state", str(state)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


def findings(state: Path) -> dict[str, str]:
    report = json.loads(agent("doctor", "--json", state=state).stdout)
    return {item["check"]: item["result"] for item in report["findings"]}


def test_a_device_joins_runs_and_survives_the_hub(hub: HubProcess, short_tmp: Path) -> None:
    state = short_tmp / "agent"
    assert findings(state)["state"] == "fail"
    token = hub.join_token()
    done = agent("enroll", "-", "--name", "dev-a", "--profile", "x86-gateway", "--json", state=state, stdin=token)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"] == "dev-a"
    assert hub.device("dev-a")["profile"] == "x86-gateway"
    found = findings(state)
    assert {found[check] for check in ("identity", "hub", "broker", "state", "profile")} == {"ok"}

    with subprocess.Popen(
        [sys.executable, "-m", "edge_agent", "run", "--state", str(state), "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as daemon:
        try:
            wait_until(lambda: agent("status", state=state).returncode == 0, "the door")
            wait_until(lambda: bool(hub.device("dev-a")["online"]), "the hub sees the device")
            second = agent("run", state=state)
            assert second.returncode == Exit.CONFLICT
            assert str(daemon.pid) in second.stderr
            assert agent("enroll", hub.join_token(), "--force", state=state).returncode == Exit.CONFLICT
            status = json.loads(agent("status", "--json", state=state).stdout)
            assert (status["device"], status["boot"], status["pid"]) == ("dev-a", 1, daemon.pid)
            os.kill(hub.pid, signal.SIGKILL)
            wait_until(lambda: json.loads(agent("status", "--json", state=state).stdout)["link"] != "online", "offline")
            assert agent("model", "ls", state=state).returncode == 0
        finally:
            daemon.send_signal(signal.SIGTERM)
            _, log = daemon.communicate(timeout=20)
    assert daemon.returncode == 0
    assert all(json.loads(line)["message"] for line in log.splitlines())
    assert token not in log
    found = findings(state)
    assert (found["hub"], found["broker"]) == ("fail", "fail")


def test_tokens_that_do_not_count_are_refused_and_change_nothing(hub: HubProcess, short_tmp: Path) -> None:
    token = hub.join_token()
    first = short_tmp / "first"
    assert agent("enroll", token, "--name", "dev-a", state=first).returncode == 0
    again = agent("enroll", hub.join_token(), state=first)
    assert again.returncode == Exit.CONFLICT
    assert "--force" in again.stderr
    state = short_tmp / "state"
    spent = agent("enroll", token, state=state)
    assert spent.returncode == Exit.NOT_ALLOWED
    assert "code: enrol.token_spent" in spent.stderr
    forged = agent("enroll", token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB"), state=state)
    assert forged.returncode in (Exit.NOT_ALLOWED, Exit.USAGE)
    assert agent("enroll", "orj1.nonsense", state=state).returncode == Exit.USAGE
    taken = agent("enroll", hub.join_token(), "--name", "dev-a", state=state)
    assert taken.returncode == Exit.CONFLICT
    assert agent("run", state=state).returncode == Exit.BAD_CONFIGURATION
    fresh = hub.join_token()
    hub.stop()
    away = agent("enroll", fresh, state=state)
    assert away.returncode == Exit.UNREACHABLE
    assert "not spent" in away.stderr
    hub.start()
    assert agent("enroll", fresh, state=state).returncode == 0
    replaced = agent("enroll", hub.join_token(), "--force", state=state)
    assert replaced.returncode == 0, replaced.stderr
