"""Certificates are renewed while the hub runs: both ports show the new one to new connections, live sessions stay."""

from __future__ import annotations

import asyncio
import ssl
import time
from pathlib import Path

import pytest
from cryptography import x509

from cloud_hub.ground import tlsport, transport
from cloud_hub.ground.broker import Broker, BrokerSettings
from cloud_hub.ground.ca import Authority, make_ca
from cloud_hub.ground.folder import DataFolder
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.system import SystemClock

pytestmark = pytest.mark.live
WAIT_S = 15.0


async def app(_scope: object, _receive: object, _send: object) -> None:
    """Answers nothing: only the handshake matters."""


def certificates(root: Path, *, days: int) -> tuple[DataFolder, Authority]:
    folder = DataFolder(root)
    for place in (folder.broker, folder.server_certificate.parent, folder.ca_certificate.parent):
        place.mkdir(parents=True, exist_ok=True)
    now_ms = SystemClock().wall_ms()
    if not folder.ca_certificate.exists():
        pair = make_ca(now_ms=now_ms, label="test")
        folder.ca_certificate.write_bytes(pair.certificate_pem)
        folder.ca_key.write_bytes(pair.key_pem)
        folder.ca_key.chmod(0o600)
    authority = transport.load_authority(folder)
    transport.ensure(
        folder, authority, names=("localhost",), broker_names=("localhost",), hub_name="hub", now_ms=now_ms, days=days
    )
    return folder, authority


async def serial(port: int, folder: DataFolder) -> int:
    """The serial number of the certificate that a port shows."""
    context = ssl.create_default_context(cafile=str(folder.broker / "ca.pem"))
    context.load_cert_chain(folder.broker / "hub.pem", folder.broker / "hub.key")
    _, writer = await asyncio.open_connection("localhost", port, ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown).serial_number


def on_disk(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def replace_all(folder: DataFolder, authority: Authority) -> None:
    """What a renewal leaves on disk."""
    for path in (folder.server_certificate, folder.broker / "server.pem"):
        path.unlink()
    now_ms = SystemClock().wall_ms()
    issued = transport.ensure(
        folder, authority, names=("localhost",), broker_names=("localhost",), hub_name="hub", now_ms=now_ms, days=30
    )
    assert len(issued) == 2


def test_the_https_port_shows_a_renewed_certificate(tmp_path: Path) -> None:
    folder, authority = certificates(tmp_path, days=30)

    async def run() -> None:
        ready, listener = asyncio.Event(), tlsport.bind("127.0.0.1", 0, key="listen.port")
        server = tlsport.HttpsServer(
            app,
            certificate=folder.server_certificate,
            key=folder.server_key,
            ca=folder.ca_certificate,
            ready=ready,
        )
        async with asyncio.timeout(WAIT_S * 2), asyncio.TaskGroup() as group:
            serving = group.create_task(server.run_on(listener))
            await ready.wait()
            port = listener.getsockname()[1]
            before = await serial(port, folder)
            assert before == on_disk(folder.server_certificate)
            replace_all(folder, authority)
            assert await serial(port, folder) == before
            server.reload_certificate()
            assert await serial(port, folder) == on_disk(folder.server_certificate) != before
            serving.cancel()

    asyncio.run(run())


def test_the_broker_shows_a_renewed_certificate_and_keeps_its_sessions(
    tmp_path: Path, mosquitto_path: str, free_port: int
) -> None:
    folder, authority = certificates(tmp_path, days=30)
    settings = BrokerSettings(
        folder=folder.broker, host="127.0.0.1", port=free_port, binary=mosquitto_path, hub_name="hub"
    )

    async def run() -> None:
        ready = asyncio.Event()
        broker = Broker(settings, metrics=Metrics(), clock=SystemClock())
        async with asyncio.timeout(WAIT_S * 2), asyncio.TaskGroup() as group:
            running = group.create_task(broker.run(ready=ready))
            await ready.wait()
            before = await serial(free_port, folder)
            replace_all(folder, authority)
            broker.reload()
            new = on_disk(folder.broker / "server.pem")
            deadline = time.monotonic() + WAIT_S
            while await serial(free_port, folder) == before:
                assert time.monotonic() < deadline, "the broker goes on showing its old certificate"
                await asyncio.sleep(0.1)
            assert await serial(free_port, folder) == new
            running.cancel()

    asyncio.run(run())
