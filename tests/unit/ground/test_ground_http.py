"""Who may call what, how errors are told, and the bounds around every request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from pydantic import BaseModel
from starlette.types import ASGIApp, Receive, Scope, Send

from cloud_hub.ground import audit, bounds, problems, routes
from cloud_hub.ground.auth import PEER_CERTIFICATE, Gate, Principal, Role, issue_api_token, require, require_device
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.bounds import Bounds
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.problems import NotAllowed, NotFound, status_of
from shared import limits
from shared.errors import Conflict, OutriderError, StorageFull, Unreachable
from shared.ids import DeviceId
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import hub_database, make_authority

CERTIFICATE = b"the certificate of pi-1"


class Body(BaseModel):
    """Something to send."""

    text: str


class Presenting:
    """Stands where the HTTPS port stands: puts a client certificate into the scope."""

    def __init__(self, app: ASGIApp, certificate: bytes | None) -> None:
        self._app = app
        self._certificate = certificate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "extensions": {PEER_CERTIFICATE: self._certificate}}, receive, send)


async def device_of(certificate: bytes) -> DeviceId:
    if certificate != CERTIFICATE:
        raise NotAllowed("no device of ours", code="auth.unknown_certificate")
    return DeviceId("pi-1")


def make_app(database: Database, clock: FakeClock, metrics: Metrics) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None)
    problems.install(app)
    app.include_router(routes.router)
    app.state.gate = Gate(database=database, clock=clock, device_of=device_of)
    app.state.database, app.state.metrics, app.state.metrics_open = database, metrics, False
    app.state.authorities, app.state.parts = Authorities(make_authority()), lambda: {"broker": False}

    @app.get("/op")
    async def op(principal: Annotated[Principal, Depends(require(Role.OPERATOR))]) -> str:
        return principal.actor

    @app.get("/dev")
    async def dev(principal: Annotated[Principal, Depends(require_device())]) -> str:
        return str(principal.device)

    @app.post("/echo")
    async def echo(body: Body) -> int:
        return len(body.text)

    @app.get("/fail/{kind}")
    async def fail(kind: str) -> None:
        errors: dict[str, Exception] = {
            "conflict": Conflict("taken", hint="choose another"),
            "full": StorageFull("full"),
            "away": Unreachable("nobody"),
            "missing": NotFound("none", code="not_found.thing"),
            "defect": ZeroDivisionError("secret detail"),
        }
        raise errors[kind]

    @app.get("/slow")
    async def slow() -> None:
        await asyncio.Event().wait()

    return app


class Calls:
    """An application and how to call it."""

    def __init__(self, database: Database, clock: FakeClock) -> None:
        self.database, self.clock, self.metrics = database, clock, Metrics()
        self.app = Bounds(
            make_app(database, clock, self.metrics), metrics=self.metrics, clock=clock, streamed=("/raw",)
        )

    def call(self, method: str, path: str, *, certificate: bytes | None = None, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(Presenting(self.app, certificate), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="https://hub") as client:
                return await client.request(method, path, **options)

        return asyncio.run(go())

    def token(self, role: Role, *, ttl_ms: int | None = None) -> dict[str, str]:
        now_ms = self.clock.wall_ms()
        issued = self.database.write_now(
            lambda conn: issue_api_token(conn, name="ci", role=role, at_ms=now_ms, ttl_ms=ttl_ms, actor="test")
        )
        return {"Authorization": f"Bearer {issued.text}"}


@contextmanager
def calling(tmp_path: Path) -> Iterator[Calls]:
    with hub_database(tmp_path) as database:
        yield Calls(database, FakeClock())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Calls]:
    with calling(tmp_path) as calls:
        yield calls


def code(response: httpx.Response) -> str:
    assert response.headers["content-type"] == problems.MEDIA_TYPE
    document = response.json()
    assert document["status"] == response.status_code
    assert set(document) <= {"type", "title", "status", "detail", "code", "hint"}
    return str(document["code"])


def test_nobody_is_told_to_say_who(hub: Calls) -> None:
    response = hub.call("GET", "/op")
    assert (response.status_code, code(response)) == (401, "auth.missing")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    ["Bearer orh_000000000000_abc", "Bearer nonsense", "Basic dTpw", "Bearer ", "Bearer orh__", "Bearer " + "x" * 5000],
)
def test_unknown_tokens(hub: Calls, header: str) -> None:
    response = hub.call("GET", "/op", headers={"Authorization": header})
    assert (response.status_code, code(response)) == (401, "auth.unknown_token")


def test_a_token_needs_its_whole_secret(hub: Calls) -> None:
    header = hub.token(Role.ADMIN)
    header["Authorization"] = header["Authorization"][:-1] + ("a" if header["Authorization"][-1] != "a" else "b")
    assert code(hub.call("GET", "/op", headers=header)) == "auth.unknown_token"


def test_roles_contain_one_another(hub: Calls) -> None:
    refused = hub.call("GET", "/op", headers=hub.token(Role.VIEWER))
    assert (refused.status_code, code(refused)) == (403, "auth.role")
    assert "operator" in refused.json()["detail"]
    for role in (Role.OPERATOR, Role.RELEASE_MANAGER, Role.ADMIN):
        response = hub.call("GET", "/op", headers=hub.token(role))
        assert (response.status_code, response.json()) == (200, "token:ci")


def test_tokens_end(hub: Calls) -> None:
    header = hub.token(Role.ADMIN, ttl_ms=1000)
    hub.clock.advance(999)
    assert hub.call("GET", "/op", headers=header).status_code == 200
    hub.clock.advance(1)
    response = hub.call("GET", "/op", headers=header)
    assert (response.status_code, code(response)) == (401, "auth.expired_token")


def test_a_certificate_stands_for_its_device(hub: Calls) -> None:
    assert hub.call("GET", "/dev", certificate=CERTIFICATE).json() == "pi-1"
    who = hub.call("GET", "/v1/whoami", certificate=CERTIFICATE).json()
    assert who == {"name": "pi-1", "role": "device", "device": "pi-1"}
    other = hub.call("GET", "/dev", certificate=b"another")
    assert (other.status_code, code(other)) == (403, "auth.unknown_certificate")
    assert code(hub.call("GET", "/op", certificate=CERTIFICATE)) == "auth.role"


def test_no_header_stands_in_for_a_certificate(hub: Calls) -> None:
    for name in ("X-Client-Cert", "X-SSL-Client-Cert", "X-Forwarded-Client-Cert", "outrider.peer_certificate"):
        response = hub.call("GET", "/dev", headers={name: CERTIFICATE.decode()})
        assert code(response) == "auth.missing"
    assert code(hub.call("GET", "/dev", headers=hub.token(Role.ADMIN))) == "auth.device"


@pytest.mark.parametrize(
    ("kind", "status", "name"),
    [
        ("conflict", 409, "conflict"),
        ("full", 507, "storage.full"),
        ("away", 503, "transfer.unreachable"),
        ("missing", 404, "not_found.thing"),
        ("defect", 500, "internal"),
    ],
)
def test_errors_become_problems(hub: Calls, kind: str, status: int, name: str) -> None:
    response = hub.call("GET", f"/fail/{kind}")
    assert (response.status_code, code(response)) == (status, name)
    assert "secret" not in response.text


def test_routes_and_shapes_that_do_not_exist(hub: Calls) -> None:
    assert code(hub.call("GET", "/nowhere")) == "not_found.route"
    assert code(hub.call("DELETE", "/op")) == "method_not_allowed"
    wrong = hub.call("POST", "/echo", json={"txt": 1})
    assert (wrong.status_code, code(wrong)) == (422, "invalid.request")
    assert "body.text" in wrong.json()["detail"]
    assert (
        code(hub.call("POST", "/echo", content=b"{", headers={"content-type": "application/json"})) == "invalid.request"
    )


def test_every_code_has_a_status() -> None:
    def leaves(kind: type[OutriderError]) -> Iterator[type[OutriderError]]:
        yield kind
        for below in kind.__subclasses__():
            yield from leaves(below)

    ours = [kind for kind in leaves(OutriderError) if kind.__module__.startswith(("shared.errors", "cloud_hub.ground"))]
    assert len(ours) > 15
    unknown = [kind.code for kind in ours if status_of(kind.code) == 500]
    assert unknown == ["error", "config"]
    assert status_of("enrol.token_expired") == 410
    assert status_of("auth.something_new") == 403


def test_a_body_has_a_bound(hub: Calls) -> None:
    fits = {"text": "x" * 1000}
    assert hub.call("POST", "/echo", json=fits).json() == 1000
    large = {"text": "x" * limits.MAX_JSON_BODY_BYTES}
    announced = hub.call("POST", "/echo", json=large)
    assert (announced.status_code, code(announced)) == (413, "protocol.too_large")

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(limits.MAX_JSON_BODY_BYTES // 1000 + 2):
            yield b"x" * 1000

    unannounced = hub.call("POST", "/echo", content=pieces())
    assert (unannounced.status_code, code(unannounced)) == (413, "protocol.too_large")


def test_an_answer_has_a_deadline(hub: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "DEADLINE_S", 0.05)
    response = hub.call("GET", "/slow")
    assert (response.status_code, code(response)) == (504, "timeout")


def test_requests_are_counted_by_route_template(hub: Calls) -> None:
    hub.call("GET", "/fail/conflict")
    hub.call("GET", "/nowhere/12345")
    value = hub.metrics.registry.get_sample_value
    labels = {"method": "GET", "route": "/fail/{kind}", "status": "409"}
    assert value("outrider_hub_requests_total", labels) == 1
    assert value("outrider_hub_requests_total", {"method": "GET", "route": "none", "status": "404"}) == 1


def test_metrics_want_a_viewer(hub: Calls) -> None:
    assert hub.call("GET", "/metrics").status_code == 401
    text = hub.call("GET", "/metrics", headers=hub.token(Role.VIEWER)).text
    assert "outrider_hub_devices_online" in text


def test_health_needs_no_token(hub: Calls) -> None:
    assert hub.call("GET", "/healthz").status_code == 200
    ready = hub.call("GET", "/readyz")
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "parts": {"broker": False}})
    assert hub.call("GET", "/v1/ca").text.startswith("-----BEGIN CERTIFICATE-----\n")


def test_the_audit_log_comes_in_pages(hub: Calls) -> None:
    header = hub.token(Role.OPERATOR)
    for number in range(3):
        hub.database.write_now(
            lambda conn, number=number: audit.record(  # type: ignore[misc]
                conn, at_ms=1, actor="op", action="did", subject=str(number)
            )
        )
    first = hub.call("GET", "/v1/audit?limit=3", headers=header).json()
    assert [item["action"] for item in first["items"]] == ["token.created", "did", "did"]
    rest = hub.call("GET", f"/v1/audit?after={first['next']}", headers=header).json()
    assert [item["subject"] for item in rest["items"]] == ["2"]
    assert rest["next"] is None
    assert hub.call("GET", "/v1/audit", headers=hub.token(Role.VIEWER)).status_code == 403
    assert hub.call("GET", f"/v1/audit?after={2**63 - 1}", headers=header).json()["items"] == []
    assert hub.call("GET", f"/v1/audit?after={2**63}", headers=header).status_code == 422


def test_a_full_disk_does_not_keep_anybody_from_looking(hub: Calls) -> None:
    header = hub.token(Role.VIEWER)

    async def full(_work: Any) -> None:
        raise StorageFull("no room")

    hub.database.write = full  # type: ignore[method-assign,assignment]
    assert hub.call("GET", "/v1/whoami", headers=header).status_code == 200


def test_the_use_of_a_token_is_noted_once_a_minute(hub: Calls) -> None:
    header = hub.token(Role.VIEWER)
    writes: list[int] = []
    write = hub.database.write

    async def counted(work: Any, *, beside: bool = False) -> Any:
        writes.append(1)
        return await write(work, beside=beside)

    hub.database.write = counted  # type: ignore[method-assign]
    for _ in range(5):
        hub.call("GET", "/v1/whoami", headers=header)
    assert len(writes) == 1
    hub.clock.advance(60_000)
    hub.call("GET", "/v1/whoami", headers=header)
    assert len(writes) == 2
