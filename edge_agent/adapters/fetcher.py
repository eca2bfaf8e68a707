"""HTTPS to the hub with the device's certificate, as `edge_agent.ports.Fetcher`.

Rules of this file:
1. Only the hub's own CA is trusted; nothing is redirected, decompressed or sent through a proxy.
2. Every wait ends: connecting and each read have a deadline, a transfer that brings less than `MIN_PROGRESS` bytes in
   a stall period is given up, and so is one that is slower on the whole than `SLOWEST_BYTES_S`: a server that drips
   cannot hold the agent (slow retrieval). What arrived stays on the shelf and the next try resumes there.
3. No more is read than was promised (endless data). What is sent goes in small pieces, each with that deadline.
4. One transfer of a file at a time: one that was given up may still be at the shelf when the next one begins.

The standard library's client runs in a thread; on cancellation its socket is shut down, so that the thread ends.
Not here: trying again (the driver), the TLS context (tls.py), and judging metadata (the verifier child).
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Final, TypeVar
from urllib.parse import quote

from edge_agent.adapters.tls import refused_certificate
from edge_agent.identity import check_hub_url
from edge_agent.update_ports import Shelf
from shared.clock import Clock
from shared.errors import TransferCorrupt, TransferError, TransferRefused, Unreachable
from shared.limits import KIB
from shared.model import FileRef

FOREIGN_CERTIFICATE: Final = "transfer.hub_certificate"
"""The code of a server that no CA of ours vouches for."""

STALL_MS: Final = 15_000
MIN_PROGRESS: Final = 1 * KIB
CHUNK_BYTES: Final = 256 * KIB
SLOWEST_BYTES_S: Final = 2 * KIB
"""With `GRACE_STALLS` stall periods on top: the deadline of a whole transfer, which grows with what is to come."""
GRACE_STALLS: Final = 4
SENT_PIECE_BYTES: Final = 16 * KIB
SLOWEST_UPLOAD_BYTES_S: Final = 16 * KIB
"""An upload that is slower on the whole is given up."""
MAX_ANSWER_BYTES: Final = 64 * KIB

T = TypeVar("T")


class HubFetcher:
    """`Fetcher` on `http.client`; one connection per call."""

    def __init__(
        self,
        *,
        hub_url: str,
        context: ssl.SSLContext,
        clock: Clock,
        stall_ms: int = STALL_MS,
        slowest_bytes_s: int = SLOWEST_BYTES_S,
        agent: str = "outrider",
    ) -> None:
        self._host, self._port = check_hub_url(hub_url)
        self._context = context
        self._clock = clock
        self._stall_ms = stall_ms
        self._slowest_bytes_s = slowest_bytes_s
        self._agent = agent
        self._transfers = _Transfers()

    def adopt(self, context: ssl.SSLContext) -> None:
        """Use this context from the next connection on: there is a new certificate."""
        self._context = context

    async def metadata(self, name: str, *, max_bytes: int) -> bytes | None:
        """A metadata file, None where the hub has none of that name.

        Raises:
            Unreachable: nobody answered, or too slowly, or the hub has trouble of its own.
            TransferRefused: the hub said no.
            TransferCorrupt: `transfer.too_large`, the answer exceeds `max_bytes`.
        """

        def work(call: _Call) -> bytes | None:
            response = call.get(f"/v1/metadata/{quote(name, safe='%')}", {})
            if response.status == 404:
                return None
            call.expect(response, 200)
            data = bytearray()
            for chunk in call.chunks(response, limit=max_bytes):
                data += chunk
            return bytes(data)

        return await self._in_thread(work)

    async def blob(self, file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        """Bring a file onto the shelf, resuming where an earlier try stopped, and publish it.

        With `up_to`, no more of it than up to this byte: it is published only when that is its end, and one that is
        corrupt then is not fetched anew, because that would be more than was allowed.

        Raises:
            Unreachable: the connection broke, stalled or is too slow; what arrived is kept for the next try.
            TransferRefused: the hub said no, or has no such file.
            TransferCorrupt: what arrived is not the file; it is dropped.
            StorageError, StorageFull: the disk refused.
        """

        def work(call: _Call) -> None:
            with self._transfers.one_of(file, within_ms=self._stall_ms):
                if not shelf.has(file.digest):
                    if up_to is None:
                        _fetch_blob(call, file, shelf)
                    else:
                        _fetch_rest(call, file, shelf, end=min(up_to, file.length))

        if not shelf.has(file.digest):
            await self._in_thread(work)

    async def upload(self, path: str, data: bytes) -> None:
        """PUT these bytes at this path of the hub; the same bytes may be put there twice.

        Raises:
            Unreachable: the connection broke or is too slow; the whole of it is to be sent again.
            TransferRefused: the hub said no; what it said in words is not repeated.
        """

        def work(call: _Call) -> None:
            response = call.put(path, data)
            call.expect(response, 200, 201, 202, 204)
            response.read(MAX_ANSWER_BYTES)

        await self._in_thread(work, grace_ms=len(data) * 1000 // SLOWEST_UPLOAD_BYTES_S)

    async def ask(self, path: str, question: bytes, *, max_bytes: int) -> bytes:
        """POST this JSON and return the answer's bytes.

        Raises:
            Unreachable: nobody answered, or too slowly, or the hub has trouble of its own.
            TransferRefused: the hub said no; `transfer.not_found` when it knows no such question.
            TransferCorrupt: `transfer.too_large`, the answer exceeds `max_bytes`.
        """

        def work(call: _Call) -> bytes:
            response = call.post(path, question)
            call.expect(response, 200)
            return b"".join(call.chunks(response, limit=max_bytes))

        return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[_Call], T], *, grace_ms: int = 0) -> T:
        call = _Call(
            http.client.HTTPSConnection(self._host, self._port, context=self._context, timeout=self._stall_ms / 1000),
            clock=self._clock,
            stall_ms=self._stall_ms,
            slowest_bytes_s=self._slowest_bytes_s,
            agent=self._agent,
        )
        # Headers that drip in byte by byte would pass every single read's deadline; the sum of them has its own.
        patience_s = (2 * self._stall_ms + grace_ms) / 1000
        watchdog = asyncio.get_running_loop().call_later(patience_s, call.abort_unless_answered)
        try:
            return await asyncio.to_thread(_guarded, work, call)
        except asyncio.CancelledError:
            call.abort()
            raise
        finally:
            watchdog.cancel()


class _Transfers:
    """Lets one transfer of each file run; used by the threads."""

    def __init__(self) -> None:
        self._ended = threading.Condition()
        self._running: set[str] = set()

    @contextlib.contextmanager
    def one_of(self, file: FileRef, *, within_ms: int) -> Iterator[None]:
        """Wait for the transfer before this one; raises Unreachable when it does not end."""
        with self._ended:
            if not self._ended.wait_for(lambda: file.digest not in self._running, timeout=within_ms / 1000):
                raise Unreachable(f"{file.path} is being fetched already", code="transfer.busy")
            self._running.add(file.digest)
        try:
            yield
        finally:
            with self._ended:
                self._running.discard(file.digest)
                self._ended.notify_all()


class _Call:
    """One request on one connection, with the deadlines of this file."""

    def __init__(
        self,
        connection: http.client.HTTPSConnection,
        *,
        clock: Clock,
        stall_ms: int,
        slowest_bytes_s: int,
        agent: str,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._stall_ms = stall_ms
        self._slowest_bytes_s = slowest_bytes_s
        self._agent = agent
        self._lock = threading.Lock()
        # Kept here too: a response to be followed by a close takes the socket out of the connection.
        self._socket: socket.socket | None = None
        self._response: http.client.HTTPResponse | None = None
        self._aborted = False
        self._answered = False

    @property
    def peer(self) -> str:
        return f"{self._connection.host}:{self._connection.port}"

    def get(self, path: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Send the request and return the response with its body unread."""
        return self._send("GET", path, headers, None)

    def put(self, path: str, data: bytes) -> http.client.HTTPResponse:
        """Send the bytes and return the response with its body unread."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(data))}
        return self._send("PUT", path, headers, data)

    def post(self, path: str, question: bytes) -> http.client.HTTPResponse:
        """Send the question and return the response with its body unread."""
        headers = {"Content-Type": "application/json", "Content-Length": str(len(question))}
        return self._send("POST", path, headers, question)

    def _send(self, method: str, path: str, headers: dict[str, str], data: bytes | None) -> http.client.HTTPResponse:
        self.close()
        self._connection.connect()
        with self._lock:
            self._answered = False
            self._socket = self._connection.sock
            if self._aborted:
                raise TimeoutError("given up")
        fixed = {"Accept-Encoding": "identity", "User-Agent": self._agent}
        body = None if data is None else _pieces(data)
        self._connection.request(method, path, body=body, headers={**fixed, **headers})
        response = self._response = self._connection.getresponse()
        with self._lock:
            if self._aborted:  # headers that were cut short parse like whole ones
                raise TimeoutError("given up")
            self._answered = True
        return response

    def expect(self, response: http.client.HTTPResponse, *statuses: int) -> None:
        """Raise the TransferError that the status stands for, unless it is one of these."""
        status = response.status
        if status in statuses:
            return
        if status >= 500 or status in (408, 425, 429):
            raise Unreachable(f"the hub at {self.peer} answered {status}", hint="the agent tries again by itself")
        if status == 404:
            raise TransferRefused(f"the hub at {self.peer} has no such file", code="transfer.not_found")
        hint = "see `outrider-agent doctor`; the device may have been revoked" if status in (401, 403) else ""
        raise TransferRefused(f"the hub at {self.peer} answered {status}", hint=hint)

    def chunks(self, response: http.client.HTTPResponse, *, limit: int) -> Iterator[bytes]:
        """The body, at most `limit` bytes of it and never slower than rule 2 allows."""
        promised = response.length
        if promised is None and not response.chunked:
            # A connection that broke among the headers looks like a response without a length.
            raise Unreachable(f"the hub at {self.peer} answered without saying how much")
        received, window_bytes, window_start = 0, 0, self._clock.mono_ms()
        last_ms = window_start + GRACE_STALLS * self._stall_ms + limit * 1000 // self._slowest_bytes_s
        while chunk := response.read1(min(CHUNK_BYTES, limit - received + 1)):
            received += len(chunk)
            window_bytes += len(chunk)
            if received > limit:
                raise TransferCorrupt(
                    f"the hub at {self.peer} sends more than the promised {limit} bytes", code="transfer.too_large"
                )
            yield chunk
            now = self._clock.mono_ms()
            if now - window_start >= self._stall_ms:
                if window_bytes < MIN_PROGRESS:
                    raise Unreachable(
                        f"the hub at {self.peer} sent {window_bytes} bytes in {now - window_start} ms",
                        code="transfer.stalled",
                    )
                window_bytes, window_start = 0, now
            if now > last_ms and received < limit:
                raise Unreachable(
                    f"the hub at {self.peer} sends too slowly: {received} of {limit} bytes came", code="transfer.slow"
                )
        if promised is not None and received < promised:
            raise Unreachable(f"the connection to {self.peer} broke after {received} of {promised} bytes")

    def abort_unless_answered(self) -> None:
        """End the call if not even the headers have come."""
        with self._lock:
            if not self._answered:
                self._cut()

    def abort(self) -> None:
        """Shut the socket down under the thread that waits on it. Safe at any time, from any thread."""
        with self._lock:
            self._cut()

    def _cut(self) -> None:
        self._aborted = True
        if self._socket is not None:
            # The plain socket's method: the TLS one would also take its session away from the other thread.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            self._socket = None
        if self._response is not None:
            self._response.close()
            self._response = None
        self._connection.close()


def _pieces(data: bytes) -> Iterator[memoryview]:
    """The data in pieces, because a socket's deadline is for each call and not for each byte."""
    view = memoryview(data)
    for start in range(0, len(view), SENT_PIECE_BYTES):
        yield view[start : start + SENT_PIECE_BYTES]


def _fetch_blob(call: _Call, file: FileRef, shelf: Shelf) -> None:
    has_part = shelf.resume_at(file.digest) > 0
    try:
        _fetch_rest(call, file, shelf, end=file.length)
    except TransferCorrupt:
        if not has_part:
            raise
        # The part from an earlier try was damaged, by a power cut for instance: that is no fault of what is signed.
        shelf.append(file.digest, b"", offset=0)
        _fetch_rest(call, file, shelf, end=file.length)


def _fetch_rest(call: _Call, file: FileRef, shelf: Shelf, *, end: int) -> None:
    """Fetch up to this byte, and publish if that is the file's end."""
    offset = shelf.resume_at(file.digest)
    if offset == file.length:
        shelf.publish(file)
        return
    if offset > file.length:
        offset = 0
    if offset < end:
        offset = _fetch_range(call, file, shelf, offset=offset, end=end)
    if offset < end:
        shelf.append(file.digest, b"", offset=0)
        raise TransferCorrupt(f"the hub at {call.peer} has {offset} bytes of {file.path}, {file.length} are signed")
    if end == file.length:
        shelf.publish(file)


def _fetch_range(call: _Call, file: FileRef, shelf: Shelf, *, offset: int, end: int) -> int:
    """Fetch from here to there onto the shelf; returns how far that came."""
    path, is_part = f"/v1/blobs/{file.digest}", end < file.length
    headers = {"Range": f"bytes={offset}-{end - 1 if is_part else ''}"} if offset or is_part else {}
    if offset:
        headers["If-Range"] = f'"{file.digest}"'
    response = call.get(path, headers)
    if response.status == 416:
        response.read(MAX_ANSWER_BYTES)
        offset = 0
        response = call.get(path, {})
    call.expect(response, 200, 206)
    if response.status == 200:
        offset, sent = 0, file.length
    elif _continues(response, offset=offset, end=end, length=file.length):
        sent = end
    else:
        raise TransferCorrupt(f"the hub at {call.peer} sent another range of {file.path} than was asked for")
    for chunk in call.chunks(response, limit=sent - offset):
        shelf.append(file.digest, chunk[: end - offset], offset=offset)
        offset = min(end, offset + len(chunk))
        if offset == end < sent:
            break  # a server without ranges sends all of it; the rest was not allowed
    return offset


def _continues(response: http.client.HTTPResponse, *, offset: int, end: int, length: int) -> bool:
    return response.getheader("Content-Range", "").replace(" ", "") == f"bytes{offset}-{end - 1}/{length}"


def _guarded(work: Callable[[_Call], T], call: _Call) -> T:
    """Run the work and translate what the library raises."""
    try:
        return work(call)
    except ssl.SSLCertVerificationError as error:
        raise refused_certificate(call.peer, error, code=FOREIGN_CERTIFICATE) from error
    except ssl.SSLError as error:
        raise _refused_or_unreachable(call, error) from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise Unreachable(f"the hub at {call.peer} cannot be reached: {reason}") from error
    finally:
        call.close()


def _refused_or_unreachable(call: _Call, error: ssl.SSLError) -> TransferError:
    if "ALERT" in (error.reason or ""):
        return TransferRefused(
            f"the hub at {call.peer} refused this device's certificate: {error.reason}",
            code="transfer.device_certificate",
            hint="run `outrider-agent doctor`; the certificate may have expired",
        )
    return Unreachable(f"the hub at {call.peer} cannot be reached: {error.reason or error}")
