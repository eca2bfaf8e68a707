"""A small HTTPS server that answers what a test tells it to; the other side of the operators' command line."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cloud_hub.ground.ca import Authority, make_ca


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came in."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes


Reply = tuple[int, Any]
"""Status and body: bytes as they are, everything else as JSON."""


@dataclass(slots=True)
class SmallHub:
    """The server's address, its CA, what it answers by (method, path), what was uploaded, and what it was asked."""

    url: str
    ca_pem: str
    answers: dict[tuple[str, str], Reply | Callable[[Asked], Reply]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def reply(self, asked: Asked) -> Reply:
        """What to answer; 404 as a problem document where the test said nothing."""
        self.asked.append(asked)
        answer = self.answers.get((asked.method, asked.path))
        if answer is None and asked.method == "PUT" and asked.path.startswith("/v1/blobs/"):
            self.uploads[asked.path.removeprefix("/v1/blobs/")] = asked.body
            return 201, {}
        if answer is None:
            return 404, {"title": "Not Found", "detail": f"no {asked.path}", "code": "not_found.route"}
        return answer(asked) if callable(answer) else answer


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[SmallHub]:
    """Run a hub on loopback for the time of a test."""
    now_ms = time.time_ns() // 1_000_000
    pair = make_ca(now_ms=now_ms, label="test", days=1)
    server_pair = Authority(pair.certificate_pem, pair.key_pem).issue_server(["127.0.0.1"], now_ms=now_ms, days=1)
    (folder / "server.pem").write_bytes(server_pair.certificate_pem)
    (folder / "server.key").write_bytes(server_pair.key_pem)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "server.pem", folder / "server.key")
    hub = SmallHub(url="", ca_pem=pair.certificate_pem.decode())

    class Speaker(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            return

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = urlsplit(self.path)
            asked = Asked(self.command, parts.path, parts.query, dict(self.headers.items()), body)
            status, answer = hub.reply(asked)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                with contextlib.suppress(OSError):  # the client may have read enough
                    self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Speaker)
    server.handle_error = lambda *_arguments: None  # type: ignore[method-assign]
    server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    hub.url = f"https://127.0.0.1:{server.server_address[1]}"
    hub.answers[("GET", "/v1/ca")] = (200, hub.ca_pem.encode())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
