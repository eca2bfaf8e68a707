"""What no client should send to the door over HTTP, and what is bounded when one does."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
from pathlib import Path

import numpy as np
import pytest

from edge_agent.adapters import door as door_module
from edge_agent.adapters import http_door, waiting
from edge_agent.client import Client
from shared import limits
from tests.fakes.oip_place import Agent, Place, at, http_of, read_all, request, until

pytestmark = pytest.mark.live


@pytest.mark.parametrize("json_length", ["0", "-1", "x", "99999", "9" * 30, " 5 5 "])
def test_a_wrong_length_of_the_json_is_refused(short_tmp: Path, json_length: str) -> None:
    def work(place: Place) -> None:
        body = json.dumps(request()).encode()
        status, _, said = place.ask(
            "POST", "/v2/models/double/infer", body, Inference_Header_Content_Length=json_length
        )
        assert (status, said["code"]) == (400, "model.request")

    at(short_tmp / "door.sock", Agent().handle, work)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\0\1\2\3 nothing\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\n\r\n", 400),
        (b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET  /v2\r\n\r\n", 400),
        (http_of(b"", "Content-Length: 5", "Content-Length: 6"), 400),
        (http_of(b"", "Content-Length: -5"), 400),
        (http_of(b"", "Content-Length: " + "9" * 19), 413),
        (http_of(b"", f"Content-Length: {limits.MAX_FRAME_PAYLOAD_BYTES * 2}"), 413),
        (http_of(b"", "Transfer-Encoding: gzip"), 501),
        (http_of(b"zz\r\n", "Transfer-Encoding: chunked"), 400),
        (http_of(b"", "A: " + "b" * 20_000), 431),
        (b"GET /" + b"a" * 300_000, 431),
        (http_of(b"", *(f"H{number}: v" for number in range(4000))), 431),
        (http_of(b"", "Origin: https://evil.example"), 403),
        (http_of(b"", "Origin: null"), 403),
        (b"GET /v2 HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
        (b"GET /v2 HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n", 403),
        (b"GET /v2 HTTP/1.1\r\nHost: 127.0.0.1.evil.example:80\r\n\r\n", 403),
        (http_of(b"abc", "Content-Length: 9"), 400),
    ],
)
def test_what_is_no_request_ends_with_its_reason(short_tmp: Path, sent: bytes, status: int) -> None:
    agent = Agent()

    def work(place: Place) -> None:
        with place.raw() as stream:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                stream.sendall(sent)
                stream.shutdown(socket.SHUT_WR)
            data = read_all(stream)
        assert data.startswith(b"HTTP/1.1 %d " % status)
        head, _, body = data.partition(b"\r\n\r\n")
        assert b"connection: close" in head.lower()
        assert json.loads(body)["error"]
        assert place.ask("GET", "/v2/health/live")[0] == 200

    at(short_tmp / "door.sock", agent.handle, work)
    assert agent.asked == []


def test_names_of_this_machine_are_taken(short_tmp: Path) -> None:
    def work(place: Place) -> None:
        for host in ("localhost", "LOCALHOST:8090", "127.0.0.1:8090", "127.1.2.3", "[::1]:8090"):
            assert place.ask("GET", "/v2", Host=host, Origin=f"http://{host}")[0] == 200
        with place.raw(unix=True) as stream:  # the socket's file mode is its guard; any name will do there
            stream.sendall(b"GET /v2 HTTP/1.1\r\nHost: door\r\nConnection: close\r\n\r\n")
            assert read_all(stream).startswith(b"HTTP/1.1 200 ")

    at(short_tmp / "door.sock", Agent().handle, work)


@pytest.mark.parametrize(
    ("phase", "sent", "status"),
    [
        ("idle", b"", b""),
        ("head", b"GET /v2 HTT", b"HTTP/1.1 408 "),
        ("body", http_of(b"some", "Content-Length: 9"), b"HTTP/1.1 408 "),
    ],
)
def test_patience_ends(
    short_tmp: Path, monkeypatch: pytest.MonkeyPatch, phase: http_door.Phase, sent: bytes, status: bytes
) -> None:
    monkeypatch.setitem(http_door.PATIENCE_S, phase, 0.1)

    def work(place: Place) -> None:
        with place.raw() as stream:
            stream.sendall(sent)
            assert read_all(stream)[: len(status) or None] == status
        with place.raw() as stream:  # also after a request that was answered
            stream.sendall(http_of(b"", start="GET /v2 HTTP/1.1") + sent)
            assert read_all(stream).count(b"HTTP/1.1 ") == (2 if sent else 1)

    at(short_tmp / "door.sock", Agent().handle, work)


def test_a_byte_at_a_time_does_not_buy_time(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(http_door.PATIENCE_S, "head", 0.3)

    def work(place: Place) -> None:
        with place.raw() as stream:
            stream.settimeout(0.02)
            for _ in range(500):
                try:
                    stream.sendall(b"G")
                    data = stream.recv(1000)
                except TimeoutError:
                    continue
                break
            assert data.startswith(b"HTTP/1.1 408 ")

    at(short_tmp / "door.sock", Agent().handle, work)


def test_who_does_not_read_is_cut_off(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_door, "CLOGGED_S", 0.2)
    values = np.zeros(4 * limits.MIB, dtype=np.float32)
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x",
                    "datatype": "FP32",
                    "shape": [len(values)],
                    "parameters": {"binary_data_size": values.nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()

    def work(place: Place) -> None:
        with place.raw() as stream:
            length = len(head) + values.nbytes
            stream.sendall(http_of(head, f"Content-Length: {length}", f"Inference-Header-Content-Length: {len(head)}"))
            stream.sendall(values.tobytes())
            until(lambda: len(place.door._http_streams) == 1)
            until(lambda: not place.door._http_streams)
            assert len(read_all(stream)) < values.nbytes

    at(short_tmp / "door.sock", Agent().handle, work)


def test_what_waits_is_bounded_over_both_dialects(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_HELD_BYTES", 3 * limits.MIB)
    monkeypatch.setattr(limits, "MAX_WAITING_REQUESTS", 3)
    agent = Agent()

    def work(place: Place) -> None:
        agent.hold = asyncio.Event()
        size = 1_000_000
        tensor = {"name": "x", "datatype": "FP32", "shape": [size // 4], "parameters": {"binary_data_size": size}}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        lengths = f"Content-Length: {len(head) + size}", f"Inference-Header-Content-Length: {len(head)}"
        big = http_of(head, *lengths) + bytes(size)
        with contextlib.ExitStack() as stack:
            links = [stack.enter_context(place.raw()) for _ in range(2)]
            for link in links:
                link.sendall(big)
            until(lambda: len(agent.asked) == 2)
            got, headers, said = place.ask(
                "POST", "/v2/models/double/infer", gzip.compress(b" " * 2 * limits.MIB), Content_Encoding="gzip"
            )
            assert (got, said["code"], headers["retry-after"]) == (429, "overload.memory", "1")
            third = stack.enter_context(place.raw(unix=True))
            third.sendall(http_of(json.dumps(request()).encode(), f"Content-Length: {len(json.dumps(request()))}"))
            until(lambda: len(agent.asked) == 3)
            got, headers, said = place.infer()
            assert (got, said["code"], headers["retry-after"]) == (429, "overload", "1")
            place.loop.call_soon_threadsafe(agent.hold.set)
            for link in (*links, third):
                assert link.recv(12) == b"HTTP/1.1 200"
        for _ in range(4):  # each has given its place back
            with place.raw() as link:
                link.sendall(big)
                assert link.recv(12) == b"HTTP/1.1 200"

    at(short_tmp / "door.sock", agent.handle, work)


def test_connections_are_bounded_over_both_dialects(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_DOOR_CONNECTIONS", 2)

    def work(place: Place) -> None:
        with place.raw() as one, Client(place.path) as framed:
            framed.infer("double", {"x": np.zeros(1, np.float32)})
            one.sendall(http_of(b"", start="GET /v2/health/live HTTP/1.1"))
            assert one.recv(12) == b"HTTP/1.1 200"
            for unix in (True, False):
                with place.raw(unix=unix) as stream:
                    stream.sendall(http_of(b"", start="GET /v2 HTTP/1.1"))
                    data = read_all(stream)
                assert data.startswith(b"HTTP/1.1 503 ")
                assert b"overload.connections" in data
        until(lambda: not place.door._connections and not place.door._http_streams)
        assert place.infer()[0] == 200

    at(short_tmp / "door.sock", Agent().handle, work)


def test_a_client_that_leaves_takes_nothing_with_it(short_tmp: Path) -> None:
    agent = Agent()

    def work(place: Place) -> None:
        agent.hold = asyncio.Event()
        body = json.dumps(request()).encode()
        with place.raw() as stream:
            stream.sendall(http_of(body, f"Content-Length: {len(body)}"))
            until(lambda: len(agent.asked) == 1)
        with place.raw() as stream:  # this one only says that it will send no more, and waits
            stream.sendall(http_of(body, f"Content-Length: {len(body)}"))
            stream.shutdown(socket.SHUT_WR)
            until(lambda: len(agent.asked) == 2)
            assert place.ask("GET", "/v2/health/live")[0] == 200
            place.loop.call_soon_threadsafe(agent.hold.set)
            assert b'"data":[2.0,5.0]' in read_all(stream)
        assert place.infer()[0] == 200
        until(lambda: not place.door._http_streams)

    at(short_tmp / "door.sock", agent.handle, work)


def test_arriving_bodies_are_bounded_together(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "MAX_ARRIVING_BYTES", 3 * limits.MIB)
    part = bytes(2 * limits.MIB)
    start = http_of(b"", f"Content-Length: {32 * limits.MIB}")

    def work(place: Place) -> None:
        with place.raw() as first, place.raw(unix=True) as second:
            first.sendall(start + part)
            until(lambda: place.door.arriving_bytes() == len(part))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                second.sendall(start + part)
            data = read_all(second)
            assert data.startswith(b"HTTP/1.1 429 ")
            assert b"overload.memory" in data
            assert place.infer()[0] == 200
        until(lambda: place.door.arriving_bytes() == 0)

    at(short_tmp / "door.sock", Agent().handle, work)
