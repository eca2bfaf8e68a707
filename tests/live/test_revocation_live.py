"""A revoked device at a real hub with a real broker: silent at once, in both directions, and out for good.

What must not arrive is asserted by non-delivery, after something permitted has come the same way.
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_hub.ground.ca import Authority
from cloud_hub.ground.revocation import make_list
from shared.ids import DeviceId
from shared.telemetry import BatchId
from shared.wire import topics
from shared.wire.envelope import encode_envelope
from shared.wire.messages import Batch, Birth, Message, Reported
from tests.fakes.hub_parts import DAY_MS, csr_for, envelope_of, key_pem
from tests.fakes.hub_process import Device, HubProcess, Line, wait_until
from tests.live.test_hub_devices import free_ports

pytestmark = pytest.mark.live

SILENT_S: Final = 5.0
CONNECT: Final = bytes([0x10, 0x0E, 0, 4, *b"MQTT", 5, 2, 0, 30, 0, 0, 1, ord("x")])
"""MQTT 5, clean start, a client id that the broker replaces by the certificate's name."""


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


def wire(message: Message, device: str, *, boot: int = 1, message_id: str = "m1") -> bytes:
    return encode_envelope(envelope_of(message, device=device, boot=boot, envelope_id=message_id))


def birth(boot: int, session: int = 1) -> Birth:
    return Birth(boot=boot, session=session, epoch="e" * 16, agent_version="0.1", profile="pi")


def report(revision: int) -> Reported:
    return Reported(revision=revision, assignment_version=0, models=(), queue_records=revision)


def refused_batch(device: str) -> bytes:
    batch = Batch(batch=BatchId(epoch="e" * 16, klass=2, first=1, last=1, digest="0" * 64), columns=b"rubbish")
    return wire(batch, device)


def connect(device: Device) -> Line:
    line = Line(device)
    assert line.connected.wait(20)
    return line


def gets_in(device: Device) -> bool:
    """Whether the broker lets the device in; a refused certificate is told after the handshake (TLS 1.3)."""
    try:
        line = Line(device)
    except (ssl.SSLError, OSError):
        return False
    wait_until(lambda: line.connected.is_set() or line.lost.is_set(), "in or out")
    is_in = line.connected.is_set()
    line.close()
    return is_in


def revoke(hub: HubProcess, name: str, reason: str = "") -> float:
    """Revoke over REST; how long the answer took."""
    began = time.monotonic()
    answer = hub.call("POST", f"/v1/devices/{name}/revoke", {"reason": reason}, token=hub.admin)
    took = time.monotonic() - began
    assert (answer.status, answer.body["standing"], answer.body["enforced"]) == (200, "revoked", True), answer
    return took


def test_a_revoked_device_is_silent_and_stays_out(hub: HubProcess) -> None:
    name = DeviceId("lost-1")
    device, other = hub.enrol(name), hub.enrol("kept-1")
    line, kept = connect(device), connect(other)
    line.subscribe(topics.down_filter(name))
    line.publish(topics.up(name, "birth"), wire(birth(1), name))
    kept.publish(topics.up(DeviceId("kept-1"), "birth"), wire(birth(1), "kept-1"))
    line.publish(topics.up(name, "telemetry"), refused_batch(name))
    wait_until(lambda: line.received.qsize() == 1, "the answer while it is welcome")
    assert hub.call("GET", "/v1/whoami", context=device.context()).status == 200
    line.drain()

    began = time.monotonic()
    took = revoke(hub, name, "stolen")
    assert line.lost.wait(SILENT_S)
    print(f"silent after {time.monotonic() - began:.2f} s, answered after {took:.2f} s")

    # Nothing comes in any more, and nothing goes out; others go on.
    line.client.publish(topics.up(name, "telemetry"), refused_batch(name), qos=1)
    kept.publish(topics.up(DeviceId("kept-1"), "reported"), wire(report(3), "kept-1"))
    wait_until(lambda: hub.device("kept-1")["reported"].get("revision") == 3, "the other's report")
    assert line.drain() == []
    assert not kept.lost.is_set()
    assert not gets_in(device)
    known = hub.device(name)
    assert (known["standing"], known["standing_reason"], known["online"]) == ("revoked", "stolen", False)
    for method, path in (
        ("GET", "/v1/whoami"),
        ("GET", f"/v1/blobs/{'0' * 64}"),
        ("GET", "/v1/metadata/timestamp.json"),
        ("GET", "/v2"),
        ("PUT", "/v1/rounds/r-1/replies/x"),
    ):
        answer = hub.call(method, path, context=device.context())
        assert answer.status == 403, (path, answer)
        if path != "/v2":
            assert answer.body["code"] == "auth.revoked_certificate", (path, answer)
    line.abandon()
    kept.close()


def test_no_old_session_is_resumed_after_a_revocation(hub: HubProcess) -> None:
    """TLS 1.3 tickets stand for a certificate that was good once (row 25)."""
    name = DeviceId("lost-2")
    device = hub.enrol(name)
    context = device.context()

    def shake(session: ssl.SSLSession | None) -> tuple[bool, ssl.SSLSession | None]:
        """Whether the broker answers a CONNECT, and the session for another time."""
        with (
            socket.create_connection(("localhost", device.port), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname="localhost", session=session) as secured,
        ):
            try:
                secured.sendall(CONNECT)
                answer = secured.recv(4)
            except (ssl.SSLError, OSError):
                return False, None
            return answer[:1] == b"\x20", secured.session

    is_in, session = shake(None)
    assert is_in
    revoke(hub, name)
    assert shake(session)[0] is False


def test_two_with_one_certificate_are_noticed(hub: HubProcess) -> None:
    """Two real clients that push each other out, with a boot counter each (row 24)."""
    name = DeviceId("twin-1")
    device, other = hub.enrol(name), hub.enrol("single-1")
    lines: list[Line] = []
    single = connect(other)
    births = hub.messages("birth").get("ok", 0)
    for turn in range(1, 20):
        for boot in (5, 9):
            line = connect(device)
            if lines:
                assert lines[-1].lost.wait(20)
            lines.append(line)
            line.publish(topics.up(name, "birth"), wire(birth(boot, turn), name, message_id=f"{boot}.{turn}"))
        single.publish(topics.up(DeviceId("single-1"), "birth"), wire(birth(1), "single-1"))
        heard = births + 3 * turn
        wait_until(lambda: hub.messages("birth").get("ok", 0) >= heard, "the births of this turn")  # noqa: B023
        if hub.device(name)["standing"]:
            break
    wait_until(lambda: hub.device(name)["standing"] == "quarantined", "the quarantine")
    assert turn <= 6
    assert hub.device(name)["standing_reason"].startswith("one name in two places: boots")
    assert hub.device("single-1")["standing"] == ""
    rows = hub.call("GET", "/v1/audit?limit=500", token=hub.admin).body["items"]
    told = [(row["actor"], row["action"]) for row in rows if row["subject"] == f"device:{name}"]
    assert told[-1] == ("hub", "device.quarantined")

    # Its records stay with it; those of another are answered, and its own once it is let out again.
    last = lines[-1]
    last.subscribe(topics.down_filter(name))
    single.subscribe(topics.down_filter(DeviceId("single-1")))
    barred = hub.messages("telemetry").get("barred", 0)
    assert last.publish(topics.up(name, "telemetry"), refused_batch(name)) == 0
    single.publish(topics.up(DeviceId("single-1"), "telemetry"), refused_batch("single-1"))
    wait_until(lambda: single.received.qsize() == 1, "the answer to another")
    wait_until(lambda: hub.messages("telemetry").get("barred", 0) == barred + 1, "the batch counted")
    assert last.drain() == []
    refused = hub.call("GET", "/v1/whoami", context=device.context())
    assert (refused.status, refused.body["code"]) == (403, "auth.quarantined")
    assert hub.call("DELETE", f"/v1/devices/{name}/quarantine", token=hub.admin).status == 200
    last.publish(topics.up(name, "telemetry"), refused_batch(name))
    wait_until(lambda: last.received.qsize() == 1, "the answer after the quarantine")
    for line in lines[:-1]:
        line.abandon()
    last.close()
    single.close()


def test_copies_of_one_disk_are_noticed_at_once(hub: HubProcess) -> None:
    name = DeviceId("twin-2")
    device = hub.enrol(name)
    first = connect(device)
    first.publish(topics.up(name, "birth"), wire(birth(3), name, message_id="first"))
    second = connect(device)
    second.publish(topics.up(name, "birth"), wire(birth(3), name, message_id="second"))
    wait_until(lambda: hub.device(name)["standing"] == "quarantined", "the quarantine")
    first.abandon()
    second.close()


def test_out_after_the_broker_the_hub_and_the_list_have_ended(hub: HubProcess) -> None:
    """A broker that dies, a hub that restarts, a list that ended meanwhile: out stays out, in stays in (25, 26)."""
    name, kept = DeviceId("lost-3"), DeviceId("kept-3")
    device, other = hub.enrol(name), hub.enrol(kept)
    assert gets_in(device)
    revoke(hub, name)
    assert not gets_in(device)

    (before,) = hub.broker_pids()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: hub.broker_pids() not in ([], [before]), "the next broker")
    wait_until(lambda: gets_in(other), "the other, at the next broker")
    assert not gets_in(device)

    hub.stop()
    expire_list(hub)
    (hub.data / "broker" / "acl").unlink()
    hub.start()
    assert gets_in(other)
    assert not gets_in(device)

    # Enrolled again, it comes in with the new certificate, and whoever has the old one does not.
    token = hub.join_token("--device", name)
    key = ec.generate_private_key(ec.SECP256R1())
    body = {"token": token, "csr_pem": csr_for(key), "profile": "pi", "name": name}
    answer = hub.call("POST", "/v1/enroll", body)
    assert answer.status == 201, answer
    folder = hub.folder / "again"
    folder.mkdir()
    (folder / "device.key").write_bytes(key_pem(key))
    (folder / "device.pem").write_text(answer.body["certificate_pem"])
    (folder / "ca.pem").write_text(answer.body["ca_pem"])
    again = Device(name=name, folder=folder, port=device.port)
    assert gets_in(again)
    assert not gets_in(device)
    line = connect(again)
    assert line.publish(topics.up(name, "birth"), wire(birth(1), name)) == 0
    wait_until(lambda: bool(hub.device(name)["online"]), "the birth with the new certificate")
    line.close()


def expire_list(hub: HubProcess) -> None:
    """Put a list on the disk that ended long ago, as a hub that was down for months finds it."""
    pem, key = (hub.data / "ca" / "ca.pem").read_bytes(), (hub.data / "ca" / "ca.key").read_bytes()
    old_ms = time.time_ns() // 1_000_000 - 40 * DAY_MS
    (hub.data / "broker" / "crl.pem").write_bytes(make_list(Authority(pem, key), (), now_ms=old_ms, after_ms=None))


def test_a_broker_that_is_not_ours_is_told_what_to_load(hub: HubProcess, mosquitto_path: str) -> None:
    """`broker.mode = external`: the hub drops the device at once, and says when the broker has loaded the lists."""
    hub.stop()
    broker = subprocess.Popen(
        [mosquitto_path, "-c", str(hub.data / "broker" / "mosquitto.conf")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        hub.start(env={"OUTRIDER_HUB_BROKER__MODE": "external", "OUTRIDER_HUB_BROKER__HOST": "localhost"})
        name = DeviceId("lost-4")
        device = hub.enrol(name)
        line = connect(device)
        answer = hub.call("POST", f"/v1/devices/{name}/revoke", {"reason": ""}, token=hub.admin)
        assert (answer.status, answer.body["enforced"]) == (200, False)
        assert line.lost.wait(20)
        assert "revocations_waiting 1.0" in str(hub.call("GET", "/metrics", token=hub.admin).body)
        broker.send_signal(signal.SIGHUP)
        revoke(hub, name)
        assert not gets_in(device)
        line.abandon()
    finally:
        with suppress(ProcessLookupError):
            broker.terminate()
        broker.wait(20)
