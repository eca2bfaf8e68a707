"""The HTTPS port: uvicorn inside our own loop, with the client's certificate handed to the application.

uvicorn does not put the peer's certificate into the ASGI scope, so a small subclass of its protocol does, under
`extensions[auth.PEER_CERTIFICATE]`. The TLS layer asks for a certificate, takes none, and refuses a wrong one.

The same subclass bounds a request's head in time and size. uvicorn has no bound on either, so that anybody could hold
connections for ever or fill the memory before being asked who they are; bodies are `bounds.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cloud_hub.ground.auth import PEER_CERTIFICATE
from shared.errors import ConfigError
from shared.limits import KIB

HEAD_S: Final = 20.0
"""From a connection's beginning, or a request's first byte, to the end of its head."""
MAX_HEAD_BYTES: Final = 512 * KIB
"""Above what one read brings, which may hold the end of a body and the next head."""
_GRACE_S: Final = 5
_KEEP_ALIVE_S: Final = 30


class CertifiedProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose scopes carry the client certificate of their connection (DER, or None), and whose heads end."""

    _certificate: bytes | None = None
    _in_head = True
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Remember what the handshake verified."""
        super().connection_made(transport)
        secured = transport.get_extra_info("ssl_object")
        self._certificate = secured.getpeercert(binary_form=True) if secured is not None else None
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a head that goes on for too long ends the connection."""
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()
        elif self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            # These bytes, which may be less than a request line, have ended uvicorn's own wait for the next request.
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def on_message_begin(self) -> None:
        """Hand the certificate on with each request."""
        super().on_message_begin()
        scope: Any = self.scope
        scope["extensions"] = {PEER_CERTIFICATE: self._certificate}

    def on_headers_complete(self) -> None:
        """The head has ended; what follows is the body."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body has ended; what follows is the next head."""
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class HttpsServer(uvicorn.Server):
    """A uvicorn server that leaves signals to the process that owns it.

    Args:
        app: the ASGI application.
        certificate, key, ca: PEM files; client certificates are verified against `ca`.
        ready: set once it accepts requests.
    """

    def __init__(self, app: Any, *, certificate: Path, key: Path, ca: Path, ready: asyncio.Event) -> None:
        config = uvicorn.Config(
            app,
            http=CertifiedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
            ssl_context_factory=lambda _config, _default: self._context,
        )
        super().__init__(config)
        self._ready = ready
        self._certificate, self._key, self._ca = certificate, key, ca
        self._context = _server_context(certificate=certificate, key=key, ca=ca)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take no signal: the composition root has them."""
        yield

    def reload_certificate(self) -> None:
        """Show the certificate that is on disk now to whoever connects from here on; raises ConfigError."""
        try:
            self._context.load_cert_chain(self._certificate, self._key)
            # Adds a second CA. One that is trusted no longer stays here until the next start, and opens nothing: whose
            # certificate it is, is asked of the authorities that are trusted now (`Gate`).
            self._context.load_verify_locations(cafile=self._ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"{self._certificate} cannot be loaded: {error}",
                code="config.certificate",
                hint="restart the hub, which issues what is missing",
            ) from error

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, and say so."""
        await super().startup(sockets=sockets)
        self._ready.set()

    async def run_on(self, listener: socket.socket) -> None:
        """Serve on a bound socket until cancelled; running requests then have a grace to finish."""
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(self.serve(sockets=[listener]))
            try:
                # Shielded: uvicorn ends in order by its flag, and not at all in order when cancelled.
                await asyncio.shield(serving)
            except asyncio.CancelledError:
                self.should_exit = True
                await asyncio.wait([serving], timeout=_GRACE_S + 2)
                raise


def bind(host: str, port: int, *, key: str) -> socket.socket:
    """A listening socket; raises ConfigError that names the port and the configuration key when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise port_error(error, host=host, port=port, key=key) from error
    listener.setblocking(False)
    return listener


def port_error(error: OSError, *, host: str, port: int, key: str) -> ConfigError:
    """The ConfigError for a port that could not be had."""
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port {port} on {host} is taken by another process",
            code="config.port_busy",
            hint=f"stop what listens there (`ss -ltnp 'sport = :{port}'` names it), or set {key} to a free port",
        )
    if error.errno == errno.EACCES:
        return ConfigError(
            f"port {port} on {host} needs more rights",
            code="config.port_denied",
            hint=f"set {key} to a port above 1023",
        )
    return ConfigError(
        f"{host}:{port} cannot be listened on: {error.strerror or error}", code="config.port", hint=f"check {key}"
    )


def _server_context(*, certificate: Path, key: Path, ca: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(cafile=ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context
