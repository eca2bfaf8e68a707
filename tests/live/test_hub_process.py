"""The hub as a process: readiness, signals, kill -9, restarts, and clear words when it cannot start."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud_hub.ground.ca import common_name
from cloud_hub.ground.system import MAX_FILES
from shared.ids import DeviceId
from shared.wire import topics
from shared.wire.envelope import encode_envelope
from shared.wire.messages import Birth
from tests.fakes.batches import batch_of, readings
from tests.fakes.hub_parts import envelope_of
from tests.fakes.hub_process import HubProcess, Line, is_alive, run_command, wait_until

pytestmark = pytest.mark.live

A = DeviceId("dev-a")


@pytest.fixture
def hub(tmp_path: Path, mosquitto_path: str) -> Iterator[HubProcess]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    hub = HubProcess(tmp_path, port=ports[0], broker_port=ports[1])
    hub.init()
    try:
        yield hub
    finally:
        if hub.process is not None:
            hub.stop(signal.SIGKILL)


def test_it_says_when_it_is_ready_and_ends_in_order(hub: HubProcess, short_tmp: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(short_tmp / "notify"))
        manager.settimeout(20)
        line = hub.start(env={"NOTIFY_SOCKET": str(short_tmp / "notify")})
        assert line == f"hub ready: https://localhost:{hub.port} mqtts://localhost:{hub.broker_port}"
        assert manager.recv(64) == b"READY=1"
        assert hub.call("GET", "/readyz").status == 200
        doctor = run_command("doctor", "--data", str(hub.data))
        assert doctor.returncode == 0, doctor.stdout
        assert "this hub answers" in doctor.stdout
        # The broker inherits it; by default a process may have a thousand connections.
        soft, hard = resource.prlimit(hub.broker_pids()[0], resource.RLIMIT_NOFILE)
        assert soft >= min(hard, MAX_FILES)
        (broker,) = hub.broker_pids()
        assert hub.stop(signal.SIGTERM) == 0
        assert manager.recv(64) == b"STOPPING=1"
    assert not is_alive(broker)


def test_ctrl_c_ends_it_too(hub: HubProcess) -> None:
    hub.start()
    assert hub.stop(signal.SIGINT) == 130
    assert hub.broker_pids() == []


def test_kill_9_leaves_no_broker_and_the_same_data_starts_again(hub: HubProcess) -> None:
    hub.start()
    device = hub.enrol(A)
    line = Line(device)
    assert line.connected.wait(20)
    birth = Birth(boot=1, session=1, epoch="e" * 16, agent_version="1", profile="pi")
    line.publish(topics.up(A, "birth"), encode_envelope(envelope_of(birth, device=A)))
    wait_until(lambda: bool(hub.device(A)["online"]), "the birth")
    (broker,) = hub.broker_pids()
    os.kill(hub.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(broker), "the broker's end after the hub's")
    assert line.lost.wait(20)
    line.abandon()
    assert hub.stop() == -signal.SIGKILL

    hub.start()
    assert not hub.device(A)["online"]
    again = Line(device)
    assert again.connected.wait(20)
    again.close()


def test_the_broker_is_started_again_when_it_dies(hub: HubProcess) -> None:
    hub.start()
    (broker,) = hub.broker_pids()
    os.kill(broker, signal.SIGKILL)
    wait_until(lambda: hub.broker_pids() not in ([], [broker]), "another broker")
    wait_until(lambda: hub.call("GET", "/readyz").status == 200, "the link to it")
    assert "broker ended" in hub.log
    device = hub.enrol(A)
    line = Line(device)
    assert line.connected.wait(20)
    line.close()


@pytest.mark.parametrize("which", ["listen", "broker"])
def test_a_busy_port_is_named(hub: HubProcess, which: str) -> None:
    port = hub.port if which == "listen" else hub.broker_port
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        done = run_command("serve", "--data", str(hub.data))
    assert done.returncode == 78
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr
    assert "code: config.port_busy" in done.stderr
    assert f"{which}.port" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.broker_pids() == []


def test_a_second_hub_in_the_same_directory_is_refused(hub: HubProcess) -> None:
    hub.start()
    done = run_command("serve", "--data", str(hub.data), "--port", "1", "--broker-port", "2")
    assert done.returncode == 6
    assert "code: conflict.running" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_broker_says_what_to_do(hub: HubProcess) -> None:
    done = run_command("serve", "--data", str(hub.data), env={"OUTRIDER_HUB_BROKER__BINARY": "no-such-mosquitto"})
    assert done.returncode == 78
    assert "code: config.broker_missing" in done.stderr
    assert "apt-get install mosquitto" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broker_that_does_not_start_is_told_with_its_last_words(hub: HubProcess) -> None:
    log = hub.data / "broker" / "mosquitto.log"
    log.write_text("1: a line of an earlier run\n")
    done = run_command("serve", "--data", str(hub.data), env={"OUTRIDER_HUB_BROKER__BINARY": "/bin/false"})
    assert done.returncode == 78
    assert "code: config.broker_failed" in done.stderr
    assert "/bin/false does not start: it ended with status 1" in done.stderr
    assert "earlier run" not in done.stderr
    done = run_command("serve", "--data", str(hub.data), env={"OUTRIDER_HUB_BROKER__BINARY": "/bin/ls"})
    assert done.returncode == 78
    assert "/bin/ls does not start: " in done.stderr
    assert "mosquitto.conf\n" in done.stderr.split("code:")[0]  # what it wrote itself
    assert "Traceback" not in done.stderr


def test_an_external_broker_outlives_the_hub(hub: HubProcess, mosquitto_path: str) -> None:
    config = hub.data / "broker" / "mosquitto.conf"
    external = {"OUTRIDER_HUB_BROKER__MODE": "external", "OUTRIDER_HUB_BROKER__HOST": "localhost"}
    with (hub.folder / "broker.log").open("wb") as log:
        broker = subprocess.Popen([mosquitto_path, "-c", str(config)], stdout=log, stderr=log)
    try:
        hub.start(env=external)
        device = hub.enrol(A)
        line = Line(device)
        assert line.connected.wait(20)
        assert hub.process is not None
        hub.process.terminate()
        assert hub.process.wait(timeout=20) == 0
        birth = Birth(boot=1, session=1, epoch="e" * 16, agent_version="1", profile="pi")
        line.publish(topics.up(A, "birth"), encode_envelope(envelope_of(birth, device=A)))
        assert not line.lost.is_set()
        # The broker kept the birth for the hub's session, so the next hub hears it.
        hub.release()
        hub.start(env=external)
        wait_until(lambda: bool(hub.device(A)["online"]), "the birth that came meanwhile")
        line.close()
        hub.process.terminate()
        assert hub.process.wait(timeout=20) == 0
    finally:
        broker.terminate()
        broker.wait(timeout=20)


def test_the_interface_is_described(hub: HubProcess) -> None:
    hub.start()
    document = hub.call("GET", "/openapi.json").body
    operations = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    assert {
        "enroll",
        "create_token",
        "list_devices",
        "put_blob",
        "publish_release",
        "whoami",
        "list_audit",
    } <= operations
    assert len(operations) == sum(len(path) for path in document["paths"].values())


def test_new_names_get_new_certificates(hub: HubProcess) -> None:
    before = (hub.data / "tls" / "server.pem").read_bytes()
    hub.start(env={"OUTRIDER_HUB_PUBLIC__NAMES": "hub.example"})
    assert (hub.data / "tls" / "server.pem").read_bytes() != before
    assert hub.call("GET", "/healthz").status == 200
    assert "certificates issued: tls/server.pem, broker/server.pem" in hub.log


def test_an_old_database_names_the_command(hub: HubProcess) -> None:
    import sqlite3

    with sqlite3.connect(hub.data / "hub.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '0001_devices'")
    database.close()
    done = run_command("serve", "--data", str(hub.data))
    assert done.returncode == 78
    assert "outrider-hub migrate" in done.stderr


def told(hub: HubProcess) -> dict[str, Any]:
    """What the hub says of the device's telemetry."""
    answer = hub.call("GET", f"/v1/telemetry/{A}/summary", token=hub.admin)
    assert answer.status == 200, answer
    summary: dict[str, Any] = answer.body
    return summary


def stand_by(hub: HubProcess, folder: Path) -> HubProcess:
    """A hub that can take another's place, made as the documentation says."""
    shutil.copytree(hub.data, folder / "data", ignore=shutil.ignore_patterns("tls", "broker", "hub.lock"))
    shutil.copy(hub.folder / "token", folder / "token")
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        made = HubProcess(folder, port=one.getsockname()[1], broker_port=two.getsockname()[1])
    file = made.data / "hub.toml"
    text = file.read_text().replace("[broker]", '[broker]\nhub_name = "hub.b"')
    text = text.replace(f"port = {hub.port}", f"port = {made.port}")
    file.write_text(text.replace(f"port = {hub.broker_port}", f"port = {made.broker_port}"))
    return made


def test_a_hub_keeps_everything_in_postgresql(
    tmp_path: Path, mosquitto_path: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTRIDER_HUB_DATABASE__URL", postgres_url)
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    hub = HubProcess(tmp_path, port=ports[0], broker_port=ports[1])
    hub.init()
    monkeypatch.delenv("OUTRIDER_HUB_DATABASE__URL")
    assert not (hub.data / "hub.db").exists()
    assert postgres_url in (hub.data / "hub.toml").read_text()
    try:
        hub.start()
        device = hub.enrol(A)
        line = Line(device)
        batches = [batch_of(readings(1, 2, 3)), batch_of(readings(1, 2, 3)), batch_of(readings(4))]
        for batch in batches:
            line.publish(topics.up(A, "telemetry"), encode_envelope(envelope_of(batch, device=A)))
        wait_until(lambda: told(hub)["records"] == 4, "four records")
        assert told(hub)["streams"][0]["duplicates"] == 3
        line.close()
        assert run_command("doctor", "--data", str(hub.data)).returncode == 0
        twin = stand_by(hub, tmp_path / "twin")
        refused = run_command(
            "serve", "--data", str(twin.data), "--port", str(twin.port), "--broker-port", str(twin.broker_port)
        )
        assert (refused.returncode, "conflict.running" in refused.stderr) == (6, True)
        assert hub.stop(signal.SIGTERM) == 0
        try:
            twin.start()
            assert common_name((twin.data / "broker" / "hub.pem").read_bytes()) == "hub.b"
            assert told(twin)["records"] == 4
        finally:
            twin.stop(signal.SIGTERM)
        # A second hub in the same database would not have the first one's keys.
        again = run_command(
            "init", "--data", str(tmp_path / "second"), "--offline", str(tmp_path / "second-offline"),
            env={"OUTRIDER_HUB_DATABASE__URL": postgres_url},
        )  # fmt: skip
        assert (again.returncode, "conflict.exists" in again.stderr) == (6, True)
    finally:
        if hub.process is not None:
            hub.stop(signal.SIGKILL)
