"""What every fetcher does with a file, on the fake and over real HTTPS, against a hub that misbehaves in each way."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Protocol

import pytest

from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.sources import SourcedFetcher
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.tls import dated_context
from edge_agent.update_ports import Fetcher, Shelf
from shared.errors import OutriderError, TransferCorrupt, TransferRefused, Unreachable
from shared.ids import Digest
from shared.model import FileRef
from tests.fakes.fetcher import FakeFetcher
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import TestCa
from tests.fakes.shelf import FakeShelf

DATA = bytes(range(256)) * 2000
FILE = FileRef(path="models/a/1.0.0/int8.onnx", length=len(DATA), digest=Digest(hashlib.sha256(DATA).hexdigest()))
HALF = len(DATA) // 2


class Hub(Protocol):
    """What a test tells the hub to do, and the fetcher that asks it."""

    fetcher: Fetcher
    content: bytes | None
    status: int
    breaks_after: int | None
    hangs: bool

    @property
    def sent_bytes(self) -> int:
        """How much it sent of files."""
        ...


class FakeHub:
    """The fake fetcher in these words."""

    def __init__(self) -> None:
        self._fake = FakeFetcher()
        self.fetcher: Fetcher = self
        self.content: bytes | None = DATA
        self.status = 200
        self.breaks_after: int | None = None
        self.hangs = False

    @property
    def sent_bytes(self) -> int:
        return self._fake.asked_bytes

    async def metadata(self, name: str, *, max_bytes: int) -> bytes | None:
        return await self._fake.metadata(name, max_bytes=max_bytes)

    async def upload(self, path: str, data: bytes) -> None:
        await self._fake.upload(path, data)

    async def blob(self, file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        fake = self._fake
        fake.away = self.status >= 500 or self.status == 429
        fake.files = {} if self.content is None or 400 <= self.status < 429 else {FILE.digest: self.content}
        fake.breaks_after, fake.hangs = self.breaks_after, self.hangs
        await fake.blob(file, shelf, up_to=up_to)


class RealHub:
    """An HTTPS server that serves one file in ranges, and a fetcher with a device's certificate."""

    def __init__(self, folder: Path) -> None:
        ca = TestCa(folder)
        self.content: bytes | None = DATA
        self.status = 200
        self.breaks_after: int | None = None
        self.hangs = False
        self.sent_bytes = 0
        self.ended = threading.Event()
        self.server = HttpsServer(ca, self._reply, needs_client=True)
        pair = ca.client("dev-a")
        context = dated_context(
            ca.path, now_ms=SystemClock().wall_ms, certificate_path=pair.certificate, key_path=pair.key
        )
        self.fetcher: Fetcher = HubFetcher(
            hub_url=self.server.url, context=context, clock=SystemClock(), stall_ms=10_000
        )

    def _reply(self, request: Request, handler: BaseHTTPRequestHandler) -> None:
        if self.content is None or self.status != 200:
            answer(handler, 404 if self.content is None else self.status)
            return
        first, last, status, headers = 0, len(self.content) - 1, 200, {"ETag": f'"{FILE.digest}"'}
        wanted = request.headers.get("Range", "")
        if wanted and request.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(last, int(end or last)), 206
            headers["Content-Range"] = f"bytes {first}-{last}/{len(self.content)}"
        body = self.content[first : last + 1]
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if self.hangs:
            body = body[: 64 * 1024]
        if self.breaks_after is not None:
            body = body[: self.breaks_after]
        handler.wfile.write(body)
        self.sent_bytes += len(body)
        if self.hangs:
            self.ended.wait(20)


@pytest.fixture(params=["fake", "https", "mirrored"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    """`mirrored`: the same behind a mirror that has nothing."""
    if request.param == "fake":
        yield FakeHub()
        return
    real = RealHub(tmp_path)
    if request.param == "mirrored":
        real.fetcher = SourcedFetcher(hub=real.fetcher, mirrors=(FakeFetcher(),), clock=SystemClock())
    with real.server:
        yield real
        real.ended.set()


def fetch(hub: Hub, shelf: FakeShelf, *, up_to: int | None = None) -> None:
    asyncio.run(hub.fetcher.blob(FILE, shelf, up_to=up_to))


def fails(hub: Hub, shelf: FakeShelf, kind: type[OutriderError], *, up_to: int | None = None) -> OutriderError:
    with pytest.raises(kind) as caught:
        fetch(hub, shelf, up_to=up_to)
    assert not shelf.has(FILE.digest)
    return caught.value


def test_a_file_comes_whole_and_what_is_there_is_not_asked_for(hub: Hub) -> None:
    shelf = FakeShelf()
    fetch(hub, shelf)
    assert shelf.files[FILE.digest] == DATA
    sent = hub.sent_bytes
    fetch(hub, shelf)
    assert hub.sent_bytes == sent == len(DATA)


def test_what_broke_off_is_resumed_and_not_sent_twice(hub: Hub) -> None:
    shelf = FakeShelf()
    hub.breaks_after = 100_000
    assert fails(hub, shelf, Unreachable).retry
    assert 0 < shelf.resume_at(FILE.digest) <= 100_000
    stopped = shelf.resume_at(FILE.digest)
    hub.breaks_after = None
    before = hub.sent_bytes
    fetch(hub, shelf)
    assert shelf.files[FILE.digest] == DATA
    assert hub.sent_bytes - before == len(DATA) - stopped


def test_a_transfer_stops_where_it_is_told_to_and_goes_on_from_there(hub: Hub) -> None:
    shelf = FakeShelf()
    for end in (1, HALF, HALF, len(DATA) - 1):
        fetch(hub, shelf, up_to=end)
        assert shelf.resume_at(FILE.digest) == end
        assert not shelf.has(FILE.digest)
        assert hub.sent_bytes == end
    fetch(hub, shelf, up_to=len(DATA))
    assert shelf.files[FILE.digest] == DATA
    assert hub.sent_bytes == len(DATA)


@pytest.mark.parametrize(
    "content", [DATA + b"more" * 1000, DATA[:-1], b"!" + DATA[1:]], ids=["too long", "too short", "altered"]
)
@pytest.mark.parametrize("up_to", [None, len(DATA)])
def test_attack_2_and_6_what_is_not_the_file_is_corrupt_and_gets_no_name(
    hub: Hub, content: bytes, up_to: int | None
) -> None:
    shelf = FakeShelf()
    hub.content = content
    assert not fails(hub, shelf, TransferCorrupt, up_to=up_to).retry
    assert hub.sent_bytes <= len(DATA) + len(b"more" * 1000)
    hub.content = DATA
    fetch(hub, shelf)
    assert shelf.files[FILE.digest] == DATA


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, TransferRefused), (404, TransferRefused), (429, Unreachable), (500, Unreachable), (503, Unreachable)],
)
def test_a_no_is_final_and_trouble_is_not(hub: Hub, status: int, kind: type[OutriderError]) -> None:
    shelf = FakeShelf()
    shelf.append(FILE.digest, DATA[:HALF], offset=0)
    hub.status = status
    assert fails(hub, shelf, kind).retry == (kind is Unreachable)
    assert shelf.resume_at(FILE.digest) == HALF


def test_a_file_that_the_hub_does_not_have_is_refused_as_such(hub: Hub) -> None:
    hub.content = None
    assert fails(hub, FakeShelf(), TransferRefused).code == "transfer.not_found"


def test_a_transfer_that_hangs_is_given_up_when_asked_and_the_next_one_goes_on(hub: Hub) -> None:
    shelf = FakeShelf()
    hub.hangs = True

    async def story() -> None:
        task = asyncio.create_task(hub.fetcher.blob(FILE, shelf))
        async with asyncio.timeout(15):
            while not shelf.resume_at(FILE.digest):
                await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hub.hangs = False
        await hub.fetcher.blob(FILE, shelf)

    asyncio.run(story())
    assert shelf.files[FILE.digest] == DATA
