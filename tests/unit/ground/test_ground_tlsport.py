"""The HTTPS port over real TLS: who never finishes a request's head does not keep a connection."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cloud_hub.ground import tlsport
from cloud_hub.ground.ca import Authority, make_ca
from tests.fakes.hub_parts import NOW_MS

WAIT_S = 15.0
Link = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Link]]


async def count(_scope: Any, receive: Any, send: Any) -> None:
    """Answers how many bytes the body had."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    body = str(length).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def play(folder: Path, script: Callable[[Connect], Awaitable[None]]) -> None:
    """Run the port with clients that a script plays."""
    pair = make_ca(now_ms=NOW_MS, label="test")
    server = Authority(pair.certificate_pem, pair.key_pem).issue_server(["localhost"], now_ms=NOW_MS, days=1)
    for name, data in (("ca", pair.certificate_pem), ("pem", server.certificate_pem), ("key", server.key_pem)):
        (folder / name).write_bytes(data)
    blind = ssl.create_default_context()
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE

    async def run() -> None:
        ready, listener = asyncio.Event(), tlsport.bind("127.0.0.1", 0, key="listen.port")
        https = tlsport.HttpsServer(
            count, certificate=folder / "pem", key=folder / "key", ca=folder / "ca", ready=ready
        )
        async with asyncio.timeout(WAIT_S * 2), asyncio.TaskGroup() as group:
            serving = group.create_task(https.run_on(listener))
            await ready.wait()
            await script(lambda: asyncio.open_connection(*listener.getsockname(), ssl=blind))
            serving.cancel()

    asyncio.run(run())


async def is_cut(link: Link) -> bool:
    """Whether the other side ends the connection; what it still sends is passed over."""
    try:
        async with asyncio.timeout(WAIT_S):
            while await link[0].read(4096):
                pass
    except ConnectionError:
        return True
    except TimeoutError:
        return False
    finally:
        link[1].transport.abort()
    return True


async def answer(link: Link) -> bytes:
    """Status and body of one answer."""
    async with asyncio.timeout(WAIT_S):
        head = await link[0].readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return head.split()[1] + b" " + await link[0].readexactly(length)


@pytest.mark.parametrize("begun", [b"", b"\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nX: "])
@pytest.mark.parametrize("second", [False, True])
def test_a_head_that_never_ends_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bytes, second: bool
) -> None:
    monkeypatch.setattr(tlsport, "HEAD_S", 0.2)
    monkeypatch.setattr(tlsport, "_KEEP_ALIVE_S", 1)

    async def script(connect: Connect) -> None:
        link = await connect()
        if second:
            link[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await answer(link) == b"200 0"
        link[1].write(begun)
        assert await is_cut(link)

    play(tmp_path, script)


def test_a_body_may_take_longer_than_a_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tlsport, "HEAD_S", 0.2)

    async def script(connect: Connect) -> None:
        slow = await connect()
        slow[1].write(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
        await slow[1].drain()
        # Its time is over twice before the rest of the body goes out.
        assert await is_cut(await connect())
        assert await is_cut(await connect())
        slow[1].write(b"cd")
        assert await answer(slow) == b"200 4"
        slow[1].transport.abort()

    play(tmp_path, script)


def test_an_endless_head_does_not_fill_the_memory(tmp_path: Path) -> None:
    async def script(connect: Connect) -> None:
        link = await connect()
        link[1].write(b"GET / HTTP/1.1\r\nX: " + b"a" * (tlsport.MAX_HEAD_BYTES * 3))
        assert await is_cut(link)

    play(tmp_path, script)


def test_large_bodies_and_many_requests_are_no_head(tmp_path: Path) -> None:
    async def script(connect: Connect) -> None:
        link = await connect()
        size = tlsport.MAX_HEAD_BYTES * 3
        for _ in range(3):
            link[1].write(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + b"a" * size)
            assert await answer(link) == b"200 %d" % size
        link[1].transport.abort()

    play(tmp_path, script)
