"""The protocol over raw ASGI: paths, bodies, bounds, identity, and a quick "no"."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cloud_hub.ground.auth import PEER_CERTIFICATE, Gate, Principal, Role
from cloud_hub.ground.problems import NotAllowed
from cloud_hub.offload import asgi
from cloud_hub.offload.asgi import Beside, OffloadApp
from cloud_hub.offload.desk import Desk, Overload
from shared.errors import ModelError
from shared.inference import TensorHead
from shared.wire import oip
from tests.fakes.offload_room import OpenGate, Shelf, app_around, now_us, running
from tests.fakes.releases import sign_classifier

INFER = "/v2/models/sign/infer"
JSON_BODY = {"id": "q1", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 1.0]}]}


class Answer:
    """What came back."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.status: int = messages[0]["status"]
        self.headers = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
        self.body = b"".join(bytes(message["body"]) for message in messages[1:])

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def tensors(self) -> oip.OipResponse:
        """The body as the protocol's response."""
        length = self.headers.get(oip.JSON_LENGTH_HEADER.lower())
        return oip.decode_response(self.body, json_length=int(length) if length else None)


async def call(
    app: Any,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    headers: dict[str, str] | None = None,
    certificate: bytes | None = None,
    pieces: int = 1,
) -> Answer:
    given = {"content-length": str(len(body)), **(headers or {})}
    scope: dict[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items() if value],
        "extensions": {PEER_CERTIFICATE: certificate},
    }
    step = max(1, -(-len(body) // pieces))
    parts = [body[start : start + step] for start in range(0, len(body), step)] or [b""]
    waiting = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return Answer(sent)


def story(work: Callable[[OffloadApp, Desk], Awaitable[None]], **around: Any) -> None:
    async def run() -> None:
        async with running(Shelf(sign=sign_classifier())) as (desk, _):
            await work(app_around(desk, **around), desk)

    asyncio.run(run())


def binary(*rows: tuple[float, float], outputs: tuple[oip.OipOutput, ...] = (), **parameters: Any) -> tuple[bytes, str]:
    """A binary body, and where its JSON ends."""
    table = np.array(rows, dtype=np.float32)
    request = oip.OipRequest(
        inputs=(TensorHead(name="x", dtype="fp32", shape=table.shape),),
        payload=(table.tobytes(),),
        outputs=outputs,
        parameters=parameters,
    )
    length, parts = oip.encode_request(request)
    return b"".join(parts), str(length)


def test_json_in_and_json_out_with_label_and_confidence() -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        answer = await call(app, "POST", INFER, json.dumps(JSON_BODY).encode())
        assert answer.status == 200
        said = answer.json
        assert (said["model_name"], said["model_version"], said["id"]) == ("sign", "1.0.0", "q1")
        assert said["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [1, 2], "data": [-1.0, 1.0]}]
        assert said["parameters"]["label"] == "high"
        assert 0.8 < said["parameters"]["confidence"] < 0.9
        assert (said["parameters"]["rung"], said["parameters"]["deadline_met"]) == ("cloud", True)

    story(work)


def test_binary_in_and_binary_out_also_in_pieces_and_of_a_version() -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        body, length = binary((3, 1), (0, 2), binary_data_output=True)
        headers = {oip.JSON_LENGTH_HEADER: length}
        for path in (INFER, "/v2/models/sign/versions/1.0.0/infer"):
            answer = await call(app, "POST", path, body, headers=headers, pieces=7)
            response = answer.tensors()
            assert answer.headers["content-type"] == "application/octet-stream"
            assert np.frombuffer(response.payload[0], np.float32).tolist() == [2, -2, -2, 2]
            assert json.loads(str(response.parameters["labels"])) == ["low", "high"]

    story(work)


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies_are_read(coding: str, pack: Callable[[bytes], bytes]) -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        body = pack(json.dumps(JSON_BODY).encode())
        answer = await call(app, "POST", INFER, body, headers={"content-encoding": coding})
        assert answer.json["parameters"]["label"] == "high"
        cut = await call(app, "POST", INFER, body[:-4], headers={"content-encoding": coding})
        assert cut.status == 400
        bomb = pack(bytes(asgi.MAX_BODY_BYTES + 1))
        assert (await call(app, "POST", INFER, bomb, headers={"content-encoding": coding})).status == 413

    story(work)


def test_metadata_health_and_readiness() -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        assert (await call(app, "GET", "/v2/health/live")).status == 200
        assert (await call(app, "GET", "/v2/health/ready")).status == 200
        assert (await call(app, "GET", "/v2")).json["name"] == "outrider-hub"
        assert (await call(app, "GET", "/v2/models/sign/ready")).status == 200
        assert (await call(app, "GET", "/v2/models/nobody/ready")).status == 404
        assert (await call(app, "GET", "/v2/models/sign")).json == {
            "name": "sign",
            "versions": ["1.0.0"],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
            "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1, 2]}],
        }

    story(work)


def wrong_requests() -> Iterator[tuple[str, str, bytes, dict[str, str], int]]:
    good = json.dumps(JSON_BODY).encode()
    yield "POST", "/v2/models/nobody/infer", good, {}, 404
    yield "POST", "/v2/nothing", good, {}, 404
    yield "GET", INFER, b"", {}, 405
    yield "POST", "/v2/models/sign", b"", {}, 405
    yield "POST", INFER, b"{", {}, 400
    yield "POST", INFER, b"", {}, 400
    yield "POST", INFER, good, {oip.JSON_LENGTH_HEADER: "-1"}, 400
    yield "POST", INFER, good, {oip.JSON_LENGTH_HEADER: "99999"}, 400
    yield "POST", INFER, good, {"content-encoding": "br"}, 400
    yield "POST", INFER, good, {"content-length": str(asgi.MAX_BODY_BYTES + 1)}, 413
    yield "POST", INFER, json.dumps({**JSON_BODY, "parameters": {"timeout": "soon"}}).encode(), {}, 400
    yield "POST", INFER, good.replace(b"[1, 2]", b"[2, 1]"), {}, 400
    yield "POST", INFER, json.dumps({**JSON_BODY, "outputs": [{"name": "no"}]}).encode(), {}, 400


@pytest.mark.parametrize(("method", "path", "body", "headers", "status"), list(wrong_requests()))
def test_what_is_wrong_is_said(method: str, path: str, body: bytes, headers: dict[str, str], status: int) -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        answer = await call(app, method, path, body, headers=headers)
        assert answer.status == status
        assert answer.json["error"]
        assert answer.json["code"]
        assert app._held_bytes == 0

    story(work)


def test_the_timeout_is_the_deadline_and_the_no_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(app: OffloadApp, desk: Desk) -> None:
        seen = []

        async def infer(asked: Any) -> Any:
            seen.append(asked.deadline_us - asked.arrived_us)
            raise Overload("no", code="overload.late", retry_after_us=1_200_000)

        monkeypatch.setattr(desk, "infer", infer)
        for timeout in (50_000, 0, 10**12):
            body = json.dumps({**JSON_BODY, "parameters": {"timeout": timeout}}).encode()
            answer = await call(app, "POST", INFER, body)
            assert (answer.status, answer.headers["retry-after"], answer.json["retry"]) == (429, "2", True)
        assert seen == [50_000, asgi.DEFAULT_DEADLINE_MS * 1000, asgi.MAX_DEADLINE_MS * 1000]

    story(work)


def test_what_waited_unseen_has_less_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(app: OffloadApp, desk: Desk) -> None:
        seen = []

        async def infer(asked: Any) -> Any:
            seen.append((now_us() - asked.arrived_us, asked.deadline_us - asked.arrived_us))
            raise Overload("no", code="overload.late", retry_after_us=0)

        monkeypatch.setattr(desk, "infer", infer)
        monkeypatch.setattr(desk, "_lag_us", 700_000_000)
        await call(app, "POST", INFER, json.dumps({**JSON_BODY, "parameters": {"timeout": 50_000}}).encode())
        assert seen[0][0] >= 700_000_000
        assert seen[0][1] == 50_000

    story(work)


def test_a_model_at_fault_is_a_500_and_no_400(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(app: OffloadApp, desk: Desk) -> None:
        async def infer(_: Any) -> Any:
            raise ModelError("the model failed", code="model.run")

        monkeypatch.setattr(desk, "infer", infer)
        answer = await call(app, "POST", INFER, json.dumps(JSON_BODY).encode())
        assert (answer.status, answer.json["code"]) == (500, "model.run")

    story(work)


def test_a_principal_has_a_rate() -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        body = json.dumps(JSON_BODY).encode()
        statuses = [(await call(app, "POST", INFER, body)) for _ in range(4)]
        assert [one.status for one in statuses] == [200, 200, 429, 429]
        assert int(statuses[-1].headers["retry-after"]) >= 1

    story(work, burst=2)


def test_a_body_of_unannounced_length_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        body = json.dumps(JSON_BODY).encode()
        unannounced = {"content-length": ""}
        assert (await call(app, "POST", INFER, body, headers=unannounced, pieces=3)).status == 200
        monkeypatch.setattr(asgi, "MAX_BODY_BYTES", len(body) - 1)
        assert (await call(app, "POST", INFER, body, headers=unannounced, pieces=3)).status == 413
        assert app._held_bytes == 0

    story(work)


def test_memory_for_bodies_is_bounded_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        body = json.dumps(JSON_BODY).encode()
        monkeypatch.setattr(asgi, "MAX_HELD_BYTES", len(body) - 1)
        assert (await call(app, "POST", INFER, body)).status == 429
        monkeypatch.setattr(asgi, "MAX_HELD_BYTES", len(body))
        assert (await call(app, "POST", INFER, body)).status == 200
        assert app._held_bytes == 0

    story(work)


class Slow:
    """A request whose body comes as it is let; `headers` announce what they like."""

    def __init__(self, app: Any, *, token: str, announced: int) -> None:
        self._app = app
        self._parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._sent: list[dict[str, Any]] = []
        self._scope = {
            "type": "http",
            "method": "POST",
            "path": INFER,
            "headers": [(b"content-length", b"%d" % announced), (b"authorization", token.encode())],
            "extensions": {PEER_CERTIFICATE: None},
        }

    def give(self, body: bytes, *, more: bool = True) -> None:
        """Let this much of the body come."""
        self._parts.put_nowait({"type": "http.request", "body": body, "more_body": more})

    async def run(self) -> Answer:
        """Send it; what comes back."""

        async def send(message: dict[str, Any]) -> None:
            self._sent.append(message)

        await self._app(self._scope, self._parts.get, send)
        return Answer(self._sent)


class NamedGate(Gate):
    """Believes whatever name it is given."""

    def __init__(self) -> None:
        pass

    async def identify(self, request: Any) -> Principal:
        """By the name that stands where the token would."""
        return Principal(name=request.headers["authorization"], role=Role.VIEWER)


def test_bodies_that_are_announced_and_do_not_come_keep_nobody_out() -> None:
    async def work(app: OffloadApp, _: Desk) -> None:
        async with asyncio.TaskGroup() as group:
            count = asgi.MAX_HELD_BYTES // asgi.MAX_BODY_BYTES
            idle = [Slow(app, token="mallory", announced=asgi.MAX_BODY_BYTES) for _ in range(count)]
            tasks = [group.create_task(one.run()) for one in idle]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            good = {"authorization": "alice"}
            assert (await call(app, "POST", INFER, json.dumps(JSON_BODY).encode(), headers=good)).status == 200
            for task in tasks:
                task.cancel()
        assert app._held_bytes == 0

    story(work, gate=NamedGate())


def test_one_principals_bodies_leave_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps(JSON_BODY).encode()
    monkeypatch.setattr(asgi, "MAX_PRINCIPAL_BYTES", 3 * len(body))
    monkeypatch.setattr(asgi, "MAX_HELD_BYTES", 4 * len(body))

    async def work(app: OffloadApp, _: Desk) -> None:
        async with asyncio.TaskGroup() as group:
            many = [Slow(app, token="mallory", announced=2 * len(body)) for _ in range(3)]
            tasks = [group.create_task(one.run()) for one in many]
            for one in many:
                one.give(body)
            while app._held_bytes < 3 * len(body):
                await asyncio.sleep(0)
            greedy = await call(app, "POST", INFER, body, headers={"authorization": "mallory"})
            assert (greedy.status, greedy.json["code"]) == (429, "overload.share")
            assert "retry-after" in greedy.headers
            assert (await call(app, "POST", INFER, body, headers={"authorization": "alice"})).status == 200
            for task in tasks:
                task.cancel()
        assert app._held_bytes == 0
        assert not app._shares

    story(work, gate=NamedGate())


class StrictGate(Gate):
    """Knows one token and one certificate."""

    def __init__(self) -> None:
        self.asked = 0

    async def identify(self, request: Any) -> Principal:
        """By token or certificate."""
        self.asked += 1
        if request.headers.get("authorization") == "Bearer good":
            return Principal(name="ci", role=Role.VIEWER)
        if request.scope["extensions"][PEER_CERTIFICATE] == b"der":
            return Principal(name="pi", role=Role.DEVICE)
        raise NotAllowed("who?", code="auth.missing")


def test_only_who_is_known_gets_in_and_is_not_looked_up_each_time() -> None:
    gate = StrictGate()

    async def work(app: OffloadApp, _: Desk) -> None:
        body = json.dumps(JSON_BODY).encode()
        good = {"authorization": "Bearer good"}
        for _again in range(5):
            assert (await call(app, "POST", INFER, body, headers=good)).status == 200
        assert gate.asked == 1
        assert (await call(app, "POST", INFER, body, certificate=b"der")).status == 200
        for wrong in ({}, {"authorization": "Bearer bad"}):
            for path in (INFER, "/v2", "/v2/models/sign"):
                answer = await call(app, "POST" if path == INFER else "GET", path, body, headers=wrong)
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        # A token that is no good does not fall back to the certificate's good name.
        bad = {"authorization": "Bearer bad"}
        assert (await call(app, "POST", INFER, body, headers=bad)).status == 401
        assert (await call(app, "GET", "/v2/health/live")).status == 200

    story(work, gate=gate)


def test_devices_get_answers_of_published_releases_only_and_people_of_candidates_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work(app: OffloadApp, desk: Desk) -> None:
        found: list[bool] = []
        inner = Shelf.find

        async def find(shelf: Shelf, family: str, version: str, *, candidates: bool) -> Any:
            found.append(candidates)
            return await inner(shelf, family, version, candidates=candidates)

        monkeypatch.setattr(Shelf, "find", find)
        body = json.dumps(JSON_BODY).encode()
        for given in ({"headers": {"authorization": "Bearer good"}}, {"certificate": b"der"}):
            assert (await call(app, "POST", INFER, body, **given)).status == 200
            for path in ("/v2/models/sign", "/v2/models/sign/ready"):
                assert (await call(app, "GET", path, **given)).status == 200
        assert found == [True] * 3 + [False] * 3

    story(work, gate=StrictGate())


def test_other_paths_are_the_other_applications() -> None:
    async def other(scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    async def work(app: OffloadApp, _: Desk) -> None:
        both = Beside(other, app)
        assert [(await call(both, "GET", path)).status for path in ("/v2", "/v2/x", "/v2x", "/v1/a")] == [
            200, 404, 299, 299,
        ]  # fmt: skip

    story(work, gate=OpenGate())
