"""The Open Inference Protocol on the hub's port: a raw ASGI application for everything below `/v2`.

Rules:
1. Whoever asks about models is known first: a token or a device's certificate, by the hub's one gate. Who was let in
   a moment ago (`REMEMBERED_US`) is not looked up again, so a revoked one gets in for so long at most. Only the two
   health checks answer anybody.
2. Identity and rate come before the body is read; bodies are bounded one by one, for each principal, and all
   together. What counts is what has come: an announced length holds nothing.
3. Every "no" for lack of time or room is a 429 or 503 with `Retry-After`, at once.

No framework, because here a millisecond is the whole budget. Not here: bodies (shared/wire/oip.py), models (desk.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Final

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from cloud_hub.ground import problems
from cloud_hub.ground.auth import PEER_CERTIFICATE, Gate, Principal, Role
from cloud_hub.ground.problems import NotAllowed, Throttled
from cloud_hub.ground.rates import Buckets
from cloud_hub.offload.desk import Answered, Ask, Desk, Overload
from shared.errors import InputRefused, InvalidValue, ModelError, OutriderError, ProtocolViolation
from shared.limits import MIB
from shared.wire import oip, oip_terms
from shared.wire.oip_terms import OipError, Provenance, Target

logger = logging.getLogger(__name__)

PREFIX: Final = oip_terms.PREFIX
STREAMED_PREFIX: Final = PREFIX + "/"
"""Below it, time and size are watched here."""
DEFAULT_DEADLINE_MS: Final = 10_000
MAX_DEADLINE_MS: Final = 60_000
MAX_BODY_BYTES: Final = 16 * MIB
MAX_HELD_BYTES: Final = 256 * MIB
"""Of all bodies that are being read or answered."""
MAX_PRINCIPAL_BYTES: Final = 32 * MIB
"""Of these, for one principal: its own requests meet its bound before anybody else's do."""
BODY_S: Final = 15.0
"""To the end of a body."""
REMEMBERED_US: Final = 2_000_000
_MAX_REMEMBERED: Final = 1024
_PLATFORM: Final = "onnxruntime_onnx"
_JSON: Final = (b"content-type", b"application/json")

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back: status, headers, and the body's pieces."""

    status: int
    headers: tuple[Header, ...] = ()
    pieces: tuple[oip.Buffer, ...] = ()


class OffloadApp:
    """The application; `serves` says for which paths.

    Args:
        desk: the offload room.
        gate: tells who is calling.
        rate: how often one principal may ask for answers.
        now_us: a monotonic clock, the desk's.
    """

    def __init__(self, *, desk: Desk, gate: Gate, rate: Buckets, now_us: Callable[[], int]) -> None:
        self._desk = desk
        self._gate = gate
        self._rate = rate
        self._now_us = now_us
        self._held_bytes = 0
        self._shares: dict[str, int] = {}
        self._recent: OrderedDict[bytes, tuple[Principal, int]] = OrderedDict()

    @staticmethod
    def serves(path: str) -> bool:
        """Whether this path is the protocol's."""
        return path == PREFIX or path.startswith(STREAMED_PREFIX)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        # What waited in the socket while the loop was busy has come when it came, and not when it is seen.
        arrived_us = self._now_us() - self._desk.lag_us
        target = oip_terms.parse_path(scope["path"])
        # The middleware's figures are by route; ours are few and known.
        scope["route"] = SimpleNamespace(path=f"{PREFIX}/{target.ask}" if target else PREFIX)
        try:
            reply = await self._answer(scope, receive, target, arrived_us)
        except OutriderError as error:
            reply = _refusal(error)
        except Exception:  # a defect of ours must answer as one, and the log has it
            logger.exception("a request for an answer failed")
            reply = _error_reply(500, OipError(error="the hub failed to answer; its log says why", code="internal"))
        length = sum(len(piece) for piece in reply.pieces)
        headers = [*reply.headers, (b"content-length", b"%d" % length)]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        body = reply.pieces[0] if len(reply.pieces) == 1 else b"".join(reply.pieces)
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive, target: Target | None, arrived_us: int) -> Reply:
        if target is None:
            raise ProtocolViolation(f"there is nothing at {scope['path'][:200]}", code="http.not_found")
        if scope["method"] not in ({"GET", "HEAD"} if target.method == "GET" else {target.method}):
            raise ProtocolViolation(f"{target.method} is what this takes", code="http.method")
        if target.ask in ("live", "ready"):
            return Reply(200)
        principal = await self._identify(scope)
        if target.ask == "infer":
            return await self._infer(scope, receive, target, principal, arrived_us)
        if target.ask == "server":
            return _json(oip_terms.encode_server(name="outrider-hub", version=version("outrider")))
        release = await self._desk.describe(target.model, target.version, candidates=_may_ask_candidates(principal))
        if target.ask == "model_ready":
            return Reply(200)
        return _json(
            oip_terms.encode_metadata(
                name=release.manifest.family,
                versions=release.versions,
                platform=_PLATFORM,
                signature=release.manifest.signature,
            )
        )

    async def _infer(
        self, scope: Scope, receive: Receive, target: Target, principal: Principal, arrived_us: int
    ) -> Reply:
        seconds = self._rate.take(principal.actor, now_ms=arrived_us // 1000)
        if seconds:
            raise Throttled("too many requests", retry_after_s=seconds, hint="ask less often, or for more rows at once")
        headers = dict(scope["headers"])
        held = _Held(self, principal.actor)
        try:
            body = await _read_body(receive, headers, held)
            json_length = _whole_number(headers, oip.JSON_LENGTH_HEADER)
            request = oip.decode_request(body, json_length=json_length)
            deadline_ms = request.deadline_ms(default_ms=DEFAULT_DEADLINE_MS, most_ms=MAX_DEADLINE_MS)
            answered = await self._desk.infer(
                Ask(
                    model=target.model,
                    version=target.version,
                    inputs=request.inputs,
                    payload=request.payload,
                    arrived_us=arrived_us,
                    deadline_us=arrived_us + deadline_ms * 1000,
                    candidates=_may_ask_candidates(principal),
                )
            )
            return _answer_reply(request, answered)
        finally:
            held.let_go()

    async def _identify(self, scope: Scope) -> Principal:
        """Who is calling; raises NotAllowed."""
        request = Request(scope)
        shown = request.headers.get("authorization", "").encode() or scope.get("extensions", {}).get(PEER_CERTIFICATE)
        # The digest and not the token: nothing here keeps secrets.
        key = hashlib.sha256(shown).digest() if shown else b""
        known = self._recent.get(key)
        now_us = self._now_us()
        if known is not None and now_us - known[1] < REMEMBERED_US:
            return known[0]
        principal = await self._gate.identify(request)
        self._recent[key] = (principal, now_us)
        self._recent.move_to_end(key)
        if len(self._recent) > _MAX_REMEMBERED:
            self._recent.popitem(last=False)
        return principal

    def hold(self, actor: str, size: int) -> None:
        """Count bytes of a principal's bodies (negative: let them go); raises Overload when too many are held."""
        share = self._shares.get(actor, 0) + size
        if size > 0 and share > MAX_PRINCIPAL_BYTES:
            raise Overload(
                "too many bodies of this caller are in memory", code="overload.share", retry_after_us=1_000_000
            )
        if size > 0 and self._held_bytes + size > MAX_HELD_BYTES:
            raise Overload("too many bodies are in memory", code="overload.memory", retry_after_us=1_000_000)
        self._held_bytes += size
        self._shares[actor] = share
        if not share:
            del self._shares[actor]


class _Held:
    """What one request of a principal holds of the memory for bodies."""

    def __init__(self, app: OffloadApp, actor: str) -> None:
        self._app = app
        self._actor = actor
        self._bytes = 0

    def take(self, size: int) -> None:
        """Hold more; raises Overload, or InputRefused above what one body may have."""
        self.check(self._bytes + size)
        self._app.hold(self._actor, size)
        self._bytes += size

    @staticmethod
    def check(size: int) -> None:
        """Raise InputRefused when no body may have so many bytes."""
        if size > MAX_BODY_BYTES:
            raise InputRefused(
                f"a body holds at most {MAX_BODY_BYTES} bytes", code="model.too_large", hint="send fewer rows at once"
            )

    def let_go(self) -> None:
        """Hold nothing."""
        self._app.hold(self._actor, -self._bytes)
        self._bytes = 0


def _may_ask_candidates(principal: Principal) -> bool:
    """People try out what is built; devices get what was published (registry.py says why)."""
    return principal.role is not Role.DEVICE


async def _read_body(receive: Receive, headers: dict[bytes, bytes], held: _Held) -> bytes:
    """The whole body, decompressed."""
    # Refused before it comes, but held only as it comes: announcing costs the caller nothing.
    held.check(_whole_number(headers, "Content-Length") or 0)
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(BODY_S):
            more = True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise ProtocolViolation("the body ended early")
                chunk: bytes = message.get("body", b"")
                held.take(len(chunk))
                chunks.append(chunk)
                more = message.get("more_body", False)
    except TimeoutError as error:
        raise ProtocolViolation(f"the body did not come within {BODY_S:.0f} s", code="http.body") from error
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    return body if coding == b"identity" else _inflate(body, coding, held)


def _inflate(body: bytes, coding: bytes, held: _Held) -> bytes:
    """The body behind a content coding; bounded like any other, however small it came."""
    windows = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
    if coding not in windows:
        raise InvalidValue(f"content coding {coding[:40]!r} is not known", hint="gzip, deflate or none")
    unpacker = zlib.decompressobj(windows[coding])
    try:
        data = unpacker.decompress(body, MAX_BODY_BYTES)
        if unpacker.unconsumed_tail:
            raise InputRefused(f"a body unpacks to at most {MAX_BODY_BYTES} bytes", code="model.too_large")
    except zlib.error as error:
        raise ProtocolViolation(f"the body does not unpack: {error}") from error
    if not unpacker.eof:
        raise ProtocolViolation("the body does not unpack: it ends early")
    held.take(len(data))
    return data


def _whole_number(headers: dict[bytes, bytes], name: str) -> int | None:
    text = headers.get(name.lower().encode())
    if text is None:
        return None
    if not text.isdigit() or len(text) > 15:
        raise ProtocolViolation(f"{name} is not a whole number")
    return int(text)


def _answer_reply(request: oip.OipRequest, answered: Answered) -> Reply:
    said = answered.said
    provenance = Provenance(
        rung="cloud",
        digest=answered.digest,
        variant=answered.variant,
        labels=said.labels,
        confidences=said.confidences,
        deadline_met=answered.deadline_met,
    )
    response = oip.OipResponse(
        model=answered.manifest.family,
        version=answered.manifest.version,
        id=request.id,
        outputs=said.outputs,
        payload=said.payload,
        parameters=oip_terms.write_provenance(provenance),
    )
    json_length, pieces = oip.answer_request(request, response)
    if json_length is None:
        return Reply(200, (_JSON,), tuple(pieces))
    headers = (
        (b"content-type", b"application/octet-stream"),
        (oip.JSON_LENGTH_HEADER.lower().encode(), b"%d" % json_length),
    )
    return Reply(200, headers, tuple(pieces))


def _refusal(error: OutriderError) -> Reply:
    """An error as the protocol tells it."""
    retry = error.retry
    if isinstance(error, NotAllowed | Throttled):
        status = problems.status_of(error.code)
    elif isinstance(error, ModelError) and not isinstance(error, InputRefused) and error.code != "model.unknown":
        status = 500  # the model is at fault, or its files, and not the caller
    else:
        status = oip_terms.status_of(error.code, retry=retry)
    headers: list[Header] = []
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, Throttled):
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    elif isinstance(error, Overload):
        headers.append((b"retry-after", b"%d" % max(1, -(-error.retry_after_us // 1_000_000))))
    elif status in (429, 503):
        headers.append((b"retry-after", b"%d" % oip_terms.RETRY_AFTER_S))
    if status >= 500 and not isinstance(error, Overload):
        logger.error("request for an answer failed: %s: %s", error.code, error.message)
    body = OipError(error=error.message, code=error.code, hint=error.hint, retry=retry)
    return _error_reply(status, body, *headers)


def _error_reply(status: int, error: OipError, *headers: Header) -> Reply:
    return Reply(status, (_JSON, *headers), (oip_terms.encode_error(error),))


def _json(body: bytes) -> Reply:
    return Reply(200, (_JSON,), (body,))


class Beside:
    """Two applications on one port: the protocol's paths go to one, all others to the other.

    In front of the framework and not mounted in it, so that its routing and its layers cost an answer nothing.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], offload: OffloadApp) -> None:
        self._app = app
        self._offload = offload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on."""
        if scope["type"] == "http" and self._offload.serves(scope["path"]):
            await self._offload(scope, receive, send)
        else:
            await self._app(scope, receive, send)
