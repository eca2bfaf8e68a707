"""The agent's driver with real HTTPS behind it: whatever the hub does, every answer leaves by its deadline."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from edge_agent.adapters.cloud import HubCloud
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import dated_context
from edge_agent.core.cascade import Policy
from edge_agent.core.slot_values import Phase
from shared.inference import Answer, Done, Infer, Late, TensorHead
from shared.telemetry import Outcome
from shared.wire.oip import JSON_LENGTH_HEADER, OipResponse, encode_response
from shared.wire.oip_terms import Provenance, write_provenance
from tests.fakes.agent_world import AgentWorld, profile, release, until
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import TestCa

pytestmark = pytest.mark.live

DEADLINE_MS = 400
ALLOWANCE_MS = 150
"""What a busy machine may add before the asker, whose clock is believed, gets to its answer."""
POLICY = Policy(model="digits-large", below=1.0, margin_ms=100, per_minute=100_000)
"""A wide margin: the machine that runs the tests may be busy."""

Reply = Callable[[Request, BaseHTTPRequestHandler], None]


def right(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """The larger model's answer."""
    said = Provenance(rung="cloud", digest="c" * 64, variant="fp32", labels=("7",), confidences=(0.99,))
    head = TensorHead(name="y", dtype="fp32", shape=(1, 2))
    response = OipResponse(
        model="digits-large",
        version="3.0.0",
        outputs=(head,),
        payload=(struct.pack("<2f", 1, 2),),
        parameters=write_provenance(said),
    )
    length, parts = encode_response(response, binary={"y"})
    handler.close_connection = False
    answer(handler, 200, b"".join(bytes(part) for part in parts), headers={JSON_LENGTH_HEADER: str(length)})


def silence(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """Accept, read, and never say anything."""
    handler.request.settimeout(20)
    handler.request.recv(1)


def drip(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """A byte now and then."""
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 2_000:
        handler.wfile.write(bytes((byte,)))
        time.sleep(0.01)


def garbage(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """Bytes that are no answer."""
    answer(handler, 200, bytes(range(256)) * 16)


def reset(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """Hang up hard."""
    handler.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.request.close()


def overloaded(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """Say no, at once."""
    answer(handler, 429, b'{"error":"queue full"}', headers={"Retry-After": "1"})


class Hub:
    """A server that does as told, and a world whose agent asks it."""

    def __init__(self, folder: Path) -> None:
        ca = TestCa(folder)
        pair = ca.client("dev-test")
        self.reply: Reply = right
        self.server = HttpsServer(ca, lambda request, handler: self.reply(request, handler), needs_client=True)
        context = dated_context(
            ca.path, now_ms=SystemClock().wall_ms, certificate_path=pair.certificate, key_path=pair.key
        )
        self.took_ms: list[float] = []
        self.world = AgentWorld()
        self.world.clock = SystemClock()  # type: ignore[assignment]
        self.world.profile = profile(duration_ms=0, good_answers=0)
        self.world.policy = POLICY
        self.world.cloud = HubCloud(hub_url=self.server.url, context=context, clock=SystemClock())  # type: ignore[assignment]

    def tell(self, story: Callable[[], object]) -> None:
        """Play a story once the agent serves."""
        world = self.world

        async def play() -> None:
            world.arrive(world.publish(release(world, "1.0.0")))

            def settled() -> bool:
                slot = world.models.slot("digits")
                return slot is not None and slot.phase is Phase.COMMITTED and world.uplink.online

            await until(settled, "served")
            told = story()
            assert asyncio.iscoroutine(told)
            await told

        world.life(play)

    async def infer(self, id: str) -> Answer:
        """One request."""
        head = TensorHead(name="x", dtype="fp32", shape=(1, 4))
        request = Infer(model="digits", inputs=(head,), id=id, deadline_ms=DEADLINE_MS)
        loop = asyncio.get_running_loop()
        began = loop.time()
        reply = await self.world.ask(request, bytes(16))
        self.took_ms.append(1000 * (loop.time() - began))
        assert isinstance(reply, Answer), reply
        return reply


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    with hub.server:
        yield hub


def test_the_hub_answers_in_time(hub: Hub) -> None:
    async def story() -> None:
        for number in range(10):
            given = await hub.infer(f"r{number}")
            assert (given.rung, given.labels, given.escalated) == ("cloud", ("7",), "answered")
        assert {request.peer for request in hub.server.requests} == {"dev-test"}

    hub.tell(story)


@pytest.mark.parametrize("reply", [silence, drip, garbage, reset, overloaded], ids=lambda reply: str(reply.__name__))
def test_every_answer_leaves_by_its_deadline(hub: Hub, reply: Reply) -> None:
    async def story() -> None:
        hub.reply = reply
        answers = []
        for wave in range(3):
            answers += await asyncio.gather(*(hub.infer(f"{wave}-{number}") for number in range(8)))
        assert max(hub.took_ms) <= DEADLINE_MS + ALLOWANCE_MS
        assert [given.id for given in answers if not given.deadline_met] == []
        assert {(given.rung, given.degraded, given.labels) for given in answers} == {("full", True, ("1.0.0",))}
        assert all(given.escalated and given.reason for given in answers)
        assert hub.server.requests

    hub.tell(story)


def test_what_comes_late_is_joined_to_its_request(hub: Hub) -> None:
    go_on = threading.Event()

    def slowly(request: Request, handler: BaseHTTPRequestHandler) -> None:
        go_on.wait(10)
        right(request, handler)

    async def story() -> None:
        hub.reply = slowly
        assert (await hub.infer("r1")).escalated == "late"
        assert await hub.world.ask(Late(request="r1", id="q")) == Done(id="q", detail="pending")
        go_on.set()
        outcomes: list[Outcome] = []

        def labelled() -> bool:
            bodies = [record.body for record in hub.world.hub.records.values()]
            outcomes[:] = [body for body in bodies if isinstance(body, Outcome)]
            return bool(outcomes)

        await until(labelled, "the label reaches the hub")
        assert [(outcome.request, outcome.source, outcome.label) for outcome in outcomes] == [("r1", "hub", "7")]
        late = await hub.world.ask(Late(request="r1", id="q"))
        assert isinstance(late, Answer)
        assert (late.labels, late.rung, late.deadline_met) == (("7",), "cloud", False)

    hub.tell(story)


def test_a_hub_that_comes_back_is_asked_again(hub: Hub) -> None:
    async def story() -> None:
        hub.reply = reset
        while (await hub.infer("away")).escalated != "breaker":
            pass
        hub.reply = right

        async def answered() -> None:
            while (await hub.infer("back")).escalated != "answered":
                await asyncio.sleep(0.02)

        await asyncio.wait_for(answered(), 15)

    hub.tell(story)
