"""The door: a Unix socket on which applications of this machine ask models, and a port on loopback if one is set.

A stream on the socket speaks frames when its first byte is theirs, and the Open Inference Protocol over HTTP when it
is another; on the port there is only HTTP. Both ask the same handler. Rules:

- Any number of requests may be on their way on one connection; answers carry the request's id and come in any order.
  Beyond `PIPELINE` of them, nothing more is read from that connection until some are answered.
- A request that does not parse gets a Refusal and the connection lives on; bytes that are no frame get a Refusal and
  the connection ends, because nobody can tell where the next frame starts.
- Who does not read the answers is not read from, and after `CLOGGED_S` cut off.
- A connection that ends does not cancel what it asked for: feedback and readings have effects.
- The socket's file mode is the access control. There is one agent per socket: a living one is left alone. The port has
  no access control but the machine's edge: it is on loopback, and whoever is on the machine may ask.

Tensors are passed on as they came; nothing here looks inside. Not here: HTTP (http_door.py), which is loaded when the
first stream speaks it; what may wait for an answer (waiting.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from edge_agent.adapters.streams import FrameLink
from edge_agent.adapters.waiting import Handle, Place, WaitingRoom, refusal
from edge_agent.framing import Buffer
from shared import limits
from shared.errors import ConfigError, Conflict, InputRefused, OutriderError, ProtocolViolation
from shared.inference import Refusal, Reply, decode_request, encode_header
from shared.wire import frames

if TYPE_CHECKING:
    from edge_agent.adapters.http_door import HttpStream
    from edge_agent.adapters.oip import Conversation

PIPELINE: Final = 64
"""Requests of one connection that are worked on at a time."""
CLOGGED_S: Final = 10.0
MAX_ARRIVING_BYTES: Final = 2 * limits.MAX_FRAME_PAYLOAD_BYTES
"""Memory for payloads that are still arriving, over all connections."""
MAX_PATH_BYTES: Final = 100
"""The kernel takes 107 (unix(7)), other systems 103; staying below both keeps a state directory movable."""
_UNSENT_BYTES: Final = limits.MIB
_SCRATCH_BYTES: Final = 64 * limits.KIB
_LINGER_S: Final = 1.0


class Door:
    """Listens, and hands requests to `handle`, each in a task of its own."""

    def __init__(
        self,
        *,
        path: Path,
        handle: Handle,
        tasks: asyncio.TaskGroup,
        mode: int = 0o600,
        http: tuple[str, int] | None = None,
    ) -> None:
        """Tasks belong to the caller's group.

        Args:
            path: of the Unix socket.
            handle: answers the requests.
            tasks: where they are worked on.
            mode: the socket file's.
            http: loopback address and port for HTTP, if any; port 0 lets the kernel choose (`http_port`).
        """
        self._path = path
        self._room = WaitingRoom(handle=handle, tasks=tasks)
        self._mode = mode
        self._http = http
        self._server: asyncio.Server | None = None
        self._http_server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._http_streams: set[HttpStream] = set()
        self._conversation: Conversation | None = None
        self._http_scratch = memoryview(b"")

    @property
    def http_port(self) -> int:
        """The port on loopback; 0 while there is none."""
        if self._http_server is None:
            return 0
        port: int = self._http_server.sockets[0].getsockname()[1]
        return port

    async def open(self) -> None:
        """Start listening.

        Raises:
            ConfigError: the path cannot hold a socket, or the port cannot be had.
            Conflict: another agent listens there.
        """
        await self._open_socket()
        if self._http is not None:
            try:
                await self._open_port(*self._http)
            except OutriderError:
                await self.close()
                raise
        self._room.open()

    async def _open_socket(self) -> None:
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

    async def _open_port(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            self._http_server = await loop.create_server(self._accept_http, host, port, backlog=128)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}",
                code="config.door_http",
                hint="choose another port for door.http, or leave it empty",
            ) from error

    async def close(self) -> None:
        """Stop listening, end every connection and remove the socket. Safe to call twice."""
        if self._server is None:
            return
        self._room.close()
        for server in (self._server, self._http_server):
            if server is not None:
                server.close()
        self._server = self._http_server = None
        for connection in list(self._connections):
            connection.close()
        for stream in list(self._http_streams):
            stream.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def arriving_bytes(self) -> int:
        """Memory taken by payloads that are still arriving."""
        framed = sum(connection.link.bytes_held for connection in self._connections)
        return framed + sum(stream.bytes_held for stream in self._http_streams)

    def begin(self, connection: _Connection, header: bytes, payload: bytearray) -> Refusal | None:
        """Work on a frame in a task of its own; a refusal when it does not parse or too much waits already."""
        try:
            request = decode_request(header)
        except InputRefused as error:
            return refusal(_request_id(header), error)

        async def work(place: Place) -> None:
            connection.reply(*await self._room.reply_to(request, payload, place.arrived))

        return self._room.enter(request.id, len(payload), work)

    def hand_over(self, connection: _Connection, first: memoryview, *, is_turned_away: bool) -> None:
        """The connection speaks HTTP: go on with its stream in that dialect."""
        self._connections.discard(connection)
        transport = connection.link.give_away()
        stream = self._http_stream(is_turned_away=is_turned_away, is_local=False)
        transport.set_protocol(stream)
        stream.connection_made(transport)
        stream.take(first)

    def forget(self, connection: _Connection) -> None:
        """The connection has ended."""
        self._connections.discard(connection)

    def _is_full(self) -> bool:
        return len(self._connections) + len(self._http_streams) >= limits.MAX_DOOR_CONNECTIONS

    def _accept(self) -> FrameLink:
        connection = _Connection(self)
        if self._is_full():
            connection.turn_away()
        self._connections.add(connection)
        return connection.link

    def _accept_http(self) -> HttpStream:
        return self._http_stream(is_turned_away=self._is_full(), is_local=True)

    def _http_stream(self, *, is_turned_away: bool, is_local: bool) -> HttpStream:
        from edge_agent.adapters.http_door import HttpStream
        from edge_agent.adapters.oip import Conversation

        if self._conversation is None:
            self._conversation = Conversation(reply_to=self._room.reply_to)
            self._http_scratch = memoryview(bytearray(_SCRATCH_BYTES))
        stream = HttpStream(
            room=self._room,
            conversation=self._conversation,
            on_end=self._http_streams.discard,
            has_room=lambda: self.arriving_bytes() <= MAX_ARRIVING_BYTES,
            scratch=self._http_scratch,
            is_turned_away=is_turned_away,
            is_local=is_local,
        )
        self._http_streams.add(stream)
        return stream


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
            on_first=self._on_first,
        )

    def turn_away(self) -> None:
        """Refuse as soon as its first bytes tell the dialect."""
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
            self._timer = self._loop.call_later(_LINGER_S, self.link.abort)

    def _on_first(self, first: memoryview) -> bool:
        if first[0] != frames.MAGIC:
            self._stop_timer()
            self._door.hand_over(self, first, is_turned_away=self._turned_away)
            return True
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
        return False

    def _on_frame(self, header: bytes, payload: bytearray) -> None:
        refused = self._door.begin(self, header, payload)
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
        self._stop_timer()
        if is_clogged:
            self._timer = self._loop.call_later(CLOGGED_S, self.link.abort)
        self._flow()

    def _on_end(self) -> None:
        self._stop_timer()
        self._door.forget(self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
