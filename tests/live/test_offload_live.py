"""The protocol against a real hub: a model pushed, built, and asked over TLS by an unmodified client of others."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.adapters.cloud import HubCloud
from edge_agent.adapters.system import SystemClock
from edge_agent.ports import CloudAnswer, CloudRefusal
from scripts.story.stage import free_ports
from shared.inference import TensorHead
from shared.wire import oip
from tests.fakes.classifier import export, golden, samples, train
from tests.fakes.hub_process import Device, HubProcess, wait_until

pytestmark = pytest.mark.live
ROWS = 64
INFER = "/v2/models/digits/infer"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, mosquitto_path: str) -> Iterator[HubProcess]:
    port, broker_port = free_ports(2)
    hub = HubProcess(tmp_path_factory.mktemp("hub"), port=port, broker_port=broker_port)
    hub.init()
    hub.start()
    try:
        push(hub, "1.0.0")
        hub.publish("digits/1.0.0")
        yield hub
    finally:
        hub.stop()


@pytest.fixture(scope="module")
def device(hub: HubProcess) -> Device:
    return hub.enrol("pi-offload")


def put(hub: HubProcess, data: bytes) -> str:
    """Upload a file; its digest."""
    digest = hashlib.sha256(data).hexdigest()
    request = urllib.request.Request(f"https://localhost:{hub.port}/v1/blobs/{digest}", data=data, method="PUT")
    request.add_header("Authorization", f"Bearer {hub.admin}")
    with urllib.request.urlopen(request, timeout=20, context=hub.context()) as response:
        assert response.status in (200, 201)
    return digest


def push(hub: HubProcess, version: str) -> None:
    """Have a model built."""
    body = {
        "family": "digits",
        "version": version,
        "model": put(hub, export(train())),
        "golden": put(hub, golden(200, seed=2)),
        "labels": [f"digit {number}" for number in range(10)],
        "preparations": [{"input": "pixels", "scale": 1 / 16, "mean": [0.5], "std": [0.25]}],
    }
    answer = hub.call("POST", "/v1/models", body, token=hub.admin)
    assert answer.status == 202, answer
    path = f"/v1/models/digits/{version}"

    def settled() -> bool:
        state = hub.call("GET", path, token=hub.admin).body
        assert state["state"] != "rejected", state
        return bool(state["state"] == "ready")

    wait_until(settled, "the build", within_s=50)


def ask(
    hub: HubProcess, pixels: Any, *, context: ssl.SSLContext, token: str | None = None, path: str = INFER
) -> tuple[oip.OipResponse, Any]:
    """A binary request; the response and its label parameters by row."""
    request = oip.OipRequest(
        inputs=(TensorHead(name="pixels", dtype="fp32", shape=pixels.shape),),
        payload=(pixels.tobytes(),),
        parameters={"binary_data_output": True},
    )
    length, parts = oip.encode_request(request)
    call = urllib.request.Request(f"https://localhost:{hub.port}{path}", data=b"".join(parts), method="POST")
    call.add_header(oip.JSON_LENGTH_HEADER, str(length))
    if token:
        call.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(call, timeout=20, context=context) as reply:
        body, head = reply.read(), reply.headers[oip.JSON_LENGTH_HEADER]
    response = oip.decode_response(body, json_length=int(head))
    labels = response.parameters.get("labels")
    return response, json.loads(str(labels)) if labels else [response.parameters["label"]]


def test_a_device_asks_with_its_certificate_and_gets_the_right_digits(hub: HubProcess, device: Device) -> None:
    pixels, truth = samples(ROWS, seed=9)
    response, labels = ask(hub, pixels, context=device.context())
    right = sum(label == f"digit {number}" for label, number in zip(labels, truth, strict=True))
    assert right >= 0.9 * ROWS
    assert (response.model, response.version, response.parameters["rung"]) == ("digits", "1.0.0", "cloud")
    assert response.parameters["variant"] in ("int8", "fp32")


def test_the_devices_own_client_gets_the_right_digits_and_is_told_no(hub: HubProcess, device: Device) -> None:
    cloud = HubCloud(hub_url=f"https://localhost:{hub.port}", context=device.context(), clock=SystemClock())
    pixels, truth = samples(20, seed=11)
    heads = (TensorHead(name="pixels", dtype="fp32", shape=(1, *pixels.shape[1:])),)

    async def main() -> None:
        right = 0
        for row, number in enumerate(truth):
            said = await cloud.ask("digits", heads, pixels[row].tobytes(), deadline_ms=5_000, within_ms=10_000)
            assert isinstance(said, CloudAnswer), said
            assert (said.model, said.version) == ("digits", "1.0.0")
            right += said.label == f"digit {number}" and said.confidence > 0
        assert right >= 17
        unknown = await cloud.ask("dogs", heads, pixels[0].tobytes(), deadline_ms=5_000, within_ms=10_000)
        assert isinstance(unknown, CloudRefusal)
        assert (unknown.status, unknown.retry_after_ms) == (404, None)

    asyncio.run(main())
    cloud.close()


def test_many_devices_at_once_each_get_their_own_rows(hub: HubProcess, device: Device) -> None:
    pixels, _ = samples(ROWS, seed=10)
    _, wanted = ask(hub, pixels, context=device.context())
    found: dict[int, str] = {}

    def one(number: int) -> None:
        for row in range(number, ROWS, 8):
            found[row] = ask(hub, pixels[row : row + 1], context=device.context())[1][0]

    callers = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert [found[row] for row in range(ROWS)] == wanted


def test_only_who_is_known_is_answered(hub: HubProcess) -> None:
    assert hub.call("GET", "/v2/health/live").status == 200
    for path in ("/v2", "/v2/models/digits"):
        assert hub.call("GET", path).status == 401
        assert hub.call("GET", path, token=hub.admin).status == 200
    body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 64], "data": [1.0] * 64}]}
    refused = hub.call("POST", INFER, body)
    assert (refused.status, refused.body["code"]) == (401, "auth.missing")
    assert hub.call("POST", INFER, body, token=hub.admin).status == 200


def test_a_device_is_answered_from_what_was_published_and_a_person_from_candidates_too(
    hub: HubProcess, device: Device
) -> None:
    push(hub, "1.1.0")
    path = "/v2/models/digits/versions/1.1.0/infer"
    pixels, _ = samples(1, seed=13)
    response, _ = ask(hub, pixels, context=hub.context(), token=hub.admin, path=path)
    assert response.version == "1.1.0"
    assert hub.call("GET", "/v2/models/digits/versions/1.1.0/ready", context=device.context()).status == 404
    assert hub.call("GET", "/v2/models/digits", context=device.context()).body["versions"] == ["1.0.0"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(hub, pixels, context=device.context(), path=path)
    assert refused.value.code == 404
    refused.value.close()


def test_a_version_can_be_named_and_figures_are_kept(hub: HubProcess, device: Device) -> None:
    pixels, _ = samples(1, seed=11)
    response, _ = ask(hub, pixels, context=device.context(), path="/v2/models/digits/versions/1.0.0/infer")
    assert response.version == "1.0.0"
    missing = hub.call("GET", "/v2/models/digits/versions/9.0.0/ready", token=hub.admin)
    assert missing.status == 404
    text = str(hub.call("GET", "/metrics", token=hub.admin).body)
    assert 'outrider_hub_offload_answers_total{outcome="answered"}' in text
    assert "outrider_hub_offload_batch_rows_count" in text
    assert 'route="/v2/infer"' in text


TRITON = """
import json, sys
import numpy as np
import tritonclient.http as triton

url, ca, token, pixels = sys.argv[1:]
pixels = np.load(pixels)
headers = {"Authorization": f"Bearer {token}"}
client = triton.InferenceServerClient(url, ssl=True, ssl_options={"ca_certs": ca})
said = {"live": client.is_server_live(), "ready": client.is_server_ready()}
said["model"] = client.is_model_ready("digits", headers=headers)
said["nobody"] = client.is_model_ready("nobody", headers=headers)
said["server"] = client.get_server_metadata(headers=headers)["name"]
said["metadata"] = client.get_model_metadata("digits", headers=headers)
said["infer"] = []
for binary in (True, False):
    for named in (True, False):
        for compressed in (None, "gzip", "deflate"):
            tensor = triton.InferInput("pixels", list(pixels.shape), "FP32")
            tensor.set_data_from_numpy(pixels, binary_data=binary)
            outputs = [triton.InferRequestedOutput("scores", binary_data=binary)] if named else None
            result = client.infer("digits", [tensor], outputs=outputs, request_id="r1", timeout=5_000_000,
                                  headers=dict(headers), request_compression_algorithm=compressed)
            response = result.get_response()
            said["infer"].append([response["id"], response["model_version"], response["parameters"]["label"],
                                  result.as_numpy("scores").argmax(axis=1).tolist()])
try:
    client.infer("nobody", [tensor], headers=headers)
except triton.InferenceServerException as error:
    said["refused"] = [error.status(), error.message()]
print(json.dumps(said))
"""


def test_tritonclient_works_unmodified(hub: HubProcess, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient")
    pixels, truth = samples(1, seed=12)
    np.save(tmp_path / "pixels.npy", pixels)
    # In a process of its own: its gevent is not for ours.
    done = subprocess.run(
        [
            sys.executable, "-c", TRITON, f"localhost:{hub.port}", str(hub.data / "ca" / "ca.pem"), hub.admin,
            str(tmp_path / "pixels.npy"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["live"], said["ready"], said["model"], said["nobody"]) == (True, True, True, False)
    assert said["server"] == "outrider-hub"
    assert said["metadata"]["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 64]}]
    digit = int(truth[0])
    assert said["infer"] == [["r1", "1.0.0", f"digit {digit}", [digit]]] * 12
    assert "nobody" in said["refused"][1]
