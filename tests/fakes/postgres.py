"""A throw-away PostgreSQL in a folder, on a Unix socket and on loopback; without fsync, and ended with the tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START_S = 60


class Postgres:
    """A running server; `database` makes an empty database and says how it is reached."""

    def __init__(self, folder: Path, port: int, user: str, binaries: Path) -> None:
        self._folder = folder
        self._port = port
        self._user = user
        self._binaries = binaries
        self._made = 0

    def database(self, *, over_tcp: bool = False) -> str:
        """SQLAlchemy's URL of a new, empty database."""
        self._made += 1
        name = f"hub_{self._made}"
        _run(
            [str(self._binaries / "createdb"), "-h", str(self._folder), "-p", str(self._port), "-U", "hub", name],
            user=self._user,
        )
        if over_tcp:
            return f"postgresql+psycopg://hub@127.0.0.1:{self._port}/{name}"
        return f"postgresql+psycopg://hub@/{name}?host={self._folder}&port={self._port}"


def find_binaries() -> Path | None:
    """Where initdb and its kin are: Debian keeps them out of the PATH. None when PostgreSQL is not installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return places[-1].parent if places else None


@contextlib.contextmanager
def running(binaries: Path) -> Iterator[Postgres]:
    """A server for as long as the context lasts."""
    user = _server_user()
    # Short: a Unix socket's name ends at 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="or-pg-", dir="/tmp"))
    try:
        if user != _me():
            shutil.chown(folder, user)
        data = folder / "data"
        port = _free_port()
        _run([str(binaries / "initdb"), "-D", str(data), "-U", "hub", "-A", "trust", "-E", "UTF8", "-N"], user=user)
        with (data / "postgresql.conf").open("a") as file:
            file.write(
                f"listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{folder}'\nfsync = off\n"
            )
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                # It does not outlive the tests, however they end.
                [*_leash(), str(binaries / "postgres"), "-D", str(data)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                **_as_user(user),
            )
        try:
            _await(server, folder, port, binaries)
            yield Postgres(folder, port, user, binaries)
        finally:
            # Immediate shutdown: nothing in it is worth a checkpoint.
            server.send_signal(signal.SIGQUIT)
            server.wait(START_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _server_user() -> str:
    """Who runs it: PostgreSQL refuses to be started by root."""
    if os.geteuid() != 0:
        return _me()
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def _me() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _leash() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "QUIT", "--"]


def _await(server: subprocess.Popen[bytes], folder: Path, port: int, binaries: Path) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        ready = subprocess.run(
            [str(binaries / "pg_isready"), "-q", "-h", str(folder), "-p", str(port)],
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=START_S,
        )
        if ready.returncode == 0:
            return
        time.sleep(0.05)
    raise RuntimeError(f"PostgreSQL does not start: {(folder / 'log').read_text(errors='replace')[-2000:]}")


def _as_user(user: str) -> dict[str, Any]:
    """How subprocess starts something as this user."""
    entry = pwd.getpwnam(user)
    return {} if user == _me() else {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _run(command: list[str], *, user: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=2 * START_S,
        cwd="/",
        check=False,
        **_as_user(user),
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stdout.decode(errors='replace')[-2000:]}")
