"""Child processes of the core: started bare, watched, reaped without threads or signal handlers, and on file.

Rules: a child gets an empty working directory, an environment of our choice and the descriptors it is given, nothing
else. Its socket's end tells us of its death, so nothing polls while it lives. Its process id and moment of birth are
on file until it is reaped: after a kill -9 of the core, `sweep_orphans` ends what the parent-death signal did not.

Not here: what is said to a child (hosts.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from shared.errors import ModelError

logger = logging.getLogger(__name__)

_FIRST_LOOK_S: Final = 0.001
_EXIT_S: Final = 0.5
_REAP_S: Final = 5.0
_PROC: Final = Path("/proc")
_MODULES: Final = (b"edge_agent.host", b"edge_agent.trainers")
_ENVIRONMENT: Final = {
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
"""All that a child gets: no secret of the core's environment, no thread that the runtime was not given, and one heap
for all threads (mallopt(3)), because each further one keeps memory of its own."""


class Child:
    """A running child process."""

    def __init__(self, *, process: subprocess.Popen[bytes], record: Path, on_gone: Callable[[str], None]) -> None:
        """`on_gone(reason)` is called once, on the event loop, when the child has ended and was reaped."""
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._record = record
        self._on_gone = on_gone
        self._gone: asyncio.Future[str] = self._loop.create_future()
        self._verdict = ""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_gone(self) -> bool:
        """Whether it has ended and was reaped."""
        return self._gone.done()

    def rss_bytes(self) -> int:
        """Its resident size now; 0 once it is gone."""
        try:
            pages = (_PROC / str(self.pid) / "statm").read_text(encoding="ascii").split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def condemn(self, reason: str) -> None:
        """Kill it; the end of its socket does the rest. The first reason stays."""
        if not self._verdict and self._process.poll() is None:
            self._verdict = reason
            self._process.kill()

    def reap(self) -> None:
        """Its socket has ended: collect its exit status, and kill it if it does not exit by itself."""
        self._look(_FIRST_LOOK_S, self._loop.time())

    async def wait(self) -> str:
        """Wait until it is gone; returns why."""
        return await asyncio.shield(self._gone)

    def _look(self, pause_s: float, ended_at: float) -> None:
        if self._gone.done():
            return
        status = self._process.poll()
        waited_s = self._loop.time() - ended_at
        if status is None and waited_s < _REAP_S:
            if waited_s > _EXIT_S:
                self.condemn("it closed its pipe and went on")
            self._loop.call_later(pause_s, self._look, min(pause_s * 2, 0.1), ended_at)
            return
        if status is None:
            logger.error("a killed child process does not go away", extra={"pid": self.pid})
        self._record.unlink(missing_ok=True)
        reason = self._verdict or _describe(status)
        self._gone.set_result(reason)
        self._on_gone(reason)


def sweep_orphans(directory: Path) -> int:
    """End the children of an earlier core that are on file and still run; returns how many there were.

    Call it once, before the first start, with the directory locked against a second agent.
    """
    ended = 0
    for record in directory.glob("[0-9]*"):
        pid = int(record.name)
        try:
            born = record.read_text(encoding="ascii").strip()
            command = (_PROC / record.name / "cmdline").read_bytes()
            is_ours = any(module in command for module in _MODULES)
        except OSError:
            born, is_ours = "", False
        if born and is_ours and _birth(pid) == born:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                ended += 1
                logger.warning("a child process of an earlier run was ended", extra={"pid": pid})
        record.unlink(missing_ok=True)
    return ended


def spawn(
    command: Sequence[str], *, directory: Path, descriptors: Sequence[int], arguments: Sequence[str] = ()
) -> tuple[subprocess.Popen[bytes], socket.socket, Path]:
    """Start `command SOCKET_FD DESCRIPTOR… OUR_PID ARGUMENT…` below `directory`, which is made if it is missing.

    Returns:
        The process, our end of its socket pair, and the file that records it.

    Raises:
        ModelError: with the code `model.host_start`, when the system does not let us.
    """
    empty = directory / "empty"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    passed = (theirs.fileno(), *descriptors)
    with theirs:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            empty.mkdir(mode=0o500, exist_ok=True)
            process = subprocess.Popen(
                [*command, *(str(number) for number in (*passed, os.getpid())), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=empty,
                env=dict(_ENVIRONMENT),
                pass_fds=passed,
            )
        except OSError as error:
            ours.close()
            raise ModelError(
                f"a model host cannot be started: {error}",
                code="model.host_start",
                hint=f"check that {command[0]} runs and that {directory} can be written",
            ) from error
    return process, ours, _put_on_file(directory, process.pid)


def _put_on_file(directory: Path, pid: int) -> Path:
    """Put the child on file with its moment of birth, which a later process of the same number does not share."""
    record = directory / str(pid)
    with contextlib.suppress(OSError):  # a full disk must not keep a model from being served
        record.write_text(f"{_birth(pid)}\n", encoding="ascii")
    return record


def _birth(pid: int) -> str:
    """The process's start in ticks since boot (proc(5), stat, field 22); empty when it is gone or a zombie."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _describe(status: int | None) -> str:
    """An exit status in words: the signal's name, or the number."""
    if status is None:
        return "it does not react to SIGKILL"
    if status < 0:
        try:
            return f"ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"ended by signal {-status}"
    return f"exit status {status}"
