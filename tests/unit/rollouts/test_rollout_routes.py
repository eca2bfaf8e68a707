"""The room's REST: roles, shapes, pages and problems, through a real application."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cloud_hub.ground import problems
from cloud_hub.ground.auth import Gate, Role, issue_api_token
from cloud_hub.ground.problems import NotAllowed
from cloud_hub.rollouts.routes import router
from shared.ids import DeviceId
from tests.fakes.rollout_room import NEW, RolloutRoom, worse


class Api:
    """A client of the application, one call per event loop."""

    def __init__(self, room: RolloutRoom) -> None:
        self.app = FastAPI()
        problems.install(self.app)
        self.app.include_router(router(room.desk))

        async def nobody(_der: bytes) -> DeviceId:
            raise NotAllowed("no devices here")

        self.app.state.gate = Gate(database=room.database, clock=room.clock, device_of=nobody)
        self.tokens = {
            role: room.database.write_now(
                lambda conn, role=role: issue_api_token(  # type: ignore[misc]
                    conn, name=role.value, role=role, at_ms=room.clock.wall, ttl_ms=None, actor="test"
                )
            ).text
            for role in (Role.VIEWER, Role.OPERATOR)
        }

    def __call__(self, method: str, path: str, *, role: Role | None = Role.OPERATOR, **options: Any) -> httpx.Response:
        headers = {} if role is None else {"authorization": f"Bearer {self.tokens[role]}"}

        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="https://hub") as client:
                return await client.request(method, f"/v1/rollouts{path}", headers=headers, **options)

        return asyncio.run(call())


@pytest.fixture
def room(tmp_path: Path) -> Iterator[RolloutRoom]:
    room = RolloutRoom(tmp_path)
    yield room
    room.close()


@pytest.fixture
def api(room: RolloutRoom) -> Api:
    return Api(room)


def start(api: Api, room: RolloutRoom, **fields: Any) -> dict[str, Any]:
    response = api("POST", "", json={"spec": room.spec(**fields)})
    assert response.status_code == 201, response.text
    document: dict[str, Any] = response.json()
    return document


def test_a_rollout_from_its_start_to_its_explanation(api: Api, room: RolloutRoom) -> None:
    document = start(api, room)
    assert (document["id"], document["phase"], document["spec"]["soak_s"]) == ("digits-1.1.0-1", "running", 60)
    room.run(document["id"], worse)
    view = api("GET", f"/{document['id']}", role=Role.VIEWER).json()
    assert (view["phase"], view["devices"]["waiting"], view["returned"]) == ("rolled_back", 3, 1)
    assert {reading["gate"] for reading in view["gates"]} == {"devices", "outcomes", "latency"}
    first = api("GET", f"/{document['id']}/decisions?limit=2", role=Role.VIEWER).json()
    rest = api("GET", f"/{document['id']}/decisions?after={first['next']}", role=Role.VIEWER).json()
    kinds = [one["kind"] for one in first["items"] + rest["items"]]
    assert kinds[:2] == ["drafted", "started"]
    assert kinds[-1] == "ended"
    devices = api("GET", f"/{document['id']}/devices?limit=3", role=Role.VIEWER).json()
    assert (len(devices["items"]), devices["next"]) == (3, 2)
    assert devices["items"][0]["before"] == "1.0.0"


def test_a_plan_is_for_viewers_and_changes_nothing(api: Api, room: RolloutRoom) -> None:
    plan = api("POST", "/plan", role=Role.VIEWER, json=room.spec())
    assert plan.status_code == 200, plan.text
    assert sorted(plan.json()["eligible"]) == ["dev-0", "dev-1", "dev-2", "dev-3"]
    assert api("GET", "").json() == {"items": [], "next": None}


@pytest.mark.parametrize(("method", "path"), [("POST", ""), ("POST", "/x/pause"), ("POST", "/x/abort")])
def test_what_changes_something_is_for_operators(api: Api, method: str, path: str) -> None:
    assert api(method, path, role=Role.VIEWER, json={}).status_code == 403
    assert api(method, path, role=None, json={}).status_code == 401


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"spec": {"family": "digits"}}, 422, "invalid.rollout"),
        ({"spec": {"family": "digits", "version": NEW, "what": 1}}, 422, "invalid.rollout"),
        ({"surprise": 1}, 422, "invalid.request"),
        ({"spec": {"family": "digits", "version": "9.9.9"}}, 404, "not_found"),
    ],
)
def test_what_cannot_be_started_is_refused(api: Api, body: dict[str, Any], status: int, code: str) -> None:
    response = api("POST", "", json=body)
    assert (response.status_code, response.json()["code"]) == (status, code), response.text


def test_steering_and_its_conflicts(api: Api, room: RolloutRoom) -> None:
    name = start(api, room)["id"]
    again = api("POST", "", json={"spec": room.spec()})
    assert (again.status_code, again.json()["code"]) == (409, "conflict.rollout")
    assert api("POST", f"/{name}/resume").json()["code"] == "conflict.rollout_phase"
    assert api("POST", f"/{name}/pause", json={"reason": "lunch"}).json()["phase"] == "paused"
    assert api("POST", f"/{name}/resume").json()["phase"] == "running"
    assert api("POST", f"/{name}/abort", json={"revert": False}).json()["phase"] == "aborting"
    assert api("POST", "/nothing/pause", json={}).status_code == 404


def test_a_list_is_paged_newest_first(api: Api, room: RolloutRoom) -> None:
    names = [start(api, room, select={"devices": [f"dev-{n}"]})["id"] for n in range(3)]
    first = api("GET", "?limit=2", role=Role.VIEWER).json()
    assert [one["id"] for one in first["items"]] == [names[2], names[1]]
    rest = api("GET", f"?limit=2&after={first['next']}", role=Role.VIEWER).json()
    assert ([one["id"] for one in rest["items"]], rest["next"]) == ([names[0]], None)


def test_a_draft_is_started_by_itself(api: Api, room: RolloutRoom) -> None:
    draft = api("POST", "", json={"spec": room.spec(), "draft": True}).json()
    assert draft["phase"] == "draft"
    assert api("POST", f"/{draft['id']}/start").json()["phase"] == "running"
