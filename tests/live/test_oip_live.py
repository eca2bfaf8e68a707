"""The Open Inference Protocol at the door: NVIDIA's client unmodified, plain HTTP, and frames beside it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import socket
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_agent.adapters.door import Door
from edge_agent.adapters.hosts import LiveHosts
from edge_agent.adapters.system import SystemClock
from edge_agent.adapters.waiting import Handle
from edge_agent.client import Client
from edge_agent.framing import Buffer
from shared import limits
from shared.errors import ConfigError
from shared.inference import Describe, Infer, Refusal, Reply, Request
from tests.fakes.door_core import handle_for
from tests.fakes.oip_place import EMPTY, LOADED, Agent, Place, answer_of, at, http_of, read_all, request
from tests.fakes.releases import sign_classifier

pytestmark = pytest.mark.live


def test_nvidias_client_gets_the_models_answers(short_tmp: Path) -> None:
    path = short_tmp / "door.sock"
    made = sign_classifier()
    two = np.array([[1, 2], [5, 3]], dtype=np.float32)

    def use(place: Place) -> None:
        import tritonclient.http as triton  # type: ignore[import-untyped]

        with triton.InferenceServerClient(f"127.0.0.1:{place.port}") as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("sample")
            assert client.is_model_ready("sample", "1.0.0")
            assert not client.is_model_ready("other")
            assert client.get_server_metadata()["extensions"][0] == "binary_tensor_data"
            metadata = client.get_model_metadata("sample")
            assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
            for binary in (True, False):
                sent = triton.InferInput("x", [2, 2], "FP32")
                sent.set_data_from_numpy(two, binary_data=binary)
                for outputs in (None, [triton.InferRequestedOutput("scores", binary_data=binary)]):
                    for packing in (None, "gzip", "deflate"):
                        answer = client.infer(
                            "sample", [sent], outputs=outputs, request_id="mine", timeout=5_000_000,
                            request_compression_algorithm=packing,
                        )  # fmt: skip
                        assert answer.as_numpy("scores").tolist() == [[-1, 1], [2, -2]]
                        said = answer.get_response()
                        assert (said["id"], said["model_version"]) == ("mine", "1.0.0")
                        assert json.loads(said["parameters"]["labels"]) == ["high", "low"]
                        assert said["parameters"]["digest"] == made.variant.file.digest
            wrong = triton.InferInput("x", [1, 3], "FP32")
            wrong.set_data_from_numpy(np.zeros((1, 3), np.float32))
            for model, words in (("sample", "shape"), ("other", "no model")):
                with pytest.raises(triton.InferenceServerException, match=words):
                    client.infer(model, [wrong])

    async def main() -> None:
        hosts = LiveHosts(directory=short_tmp / "hosts", clock=SystemClock())
        model_fd, golden_fd = made.open(short_tmp)
        host, _ = await hosts.start(
            manifest=made.manifest, variant=made.variant, model_fd=model_fd, golden_fd=golden_fd, on_lost=lambda _: None
        )
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            handle = known(handle_for(host, made.manifest, made.variant))
            door = Door(path=path, handle=handle, tasks=tasks, http=("127.0.0.1", 0))
            await door.open()
            try:
                await asyncio.to_thread(use, Place(door, path))
            finally:
                await door.close()
                await host.stop()

    asyncio.run(main())


def known(handle: Handle) -> Handle:
    """Describes only the model that there is."""

    async def only(request: Request, payload: bytearray, arrived: float) -> tuple[Reply, Sequence[Buffer]]:
        if isinstance(request, Describe) and request.model == "other":
            return Refusal(id="", code="model.unknown", message="there is no model 'other' here"), ()
        return await handle(request, payload, arrived)

    return only


def test_frames_and_http_on_one_socket_at_once(short_tmp: Path) -> None:
    agent = Agent()
    rounds = 30

    def work(place: Place) -> None:
        with (
            Client(place.path) as framed,
            contextlib.closing(http.client.HTTPConnection("door", timeout=20)) as link,
            place.raw(unix=True) as stream,
        ):
            link.sock = stream
            for number in range(rounds):
                link.request("POST", "/v2/models/double/infer", body=json.dumps(request(id=f"h{number}")))
                answer = framed.infer("double", {"x": np.array([number], np.float32)}, id=f"f{number}")
                assert (answer.id, answer.outputs["y"].tolist()) == (f"f{number}", [2 * number])
                status, _, said = answer_of(link)
                assert (status, said["id"], said["outputs"][0]["data"]) == (200, f"h{number}", [2, 5])

    at(short_tmp / "door.sock", agent.handle, work)
    assert sum(isinstance(asked, Infer) for asked in agent.asked) == 2 * rounds


def test_an_answer_says_where_it_came_from(short_tmp: Path) -> None:
    agent = Agent()

    def work(place: Place) -> None:
        status, headers, said = place.infer(id="a", parameters={"timeout": 1_500_000})
        assert (status, headers["content-type"]) == (200, "application/json")
        assert said["parameters"] == {
            "rung": "full", "label": "seven", "confidence": 0.75, "digest": "d" * 64, "variant": "int8",
            "degraded": False, "deadline_met": True,
        }  # fmt: skip
        assert (said["model_name"], said["model_version"], said["id"]) == ("double", "1.0.0", "a")
        assert said["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [2], "data": [2.0, 5.0]}]
        _, _, said = place.infer()
        assert said["id"] == "made-up"
        status, headers, data = place.infer(outputs=[], parameters={"binary_data_output": True})
        length = int(headers["inference-header-content-length"])
        said = json.loads(data[:length])
        assert [output["name"] for output in said["outputs"]] == ["y", "h"]
        assert struct.unpack("<2fe", data[length:]) == (2.0, 5.0, 0.5)
        first = agent.asked[0]
        assert isinstance(first, Infer)
        assert (first.deadline_ms, first.id) == (1500, "a")

    at(short_tmp / "door.sock", agent.handle, work)


def test_health_metadata_and_versions(short_tmp: Path) -> None:
    agent = Agent()

    def work(place: Place) -> None:
        assert place.ask("GET", "/v2/health/live")[0] == 200
        assert place.ask("GET", "/v2")[2]["name"] == "outrider-agent"
        assert place.ask("GET", "/v2/health/ready")[0] == 200
        assert place.ask("HEAD", "/v2/health/ready")[::2] == (200, b"")
        assert place.ask("GET", "/v2/models/double/versions/1.0.0")[2]["versions"] == ["1.0.0"]
        for path in ("", "/ready"):
            assert place.ask("GET", f"/v2/models/double/versions/2.0.0{path}")[0] == 404
            assert place.ask("GET", f"/v2/models/none{path}")[0] == 404
        assert place.infer("double/versions/1.0.0")[0] == 200
        asked = len(agent.asked)
        assert place.infer("double/versions/2.0.0")[0] == 404
        assert len(agent.asked) == asked + 1
        agent.models = (LOADED, EMPTY)
        assert place.ask("GET", "/v2/health/ready")[::2] == (400, {"ready": False})
        assert place.ask("GET", "/v2/models/empty/ready")[0] == 400
        status, headers, said = place.ask("GET", "/v2/models/empty")
        assert (status, headers["retry-after"], said["code"]) == (503, "1", "model.not_loaded")

    at(short_tmp / "door.sock", agent.handle, work)


def test_errors_have_their_status_and_say_when_to_come_again(short_tmp: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(place: Place) -> None:
        for sent, status, code in (
            ({"id": "late"}, 504, "deadline"),
            ({"id": "full"}, 429, "overload"),
            ({"id": "lost"}, 503, "model.host_lost"),
            ({"id": "defect"}, 500, "internal"),
            ({"id": "x" * 129}, 400, "model.request"),
            ({"outputs": [{"name": "z"}]}, 400, "model.request"),
            ({"outputs": [{"name": "h"}]}, 400, "model.request"),
            ({"parameters": {"timeout": "soon"}}, 400, "model.request"),
            ({"inputs": []}, 400, "model.request"),
        ):
            got, headers, said = place.infer(**sent)
            assert (got, said["code"]) == (status, code)
            assert ("retry-after" in headers) == (status in (429, 503, 504)) == said.get("retry", False)
            assert said["error"]
        assert "a defect" not in place.infer(id="defect")[2]["error"]
        for method, path, status in (
            ("GET", "/", 404),
            ("GET", "/v2/models/double/infer", 405),
            ("POST", "/v2/models/double", 405),
            ("DELETE", "/v2", 405),
            ("POST", "/v2/models/%64ouble/infer", 404),
            ("POST", "/v2/models/" + "a" * 4000, 404),
        ):
            got, headers, said = place.ask(method, path)
            assert (got, bool(said["error"])) == (status, True)
            assert ("allow" in headers) == (status == 405)

    at(short_tmp / "door.sock", Agent().handle, work)
    assert "a request at the door failed" in caplog.text


def test_bodies_come_packed_whole_in_chunks_or_after_a_word(short_tmp: Path) -> None:
    body = json.dumps(request()).encode()

    def work(place: Place) -> None:
        for packed, encoding in ((gzip.compress(body), "gzip"), (zlib.compress(body), "deflate"), (body, "identity")):
            status, _, said = place.ask("POST", "/v2/models/double/infer", packed, Content_Encoding=encoding)
            assert (status, said["outputs"][0]["data"]) == (200, [2.0, 5.0])
        for packed, encoding, status in (
            (b"nothing", "gzip", 400),
            (gzip.compress(body)[:-4], "gzip", 400),
            (gzip.compress(body) + b"more", "gzip", 400),
            (body, "br", 400),
            (gzip.compress(bytes(70 * limits.MIB), 1), "gzip", 413),
            (gzip.compress(b" " * (2 * limits.MIB)), "gzip", 413),
        ):
            got, _, said = place.ask("POST", "/v2/models/double/infer", packed, Content_Encoding=encoding)
            assert (got, bool(said["error"])) == (status, True)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", place.port, timeout=20)) as link:
            link.request("POST", "/v2/models/double/infer", body=iter((body[:9], body[9:])), encode_chunked=True,
                         headers={"Transfer-Encoding": "chunked"})  # fmt: skip
            assert answer_of(link)[0] == 200
        with place.raw() as stream:
            stream.sendall(http_of(b"", f"Content-Length: {len(body)}", "Expect: 100-continue", "Connection: close"))
            assert stream.recv(100).startswith(b"HTTP/1.1 100 ")
            stream.sendall(body)
            assert read_all(stream).startswith(b"HTTP/1.1 200 ")

    at(short_tmp / "door.sock", Agent().handle, work)


def test_large_tensors_go_as_bytes_and_are_refused_as_text(short_tmp: Path) -> None:
    values = np.arange(2 * limits.MIB, dtype=np.float32)

    def work(place: Place) -> None:
        tensor = {"name": "x", "datatype": "FP32", "shape": list(values.shape)}
        head = json.dumps(
            {
                "inputs": [tensor | {"parameters": {"binary_data_size": values.nbytes}}],
                "outputs": [{"name": "y", "parameters": {"binary_data": True}}],
            }
        ).encode()
        path = "/v2/models/double/infer"
        status, headers, data = place.ask(
            "POST", path, head + values.tobytes(), Inference_Header_Content_Length=str(len(head))
        )
        assert status == 200
        assert np.array_equal(
            np.frombuffer(data, "<f4", offset=int(headers["inference-header-content-length"])), 2 * values
        )
        text = b'{"inputs": [' + b" " * limits.MAX_JSON_BODY_BYTES + b"]}"
        status, _, said = place.ask("POST", path, text)
        assert (status, "binary" in said["hint"]) == (413, True)

    at(short_tmp / "door.sock", Agent().handle, work)


def test_one_connection_carries_many_requests_also_sent_ahead(short_tmp: Path) -> None:
    def work(place: Place) -> None:
        body = json.dumps(request()).encode()
        one = http_of(body, f"Content-Length: {len(body)}")
        with place.raw() as stream:
            for piece in (
                one + one[:50],
                one[50:] + one * 7,
                http_of(b"", "Connection: close", start="GET /v2 HTTP/1.1"),
            ):
                stream.sendall(piece)
            data = read_all(stream)
        assert data.count(b"HTTP/1.1 200 ") == 10
        assert data.count(b'"data":[2.0,5.0]') == 9
        with place.raw() as stream:
            stream.sendall(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
            assert read_all(stream).endswith(b'{"live":true}')
        with place.raw() as stream:  # one that says at once that it will send no more
            stream.sendall(one)
            stream.shutdown(socket.SHUT_WR)
            assert b'"data":[2.0,5.0]' in read_all(stream)

    at(short_tmp / "door.sock", Agent().handle, work)


def test_a_port_that_is_taken_is_said(short_tmp: Path) -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            async with asyncio.TaskGroup() as tasks:
                door = Door(
                    path=short_tmp / "door.sock", handle=Agent().handle, tasks=tasks, http=taken.getsockname()[:2]
                )
                with pytest.raises(ConfigError) as caught:
                    await door.open()
                assert caught.value.code == "config.door_http"
                assert not (short_tmp / "door.sock").exists()

    asyncio.run(main())
