"""The Open Inference Protocol, version 2 over HTTP, with the binary tensor extension: bodies to values and back.

Rules:
- Tensors are bytes on our side, little-endian and row-major, whichever form they travel in. Binary tensors are views
  of the body; nothing is copied.
- A body with binary tensors is JSON followed by their bytes, in the order of the JSON's tensors; the header
  `Inference-Header-Content-Length` says where the JSON ends (`json_length`). Without it, the whole body is JSON.
- The JSON of a body is bounded by MAX_JSON_BODY_BYTES, both ways: numbers as text cost some three hundred times what
  they cost as bytes. Whoever has more uses the binary form, and is told so.
- fp16 has no form in JSON. BYTES and BF16 are refused by name: no model here takes them.

Sources: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md (the 2 May 2023 text);
github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md, extension_schedule_policy.md.

Not here: HTTP (edge_agent/adapters/oip.py, the hub's offload room), paths, statuses and what a release says of its
answers in `parameters` (shared/wire/oip_terms.py), and what a model accepts (shared/inference.py).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Annotated, Any, Final, TypeAlias, cast

import msgspec

from shared import limits
from shared.errors import InputRefused
from shared.inference import TensorHead, tensor_bytes
from shared.model import ITEM_BYTES, DType

Buffer: TypeAlias = bytes | bytearray | memoryview
Scalar: TypeAlias = str | int | float | bool
Parameters: TypeAlias = dict[str, Scalar]
Encoded: TypeAlias = tuple[int | None, list[Buffer]]
"""`json_length` (None when everything is JSON, and no such header is sent) and the body's pieces."""

JSON_LENGTH_HEADER: Final = "Inference-Header-Content-Length"
_BINARY_SIZE: Final = "binary_data_size"
_FORMATS: Final[dict[str, str]] = {
    "bool": "?", "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i",
    "uint64": "Q", "int64": "q", "fp32": "f", "fp64": "d",
}  # fmt: skip
_ACCEPTED: Final[dict[str, set[type]]] = {"b": {bool}, "f": {int, float}}
_USE_BINARY: Final = "send tensors with the binary tensor extension (binary_data_size), or fewer rows at once"
_ASK_BINARY: Final = "ask for binary outputs (binary_data, or binary_data_output), or send fewer rows at once"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Size = Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_FRAME_PAYLOAD_BYTES)]
_Shape = Annotated[tuple[_Size, ...], msgspec.Meta(max_length=limits.MAX_TENSOR_RANK)]
_Id = Annotated[str, msgspec.Meta(max_length=limits.MAX_REQUEST_ID_CHARS)]


class OipOutput(msgspec.Struct, frozen=True, kw_only=True):
    """An output that a request names; `binary` is None where the request's `binary_data_output` decides."""

    name: str
    binary: bool | None = None


class OipRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An inference request.

    Attributes:
        inputs, payload: heads and their elements, one buffer each, in the same order.
        outputs: those that are wanted; empty for all.
        parameters: as they came; unknown ones mean nothing.
    """

    inputs: tuple[TensorHead, ...]
    payload: tuple[Buffer, ...]
    id: str = ""
    outputs: tuple[OipOutput, ...] = ()
    parameters: Parameters = {}

    def deadline_ms(self, *, default_ms: int, most_ms: int = limits.MAX_REQUEST_DEADLINE_MS) -> int:
        """The `timeout` parameter (microseconds) as a deadline; 0 or none gives the default.

        Raises:
            InputRefused: it is not a whole number, or negative.
        """
        timeout = self.parameters.get("timeout", 0)
        if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
            raise InputRefused(
                f"the parameter timeout is {str(timeout)[:40]}, expected whole microseconds",
                code="model.request",
                hint="give the time in microseconds: 50000 for 50 ms",
            )
        return min(max(timeout // 1000, 1), most_ms) if timeout else default_ms


class OipResponse(msgspec.Struct, frozen=True, kw_only=True):
    """An inference response; `payload` holds one buffer for each of `outputs`."""

    model: str
    outputs: tuple[TensorHead, ...]
    payload: tuple[Buffer, ...]
    version: str = ""
    id: str = ""
    parameters: Parameters = {}


class _Tensor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: _Name
    datatype: str
    shape: _Shape
    parameters: Parameters = {}
    data: msgspec.Raw = msgspec.Raw()


class _Wanted(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    name: _Name
    parameters: Parameters = {}


class _Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    inputs: tuple[_Tensor, ...]
    id: _Id = ""
    parameters: Parameters = {}
    outputs: tuple[_Wanted, ...] = ()


class _Response(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    model_name: str
    outputs: tuple[_Tensor, ...]
    model_version: str = ""
    id: str = ""
    parameters: Parameters = {}


_request_decoder: msgspec.json.Decoder[_Request] = msgspec.json.Decoder(_Request)
_response_decoder: msgspec.json.Decoder[_Response] = msgspec.json.Decoder(_Response)


def decode_request(body: Buffer, *, json_length: int | None) -> OipRequest:
    """Parse a request's body; its binary tensors are views of `body`.

    Raises:
        InputRefused: with the code `model.too_large` for what exceeds a bound, `model.request` for all else.
    """
    text, rest = _split(body, json_length, hint=_USE_BINARY)
    try:
        said = _request_decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _refused(f"the request's JSON does not parse: {error}") from error
    if not said.inputs:
        raise _refused("the request has no inputs")
    heads, payload = _read_tensors(said.inputs, rest)
    outputs = tuple(_wanted(output) for output in said.outputs)
    if len(outputs) > limits.MAX_TENSORS or len({output.name for output in outputs}) != len(outputs):
        raise _refused(f"outputs must be named once each, at most {limits.MAX_TENSORS} of them")
    _flag(said.parameters, "binary_data_output")
    return OipRequest(inputs=heads, payload=payload, id=said.id, outputs=outputs, parameters=said.parameters)


def encode_request(request: OipRequest, *, binary: bool = True) -> Encoded:
    """A request's body, with all its tensors in one form; raises InputRefused when JSON cannot carry them."""
    names = {head.name for head in request.inputs} if binary else set[str]()
    tensors, tail = _write_tensors(request.inputs, request.payload, binary=names)
    outputs = tuple(
        _Wanted(name=output.name, parameters={} if output.binary is None else {"binary_data": output.binary})
        for output in request.outputs
    )
    said = _Request(inputs=tensors, id=request.id, parameters=request.parameters, outputs=outputs)
    return _join(msgspec.json.encode(said), tail, hint=_USE_BINARY)


def decode_response(body: Buffer, *, json_length: int | None) -> OipResponse:
    """Parse a response's body; its binary tensors are views of `body`; raises InputRefused."""
    text, rest = _split(body, json_length, hint=_ASK_BINARY)
    try:
        said = _response_decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _refused(f"the response's JSON does not parse: {error}") from error
    heads, payload = _read_tensors(said.outputs, rest)
    return OipResponse(
        model=said.model_name,
        version=said.model_version,
        id=said.id,
        outputs=heads,
        payload=payload,
        parameters=said.parameters,
    )


def encode_response(response: OipResponse, *, binary: Collection[str]) -> Encoded:
    """A response's body; the outputs named in `binary` follow the JSON, the others are in it; raises InputRefused."""
    tensors, tail = _write_tensors(response.outputs, response.payload, binary=binary)
    said = _Response(
        model_name=response.model,
        model_version=response.version,
        id=response.id,
        outputs=tensors,
        parameters=response.parameters,
    )
    return _join(msgspec.json.encode(said), tail, hint=_ASK_BINARY)


def answer_request(request: OipRequest, response: OipResponse) -> Encoded:
    """The response's body as this request wants it: its outputs, in its order, each in the form it asked for.

    Raises:
        InputRefused: the request names an output that the model has not, or JSON cannot carry one.
    """
    usual = request.parameters.get("binary_data_output") is True
    if not request.outputs:
        return encode_response(response, binary={head.name for head in response.outputs} if usual else ())
    places = {head.name: place for place, head in enumerate(response.outputs)}
    for output in request.outputs:
        if output.name not in places:
            raise _refused(f"there is no output {output.name[:80]!r}", hint=f"outputs: {', '.join(places)}")
    chosen = msgspec.structs.replace(
        response,
        outputs=tuple(response.outputs[places[output.name]] for output in request.outputs),
        payload=tuple(response.payload[places[output.name]] for output in request.outputs),
    )
    binary = {output.name for output in request.outputs if (usual if output.binary is None else output.binary)}
    return encode_response(chosen, binary=binary)


def cut_payload(heads: Sequence[TensorHead], payload: Buffer) -> tuple[Buffer, ...]:
    """The bytes of each tensor of a payload that holds them back to back, as views; raises InputRefused."""
    view, pieces, start = memoryview(payload), [], 0
    for head in heads:
        pieces.append(view[start : start + tensor_bytes(head)])
        start += tensor_bytes(head)
    if start != len(view):
        raise _refused(f"the tensors' shapes need {start} bytes, there are {len(view)}")
    return tuple(pieces)


def _split(body: Buffer, json_length: int | None, *, hint: str) -> tuple[memoryview, memoryview]:
    """The JSON and what follows it."""
    view = memoryview(body)
    length = len(view) if json_length is None else json_length
    if not 0 < length <= len(view):
        raise _refused(f"{JSON_LENGTH_HEADER} is {json_length}, the body has {len(view)} bytes")
    if length > limits.MAX_JSON_BODY_BYTES:
        raise _too_large(f"{length} bytes of JSON exceed {limits.MAX_JSON_BODY_BYTES}", hint=hint)
    return view[:length], view[length:]


def _join(text: bytes, tail: list[Buffer], *, hint: str) -> Encoded:
    if len(text) > limits.MAX_JSON_BODY_BYTES:
        raise _too_large(f"{len(text)} bytes of JSON exceed {limits.MAX_JSON_BODY_BYTES}", hint=hint)
    return (len(text), [text, *tail]) if tail else (None, [text])


def _read_tensors(tensors: tuple[_Tensor, ...], rest: memoryview) -> tuple[tuple[TensorHead, ...], tuple[Buffer, ...]]:
    """Heads and elements; `rest` must be used up exactly."""
    if len(tensors) > limits.MAX_TENSORS or len({tensor.name for tensor in tensors}) != len(tensors):
        raise _refused(f"tensors must be named once each, at most {limits.MAX_TENSORS} of them")
    heads: list[TensorHead] = []
    payload: list[Buffer] = []
    start = 0
    for tensor in tensors:
        head = _head(tensor)
        heads.append(head)
        size = tensor.parameters.get(_BINARY_SIZE)
        if size is None:
            payload.append(_parse_data(head, tensor.data))
            continue
        if bytes(tensor.data):
            raise _refused(f"tensor {head.name[:80]!r} has both data and {_BINARY_SIZE}")
        if not isinstance(size, int) or isinstance(size, bool) or size != tensor_bytes(head):
            needs = f"{head.dtype}{list(head.shape)} needs {tensor_bytes(head)}"
            raise _refused(f"tensor {head.name[:80]!r}: {_BINARY_SIZE} is {str(size)[:40]}, {needs}")
        payload.append(rest[start : start + size])
        start += size
    if start != len(rest):
        raise _refused(f"the binary tensors need {start} bytes, {len(rest)} follow the JSON")
    return tuple(heads), tuple(payload)


def _head(tensor: _Tensor) -> TensorHead:
    dtype = tensor.datatype.lower()
    if dtype not in ITEM_BYTES or not tensor.datatype.isupper():
        known = ", ".join(name.upper() for name in ITEM_BYTES)
        raise _refused(f"tensor {tensor.name[:80]!r} is {tensor.datatype[:40]!r}", hint=f"the datatypes are {known}")
    head = TensorHead(name=tensor.name, dtype=cast(DType, dtype), shape=tensor.shape)
    if tensor_bytes(head) > limits.MAX_FRAME_PAYLOAD_BYTES:
        raise _too_large(
            f"tensor {tensor.name[:80]!r} of {tensor_bytes(head)} bytes exceeds {limits.MAX_FRAME_PAYLOAD_BYTES}",
            hint="send fewer rows at once",
        )
    return head


def _parse_data(head: TensorHead, data: msgspec.Raw) -> bytes:
    """A tensor's elements from JSON, nested as its shape or flat."""
    where = f"tensor {head.name[:80]!r}"
    if not bytes(data):
        raise _refused(f"{where} has neither data nor {_BINARY_SIZE}", hint="shared memory is not offered")
    if head.dtype == "fp16":
        raise _refused(f"{where}: FP16 has no form in JSON", hint=_USE_BINARY)
    try:
        values = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _refused(f"{where}: its data does not parse: {error}") from error
    flat = _flatten(values, head)
    if not {type(value) for value in flat} <= _ACCEPTED.get(head.dtype[0], {int}):
        raise _refused(f"{where}: its data holds something that is not {head.dtype.upper()}")
    try:
        return struct.pack(f"<{len(flat)}{_FORMATS[head.dtype]}", *flat)
    except (struct.error, OverflowError) as error:
        raise _refused(f"{where}: its data holds a number that {head.dtype.upper()} cannot: {error}") from error


def _flatten(values: Any, head: TensorHead) -> list[Any]:
    """The elements of a nested or flat list; the nesting must be the shape's."""
    wanted = f"{head.dtype.upper()}{list(head.shape)}"
    level = values if isinstance(values, list) else [values] if not head.shape else None
    if level is None:
        raise _refused(f"tensor {head.name[:80]!r}: its data is no list, expected {wanted}")
    if level and isinstance(level[0], list):
        if not head.shape or len(level) != head.shape[0]:
            raise _refused(f"tensor {head.name[:80]!r}: its data has {len(level)} rows, expected {wanted}")
        for size in head.shape[1:]:
            if not all(isinstance(row, list) and len(row) == size for row in level):
                raise _refused(f"tensor {head.name[:80]!r}: its data is not nested as {wanted}")
            level = list(chain.from_iterable(level))
    if len(level) != math.prod(head.shape):
        raise _refused(f"tensor {head.name[:80]!r}: its data has {len(level)} elements, expected {wanted}")
    return level


def _write_tensors(
    heads: Iterable[TensorHead], payload: Iterable[Buffer], *, binary: Collection[str]
) -> tuple[tuple[_Tensor, ...], list[Buffer]]:
    tensors: list[_Tensor] = []
    tail: list[Buffer] = []
    for head, data in zip(heads, payload, strict=True):
        kind = head.dtype.upper()
        if head.name in binary:
            size: Parameters = {_BINARY_SIZE: len(data)}
            tensors.append(_Tensor(name=head.name, datatype=kind, shape=head.shape, parameters=size))
            tail.append(data)
        else:
            text = _format_data(head, data)
            tensors.append(_Tensor(name=head.name, datatype=kind, shape=head.shape, data=msgspec.Raw(text)))
    return tuple(tensors), tail


def _format_data(head: TensorHead, data: Buffer) -> bytes:
    """A tensor's elements as a flat JSON list."""
    where = f"tensor {head.name[:80]!r}"
    if head.dtype == "fp16":
        raise _refused(f"{where}: FP16 has no form in JSON", hint=_ASK_BINARY)
    count = len(data) // ITEM_BYTES[head.dtype]
    if 2 * count > limits.MAX_JSON_BODY_BYTES:
        raise _too_large(f"{where}: {count} elements are too many for JSON", hint=_ASK_BINARY)
    values = struct.unpack(f"<{count}{_FORMATS[head.dtype]}", data)
    if head.dtype[0] == "f" and not all(map(math.isfinite, values)):
        raise _refused(f"{where} holds a value that is no finite number, which JSON cannot carry", hint=_ASK_BINARY)
    return msgspec.json.encode(values)


def _wanted(output: _Wanted) -> OipOutput:
    if output.parameters.get("classification"):
        raise _refused(
            "the classification extension is not offered", hint="the answer's parameters carry label and confidence"
        )
    return OipOutput(name=output.name, binary=_flag(output.parameters, "binary_data"))


def _flag(parameters: Parameters, name: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise _refused(f"the parameter {name} is {str(value)[:40]!r}, expected true or false")
    return value


def _refused(message: str, *, hint: str = "") -> InputRefused:
    return InputRefused(message, code="model.request", hint=hint)


def _too_large(message: str, *, hint: str) -> InputRefused:
    return InputRefused(message, code="model.too_large", hint=hint)
