"""The Open Inference Protocol's bodies and words: both forms of tensors, every refusal, and numpy as the witness."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared import limits
from shared.errors import InputRefused
from shared.inference import TensorHead
from shared.model import ITEM_BYTES, Signature, TensorSpec
from shared.tensors import numpy_dtype
from shared.wire import oip, oip_terms
from shared.wire.oip import OipOutput, OipRequest, OipResponse
from shared.wire.oip_terms import Provenance, Target

HEAD = TensorHead(name="x", dtype="fp32", shape=(2, 2))
DATA = struct.pack("<4f", 1, 2, 3, 4.5)
SCORES = OipResponse(
    model="digits",
    version="1.0.0",
    outputs=(HEAD, TensorHead(name="y", dtype="int64", shape=(2,))),
    payload=(DATA, struct.pack("<2q", -7, 2**62)),
)


def body(parts: list[oip.Buffer]) -> bytes:
    return b"".join(parts)


def request(**changes: Any) -> bytes:
    """A JSON request with one tensor; `changes` are to that tensor, None removes a field."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4.5]} | changes
    return json.dumps({"inputs": [{key: value for key, value in tensor.items() if value is not None}]}).encode()


@st.composite
def tensors(draw: st.DrawFn) -> tuple[TensorHead, bytes]:
    dtype = draw(st.sampled_from(sorted(set(ITEM_BYTES) - {"fp16"})))
    kind = numpy_dtype(dtype)  # type: ignore[arg-type]
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    finite = {"allow_nan": False, "allow_infinity": False} if kind.kind == "f" else {}
    array = draw(hnp.arrays(kind, shape, elements=hnp.from_dtype(kind, **finite)))  # type: ignore[arg-type]
    return TensorHead(name=draw(st.text(min_size=1, max_size=9)), dtype=dtype, shape=shape), array.tobytes()  # type: ignore[arg-type]


@given(st.lists(tensors(), min_size=1, max_size=4, unique_by=lambda one: one[0].name), st.booleans(), st.data())
def test_what_is_written_is_read(made: list[tuple[TensorHead, bytes]], binary: bool, data: st.DataObject) -> None:
    heads, payload = tuple(head for head, _ in made), tuple(elements for _, elements in made)
    sent = OipRequest(inputs=heads, payload=payload, id="a", outputs=(OipOutput(name="y", binary=True),))
    length, parts = oip.encode_request(sent, binary=binary)
    assert (length is None) == (not binary)
    assert oip.decode_request(body(parts), json_length=length) == sent
    said = OipResponse(model="m", outputs=heads, payload=payload, parameters={"rung": "full"})
    chosen = data.draw(st.sets(st.sampled_from([head.name for head in heads])))
    length, parts = oip.encode_response(said, binary=chosen)
    assert oip.decode_response(body(parts), json_length=length) == said


@given(tensors())
def test_nested_data_is_what_numpy_makes_of_it(made: tuple[TensorHead, bytes]) -> None:
    head, elements = made
    nested = np.frombuffer(elements, numpy_dtype(head.dtype)).reshape(head.shape).tolist()
    for value in (nested, np.ravel(np.array(nested, dtype=numpy_dtype(head.dtype))).tolist()):
        tensor = {"name": "x", "datatype": head.dtype.upper(), "shape": head.shape, "data": value}
        assert oip.decode_request(json.dumps({"inputs": [tensor]}).encode(), json_length=None).payload == (elements,)


@given(st.binary(max_size=200), st.none() | st.integers(-5, 300))
def test_any_bytes_are_read_or_refused(data: bytes, length: int | None) -> None:
    for read in (oip.decode_request, oip.decode_response):
        with pytest.raises(InputRefused) as caught:
            read(data, json_length=length)
        assert caught.value.code == "model.request"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": None}, "neither data nor"),
        ({"data": [1, 2, 3]}, "3 elements"),
        ({"data": [[1, 2], [3]]}, "not nested"),
        ({"data": [[1, 2], 3]}, "not nested"),
        ({"data": [[[1], [2]], [[3], [4]]]}, "not FP32"),
        ({"data": [[1, 2]]}, "1 rows"),
        ({"data": 7}, "no list"),
        ({"data": ["1", "2", "3", "4"]}, "not FP32"),
        ({"data": [None, 1, 2, 3]}, "not FP32"),
        ({"data": [True, False, True, True]}, "not FP32"),
        ({"data": [1e39, 0, 0, 0]}, "cannot"),
        ({"data": [1.0, 2, 3, 4], "datatype": "INT32"}, "not INT32"),
        ({"data": [256, 2, 3, 4], "datatype": "UINT8"}, "cannot"),
        ({"data": [1, 0, 1, 0], "datatype": "BOOL"}, "not BOOL"),
        ({"data": [1, 2, 3, 4], "datatype": "FP16"}, "no form in JSON"),
        ({"datatype": "BYTES"}, "is 'BYTES'"),
        ({"datatype": "BF16"}, "is 'BF16'"),
        ({"datatype": "fp32"}, "is 'fp32'"),
        ({"shape": [-1, 4]}, r"shape\[0\]"),
        ({"shape": [1] * 9}, "shape"),
        ({"shape": [2**40]}, "shape"),
        ({"name": ""}, "name"),
        ({"parameters": {"binary_data_size": 16}}, "both data and"),
        ({"data": None, "parameters": {"binary_data_size": 15}}, "is 15"),
        ({"data": None, "parameters": {"binary_data_size": "16"}}, "is 16"),
        ({"data": None, "parameters": {"binary_data_size": True}}, "is True"),
        ({"data": None, "parameters": {"binary_data_size": 16.0}}, "is 16.0"),
        ({"data": None, "parameters": {"shared_memory_region": "r"}}, "neither data nor"),
        ({"parameters": {"nested": {}}}, "parameters"),
    ],
)
def test_wrong_tensors_are_refused_with_their_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputRefused, match=words) as caught:
        oip.decode_request(request(**changes), json_length=None)
    assert caught.value.code == "model.request"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b'{"inputs": []}',
        b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}',
        b'{"inputs": ' + b"[" * 20_000,
        b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": '
        + b"[" * 20_000
        + b"]" * 20_000
        + b"}]}",
        b'{"id": "' + b"i" * 200 + b'", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}',
        b"\xff\xfe",
    ],
)
def test_wrong_json_is_refused(text: bytes) -> None:
    with pytest.raises(InputRefused):
        oip.decode_request(text, json_length=None)


def test_the_binary_part_is_used_up_exactly() -> None:
    sent = OipRequest(inputs=(HEAD,), payload=(DATA,))
    length, parts = oip.encode_request(sent)
    for wrong, where in ((body(parts) + b"x", length), (body(parts)[:-1], length), (body(parts), 0), (b"", 5)):
        with pytest.raises(InputRefused):
            oip.decode_request(wrong, json_length=where)
    with pytest.raises(InputRefused, match="once each"):
        oip.decode_request(json.dumps({"inputs": json.loads(request())["inputs"] * 2}).encode(), json_length=None)


def test_binary_tensors_are_not_copied() -> None:
    length, parts = oip.encode_request(OipRequest(inputs=(HEAD,), payload=(DATA,)))
    whole = bytearray(body(parts))
    read = oip.decode_request(whole, json_length=length)
    whole[-4:] = struct.pack("<f", 9)
    assert struct.unpack("<4f", read.payload[0])[3] == 9


def test_fp16_travels_as_bytes_only() -> None:
    head, data = TensorHead(name="h", dtype="fp16", shape=(2,)), struct.pack("<2e", 0.5, 1)
    sent = OipRequest(inputs=(head,), payload=(data,))
    length, parts = oip.encode_request(sent)
    assert oip.decode_request(body(parts), json_length=length) == sent
    with pytest.raises(InputRefused, match="no form in JSON"):
        oip.encode_request(sent, binary=False)


def test_json_is_bounded_both_ways_and_says_what_to_use_instead() -> None:
    count = limits.MAX_JSON_BODY_BYTES // 4
    large = TensorHead(name="x", dtype="uint8", shape=(3 * count,))
    for size, words in ((3 * count, "too many"), (2 * count - 10, "bytes of JSON")):
        head = TensorHead(name="x", dtype="uint8", shape=(size,))
        with pytest.raises(InputRefused, match=words) as caught:
            oip.encode_response(OipResponse(model="m", outputs=(head,), payload=(bytes(size),)), binary=())
        assert caught.value.code == "model.too_large"
        assert "binary" in caught.value.hint
    with pytest.raises(InputRefused) as caught:
        oip.decode_request(b" " * (limits.MAX_JSON_BODY_BYTES + 1), json_length=None)
    assert (caught.value.code, "binary" in caught.value.hint) == ("model.too_large", True)
    oip.encode_response(OipResponse(model="m", outputs=(large,), payload=(bytes(3 * count),)), binary={"x"})
    nan = struct.pack("<4f", 1, 2, float("nan"), 4)
    with pytest.raises(InputRefused, match="finite"):
        oip.encode_response(OipResponse(model="m", outputs=(HEAD,), payload=(nan,)), binary=())


@pytest.mark.parametrize(
    ("outputs", "parameters", "names", "binary"),
    [
        ((), {}, ["x", "y"], set()),
        ((), {"binary_data_output": True}, ["x", "y"], {"x", "y"}),
        (("y",), {}, ["y"], set()),
        ((("y", True), "x"), {}, ["y", "x"], {"y"}),
        ((("y", False), "x"), {"binary_data_output": True}, ["y", "x"], {"x"}),
    ],
)
def test_outputs_come_as_asked(
    outputs: tuple[Any, ...], parameters: dict[str, Any], names: list[str], binary: set[str]
) -> None:
    wanted = [
        {"name": one} if isinstance(one, str) else {"name": one[0], "parameters": {"binary_data": one[1]}}
        for one in outputs
    ]
    document = json.loads(request()) | {"outputs": wanted, "parameters": parameters}
    asked = oip.decode_request(json.dumps(document).encode(), json_length=None)
    length, parts = oip.answer_request(asked, SCORES)
    text = json.loads(body(parts)[:length])
    assert [output["name"] for output in text["outputs"]] == names
    assert {
        output["name"] for output in text["outputs"] if "binary_data_size" in output.get("parameters", {})
    } == binary
    read = oip.decode_response(body(parts), json_length=length)
    assert dict(zip((head.name for head in read.outputs), map(bytes, read.payload), strict=True)) == {
        name: bytes(SCORES.payload[("x", "y").index(name)]) for name in names
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outputs": [{"name": "z"}]}, "no output 'z'"),
        ({"outputs": [{"name": "x"}, {"name": "x"}]}, "once each"),
        ({"outputs": [{"name": "x", "parameters": {"classification": 3}}]}, "classification"),
        ({"outputs": [{"name": "x", "parameters": {"binary_data": 1}}]}, "expected true or false"),
        ({"parameters": {"binary_data_output": "yes"}}, "expected true or false"),
    ],
)
def test_wrong_wishes_are_refused(change: dict[str, Any], words: str) -> None:
    document = json.loads(request()) | change
    with pytest.raises(InputRefused, match=words):
        oip.answer_request(oip.decode_request(json.dumps(document).encode(), json_length=None), SCORES)


@pytest.mark.parametrize(("timeout", "expected"), [(None, 700), (0, 700), (50_000, 50), (999, 1), (10**15, 3_600_000)])
def test_the_timeout_is_the_deadline(timeout: int | None, expected: int) -> None:
    parameters: oip.Parameters = {} if timeout is None else {"timeout": timeout}
    asked = OipRequest(inputs=(), payload=(), parameters=parameters)
    assert asked.deadline_ms(default_ms=700) == expected


@pytest.mark.parametrize("timeout", [-1, 1.5, "5", True])
def test_a_timeout_that_is_no_time_is_refused(timeout: oip.Scalar) -> None:
    with pytest.raises(InputRefused):
        OipRequest(inputs=(), payload=(), parameters={"timeout": timeout}).deadline_ms(default_ms=700)


def test_a_payload_is_cut_where_its_tensors_end() -> None:
    heads = (HEAD, TensorHead(name="b", dtype="bool", shape=(3,)))
    assert [bytes(piece) for piece in oip.cut_payload(heads, DATA + b"\1\0\1")] == [DATA, b"\1\0\1"]
    for wrong in (DATA, DATA + b"\1\0\1\0"):
        with pytest.raises(InputRefused):
            oip.cut_payload(heads, wrong)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2", Target(ask="server")),
        ("/v2/", Target(ask="server")),
        ("/v2/health/live", Target(ask="live")),
        ("/v2/health/ready", Target(ask="ready")),
        ("/v2/models/digits", Target(ask="model", model="digits")),
        ("/v2/models/digits/ready", Target(ask="model_ready", model="digits")),
        ("/v2/models/digits/infer", Target(ask="infer", model="digits")),
        ("/v2/models/digits/versions/1.0.0-rc.1", Target(ask="model", model="digits", version="1.0.0-rc.1")),
        ("/v2/models/digits/versions/2/infer", Target(ask="infer", model="digits", version="2")),
        ("/v2/models/", None),
        ("/v2/models/a/b", None),
        ("/v2/models/a%2fb", None),
        ("/v2/models/a/versions//infer", None),
        ("/v1/models", None),
        ("", None),
        ("/", None),
    ],
)
def test_paths(path: str, expected: Target | None) -> None:
    assert oip_terms.parse_path(path) == expected


@pytest.mark.parametrize(
    ("code", "retry", "status"),
    [
        ("model.request", False, 400),
        ("model.input", False, 400),
        ("protocol.frame", False, 400),
        ("model.unknown", False, 404),
        ("http.method", False, 405),
        ("model.too_large", False, 413),
        ("overload", True, 429),
        ("overload.memory", True, 429),
        ("internal", False, 500),
        ("model.run", False, 500),
        ("model.output", False, 500),
        ("model.not_loaded", True, 503),
        ("model.host_lost", True, 503),
        ("deadline", True, 504),
    ],
)
def test_statuses(code: str, retry: bool, status: int) -> None:
    assert oip_terms.status_of(code, retry=retry) == status


def test_errors_are_read_from_any_server() -> None:
    error = oip_terms.OipError(error="no", code="overload", hint="wait", retry=True)
    assert oip_terms.decode_error(oip_terms.encode_error(error)) == error
    assert oip_terms.decode_error(b'{"error": "theirs", "more": 1}').error == "theirs"
    assert oip_terms.decode_error(b"<html>").error == "<html>"
    assert oip_terms.decode_error(b"").error == "no reason given"


@pytest.mark.parametrize("labels", [(), ("7",), ("7", "a,b")])
def test_provenance_comes_back_from_scalars(labels: tuple[str, ...]) -> None:
    said = Provenance(
        rung="cached", digest="d" * 64, variant="int8", labels=labels, confidences=(0.5,) * len(labels), degraded=True,
        reason="the model is loading", escalated="offline",
    )  # fmt: skip
    parameters = oip_terms.write_provenance(said)
    assert all(isinstance(value, str | int | float | bool) for value in parameters.values())
    assert parameters.get("label") == (labels[0] if len(labels) == 1 else None)
    assert oip_terms.read_provenance(parameters) == said


@pytest.mark.parametrize("parameters", [{"rung": "high"}, {"labels": "["}, {"confidence": "much"}, {"digest": 7}])
def test_foreign_parameters_are_no_provenance(parameters: oip.Parameters) -> None:
    assert oip_terms.read_provenance(parameters) is None


def test_metadata_has_the_protocols_names() -> None:
    assert json.loads(oip_terms.encode_server(name="a", version="1"))["extensions"][0] == "binary_tensor_data"
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1, 64)),),
        outputs=(TensorSpec(name="scores", dtype="fp16", shape=(-1, 10)),),
    )
    document = oip_terms.encode_metadata(name="digits", versions=["1.0.0"], platform="onnx", signature=signature)
    assert json.loads(document) == {
        "name": "digits",
        "versions": ["1.0.0"],
        "platform": "onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}],
        "outputs": [{"name": "scores", "datatype": "FP16", "shape": [-1, 10]}],
    }
