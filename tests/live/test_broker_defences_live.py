"""Attacks on the broker, each held off by one line of its configuration, of the access list or of a certificate.

Everything but mosquitto runs in this process, so that tests/attacks can take each line out. The same attacks on a whole
hub: test_hub_devices.py, test_broker_attacks_live.py, test_revocation_live.py.
"""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_hub.ground import revocation
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.broker import BrokerSettings, write_files
from cloud_hub.ground.system import SystemClock
from edge_agent.adapters.tls import dated_context
from shared import limits
from shared.ids import DeviceId
from shared.wire import topics
from tests.fakes.hub_parts import csr_for, key_pem, make_authority
from tests.fakes.hub_process import Device, Line, wait_until
from tests.fakes.tls_server import takes_server

pytestmark = pytest.mark.live

A, B, HUB = DeviceId("dev-a"), DeviceId("dev-b"), "hub"
REFUSED = 0x87
DAYS = 3


class Grounds:
    """A CA, the broker's folder with everything that the hub writes into it, and mosquitto over that."""

    def __init__(self, folder: Path, *, port: int, binary: str) -> None:
        self.folder, self.port = folder, port
        self.clock = SystemClock()
        self.authority = make_authority(self.clock.wall_ms())
        self.broker = folder / "broker"
        self.broker.mkdir()
        (self.broker / "ca.pem").write_text(self.authority.pem)
        pair = self.authority.issue_server(["localhost"], now_ms=self.clock.wall_ms(), days=DAYS)
        (self.broker / "server.pem").write_bytes(pair.certificate_pem)
        (self.broker / "server.key").write_bytes(pair.key_pem)
        (self.broker / "cas").mkdir()
        self.lists = revocation.AccessLists(
            self.broker, authorities=Authorities(self.authority), hub_name=HUB, clock=self.clock
        )
        self.lists.write(revoked=(), denied=())
        write_files(BrokerSettings(self.broker, "127.0.0.1", port, binary, HUB))
        self.binary = binary
        self.start()

    def start(self) -> None:
        """Start the broker on what its folder holds, and wait until it answers."""
        with (self.folder / "mosquitto.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.binary, "-c", str(self.broker / "mosquitto.conf")], stdout=log, stderr=log, env={}
            )
        wait_until(self._answers, "the broker")

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "mosquitto.log").read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def client(self, name: str, *, server: bool = False) -> Device:
        """Who holds a certificate of this CA, a device's or the hub's; with `server` one that is for servers."""
        folder = self.folder / f"client-{len(list(self.folder.iterdir()))}"
        folder.mkdir()
        now_ms = self.clock.wall_ms()
        key = ec.generate_private_key(ec.SECP256R1())
        if server:
            pair = self.authority.issue_server([name], now_ms=now_ms, days=DAYS)
            pem, key_data = pair.certificate_pem, pair.key_pem
        else:
            issued = self.authority.issue_device(csr_for(key), device=DeviceId(name), now_ms=now_ms, days=DAYS)
            pem, key_data = issued.pem.encode(), key_pem(key)
            self.serial = issued.serial
        (folder / "device.pem").write_bytes(pem)
        (folder / "device.key").write_bytes(key_data)
        (folder / "ca.pem").write_text(self.authority.pem)
        return Device(name=name, folder=folder, port=self.port)

    def stop(self) -> None:
        """End the broker."""
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def grounds(tmp_path: Path, free_port: int, mosquitto_path: str) -> Iterator[Grounds]:
    grounds = Grounds(tmp_path, port=free_port, binary=mosquitto_path)
    try:
        yield grounds
    finally:
        grounds.stop()


@pytest.fixture
def lines() -> Iterator[list[Line]]:
    """Connections to close at the end, whatever came."""
    opened: list[Line] = []
    yield opened
    for line in opened:
        if line.lost.is_set() or not line.connected.is_set():
            line.abandon()
        else:
            line.close()


def connect(device: Device, lines: list[Line], *, client_id: str | None = None) -> Line:
    line = Line(device, client_id=client_id)
    lines.append(line)
    assert line.connected.wait(20)
    return line


def gets_in(device: Device, lines: list[Line], *, context: ssl.SSLContext | None = None) -> bool:
    """Whether the broker lets this client in; with TLS 1.3 a refusal comes after the client's own handshake."""
    line = Line(device, context=context)
    lines.append(line)
    wait_until(lambda: line.connected.is_set() or line.lost.is_set(), "in or out")
    return line.connected.is_set()


def test_attack_15_nothing_is_said_without_tls(grounds: Grounds) -> None:
    connect_packet = b"\x10\x12\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x05dev-a"
    with socket.create_connection(("127.0.0.1", grounds.port), timeout=5) as raw:
        raw.sendall(connect_packet)
        try:
            answer = raw.recv(64)
        except OSError:
            answer = b""
    assert not answer.startswith(b"\x20")


def test_attack_15_without_a_certificate_nobody_comes_in(grounds: Grounds, lines: list[Line]) -> None:
    context = ssl.create_default_context(cafile=str(grounds.client(A).folder / "ca.pem"))
    assert not gets_in(grounds.client(A), lines, context=context)
    assert gets_in(grounds.client(A), lines)


def test_attack_22_and_23_nobody_speaks_in_anothers_name(grounds: Grounds, lines: list[Line]) -> None:
    hub = connect(grounds.client(HUB), lines)
    hub.subscribe(topics.up_filter())
    victim, thief = connect(grounds.client(A), lines), connect(grounds.client(B), lines)
    for leaf in ("reported", "birth", "telemetry"):
        assert thief.publish(topics.up(A, leaf), b"forged") == REFUSED
    victim.publish(topics.up(A, "reported"), b"true")
    assert hub.received.get(timeout=20) == (topics.up(A, "reported"), b"true")


@pytest.mark.parametrize("wanted", ["#", topics.down_filter(A), topics.up_filter()])
def test_attack_23_nobody_reads_what_is_anothers(grounds: Grounds, lines: list[Line], wanted: str) -> None:
    hub = connect(grounds.client(HUB), lines)
    victim, thief = connect(grounds.client(A), lines), connect(grounds.client(B), lines)
    victim.subscribe(topics.down_filter(A))
    thief.subscribe(wanted, topics.down_filter(B))
    victim.publish(topics.up(A, "reported"), b"secret")
    hub.publish(topics.down(A, "assignment"), b"secret")
    hub.publish(topics.down(B, "assignment"), b"its own")
    assert victim.received.get(timeout=20) == (topics.down(A, "assignment"), b"secret")
    assert thief.received.get(timeout=20)[1] == b"its own"


def test_attack_23_nobody_commands_itself_or_leaves_poison(grounds: Grounds, lines: list[Line]) -> None:
    thief = connect(grounds.client(B), lines)
    for topic in (topics.down(B, "assignment"), topics.down(A, "assignment"), "$SYS/broker/uptime", "anything"):
        assert thief.publish(topic, b"poison") == REFUSED


def test_attack_24_nobody_takes_over_anothers_session(grounds: Grounds, lines: list[Line]) -> None:
    victim = connect(grounds.client(A), lines)
    thief = connect(grounds.client(B), lines, client_id=A)
    thief.publish(topics.up(B, "reported"), b"")
    victim.client.publish(topics.up(A, "reported"), b"", qos=1)
    wait_until(lambda: not victim.acked.empty() or victim.lost.is_set(), "the broker's answer")
    assert not victim.lost.is_set()


def test_attack_25_a_revoked_certificate_does_not_come_in(grounds: Grounds, lines: list[Line]) -> None:
    thief, now_ms = grounds.client(B), grounds.clock.wall_ms()
    line = revocation.RevokedCertificate(grounds.authority.fingerprint, grounds.serial, now_ms)
    grounds.lists.write(revoked=[line], denied=())
    grounds.stop()
    grounds.start()
    assert not gets_in(thief, lines)
    assert gets_in(grounds.client(B), lines)


def test_attack_25_who_is_denied_is_heard_no_more_on_the_connection_that_it_has(
    grounds: Grounds, lines: list[Line]
) -> None:
    thief, other = connect(grounds.client(B), lines), connect(grounds.client(A), lines)
    assert thief.publish(topics.up(B, "reported"), b"") != REFUSED
    mark = grounds.lists.write(revoked=(), denied=[B])
    grounds.process.send_signal(signal.SIGHUP)
    wait_until(lambda: other.publish(topics.up_branch(A) + mark, b"") == REFUSED, "the new list")
    assert thief.publish(topics.up(B, "reported"), b"") == REFUSED
    assert other.publish(topics.up(A, "reported"), b"") != REFUSED


def test_attack_27_a_packet_that_is_too_large_ends_the_connection(grounds: Grounds, lines: list[Line]) -> None:
    flood = connect(grounds.client(A), lines)
    flood.client.publish(topics.up(A, "telemetry"), bytes(limits.MAX_MQTT_PACKET_BYTES + 1), qos=1)
    wait_until(lambda: not flood.acked.empty() or flood.lost.is_set(), "the broker's answer")
    assert flood.lost.is_set()


def test_attack_28_no_older_tls(grounds: Grounds) -> None:
    assert shakes(grounds, ssl.TLSVersion.TLSv1_3)
    assert not shakes(grounds, ssl.TLSVersion.TLSv1_2)


def shakes(grounds: Grounds, newest: ssl.TLSVersion) -> bool:
    """Whether broker and client come to speak a version that is not newer than this one."""
    context = grounds.client(A).context()
    context.maximum_version = newest
    try:
        with (
            socket.create_connection(("127.0.0.1", grounds.port), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname="localhost"),
        ):
            return True
    except OSError:
        return False


def test_attack_28_a_servers_certificate_is_no_clients(grounds: Grounds, lines: list[Line]) -> None:
    assert not gets_in(grounds.client("localhost", server=True), lines)
    assert gets_in(grounds.client(A), lines)


def test_attack_28_a_devices_certificate_is_no_servers(grounds: Grounds) -> None:
    assert agent_takes(grounds.client("localhost", server=True))
    assert not agent_takes(grounds.client(B))


def agent_takes(server: Device) -> bool:
    """Whether the agent's TLS, names aside, takes who shows this certificate for the hub."""
    context = dated_context(server.folder / "ca.pem", now_ms=SystemClock().wall_ms)
    return takes_server(context, server.folder / "device.pem", server.folder / "device.key")
