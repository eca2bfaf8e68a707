"""A revoked device at a real hub with a real broker: silent at once, in both directions, and out for good.

What must not arrive is asserted by non-delivery, after something permitted has come the same way.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator

import pytest

from shared.ids import DeviceId
from shared.telemetry import BatchId
from shared.wire import topics
from shared.wire.envelope import encode_envelope
from shared.wire.messages import Batch, Birth, Message, Reported
from tests.fakes.hub_parts import envelope_of
from tests.fakes.hub_process import Device, HubProcess, Line, wait_until
from tests.live.test_hub_devices import free_ports

pytestmark = pytest.mark.live

SILENT_S = 5.0


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


def test_a_revoked_device_is_silent_and_stays_out(hub: HubProcess, record_property: pytest.FixtureRequest) -> None:
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
