"""The question for the time as the agent asks it: real HTTPS, the real verifier child, and a hostile hub."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest

from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.hub_time import HubTime
from edge_agent.adapters.renewer import LiveRenewer
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import undated_context
from edge_agent.adapters.verifier import LiveVerifier
from edge_agent.identity import IdentityFile
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
        self.serving, self.published = self.ca, self.ca.pem
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

    def renewer(self, server: HttpsServer) -> LiveRenewer:
        """Who follows links: the real child, on an identity that knows the first CA."""
        pair, folder = self.ca.client(DEVICE), self.trust.parent / "identity"
        folder.mkdir(exist_ok=True)
        file = IdentityFile(
            device=DEVICE, hub_url=server.url, broker_host="b", broker_port=1, profile="pi4", enrolled_ms=1
        )
        for name, data in (
            ("device.key", pair.key.read_bytes()),
            ("device.pem", pair.certificate.read_bytes()),
            ("ca.pem", self.ca.pem),
            ("identity.json", msgspec.json.encode(file)),
        ):
            (folder / name).write_bytes(data)
        return LiveRenewer(state_dir=self.trust.parent, now_ms=lambda: 1, basis=lambda: "floor")

    def ask(self, *replies: Reply, floors: Floors | None = None) -> list[int | str]:
        """Ask once for each reply: the time, or the code of the refusal."""
        waiting = list(replies)

        def reply(request: Request, handler: BaseHTTPRequestHandler) -> None:
            if request.path == "/v1/ca":
                answer(handler, 200, self.published)
                return
            status, body = waiting.pop(0)(request)
            answer(handler, status, body)

        with HttpsServer(self.serving, reply) as server:
            clock = SystemClock()
            fetcher = HubFetcher(hub_url=server.url, context=undated_context(self.ca.path), clock=clock)
            verifier = LiveVerifier(trust_dir=self.trust, device=DEVICE, profile="generic", fetcher=fetcher)
            source = HubTime(
                fetcher=fetcher, follow=self.renewer(server).follow, verifier=verifier, device=DEVICE, random=os.urandom
            )

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


def second_ca(folder: Path) -> TestCa:
    (folder / "second").mkdir()
    return TestCa(folder / "second", name="second-ca")


def test_a_hub_that_has_changed_its_ca_tells_the_time_by_its_link(house: House, tmp_path: Path) -> None:
    """A device with a dead clock slept through the change: the renewal would follow the link, but needs the time."""
    house.serving = second_ca(tmp_path)
    house.published = house.serving.pem + house.ca.link(house.serving) + house.ca.pem
    assert house.ask(house.honest, house.honest) == [NOW_MS, NOW_MS]
    # Nothing of the question is sent before the link holds, and the link is believed from then on.
    assert [request.path for request in house.requests] == ["/v1/ca", "/v1/time", "/v1/time"]


def test_a_hub_of_another_ca_without_a_link_is_not_asked_for_the_time(house: House, tmp_path: Path) -> None:
    house.serving = impostor = second_ca(tmp_path)
    for published in (
        b"",
        impostor.pem,
        impostor.pem + house.ca.pem,
        impostor.pem + impostor.link(impostor) + house.ca.pem,
    ):
        house.published = published
        assert house.ask(house.honest) == ["transfer.hub_certificate"]
        assert [request.path for request in house.requests] == ["/v1/ca"]
