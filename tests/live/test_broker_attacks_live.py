"""Attacks on the managed broker and the hub's port that a holder of some certificate can try; each is refused.

Spoofing and reading another's topics, and client ids: test_hub_devices.py. Revoked devices, clones, ended lists:
test_revocation_live.py.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_hub.ground.ca import Authority
from cloud_hub.ground.system import SystemClock
from shared.ids import DeviceId
from shared.wire import topics
from shared.wire.envelope import encode_envelope
from shared.wire.messages import Birth, Death, Message, Reported
from tests.fakes.hub_parts import csr_for, envelope_of
from tests.fakes.hub_process import Device, HubProcess, Line, wait_until
from tests.fakes.tls_server import takes_server
from tests.live.test_hub_devices import free_ports

pytestmark = pytest.mark.live

A, B = DeviceId("dev-a"), DeviceId("dev-b")
REFUSED = 0x87


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, mosquitto_path: str) -> Iterator[HubProcess]:
    port, broker_port = free_ports(2)
    hub = HubProcess(tmp_path_factory.mktemp("hub"), port=port, broker_port=broker_port)
    hub.init()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


@pytest.fixture(scope="module")
def devices(hub: HubProcess) -> tuple[Device, Device]:
    return hub.enrol(A), hub.enrol(B)


def wire(message: Message, device: str, *, boot: int = 1) -> bytes:
    return encode_envelope(envelope_of(message, device=device, boot=boot))


def birth(boot: int) -> Birth:
    return Birth(boot=boot, session=1, epoch="e" * 16, agent_version="0.1", profile="pi")


def report(revision: int) -> Reported:
    return Reported(revision=revision, assignment_version=0, models=(), queue_records=revision)


def connect(device: Device, will: tuple[str, bytes] | None = None) -> Line:
    line = Line(device, will=will)
    assert line.connected.wait(20)
    return line


def forged(hub: HubProcess, name: str, *, of: Device) -> Device:
    """A client certificate with a name that the hub would never assign, signed by its CA all the same."""
    pem, key = (hub.data / "ca" / "ca.pem").read_bytes(), (hub.data / "ca" / "ca.key").read_bytes()
    pair = Authority(pem, key).issue_client(name, now_ms=SystemClock().wall_ms(), days=1)
    folder = hub.folder / f"forged-{len(list(hub.folder.iterdir()))}"
    folder.mkdir()
    (folder / "device.pem").write_bytes(pair.certificate_pem)
    (folder / "device.key").write_bytes(pair.key_pem)
    (folder / "ca.pem").write_bytes(pem)
    return Device(name=name, folder=folder, port=of.port)


@pytest.mark.parametrize("name", ["+", "#", "dev-a/up", "dev-a/+"])
def test_attack_23_a_wildcard_name_reaches_nothing(hub: HubProcess, devices: tuple[Device, Device], name: str) -> None:
    victim = connect(devices[0])
    victim.publish(topics.up(A, "birth"), wire(birth(1), A))
    try:
        thief = Line(forged(hub, name, of=devices[0]))
    except (ssl.SSLError, OSError):
        victim.close()
        return
    wait_until(lambda: thief.connected.is_set() or thief.lost.is_set(), "in or out")
    if thief.connected.is_set():
        thief.subscribe("#", "outrider/#", topics.down_filter(A))
        for topic in (topics.up(A, "reported"), topics.up(A, "birth"), topics.down(A, "ack")):
            assert thief.publish(topic, wire(report(99), A)) == REFUSED
        victim.publish(topics.up(A, "telemetry"), b"rubbish")
        victim.publish(topics.up(A, "reported"), wire(report(1), A))
        wait_until(lambda: hub.device(A)["reported"].get("revision") == 1, "the victim's report")
        assert thief.drain() == []
    thief.close()
    victim.close()


def test_attack_23_a_will_speaks_for_nobody_else(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    victim = connect(devices[0])
    victim.publish(topics.up(A, "birth"), wire(birth(2), A))
    wait_until(lambda: hub.device(A)["boot"] == 2, "the victim's birth")
    thief = connect(devices[1], will=(topics.up(A, "death"), wire(Death(boot=2, session=1), A)))
    thief.cut()
    # Its own will, in the victim's name, comes in and is refused by the hub.
    before = hub.messages("death").get("protocol.misaddressed", 0)
    liar = connect(devices[1], will=(topics.up(B, "death"), wire(Death(boot=2, session=1), A)))
    liar.cut()
    wait_until(lambda: hub.messages("death").get("protocol.misaddressed", 0) == before + 1, "the lying will")
    assert hub.device(A)["online"]
    victim.close()


def test_attack_23_nothing_poisoned_is_kept_for_later(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    thief = connect(devices[1])
    for topic in (topics.down(A, "assignment"), topics.down(B, "assignment"), "$SYS/broker/uptime", "anything"):
        info = thief.client.publish(topic, b"poison", qos=1, retain=True)
        while True:
            mid, reason = thief.acked.get(timeout=20)
            if mid == info.mid:
                break
        assert reason == REFUSED
    later = connect(devices[0])
    later.subscribe(topics.down_filter(A), "$SYS/#", "#")
    later.publish(topics.up(A, "telemetry"), b"")
    later.publish(topics.up(A, "reported"), wire(report(5), A, boot=3))
    wait_until(lambda: hub.device(A)["reported"].get("revision") == 5, "the report")
    assert later.drain() == []
    later.close()
    thief.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_attack_28_no_older_tls(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    context = devices[0].context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("localhost", hub.broker_port), timeout=10) as raw,
        pytest.raises((ssl.SSLError, OSError)),
    ):
        context.wrap_socket(raw, server_hostname="localhost")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("localhost", hub.port), timeout=10) as raw,
        pytest.raises((ssl.SSLError, OSError)),
    ):
        old.wrap_socket(raw)


def test_attack_28_a_devices_certificate_is_no_servers(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    assert shakes(devices[0].folder / "device.pem", devices[0].folder / "device.key", hub) is False
    # The same with the broker's own: what is refused above is the certificate, not the trial.
    assert shakes(hub.data / "broker" / "server.pem", hub.data / "broker" / "server.key", hub) is True


def shakes(certificate: Path, key: Path, hub: HubProcess) -> bool:
    """Whether one of the hub's clients, names aside, takes a server with this certificate for the hub's."""
    return takes_server(hub.context(), certificate, key)


def test_attack_28_a_servers_certificate_is_no_clients(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    folder = hub.folder / "as-client"
    folder.mkdir()
    for name, source in (
        ("device.pem", hub.data / "broker" / "server.pem"),
        ("device.key", hub.data / "broker" / "server.key"),
        ("ca.pem", hub.data / "ca" / "ca.pem"),
    ):
        (folder / name).write_bytes(source.read_bytes())
    try:
        line = Line(Device(name="localhost", folder=folder, port=hub.broker_port))
    except (ssl.SSLError, OSError):
        return
    assert line.lost.wait(20)
    assert not line.connected.is_set()
    line.abandon()


def test_attack_30_a_token_raced_by_fifty_admits_one(hub: HubProcess) -> None:
    token = hub.join_token()
    bodies = [
        {"token": token, "csr_pem": csr_for(ec.generate_private_key(ec.SECP256R1()), name="hub"), "profile": "pi"}
        for _ in range(50)
    ]
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda body: hub.call("POST", "/v1/enroll", body), bodies))
    joined = [answer for answer in answers if answer.status == 201]
    assert len(joined) == 1
    assert {answer.status for answer in answers} <= {201, 409, 429}
    # The name in the request, `hub`, is not the name in the certificate.
    assert joined[0].body["device"].startswith("dev-")


def test_attack_30_a_device_reaches_nothing_of_operators(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    text = hub.call("GET", "/openapi.json").body
    asked: dict[tuple[str, str], int] = {}
    for path, methods in text["paths"].items():
        for method in methods:
            filled = path
            for name in path.split("{")[1:]:
                filled = filled.replace(f"{{{name.split('}')[0]}}}", "x")
            answer = hub.call(method.upper(), filled, {}, context=devices[1].context())
            asked[(method, path)] = answer.status
    theirs = {key for key, status in asked.items() if status not in (401, 403)}
    assert {path for _, path in theirs} <= DEVICES_OWN, json.dumps(sorted(theirs))
    assert len(asked) - len(theirs) >= 20


DEVICES_OWN = {
    "/healthz", "/readyz", "/v1/ca", "/v1/whoami", "/v1/enroll", "/v1/blobs/{digest}", "/v1/metadata/{name}",
    "/v1/rounds/{run}/replies/{message}", "/v1/time", "/v1/renew",
}  # fmt: skip


def test_attack_30_a_viewer_changes_nothing(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    made = hub.call("POST", "/v1/tokens", {"kind": "api", "name": "eye", "role": "viewer"}, token=hub.admin)
    assert made.status == 201, made
    viewer = made.body["token"]
    assert hub.call("GET", "/v1/devices", token=viewer).status == 200
    for method, path, body in (
        ("POST", f"/v1/devices/{A}/revoke", {"reason": ""}),
        ("POST", f"/v1/devices/{A}/quarantine", {"reason": ""}),
        ("DELETE", f"/v1/devices/{A}/quarantine", None),
        ("PATCH", f"/v1/devices/{A}", {"labels": {"site": "x"}}),
        ("POST", "/v1/tokens", {"kind": "join"}),
        ("POST", "/v1/assignments", {}),
    ):
        answer = hub.call(method, path, body, token=viewer)
        assert (answer.status, answer.body["code"]) == (403, "auth.role"), (path, answer)
    assert hub.device(A)["standing"] == ""
