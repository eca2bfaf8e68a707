"""What every test gets: a clean environment, short paths for sockets, free ports, and no process left behind."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.fakes import postgres as postgres_server

ROOT = Path(__file__).resolve().parent.parent
BROKER_PLACES = (os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
PR_SET_CHILD_SUBREAPER = 36

settings.register_profile(
    "house",
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=100,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", settings.get_profile("house"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "house"))


@pytest.fixture(autouse=True)
def clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the developer's shell says about Outrider reaches a test."""
    for name in [name for name in os.environ if name.startswith("OUTRIDER_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def mosquitto_path() -> str:
    """The broker's binary; the test is skipped where there is none."""
    found = shutil.which("mosquitto", path=os.pathsep.join(BROKER_PLACES))
    if found is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    return found


@pytest.fixture(scope="session")
def postgres() -> Iterator[postgres_server.Postgres]:
    """A PostgreSQL of the session's own; the test is skipped where it or its driver is not installed."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'outrider[postgres]'")
    binaries = postgres_server.find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with postgres_server.running(binaries) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: postgres_server.Postgres) -> str:
    """SQLAlchemy's URL of an empty database."""
    return postgres.database()


@pytest.fixture
def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A private directory with a path short enough for Unix sockets (their names end at 107 bytes)."""
    path = Path(tempfile.mkdtemp(prefix="or-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Adopt orphans, so that a grandchild whose parent was killed is found at the end."""
    if hasattr(ctypes, "CDLL") and os.uname().sysname == "Linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the session when a process that it started is still alive, name it and end it."""
    deadline = time.monotonic() + 2.0
    while (left := living_children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid, command in left:
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"LEFT BEHIND: process {pid}: {command}", red=True)
        os.kill(pid, signal.SIGKILL)
    if left and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def living_children() -> list[tuple[int, str]]:
    """Children of this process that are not zombies, with their command lines; empty where there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if int(after_name[1]) == os.getpid() and after_name[0] not in "ZX":
            found.append((int(entry.name), command))
    return found
