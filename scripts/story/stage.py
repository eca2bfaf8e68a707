"""Processes of the story: started on a leash, with a log file each, stopped or killed when the story says so."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .folder import ROOT, Folder
from .telling import NotTrue, until

LEASH: Final = Path(__file__).resolve().parent / "leash.py"
COMMAND_S: Final = 60.0
STOP_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended."""

    status: int
    out: str
    err: str


class Stage:
    """Starts commands and long-lived processes in the demo's folder; ends all of them at the end.

    Processes are started from the main thread only: the kernel ties the leash to the thread that starts them.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: str, status: int | None = 0, seconds: float = COMMAND_S) -> Ran:
        """Run one of the product's commands to its end; raises NotTrue unless it ends with this status (None: any)."""
        try:
            done = subprocess.run(
                self._leashed(command),
                cwd=self.folder.operator,
                env=self.folder.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise NotTrue(f"`{' '.join(command)}` did not end within {seconds:.0f} s") from error
        if status is not None and done.returncode != status:
            said = (done.stderr or done.stdout).strip()
            raise NotTrue(f"`{' '.join(command)}` ended with {done.returncode}, expected {status}:\n{said}")
        return Ran(status=done.returncode, out=done.stdout, err=done.stderr)

    def start(self, name: str, *command: str) -> int:
        """Start a long-lived process under a name and return its process id; its output is appended to its log."""
        with (self.folder.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                self._leashed(command),
                cwd=self.folder.path,
                env=self.folder.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running[name] = process
        return process.pid

    def alive(self, name: str) -> bool:
        """Whether the process still runs."""
        process = self._running.get(name)
        return process is not None and process.poll() is None

    def kill(self, name: str) -> None:
        """kill -9, and wait until it is gone."""
        process = self._running.pop(name)
        process.kill()
        process.wait(STOP_S)

    def stop(self, name: str) -> int | None:
        """Ask it to end (SIGTERM), kill it when it does not; returns its exit code, None where it had to be killed."""
        process = self._running.pop(name)
        process.terminate()
        try:
            return process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)
            return None

    def stop_all(self) -> None:
        """End everything, newest first; first ask all, so that they stop side by side."""
        for process in self._running.values():
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in reversed(self._running.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait(STOP_S)
        self._running.clear()

    def _leashed(self, command: Sequence[str]) -> list[str]:
        program = ROOT / ".venv" / "bin" / command[0]
        return [sys.executable, "-I", str(LEASH), str(os.getpid()), str(program), *command[1:]]


def free_ports(count: int) -> list[int]:
    """Loopback ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def is_gone(pid: int) -> bool:
    """Whether no such process runs; a zombie that nobody reaped counts as gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def children(pid: int) -> dict[int, str]:
    """Running children of a process: process id and command line."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (OSError, IndexError, ValueError):
            continue
        if parent == pid and not is_gone(int(entry.name)):
            found[int(entry.name)] = command
    return found


def kill_pid(pid: int) -> None:
    """kill -9 a process that is not a child of ours."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_gone(what: str, pid: int, *, seconds: float = 5.0) -> None:
    """Wait until the process is gone; raises NotTrue when it stays."""
    until(f"{what} (process {pid}) is gone", lambda: is_gone(pid), seconds=seconds)
