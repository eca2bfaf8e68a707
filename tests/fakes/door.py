"""A door that answers as it is told: a Unix socket, real frames, one thread."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from edge_agent.framing import FrameReader, build_frame
from shared.inference import Reply, Request, decode_request, encode_header

Answerer = Callable[[Request, bytearray], tuple[Reply, bytes]]


class FakeDoor:
    """Serves one connection at a time until closed; `asked` holds every request."""

    def __init__(self, path: Path, answerer: Answerer) -> None:
        self.asked: list[Request] = []
        self._answerer = answerer
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> FakeDoor:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                link, _ = self._listener.accept()
                with link:
                    self._talk(link)

    def _talk(self, link: socket.socket) -> None:
        reader = FrameReader()
        while True:
            frame = reader.next_frame()
            if frame is None:
                count = link.recv_into(reader.buffer())
                if count == 0:
                    return
                reader.received(count)
                continue
            request = decode_request(frame[0])
            self.asked.append(request)
            reply, payload = self._answerer(request, frame[1])
            for part in build_frame(encode_header(reply), [payload] if payload else []):
                link.sendall(part)
