"""Certificates that live, with a real hub, broker, agent and child: renewed in time, renewed late, and a new CA."""

from __future__ import annotations

import argparse
import base64
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cloud_hub.__main__ import main as hub_command
from cloud_hub.commands import authority as ca_commands
from cloud_hub.ground import rotation
from cloud_hub.ground.folder import DataFolder
from edge_agent.adapters.system import SystemClock
from edge_agent.client import Client
from edge_agent.commands.checks import check_certificate
from edge_agent.enrolment import enroll
from edge_agent.identity import load_identity
from shared.errors import Conflict, OutriderError, TrustError
from shared.ids import DeviceId
from shared.renewal import csr_digest, proof_message
from tests.fakes.hub_parts import csr_for, key_pem
from tests.fakes.hub_process import Device, HubProcess, Line, wait_until
from tests.live.test_agent_enrol_live import ROOT, free_ports

pytestmark = pytest.mark.live
DAY_S = 86_400
SHORT = {"OUTRIDER_HUB_CERTIFICATES__DEVICE_DAYS": str(6 / DAY_S)}


class QuickHub(HubProcess):
    """Makes its join tokens over HTTPS: a process less for each."""

    def join_token(self, *arguments: str) -> str:
        assert not arguments
        answer = self.call("POST", "/v1/tokens", {"kind": "join"}, token=self.admin)
        assert answer.status == 201, answer
        return str(answer.body["token"])


def enrolled(hub: HubProcess, state: Path, *, name: str, token: str = "") -> Path:
    """A state directory as `outrider-agent enroll` leaves it."""
    enroll(
        token=token or hub.join_token(),
        state_dir=state,
        profile="x86-gateway",
        name=name,
        force=False,
        clock=SystemClock(),
    )
    return state


@pytest.fixture
def hub(short_tmp: Path, mosquitto_path: str) -> Iterator[HubProcess]:
    folder = short_tmp / "hub"
    folder.mkdir()
    port, broker_port = free_ports(2)
    made = QuickHub(folder, port=port, broker_port=broker_port)
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


def link(state: Path) -> str:
    """What the running agent says of its link."""
    try:
        with Client(state / "door.sock") as client:
            return client.status().link
    except OutriderError:
        return "no agent yet"


def renewed_while_writing(state: Path, first: int, written: Counter[str]) -> bool:
    """Write a reading, and look whether the certificate is another one."""
    with Client(state / "door.sock") as client:
        client.reading("level", float(written["level"]))
    written["level"] += 1
    return serial(state) != first


def level_readings(hub: HubProcess) -> int:
    """How many of those readings the hub has."""
    path, token = "/v1/telemetry/dev-a?class=reading&limit=500", hub.admin
    after, count = 0, 0
    while True:
        page = hub.call("GET", f"{path}&after={after}", token=token).body
        count += len([item for item in page["items"] if item["body"].get("name") == "level"])
        if page["next"] is None:
            return count
        after = page["next"]


def serial(state: Path) -> int:
    return x509.load_pem_x509_certificate(load_identity(state).certificate_path.read_bytes()).serial_number


def renewals(hub: HubProcess) -> list[dict[str, Any]]:
    answer = hub.call("GET", "/v1/audit", token=hub.admin)
    return [row for row in answer.body["items"] if row["action"].startswith("certificate.")]


def test_a_certificate_renews_itself_and_an_expired_one_comes_back(hub: HubProcess, short_tmp: Path) -> None:
    hub.start(env=SHORT)
    state = enrolled(hub, short_tmp / "agent", name="dev-a")
    first, written = serial(state), Counter[str]()
    with running(state):
        wait_until(lambda: link(state) == "online", "the link")
        wait_until(lambda: renewed_while_writing(state, first, written), "the renewal")
        wait_until(lambda: link(state) == "online", "the link with the new certificate")
        with Client(state / "door.sock") as client:
            seen = client.status()
        assert (seen.boot, seen.certificate_trouble) == (1, "")
        assert seen.certificate_expires_ms > seen.certificate_due_ms > 0
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
    found = check_certificate(identity, now_ms=SystemClock().wall_ms())
    assert (found.result, "it renews what has expired" in found.todo) == ("warn", True), found
    with running(state):
        wait_until(lambda: serial(state) != second, "the renewal of what had expired")
        wait_until(lambda: link(state) == "online", "the link")
        wait_until(lambda: level_readings(hub) == written["level"], "every reading is at the hub, once")
    assert written["level"] > 0
    rows = renewals(hub)
    assert {row["action"] for row in rows} == {"certificate.renewed"}
    assert any(row["detail"]["had_expired"] for row in rows)


def test_the_ca_is_changed_under_a_running_fleet(
    hub: HubProcess, short_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.start()
    old_ca = (hub.data / "ca" / "ca.pem").read_text()
    old_token = hub.join_token()
    awake, asleep = hub.enrol("awake"), hub.enrol("asleep")
    line = Line(awake)
    assert line.connected.wait(20)

    assert rotate(hub, "begin") == "begun"
    assert "2 devices were not told of the next CA yet: asleep, awake" in refused(hub, "switch")
    wait_until(lambda: len(authorities(hub)) == 2, "the hub has seen the next CA")
    wait_until(lambda: lists(hub) == 2, "a revocation list of each")
    assert_healthy(hub, capsys)
    renew(hub, awake)
    assert (awake.folder / "ca.pem").read_text().count("BEGIN") == 2
    assert "1 devices were not told of the next CA yet: asleep" in refused(hub, "switch")
    assert rotate(hub, "switch", force=True) == "switched"
    new_ca = rotation.load(DataFolder(hub.data), now_ms=0).issuing.fingerprint
    wait_until(lambda: len(authorities(hub)) == 3, "the hub has switched")

    assert lists(hub) == 2
    # The hub's ports have certificates of the new CA, and take those of both.
    wait_until(lambda: issuer_of(shown(hub), awake) == new_ca, "the port's certificate of the new CA")
    assert_healthy(hub, capsys)
    assert not line.lost.is_set()
    assert line.publish("outrider/1/awake/up/event", b"x") == 0
    line.close()
    for device in (awake, asleep):
        assert comes_in(device, trusting_new(hub, device))
    # Whoever pinned the old one follows its link: a token of before, and a device that has slept.
    state = enrolled(hub, short_tmp / "late", name="late", token=old_token)
    assert old_ca in load_identity(state).ca_path.read_text()
    assert "2 devices have no certificate of the new CA yet: asleep, awake" in refused(hub, "finish")

    renew(hub, awake)
    assert rotate(hub, "finish", force=True) == "steady"
    wait_until(lambda: len(authorities(hub)) == 1, "the hub has forgotten the old CA")
    context = trusting_new(hub, asleep)
    wait_until(lambda: not comes_in(asleep, context) and comes_in(awake, awake.context()), "the broker has too")
    assert hub.call("GET", "/v1/whoami", context=awake.context()).status == 200
    assert hub.call("GET", "/v1/whoami", context=context).status == 403
    wait_until(lambda: hub.call("GET", "/readyz").status == 200, "the hub's own link, at the broker of the new CA")
    with pytest.raises(TrustError) as caught:
        enrolled(hub, short_tmp / "x", name="too-late", token=old_token)
    assert "has changed its CA since; ask for a new token" in caught.value.hint


def rotate(hub: HubProcess, step: str, *, force: bool = False) -> str:
    """One step of `outrider-hub ca rotate`, beside the running hub; returns the phase and raises what it refuses."""
    arguments = argparse.Namespace(data=str(hub.data), step=step, force=force, json=False)
    assert ca_commands.rotate(arguments) == 0
    return rotation.phase_of(DataFolder(hub.data))


def assert_healthy(hub: HubProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """`outrider-hub doctor` finds nothing wrong, and this hub at its ports."""
    capsys.readouterr()
    status = hub_command(["doctor", "--data", str(hub.data)])
    told = capsys.readouterr().out
    assert (status, told.count("this hub")) == (0, 2), told


def refused(hub: HubProcess, step: str) -> str:
    with pytest.raises(Conflict) as caught:
        rotate(hub, step)
    return caught.value.message


def comes_in(device: Device, context: ssl.SSLContext) -> bool:
    """Whether the broker takes this certificate now."""
    try:
        line = Line(device, context=context)
    except OSError:
        return False
    try:
        return line.connected.wait(1)
    finally:
        line.close()


def authorities(hub: HubProcess) -> list[x509.Certificate]:
    """What the hub publishes: CAs, and the link between them."""
    blind = ssl.create_default_context()
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    text = hub.call("GET", "/v1/ca", context=blind).body
    return x509.load_pem_x509_certificates(text.encode())


def shown(hub: HubProcess) -> x509.Certificate:
    """What the HTTPS port shows."""
    return x509.load_pem_x509_certificate(ssl.get_server_certificate(("localhost", hub.port)).encode())


def issuer_of(certificate: x509.Certificate, device: Device) -> str:
    """The fingerprint of the CA, of those that the device trusts, that has signed this."""
    authorities = x509.load_pem_x509_certificates((device.folder / "ca.pem").read_bytes())
    (found,) = [authority for authority in authorities if is_signed_by(certificate, authority)]
    return found.fingerprint(hashes.SHA256()).hex()


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, InvalidSignature):
        return False
    return True


def lists(hub: HubProcess) -> int:
    """How many revocation lists the broker reads."""
    return (hub.data / "broker" / "crl.pem").read_text().count("BEGIN X509 CRL")


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
    pin = issuer_of(x509.load_pem_x509_certificate(pem.encode()), device)
    message = proof_message(device=DeviceId(device.name), csr_sha256=csr_digest(csr), ca_fingerprint=pin)
    proof = base64.b64encode(old.sign(message, ec.ECDSA(hashes.SHA256()))).decode()
    context = ssl.create_default_context(cafile=str(device.folder / "ca.pem"))
    body = {"certificate_pem": pem, "csr_pem": csr, "proof": proof}
    answer = hub.call("POST", "/v1/renew", body, context=context)
    assert answer.status == 200, answer
    (device.folder / "device.key").write_bytes(key_pem(key))
    (device.folder / "device.pem").write_text(answer.body["certificate_pem"])
    (device.folder / "ca.pem").write_text(answer.body["ca_pem"])
