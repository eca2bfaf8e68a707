"""An agent that doubles numbers, behind a real door with a port; for tests of the Open Inference Protocol."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from edge_agent.adapters.door import Door
from edge_agent.adapters.waiting import Handle
from edge_agent.framing import Buffer
from shared.errors import HostLost
from shared.inference import Answer, Describe, Description, Infer, ModelState, Refusal, Reply, Request, TensorHead
from shared.model import Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1,)),),
    outputs=(TensorSpec(name="y", dtype="fp32", shape=(-1,)), TensorSpec(name="h", dtype="fp16", shape=(1,))),
)
LOADED = ModelState(family="double", phase="committed", version="1.0.0", variant="int8", signature=SIGNATURE)
EMPTY = ModelState(family="empty", phase="fetching")


class Agent:
    """Doubles numbers; what it was asked is in `asked`. `hold` lets inferences wait until it is set."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.hold: asyncio.Event | None = None
        self.models: tuple[ModelState, ...] = (LOADED,)

    async def handle(self, request: Request, payload: bytearray, _arrived: float) -> tuple[Reply, Sequence[Buffer]]:
        self.asked.append(request)
        if isinstance(request, Describe):
            models = tuple(model for model in self.models if request.model in ("", model.family))
            if not models:
                return Refusal(id=request.id, code="model.unknown", message="no such model"), ()
            return Description(id=request.id, models=models), ()
        assert isinstance(request, Infer)
        if self.hold is not None:
            await self.hold.wait()
        match request.id:
            case "late":
                raise TimeoutError
            case "full":
                return Refusal(id="full", code="overload", message="many wait", hint="slow down", retry=True), ()
            case "lost":
                raise HostLost("the host is gone", hint="try again")
            case "defect":
                raise RuntimeError("a defect")
        values = struct.unpack(f"<{len(payload) // 4}f", payload)
        doubled = struct.pack(f"<{len(values)}f", *(2 * value for value in values))
        heads = (request.inputs[0], TensorHead(name="h", dtype="fp16", shape=(1,)))
        answer = Answer(
            id=request.id or "made-up", model=request.model, version="1.0.0", variant="int8", digest="d" * 64,
            rung="full", labels=("seven",), confidences=(0.75,), took_us=5,
            outputs=(TensorHead(name="y", dtype="fp32", shape=heads[0].shape), heads[1]),
        )  # fmt: skip
        return answer, (doubled, struct.pack("<e", 0.5))


class Place:
    """An open door: its socket and its port."""

    def __init__(self, door: Door, path: Path) -> None:
        self.door, self.path, self.port = door, path, door.http_port
        self.loop = asyncio.get_running_loop()

    @contextlib.contextmanager
    def raw(self, *, unix: bool = False) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as link:
            link.settimeout(20)
            link.connect(str(self.path) if unix else ("127.0.0.1", self.port))
            yield link

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], Any]:
        """One request on a connection of its own; `_` in a header's name stands for `-`."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as link:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            link.request(method, path, body=data, headers={k.replace("_", "-"): v for k, v in headers.items()})
            return answer_of(link)

    def infer(self, model: str = "double", /, **changes: Any) -> tuple[int, dict[str, str], Any]:
        return self.ask("POST", f"/v2/models/{model}/infer", request(**changes))


def answer_of(link: http.client.HTTPConnection) -> tuple[int, dict[str, str], Any]:
    got = link.getresponse()
    data = got.read()
    headers = {name.lower(): value for name, value in got.getheaders()}
    is_json = headers.get("content-type") == "application/json"
    return got.status, headers, json.loads(data) if data and is_json else data


def request(**changes: Any) -> dict[str, Any]:
    return {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2.5]}],
        "outputs": [{"name": "y"}],
    } | changes


def http_of(body: bytes, *headers: str, start: str = "POST /v2/models/double/infer HTTP/1.1") -> bytes:
    return "\r\n".join([start, "Host: localhost", *headers, "", ""]).encode() + body


def read_all(link: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := link.recv(65_536):
            data += piece
    return data


def at(path: Path, handle: Handle, work: Callable[[Place], None]) -> None:
    """Open a door with a port, do blocking work in a thread, close it."""

    async def main() -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            door = Door(path=path, handle=handle, tasks=tasks, http=("127.0.0.1", 0))
            await door.open()
            try:
                await asyncio.to_thread(work, Place(door, path))
            finally:
                await door.close()
                assert door.http_port == 0

    asyncio.run(main())


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; the test's own timeout is the deadline."""
    while not holds():
        time.sleep(0.005)
