"""A real mosquitto for tests, with mutual TLS 1.3 and topics confined to the certificate's name."""

from __future__ import annotations

import getpass
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path

from shared.wire.topics import acl_patterns
from tests.fakes.pki import Pair, TestCa


class Mosquitto:
    """The broker as a child process; a context manager that leaves nothing running."""

    def __init__(
        self, folder: Path, *, binary: str, port: int, ca: TestCa, options: str = "", pair: Pair | None = None
    ) -> None:
        """`options` are further lines of its configuration, `pair` its own certificate if not a good one."""
        self.port = port
        self.ca = ca
        self._binary = binary
        self._config = folder / "mosquitto.conf"
        self._process: subprocess.Popen[bytes] | None = None
        self._probe = ca.client("probe")
        server = pair or ca.server("broker")
        write, read = acl_patterns()
        (folder / "acl").write_text(
            f"user hub\ntopic readwrite outrider/#\n\npattern write {write}\npattern read {read}\n"
        )
        self._config.write_text(
            f"listener {port} 127.0.0.1\ncafile {ca.path}\ncertfile {server.certificate}\nkeyfile {server.key}\n"
            "tls_version tlsv1.3\nrequire_certificate true\nuse_identity_as_username true\n"
            "use_username_as_clientid true\nallow_anonymous false\n"
            f"acl_file {folder / 'acl'}\nuser {getpass.getuser()}\nset_tcp_nodelay true\n"
            f"max_packet_size 262144\npersistence false\nlog_dest stdout\n{options}"
        )

    def __enter__(self) -> Mosquitto:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it and wait until it takes TLS connections."""
        self._process = subprocess.Popen([self._binary, "-c", str(self._config)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            assert self._process.poll() is None, "mosquitto ended at once"
            assert time.monotonic() < deadline, "mosquitto did not come up"
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Stop it from doing anything while its sockets stay open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _answers(self) -> bool:
        probe = context(self.ca, self._probe)
        # One whose certificate has the wrong dates is up all the same (X509_V_FLAG_NO_CHECK_TIME).
        probe.verify_flags = ssl.VerifyFlags(probe.verify_flags | 0x200000)
        try:
            with (
                socket.create_connection(("127.0.0.1", self.port), timeout=1) as plain,
                probe.wrap_socket(plain, server_hostname="localhost"),
            ):
                return True
        except OSError:
            return False


def context(ca: TestCa, pair: Pair) -> ssl.SSLContext:
    """A client's TLS context."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.load_verify_locations(cafile=ca.path)
    made.load_cert_chain(pair.certificate, pair.key)
    return made
