"""`POST /v1/time`: whom the hub tells the time, what it signs, and how often."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cloud_hub.ground import problems
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.rates import Buckets
from cloud_hub.ground.walltime import WallTime
from cloud_hub.releases import tables
from cloud_hub.releases.routes import router
from cloud_hub.releases.tables import MetadataRow
from shared.ids import DeviceId
from shared.limits import MAX_ROOTS_WITH_TIME
from shared.release import Floors
from shared.trust import refresh
from shared.wire.verification import TimeJob
from tests.fakes.hub_parts import DAY_MS
from tests.fakes.release_room import ReleaseRoom

NONCE = "n" * 43
DEVICE = DeviceId("dev-1")


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ReleaseRoom]:
    made = ReleaseRoom(tmp_path)
    yield made
    made.close()


Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(room: ReleaseRoom) -> Ask:
    app = FastAPI()
    problems.install(app)
    app.include_router(router(room.desk))
    app.state.clock = room.clock
    app.state.time_rate = Buckets(burst=5, per_minute=6)

    def post(**body: object) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="https://hub") as client:
                return await client.post("/v1/time", json=body)

        return asyncio.run(call())

    return post


def believed(room: ReleaseRoom, answer: bytes) -> int:
    """The time, as a device takes it from this answer; no file is asked for."""
    root = asyncio.run(room.desk.root()).encode()
    run = refresh.attest(TimeJob(answer=answer, device=DEVICE, nonce=NONCE, root=root, floors=Floors()))
    try:
        step = next(run)
    except StopIteration as end:
        return int(end.value)
    raise AssertionError(step)


def test_a_device_believes_the_time_that_the_hub_tells_to_anyone(room: ReleaseRoom, ask: Ask) -> None:
    answer = ask(nonce=NONCE, device=DEVICE, root=1)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert believed(room, answer.content) == room.clock.wall
    assert json.loads(answer.content)["roots"] == []


def test_a_time_that_is_doubted_is_told_to_nobody(room: ReleaseRoom, ask: Ask) -> None:
    """A device that is told a time ahead renews at once, for a certificate that begins when the time has come."""
    time = WallTime(room.clock, newest_ms=None, metrics=Metrics())
    room.sure_ms = time.sure_ms
    room.clock.wall += 60 * DAY_MS
    answer = ask(nonce=NONCE, device=DEVICE, root=1)
    assert (answer.status_code, answer.json()["code"]) == (503, "config.clock")
    room.clock.wall -= 60 * DAY_MS
    assert believed(room, ask(nonce=NONCE, device=DEVICE, root=1).content) == room.clock.wall


def test_the_roots_after_the_askers_come_along_up_to_a_bound(room: ReleaseRoom, ask: Ask) -> None:
    root = asyncio.run(room.desk.root()).encode()
    rows = [MetadataRow("root", number, root, 0, 2**40) for number in range(2, MAX_ROOTS_WITH_TIME + 4)]
    room.database.write_now(lambda conn: tables.add_metadata(conn, rows))
    assert len(json.loads(ask(nonce=NONCE, device=DEVICE, root=1).content)["roots"]) == MAX_ROOTS_WITH_TIME
    assert len(json.loads(ask(nonce=NONCE, device=DEVICE, root=9).content)["roots"]) == 2


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"nonce": NONCE},
        {"nonce": "short", "device": DEVICE},
        {"nonce": NONCE, "device": "../x"},
        {"nonce": NONCE, "device": DEVICE, "time_ms": 1},
        {"nonce": NONCE, "device": DEVICE, "root": -1},
        {"nonce": NONCE, "device": DEVICE, "root": 2**40},
        {"nonce": 7, "device": DEVICE},
    ],
)
def test_a_question_that_is_none_is_refused(ask: Ask, body: dict[str, Any]) -> None:
    assert ask(**body).status_code == 422


def test_one_address_may_ask_so_often(ask: Ask) -> None:
    answers = [ask(nonce=NONCE, device=DEVICE) for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert answers[-1].headers["retry-after"] == "10"


def test_a_hub_without_a_time_key_says_so(room: ReleaseRoom) -> None:
    room.ring.pop("time")
    with pytest.raises(problems.NotFound) as caught:
        asyncio.run(room.open_desk().attesting.attest(device=DEVICE, nonce=NONCE, root_version=1))
    assert caught.value.code == "not_found.time"
