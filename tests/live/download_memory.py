"""How much memory the agent's core takes while it downloads a large file, above what it takes at rest.

    python -m tests.live.download_memory [--mib 200] [--daily-mib 0]

The file comes over TLS from a server in this process, goes onto a shelf and is hashed twice. What is read is the
resident size of the agent's process and of its children, every 10 ms (`/proc/PID/smaps_rollup`, `Rss`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from shared.limits import MIB
from tests.fakes.https import HttpsServer, Request
from tests.fakes.pki import TestCa

_BLOCK = os.urandom(MIB)


@dataclass(frozen=True)
class Measured:
    """Resident bytes at rest and at the highest, and how long the download and the two hashes took."""

    idle_bytes: int
    peak_bytes: int
    seconds: float

    @property
    def above_bytes(self) -> int:
        return self.peak_bytes - self.idle_bytes


def resident_bytes(pid: int) -> int:
    """Of this process and everything below it."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text("ascii").splitlines():
        if line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    return total + sum(resident_bytes(int(child)) for child in children)


def _pieces(first: int, last: int) -> Iterator[bytes]:
    """Bytes of the file from `first` to `last`, of which every block is the same."""
    while first <= last:
        start = first % MIB
        piece = _BLOCK[start : start + last - first + 1]
        yield piece
        first += len(piece)


def measure(folder: Path, *, mib: int, daily_mib: int = 0) -> Measured:
    """Download a file of that size with a fresh agent's core in this folder."""
    length = mib * MIB
    digest = hashlib.sha256()
    for _ in range(mib):
        digest.update(_BLOCK)
    ca = TestCa(folder)
    pair = ca.client("dev-a")

    def serve(request: Request, handler: BaseHTTPRequestHandler) -> None:
        first, last = 0, length - 1
        wanted = request.headers.get("Range", "")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(start), int(end or last)
        handler.send_response(206 if wanted else 200)
        handler.send_header("Content-Length", str(last - first + 1))
        if wanted:
            handler.send_header("Content-Range", f"bytes {first}-{last}/{length}")
        handler.end_headers()
        for piece in _pieces(first, last):
            handler.wfile.write(piece)

    with HttpsServer(ca, serve, needs_client=True) as server:
        arguments = [folder, server.url, ca.path, pair.certificate, pair.key, length, digest.hexdigest()]
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.live._download_child", *map(str, arguments), str(daily_mib * MIB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # as the daemon is started
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"idle\n"
            idle = peak = resident_bytes(child.pid)
            begun = time.monotonic()
            child.stdin.write(b"\n")
            child.stdin.flush()
            os.set_blocking(child.stdout.fileno(), False)
            while not (said := child.stdout.readline()):
                assert child.poll() is None, "the agent's core has ended"
                peak = max(peak, resident_bytes(child.pid))
                time.sleep(0.01)
            assert said == b"done\n"
            return Measured(idle_bytes=idle, peak_bytes=peak, seconds=time.monotonic() - begun)
        finally:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()


def main() -> None:
    """Measure once and say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--daily-mib", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), mib=args.mib, daily_mib=args.daily_mib)
    print(
        f"{args.mib} MiB in {found.seconds:.1f} s: {found.idle_bytes / MIB:.1f} MiB at rest, "
        f"{found.peak_bytes / MIB:.1f} MiB at the highest, {found.above_bytes / MIB:.1f} MiB above"
    )


if __name__ == "__main__":
    main()
