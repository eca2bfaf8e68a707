"""`Renewer`: what the fake and the child promise alike."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest

from edge_agent.adapters.renewer import LiveRenewer
from edge_agent.adapters.system import SystemClock
from edge_agent.identity import IdentityFile, load_identity
from edge_agent.ports import CertificateLife, Renewer
from shared.errors import OutriderError, TransferRefused
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import TestCa
from tests.fakes.renewer import FakeRenewer


class Fakes:
    """The fake, told what to say."""

    @contextmanager
    def hub(self, _: Path, *, refuses: bool) -> Iterator[Renewer]:
        refusal = TransferRefused("no", code="renew.revoked", hint="enrol again")
        yield FakeRenewer(refusal if refuses else CertificateLife(not_before_ms=5, not_after_ms=10**13))


class Children:
    """The real child against a scripted hub."""

    @contextmanager
    def hub(self, folder: Path, *, refuses: bool) -> Iterator[Renewer]:
        ca = TestCa(folder)
        pair = ca.client("dev-a")
        identity = folder / "state" / "identity"
        identity.mkdir(parents=True)
        for name, data in (
            ("device.key", pair.key.read_bytes()),
            ("device.pem", pair.certificate.read_bytes()),
            ("ca.pem", ca.pem),
        ):
            (identity / name).write_bytes(data)

        def reply(request: Request, handler: BaseHTTPRequestHandler) -> None:
            if refuses:
                answer(handler, 403, json.dumps({"detail": "no", "code": "renew.revoked"}).encode())
                return
            body = {
                "device": "dev-a",
                "certificate_pem": ca.sign_request(json.loads(request.body)["csr_pem"], "dev-a"),
                "ca_pem": ca.pem.decode(),
                "hub_url": "https://localhost:1",
                "broker": {"host": "localhost", "port": 1},
            }
            answer(handler, 200, json.dumps(body).encode())

        with HttpsServer(ca, reply) as server:
            file = IdentityFile(
                device="dev-a", hub_url=server.url, broker_host="b", broker_port=1, profile="pi4", enrolled_ms=1
            )
            (identity / "identity.json").write_bytes(msgspec.json.encode(file))
            yield LiveRenewer(state_dir=folder / "state", now_ms=SystemClock().wall_ms, basis=lambda: "clock")
            load_identity(folder / "state")


KINDS = [Fakes(), Children()]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["fake", "child"])


@each_kind
def test_a_renewal_says_how_long_the_new_certificate_is_good(kind: Fakes | Children, tmp_path: Path) -> None:
    with kind.hub(tmp_path, refuses=False) as renewer:
        life = asyncio.run(renewer.renew())
    assert 0 < life.not_before_ms < life.not_after_ms


@each_kind
def test_a_refusal_keeps_the_hubs_code(kind: Fakes | Children, tmp_path: Path) -> None:
    with kind.hub(tmp_path, refuses=True) as renewer, pytest.raises(OutriderError) as caught:
        asyncio.run(renewer.renew())
    assert caught.value.code == "renew.revoked"


@each_kind
def test_looking_needs_no_hub(kind: Fakes | Children, tmp_path: Path) -> None:
    with kind.hub(tmp_path, refuses=True) as renewer:
        life = asyncio.run(renewer.look())
    assert 0 < life.not_before_ms < life.not_after_ms


def test_a_child_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    renewer = LiveRenewer(state_dir=tmp_path, now_ms=lambda: 1, basis=lambda: "floor", command=("/bin/true",))
    with pytest.raises(OutriderError) as caught:
        asyncio.run(renewer.renew())
    assert caught.value.code == "renew.lost"
    renewer = LiveRenewer(state_dir=tmp_path, now_ms=lambda: 1, basis=lambda: "floor", command=("/no/such/program",))
    with pytest.raises(OutriderError) as caught:
        asyncio.run(renewer.renew())
    assert caught.value.code == "renew.start"
