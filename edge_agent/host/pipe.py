"""A child's side of its ties to the core: blocking frames on the socket pair, and files by descriptor.

Shared by model hosts and trainers. Not here: what the frames say (protocol.py of each).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from edge_agent.framing import Buffer, FrameReader, build_frame
from shared.errors import ModelError


class Pipe:
    """Blocking frames on the socket pair."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._reader = FrameReader()

    def receive(self) -> tuple[bytes, bytearray] | None:
        """The next frame's header and payload; None when the core is gone."""
        while (frame := self._reader.next_frame()) is None:
            count = self._link.recv_into(self._reader.buffer())
            if count == 0:
                return None
            self._reader.received(count)
        return frame

    def send(self, header: bytes, payload: Sequence[Buffer] = ()) -> None:
        """Send a frame; raises ProtocolViolation, with nothing sent, when it is too large."""
        for part in build_frame(header, payload):
            self._link.sendall(part)


def read_file(descriptor: int, *, length: int, at_most: int) -> bytes:
    """The whole file behind a descriptor, which is closed; never a path, so that nobody can swap the file."""
    if length > at_most:
        raise ModelError(f"a file of {length} bytes exceeds {at_most}", code="model.too_large")
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        file.seek(0)
        data = file.read(length + 1)
    if data is None or len(data) != length:
        raise ModelError(f"a file of {length} bytes was promised, another length was found", code="model.corrupt")
    return data
