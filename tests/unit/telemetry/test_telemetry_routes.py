"""REST of the telemetry room: pages, summaries, who may look, and what is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cloud_hub.ground import migrate, problems
from cloud_hub.ground.auth import Gate, Role, issue_api_token
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.problems import NotAllowed, NotFound
from cloud_hub.telemetry import routes
from cloud_hub.telemetry.desk import Desk
from shared.ids import DeviceId
from shared.telemetry import DeviceEvent, Reading, Record
from shared.wire.messages import Ack, Batch
from tests.fakes.batches import Sent, batch_of, gap_of, readings
from tests.fakes.clock import FakeClock

PI = DeviceId("pi-1")


@dataclass(frozen=True)
class Known:
    """A device."""

    id: DeviceId


class Devices:
    """The devices' desk: knows one device."""

    async def get(self, device: str) -> Known:
        """The device; raises NotFound."""
        if device != PI:
            raise NotFound(f"there is no device {device!r}", code="not_found.device")
        return Known(PI)


class Hub:
    """The room behind its routes, asked over ASGI."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.token = database.write_now(
            lambda conn: issue_api_token(conn, name="t", role=Role.VIEWER, at_ms=0, ttl_ms=None, actor="test")
        ).text
        self.acks: list[Ack] = []
        self.desk = Desk(database=database, clock=FakeClock(), metrics=Metrics(), send_ack=self._keep)
        self.app = FastAPI()
        problems.install(self.app)
        self.app.include_router(routes.router)
        self.app.state.telemetry = self.desk
        self.app.state.devices = Devices()
        self.app.state.gate = Gate(database=database, clock=FakeClock(), device_of=self._nobody)

    async def _keep(self, _device: DeviceId, ack: Ack) -> None:
        self.acks.append(ack)

    async def _nobody(self, _der: bytes) -> DeviceId:
        raise NotAllowed("no certificates here")

    def store(self, *batches: Batch) -> None:
        """Take batches, in one group."""
        asyncio.run(self.desk.take([Sent(PI, one) for one in batches]))

    def get(self, path: str, *, token: str | None = None) -> tuple[int, Any]:
        """Status and JSON."""

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="https://hub") as client:
                shown = self.token if token is None else token
                return await client.get(path, headers={"Authorization": f"Bearer {shown}"} if shown else {})

        response = asyncio.run(ask())
        return response.status_code, response.json()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    database = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    migrate.upgrade(database)
    yield Hub(database)
    database.close()


def test_records_come_in_pages(hub: Hub) -> None:
    hub.store(batch_of(readings(4, 5)), batch_of(readings(1, 2, 3)))
    status, page = hub.get("/v1/telemetry/pi-1?limit=3")
    assert status == 200
    assert [item["seq"] for item in page["items"]] == [4, 5, 1]
    assert page["items"][0] == {
        "id": 2048,
        "epoch": "0123456789abcdef",
        "class": "reading",
        "seq": 4,
        "at_ms": 1004,
        "received_ms": 1_800_000_000_000,
        "kind": "reading",
        "body": {"name": "t", "value": 4.0},
    }
    _, rest = hub.get(f"/v1/telemetry/pi-1?limit=3&after={page['next']}")
    assert [item["seq"] for item in rest["items"]] == [2, 3]
    assert rest["next"] is None


def test_one_class_can_be_asked_for(hub: Hub) -> None:
    event = [Record(seq=1, at_ms=5, body=DeviceEvent(name="host.lost"))]
    hub.store(batch_of(readings(1)), batch_of(event))
    _, page = hub.get("/v1/telemetry/pi-1?class=event")
    assert [item["body"]["name"] for item in page["items"]] == ["host.lost"]
    assert hub.get("/v1/telemetry/pi-1?class=7")[0] == 422


def test_the_summary_says_what_is_missing(hub: Hub) -> None:
    hub.store(batch_of(readings(2, 3)), batch_of(readings(6)), batch_of(readings(6)))
    status, summary = hub.get("/v1/telemetry/pi-1/summary")
    assert status == 200
    (stream,) = summary["streams"]
    assert summary["records"] == stream["records"] == 3
    assert (stream["class"], stream["first"], stream["last"]) == ("reading", 2, 6)
    assert stream["missing"] == [[1, 1], [4, 5]]
    assert (stream["missing_ranges"], stream["missing_records"], stream["duplicates"]) == (2, 3, 1)


def test_the_summary_says_what_is_lost_and_why(hub: Hub) -> None:
    hub.store(batch_of(readings(1, 2)), gap_of(2, 5, records=3), gap_of(8, 9, records=2, reason="expired"))
    (stream,) = hub.get("/v1/telemetry/pi-1/summary")[1]["streams"]
    assert stream["lost"] == [
        {"first": 3, "last": 5, "reason": "evicted"},
        {"first": 8, "last": 9, "reason": "expired"},
    ]
    assert (stream["lost_ranges"], stream["lost_records"], stream["watermark"]) == (2, 5, 5)
    assert stream["missing"] == [[6, 7]]
    # A gap is no record.
    assert [item["seq"] for item in hub.get("/v1/telemetry/pi-1")[1]["items"]] == [1, 2]


def test_the_summary_shows_a_store_that_was_replaced_and_a_disk_that_was_copied(hub: Hub) -> None:
    forged = [Record(seq=1, at_ms=9, body=Reading(name="other", value=0.0))]
    hub.store(batch_of(readings(1)), batch_of(forged), batch_of(readings(1), epoch="f" * 16))
    _, summary = hub.get("/v1/telemetry/pi-1/summary")
    assert summary["epochs"] == ["0123456789abcdef", "f" * 16]
    assert [stream["conflicts"] for stream in summary["streams"]] == [1, 0]


def test_a_number_that_json_has_not_is_told_as_text(hub: Hub) -> None:
    hub.store(batch_of([Record(seq=1, at_ms=1, body=Reading(name="t", value=float("nan")))]))
    status, page = hub.get("/v1/telemetry/pi-1")
    assert (status, page["items"][0]["body"]["value"]) == (200, "nan")


@pytest.mark.parametrize("path", ["/v1/telemetry/pi-2", "/v1/telemetry/pi-2/summary"])
def test_an_unknown_device_is_not_found(hub: Hub, path: str) -> None:
    status, problem = hub.get(path)
    assert (status, problem["code"]) == (404, "not_found.device")


def test_a_known_device_without_records_has_none(hub: Hub) -> None:
    assert hub.get("/v1/telemetry/pi-1") == (200, {"items": [], "next": None})
    assert hub.get("/v1/telemetry/pi-1/summary") == (
        200,
        {"device": "pi-1", "records": 0, "epochs": [], "streams_known": 0, "streams": []},
    )


def test_nobody_looks_without_a_token(hub: Hub) -> None:
    assert hub.get("/v1/telemetry/pi-1", token="")[0] == 401


@pytest.mark.parametrize("query", ["after=-1", "after=x", f"after={2**63}", "limit=0", "limit=501"])
def test_bad_pages_are_refused(hub: Hub, query: str) -> None:
    assert hub.get(f"/v1/telemetry/pi-1?{query}")[0] == 422
