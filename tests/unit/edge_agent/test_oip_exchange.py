"""HTTP without a connection: however the bytes are cut, and whatever they are, there is one next step."""

from __future__ import annotations

import itertools
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.adapters import oip
from edge_agent.adapters.http_door import MAX_HEAD_BYTES, HttpExchange, Step
from edge_agent.adapters.oip import HttpRequest, HttpResponse
from shared.errors import InputRefused

ONE = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"
TWO = b"PUT /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
THREE = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def fed(pieces: list[bytes]) -> tuple[list[Step], bytes]:
    """Every step that is not waiting, each request answered at once, and what was written."""
    exchange, steps, written = HttpExchange(is_local=True), [], b""
    for piece in pieces:
        exchange.receive(piece)
        while True:
            step = exchange.next_step()
            if step in ("idle", "head", "body"):
                break
            steps.append(step)
            if not isinstance(step, HttpRequest):
                return steps, written
            written += b"".join(exchange.write(HttpResponse(status=200, parts=[b"yes"])))
            if exchange.is_last:
                return steps, written
            exchange.go_on()
    return steps, written


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if end > start]


@given(st.lists(st.integers(0, 1000), max_size=12))
def test_where_the_bytes_are_cut_does_not_matter(places: list[int]) -> None:
    whole = ONE + TWO + THREE
    steps, written = fed(cut(whole, places))
    assert steps == fed([whole])[0]
    requests = [step for step in steps if isinstance(step, HttpRequest)]
    assert [(one.method, one.target, bytes(one.body)) for one in requests] == [
        ("POST", "/v2/models/m/infer", b"hello"),
        ("PUT", "/x", b"abcde"),
        ("GET", "/v2", b""),
    ]
    assert written.count(b"HTTP/1.1 200 ") == 3
    assert written.count(b"yes") == 3


@given(
    st.lists(st.sampled_from([ONE, TWO, THREE]), max_size=3),
    st.binary(max_size=60),
    st.integers(0, 300),
    st.lists(st.integers(0, 1000), max_size=5),
)
def test_any_bytes_have_a_next_step(before: list[bytes], noise: bytes, place: int, places: list[int]) -> None:
    whole = b"".join(before)
    data = whole[:place] + noise + whole[place:]
    for step in fed([*cut(data, places), b""])[0]:
        assert isinstance(step, HttpRequest | HttpResponse) or step == "ended"


def test_what_is_waited_for_is_said() -> None:
    exchange = HttpExchange(is_local=True)
    assert exchange.next_step() == "idle"
    exchange.receive(ONE[:10])
    assert exchange.next_step() == "head"
    exchange.receive(ONE[10:-2])
    assert exchange.next_step() == "body"
    assert exchange.bytes_held == 3
    assert exchange.encourage() == b""
    exchange.receive(ONE[-2:] + ONE[:4])
    assert isinstance(exchange.next_step(), HttpRequest)
    assert exchange.bytes_held == 0
    exchange.write(HttpResponse(status=200))
    exchange.go_on()
    assert exchange.next_step() == "head"


def test_a_head_without_end_is_not_kept() -> None:
    exchange = HttpExchange(is_local=True)
    exchange.receive(b"GET /" + b"a" * (MAX_HEAD_BYTES + 1))
    step = exchange.next_step()
    assert isinstance(step, HttpResponse)
    assert step.status == 431
    assert exchange.can_answer
    assert b"connection: close" in b"".join(exchange.write(step, last=True))


def test_large_parts_are_passed_on_as_they_are() -> None:
    exchange = HttpExchange(is_local=True)
    exchange.receive(ONE)
    assert isinstance(exchange.next_step(), HttpRequest)
    tensor = memoryview(bytes(300_000))
    pieces = exchange.write(HttpResponse(status=200, parts=[b"{}", tensor]))
    assert any(piece is tensor for piece in pieces)


@given(st.binary(max_size=2000))
def test_packed_bodies_unpack_or_are_refused(body: bytes) -> None:
    assert oip._inflate(bytearray(zlib.compress(body))) == body
    with pytest.raises(InputRefused):
        oip._inflate(bytearray(zlib.compress(body)[:-1]))


def test_the_daemon_holds_no_http_and_no_numpy_until_somebody_speaks_it() -> None:
    heavy = "('h11', 'numpy', 'edge_agent.adapters.http_door', 'edge_agent.adapters.oip')"
    code = f"import edge_agent.main, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    later = "import edge_agent.adapters.http_door, sys; print('numpy' in sys.modules, 'h11' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", later], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False True"
