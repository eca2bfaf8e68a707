"""A TLS socket that reads and writes in large pieces, under a client that asks for single bytes.

The MQTT client reads a packet's first byte, its length byte by byte, then its body, and writes each packet by itself.
Every such step costs a system call and a turn of the interpreter's lock. Here a read takes what has come, and what is
written waits until the caller says `flush`: an acknowledgement of four bytes does not travel alone.

Python's `ssl` makes sockets of this class for a context whose `sslsocket_class` it is.
"""

from __future__ import annotations

import ssl
from typing import Any, Final

READ_BYTES: Final = 64 * 1024
MAX_WAITING_BYTES: Final = 1024 * 1024
"""Written and not yet taken by the other side; beyond that `send` says that it would block."""


class LineSocket(ssl.SSLSocket):
    """A non-blocking TLS socket with a buffer on each side.

    Attributes:
        is_dry: nothing more can be read now: wait until the socket is readable.
        waiting_bytes: what is written and not yet sent.
    """

    is_dry = False
    _read: bytes = b""
    _read_to = 0
    _unsent: bytearray | None = None

    @property
    def waiting_bytes(self) -> int:
        """What is written and not yet sent."""
        return len(self._unsent or b"")

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Up to so many bytes; raises SSLWantReadError when none are here."""
        begin = self._read_to
        if begin >= len(self._read):
            try:
                self._read = super().recv(READ_BYTES, flags)
            except ssl.SSLWantReadError:
                self.is_dry = True
                raise
            begin = 0
        self._read_to = begin + buflen
        return self._read[begin : self._read_to]

    def send(self, data: Any, flags: int = 0) -> int:  # noqa: ARG002 - as the class has it
        """Keep the bytes for the next `flush`; raises BlockingIOError when too many wait already."""
        if self._unsent is None:
            self._unsent = bytearray()
        if len(self._unsent) > MAX_WAITING_BYTES:
            raise BlockingIOError
        self._unsent += data
        return len(data)

    def flush(self) -> bool:
        """Send what waits, as far as the other side takes it; whether all is sent. Raises OSError."""
        while self._unsent:
            try:
                # The same bytes again after it would block, as OpenSSL wants it.
                sent = super().send(bytes(self._unsent[:READ_BYTES]))
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return False
            del self._unsent[:sent]
        return True

    def close(self) -> None:
        """Close, after a last try to send what waits: a farewell."""
        try:
            self.flush()
        except (OSError, ValueError):
            self._unsent = None
        super().close()
