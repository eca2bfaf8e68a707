"""The question for the time as the agent asks it: real HTTPS, the real verifier child, and a hostile hub."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.hub_time import HubTime
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import undated_context
from edge_agent.adapters.verifier import LiveVerifier
from shared.errors import OutriderError
from shared.ids import DeviceId
from shared.limits import MAX_TIME_ANSWER_BYTES
from shared.release import Floors
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import TestCa
from tests.fakes.trust_repository import DEVICE, NOW_MS, TrustRepository

Reply = Callable[[Request], tuple[int, bytes]]


class House:
    """A device with a root on its disk, and what a hub answers it."""

    def __init__(self, folder: Path) -> None:
        self.ca = TestCa(folder)
        self.hub = TrustRepository(attests_time=True)
        self.trust = folder / "trust"
        self.trust.mkdir()
        (self.trust / "root.json").write_bytes(self.hub.first_root)
        self.requests: list[Request] = []
        self.answers: list[bytes] = []

    def honest(self, request: Request) -> tuple[int, bytes]:
        """As the hub answers."""
        self.answers.append(self.hub.attest(json.loads(request.body)["nonce"]))
        return 200, self.answers[-1]

    def ask(self, *replies: Reply, floors: Floors | None = None) -> list[int | str]:
        """Ask once for each reply: the time, or the code of the refusal."""
        waiting = list(replies)

        def reply(request: Request, handler: BaseHTTPRequestHandler) -> None:
            status, body = waiting.pop(0)(request)
            answer(handler, status, body)

        with HttpsServer(self.ca, reply) as server:
            clock = SystemClock()
            fetcher = HubFetcher(hub_url=server.url, context=undated_context(self.ca.path), clock=clock)
            verifier = LiveVerifier(trust_dir=self.trust, device=DEVICE, profile="generic", fetcher=fetcher)
            source = HubTime(fetcher=fetcher, verifier=verifier, device=DEVICE, random=os.urandom)

            async def one() -> int | str:
                try:
                    return await source.ask(floors=floors or Floors())
                except OutriderError as error:
                    return error.code

            found = [asyncio.run(one()) for _ in replies]
            self.requests = server.requests
        return found


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_the_time_comes_with_the_roots_that_were_missed(house: House) -> None:
    house.hub.rotate("time")
    assert house.ask(house.honest, house.honest) == [NOW_MS, NOW_MS]
    assert (house.trust / "root.json").read_bytes() == house.hub.files["2.root.json"]
    asked = [json.loads(request.body) for request in house.requests]
    assert [(one["device"], one["root"]) for one in asked] == [(DEVICE, 1), (DEVICE, 2)]
    assert asked[0]["nonce"] != asked[1]["nonce"]


def test_time_attestation_replayed_or_for_another_or_forged_or_too_long_or_dropped(house: House) -> None:
    stranger = TrustRepository(attests_time=True)

    def nonce(request: Request) -> str:
        return str(json.loads(request.body)["nonce"])

    codes = house.ask(
        house.honest,
        lambda _: (200, house.answers[0]),
        lambda request: (200, house.hub.attest(nonce(request), device=DeviceId("dev-2"))),
        lambda request: (200, stranger.attest(nonce(request))),
        lambda _: (200, b" " * (MAX_TIME_ANSWER_BYTES + 1)),
        lambda _: (404, b""),
        lambda _: (503, b""),
    )
    assert codes == [
        NOW_MS,
        "trust.time.replayed",
        "trust.time.wrong_device",
        "trust.time.signature",
        "transfer.too_large",
        "transfer.not_found",
        "transfer.unreachable",
    ]


def test_time_attestation_below_the_floor_is_refused_by_the_child_too(house: House) -> None:
    assert house.ask(house.honest, floors=Floors(time_ms=NOW_MS + 1)) == ["trust.time.rollback"]
