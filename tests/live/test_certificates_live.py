"""Certificates that live, with a real hub, broker, agent and child: renewed in time, renewed late, and a new CA."""

from __future__ import annotations

import base64
import json
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from edge_agent.identity import load_identity
from shared.ids import DeviceId
from shared.renewal import csr_digest, proof_message
from tests.fakes.hub_parts import csr_for
from tests.fakes.hub_process import Device, HubProcess, Line, run_command, wait_until
from tests.live.test_agent_enrol_live import ROOT, agent, free_ports

pytestmark = pytest.mark.live
DAY_S = 86_400
SHORT = {"OUTRIDER_HUB_CERTIFICATES__DEVICE_DAYS": str(6 / DAY_S)}


@pytest.fixture
def hub(short_tmp: Path, mosquitto_path: str) -> Iterator[HubProcess]:
    folder = short_tmp / "hub"
    folder.mkdir()
    port, broker_port = free_ports(2)
    made = HubProcess(folder, port=port, broker_port=broker_port)
    made.init()
    yield made
    made.stop()


@contextmanager
def running(state: Path) -> Iterator[subprocess.Popen[str]]:
    """The daemon, until the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "edge_agent", "run", "--state", str(state), "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as daemon:
        try:
            yield daemon
        finally:
            daemon.send_signal(signal.SIGTERM)
            _, log = daemon.communicate(timeout=20)
            (state / "daemon.log").write_text(log)


def status(state: Path) -> dict[str, Any]:
    done = agent("status", "--json", state=state)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def serial(state: Path) -> int:
    return x509.load_pem_x509_certificate(load_identity(state).certificate_path.read_bytes()).serial_number


def renewals(hub: HubProcess) -> list[dict[str, Any]]:
    answer = hub.call("GET", "/v1/audit", token=hub.admin)
    return [row for row in answer.body["items"] if row["action"].startswith("certificate.")]


def test_a_certificate_renews_itself_and_an_expired_one_comes_back(hub: HubProcess, short_tmp: Path) -> None:
    hub.start(env=SHORT)
    state = short_tmp / "agent"
    done = agent("enroll", hub.join_token(), "--name", "dev-a", "--profile", "x86-gateway", state=state)
    assert done.returncode == 0, done.stderr
    first = serial(state)
    with running(state):
        wait_until(lambda: status(state).get("link") == "online", "the link")
        wait_until(lambda: serial(state) != first, "the renewal")
        wait_until(lambda: status(state).get("link") == "online", "the link with the new certificate")
        seen = status(state)
        assert seen["boot"] == 1
        assert seen["certificate_expires_ms"] == load_identity(state).not_after_ms > seen["certificate_due_ms"]
        assert seen["certificate_trouble"] == ""
    second = serial(state)
    # The agent is off until its certificate has expired.
    identity = load_identity(state)
    wait_until(lambda: time.time() * 1000 > identity.not_after_ms + 500, "the end of the certificate")
    expired = Device(name="dev-a", folder=short_tmp, port=hub.broker_port)
    context = ssl.create_default_context(cafile=str(identity.ca_path))
    context.load_cert_chain(identity.certificate_path, identity.key_path)
    line = Line(expired, context=context)
    assert not line.connected.wait(0.5)
    line.abandon()
    with pytest.raises(OSError, match=r"(?i)expired|alert|eof|reset|closed"):
        hub.call("GET", "/v1/whoami", context=context)
    doctor = json.loads(agent("doctor", "--json", state=state).stdout)
    (found,) = [item for item in doctor["findings"] if item["check"] == "identity"]
    assert (found["result"], "renew" in found["todo"]) == ("warn", True), found
    with running(state):
        wait_until(lambda: serial(state) != second, "the renewal of what had expired")
        wait_until(lambda: status(state).get("link") == "online", "the link")
    rows = renewals(hub)
    assert {row["action"] for row in rows} == {"certificate.renewed"}
    assert any(row["detail"]["had_expired"] for row in rows)


def test_the_ca_is_changed_under_a_running_fleet(hub: HubProcess, short_tmp: Path) -> None:
    hub.start()
    old_ca = (hub.data / "ca" / "ca.pem").read_text()
    old_token = hub.join_token()
    awake, asleep = hub.enrol("awake"), hub.enrol("asleep")
    line = Line(awake)
    assert line.connected.wait(20)

    assert json.loads(rotate(hub, "begin"))["phase"] == "begun"
    refused = run_command("ca", "rotate", "switch", "--data", str(hub.data))
    assert (refused.returncode, "asleep, awake" in refused.stderr) == (6, True), refused.stderr
    wait_until(lambda: len(authorities(hub)) == 2, "the hub has seen the next CA")
    renew(hub, awake)
    assert (awake.folder / "ca.pem").read_text().count("BEGIN") == 2
    refused = run_command("ca", "rotate", "switch", "--data", str(hub.data))
    assert "1 devices were not told of the next CA yet: asleep" in refused.stderr
    new_ca = json.loads(rotate(hub, "switch", "--force"))["fingerprint"]
    wait_until(lambda: len(authorities(hub)) == 3, "the hub has switched")

    # The hub's ports have certificates of the new CA, and take those of both.
    assert issuer(hub, awake).fingerprint(hashes.SHA256()).hex() == new_ca
    assert not line.lost.is_set()
    assert line.publish("outrider/1/awake/up/event", b"x") == 0
    for device in (awake, asleep):
        again = Line(device, context=trusting_new(hub, device))
        assert again.connected.wait(20)
        again.close()
    line.abandon()
    # Whoever pinned the old one follows its link: a token of before, and a device that has slept.
    state = short_tmp / "late"
    done = agent("enroll", old_token, "--name", "late", "--profile", "x86-gateway", state=state)
    assert done.returncode == 0, done.stderr
    assert old_ca in load_identity(state).ca_path.read_text()
    refused = run_command("ca", "rotate", "finish", "--data", str(hub.data))
    assert "2 devices have no certificate of the new CA yet: asleep, awake" in refused.stderr

    renew(hub, awake)
    assert json.loads(rotate(hub, "finish", "--force"))["phase"] == "steady"
    wait_until(lambda: len(authorities(hub)) == 1, "the hub has forgotten the old CA")
    wait_until(lambda: hub.call("GET", "/readyz").status == 200, "the hub's own link is back")
    last = Line(awake)
    assert last.connected.wait(20)
    last.close()
    assert hub.call("GET", "/v1/whoami", context=awake.context()).status == 200
    context = trusting_new(hub, asleep)
    assert hub.call("GET", "/v1/whoami", context=context).status == 403
    gone = Line(asleep, context=context)
    assert not gone.connected.wait(0.5)
    gone.abandon()
    stranger = agent("enroll", old_token, "--name", "too-late", state=short_tmp / "x")
    assert "has changed its CA since" in stranger.stderr


def rotate(hub: HubProcess, step: str, *arguments: str) -> str:
    done = run_command("ca", "rotate", step, "--data", str(hub.data), "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def authorities(hub: HubProcess) -> list[x509.Certificate]:
    """What the hub publishes: CAs, and the link between them."""
    blind = ssl.create_default_context()
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    text = hub.call("GET", "/v1/ca", context=blind).body
    return x509.load_pem_x509_certificates(text.encode())


def issuer(hub: HubProcess, device: Device) -> x509.Certificate:
    """The CA that has signed what the HTTPS port shows."""
    pem = ssl.get_server_certificate(("localhost", hub.port), ca_certs=str(device.folder / "ca.pem"))
    shown = x509.load_pem_x509_certificate(pem.encode())
    for authority in x509.load_pem_x509_certificates((device.folder / "ca.pem").read_bytes()):
        try:
            shown.verify_directly_issued_by(authority)
        except Exception:  # noqa: BLE001, S112 - the other one
            continue
        return authority
    raise AssertionError("nobody has signed it")


def trusting_new(hub: HubProcess, device: Device) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(hub.data / "ca" / "ca.pem"))
    context.load_cert_chain(device.folder / "device.pem", device.folder / "device.key")
    return context


def renew(hub: HubProcess, device: Device) -> None:
    """What the agent's child does, for a device that is only files."""
    pem = (device.folder / "device.pem").read_text()
    old = load_pem_private_key((device.folder / "device.key").read_bytes(), password=None)
    assert isinstance(old, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    csr = csr_for(key)
    certificate = x509.load_pem_x509_certificate(pem.encode())
    for authority in x509.load_pem_x509_certificates((device.folder / "ca.pem").read_bytes()):
        try:
            certificate.verify_directly_issued_by(authority)
        except Exception:  # noqa: BLE001, S112 - the other one
            continue
        pin = authority.fingerprint(hashes.SHA256()).hex()
    message = proof_message(device=DeviceId(device.name), csr_sha256=csr_digest(csr), ca_fingerprint=pin)
    proof = base64.b64encode(old.sign(message, ec.ECDSA(hashes.SHA256()))).decode()
    context = ssl.create_default_context(cafile=str(device.folder / "ca.pem"))
    body = {"certificate_pem": pem, "csr_pem": csr, "proof": proof}
    answer = hub.call("POST", "/v1/renew", body, context=context)
    assert answer.status == 200, answer
    from tests.fakes.hub_parts import key_pem

    (device.folder / "device.key").write_bytes(key_pem(key))
    (device.folder / "device.pem").write_text(answer.body["certificate_pem"])
    (device.folder / "ca.pem").write_text(answer.body["ca_pem"])
