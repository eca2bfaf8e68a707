"""A broker for hubs and devices, and hubs of nothing but ingest, each a process: for what many of them do together.

The broker is mosquitto with the product's settings. Each hub has a data directory with the same CA, and comes in with
the certificate that the product issues there for the hub's name. Devices
come in on a second port of loopback, without TLS and under the name they say, so that what plays them stays cheap.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cloud_hub.ground import broker as managed_broker
from cloud_hub.ground import revocation, transport
from cloud_hub.ground.ca import make_ca
from cloud_hub.ground.courier import LinkSettings
from cloud_hub.ground.folder import DataFolder, local_user

NOW_MS = time.time_ns() // 1_000_000
START_S = 30.0
STOP_S = 10.0


class IngestPlace:
    """A folder with certificates, and a running broker.

    Attributes:
        hub_port: for hubs, mutual TLS.
        device_port: for devices.
        broker_pid: mosquitto's process.
    """

    def __init__(self, folder: Path, hub_port: int, device_port: int, broker_pid: int) -> None:
        self.folder = folder
        self.broker_pid = broker_pid
        self.hub_port = hub_port
        self.device_port = device_port
        self._children: list[subprocess.Popen[str]] = []

    def hub(self, name: str, database_url: str) -> subprocess.Popen[str]:
        """Start a hub's ingest; returns when it hears devices."""
        return self._start("tests.fakes.ingest_hub", str(self.folder), name, str(self.hub_port), database_url)

    def child(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a module that says `ready` on its first line."""
        return self._start(module, str(self.folder), *arguments)

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._children.append(child)
        assert child.stdout is not None
        line = child.stdout.readline()
        if line != "ready\n":
            raise RuntimeError(f"{module} does not start: {line!r}")
        return child

    def stop(self, child: subprocess.Popen[str]) -> None:
        """End a child that `hub` or `child` started."""
        self._children.remove(child)
        end(child)

    def stop_all(self) -> None:
        """End all that are left."""
        for child in list(self._children):
            self.stop(child)


@contextlib.contextmanager
def ingest_place(mosquitto: str, *, hubs: Sequence[str]) -> Iterator[IngestPlace]:
    """A broker that lets in hubs of these names and any device."""
    folder = Path(tempfile.mkdtemp(prefix="or-", dir="/tmp"))
    try:
        hub_port, device_port = _free_port(), _free_port()
        _write_files(folder, hub_port, device_port, hubs)
        log = (folder / "mosquitto.log").open("wb")
        with log:
            broker = subprocess.Popen(
                [mosquitto, "-c", str(folder / "mosquitto.conf")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        place = IngestPlace(folder, hub_port, device_port, broker.pid)
        try:
            _await_port(device_port, broker, folder / "mosquitto.log")
            yield place
        finally:
            place.stop_all()
            end(broker)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link_settings(folder: Path, name: str, port: int) -> LinkSettings:
    """How the hub of this name comes in, with the files that were issued to it."""
    broker = DataFolder(folder / name).broker
    return LinkSettings(
        host="127.0.0.1",
        port=port,
        name=name,
        ca=broker / "ca.pem",
        certificate=broker / "hub.pem",
        key=broker / "hub.key",
    )


def end(child: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a process in order, or by force when it does not."""
    child.terminate()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _write_files(folder: Path, hub_port: int, device_port: int, hubs: Sequence[str]) -> None:
    ours = [DataFolder(folder / name) for name in hubs]
    pair = make_ca(now_ms=NOW_MS, label="ingest")
    for name, data in zip(hubs, ours, strict=True):
        data.make()
        data.ca_certificate.write_bytes(pair.certificate_pem)
        data.ca_key.write_bytes(pair.key_pem)
        transport.ensure(
            data,
            transport.load_authority(data),
            names=["localhost"],
            broker_names=["localhost", "127.0.0.1"],
            hub_name=name,
            now_ms=NOW_MS,
            days=7,
        )
    settings = managed_broker.BrokerSettings(
        folder=ours[0].broker, host="127.0.0.1", port=hub_port, binary="mosquitto", hub_name=hubs[0]
    )
    product = managed_broker.configuration(settings, user=local_user()).splitlines()
    acl = ours[0].broker / "acl"
    acl.write_text("\n".join(revocation.access_list(name) for name in hubs))
    per_listener = ("allow_anonymous", "acl_file", "use_username_as_clientid")
    kept = [line for line in product if not line.startswith(("per_listener_settings", *per_listener))]
    lines = ["per_listener_settings true", *kept]
    # What belongs to the first listener has to stand right behind it.
    place = next(number for number, line in enumerate(lines) if line.startswith("listener ")) + 1
    lines[place:place] = ["allow_anonymous false", f"acl_file {acl}", "use_username_as_clientid true"]
    lines += [f"listener {device_port} 127.0.0.1", "allow_anonymous true", ""]
    (folder / "mosquitto.conf").write_text("\n".join(lines))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_port(port: int, broker: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while broker.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.02)
    raise RuntimeError(f"mosquitto does not start: {log.read_text()[-2000:]}")
