"""Servers that a device must not believe: of an expired certificate or CA, and of a device's own certificate."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from edge_agent.adapters.courier import broker_context
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import dated_context
from edge_agent.hub_call import exchange, trusting
from shared.errors import OutriderError
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import Pair, TestCa


def reply(_: Request, handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 200, b"{}")


def expired_server(folder: Path) -> tuple[TestCa, Pair]:
    ca = TestCa(folder)
    return ca, ca.server(days=-1)


def expired_ca(folder: Path) -> tuple[TestCa, Pair]:
    ca = TestCa(folder, days=-1)
    return ca, ca.server()


def device_as_server(folder: Path) -> tuple[TestCa, Pair]:
    ca = TestCa(folder)
    return ca, ca.server(is_client=True)


Impostor = Callable[[Path], tuple[TestCa, Pair]]
IMPOSTORS = [expired_server, expired_ca, device_as_server]


def now_ms() -> int:
    return SystemClock().wall_ms()


def shake_hands(context: ssl.SSLContext, port: int) -> None:
    with (
        socket.create_connection(("localhost", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost"),
    ):
        return


def port_of(server: HttpsServer) -> int:
    return int(server.url.rpartition(":")[2])


@pytest.mark.parametrize("impostor", IMPOSTORS)
def test_an_expired_or_wrong_server_gets_no_renewal_request(tmp_path: Path, impostor: Impostor) -> None:
    ca, pair = impostor(tmp_path)
    with HttpsServer(ca, reply, pair=pair) as server, pytest.raises(OutriderError) as caught:
        exchange(
            server.url,
            trusting(ca.pem.decode(), now_ms=now_ms()),
            method="POST",
            path="/v1/renew",
            body=b"{}",
        )
    dates = impostor is not device_as_server
    assert caught.value.code == ("transfer.certificate_dates" if dates else "trust.hub_certificate")
    assert server.requests == []


@pytest.mark.parametrize("impostor", IMPOSTORS)
@pytest.mark.parametrize("kind", ["hub", "broker"])
def test_an_expired_or_wrong_server_gets_no_connection_of_the_daemon(
    tmp_path: Path, impostor: Impostor, kind: str
) -> None:
    ca, pair = impostor(tmp_path)
    client = ca.client("dev-a")
    if kind == "hub":
        context = dated_context(ca.path, now_ms=now_ms, certificate_path=client.certificate, key_path=client.key)
    else:
        context = broker_context(
            ca_path=ca.path, certificate_path=client.certificate, key_path=client.key, now_ms=now_ms
        )
    with HttpsServer(ca, reply, pair=pair) as server, pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(context, port_of(server))


def test_the_real_one_is_believed(tmp_path: Path) -> None:
    ca = TestCa(tmp_path)
    with HttpsServer(ca, reply) as server:
        shake_hands(dated_context(ca.path, now_ms=now_ms), port_of(server))
        status, _ = exchange(
            server.url,
            trusting(ca.pem.decode(), now_ms=now_ms()),
            method="POST",
            path="/v1/renew",
            body=b"{}",
        )
    assert status == 200
