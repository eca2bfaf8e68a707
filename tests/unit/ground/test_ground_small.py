"""Rates, bus, certificates of the ports, the broker's configuration."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
from pathlib import Path
from typing import Literal

import pytest

from cloud_hub.ground import broker, revocation, transport
from cloud_hub.ground import folder as files
from cloud_hub.ground.bus import Bus, DeviceBorn, DeviceDied
from cloud_hub.ground.ca import common_name, make_ca
from cloud_hub.ground.courier import Link
from cloud_hub.ground.folder import DataFolder
from cloud_hub.ground.post import Post
from cloud_hub.ground.rates import Buckets, source_of
from cloud_hub.ground.tlsport import bind
from shared.errors import ConfigError, Conflict, Unreachable
from shared.ids import DeviceId
from shared.wire.messages import Ack
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import DAY_MS, NOW_MS


def test_a_bucket_empties_and_fills_again() -> None:
    buckets = Buckets(burst=3, per_minute=60)
    assert [buckets.take("a", now_ms=0) for _ in range(4)] == [0, 0, 0, 1]
    assert buckets.take("b", now_ms=0) == 0
    assert buckets.take("a", now_ms=1000) == 0
    assert buckets.take("a", now_ms=1000) == 1
    assert [buckets.take("a", now_ms=3_600_000) for _ in range(4)] == [0, 0, 0, 1]


def test_a_clock_that_goes_back_gives_nothing_away() -> None:
    buckets = Buckets(burst=1, per_minute=60)
    assert buckets.take("a", now_ms=10_000) == 0
    assert buckets.take("a", now_ms=0) > 0


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
    ],
)
def test_who_owns_a_network_has_one_bucket(address: str, source: str) -> None:
    assert source_of(address) == source


def test_events_reach_all_who_asked_in_order() -> None:
    heard: list[str] = []
    bus = Bus()

    async def refuses(event: DeviceBorn) -> None:
        heard.append(f"one {event.device}")
        raise Conflict("no")

    async def hears(event: DeviceBorn) -> None:
        heard.append(f"two {event.device}")

    bus.subscribe(DeviceBorn, refuses)
    bus.subscribe(DeviceBorn, hears)
    asyncio.run(bus.publish(DeviceBorn(device=DeviceId("pi-1"), assignment_version=0, boot=1)))
    asyncio.run(bus.publish(DeviceDied(device=DeviceId("pi-1"), reason="lost")))
    assert heard == ["one pi-1", "two pi-1"]


def make_folder(tmp_path: Path) -> DataFolder:
    folder = DataFolder(tmp_path)
    folder.make()
    pair = make_ca(now_ms=NOW_MS, label="t")
    files.write(folder.ca_certificate, pair.certificate_pem)
    files.write(folder.ca_key, pair.key_pem)
    return folder


def ensure(
    folder: DataFolder, *, names: tuple[str, ...] = ("localhost",), hub_name: str = "hub", now_ms: int = NOW_MS
) -> tuple[str, ...]:
    authority = transport.load_authority(folder)
    return transport.ensure(
        folder, authority, names=names, broker_names=("localhost",), hub_name=hub_name, now_ms=now_ms, days=90
    )


def test_certificates_are_issued_when_they_must_be(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    everything = ("tls/server.pem", "broker/server.pem", "broker/hub.pem")
    assert ensure(folder) == everything
    assert ensure(folder) == ()
    assert ensure(folder, names=("localhost", "hub.example")) == ("tls/server.pem",)
    assert ensure(folder, names=("localhost", "hub.example"), now_ms=NOW_MS + 61 * DAY_MS) == everything


def test_a_hub_with_another_name_gets_a_certificate_with_it(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    ensure(folder)
    assert ensure(folder, hub_name="hub.b") == ("broker/hub.pem",)
    assert common_name(files.read(folder.broker / "hub.pem")) == "hub.b"
    assert ensure(folder, hub_name="hub.b") == ()


def test_a_crash_between_key_and_certificate_heals(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    ensure(folder)
    files.write(folder.server_key, files.read(folder.broker / "server.key"))
    assert ensure(folder) == ("tls/server.pem",)
    (folder.broker / "hub.key").unlink()
    assert ensure(folder) == ("broker/hub.pem",)


def test_secrets_are_for_their_owner(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data")
    ensure(folder)
    assert folder.root.stat().st_mode & 0o777 == 0o700
    for path in folder.root.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_folder_without_a_hub_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        DataFolder(tmp_path).require()
    assert caught.value.code == "config.no_hub"
    assert "outrider-hub init" in caught.value.hint


def test_a_data_directory_has_one_hub(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    with folder.alone():
        with pytest.raises(Conflict) as caught, folder.alone():
            raise AssertionError("two hubs in one directory")
        assert caught.value.code == "conflict.running"
    with folder.alone():
        assert folder.lock.stat().st_mode & 0o777 == 0o600


def test_the_brokers_configuration_holds_what_it_must() -> None:
    text = broker.configuration(
        broker.BrokerSettings(
            folder=Path("/d/broker"), host="127.0.0.1", port=8883, binary="mosquitto", hub_name="hub.b"
        ),
        user="me",
    )
    lines = text.splitlines()
    for line in (
        "listener 8883 127.0.0.1",
        "user me",
        "tls_version tlsv1.3",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        "acl_file /d/broker/acl",
        "crlfile /d/broker/crl.pem",
        "set_tcp_nodelay true",
        "persistence false",
        "max_packet_size 262144",
    ):
        assert line in lines
    nameless = broker.configuration(
        broker.BrokerSettings(
            folder=Path("/d/broker"), host="127.0.0.1", port=8883, binary="mosquitto", hub_name="hub.b"
        ),
        user=None,
    )
    assert [line for line in lines if line != "user me"] == nameless.splitlines()
    rules = revocation.access_list("hub.b").splitlines()
    assert rules[:2] == ["user hub.b", "topic readwrite outrider/#"]
    assert "pattern write outrider/1/%u/up/#" in rules
    assert "pattern read outrider/1/%u/down/#" in rules


def test_the_environment_does_not_say_who_runs_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "x\nallow_anonymous true")
    assert files.local_user() == pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: 2**31 - 7)
    assert files.local_user() is None


def test_the_brokers_log_stays_short_under_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "mosquitto.log"
    broker.trim_log(path)
    with path.open("ab", buffering=0) as writer:
        for _ in range(3):
            writer.write(b"x" * broker.MAX_LOG_BYTES + b"last words\n")
            broker.trim_log(path)
            assert path.stat().st_size == 0
            writer.write(b"more\n")
            broker.trim_log(path)
            assert path.read_bytes() == b"more\n"
    kept = path.with_name("mosquitto.log.1")
    assert kept.stat().st_size == broker.MAX_LOG_BYTES
    assert kept.read_bytes().endswith(b"last words\n")


def test_a_missing_broker_says_what_to_install() -> None:
    with pytest.raises(ConfigError) as caught:
        broker.find_binary("no-such-broker")
    assert caught.value.code == "config.broker_missing"
    assert "apt-get install mosquitto" in caught.value.hint


def test_a_busy_port_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(broker, "PORT_WAIT_S", 0.1)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            bind("127.0.0.1", port, key="listen.port")
        assert caught.value.code == "config.port_busy"
        assert str(port) in caught.value.message
        assert "listen.port" in caught.value.hint
        settings = broker.BrokerSettings(
            folder=tmp_path, host="127.0.0.1", port=port, binary="mosquitto", hub_name="hub"
        )
        with pytest.raises(ConfigError) as caught:
            asyncio.run(broker.require_free_port(settings))
        assert caught.value.code == "config.port_busy"
        assert "broker.port" in caught.value.hint


def test_a_link_says_since_when_it_is_up() -> None:
    clock = FakeClock()
    link = Link(clock)
    assert link.up_since_ms() is None
    link.set(is_up=True)
    up_ms = clock.wall
    clock.advance(1000)
    link.set(is_up=True)
    assert link.up_since_ms() == up_ms
    link.set(is_up=False)
    assert link.up_since_ms() is None
    link.set(is_up=True)
    assert link.up_since_ms() == up_ms + 1000


def test_nothing_is_sent_to_who_is_barred() -> None:
    sent: list[str] = []

    async def publish(topic: str, payload: bytes, *, qos: Literal[0, 1] = 1) -> None:
        sent.append(topic)

    post = Post(publish=publish, clock=FakeClock(), is_welcome=lambda device: device != "pi-2")
    asyncio.run(post.send(DeviceId("pi-1"), Ack(verdicts=()), leaf="ack"))
    with pytest.raises(Unreachable) as caught:
        asyncio.run(post.send(DeviceId("pi-2"), Ack(verdicts=()), leaf="ack"))
    assert caught.value.code == "transfer.barred"
    assert sent == ["outrider/1/pi-1/down/ack"]
