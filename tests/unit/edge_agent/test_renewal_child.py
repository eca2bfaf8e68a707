"""The child that renews, against a real TLS server, and with the power cut at every step of its disk writes."""

from __future__ import annotations

import base64
import json
import os
import stat
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from edge_agent import renewal
from edge_agent.core.renewal import WRONG_LIFE
from edge_agent.identity import IdentityFile, load_file, load_identity, load_refusal, sweep
from shared.errors import ProtocolViolation, TransferRefused, TrustError, Unreachable
from shared.ids import DeviceId
from shared.renewal import csr_digest, proof_message
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import TestCa

NOW_MS = int(time.time() * 1000)


class Hub:
    """A hub that renews `dev-a`, and checks the proof as the real one does."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.ca = TestCa(folder)
        self.serving = self.ca
        self.published = self.ca.pem
        self.bundle = self.ca.pem
        self.device = "dev-a"
        self.refusal: tuple[int, str] | None = None
        self.answers: dict[str, str] = {}
        self.loses = 0
        self.since, self.days = -20, 5

    def reply(self, request: Request, handler: BaseHTTPRequestHandler) -> None:
        if request.path == "/v1/ca":
            answer(handler, 200, self.published)
            return
        asked = json.loads(request.body)
        self.check(asked)
        if self.refusal is not None:
            status, code = self.refusal
            answer(handler, status, json.dumps({"detail": "no", "code": code, "hint": "enrol again"}).encode())
            return
        csr = asked["csr_pem"]
        certificate = self.answers.setdefault(csr, self.made(csr))
        if self.loses:
            self.loses -= 1
            handler.close_connection = True
            return
        body = {
            "device": self.device,
            "certificate_pem": certificate,
            "ca_pem": self.bundle.decode(),
            "hub_url": "https://localhost:8443",
            "broker": {"host": "elsewhere", "port": 8884},
        }
        answer(handler, 200, json.dumps(body).encode())

    def made(self, csr: str) -> str:
        return self.serving.sign_request(csr, self.device, since=self.since, days=self.days)

    def check(self, asked: dict[str, str]) -> None:
        shown = x509.load_pem_x509_certificate(asked["certificate_pem"].encode())
        message = proof_message(
            device=DeviceId("dev-a"), csr_sha256=csr_digest(asked["csr_pem"]), ca_fingerprint=self.ca.fingerprint
        )
        key = shown.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(base64.b64decode(asked["proof"]), message, ec.ECDSA(hashes.SHA256()))
        assert x509.load_pem_x509_csr(asked["csr_pem"].encode()).public_key() != key


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "hub")


@pytest.fixture
def server(hub: Hub) -> Iterator[HttpsServer]:
    with HttpsServer(hub.ca, hub.reply) as running:
        yield running


def enrolled(hub: Hub, state: Path) -> Path:
    """A state directory with an identity as enrolment leaves it."""
    folder = state / "identity"
    folder.mkdir(parents=True)
    pair = hub.ca.client("dev-a")
    (folder / "device.key").write_bytes(pair.key.read_bytes())
    (folder / "device.pem").write_bytes(pair.certificate.read_bytes())
    (folder / "ca.pem").write_bytes(hub.ca.pem)
    file = IdentityFile(
        device="dev-a", hub_url="https://localhost:1", broker_host="b", broker_port=1, profile="pi4", enrolled_ms=9
    )
    (folder / "identity.json").write_bytes(msgspec.json.encode(file))
    return state


def is_usable(state: Path) -> bool:
    """Whether what counts now is a key, a certificate for it and the CA that signed it."""
    identity = load_identity(state)
    key = load_pem_private_key(identity.key_path.read_bytes(), password=None)
    certificate = x509.load_pem_x509_certificate(identity.certificate_path.read_bytes())
    (ca,) = x509.load_pem_x509_certificates(identity.ca_path.read_bytes())
    certificate.verify_directly_issued_by(ca)
    return key.public_key() == certificate.public_key()


def go(state: Path, server: HttpsServer) -> None:
    renewal.renew(state, hub_url=server.url, now_ms=NOW_MS, attested=True)


def names(state: Path) -> list[str]:
    return sorted(path.name for path in (state / "identity").iterdir())


def test_a_device_gets_a_new_pair_and_keeps_no_old_one(hub: Hub, server: HttpsServer, tmp_path: Path) -> None:
    state = enrolled(hub, tmp_path / "state")
    old = load_identity(state).key_path.read_bytes()
    life = renewal.renew(state, hub_url=server.url, now_ms=NOW_MS, attested=True)
    assert is_usable(state)
    new = load_identity(state)
    assert new.key_path.read_bytes() != old
    assert (new.broker_host, new.broker_port, new.hub_url) == ("elsewhere", 8884, "https://localhost:8443")
    assert (new.not_before_ms, new.not_after_ms) == life
    assert life.not_before_ms < life.not_after_ms
    assert load_file(state).enrolled_ms == 9
    assert names(state) == ["ca-1.pem", "device-1.key", "device-1.pem", "identity.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state / "identity").iterdir()} == {0o600}
    assert b"PRIVATE" not in server.requests[0].body
    go(state, server)
    assert names(state) == ["ca-2.pem", "device-2.key", "device-2.pem", "identity.json"]


def test_a_lost_answer_is_asked_for_with_the_same_request(hub: Hub, server: HttpsServer, tmp_path: Path) -> None:
    state = enrolled(hub, tmp_path / "state")
    hub.loses = 1
    with pytest.raises(Unreachable):
        go(state, server)
    assert is_usable(state)
    go(state, server)
    assert len(hub.answers) == 1
    assert is_usable(state)


class PowerCut(BaseException):
    """The power is gone."""


class CutPower:
    """Ends everything at the n-th call that reaches the disk; what was not synced is half there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: int) -> None:
        self.left = at
        fsync, rename, unlink = os.fsync, Path.rename, Path.unlink

        def cut_fsync(fd: int) -> None:
            if self.is_over():
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    os.ftruncate(fd, os.fstat(fd).st_size // 2)
                raise PowerCut
            fsync(fd)

        def cut_rename(path: Path, target: Path) -> Path:
            if self.is_over():
                raise PowerCut
            return rename(path, target)

        def cut_unlink(path: Path, missing_ok: bool = False) -> None:
            if self.is_over():
                raise PowerCut
            unlink(path, missing_ok)

        monkeypatch.setattr(os, "fsync", cut_fsync)
        monkeypatch.setattr(Path, "rename", cut_rename)
        monkeypatch.setattr(Path, "unlink", cut_unlink)

    def is_over(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("generation", [0, 1], ids=["first", "second"])
def test_power_cut_at_every_disk_write_leaves_a_pair_that_fits(
    hub: Hub, server: HttpsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: int
) -> None:
    cuts, step = 0, 0
    while True:
        state = enrolled(hub, tmp_path / f"state-{step}")
        for _ in range(generation):
            go(state, server)
        with monkeypatch.context() as patch:
            CutPower(patch, at=step)
            try:
                go(state, server)
            except PowerCut:
                cuts += 1
                is_done = False
            else:
                is_done = True
        assert is_usable(state), f"cut at {step}"
        # The next start, and the next try.
        sweep(state / "identity", generation=load_file(state).generation)
        assert is_usable(state), f"swept after {step}"
        go(state, server)
        assert is_usable(state)
        assert not any(name.startswith("next") for name in names(state))
        if is_done:
            break
        step += 1
    assert cuts > 15


def test_a_refusal_for_good_is_kept_for_people_until_a_renewal(hub: Hub, server: HttpsServer, tmp_path: Path) -> None:
    state = enrolled(hub, tmp_path / "state")
    hub.refusal = (403, "renew.revoked")
    with pytest.raises(TransferRefused) as caught:
        go(state, server)
    assert caught.value.code == "renew.revoked"
    refusal = load_refusal(state)
    assert refusal is not None
    assert (refusal.code, refusal.hint, refusal.at_ms) == ("renew.revoked", "enrol again", NOW_MS)
    assert is_usable(state)
    hub.refusal = None
    go(state, server)
    assert load_refusal(state) is None


def test_trouble_that_passes_leaves_no_note(hub: Hub, server: HttpsServer, tmp_path: Path) -> None:
    state = enrolled(hub, tmp_path / "state")
    hub.refusal = (429, "rate")
    with pytest.raises(Unreachable):
        go(state, server)
    assert load_refusal(state) is None


def test_a_hub_of_another_ca_is_not_asked(hub: Hub, tmp_path: Path) -> None:
    state = enrolled(hub, tmp_path / "state")
    (tmp_path / "other").mkdir()
    other = TestCa(tmp_path / "other")
    with HttpsServer(other, hub.reply) as impostor, pytest.raises(TrustError) as caught:
        go(state, impostor)
    assert caught.value.code == "trust.hub_certificate"
    assert [request.path for request in impostor.requests] == ["/v1/ca"]
    assert is_usable(state)


def test_a_hub_that_has_changed_its_ca_renews_by_its_link_and_by_the_right_time(hub: Hub, tmp_path: Path) -> None:
    state = enrolled(hub, tmp_path / "state")
    (tmp_path / "second").mkdir()
    second = TestCa(tmp_path / "second", name="second-ca")
    hub.published = second.pem + hub.ca.link(second) + hub.ca.pem
    hub.serving, hub.bundle = second, second.pem + hub.ca.pem
    with HttpsServer(second, hub.reply) as server:
        with pytest.raises(TransferRefused) as caught:
            renewal.renew(state, hub_url=server.url, now_ms=NOW_MS - 30 * 86_400_000, attested=False)
        assert caught.value.code == "transfer.certificate_dates"
        go(state, server)
    assert load_identity(state).ca_path.read_bytes() == hub.bundle


def test_a_certificate_for_another_key_name_or_ca_is_not_taken(hub: Hub, server: HttpsServer, tmp_path: Path) -> None:
    state = enrolled(hub, tmp_path / "state")
    before = names(state)
    hub.device = "dev-b"
    with pytest.raises(TrustError):
        go(state, server)
    hub.device = "dev-a"
    (tmp_path / "other").mkdir()
    hub.serving = TestCa(tmp_path / "other")
    hub.answers.clear()
    with pytest.raises(TrustError):
        go(state, server)
    hub.serving = hub.ca
    hub.answers = {csr: hub.ca.client("dev-a").certificate.read_text() for csr in hub.answers}
    with pytest.raises(TrustError) as caught:
        go(state, server)
    assert caught.value.code == "trust.wrong_device"
    hub.answers.clear()
    hub.bundle = hub.ca.client("dev-a").certificate.read_bytes()
    with pytest.raises(ProtocolViolation):
        go(state, server)
    assert [name for name in names(state) if not name.startswith("next")] == before
    assert is_usable(state)


@pytest.mark.parametrize(("since", "days"), [(2, 32), (3650, 3680), (-30, -1)], ids=["days", "years", "ended"])
def test_a_certificate_of_another_time_is_not_taken_and_a_new_one_is_asked_for(
    hub: Hub, server: HttpsServer, tmp_path: Path, since: int, days: int
) -> None:
    """The hub's clock was wrong for a moment: the first day of a certificate would count as a day that has come."""
    state = enrolled(hub, tmp_path / "state")
    hub.since, hub.days = since, days
    with pytest.raises(TrustError) as caught:
        go(state, server)
    assert caught.value.code == WRONG_LIFE
    assert load_file(state).generation == load_file(state).not_before_ms == 0
    assert is_usable(state)
    refusal = load_refusal(state)
    assert refusal is not None
    assert refusal.code == WRONG_LIFE
    hub.since, hub.days = -20, 5
    go(state, server)
    assert len(hub.answers) == 2
    assert is_usable(state)
    assert load_refusal(state) is None


def test_a_time_that_nobody_told_may_be_behind(hub: Hub, server: HttpsServer, tmp_path: Path) -> None:
    """A hub that attests none, and a device whose clock begins where its certificate does."""
    state = enrolled(hub, tmp_path / "state")
    hub.since = 0
    behind_ms = NOW_MS - 10 * 86_400_000
    life = renewal.renew(state, hub_url=server.url, now_ms=behind_ms, attested=False)
    assert life.not_before_ms > behind_ms + 86_400_000
    with pytest.raises(TrustError) as caught:
        renewal.renew(state, hub_url=server.url, now_ms=behind_ms, attested=True)
    assert caught.value.code == WRONG_LIFE


def test_looking_notes_the_dates_of_an_older_identity(hub: Hub, tmp_path: Path) -> None:
    state = enrolled(hub, tmp_path / "state")
    assert load_identity(state).not_after_ms == 0
    life = renewal.look(state)
    assert load_identity(state).not_after_ms == life.not_after_ms > 0
    assert is_usable(state)


def test_errors_are_told_to_the_parent(hub: Hub, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    state = enrolled(hub, tmp_path / "state")
    (state / "identity" / "device.pem").write_text("nonsense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renewal, "bind_to_parent", lambda _: None)
        assert renewal.main(["--look", str(state), "1"]) == 0
    said = msgspec.json.decode(capsysbinary.readouterr().out, type=renewal.RenewalSaid)
    assert said.code == "storage.identity"
