"""Enrolment against a real TLS server that plays an honest hub, an impostor, and a hub with bad answers."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

from edge_agent import keeping
from edge_agent.adapters.lock import AgentLock
from edge_agent.enrolment import Enrolment, enroll
from edge_agent.identity import load_identity
from shared.errors import ConfigError, Conflict, InvalidValue, OutriderError, TransferRefused, TrustError, Unreachable
from shared.join import JoinToken, encode_join_token
from tests.fakes.clock import FakeClock
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import TestCa

NOW_MS = int(time.time() * 1000)
Change = Callable[[dict[str, object]], dict[str, object]]


class Hub:
    """A hub that enrols under one name; `change` spoils its answer."""

    def __init__(self, folder: Path, *, device: str = "dev-a", change: Change = lambda body: body) -> None:
        folder.mkdir()
        self.ca = TestCa(folder)
        self._device = device
        self.change = change
        self.status = 201

    def reply(self, request: Request, handler: BaseHTTPRequestHandler) -> None:
        if request.path == "/v1/ca":
            answer(handler, 200, self.ca.pem)
        elif self.status != 201:
            problem = {"detail": "the token is spent", "code": "enrol.token_spent", "hint": "ask for another"}
            answer(handler, self.status, json.dumps(problem).encode())
        else:
            asked = json.loads(request.body)
            body: dict[str, object] = {
                "device": self._device,
                "certificate_pem": self.ca.sign_request(asked["csr_pem"], self._device),
                "ca_pem": self.ca.pem.decode(),
                "hub_url": "https://localhost:8443",
                "broker": {"host": "localhost", "port": 8883},
                "root": '{"signed": {"_type": "root"}, "signatures": []}',
            }
            answer(handler, 201, json.dumps(self.change(body)).encode())

    def serve(self) -> HttpsServer:
        return HttpsServer(self.ca, self.reply)

    def token(self, url: str, *, fingerprint: str | None = None) -> str:
        return encode_join_token(
            JoinToken(hub_url=url, ca_fingerprint=fingerprint or self.ca.fingerprint, secret=b"s" * 32)
        )


def go(
    hub: Hub, state: Path, *, force: bool = False, fingerprint: str | None = None
) -> tuple[Enrolment, list[Request]]:
    with hub.serve() as server:
        token = hub.token(server.url)
        result = enroll(
            token=token, state_dir=state, profile="pi4", name="dev-a", force=force, clock=FakeClock(wall_ms=NOW_MS)
        )
        return result, server.requests


def test_a_device_is_enrolled_with_a_key_that_it_made(tmp_path: Path) -> None:
    state = tmp_path / "state"
    hub = Hub(tmp_path / "hub")
    result, requests = go(hub, state)
    assert load_identity(state) == result.identity
    assert (result.identity.device, result.identity.broker_port, result.identity.profile) == ("dev-a", 8883, "pi4")
    key = load_pem_private_key(result.identity.key_path.read_bytes(), password=None)
    certificate = load_pem_x509_certificate(result.identity.certificate_path.read_bytes())
    assert key.public_key() == certificate.public_key()
    assert result.identity.not_before_ms == int(certificate.not_valid_before_utc.timestamp()) * 1000
    assert stat.S_IMODE(result.identity.key_path.stat().st_mode) == 0o600
    assert stat.S_IMODE((state / "identity").stat().st_mode) == 0o700
    assert json.loads((state / "trust" / "root.json").read_text())["signed"]["_type"] == "root"
    assert sorted(path.name for path in (state / "identity").iterdir()) == [
        "ca.pem", "device.key", "device.pem", "identity.json",
    ]  # fmt: skip
    assert [(request.method, request.path) for request in requests] == [("GET", "/v1/ca"), ("POST", "/v1/enroll")]
    assert b"PRIVATE" not in requests[1].body


def test_an_impostor_gets_neither_token_nor_request(tmp_path: Path) -> None:
    impostor = Hub(tmp_path / "impostor")
    real = TestCa(tmp_path)
    with impostor.serve() as server:
        token = impostor.token(server.url, fingerprint=real.fingerprint)
        with pytest.raises(TrustError) as caught:
            enroll(
                token=token,
                state_dir=tmp_path / "s",
                profile="pi4",
                name=None,
                force=False,
                clock=FakeClock(wall_ms=NOW_MS),
            )
        assert [request.path for request in server.requests] == ["/v1/ca"]
    assert caught.value.code == "trust.ca_fingerprint"


def test_one_who_only_repeats_the_true_ca_gets_nothing_either(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = TestCa(tmp_path / "real")
    other = TestCa(tmp_path, name="other-ca")
    with HttpsServer(other, lambda _, handler: answer(handler, 200, real.pem)) as server:
        token = encode_join_token(JoinToken(hub_url=server.url, ca_fingerprint=real.fingerprint, secret=b"s" * 32))
        with pytest.raises(TrustError) as caught:
            enroll(
                token=token,
                state_dir=tmp_path / "s",
                profile="pi4",
                name=None,
                force=False,
                clock=FakeClock(wall_ms=NOW_MS),
            )
        assert [request.path for request in server.requests] == ["/v1/ca"]
    assert caught.value.code == "trust.hub_certificate"


def test_a_certificate_for_another_key_under_the_right_name_is_refused(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    stolen = hub.ca.client("dev-a").certificate.read_text()
    hub.change = lambda body: {**body, "certificate_pem": stolen}
    with pytest.raises(TrustError) as caught:
        go(hub, tmp_path / "state")
    assert caught.value.code == "trust.wrong_device"


def foreign_certificate(body: dict[str, object]) -> dict[str, object]:
    return {**body, "certificate_pem": body["ca_pem"]}


@pytest.mark.parametrize(
    "change",
    [
        foreign_certificate,
        lambda body: {**body, "device": "dev-b"},
        lambda body: {**body, "device": "Not A Name"},
        lambda body: {**body, "certificate_pem": "nonsense"},
        lambda body: {**body, "hub_url": "http://plain"},
        lambda body: {**body, "broker": {"host": "", "port": 0}},
        lambda body: {**body, "root": ""},
        lambda body: {"device": "dev-a"},
    ],
    ids=["other key", "other name", "no name", "no certificate", "no https", "no broker", "no root", "fields missing"],
)
def test_an_answer_that_does_not_hold_changes_nothing(tmp_path: Path, change: Change) -> None:
    state = tmp_path / "state"
    with pytest.raises(OutriderError) as caught:
        go(Hub(tmp_path / "hub", change=change), state)
    assert caught.value.code.startswith(("trust", "protocol"))
    with pytest.raises(ConfigError) as missing:
        load_identity(state)
    assert missing.value.code == "config.not_enrolled"
    go(Hub(tmp_path / "honest"), state)


def test_the_hubs_no_is_passed_on_with_its_code(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    hub.status = 409
    with pytest.raises(TransferRefused) as caught:
        go(hub, tmp_path / "state")
    assert (caught.value.code, caught.value.hint) == ("enrol.token_spent", "ask for another")
    hub.status = 503
    with pytest.raises(Unreachable):
        go(hub, tmp_path / "state")


def test_what_is_no_token_and_nobody_there_are_told_apart(tmp_path: Path, free_port: int) -> None:
    hub = Hub(tmp_path / "hub")
    with pytest.raises(InvalidValue):
        enroll(
            token="orj1.x", state_dir=tmp_path, profile="pi4", name=None, force=False, clock=FakeClock(wall_ms=NOW_MS)
        )
    with pytest.raises(Unreachable) as caught:
        enroll(
            token=hub.token(f"https://localhost:{free_port}"),
            state_dir=tmp_path, profile="pi4", name=None, force=False, clock=FakeClock(wall_ms=NOW_MS),
        )  # fmt: skip
    assert "not spent" in caught.value.hint


def test_a_lost_answer_does_not_promise_that_the_token_is_unspent(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    reply = hub.reply

    def hang_up(request: Request, handler: BaseHTTPRequestHandler) -> None:
        if request.path == "/v1/ca":
            reply(request, handler)

    hub.reply = hang_up  # type: ignore[method-assign]
    with pytest.raises(Unreachable) as caught:
        go(hub, tmp_path / "state")
    assert "may have taken the token" in caught.value.hint


def test_a_second_enrolment_needs_force_and_sets_the_former_state_aside(tmp_path: Path) -> None:
    state, hub = tmp_path / "state", Hub(tmp_path / "hub")
    first, _ = go(hub, state)
    former_key = first.identity.key_path.read_bytes()
    (state / "agent.db").write_bytes(b"queue and floors")
    with pytest.raises(Conflict) as caught:
        go(hub, state)
    assert "--force" in caught.value.hint
    again, _ = go(hub, state, force=True)
    assert again.moved_aside == ()
    assert again.identity.key_path.read_bytes() != former_key
    assert (state / "agent.db").exists()
    other, _ = go(Hub(tmp_path / "other", device="dev-b"), state, force=True)
    assert other.identity.device == "dev-b"
    assert other.moved_aside == (state / f"agent.db.before-{NOW_MS}", state / f"trust.before-{NOW_MS}")
    assert (state / f"agent.db.before-{NOW_MS}").read_bytes() == b"queue and floors"


def test_a_running_agent_is_not_enrolled_under_its_feet(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with AgentLock(state), pytest.raises(Conflict) as caught:
        go(Hub(tmp_path / "hub"), state)
    assert caught.value.code == "conflict.running"


@pytest.mark.parametrize("is_again", [False, True], ids=["first", "again"])
def test_a_crash_at_any_step_leaves_all_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_again: bool
) -> None:
    class PowerCut(BaseException):
        pass

    real_rename = Path.rename
    hub = Hub(tmp_path / "hub")
    crashes = 0
    for limit in range(6):
        state = tmp_path / f"state{limit}"
        renames = 0
        if is_again:
            go(hub, state)

        def rename(self: Path, target: Path) -> Path:
            nonlocal renames
            if renames == limit:  # noqa: B023 - used within the round only
                raise PowerCut
            renames += 1
            return real_rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            try:
                go(hub, state, force=is_again)
            except PowerCut:
                crashes += 1
                with pytest.raises(ConfigError):
                    load_identity(state)
            else:
                assert load_identity(state).device == "dev-a"
        again, _ = go(hub, state, force=True)
        key = load_pem_private_key(again.identity.key_path.read_bytes(), password=None)
        certificate = load_pem_x509_certificate(again.identity.certificate_path.read_bytes())
        assert key.public_key() == certificate.public_key()
    assert crashes == 5


def test_nothing_of_the_key_is_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    real_write = keeping.write_new

    def write(path: Path, data: bytes, *, mode: int = 0o600) -> None:
        real_write(path, data, mode=mode)
        modes.append(stat.S_IMODE(path.stat().st_mode))

    monkeypatch.setattr(keeping, "write_new", write)
    go(Hub(tmp_path / "hub"), tmp_path / "state")
    assert len(modes) == 5
    assert set(modes) == {0o600}
