"""The fetcher against a real TLS server that misbehaves in every way a hub or a network can."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.shelf import FileShelf
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import dated_context
from shared.errors import TransferCorrupt, TransferRefused, Unreachable
from shared.ids import Digest
from shared.model import FileRef
from tests.fakes.https import HttpsServer, Reply, Request, answer
from tests.fakes.pki import TestCa
from tests.fakes.shelf import FakeShelf

DATA = bytes(range(256)) * 2000
FILE = FileRef(path="models/a/1.0.0/int8.onnx", length=len(DATA), digest=Digest(hashlib.sha256(DATA).hexdigest()))


@pytest.fixture
def ca(tmp_path: Path) -> TestCa:
    return TestCa(tmp_path)


def fetcher(ca: TestCa, url: str, *, stall_ms: int = 5000) -> HubFetcher:
    pair = ca.client("dev-a")
    context = dated_context(ca.path, now_ms=SystemClock().wall_ms, certificate_path=pair.certificate, key_path=pair.key)
    return HubFetcher(hub_url=url, context=context, clock=SystemClock(), stall_ms=stall_ms)


def serve_range(request: Request, handler: BaseHTTPRequestHandler) -> None:
    wanted = request.headers.get("Range")
    if wanted is None:
        answer(handler, 200, DATA, headers={"ETag": f'"{FILE.digest}"'})
        return
    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
    content_range = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
    answer(handler, 206, DATA[start:], headers={"Content-Range": content_range})


def fetch(ca: TestCa, reply: Reply, shelf: FakeShelf, *, stall_ms: int = 5000) -> list[Request]:
    with HttpsServer(ca, reply) as server:
        try:
            asyncio.run(fetcher(ca, server.url, stall_ms=stall_ms).blob(FILE, shelf))
        finally:
            seen = server.requests
    return seen


def test_a_file_is_fetched_with_the_devices_certificate(ca: TestCa) -> None:
    shelf = FakeShelf()
    (request,) = fetch(ca, serve_range, shelf)
    assert shelf.files[FILE.digest] == DATA
    assert (request.path, request.peer) == (f"/v1/blobs/{FILE.digest}", "dev-a")
    assert fetch(ca, serve_range, shelf) == []


def test_a_transfer_that_was_given_up_does_not_meet_the_next_one_at_the_shelf(ca: TestCa, tmp_path: Path) -> None:
    hashing, go_on = threading.Event(), threading.Event()
    shelf = FileShelf(tmp_path)
    publish = shelf.publish

    def slow_publish(file: FileRef) -> None:
        hashing.set()
        assert go_on.wait(10)
        publish(file)

    shelf.publish = slow_publish  # type: ignore[method-assign]

    async def story(url: str) -> None:
        device = fetcher(ca, url)
        first = asyncio.create_task(device.blob(FILE, shelf))
        await asyncio.to_thread(hashing.wait, 10)
        first.cancel()
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        await device.blob(FILE, shelf)

    with HttpsServer(ca, serve_range) as server:
        asyncio.run(story(server.url))
        assert len(server.requests) == 1
    assert shelf.has(FILE.digest)


@pytest.mark.parametrize("kept", [len(DATA), len(DATA) // 2])
def test_a_damaged_part_is_fetched_anew(ca: TestCa, kept: int) -> None:
    shelf = FakeShelf()
    shelf.append(FILE.digest, bytes(kept), offset=0)
    requests = fetch(ca, serve_range, shelf)
    assert shelf.files[FILE.digest] == DATA
    assert requests[-1].headers.get("Range") is None


def test_a_broken_transfer_resumes_where_it_stopped(ca: TestCa) -> None:
    def broken(request: Request, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        handler.wfile.write(DATA[:300_000])

    shelf = FakeShelf()
    with pytest.raises(Unreachable):
        fetch(ca, broken, shelf)
    assert 0 < shelf.resume_at(FILE.digest) <= 300_000
    stopped = shelf.resume_at(FILE.digest)
    (request,) = fetch(ca, serve_range, shelf)
    assert request.headers["Range"] == f"bytes={stopped}-"
    assert request.headers["If-Range"] == f'"{FILE.digest}"'
    assert shelf.files[FILE.digest] == DATA


def test_a_server_without_ranges_begins_again(ca: TestCa) -> None:
    shelf = FakeShelf()
    shelf.append(FILE.digest, b"x" * 1000, offset=0)
    fetch(ca, lambda _, handler: answer(handler, 200, DATA), shelf)
    assert shelf.files[FILE.digest] == DATA


@pytest.mark.parametrize("part", [DATA, b"y" * len(DATA), DATA + b"!"], ids=["whole", "altered", "too long"])
def test_a_part_that_is_long_enough_is_judged_first(ca: TestCa, part: bytes) -> None:
    shelf = FakeShelf()
    shelf.append(FILE.digest, part, offset=0)
    requests = fetch(ca, serve_range, shelf)
    assert shelf.files[FILE.digest] == DATA
    assert len(requests) == (0 if part == DATA else 1)


def test_a_range_that_the_server_no_longer_has_begins_again(ca: TestCa) -> None:
    def reply(request: Request, handler: BaseHTTPRequestHandler) -> None:
        answer(handler, 416) if "Range" in request.headers else answer(handler, 200, DATA)

    shelf = FakeShelf()
    shelf.append(FILE.digest, b"x" * 1000, offset=0)
    assert len(fetch(ca, reply, shelf)) == 2
    assert shelf.files[FILE.digest] == DATA


@pytest.mark.parametrize(
    "reply",
    [
        lambda _, handler: answer(handler, 200, DATA + b"more"),
        lambda _, handler: answer(handler, 200, b"!" + DATA[1:]),
        lambda _, handler: answer(handler, 200, DATA[:-1]),
        lambda _, handler: answer(handler, 206, DATA, headers={"Content-Range": f"bytes 7-{len(DATA)}/{len(DATA)}"}),
    ],
    ids=["endless", "altered", "short", "other range"],
)
def test_what_is_not_the_file_is_corrupt_and_not_kept(ca: TestCa, reply: Reply) -> None:
    shelf = FakeShelf()
    with pytest.raises(TransferCorrupt):
        fetch(ca, reply, shelf)
    assert shelf.files == {}


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (404, TransferRefused, "transfer.not_found"),
        (403, TransferRefused, "transfer.refused"),
        (302, TransferRefused, "transfer.refused"),
        (429, Unreachable, "transfer.unreachable"),
        (503, Unreachable, "transfer.unreachable"),
    ],
)
def test_statuses_say_whether_to_try_again(ca: TestCa, status: int, kind: type[Exception], code: str) -> None:
    with pytest.raises(kind) as caught:
        fetch(ca, lambda _, handler: answer(handler, status, headers={"Location": "https://elsewhere/"}), FakeShelf())
    assert getattr(caught.value, "code", "") == code


def dripping(ended: threading.Event) -> Callable[[Request, BaseHTTPRequestHandler], None]:
    def reply(_: Request, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.send_header("Connection", "close")
        handler.end_headers()
        for byte in DATA:
            handler.wfile.write(bytes([byte]))
            if ended.wait(0.02):
                return

    return reply


def test_a_server_that_drips_is_given_up(ca: TestCa) -> None:
    ended = threading.Event()
    shelf = FakeShelf()
    with pytest.raises(Unreachable) as caught:
        fetch(ca, dripping(ended), shelf, stall_ms=300)
    ended.set()
    assert caught.value.code == "transfer.stalled"
    assert shelf.resume_at(FILE.digest) > 0


def test_attack_9_a_server_just_above_the_stall_rule_meets_a_deadline_that_grows_with_the_length(ca: TestCa) -> None:
    ended = threading.Event()
    sent = 0

    def trickle(_: Request, handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(DATA)))
        handler.end_headers()
        while sent < len(DATA) and not ended.wait(0.01):
            handler.wfile.write(DATA[sent : sent + 1500])
            sent += 1500

    shelf, pair = FakeShelf(), ca.client("dev-a")
    context = dated_context(ca.path, now_ms=SystemClock().wall_ms, certificate_path=pair.certificate, key_path=pair.key)
    with HttpsServer(ca, trickle) as server:
        link = HubFetcher(
            hub_url=server.url, context=context, clock=SystemClock(), stall_ms=100, slowest_bytes_s=100 * len(DATA)
        )
        with pytest.raises(Unreachable) as caught:
            asyncio.run(link.blob(FILE, shelf))
        ended.set()
    assert caught.value.code == "transfer.slow"
    assert 0 < shelf.resume_at(FILE.digest) < len(DATA)


def test_attack_2_a_body_without_end_and_without_a_length_is_cut_where_the_file_ends(ca: TestCa) -> None:
    ended = threading.Event()

    def endless(_: Request, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while not ended.is_set():
            handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    shelf = FakeShelf()
    with pytest.raises(TransferCorrupt) as caught:
        fetch(ca, endless, shelf)
    ended.set()
    assert caught.value.code == "transfer.too_large"
    assert shelf.resume_at(FILE.digest) <= len(DATA)


@pytest.mark.parametrize("ranges", [True, False])
def test_no_more_is_taken_than_was_allowed_also_from_a_server_without_ranges(ca: TestCa, ranges: bool) -> None:
    def reply(request: Request, handler: BaseHTTPRequestHandler) -> None:
        if not ranges:
            answer(handler, 200, DATA)
            return
        first, last = request.headers["Range"].removeprefix("bytes=").split("-")
        body = DATA[int(first) : int(last) + 1]
        answer(handler, 206, body, headers={"Content-Range": f"bytes {first}-{last}/{len(DATA)}"})

    shelf = FakeShelf()
    with HttpsServer(ca, reply) as server:
        for end in (1000, 2000):
            asyncio.run(fetcher(ca, server.url).blob(FILE, shelf, up_to=end))
            assert shelf.parts[FILE.digest] == DATA[:end]
        seen = [request.headers.get("Range") for request in server.requests]
    assert seen == ["bytes=0-999", "bytes=1000-1999"]


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200 OK\r\nX-Drip: "], ids=["nothing", "headers"])
def test_a_server_that_never_answers_is_given_up(ca: TestCa, part: bytes) -> None:
    ended = threading.Event()

    def reply(_: Request, handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(part)
        while part and not ended.wait(0.05):
            handler.wfile.write(b"x")
        ended.wait(10)

    with pytest.raises(Unreachable):
        fetch(ca, reply, FakeShelf(), stall_ms=200)
    ended.set()


def test_cancelling_ends_the_transfer(ca: TestCa) -> None:
    ended = threading.Event()

    async def story(url: str, shelf: FakeShelf) -> None:
        task = asyncio.get_running_loop().create_task(fetcher(ca, url, stall_ms=60_000).blob(FILE, shelf))
        while not shelf.resume_at(FILE.digest):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with HttpsServer(ca, dripping(ended)) as server:
        asyncio.run(story(server.url, FakeShelf()))
        ended.set()


def test_metadata_is_bounded_and_may_be_missing(ca: TestCa) -> None:
    def reply(request: Request, handler: BaseHTTPRequestHandler) -> None:
        known = {"/v1/metadata/1.models%2Fdigits.json": b"{}", "/v1/metadata/timestamp.json": b"x" * 101}
        body = known.get(request.path)
        answer(handler, 404) if body is None else answer(handler, 200, body)

    with HttpsServer(ca, reply) as server:
        link = fetcher(ca, server.url)
        assert asyncio.run(link.metadata("1.models%2Fdigits.json", max_bytes=100)) == b"{}"
        assert asyncio.run(link.metadata("1.models/digits.json", max_bytes=2)) == b"{}"
        assert asyncio.run(link.metadata("9.root.json", max_bytes=100)) is None
        with pytest.raises(TransferCorrupt) as caught:
            asyncio.run(link.metadata("timestamp.json", max_bytes=100))
    assert caught.value.code == "transfer.too_large"


def test_bytes_are_put_and_the_hubs_word_decides(ca: TestCa) -> None:
    statuses = {"/v1/rounds/r/replies/a": 201, "/v1/rounds/r/replies/late": 409, "/v1/rounds/r/replies/busy": 503}

    def reply(request: Request, handler: BaseHTTPRequestHandler) -> None:
        answer(handler, statuses[request.path], b"{}")

    with HttpsServer(ca, reply) as server:
        link = fetcher(ca, server.url)
        asyncio.run(link.upload("/v1/rounds/r/replies/a", DATA))
        with pytest.raises(TransferRefused):
            asyncio.run(link.upload("/v1/rounds/r/replies/late", b"x"))
        with pytest.raises(Unreachable):
            asyncio.run(link.upload("/v1/rounds/r/replies/busy", b""))
        first = server.requests[0]
    assert (first.method, first.body, first.peer) == ("PUT", DATA, "dev-a")
    assert first.headers["Content-Length"] == str(len(DATA))
    assert [request.body for request in server.requests[1:]] == [b"x", b""]


def test_an_upload_to_a_hub_that_never_answers_is_given_up(ca: TestCa) -> None:
    ended = threading.Event()

    def silent(request: Request, handler: BaseHTTPRequestHandler) -> None:
        ended.wait(20)

    with HttpsServer(ca, silent) as server:
        with pytest.raises(Unreachable):
            asyncio.run(fetcher(ca, server.url, stall_ms=200).upload("/v1/rounds/r/replies/a", b"x" * 100))
        ended.set()


def test_only_the_pinned_ca_is_trusted_and_foreign_devices_are_refused(ca: TestCa, tmp_path: Path) -> None:
    foreign = TestCa(tmp_path, name="foreign-ca")
    with HttpsServer(foreign, serve_range) as server, pytest.raises(TransferRefused) as caught:
        asyncio.run(fetcher(ca, server.url).blob(FILE, FakeShelf()))
    assert caught.value.code == "transfer.hub_certificate"
    assert caught.value.hint


def test_nobody_there_is_unreachable(ca: TestCa, free_port: int) -> None:
    with pytest.raises(Unreachable) as caught:
        asyncio.run(fetcher(ca, f"https://localhost:{free_port}").blob(FILE, FakeShelf()))
    assert caught.value.retry
