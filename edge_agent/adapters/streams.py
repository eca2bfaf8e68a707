"""Frames over asyncio: one class for the door's connections, the pipe to a model host, and the asyncio client.

Rules: a frame is delivered in the call that received its last byte, so that no task has to wake up in between; after
bytes that are no frame nothing more is delivered, and what still comes is thrown away until the stream ends; nothing
is sent or delivered after that end, and sending then is not an error, because the news of it is on its way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from edge_agent.framing import Buffer, FrameReader, build_frame
from shared.errors import ProtocolViolation


class FrameLink(asyncio.BufferedProtocol):
    """One end of a stream of frames."""

    def __init__(
        self,
        *,
        on_frame: Callable[[bytes, bytearray], None],
        on_refused: Callable[[ProtocolViolation], None],
        on_end: Callable[[], None],
        on_clogged: Callable[[bool], None] | None = None,
        on_begin: Callable[[], None] | None = None,
        on_growth: Callable[[], None] | None = None,
        on_first: Callable[[memoryview], bool] | None = None,
    ) -> None:
        """Callbacks, all on the event loop; none may raise.

        Args:
            on_frame: a whole frame.
            on_refused: the other side sent no frame; nothing more is delivered.
            on_end: the stream has ended.
            on_clogged: True when the other side does not read what was sent, False when it does again.
            on_begin: the stream has begun.
            on_growth: a part of a large payload has arrived; see `bytes_held`.
            on_first: the stream's first bytes, before they are read as frames; True when they are somebody else's,
                who has taken the stream with `give_away`.
        """
        self._on_frame = on_frame
        self._on_refused = on_refused
        self._on_end = on_end
        self._on_clogged = on_clogged
        self._on_begin = on_begin
        self._on_growth = on_growth
        self._on_first = on_first
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._refused = False
        self._paused = False
        self._discard = memoryview(b"")
        self._first = memoryview(b"")

    @property
    def is_open(self) -> bool:
        """Whether the stream has begun and nobody has ended it."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def bytes_held(self) -> int:
        """Memory taken by a payload that is still arriving."""
        return self._reader.payload_pending

    def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        """Send a frame; raises ProtocolViolation, with nothing sent, when it is too large."""
        parts = build_frame(header, payload)
        if self._transport is not None and self.is_open:
            for part in parts:
                self._transport.write(part)

    def limit_unsent(self, high_bytes: int) -> None:
        """Call `on_clogged` when more than this waits to be read by the other side."""
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=high_bytes)

    def pause(self) -> None:
        """Deliver no more frames and read no more bytes for now."""
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Deliver what had arrived and read on."""
        if not self._paused:
            return
        self._paused = False
        self._deliver()
        if not self._paused and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def finish(self) -> None:
        """Send what is unsent and say that no more will come; what still arrives is thrown away."""
        self._refused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write_eof()
            self.resume()

    def close(self) -> None:
        """End the stream after what is unsent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the stream now."""
        if self._transport is not None:
            self._transport.abort()

    def give_away(self) -> asyncio.Transport:
        """End this link but not the stream, which somebody else goes on with; nothing is delivered any more."""
        assert self._transport is not None
        transport, self._transport = self._transport, None
        self._refused = True
        return transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the stream has begun."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._on_begin is not None:
            self._on_begin()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """asyncio: where the next bytes go."""
        if self._refused:
            self._discard = self._discard or memoryview(bytearray(65_536))
            return self._discard
        buffer = self._reader.buffer()
        if self._on_first is not None:
            self._first = buffer
        return buffer

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio: bytes have arrived."""
        if self._on_first is not None:
            on_first, first, self._on_first, self._first = self._on_first, self._first[:nbytes], None, memoryview(b"")
            if on_first(first):
                return
        if not self._refused:
            self._reader.received(nbytes)
            self._deliver()

    def pause_writing(self) -> None:
        """asyncio: the other side is slow."""
        if self._on_clogged is not None:
            self._on_clogged(True)

    def resume_writing(self) -> None:
        """asyncio: the other side has caught up."""
        if self._on_clogged is not None:
            self._on_clogged(False)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """asyncio: the stream has ended, whoever ended it."""
        self._transport = None
        self._on_end()

    def _deliver(self) -> None:
        while not self._paused and not self._refused:
            try:
                frame = self._reader.next_frame()
            except ProtocolViolation as error:
                self._refused = True
                self._on_refused(error)
                return
            if frame is None:
                if self._on_growth is not None and self._reader.payload_pending:
                    self._on_growth()
                return
            self._on_frame(*frame)
