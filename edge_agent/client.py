"""The client for applications: ask the agent's models, tell it what was true, hand over readings.

    with Client("/var/lib/outrider/door.sock") as agent:
        answer = agent.infer("digits", {"image": pixels}, deadline_ms=50)
        print(answer.label, answer.confidence, answer.rung)
        agent.feedback(answer.id, label="7")

Rules:
- Every wait has a deadline. A request is sent once: when the connection breaks before the answer, the call raises
  Unreachable, and the caller, who knows whether asking twice is harmless, decides. The next call connects anew.
- numpy arrays are sent as they are, without a copy where they are contiguous; lists and numbers are made what the
  model declares, which costs one `describe` per model.
- `Client` may be shared by threads, one call at a time; `AsyncClient` has any number of calls on their way.

Importing this module is cheap: numpy is imported by the first `infer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from edge_agent.adapters.streams import FrameLink
from edge_agent.adapters.system import SystemClock
from edge_agent.framing import Buffer, FrameReader, build_frame
from edge_agent.replies import (
    Prediction,
    RequestNames,
    error_of,
    expect,
    late_prediction,
    needs_signature,
    pack,
    prediction,
    signature_of,
)
from shared.clock import Clock
from shared.errors import InputRefused, InvalidValue, OutriderError, Unreachable
from shared.inference import (
    AgentState,
    Answer,
    Control,
    Describe,
    Description,
    Done,
    Feedback,
    Infer,
    Late,
    Measure,
    Refusal,
    Reply,
    Request,
    Status,
    Teach,
    decode_reply,
    encode_header,
)
from shared.limits import MAX_REQUEST_DEADLINE_MS
from shared.model import Signature

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["AsyncClient", "Client", "Prediction"]

DEFAULT_DEADLINE_MS: Final = 1000
DEFAULT_TIMEOUT_MS: Final = 5000
_MARGIN_MS: Final = 1000
"""How long after a request's deadline its answer, which then says that it is late, is still waited for."""
_PARTING_MS: Final = 200


class Client:
    """Blocking client. Connects when first used and again after a lost connection."""

    def __init__(self, path: str | Path, *, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> None:
        """Speak to the agent on this socket; `timeout_ms` bounds connecting and every call but `infer`."""
        self._path = str(path)
        self._timeout_ms = timeout_ms
        self._clock = SystemClock()
        self._names = RequestNames()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._reader = FrameReader()
        self._signatures: dict[str, Signature] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up. The next call would connect again."""
        with self._lock:
            self._drop()

    def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        deadline_ms: int = DEFAULT_DEADLINE_MS,
        id: str | None = None,
    ) -> Prediction:
        """Ask a model for an answer within `deadline_ms`.

        Raises:
            InputRefused: the arrays do not fit the model's signature; the message names what does.
            ModelError: the model cannot answer. HostLost: it was lost while answering; asking again can help.
            Unreachable: no agent, or no answer in time.
            OutriderError: any other refusal; `code`, `hint` and `retry` say more.
        """
        signature = self._signature(model) if needs_signature(inputs) else None
        heads, parts = pack(inputs, signature)
        request = Infer(model=model, inputs=heads, id=id or self._names.next(), deadline_ms=deadline_ms)
        reply, payload = self._call(request, parts, _patience_ms(deadline_ms))
        try:
            return prediction(expect(reply, Answer), payload)
        except InputRefused:
            self._signatures.pop(model, None)  # the model may have been replaced by one with another signature
            raise

    def feedback(
        self, request: str, *, label: str | None = None, correct: bool | None = None, value: float | None = None
    ) -> None:
        """Tell what was true of the answer with this id; returns once the agent has it on disk."""
        ask = Feedback(request=request, id=self._names.next(), label=label, correct=correct, value=value)
        expect(self._call(ask, (), self._timeout_ms)[0], Done)

    def late(self, request: str) -> Prediction | None:
        """The hub's answer to an earlier request, which had to be answered without it; None while none has come."""
        reply, payload = self._call(Late(request=request, id=self._names.next()), (), self._timeout_ms)
        return late_prediction(reply, payload, request=request)

    def teach(self, model: str, inputs: Mapping[str, ArrayLike], label: str) -> None:
        """Hand over a labelled sample, one row, to learn from; returns once the agent has it on disk.

        It stays on the device: what a federated run gets is what was learned from it.

        Raises:
            InputRefused: the arrays do not fit the model's signature, or the label is none of its own.
        """
        signature = self._signature(model) if needs_signature(inputs) else None
        heads, parts = pack(inputs, signature)
        ask = Teach(model=model, inputs=heads, label=label, id=self._names.next())
        expect(self._call(ask, parts, self._timeout_ms)[0], Done)

    def reading(self, name: str, value: float) -> None:
        """Hand over a reading for the hub; returns once the agent has it on disk."""
        expect(self._call(Measure(name=name, value=value, id=self._names.next()), (), self._timeout_ms)[0], Done)

    def status(self) -> AgentState:
        """How the agent is."""
        return expect(self._call(Status(id=self._names.next()), (), self._timeout_ms)[0], AgentState)

    def describe(self, model: str = "") -> Description:
        """What a model takes and gives; without a name, all models."""
        return expect(self._call(Describe(id=self._names.next(), model=model), (), self._timeout_ms)[0], Description)

    def control(self, command: str, argument: str = "") -> str:
        """Give the daemon a command (`queue.flush`, `queue.drop`, `model.rollback`); returns what it did."""
        ask = Control(command=command, id=self._names.next(), argument=argument)
        return expect(self._call(ask, (), self._timeout_ms)[0], Done).detail

    def _signature(self, model: str) -> Signature:
        if model not in self._signatures:
            self._signatures[model] = signature_of(self.describe(model), model)
        return self._signatures[model]

    def _call(self, request: Request, parts: Sequence[Buffer], timeout_ms: int) -> tuple[Reply, bytearray]:
        """Ask and wait for the answer, all of it by one moment: for the turn, to connect, to send, to receive."""
        frame = build_frame(encode_header(request), parts)
        end = _End(self._clock, timeout_ms)
        if not self._lock.acquire(timeout=timeout_ms / 1000):
            raise Unreachable(
                f"another call of this client took all of {timeout_ms / 1000:.1f} s",
                code="transfer.busy",
                hint="give each thread a client of its own",
            )
        try:
            return self._exchange(request, frame, end)
        except TimeoutError as error:
            raise _no_answer(timeout_ms) from error
        finally:
            self._lock.release()

    def _exchange(self, request: Request, frame: Sequence[Buffer], end: _End) -> tuple[Reply, bytearray]:
        link = self._connected(end)
        done = False
        try:
            for part in frame:
                link.settimeout(end.left_s())
                link.sendall(part)
            answer = self._receive(link, request.id, end)
            done = True
            return answer
        except TimeoutError:
            raise
        except OSError as error:
            refusal = self._parting_word(link)
            if refusal is not None:
                raise error_of(refusal) from error
            raise _lost(self._path) from error
        finally:
            if not done:  # a request may be half sent, and nobody waits for its answer any more
                self._drop()

    def _receive(self, link: socket.socket, request: str, end: _End) -> tuple[Reply, bytearray]:
        while True:
            frame = self._next_frame(link, end)
            if frame is None:
                raise ConnectionResetError("the agent hung up")
            reply = decode_reply(frame[0])
            if reply.id == request:
                return reply, frame[1]
            if isinstance(reply, Refusal) and not reply.id:
                raise error_of(reply)  # a refusal of the connection, not of one request

    def _next_frame(self, link: socket.socket, end: _End) -> tuple[bytes, bytearray] | None:
        """The next frame; None when the agent has hung up."""
        while (frame := self._reader.next_frame()) is None:
            link.settimeout(end.left_s())
            count = link.recv_into(self._reader.buffer())
            if count == 0:
                return None
            self._reader.received(count)
        return frame

    def _parting_word(self, link: socket.socket) -> Refusal | None:
        """Why the agent hung up, if it said so while we were still sending."""
        with contextlib.suppress(OSError, OutriderError):
            frame = self._next_frame(link, _End(self._clock, _PARTING_MS))
            reply = decode_reply(frame[0]) if frame is not None else None
            return reply if isinstance(reply, Refusal) else None
        return None

    def _connected(self, end: _End) -> socket.socket:
        if self._socket is not None and _has_ended(self._socket):
            self._drop()
        if self._socket is None:
            link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                link.settimeout(min(end.left_s(), self._timeout_ms / 1000))
                link.connect(self._path)
            except OSError as error:
                link.close()
                raise _nobody_there(self._path, error) from error
            self._socket, self._reader = link, FrameReader()
        return self._socket

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None


class _End:
    """The moment by which a call is over."""

    def __init__(self, clock: Clock, timeout_ms: int) -> None:
        self._clock = clock
        self._at_ms = clock.mono_ms() + timeout_ms

    def left_s(self) -> float:
        """The seconds until then; raises TimeoutError when none are left."""
        left_ms = self._at_ms - self._clock.mono_ms()
        if left_ms <= 0:
            raise TimeoutError("the call's time is over")
        return left_ms / 1000


class AsyncClient:
    """The same for asyncio; calls may overlap. Use it in one event loop."""

    def __init__(self, path: str | Path, *, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> None:
        """Speak to the agent on this socket; `timeout_ms` bounds connecting and every call but `infer`."""
        self._path = str(path)
        self._timeout_ms = timeout_ms
        self._names = RequestNames()
        self._connecting = asyncio.Lock()
        self._link: FrameLink | None = None
        self._asked: dict[str, tuple[FrameLink, asyncio.Future[tuple[Reply, bytearray]]]] = {}
        self._signatures: dict[str, Signature] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Hang up; calls on their way raise Unreachable. The next call would connect again."""
        if self._link is not None:
            self._link.close()

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, ArrayLike],
        *,
        deadline_ms: int = DEFAULT_DEADLINE_MS,
        id: str | None = None,
    ) -> Prediction:
        """Ask a model for an answer within `deadline_ms`; raises as `Client.infer` does."""
        signature = await self._signature(model) if needs_signature(inputs) else None
        heads, parts = pack(inputs, signature)
        request = Infer(model=model, inputs=heads, id=id or self._names.next(), deadline_ms=deadline_ms)
        reply, payload = await self._call(request, parts, _patience_ms(deadline_ms))
        try:
            return prediction(expect(reply, Answer), payload)
        except InputRefused:
            self._signatures.pop(model, None)  # as in Client.infer
            raise

    async def feedback(
        self, request: str, *, label: str | None = None, correct: bool | None = None, value: float | None = None
    ) -> None:
        """Tell what was true of the answer with this id; returns once the agent has it on disk."""
        ask = Feedback(request=request, id=self._names.next(), label=label, correct=correct, value=value)
        expect((await self._call(ask, (), self._timeout_ms))[0], Done)

    async def late(self, request: str) -> Prediction | None:
        """As `Client.late`."""
        reply, payload = await self._call(Late(request=request, id=self._names.next()), (), self._timeout_ms)
        return late_prediction(reply, payload, request=request)

    async def teach(self, model: str, inputs: Mapping[str, ArrayLike], label: str) -> None:
        """As `Client.teach`."""
        signature = await self._signature(model) if needs_signature(inputs) else None
        heads, parts = pack(inputs, signature)
        ask = Teach(model=model, inputs=heads, label=label, id=self._names.next())
        expect((await self._call(ask, parts, self._timeout_ms))[0], Done)

    async def reading(self, name: str, value: float) -> None:
        """Hand over a reading for the hub; returns once the agent has it on disk."""
        ask = Measure(name=name, value=value, id=self._names.next())
        expect((await self._call(ask, (), self._timeout_ms))[0], Done)

    async def status(self) -> AgentState:
        """How the agent is."""
        return expect((await self._call(Status(id=self._names.next()), (), self._timeout_ms))[0], AgentState)

    async def describe(self, model: str = "") -> Description:
        """What a model takes and gives; without a name, all models."""
        ask = Describe(id=self._names.next(), model=model)
        return expect((await self._call(ask, (), self._timeout_ms))[0], Description)

    async def control(self, command: str, argument: str = "") -> str:
        """Give the daemon a command (`queue.flush`, `queue.drop`, `model.rollback`); returns what it did."""
        ask = Control(command=command, id=self._names.next(), argument=argument)
        return expect((await self._call(ask, (), self._timeout_ms))[0], Done).detail

    async def _signature(self, model: str) -> Signature:
        if model not in self._signatures:
            self._signatures[model] = signature_of(await self.describe(model), model)
        return self._signatures[model]

    async def _call(self, request: Request, parts: Sequence[Buffer], timeout_ms: int) -> tuple[Reply, bytearray]:
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                return await self._exchange(await self._connected(), request, parts)
        except TimeoutError as error:
            raise _no_answer(timeout_ms) from error

    async def _exchange(self, link: FrameLink, request: Request, parts: Sequence[Buffer]) -> tuple[Reply, bytearray]:
        if request.id in self._asked:
            raise InvalidValue(f"a request with the id {request.id!r} is on its way", code="invalid.id")
        future: asyncio.Future[tuple[Reply, bytearray]] = asyncio.get_running_loop().create_future()
        self._asked[request.id] = (link, future)
        try:
            link.send(encode_header(request), parts)
            return await future
        finally:
            self._asked.pop(request.id, None)

    async def _connected(self) -> FrameLink:
        async with self._connecting:
            if self._link is None or not self._link.is_open:
                link = self._new_link()
                loop = asyncio.get_running_loop()
                try:
                    async with asyncio.timeout(self._timeout_ms / 1000):
                        await loop.create_unix_connection(lambda: link, self._path)
                except OSError as error:
                    raise _nobody_there(self._path, error) from error
                self._link = link
            return self._link

    def _new_link(self) -> FrameLink:
        """A stream whose end concerns only the calls that were sent over it."""

        def on_frame(header: bytes, payload: bytearray) -> None:
            try:
                reply = decode_reply(header)
            except InputRefused as error:
                self._fail(link, error)
                return
            _, future = self._asked.get(reply.id, (None, None))
            if future is not None and not future.done():
                future.set_result((reply, payload))
            elif isinstance(reply, Refusal) and not reply.id:
                self._fail(link, error_of(reply))

        link = FrameLink(
            on_frame=on_frame,
            on_refused=lambda error: self._fail(link, error),
            on_end=lambda: self._fail(link, _lost(self._path)),
        )
        return link

    def _fail(self, link: FrameLink, error: OutriderError) -> None:
        """Nothing that is on its way over this stream will be answered."""
        for used, future in self._asked.values():
            if used is link and not future.done():
                future.set_exception(error)
        link.close()


def _patience_ms(deadline_ms: int) -> int:
    """How long an answer with this deadline is waited for."""
    return min(max(deadline_ms, 0), MAX_REQUEST_DEADLINE_MS) + _MARGIN_MS


def _has_ended(link: socket.socket) -> bool:
    """Whether the agent has hung up since the last call; nothing else can be there to be read."""
    link.setblocking(False)
    try:
        return link.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _nobody_there(path: str, error: OSError) -> Unreachable:
    return Unreachable(
        f"no agent answers on {path}: {error.strerror or 'no answer in time'}",
        hint="start it with `outrider-agent run`, or check the path and its permissions",
    )


def _no_answer(timeout_ms: int) -> Unreachable:
    return Unreachable(
        f"no answer came within {timeout_ms / 1000:.1f} s", code="transfer.timeout", hint="look at its status"
    )


def _lost(path: str) -> Unreachable:
    return Unreachable(
        f"the agent on {path} hung up before it answered",
        code="transfer.lost",
        hint="ask again if asking twice is harmless; whether the request had its effect is not known",
    )
