"""The door: a Unix socket on which applications of this machine ask models, in frames.

Rules:
- Any number of requests may be on their way on one connection; answers carry the request's id and come in any order.
  Beyond `PIPELINE` of them, nothing more is read from that connection until some are answered.
- A request that does not parse gets a Refusal and the connection lives on; bytes that are no frame get a Refusal and
  the connection ends, because nobody can tell where the next frame starts.
- Who does not read the answers is not read from, and after `CLOGGED_S` cut off.
- A connection that ends does not cancel what it asked for: feedback and readings have effects.
- The socket's file mode is the access control. There is one agent per socket: a living one is left alone.

Tensors are passed on as they came; nothing here looks inside.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import stat
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.adapters.streams import FrameLink
from edge_agent.framing import Buffer
from shared import limits
from shared.errors import ConfigError, Conflict, InputRefused, OutriderError, ProtocolViolation
from shared.inference import Refusal, Reply, Request, decode_request, encode_header

logger = logging.getLogger(__name__)

PIPELINE: Final = 64
"""Requests of one connection that are worked on at a time."""
CLOGGED_S: Final = 10.0
MAX_ARRIVING_BYTES: Final = 2 * limits.MAX_FRAME_PAYLOAD_BYTES
"""Memory for payloads that are still arriving, over all connections."""
MAX_HELD_BYTES: Final = 2 * limits.MAX_FRAME_PAYLOAD_BYTES
"""Memory for payloads that have arrived and wait for their answer, over all connections."""
MAX_PATH_BYTES: Final = 100
"""The kernel takes 107 (unix(7)), other systems 103; staying below both keeps a state directory movable."""
_UNSENT_BYTES: Final = limits.MIB
_LINGER_S: Final = 1.0

Handle = Callable[[Request, bytearray], Awaitable[tuple[Reply, Sequence[Buffer]]]]
"""Answers one request: the reply and the pieces of its payload; an OutriderError becomes a Refusal."""


class Door:
    """Listens on a Unix socket and hands requests to `handle`, each in a task of its own."""

    def __init__(self, *, path: Path, handle: Handle, tasks: asyncio.TaskGroup, mode: int = 0o600) -> None:
        """Tasks belong to the caller's group; `mode` is the socket file's."""
        self._path = path
        self._handle = handle
        self._tasks = tasks
        self._mode = mode
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._waiting = 0
        self._held_bytes = 0

    async def open(self) -> None:
        """Start listening.

        Raises:
            ConfigError: the path cannot hold a socket.
            Conflict: another agent listens there.
        """
        if len(str(self._path).encode()) > MAX_PATH_BYTES:
            raise ConfigError(
                f"the socket's path {self._path} is longer than {MAX_PATH_BYTES} bytes",
                code="config.door_path",
                hint="choose a shorter state directory, or set door.path",
            )
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_stale(self._path)
            listener.bind(str(self._path))
            # Nobody can connect in between: the socket does not listen yet.
            self._path.chmod(self._mode)
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            self._server = await loop.create_unix_server(self._accept, sock=listener, backlog=128)
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"cannot listen on {self._path}: {error.strerror}",
                code="config.door_path",
                hint="check that the directory exists and that the agent may write there",
            ) from error
        except OutriderError:
            listener.close()
            raise

    async def close(self) -> None:
        """Stop listening, end every connection and remove the socket. Safe to call twice."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for connection in list(self._connections):
            connection.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _accept(self) -> FrameLink:
        connection = _Connection(self)
        if len(self._connections) >= limits.MAX_DOOR_CONNECTIONS:
            connection.turn_away()
        self._connections.add(connection)
        return connection.link

    def begin(self, connection: _Connection, request: Request, payload: bytearray) -> Refusal | None:
        """Work on a request in a task of its own; a refusal when too many, or too large ones, wait already."""
        if self._waiting >= limits.MAX_WAITING_REQUESTS or self._server is None:
            return _overload(request.id, "overload", f"{limits.MAX_WAITING_REQUESTS} requests wait for an answer")
        if self._held_bytes + len(payload) > MAX_HELD_BYTES:
            message = f"the requests that wait for an answer hold {self._held_bytes} of {MAX_HELD_BYTES} bytes"
            return _overload(request.id, "overload.memory", message)
        self._waiting += 1
        self._held_bytes += len(payload)
        self._tasks.create_task(self._answer(connection, request, payload), name="door request")
        return None

    def forget(self, connection: _Connection) -> None:
        """The connection has ended."""
        self._connections.discard(connection)

    def arriving_bytes(self) -> int:
        """Memory taken by payloads that are still arriving."""
        return sum(connection.link.bytes_held for connection in self._connections)

    async def _answer(self, connection: _Connection, request: Request, payload: bytearray) -> None:
        parts: Sequence[Buffer] = ()
        reply: Reply
        size = len(payload)
        try:
            reply, parts = await self._handle(request, payload)
        except OutriderError as error:
            reply = refusal(request.id, error)
        except TimeoutError:
            reply = Refusal(id=request.id, code="deadline", message="no answer was ready in time", retry=True)
        except Exception:  # a defect in the answer to one application must not take the agent from the others
            logger.exception("a request at the door failed")
            reply = Refusal(id=request.id, code="internal", message="the agent failed; its log says why")
        finally:
            self._waiting -= 1
            self._held_bytes -= size
        connection.reply(reply, parts)


class _Connection:
    """One application's stream."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._asked = 0
        self._is_clogged = False
        self._turned_away = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self.link = FrameLink(
            on_frame=self._on_frame,
            on_refused=self._on_refused,
            on_end=self._on_end,
            on_clogged=self._on_clogged,
            on_begin=self._on_begin,
            on_growth=self._on_growth,
        )

    def turn_away(self) -> None:
        """Refuse as soon as the stream has begun."""
        self._turned_away = True

    def close(self) -> None:
        """End the stream after what is unsent."""
        self.link.close()

    def reply(self, reply: Reply, parts: Sequence[Buffer]) -> None:
        """Send an answer and make room for the next request."""
        self._asked -= 1
        try:
            self.link.send(encode_header(reply), parts)
        except ProtocolViolation as error:
            self.link.send(encode_header(refusal(reply.id, error)))
        self._flow()

    def _on_begin(self) -> None:
        self.link.limit_unsent(_UNSENT_BYTES)
        if self._turned_away:
            self._end_with(
                Refusal(
                    id="",
                    code="overload.connections",
                    message=f"{limits.MAX_DOOR_CONNECTIONS} connections are open",
                    hint="close clients that are not used",
                    retry=True,
                )
            )

    def _on_frame(self, header: bytes, payload: bytearray) -> None:
        try:
            request = decode_request(header)
        except InputRefused as error:
            self.link.send(encode_header(refusal(_request_id(header), error)))
            return
        refused = self._door.begin(self, request, payload)
        if refused is not None:
            self.link.send(encode_header(refused))
            return
        self._asked += 1
        self._flow()

    def _on_growth(self) -> None:
        if self._door.arriving_bytes() > MAX_ARRIVING_BYTES:
            self._end_with(
                Refusal(
                    id="",
                    code="overload.memory",
                    message=f"more than {MAX_ARRIVING_BYTES} bytes of requests are arriving",
                    hint="send large requests one after the other",
                    retry=True,
                )
            )

    def _on_refused(self, error: ProtocolViolation) -> None:
        self._end_with(refusal("", error))

    def _on_clogged(self, is_clogged: bool) -> None:
        self._is_clogged = is_clogged
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if is_clogged:
            self._timer = self._loop.call_later(CLOGGED_S, self.link.abort)
        self._flow()

    def _on_end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._door.forget(self)

    def _flow(self) -> None:
        if self._is_clogged or self._asked >= PIPELINE:
            self.link.pause()
        else:
            self.link.resume()

    def _end_with(self, reply: Refusal) -> None:
        """Say why, wait a moment for the other side to read it, and hang up."""
        self.link.send(encode_header(reply))
        self.link.finish()
        self._loop.call_later(_LINGER_S, self.link.abort)


def _overload(request: str, code: str, message: str) -> Refusal:
    return Refusal(id=request, code=code, message=message, hint="ask again later", retry=True)


def refusal(request: str, error: OutriderError) -> Refusal:
    """An error as the caller gets it."""
    return Refusal(id=request, code=error.code, message=error.message, hint=error.hint, retry=error.retry)


class _OnlyId(msgspec.Struct):
    id: str = ""


def _request_id(header: bytes) -> str:
    """The id of a request that does not parse as a whole, so that its caller learns which one it was."""
    try:
        return msgspec.msgpack.decode(header, type=_OnlyId).id[: limits.MAX_REQUEST_ID_CHARS]
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return ""


def _remove_stale(path: Path) -> None:
    """Remove the socket of an agent that is gone; raises Conflict when it is alive, ConfigError for another file."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} is not a socket", code="config.door_path", hint="move that file away or set door.path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        trial.setblocking(False)
        outcome = trial.connect_ex(str(path))
    # EAGAIN: somebody listens and is busy (unix(7)).
    if outcome in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise Conflict(
            f"another agent is running: it answers on {path}",
            code="conflict.agent_running",
            hint="stop it first, or give this one its own state directory",
        )
    path.unlink(missing_ok=True)
