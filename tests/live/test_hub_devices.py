"""Two real devices at a real hub with a real broker: neither can be the other, hear the other or push it out.

What must not arrive is asserted by non-delivery: the broker grants every SUBSCRIBE. After each forbidden act, something
permitted is sent on the same path, and only that must have arrived.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import paho.mqtt.client as mqtt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_hub.ground.ca import Authority, make_ca
from shared.ids import DeviceId
from shared.telemetry import BatchId
from shared.wire import topics
from shared.wire.envelope import encode_envelope
from shared.wire.messages import Batch, Birth, Death, Message, Reported
from tests.fakes.hub_parts import csr_for, envelope_of, key_pem
from tests.fakes.hub_process import Answer, Device, HubProcess, Line, wait_until

pytestmark = pytest.mark.live

A, B = DeviceId("dev-a"), DeviceId("dev-b")


def free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    holders = [socket.socket() for _ in range(count)]
    try:
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in holders]
    finally:
        for holder in holders:
            holder.close()


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


def wire(message: Message, device: DeviceId, *, boot: int = 1) -> bytes:
    return encode_envelope(envelope_of(message, device=device, boot=boot))


def birth(boot: int, session: int = 1) -> Birth:
    return Birth(boot=boot, session=session, epoch="e" * 16, agent_version="0.1", profile="pi")


def report(revision: int) -> Reported:
    return Reported(revision=revision, assignment_version=0, models=(), queue_records=revision)


def connect(device: Device, **options: object) -> Line:
    line = Line(device, **options)  # type: ignore[arg-type]
    assert line.connected.wait(20)
    return line


def test_presence_follows_birth_and_last_will(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    first = connect(devices[0], will=(topics.up(A, "death"), wire(Death(boot=1, session=1), A)))
    first.publish(topics.up(A, "birth"), wire(birth(1, 1), A))
    wait_until(lambda: bool(hub.device(A)["online"]), "the birth")
    first.cut()
    wait_until(lambda: not hub.device(A)["online"], "the last will")
    second = connect(devices[0])
    second.publish(topics.up(A, "birth"), wire(birth(1, 2), A))
    wait_until(lambda: bool(hub.device(A)["online"]), "the second birth")
    second.publish(topics.up(A, "death"), wire(Death(boot=1, session=1), A))
    second.publish(topics.up(A, "reported"), wire(report(1), A))
    wait_until(lambda: hub.device(A)["reported"].get("revision") == 1, "the report after the late death")
    assert hub.device(A)["online"]
    second.publish(topics.up(A, "death"), wire(Death(boot=1, session=2, reason="stopped"), A))
    wait_until(lambda: not hub.device(A)["online"], "the death")
    second.close()


def test_a_device_cannot_publish_as_another(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    a, b = devices
    victim, thief = connect(a), connect(b)
    victim.subscribe(topics.down_filter(A))
    victim.publish(topics.up(A, "birth"), wire(birth(2), A))
    victim.publish(topics.up(A, "reported"), wire(report(10), A, boot=2))
    thief.publish(topics.up(B, "birth"), wire(birth(2), B))
    wait_until(lambda: hub.device(A)["reported"].get("revision") == 10, "a's report")

    assert thief.publish(topics.up(A, "reported"), wire(report(66), A, boot=2)) == 0x87  # not authorized
    assert thief.publish(topics.up(A, "death"), wire(Death(boot=9, session=9), A)) == 0x87
    assert thief.publish(topics.down(A, "ack"), b"from the thief") == 0x87
    assert thief.publish(topics.down(B, "ack"), b"to myself") == 0x87
    # On its own topics it may speak, but not in another's name.
    before = hub.messages("reported").get("protocol.misaddressed", 0)
    thief.publish(topics.up(B, "reported"), wire(report(67), A, boot=2))
    thief.publish(topics.up(B, "reported"), wire(report(11), B, boot=2))
    wait_until(lambda: hub.device(B)["reported"].get("revision") == 11, "b's own report")

    assert hub.messages("reported")["protocol.misaddressed"] == before + 1
    assert hub.device(A)["reported"]["revision"] == 10
    assert hub.device(A)["online"]
    assert victim.drain() == []
    victim.close()
    thief.close()


def test_a_device_cannot_hear_another(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    a, b = devices
    victim, spy = connect(a), connect(b)
    victim.subscribe(topics.down_filter(A))
    spy.subscribe(
        topics.down_filter(A),
        topics.up(A, "telemetry"),
        "outrider/#",
        "#",
        f"$share/spies/{topics.down_filter(A)}",
        topics.down_filter(B),
    )
    # The hub answers each of them on its own topic: a refused batch is acknowledged as refused.
    for line, device in ((victim, A), (spy, B)):
        line.publish(topics.up(device, "telemetry"), refused_batch(device))
    wait_until(lambda: victim.received.qsize() >= 1 and spy.received.qsize() >= 1, "both answers")
    assert {topic for topic, _ in victim.drain()} == {topics.down(A, "ack")}
    assert {topic for topic, _ in spy.drain()} == {topics.down(B, "ack")}
    victim.close()
    spy.close()


def refused_batch(device: DeviceId) -> bytes:
    batch = Batch(batch=BatchId(epoch="e" * 16, klass=2, first=1, last=1, digest="0" * 64), columns=b"rubbish")
    return wire(batch, device)


def test_a_device_cannot_take_over_anothers_session(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    a, b = devices
    victim = connect(a, will=(topics.up(A, "death"), wire(Death(boot=3, session=1), A)))
    victim.publish(topics.up(A, "birth"), wire(birth(3), A))
    thief = connect(b, client_id=A)
    thief.publish(topics.up(B, "birth"), wire(birth(3), B))
    wait_until(lambda: hub.device(B)["boot"] == 3, "the thief's own birth")
    victim.publish(topics.up(A, "reported"), wire(report(20), A, boot=3))
    wait_until(lambda: hub.device(A)["reported"].get("revision") == 20, "the victim's report")
    assert not victim.lost.is_set()
    assert hub.device(A)["online"]
    # The same certificate does take over its own session: that is how a device comes back.
    again = connect(b, client_id="anything")
    assert thief.lost.wait(20)
    thief.abandon()
    for line in (victim, again):
        line.close()


def test_without_our_certificate_there_is_no_way_in(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    a, _ = devices
    naked = hub.context()
    pair = make_ca(now_ms=1_700_000_000_000, label="foreign")
    key = ec.generate_private_key(ec.SECP256R1())
    foreign = Authority(pair.certificate_pem, pair.key_pem).issue_device(
        csr_for(key), device=A, now_ms=1_790_000_000_000, days=365
    )
    folder = hub.folder / "foreign"
    folder.mkdir()
    (folder / "device.pem").write_text(foreign.pem)
    (folder / "device.key").write_bytes(key_pem(key))
    stranger = hub.context()
    stranger.load_cert_chain(folder / "device.pem", folder / "device.key")
    for context in (naked, stranger):
        try:
            line = Line(a, context=context)
        except (ssl.SSLError, OSError):
            continue
        assert line.lost.wait(20)
        assert not line.connected.is_set()
        line.abandon()
    with pytest.raises((ssl.SSLError, OSError)):
        hub.call("GET", "/v1/whoami", context=stranger)


def test_https_knows_a_device_by_its_certificate_only(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    a, _ = devices
    assert hub.call("GET", "/v1/whoami", context=a.context()) == Answer(200, {"name": A, "role": "device", "device": A})
    forged = {"X-Client-Cert": (a.folder / "device.pem").read_text().replace("\n", "")}
    assert hub.call("GET", "/v1/whoami", headers=forged).status == 401
    refused = hub.call("GET", "/v1/devices", context=a.context())
    assert (refused.status, refused.body["code"]) == (403, "auth.role")
    hubs_own = hub.context()
    hubs_own.load_cert_chain(hub.data / "broker" / "hub.pem", hub.data / "broker" / "hub.key")
    answer = hub.call("GET", "/v1/whoami", context=hubs_own)
    assert (answer.status, answer.body["code"]) == (403, "auth.unknown_certificate")


def test_a_token_works_once_over_the_wire(hub: HubProcess) -> None:
    def body(token: str) -> dict[str, str]:
        return {"token": token, "csr_pem": csr_for(ec.generate_private_key(ec.SECP256R1())), "profile": "pi"}

    token = hub.join_token()
    assert hub.call("POST", "/v1/enroll", body(token)).status == 201
    spent = hub.call("POST", "/v1/enroll", body(token))
    assert (spent.status, spent.body["code"]) == (409, "enrol.token_spent")
    assert "token create" in spent.body["hint"]
    forged = hub.call("POST", "/v1/enroll", body(token[:-6] + "AAAAAA"))
    assert (forged.status, forged.body["code"]) == (401, "enrol.token_unknown")


def test_a_flood_of_rubbish_is_counted(hub: HubProcess, devices: tuple[Device, Device]) -> None:
    line = connect(devices[0])
    before = hub.messages("event").get("protocol.envelope", 0)
    for _ in range(50):
        line.client.publish(topics.up(A, "event"), b"\xff" * 100, qos=1)
    wait_until(lambda: hub.messages("event").get("protocol.envelope", 0) == before + 50, "all fifty counted")
    assert line.client.is_connected()
    info = line.client.publish(f"outrider/1/{A}/up/unheard", b"x", qos=1)
    assert info.rc == mqtt.MQTT_ERR_SUCCESS
    wait_until(lambda: hub.messages("other").get("protocol.topic", 0) >= 1, "the unknown leaf counted")
    line.close()
