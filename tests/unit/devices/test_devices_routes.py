"""REST of devices and tokens, over the application with everything around it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cloud_hub.devices import routes, token_routes
from cloud_hub.ground import problems
from cloud_hub.ground.auth import Gate, Role, issue_api_token
from cloud_hub.ground.database import Database
from cloud_hub.ground.rates import Buckets
from shared.join import decode_join_token
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import hub_database, make_authority, make_desk, new_csr


class Hub:
    """An application with the devices room in it."""

    def __init__(self, database: Database) -> None:
        self.database, self.clock = database, FakeClock()
        desk = make_desk(database, self.clock, make_authority())
        self.app = FastAPI()
        problems.install(self.app)
        self.app.include_router(routes.router)
        self.app.include_router(token_routes.router)
        state: Any = self.app.state
        state.gate = Gate(database=database, clock=self.clock, device_of=desk.device_of)
        state.database, state.clock, state.devices = database, self.clock, desk
        state.enrol_rate = Buckets(burst=5, per_minute=6)
        state.token_ttl = {"join": 1000, "api": 2000}

    def call(self, method: str, path: str, *, role: Role | None = Role.ADMIN, json: Any = None) -> httpx.Response:
        headers = {} if role is None else {"Authorization": f"Bearer {self.token(role)}"}

        async def go() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="https://hub") as client:
                return await client.request(method, path, json=json, headers=headers)

        return asyncio.run(go())

    def token(self, role: Role) -> str:
        return self.database.write_now(
            lambda conn: issue_api_token(conn, name="ci", role=role, at_ms=0, ttl_ms=None, actor="test")
        ).text

    def enroll(self, name: str) -> httpx.Response:
        token = self.call("POST", "/v1/tokens", json={"kind": "join"}).json()["token"]
        body = {"token": token, "csr_pem": new_csr(), "profile": "pi", "name": name}
        return self.call("POST", "/v1/enroll", role=None, json=body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with hub_database(tmp_path) as database:
        yield Hub(database)


def test_a_device_joins_over_rest(hub: Hub) -> None:
    response = hub.enroll("pi-1")
    assert response.status_code == 201
    answer = response.json()
    assert set(answer) == {"device", "certificate_pem", "ca_pem", "hub_url", "broker", "root"}
    assert answer["device"] == "pi-1"
    assert answer["broker"] == {"host": "hub.example", "port": 8883}


def test_enrolling_is_throttled_by_address(hub: Hub) -> None:
    body = {"token": "orj1.x", "csr_pem": new_csr(), "profile": "pi"}
    codes = [hub.call("POST", "/v1/enroll", role=None, json=body).json()["code"] for _ in range(6)]
    assert codes == ["enrol.token_unknown"] * 5 + ["rate"]
    refused = hub.call("POST", "/v1/enroll", role=None, json=body)
    assert refused.status_code == 429
    hub.clock.advance(int(refused.headers["retry-after"]) * 1000)
    assert hub.call("POST", "/v1/enroll", role=None, json=body).status_code == 401


def test_devices_come_in_pages_and_by_label(hub: Hub) -> None:
    for name in ("a", "b", "c"):
        assert hub.enroll(name).status_code == 201
    first = hub.call("GET", "/v1/devices?limit=2", role=Role.VIEWER).json()
    assert ([item["id"] for item in first["items"]], first["next"]) == (["a", "b"], "b")
    rest = hub.call("GET", f"/v1/devices?limit=2&after={first['next']}", role=Role.VIEWER).json()
    assert ([item["id"] for item in rest["items"]], rest["next"]) == (["c"], None)
    patched = hub.call("PATCH", "/v1/devices/b", json={"labels": {"site": "north"}}, role=Role.OPERATOR)
    assert patched.json()["labels"] == {"site": "north"}
    found = hub.call("GET", "/v1/devices?label=site=north").json()
    assert [item["id"] for item in found["items"]] == ["b"]
    assert hub.call("GET", "/v1/devices?label=site").json()["code"] == "invalid.labels"
    assert hub.call("GET", "/v1/devices/b").json()["id"] == "b"
    assert hub.call("GET", "/v1/devices/z").json()["code"] == "not_found.device"


def test_roles_bound_what_is_possible(hub: Hub) -> None:
    assert hub.call("GET", "/v1/devices", role=None).status_code == 401
    assert hub.call("PATCH", "/v1/devices/a", json={"labels": {}}, role=Role.VIEWER).status_code == 403
    assert hub.call("POST", "/v1/tokens", json={"kind": "join"}, role=Role.VIEWER).status_code == 403
    assert hub.call("POST", "/v1/tokens", json={"kind": "api"}, role=Role.OPERATOR).status_code == 403


def test_tokens_over_rest(hub: Hub) -> None:
    join = hub.call("POST", "/v1/tokens", json={"kind": "join", "device": "pi-1"}, role=Role.OPERATOR)
    assert join.status_code == 201
    assert decode_join_token(join.json()["token"]).hub_url == "https://hub.example:8443"
    assert join.json()["expires_ms"] == hub.clock.wall_ms() + 1000
    api = hub.call("POST", "/v1/tokens", json={"kind": "api", "role": "operator", "ttl_s": 60}).json()
    assert (api["role"], api["expires_ms"]) == ("operator", hub.clock.wall_ms() + 60_000)
    assert api["token"].startswith("orh_")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"kind": "root"},
        {"kind": "join", "role": "admin"},
        {"kind": "api", "device": "pi-1"},
        {"kind": "api", "role": "device"},
        {"kind": "api", "role": "nonsense"},
        {"kind": "join", "uses": 0},
        {"kind": "join", "ttl_s": 0},
        {"kind": "join", "extra": 1},
        {"kind": "join", "device": "Not A Name"},
    ],
)
def test_tokens_that_are_refused(hub: Hub, body: dict[str, object]) -> None:
    assert hub.call("POST", "/v1/tokens", json=body).status_code == 422
