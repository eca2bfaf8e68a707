"""HTTP/1.1 at the door: h11 reads and writes it, asyncio carries it, the conversation (oip.py) answers it.

Rules:
- One request of a connection is worked on at a time; what a client sends ahead waits in the socket, but for one read.
- Head, body and silence are bounded in time, head and body in size. The head's time counts from its first byte and
  does not begin anew because another byte dribbles in. Who does not read the answers is cut off after `CLOGGED_S`.
- A request that ends the connection gets its reason first, and a moment to read it.
- On the port, `Host` and `Origin` must name this machine: else any page in a browser could ask, by a name of its own
  that resolves to loopback.

This module and h11 are loaded when the first stream speaks HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Final, Literal, TypeAlias, assert_never

import h11
import msgspec

from edge_agent.adapters.oip import (
    MAX_BODY_BYTES,
    Conversation,
    HttpRequest,
    HttpResponse,
    error_response,
    too_large,
)
from edge_agent.adapters.waiting import Place, WaitingRoom, overload, refusal
from shared import limits
from shared.errors import ProtocolViolation
from shared.inference import Refusal

logger = logging.getLogger(__name__)

Phase = Literal["idle", "head", "body"]
"""What a stream waits for: a request, the rest of a head, the rest of a body."""
PATIENCE_S: Final[dict[Phase, float]] = {"idle": 300.0, "head": 10.0, "body": 60.0}
CLOGGED_S: Final = 10.0
MAX_HEAD_BYTES: Final = 16 * limits.KIB
_JOIN_BYTES: Final = 256 * limits.KIB
_UNSENT_BYTES: Final = limits.MIB
_LINGER_S: Final = 1.0
_LOOPBACK: Final = re.compile(rb"(https?://)?(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)

Step: TypeAlias = HttpRequest | HttpResponse | Phase | Literal["ended"]
"""A whole request, or the response to one that is not even read, or what is waited for, or the stream's end."""


class HttpExchange:
    """One connection's requests and responses, without the connection."""

    def __init__(self, *, is_local: bool) -> None:
        """`is_local`: the headers must name this machine."""
        self._is_local = is_local
        self._machine = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._head: h11.Request | None = None
        self._is_bare = False
        self._body = bytearray()

    @property
    def bytes_held(self) -> int:
        """Memory taken by a body that is still arriving."""
        return len(self._body)

    @property
    def can_answer(self) -> bool:
        """Whether a response can be written now."""
        return self._machine.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    @property
    def is_last(self) -> bool:
        """Whether the connection ends with the response that was written."""
        return self._machine.our_state is not h11.DONE

    def receive(self, data: bytes | memoryview) -> None:
        """Bytes have arrived, which are copied; none means the end."""
        # A view will do for h11, though it is only declared for bytes.
        self._machine.receive_data(data)  # type: ignore[arg-type]

    def next_step(self) -> Step:
        """What is to be done with what has arrived."""
        while True:
            try:
                event = self._machine.next_event()
            except h11.RemoteProtocolError as error:
                return _bad_http(error)
            if event is h11.NEED_DATA:
                if self._head is not None:
                    return "body"
                return "head" if self._machine.trailing_data[0] else "idle"
            if isinstance(event, h11.Request):
                self._head, self._is_bare = event, event.method == b"HEAD"
                refused = self._look_at(event)
                if refused is not None:
                    return refused
            elif isinstance(event, h11.Data):
                self._body += event.data
                if len(self._body) > MAX_BODY_BYTES:
                    return error_response(refusal("", too_large()))
            elif isinstance(event, h11.EndOfMessage):
                return self._whole()
            else:
                return "ended"

    def encourage(self) -> bytes:
        """What a client that waits for a word before it sends its body is told; empty when none does."""
        if not self._machine.they_are_waiting_for_100_continue:
            return b""
        go_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        return self._machine.send(go_on) or b""

    def write(self, response: HttpResponse, *, last: bool = False) -> list[bytes]:
        """A response's pieces; `last` says that no more will come."""
        size = sum(len(part) for part in response.parts)
        ending = [(b"connection", b"close")] if last else []
        headers = [*response.headers, (b"content-length", b"%d" % size), *ending]
        pieces = [self._machine.send(h11.Response(status_code=response.status, headers=headers)) or b""]
        for part in () if self._is_bare else response.parts:
            # A view passes through h11 as it is, though it is only declared for bytes.
            pieces += self._machine.send_with_data_passthrough(h11.Data(data=part)) or ()  # type: ignore[arg-type]
        pieces += self._machine.send_with_data_passthrough(h11.EndOfMessage()) or ()
        return pieces if size > _JOIN_BYTES else [b"".join(pieces)]

    def go_on(self) -> None:
        """The response was written: on to the next request."""
        self._machine.start_next_cycle()

    def _look_at(self, head: h11.Request) -> HttpResponse | None:
        """Why this request is not even read."""
        if len(head.target) + sum(len(name) + len(value) for name, value in head.headers) > MAX_HEAD_BYTES:
            return _ending(431, "http.head", f"the head exceeds {MAX_HEAD_BYTES} bytes")
        for name, value in head.headers:
            if self._is_local and name in (b"host", b"origin") and not _LOOPBACK.fullmatch(value):
                return _ending(403, "http.host", f"{name.decode()} is {value[:80]!r}, which is not this machine")
            if name == b"content-length" and int(value) > MAX_BODY_BYTES:
                return error_response(refusal("", too_large()))
        return None

    def _whole(self) -> HttpRequest:
        assert self._head is not None
        request = HttpRequest(
            method=self._head.method.decode("ascii"),
            target=self._head.target.decode("ascii"),
            headers=dict(self._head.headers),
            body=self._body,
        )
        self._head, self._body = None, bytearray()
        return request


class HttpStream(asyncio.BufferedProtocol):
    """One connection that speaks HTTP."""

    def __init__(
        self,
        *,
        room: WaitingRoom,
        conversation: Conversation,
        on_end: Callable[[HttpStream], None],
        has_room: Callable[[], bool],
        scratch: memoryview,
        is_turned_away: bool,
        is_local: bool,
    ) -> None:
        """A connection.

        Args:
            room: where requests wait.
            conversation: answers them.
            on_end: the connection has ended.
            has_room: whether all that is still arriving is within its bound.
            scratch: where bytes arrive before they are taken over; one for all connections.
            is_turned_away: there are too many connections; its first request is refused.
            is_local: came in at the port on loopback, so that its headers must say so.
        """
        self._room = room
        self._conversation = conversation
        self._on_end = on_end
        self._has_room = has_room
        self._scratch = scratch
        self._is_turned_away = is_turned_away
        self._exchange = HttpExchange(is_local=is_local)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._phase: Phase | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._clogged: asyncio.TimerHandle | None = None
        self._is_busy = False
        self._is_paused = False
        self._is_ending = False

    @property
    def bytes_held(self) -> int:
        """Memory taken by a body that is still arriving."""
        return self._exchange.bytes_held

    def close(self) -> None:
        """End the stream after what is unsent."""
        self._is_ending = True
        self._watch(None)
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the stream has begun."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_UNSENT_BYTES)
        self._watch("idle")
        if self._is_turned_away:
            message = f"{limits.MAX_DOOR_CONNECTIONS} connections are open"
            self._end_with(_status(503, error_response(overload("", "overload.connections", message))))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """asyncio: where the next bytes go."""
        return self._scratch

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio: bytes have arrived."""
        self.take(self._scratch[:nbytes])

    def take(self, data: memoryview) -> None:
        """Go on with bytes of the stream, which are copied."""
        if self._is_ending:
            return
        self._exchange.receive(data)
        if self._is_busy and self._transport is not None:
            # Only who sends ahead costs the two system calls of a pause; the first part of it is here already.
            self._is_paused = True
            self._transport.pause_reading()
        self._advance()

    def eof_received(self) -> bool:
        """asyncio: the other side sends no more; it may still wait for an answer."""
        if not self._is_ending:
            self._exchange.receive(b"")
            self._advance()
        return self._is_busy and not self._is_ending

    def pause_writing(self) -> None:
        """asyncio: the other side is slow."""
        self._clogged = self._loop.call_later(CLOGGED_S, self._abort)

    def resume_writing(self) -> None:
        """asyncio: the other side has caught up."""
        if self._clogged is not None:
            self._clogged.cancel()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """asyncio: the stream has ended, whoever ended it."""
        self._transport = None
        self._is_ending = True
        self._watch(None)
        self.resume_writing()
        self._on_end(self)

    def _advance(self) -> None:
        """Do what is to be done with what has arrived, up to the end of one request."""
        if self._is_busy or self._is_ending:
            return
        step = self._exchange.next_step()
        if isinstance(step, HttpRequest):
            self._ask(step)
        elif isinstance(step, HttpResponse):
            self._end_with(step)
        elif step == "ended":
            self.close()
        elif step == "idle" or step == "head" or step == "body":
            self._watch(step)
            self._write([self._exchange.encourage()] if step == "body" else [])
            if not self._has_room():
                self._end_with(error_response(overload("", "overload.memory", "too many bytes are arriving")))
        else:
            assert_never(step)

    def _ask(self, request: HttpRequest) -> None:
        """Have a request answered."""
        self._is_busy = True
        self._watch(None)

        async def work(place: Place) -> None:
            self._answer(await self._conversation.respond(request, place))

        refused = self._room.enter("", len(request.body), work)
        if refused is not None:
            # Later, not now: answering here would go on with the next request from within this one.
            self._loop.call_soon(self._answer, error_response(refused))

    def _answer(self, response: HttpResponse) -> None:
        """Send a response and go on with what the client sent meanwhile."""
        self._is_busy = False
        if self._transport is None or self._transport.is_closing():
            return
        try:
            self._write(self._exchange.write(response))
        except h11.LocalProtocolError:  # a defect of ours, which must not take the agent from the others
            logger.exception("an answer over HTTP could not be sent")
            self._abort()
            return
        if self._exchange.is_last:
            self.close()
            return
        self._exchange.go_on()
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
        self._advance()

    def _end_with(self, response: HttpResponse) -> None:
        """Say why, wait a moment for the other side to read it, and hang up; what still arrives is thrown away."""
        self._is_ending = True
        self._watch(None)
        if self._transport is None or self._transport.is_closing():
            return
        if not self._exchange.can_answer:
            self._abort()
            return
        self._write(self._exchange.write(response, last=True))
        self._exchange = HttpExchange(is_local=True)  # lets go of what had arrived
        self._transport.write_eof()
        self._loop.call_later(_LINGER_S, self._abort)

    def _write(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            if piece and self._transport is not None and not self._transport.is_closing():
                self._transport.write(piece)

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _watch(self, phase: Phase | None) -> None:
        """Enter a phase, with the patience that there is for it; entering the same again changes nothing."""
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if phase is not None:
            self._timer = self._loop.call_later(PATIENCE_S[phase], self._lose_patience)

    def _lose_patience(self) -> None:
        if self._phase == "idle":
            self.close()
        else:
            self._end_with(_ending(408, "http.slow", f"the request's {self._phase} did not arrive in time"))


def _bad_http(error: h11.RemoteProtocolError) -> HttpResponse:
    status = error.error_status_hint
    why = ProtocolViolation(f"this is neither a frame nor HTTP/1.1: {error}", code="protocol.http")
    return _status(status if status in (400, 431, 501) else 400, error_response(refusal("", why)))


def _ending(status: int, code: str, message: str) -> HttpResponse:
    return _status(status, error_response(Refusal(id="", code=code, message=message)))


def _status(status: int, response: HttpResponse) -> HttpResponse:
    return msgspec.structs.replace(response, status=status)
