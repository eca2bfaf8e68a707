"""The agent's figures as Prometheus reads them, at the door."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prometheus_client.parser import text_string_to_metric_families

from edge_agent.adapters import metrics
from edge_agent.adapters.oip import Conversation, HttpRequest, HttpResponse
from edge_agent.adapters.waiting import Place, WaitingRoom
from edge_agent.framing import Buffer
from shared.inference import AgentState, ModelState, Refusal, Reply, Request, Status

STATE = AgentState(
    id="",
    device='dev"a\\',
    agent_version="0.4.0",
    profile="pi4",
    boot=3,
    pid=7,
    uptime_ms=12_345,
    link="online",
    models=(ModelState(family="digits", phase="idle"),),
    queue={"event": 1, "reading": 2_592_000},
    queue_bytes=671_088_640,
    assignment_version=1,
    answered=10,
    refused=2,
    queue_oldest_ms={"reading": 2_592_000_500},
    queue_lost={"evicted": 3},
    queue_buried=4,
    queue_buried_given_up=8,
    queue_unkept={"result": 7, "reading": 9},
    queue_written_bytes=5,
    queue_syncs=6,
)


def samples(page: bytes) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by its name and the values of its labels, as Prometheus's own parser reads them."""
    families = text_string_to_metric_families(page.decode())
    return {(one.name, tuple(one.labels.values())): one.value for family in families for one in family.samples}


def respond(method: str, reply: Reply = STATE) -> HttpResponse:
    async def reply_to(request: Request, _: bytearray, _arrived: float) -> tuple[Reply, Sequence[Buffer]]:
        assert isinstance(request, Status)
        return reply, ()

    async def story() -> HttpResponse:
        async with asyncio.TaskGroup() as tasks:
            place = Place(WaitingRoom(handle=reply_to, tasks=tasks))
            request = HttpRequest(method=method, target="/metrics?x=1", headers={}, body=bytearray())
            return await Conversation(reply_to=reply_to).respond(request, place)

    return asyncio.run(story())


def test_every_figure_of_the_queue_is_there() -> None:
    found = samples(metrics.render(STATE))
    assert {(name.removeprefix("outrider_agent_"), *labels): value for (name, labels), value in found.items()} == {
        ("info", "0.4.0", "pi4", 'dev"a\\'): 1,
        ("uptime_seconds",): 12.345,
        ("link_up",): 1,
        ("requests_total", "answered"): 10,
        ("requests_total", "refused"): 2,
        ("queue_records", "event"): 1,
        ("queue_records", "reading"): 2_592_000,
        ("queue_oldest_seconds", "reading"): 2_592_000.5,
        ("queue_bytes",): 671_088_640,
        ("queue_lost_records_total", "evicted"): 3,
        ("queue_unkept_records_total", "result"): 7,
        ("queue_unkept_records_total", "reading"): 9,
        ("queue_buried_batches",): 4,
        ("queue_buried_given_up_batches_total",): 8,
        ("queue_written_bytes_total",): 5,
        ("queue_syncs_total",): 6,
        ("model_ready", "digits"): 0,
    }


def test_the_door_answers_it_beside_the_models() -> None:
    response = respond("GET")
    assert response.status == 200
    assert response.headers == ((b"content-type", metrics.CONTENT_TYPE),)
    assert samples(bytes(response.parts[0])) == samples(metrics.render(STATE))


def test_another_method_and_a_refusal_are_told() -> None:
    refused = respond("POST")
    assert (refused.status, dict(refused.headers)[b"allow"]) == (405, b"GET")
    assert respond("GET", Refusal(id="", code="overload", message="many wait", retry=True)).status == 429
