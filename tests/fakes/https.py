"""An HTTPS server in a thread whose behaviour a test scripts: real sockets, real TLS, no waiting for ports."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.fakes.pki import Pair, TestCa


@dataclass(frozen=True, slots=True)
class Request:
    """What came in; `peer` is the common name of the client's certificate, empty without one."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    peer: str


Reply = Callable[[Request, BaseHTTPRequestHandler], None]


class HttpsServer:
    """Serves until closed; `requests` holds everything that came in."""

    def __init__(self, ca: TestCa, reply: Reply, *, pair: Pair | None = None, needs_client: bool = False) -> None:
        self.requests: list[Request] = []
        server = pair or ca.server("https")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server.certificate, server.key)
        context.load_verify_locations(cafile=ca.path)
        context.verify_mode = ssl.CERT_REQUIRED if needs_client else ssl.CERT_OPTIONAL
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are written one after the other

            def setup(self) -> None:
                self.request = context.wrap_socket(self.request, server_side=True)
                super().setup()

            def finish(self) -> None:
                try:
                    super().finish()
                finally:
                    self.request.close()  # the server only knows the plain socket below it

            def do_GET(self) -> None:
                certificate = self.request.getpeercert() or {}
                names = dict(item for group in certificate.get("subject", ()) for item in group)
                request = Request(
                    method=self.command,
                    path=self.path,
                    headers=dict(self.headers.items()),
                    body=self.rfile.read(int(self.headers.get("Content-Length", "0"))),
                    peer=names.get("commonName", ""),
                )
                outer.requests.append(request)
                self.close_connection = True
                reply(request, self)

            do_POST = do_PUT = do_GET

            def log_message(self, *_: object) -> None:
                """Nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that goes away in the middle is what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> HttpsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def answer(
    handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", *, headers: dict[str, str] | None = None
) -> None:
    """A whole response."""
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
