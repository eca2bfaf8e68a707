"""A TLS server for one handshake, to see whether a client takes its certificate for a server's."""

from __future__ import annotations

import socket
import ssl
import threading
from pathlib import Path


def takes_server(client: ssl.SSLContext, certificate: Path, key: Path) -> bool:
    """Whether this client, names aside, takes who shows this certificate; a refusal must be for its purpose."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client.check_hostname = False
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            raw, _ = listener.accept()
            with raw:
                try:
                    server.wrap_socket(raw, server_side=True).close()
                except (ssl.SSLError, OSError):
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as raw,
                client.wrap_socket(raw, server_hostname="localhost"),
            ):
                return True
        except ssl.SSLCertVerificationError as error:
            assert "purpose" in error.verify_message
            return False
        finally:
            thread.join(20)
