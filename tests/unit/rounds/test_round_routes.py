"""The room's REST, and answers that nobody asked for."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from fastapi import FastAPI

from cloud_hub.ground import problems
from cloud_hub.ground.auth import PEER_CERTIFICATE, Gate, Role, issue_api_token
from cloud_hub.rounds import tables
from cloud_hub.rounds.desk import Desk
from cloud_hub.rounds.routes import router
from cloud_hub.rounds.rules import Head
from shared.errors import ProtocolViolation
from shared.ids import DeviceId
from shared.wire.messages import RoundReply
from tests.fakes.hub_parts import envelope_of
from tests.fakes.round_room import FAMILY, RoundRoom, base_model, spec

RUN, MESSAGE = "r-0123456789", "r-0123456789-1t1-0000000000000001"


@pytest.fixture
def room(tmp_path: Path) -> Iterator[RoundRoom]:
    room = RoundRoom(tmp_path)
    yield room
    room.close()


class Api:
    """A client of the application around one desk."""

    def __init__(self, room: RoundRoom, desk: Desk) -> None:
        database, clock = room.releases.database, room.releases.clock
        self.app = FastAPI()
        problems.install(self.app)
        self.app.include_router(router(desk))

        async def device_of(der: bytes) -> DeviceId:
            return DeviceId(der.decode())

        self.app.state.gate = Gate(database=database, clock=clock, device_of=device_of)
        self.tokens = {
            role: database.write_now(
                lambda conn, role=role: issue_api_token(  # type: ignore[misc]
                    conn, name=role.value, role=role, at_ms=clock.wall, ttl_ms=None, actor="test"
                )
            ).text
            for role in (Role.VIEWER, Role.OPERATOR, Role.RELEASE_MANAGER)
        }

    async def __call__(
        self, method: str, path: str, *, role: Role | None = Role.RELEASE_MANAGER, device: str = "", **options: Any
    ) -> httpx.Response:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self.app({**scope, "extensions": {PEER_CERTIFICATE: device.encode()}}, receive, send)

        headers = {} if role is None else {"authorization": f"Bearer {self.tokens[role]}"}
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="https://hub") as client:
            return await client.request(method, path, headers=headers, **options)


def ask(room: RoundRoom, work: Callable[[Api, Desk], Awaitable[Any]], *, holds: bool = True) -> Any:
    """Do something with the API of a room that holds its runs, or does not."""

    async def go() -> Any:
        async with room.open(holds=holds) as desk:
            return await work(Api(room, desk), desk)

    return asyncio.run(go())


def body(**fields: Any) -> Any:
    return msgspec.to_builtins(spec(**fields))


def put_task(room: RoundRoom, *, closed: bool = False) -> None:
    """A task of a run that is not held, as if its hub had just been killed."""

    def work(conn: Any) -> None:
        tables.add_run(conn, RUN, spec=spec(), head=Head(features="r", width=2, classes=2), at_ms=1, actor="test")
        tables.add_tasks(conn, RUN, "1t1", {MESSAGE: (1, DeviceId("dev-1"))}, number=1, at_ms=1)
        if closed:
            tables.close_tasks(conn, RUN)

    room.releases.database.write_now(work)
    (room.root / "rounds" / RUN).mkdir(parents=True, exist_ok=True)


def test_a_run_is_started_listed_shown_and_stopped(room: RoundRoom) -> None:
    async def work(api: Api, _desk: Desk) -> None:
        made = await api("POST", "/v1/rounds", json=body())
        assert made.status_code == 201, made.text
        run = made.json()["run"]
        assert (made.json()["state"], made.json()["features"], made.json()["width"]) == ("running", "r", 32)
        second = await api("POST", "/v1/rounds", json=body(version="2.0.0"))
        assert (second.status_code, second.json()["code"]) == (409, "conflict.run")
        listed = (await api("GET", "/v1/rounds", role=Role.VIEWER)).json()
        assert ([item["run"] for item in listed["items"]], listed["next"]) == ([run], None)
        shown = (await api("GET", f"/v1/rounds/{run}", role=Role.VIEWER)).json()
        assert (shown["spec"]["strategy"], shown["rounds"], shown["accuracy"]) == ("fedavg", [], None)
        assert (await api("POST", f"/v1/rounds/{run}/stop", role=Role.VIEWER)).status_code == 403
        stopped = await api("POST", f"/v1/rounds/{run}/stop", role=Role.OPERATOR)
        assert (stopped.json()["state"], stopped.json()["code"]) == ("stopped", "rounds.stopped")
        assert (await api("GET", "/v1/rounds/r-nothing")).status_code == 404

    ask(room, work)


def test_what_cannot_be_started_says_why(room: RoundRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    room.put_base(base_model(room.weights, offer_features=False), version="0.9.0", outputs=("scores",))

    async def work(api: Api, _desk: Desk) -> None:
        async def refused(status: int, code: str, **fields: Any) -> Any:
            answer = await api("POST", "/v1/rounds", json={**body(), **fields})
            assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
            return answer.json()

        hidden = await refused(422, "rounds.features", base="0.9.0")
        assert "graph.output.append" in hidden["hint"]
        await refused(422, "invalid.features", features="scores")
        await refused(422, "invalid.strategy", strategy="magic")
        await refused(422, "invalid.request", surprise=1)
        await refused(404, "not_found", base="7.0.0")
        await refused(409, "conflict.version", version="0.9.0")
        assert (await api("POST", "/v1/rounds", role=Role.OPERATOR, json=body())).status_code == 403
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        missing = await refused(501, "rounds.flower_missing")
        assert "outrider[fl]" in missing["hint"]

    ask(room, work)
    assert not list((room.root / "rounds").iterdir())


def test_an_answer_is_taken_once_and_only_from_who_was_asked(room: RoundRoom) -> None:
    path = f"/v1/rounds/{RUN}/replies/{MESSAGE}"

    async def work(api: Api, desk: Desk) -> None:
        put_task(room)
        assert (await api("PUT", path, content=b"x", role=Role.OPERATOR)).status_code == 403
        assert (await api("PUT", path, content=b"x", role=None, device="dev-2")).status_code == 404
        other = f"/v1/rounds/r-other/replies/{MESSAGE}"
        assert (await api("PUT", other, content=b"x", role=None, device="dev-1")).status_code == 404
        assert (await api("PUT", path, content=b"", role=None, device="dev-1")).status_code == 422
        assert (await api("PUT", path, content=b"answer", role=None, device="dev-1")).status_code == 201
        assert (await api("PUT", path, content=b"other", role=None, device="dev-1")).status_code == 200
        for reply in (
            RoundReply(run=RUN, message=MESSAGE, content=b"again"),
            RoundReply(run=RUN, message=MESSAGE, blob="0" * 64, length=6),
        ):
            await desk.replied(DeviceId("dev-1"), envelope_of(reply, device="dev-1"), reply)
        task = room.releases.database.read_now(lambda conn: tables.find_task(conn, MESSAGE))
        assert task is not None
        assert (room.root / "rounds" / RUN / task.file).read_bytes() == b"answer"
        assert len(list((room.root / "rounds" / RUN).iterdir())) == 1

    ask(room, work, holds=False)


@pytest.mark.parametrize(
    ("device", "reply"),
    [
        ("dev-2", RoundReply(run=RUN, message=MESSAGE, content=b"x")),
        ("dev-1", RoundReply(run="r-other", message=MESSAGE, content=b"x")),
        ("dev-1", RoundReply(run=RUN, message="x" * 1000, content=b"x")),
        ("dev-1", RoundReply(run=RUN, message=MESSAGE, blob="0" * 64, length=1)),
    ],
    ids=["another device", "another run", "no such task", "never uploaded"],
)
def test_a_message_that_answers_nothing_is_refused(room: RoundRoom, device: str, reply: RoundReply) -> None:
    async def work(_api: Api, desk: Desk) -> None:
        put_task(room)
        with pytest.raises(ProtocolViolation):
            await desk.replied(DeviceId(device), envelope_of(reply, device=device), reply)

    ask(room, work, holds=False)


def test_a_late_answer_is_told_so_and_not_kept(room: RoundRoom) -> None:
    async def work(api: Api, desk: Desk) -> None:
        put_task(room, closed=True)
        path = f"/v1/rounds/{RUN}/replies/{MESSAGE}"
        late = await api("PUT", path, content=b"answer", role=None, device="dev-1")
        assert (late.status_code, late.json()["code"]) == (409, "conflict.round_over")
        reply = RoundReply(run=RUN, message=MESSAGE, content=b"x")
        await desk.replied(DeviceId("dev-1"), envelope_of(reply, device="dev-1"), reply)
        task = room.releases.database.read_now(lambda conn: tables.find_task(conn, MESSAGE))
        assert task is not None
        assert (task.replied_ms, task.content) == (None, b"")

    ask(room, work, holds=False)


def test_a_run_without_enough_devices_ends_with_what_is_missing(
    room: RoundRoom, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloud_hub.rounds import session

    monkeypatch.setattr(session, "GRACE_S", 0.1)
    monkeypatch.setattr(session, "PRESENT_S", 0.2)
    room.fleet.add("dev-1", lambda content: content, version="0.1.0")

    async def work(_api: Api, desk: Desk) -> None:
        run = (await desk.start(spec(), actor="token:test")).row.run
        ended = await room.until(desk, run, lambda found: found.row.finished_ms is not None)
        assert (ended.row.state, ended.row.code) == ("failed", "rounds.too_few_devices")
        assert f"3 devices are needed, 0 are online and serve {FAMILY}/1.0.0" in ended.row.reason

    ask(room, work)
