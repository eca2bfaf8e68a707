"""A TLS socket that reads and writes in large pieces, under a client that asks for single bytes.

The MQTT client reads a packet's first byte, its length byte by byte, then its body, and writes each packet by itself.
Every such step costs a system call and a turn of the interpreter's lock. Here a read takes what has come, messages are
handed over without the client (`packets.py`), and what is written waits until the caller says `flush`: an
acknowledgement of four bytes does not travel alone.

Python's `ssl` makes sockets of this class for a context whose `sslsocket_class` it is.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from typing import Any, Final

from cloud_hub.ground.packets import PINGREQ, PacketStream, Published, puback
from shared.errors import ProtocolViolation

READ_BYTES: Final = 64 * 1024
MAX_WAITING_BYTES: Final = 1024 * 1024
"""Written and not yet taken by the other side; beyond that `send` says that it would block."""


class LineSocket(ssl.SSLSocket):
    """A non-blocking TLS socket with a buffer on each side; of no use before `attach`.

    Attributes:
        is_dry: nothing more can be read now: wait until the socket is readable.
        has_heard: bytes have come since this was last set to False.
    """

    is_dry = False
    has_heard = False
    _is_abandoned = False
    _packets: PacketStream
    _unsent: bytearray
    _on_published: Callable[[Sequence[Published]], None]
    _most = 0

    def attach(self, on_published: Callable[[Sequence[Published]], None], *, most: int) -> None:
        """Hand over messages while the client reads, each time at most so many."""
        self._packets = PacketStream()
        self._on_published = on_published
        self._most = most

    def do_handshake(self, block: bool = False) -> None:
        """As the class has it, but closed when it fails: the client forgets such a socket."""
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise

    @property
    def waiting_bytes(self) -> int:
        """What is written and not yet sent."""
        return len(self._waiting())

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Bytes for the client, up to so many; raises SSLWantReadError when none are here.

        On the way, messages are handed over; after many the client gets nothing in this turn.
        """
        if self._is_abandoned:
            return b""
        packets, found = self._packets, list[Published]()
        try:
            while True:
                found += packets.take(self._most - len(found))
                if data := packets.read(buflen):
                    return data
                if len(found) >= self._most:
                    raise ssl.SSLWantReadError
                try:
                    more = super().recv(READ_BYTES, flags)
                except ssl.SSLWantReadError:
                    self.is_dry = True
                    raise
                if not more:
                    return b""
                self.has_heard = True
                packets.feed(more)
        except ProtocolViolation as error:
            raise ConnectionError(error.message) from error
        finally:
            if found:
                self._on_published(found)

    def send(self, data: Any, flags: int = 0) -> int:  # noqa: ARG002 - as the class has it
        """Keep the bytes for the next `flush`; raises BlockingIOError when too many wait already."""
        unsent = self._waiting()
        if len(unsent) > MAX_WAITING_BYTES:
            raise BlockingIOError
        unsent += data
        return len(data)

    def acknowledge(self, mid: int) -> None:
        """Keep a message's acknowledgement for the next `flush`."""
        # Without a bound of its own: there is one for each message, and of those a window.
        self._waiting().extend(puback(mid))

    def ping(self) -> None:
        """Keep a request for a sign of life for the next `flush`."""
        self._waiting().extend(PINGREQ)

    def abandon(self) -> None:
        """Let the client find at its next read that the other side has gone, whatever is still on its way."""
        self._is_abandoned = True

    def flush(self) -> bool:
        """Send what waits, as far as the other side takes it; whether all is sent. Raises OSError."""
        unsent = self._waiting()
        while unsent:
            try:
                # The same bytes again after it would block, as OpenSSL wants it.
                sent = super().send(bytes(unsent[:READ_BYTES]))
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return False
            del unsent[:sent]
        return True

    def close(self) -> None:
        """Close, after a last try to send what waits: a farewell."""
        try:
            self.flush()
        except (OSError, ValueError):
            self._waiting().clear()
        super().close()

    def _waiting(self) -> bytearray:
        """What is written and not sent. Made when it is first needed: `ssl` makes the object without calling us."""
        try:
            return self._unsent
        except AttributeError:
            self._unsent = bytearray()
            return self._unsent
