"""A call of the client ends by its time, whatever the agent and other threads do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.client import AsyncClient, Client
from edge_agent.framing import build_frame
from shared.errors import Unreachable
from shared.inference import Done, Status, encode_header

GENEROUS_S = 3.0
"""For a busy machine; the calls below have 300 ms, and would take twenty seconds if their time began anew."""


@contextlib.contextmanager
def peer(path: Path, serve: Callable[[socket.socket, threading.Event], None]) -> Iterator[None]:
    """Accept connections and serve each in a thread until the end."""
    ended = threading.Event()

    def run(link: socket.socket) -> None:
        with link, contextlib.suppress(OSError):
            serve(link, ended)

    def accept() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                link, _ = listener.accept()
                threading.Thread(target=run, args=(link,), daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(0.1)
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def drip(link: socket.socket, ended: threading.Event) -> None:
    """An answer, a byte every tenth of a second."""
    frame = b"".join(bytes(part) for part in build_frame(encode_header(Done(id="x" * 100, detail="y" * 100))))
    for place in range(len(frame)):
        if ended.wait(0.1):
            return
        link.sendall(frame[place : place + 1])


def chatter(link: socket.socket, ended: threading.Event) -> None:
    """Answers to what nobody asked, one every tenth of a second."""
    while not ended.wait(0.1):
        for part in build_frame(encode_header(Done(id="somebody else's"))):
            link.sendall(part)


def silence(_: socket.socket, ended: threading.Event) -> None:
    """Nothing at all."""
    ended.wait()


@pytest.mark.parametrize("serve", [drip, chatter, silence])
def test_a_call_ends_by_its_time_however_the_agent_keeps_it_waiting(
    short_tmp: Path, serve: Callable[[socket.socket, threading.Event], None]
) -> None:
    path = short_tmp / "door.sock"
    with peer(path, serve), Client(path, timeout_ms=300) as agent:
        began = time.monotonic()
        with pytest.raises(Unreachable) as caught:
            agent.feedback("r", correct=True)
        assert time.monotonic() - began < GENEROUS_S
        assert caught.value.code == "transfer.timeout"


def test_a_call_does_not_wait_for_another_threads_beyond_its_time(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    with peer(path, silence), Client(path, timeout_ms=300) as agent:
        asked = threading.Event()

        def long() -> None:
            asked.set()
            with contextlib.suppress(Unreachable):
                agent._call(Status(id="s"), (), 20_000)

        thread = threading.Thread(target=long, daemon=True)
        thread.start()
        asked.wait()
        while not agent._lock.locked():
            time.sleep(0)
        began = time.monotonic()
        with pytest.raises(Unreachable) as caught:
            agent.reading("x", 1.0)
        assert time.monotonic() - began < GENEROUS_S
        assert caught.value.code == "transfer.busy"
        assert agent._socket is not None
        agent._socket.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_the_asyncio_client_spends_its_time_once_for_connecting_and_asking(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"

    async def main() -> None:
        with peer(path, drip):
            async with AsyncClient(path, timeout_ms=300) as agent:
                await agent._connecting.acquire()  # somebody else connects, for ever
                async with asyncio.timeout(GENEROUS_S):
                    with pytest.raises(Unreachable):
                        await agent.reading("x", 1.0)
                agent._connecting.release()

    asyncio.run(main())


@pytest.mark.parametrize("deadline_ms", [-(2**62), 2**63 - 1])
def test_no_deadline_is_too_odd_to_be_waited_for(short_tmp: Path, deadline_ms: int) -> None:
    path = short_tmp / "door.sock"

    def hang_up(link: socket.socket, _: threading.Event) -> None:
        link.recv(1)

    with peer(path, hang_up), Client(path) as agent, pytest.raises(Unreachable):
        agent.infer("m", {"x": np.zeros(1, np.float32)}, deadline_ms=deadline_ms)
