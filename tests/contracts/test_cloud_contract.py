"""What every implementation of ports.Cloud must do, the fake and the real one; then what only real sockets can do."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from edge_agent.adapters.cloud import CONNECTIONS, HubCloud
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import dated_context
from edge_agent.ports import Cloud, CloudAnswer, CloudRefusal
from shared.errors import InputRefused, OutriderError, TransferCorrupt, TransferRefused, Unreachable
from shared.inference import TensorHead
from shared.limits import MAX_CLOUD_ANSWER_BYTES
from shared.wire.oip import JSON_LENGTH_HEADER, OipResponse, decode_request, encode_response
from shared.wire.oip_terms import Provenance, write_provenance
from tests.fakes.cloud import FakeCloud, cloud_answer
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import TestCa

pytestmark = pytest.mark.live

HEAD = (TensorHead(name="x", dtype="fp32", shape=(1, 4)),)
PAYLOAD = struct.pack("<4f", 1, 2, 3, 4)


def tell(
    handler: BaseHTTPRequestHandler,
    *,
    labels: tuple[str, ...] = ("7",),
    confidence: float = 0.99,
    model: str = "digits-large",
    version: str = "3.0.0",
    variant: str = "fp32",
    digest: str = "c" * 64,
    keep: bool = True,
) -> None:
    """A whole answer of the larger model."""
    said = Provenance(rung="full", digest=digest, variant=variant, labels=labels, confidences=(confidence,))
    response = OipResponse(
        model=model,
        version=version,
        outputs=(TensorHead(name="y", dtype="fp32", shape=(1, 2)),),
        payload=(bytes(range(8)),),
        parameters=write_provenance(said),
    )
    length, parts = encode_response(response, binary={"y"})
    handler.close_connection = not keep
    answer(handler, 200, b"".join(bytes(part) for part in parts), headers={JSON_LENGTH_HEADER: str(length)})


class Hub:
    """A real server that does as the test says, and an adapter that asks it."""

    def __init__(self, folder: Path) -> None:
        self.ca = TestCa(folder)
        pair = self.ca.client("dev-1")
        self.context = dated_context(
            self.ca.path, now_ms=SystemClock().wall_ms, certificate_path=pair.certificate, key_path=pair.key
        )
        self.reply: Callable[[Request, BaseHTTPRequestHandler], None] = lambda _, handler: tell(handler)
        self.go_on = threading.Event()
        self.connections: set[object] = set()
        self.server = HttpsServer(self.ca, self._reply, needs_client=True)
        self.cloud = HubCloud(hub_url=self.server.url, context=self.context, clock=SystemClock())

    def _reply(self, request: Request, handler: BaseHTTPRequestHandler) -> None:
        self.connections.add(handler.client_address)
        self.reply(request, handler)

    def stall(self, _: Request, handler: BaseHTTPRequestHandler) -> None:
        self.go_on.wait(20)

    def close(self) -> None:
        self.go_on.set()
        self.cloud.close()
        self.server.__exit__()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    try:
        yield hub
    finally:
        hub.close()


async def ask(cloud: Cloud, *, within_ms: int = 5_000) -> CloudAnswer | CloudRefusal:
    return await cloud.ask("digits-large", HEAD, PAYLOAD, deadline_ms=100, within_ms=within_ms)


Prepared = tuple[Cloud, Callable[[str], None]]


@pytest.fixture(params=["fake", "real"])
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Prepared]:
    """The cloud, and how it is told what to do."""
    if request.param == "fake":
        fake = FakeCloud()

        def say(what: str) -> None:
            fake.stalls = what == "stall"
            if what == "busy":
                fake.says = CloudRefusal(status=429, message="queue full", retry_after_ms=3_000)
            elif what == "garbage":
                fake.says = TransferCorrupt("what came is no answer")
            elif what == "reset":
                fake.says = Unreachable("the connection broke")

        yield fake, say
        return
    hub = Hub(tmp_path)

    def tell_hub(what: str) -> None:
        replies: dict[str, Callable[[Request, BaseHTTPRequestHandler], None]] = {
            "stall": hub.stall,
            "busy": lambda _, handler: answer(
                handler, 429, json.dumps({"error": "queue full"}).encode(), headers={"Retry-After": "3"}
            ),
            "garbage": lambda _, handler: answer(handler, 200, b"\xff\x00 no JSON"),
            "reset": lambda _, handler: handler.request.shutdown(socket.SHUT_RDWR),
        }
        hub.reply = replies[what]

    try:
        yield hub.cloud, tell_hub
    finally:
        hub.close()


def test_an_answer_carries_label_confidence_and_what_gave_it(prepared: Prepared) -> None:
    cloud, _ = prepared
    said = asyncio.run(ask(cloud))
    assert isinstance(said, CloudAnswer)
    wanted = cloud_answer()
    assert (said.label, said.confidence, said.model, said.version, said.variant, said.digest) == (
        wanted.label, wanted.confidence, wanted.model, wanted.version, wanted.variant, wanted.digest,
    )  # fmt: skip
    assert said.outputs == wanted.outputs
    assert [bytes(part) for part in said.payload] == [bytes(part) for part in wanted.payload]
    assert said.size_bytes > 0


def test_a_no_is_a_value_with_what_the_hub_asked_for(prepared: Prepared) -> None:
    cloud, say = prepared
    say("busy")
    assert asyncio.run(ask(cloud)) == CloudRefusal(status=429, message="queue full", retry_after_ms=3_000)


@pytest.mark.parametrize(("what", "error"), [("garbage", TransferCorrupt), ("reset", Unreachable)])
def test_what_is_no_answer_is_an_error(prepared: Prepared, what: str, error: type[OutriderError]) -> None:
    cloud, say = prepared
    say(what)
    with pytest.raises(error):
        asyncio.run(ask(cloud))


def test_a_hub_that_accepts_and_never_answers_is_given_up_in_time(prepared: Prepared) -> None:
    cloud, say = prepared
    say("stall")

    async def main() -> None:
        async with asyncio.timeout(5):
            with pytest.raises(Unreachable):
                await ask(cloud, within_ms=100)

    asyncio.run(main())


def test_a_question_that_nobody_waits_for_any_more_ends(prepared: Prepared) -> None:
    cloud, say = prepared
    say("stall")

    async def main() -> None:
        async with asyncio.timeout(5):
            asking = asyncio.create_task(ask(cloud, within_ms=60_000))
            await asyncio.sleep(0.05)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(main())


def test_closing_ends_what_is_on_its_way(prepared: Prepared) -> None:
    cloud, say = prepared
    say("stall")

    async def main() -> None:
        async with asyncio.timeout(5):
            asking = asyncio.create_task(ask(cloud, within_ms=60_000))
            await asyncio.sleep(0.05)
            cloud.close()
            with pytest.raises(Unreachable):
                await asking
            cloud.close()

    asyncio.run(main())


def test_a_payload_that_does_not_fit_its_heads_is_the_askers_fault(prepared: Prepared) -> None:
    cloud, _ = prepared

    async def main() -> None:
        for payload in (PAYLOAD[:-1], PAYLOAD + b"x", b""):
            with pytest.raises(InputRefused):
                await cloud.ask("digits-large", HEAD, payload, deadline_ms=100, within_ms=5_000)
        assert isinstance(await ask(cloud), CloudAnswer)

    asyncio.run(main())


def test_a_deadline_beyond_all_measure_is_only_a_long_one(prepared: Prepared) -> None:
    cloud, _ = prepared

    async def main() -> None:
        async with asyncio.timeout(10):
            said = await cloud.ask("digits-large", HEAD, PAYLOAD, deadline_ms=2**63 - 1, within_ms=2**63 + 5_000)
        assert isinstance(said, CloudAnswer)

    asyncio.run(main())


# Real sockets only


def test_the_question_is_the_open_inference_protocol_with_the_devices_certificate(hub: Hub) -> None:
    asyncio.run(ask(hub.cloud))
    (request,) = hub.server.requests
    assert (request.method, request.path, request.peer) == ("POST", "/v2/models/digits-large/infer", "dev-1")
    decoded = decode_request(request.body, json_length=int(request.headers[JSON_LENGTH_HEADER]))
    assert decoded.inputs == HEAD
    assert bytes(decoded.payload[0]) == PAYLOAD
    assert decoded.deadline_ms(default_ms=0) == 100
    assert decoded.parameters["binary_data_output"] is True


def test_connections_are_kept(hub: Hub) -> None:
    async def main() -> None:
        for _ in range(5):
            await ask(hub.cloud)

    asyncio.run(main())
    assert len(hub.server.requests) == 5
    assert len(hub.connections) == 1


def test_a_kept_connection_that_the_hub_closed_is_replaced(hub: Hub) -> None:
    hub.reply = lambda _, handler: tell(handler, keep=False)

    async def main() -> None:
        for _ in range(3):
            said = await ask(hub.cloud)
            assert isinstance(said, CloudAnswer)

    asyncio.run(main())
    assert len(hub.connections) == 3


def test_a_kept_connection_that_breaks_under_the_question_is_replaced_once(hub: Hub) -> None:
    def reply(_: Request, handler: BaseHTTPRequestHandler) -> None:
        if len(hub.server.requests) == 2:
            handler.request.shutdown(socket.SHUT_RDWR)
        else:
            tell(handler)

    hub.reply = reply

    async def main() -> None:
        assert isinstance(await ask(hub.cloud), CloudAnswer)
        assert isinstance(await ask(hub.cloud), CloudAnswer)

    asyncio.run(main())
    assert len(hub.server.requests) == 3


def trickle(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """Headers that never end, a byte at a time."""
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000:
        handler.wfile.write(bytes((byte,)))
        time.sleep(0.02)


def trickle_body(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """A body that never ends, a byte at a time."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _number in range(10_000):
        handler.wfile.write(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize("reply", [trickle, trickle_body])
def test_a_hub_that_drips_is_cut_off_in_time(
    hub: Hub, reply: Callable[[Request, BaseHTTPRequestHandler], None]
) -> None:
    hub.reply = reply

    async def main() -> None:
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            for _ in range(CONNECTIONS):
                tasks.create_task(refused(hub.cloud, within_ms=150))
        hub.reply = lambda _, handler: tell(handler)
        assert isinstance(await ask(hub.cloud), CloudAnswer)  # no thread is left behind at it

    asyncio.run(main())


def endless(_: Request, handler: BaseHTTPRequestHandler) -> None:
    """More than anybody asked for."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    block = bytes(65_536)
    for _number in range(MAX_CLOUD_ANSWER_BYTES // len(block) + 2):
        handler.wfile.write(b"10000\r\n" + block + b"\r\n")


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (endless, TransferCorrupt),
        (lambda _, handler: tell(handler, labels=("x" * 2_000,)), TransferCorrupt),
        (lambda _, handler: tell(handler, confidence=7.5), TransferCorrupt),
        (lambda _, handler: tell(handler, labels=("1", "2")), TransferCorrupt),
        (lambda _, handler: tell(handler, model="x" * 129), TransferCorrupt),
        (lambda _, handler: tell(handler, version="x" * 129), TransferCorrupt),
        (lambda _, handler: tell(handler, variant="x" * 129), TransferCorrupt),
        (lambda _, handler: tell(handler, digest="x" * 129), TransferCorrupt),
        (lambda _, handler: answer(handler, 200, b"{}", headers={JSON_LENGTH_HEADER: "-1"}), TransferCorrupt),
        (lambda _, handler: answer(handler, 200, b"{}", headers={JSON_LENGTH_HEADER: "9999"}), TransferCorrupt),
        (lambda _, handler: answer(handler, 200, b"x" * 10, headers={"Content-Length": "100"}), Unreachable),
        (lambda _, handler: handler.wfile.write(b"this is not HTTP\r\n\r\n"), Unreachable),
    ],
)
def test_every_kind_of_garbage_is_an_error_and_the_next_question_works(
    hub: Hub, reply: Callable[[Request, BaseHTTPRequestHandler], None], error: type[OutriderError]
) -> None:
    hub.reply = reply

    async def main() -> None:
        with pytest.raises(error):
            await ask(hub.cloud)
        hub.reply = lambda _, handler: tell(handler)
        assert isinstance(await ask(hub.cloud), CloudAnswer)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("header", "expected_ms"),
    [("0", 0), ("7", 7_000), ("999999999", 86_400_000), ("Fri, 31 Dec 2027 23:59:59 GMT", None), ("-1", None)],
)
def test_retry_after_is_read_in_seconds_and_bounded(hub: Hub, header: str, expected_ms: int | None) -> None:
    hub.reply = lambda _, handler: answer(handler, 503, b"", headers={"Retry-After": header})
    said = asyncio.run(ask(hub.cloud))
    assert isinstance(said, CloudRefusal)
    assert (said.status, said.retry_after_ms) == (503, expected_ms)


def test_no_more_questions_are_on_their_way_than_there_are_connections(hub: Hub) -> None:
    hub.reply = hub.stall

    async def main() -> None:
        async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
            stalled = [tasks.create_task(refused(hub.cloud)) for _ in range(CONNECTIONS)]
            await asyncio.sleep(0)
            with pytest.raises(Unreachable, match="on their way"):
                await ask(hub.cloud)
            hub.cloud.close()
            assert len([await task for task in stalled]) == CONNECTIONS

    asyncio.run(main())


async def refused(cloud: Cloud, *, within_ms: int = 60_000) -> str:
    with pytest.raises(Unreachable) as caught:
        await ask(cloud, within_ms=within_ms)
    return caught.value.code


def test_nobody_there(hub: Hub) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        cloud = HubCloud(hub_url=url, context=hub.context, clock=SystemClock())
        with pytest.raises(Unreachable):
            asyncio.run(ask(cloud))
        cloud.close()


def test_a_handshake_that_never_ends(hub: Hub) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        cloud = HubCloud(hub_url=url, context=hub.context, clock=SystemClock())

        async def main() -> None:
            async with asyncio.timeout(5):
                with pytest.raises(Unreachable):
                    await ask(cloud, within_ms=150)

        asyncio.run(main())
        cloud.close()


def test_another_hubs_certificate_is_not_talked_to(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = TestCa(tmp_path / "other", name="other")
    context: ssl.SSLContext = dated_context(other.path, now_ms=SystemClock().wall_ms)
    cloud = HubCloud(hub_url=hub.server.url, context=context, clock=SystemClock())
    with pytest.raises(TransferRefused) as caught:
        asyncio.run(ask(cloud))
    assert caught.value.code == "transfer.hub_certificate"
    assert hub.server.requests == []
    cloud.close()
