"""The Open Inference Protocol as the door speaks it: an HTTP request to the agent's own, and its reply to a response.

Rules:
- What applications can ask here is what they can ask in frames, of the same handler; nothing is decided here.
- Every response carries JSON or a tensor body; an error carries the protocol's `error`, and `Retry-After` where the
  same request can succeed later.
- Ready means that every model of this device serves; a device without models is ready. "Not ready" is status 400, as
  the specification wants it.
- A compressed body is unpacked only as far as a body may be long, and one at a time.
- Beside it, `/metrics` tells Prometheus how the agent is.

Not here: bytes on the stream (http_door.py), bodies of the protocol (shared/wire/oip.py).
"""

from __future__ import annotations

import asyncio
import logging
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec

from edge_agent import __version__
from edge_agent.adapters import metrics
from edge_agent.adapters.waiting import Place, refusal
from edge_agent.framing import Buffer
from shared import limits
from shared.errors import InputRefused, ModelError, OutriderError
from shared.inference import (
    AgentState,
    Answer,
    Describe,
    Description,
    Infer,
    ModelState,
    Refusal,
    Reply,
    Request,
    Status,
)
from shared.wire import oip, oip_terms

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = limits.MAX_FRAME_PAYLOAD_BYTES + limits.MAX_JSON_BODY_BYTES
"""What a frame may carry, and the JSON before it."""
DEFAULT_DEADLINE_MS: Final = 1000
METRICS_PATH: Final = "/metrics"
_JSON: Final = (b"content-type", b"application/json")
_BINARY: Final = (b"content-type", b"application/octet-stream")
_LENGTH: Final = oip.JSON_LENGTH_HEADER.lower().encode("ascii")
_DIGITS: Final = re.compile(rb"[0-9]{1,9}")
_ANY_WRAPPING: Final = zlib.MAX_WBITS + 32
"""zlib's word for "gzip or zlib, see its first bytes" (zlib manual, inflateInit2)."""

ReplyTo: TypeAlias = Callable[[Request, bytearray, float], Awaitable[tuple[Reply, Sequence[Buffer]]]]


class HttpRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request, whole; header names in lower case."""

    method: str
    target: str
    headers: Mapping[bytes, bytes]
    body: bytearray


class HttpResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A response; the length goes without saying."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...] = (_JSON,)
    parts: Sequence[Buffer] = ()


class Conversation:
    """Answers HTTP requests by asking the agent."""

    def __init__(self, *, reply_to: ReplyTo) -> None:
        """One serves all connections, so that only one body is unpacked at a time."""
        self._reply_to = reply_to
        self._unpacking = asyncio.Lock()

    async def respond(self, request: HttpRequest, place: Place) -> HttpResponse:
        """The response; whatever the request is, it gets one."""
        try:
            return await self._respond(request, place)
        except OutriderError as error:
            return error_response(refusal("", error))
        except Exception:  # a defect in the answer to one application must not take the agent from the others
            logger.exception("a request over HTTP failed")
            return error_response(Refusal(id="", code="internal", message="the agent failed; its log says why"))

    async def _respond(self, request: HttpRequest, place: Place) -> HttpResponse:
        path = request.target.partition("?")[0]
        if path == METRICS_PATH:
            return await self._metrics(request, place)
        target = oip_terms.parse_path(path)
        if target is None:
            raise InputRefused(
                f"there is nothing at {request.target[:120]!r}",
                code="http.not_found",
                hint="the models are at /v2/models",
            )
        if not _fits(request.method, target.method):
            return _wrong_method(target.method)
        match target.ask:
            case "server":
                return HttpResponse(
                    status=200, parts=[oip_terms.encode_server(name="outrider-agent", version=__version__)]
                )
            case "live":
                return HttpResponse(status=200, parts=[b'{"live":true}'])
            case "ready":
                return _readiness(await self._describe("", place))
            case "model":
                return _metadata(await self._model(target, place))
            case "model_ready":
                return _readiness((await self._model(target, place),))
            case "infer":
                return await self._infer(request, target, place)

    async def _metrics(self, request: HttpRequest, place: Place) -> HttpResponse:
        if not _fits(request.method, "GET"):
            return _wrong_method("GET")
        state, _ = await self._reply_to(Status(), bytearray(), place.arrived)
        if isinstance(state, Refusal):
            raise _Refused(state)
        assert isinstance(state, AgentState)
        return HttpResponse(
            status=200, headers=((b"content-type", metrics.CONTENT_TYPE),), parts=[metrics.render(state)]
        )

    async def _describe(self, model: str, place: Place) -> tuple[ModelState, ...]:
        reply, _ = await self._reply_to(Describe(model=model), bytearray(), place.arrived)
        if isinstance(reply, Refusal):
            raise _Refused(reply)
        assert isinstance(reply, Description)
        return reply.models

    async def _model(self, target: oip_terms.Target, place: Place) -> ModelState:
        models = await self._describe(target.model, place)
        if not models:
            raise InputRefused(f"there is no model {target.model!r} here", code="model.unknown")
        if target.version not in ("", models[0].version):
            raise _no_version(target, models[0].version)
        return models[0]

    async def _infer(self, request: HttpRequest, target: oip_terms.Target, place: Place) -> HttpResponse:
        if target.version:
            await self._model(target, place)
        body = await self._unpack(request, place)
        asked = oip.decode_request(body, json_length=_json_length(request.headers))
        infer = Infer(
            model=target.model,
            inputs=asked.inputs,
            id=asked.id,
            deadline_ms=asked.deadline_ms(default_ms=DEFAULT_DEADLINE_MS),
            version=target.version,
            outputs=tuple(output.name for output in asked.outputs),
        )
        reply, parts = await self._reply_to(infer, bytearray().join(asked.payload), place.arrived)
        if isinstance(reply, Refusal):
            raise _Refused(reply)
        assert isinstance(reply, Answer)
        length, pieces = oip.answer_request(asked, _response(reply, parts))
        if length is None:
            return HttpResponse(status=200, parts=pieces)
        return HttpResponse(status=200, headers=(_BINARY, (_LENGTH, b"%d" % length)), parts=pieces)

    async def _unpack(self, request: HttpRequest, place: Place) -> bytearray:
        """The body, without its compression."""
        encoding = request.headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding == b"identity":
            return request.body
        if encoding not in (b"gzip", b"deflate"):
            raise InputRefused(
                f"the body's encoding {encoding[:40]!r} is not known",
                code="http.encoding",
                hint="use gzip, deflate or none",
            )
        async with self._unpacking:
            body = await asyncio.to_thread(_inflate, request.body)
            refused = place.grow(max(len(body) - len(request.body), 0))
        if refused is not None:
            raise _Refused(refused)
        return body


class _Refused(OutriderError):
    """A refusal on its way to the response."""

    def __init__(self, said: Refusal) -> None:
        super().__init__(said.message, code=said.code, hint=said.hint)
        self.retry = said.retry


def error_response(said: Refusal) -> HttpResponse:
    """A refusal as the protocol has it."""
    message = f"{said.message}; {said.hint}" if said.hint else said.message
    error = oip_terms.OipError(error=message, code=said.code, hint=said.hint, retry=said.retry)
    headers = (_JSON, (b"retry-after", b"%d" % oip_terms.RETRY_AFTER_S)) if said.retry else (_JSON,)
    status = oip_terms.status_of(said.code, retry=said.retry)
    return HttpResponse(status=status, headers=headers, parts=[oip_terms.encode_error(error)])


def _fits(method: str, wanted: str) -> bool:
    return method == wanted or (method == "HEAD" and wanted == "GET")


def _wrong_method(wanted: str) -> HttpResponse:
    said = Refusal(id="", code="http.method", message=f"this path takes {wanted}", hint="use that method")
    refused = error_response(said)
    return msgspec.structs.replace(refused, headers=(*refused.headers, (b"allow", wanted.encode("ascii"))))


def _response(answer: Answer, parts: Sequence[Buffer]) -> oip.OipResponse:
    said = oip_terms.Provenance(
        rung=answer.rung,
        digest=answer.digest,
        variant=answer.variant,
        labels=answer.labels,
        confidences=answer.confidences,
        degraded=answer.degraded,
        deadline_met=answer.deadline_met,
        reason=answer.reason,
        escalated=answer.escalated,
    )
    try:
        payload = oip.cut_payload(answer.outputs, parts[0] if len(parts) == 1 else b"".join(parts))
    except InputRefused as error:
        raise ModelError(f"the model's answer does not fit its heads: {error}", code="model.output") from error
    return oip.OipResponse(
        model=answer.model,
        version=answer.version,
        id=answer.id,
        outputs=answer.outputs,
        payload=payload,
        parameters=oip_terms.write_provenance(said),
    )


def _readiness(models: tuple[ModelState, ...]) -> HttpResponse:
    if all(model.signature is not None for model in models):
        return HttpResponse(status=200, parts=[b'{"ready":true}'])
    return HttpResponse(status=400, parts=[b'{"ready":false}'])


def _metadata(model: ModelState) -> HttpResponse:
    if model.signature is None:
        raise _Refused(
            Refusal(
                id="",
                code="model.not_loaded",
                message=f"no release of {model.family!r} is loaded",
                hint="see 'outrider-agent model ls' for what it waits for",
                retry=True,
            )
        )
    document = oip_terms.encode_metadata(
        name=model.family,
        versions=[model.version],
        platform=f"outrider_{model.variant}" if model.variant else "outrider",
        signature=model.signature,
    )
    return HttpResponse(status=200, parts=[document])


def _no_version(target: oip_terms.Target, served: str) -> InputRefused:
    return InputRefused(
        f"version {target.version!r} of {target.model!r} is not served here",
        code="model.unknown",
        hint=f"the version {served!r} is" if served else "no release is loaded",
    )


def _json_length(headers: Mapping[bytes, bytes]) -> int | None:
    value = headers.get(_LENGTH)
    if value is None:
        return None
    if not _DIGITS.fullmatch(value):
        raise InputRefused(f"{oip.JSON_LENGTH_HEADER} is {value[:40]!r}, expected a length", code="model.request")
    return int(value)


def _inflate(packed: bytearray) -> bytearray:
    """What was compressed with gzip or zlib; raises InputRefused when it is not that, not whole, or too long."""
    machine = zlib.decompressobj(_ANY_WRAPPING)
    try:
        body = bytearray(machine.decompress(packed, MAX_BODY_BYTES + 1))
    except zlib.error as error:
        raise InputRefused(f"the compressed body does not unpack: {error}", code="http.encoding") from error
    if len(body) > MAX_BODY_BYTES:
        raise too_large()
    if not machine.eof or machine.unused_data:
        raise InputRefused("the compressed body is cut short, or more follows it", code="http.encoding")
    return body


def too_large() -> InputRefused:
    """A body longer than any that is taken."""
    return InputRefused(
        f"the body exceeds {MAX_BODY_BYTES} bytes", code="http.too_large", hint="send fewer rows at once"
    )
