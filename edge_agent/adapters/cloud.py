"""Questions to the hub's larger models, as `edge_agent.ports.Cloud`: the Open Inference Protocol over HTTPS.

Rules of this file:
1. Every question ends by its time, whatever the hub does: each socket operation has the time that is left, and at the
   end of it the connection is cut under the thread that waits on it. A connection on which a question ended in any
   other way than with a whole answer is closed.
2. At most CONNECTIONS questions are on their way, each in a thread of its own on a connection that is kept; one more
   is refused at once rather than queued behind hubs that do not answer.
3. A kept connection that the hub has closed meanwhile is replaced, and the question is sent once more: an inference
   has no effect that could happen twice. Nothing else is tried again here.
4. At most MAX_CLOUD_ANSWER_BYTES are read; nothing is redirected, decompressed or sent through a proxy.

Not here: whether to ask (edge_agent/core/cascade.py), and the TLS context (tls.py makes it).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import math
import select
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeAlias
from urllib.parse import quote

from edge_agent.adapters.tls import refused_certificate
from edge_agent.identity import check_hub_url
from edge_agent.ports import CloudAnswer, CloudRefusal
from shared.clock import Clock
from shared.errors import InputRefused, TransferCorrupt, TransferRefused, Unreachable
from shared.inference import TensorHead
from shared.limits import KIB, MAX_CLOUD_ANSWER_BYTES, MAX_REQUEST_DEADLINE_MS
from shared.wire.oip import JSON_LENGTH_HEADER, OipRequest, cut_payload, decode_response, encode_request
from shared.wire.oip_terms import PREFIX, decode_error, read_provenance

Buffer: TypeAlias = bytes | bytearray | memoryview

CONNECTIONS: Final = 4
MAX_LABEL_CHARS: Final = 1 * KIB
MAX_NAME_CHARS: Final = 128
"""Of model, version, variant and digest: they go into records and are held with late answers."""
MAX_RETRY_AFTER_S: Final = 86_400
_LONGEST_MS: Final = 2 * MAX_REQUEST_DEADLINE_MS
"""No question is waited for longer, whoever asks: sockets and timers do not take every number."""
_CHUNK_BYTES: Final = 64 * KIB
_ONE: Final = 1.001
"""A share of one, as 32-bit arithmetic may give it."""
_GRACE_S: Final = 0.2
"""How long a thread whose connection was cut is waited for; name resolution cannot be cut."""


class HubCloud:
    """`Cloud` on `http.client`, a few kept connections and as many threads."""

    def __init__(self, *, hub_url: str, context: ssl.SSLContext, clock: Clock, agent: str = "outrider") -> None:
        """Nothing is connected, and no thread started, before the first question."""
        self._host, self._port = check_hub_url(hub_url)
        self._context = context
        self._clock = clock
        self._agent = agent
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPSConnection] = []
        self._calls: set[_Call] = set()
        self._closed = False

    async def ask(
        self, model: str, inputs: tuple[TensorHead, ...], payload: Buffer, *, deadline_ms: int, within_ms: int
    ) -> CloudAnswer | CloudRefusal:
        """Ask about one row; raises as `ports.Cloud` says."""
        if self._closed or len(self._calls) >= CONNECTIONS:
            raise Unreachable(f"{len(self._calls)} questions are on their way to the hub", code="transfer.busy")
        deadline_ms, within_ms = min(deadline_ms, MAX_REQUEST_DEADLINE_MS), min(within_ms, _LONGEST_MS)
        request = OipRequest(
            inputs=inputs,
            payload=cut_payload(inputs, payload),
            parameters={"timeout": max(deadline_ms, 1) * 1000, "binary_data_output": True},
        )
        json_length, parts = encode_request(request)
        call = _Call(
            path=f"{PREFIX}/models/{quote(model, safe='')}/infer",
            parts=parts,
            headers=self._headers(json_length, parts),
            ends_ms=self._clock.mono_ms() + within_ms,
        )
        return await self._carry_out(call, within_s=within_ms / 1000)

    def adopt(self, context: ssl.SSLContext) -> None:
        """Use this context from the next connection on: there is a new certificate. Idle connections are closed."""
        with self._lock:
            self._context = context
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def close(self) -> None:
        """Give up what is on its way and hang up. Safe to call twice."""
        self._closed = True
        for call in list(self._calls):
            call.cut()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _headers(self, json_length: int | None, parts: list[Buffer]) -> dict[str, str]:
        headers = {
            "Accept-Encoding": "identity",
            "User-Agent": self._agent,
            "Content-Type": "application/json" if json_length is None else "application/octet-stream",
            "Content-Length": str(sum(len(part) for part in parts)),
        }
        return headers if json_length is None else {**headers, JSON_LENGTH_HEADER: str(json_length)}

    async def _carry_out(self, call: _Call, *, within_s: float) -> CloudAnswer | CloudRefusal:
        loop = asyncio.get_running_loop()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="cloud")
        self._calls.add(call)
        running = loop.run_in_executor(self._threads, self._guarded, call)
        running.add_done_callback(lambda done: self._forget(call, done))
        watchdog = loop.call_later(within_s, call.cut)
        try:
            done, _ = await asyncio.wait((running,), timeout=within_s + _GRACE_S)
        except asyncio.CancelledError:
            call.cut()
            raise
        finally:
            watchdog.cancel()
        if not done:
            raise Unreachable(f"the hub at {self._host}:{self._port} did not answer in time", code="transfer.timeout")
        return running.result()

    def _forget(self, call: _Call, done: asyncio.Future[CloudAnswer | CloudRefusal]) -> None:
        self._calls.discard(call)
        if not done.cancelled():
            done.exception()  # nobody may be waiting any more

    # In a thread

    def _guarded(self, call: _Call) -> CloudAnswer | CloudRefusal:
        """Converse, and translate what the library raises."""
        peer = f"{self._host}:{self._port}"
        try:
            return self._converse(call)
        except ssl.SSLCertVerificationError as error:
            raise refused_certificate(f"the hub at {peer}", error, code="transfer.hub_certificate") from error
        except ssl.SSLError as error:
            if "ALERT" in (error.reason or ""):
                message = f"the hub at {peer} refused this device's certificate: {error.reason}"
                raise TransferRefused(message, code="transfer.device_certificate") from error
            raise Unreachable(f"the hub at {peer} cannot be reached: {error.reason or error}") from error
        except InputRefused as error:
            raise TransferCorrupt(f"the hub at {peer} answered what is no answer: {error.message}") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            # ValueError: a connection that was cut while the library still read from it.
            reason = str(error) or type(error).__name__
            raise Unreachable(f"the hub at {peer} gave no answer: {reason}") from error

    def _converse(self, call: _Call) -> CloudAnswer | CloudRefusal:
        connection = self._kept()
        if connection is not None:
            try:
                return self._exchange(call, connection)
            except _HungUp:
                pass  # it was closed while it lay idle
        return self._exchange(call, self._new())

    def _exchange(self, call: _Call, connection: http.client.HTTPSConnection) -> CloudAnswer | CloudRefusal:
        was_used = connection.sock is not None
        whole = False
        try:
            call.hold(connection, left_s=self._left_s(call))
            began_ms = self._clock.mono_ms()
            try:
                connection.request("POST", call.path, body=iter(call.parts), headers=call.headers)
                response = connection.getresponse()
            except (ConnectionError, http.client.RemoteDisconnected) as error:
                if was_used and not call.was_cut:
                    raise _HungUp from error
                raise
            body = self._read(call, response)
            whole = not response.will_close
            return _understand(response, body, took_ms=self._clock.mono_ms() - began_ms)
        finally:
            is_kept = call.release() and whole
            if not (is_kept and self._keep(connection)):
                connection.close()

    def _read(self, call: _Call, response: http.client.HTTPResponse) -> bytearray:
        """The whole body."""
        promised = response.length
        body = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            body += chunk
            if len(body) > MAX_CLOUD_ANSWER_BYTES:
                raise TransferCorrupt(
                    f"the hub's answer exceeds {MAX_CLOUD_ANSWER_BYTES} bytes", code="transfer.too_large"
                )
            self._left_s(call)
        if call.was_cut or (promised is not None and len(body) < promised):
            raise ConnectionResetError("the connection broke in the answer")
        response.close()  # the library would otherwise not know that it has been read, and refuse the next question
        return body

    def _left_s(self, call: _Call) -> float:
        left_ms = call.ends_ms - self._clock.mono_ms()
        if left_ms <= 0 or call.was_cut:
            raise TimeoutError("no answer in time")
        return left_ms / 1000

    def _new(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self._host, self._port, context=self._context)

    def _kept(self) -> http.client.HTTPSConnection | None:
        """A connection on which nothing has happened since its last answer."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            # Readable without a question means that the hub has closed it, or talks out of turn.
            if connection.sock is not None and not select.select((connection.sock,), (), (), 0)[0]:
                return connection
            connection.close()

    def _keep(self, connection: http.client.HTTPSConnection) -> bool:
        with self._lock:
            if self._closed:
                return False
            self._idle.append(connection)
            return True


class _HungUp(Exception):
    """A kept connection was no longer one."""


class _Call:
    """One question on its way; cut from the event loop while a thread waits for its answer."""

    def __init__(self, *, path: str, parts: list[Buffer], headers: dict[str, str], ends_ms: int) -> None:
        self.path = path
        self.parts = parts
        self.headers = headers
        self.ends_ms = ends_ms
        self.was_cut = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def hold(self, connection: http.client.HTTPSConnection, *, left_s: float) -> None:
        """Connect if need be, and have every operation on the socket end in time."""
        if connection.sock is None:
            connection.timeout = left_s
            connection.connect()
        connection.sock.settimeout(left_s)
        with self._lock:
            self._socket = connection.sock
        if self.was_cut:
            raise TimeoutError("given up")

    def release(self) -> bool:
        """The thread needs the socket no more; False when it has been cut."""
        with self._lock:
            self._socket = None
            return not self.was_cut

    def cut(self) -> None:
        """Shut the socket down under the thread that waits on it. Safe at any time, from any thread."""
        with self._lock:
            self.was_cut = True
            if self._socket is not None:
                # The plain socket's method: the TLS one would also take its session away from the other thread.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


def _understand(response: http.client.HTTPResponse, body: bytearray, *, took_ms: int) -> CloudAnswer | CloudRefusal:
    if response.status != 200:
        said = decode_error(body)
        retry_after_ms = _retry_after_ms(response.getheader("Retry-After", ""))
        return CloudRefusal(status=response.status, message=said.error[:400], retry_after_ms=retry_after_ms)
    length = response.getheader(JSON_LENGTH_HEADER)
    if length is not None and not (length.isascii() and length.isdigit() and len(length) < 10):
        raise TransferCorrupt(f"the hub's {JSON_LENGTH_HEADER} is {length[:40]!r}")
    answer = decode_response(body, json_length=None if length is None else int(length))
    said_by = read_provenance(answer.parameters)
    if said_by is None or len(said_by.labels) != 1 or len(said_by.confidences) != 1:
        raise TransferCorrupt("the hub's answer does not say one label and its confidence")
    label, confidence = said_by.labels[0], said_by.confidences[0]
    if len(label) > MAX_LABEL_CHARS or not (math.isfinite(confidence) and 0 <= confidence <= _ONE):
        raise TransferCorrupt("the hub's answer says a label or a confidence that is none")
    if any(len(name) > MAX_NAME_CHARS for name in (answer.model, answer.version, said_by.variant, said_by.digest)):
        raise TransferCorrupt(f"the hub's answer says a name of more than {MAX_NAME_CHARS} characters")
    return CloudAnswer(
        model=answer.model,
        version=answer.version,
        variant=said_by.variant,
        digest=said_by.digest,
        label=label,
        confidence=min(confidence, 1.0),
        outputs=answer.outputs,
        payload=answer.payload,
        size_bytes=len(body),
        took_ms=took_ms,
    )


def _retry_after_ms(text: str) -> int | None:
    """The seconds of a Retry-After header (RFC 9110, section 10.2.3); its other form, a date, needs a clock."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return None
    return min(int(text), MAX_RETRY_AFTER_S) * 1000
