"""One agent per state directory: an advisory lock on `agent.lock` that the kernel gives back when its holder dies.

The file also holds the owner's process id, for people and for the message of the one who comes second. The file is
never removed: removing a locked file would let two owners lock two different files of the same name.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from shared.errors import Conflict, StorageError

LOCK_NAME = "agent.lock"


class AgentLock:
    """Holds the state directory for this process, as a context manager."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / LOCK_NAME
        self._fd = -1

    def __enter__(self) -> AgentLock:
        """Take the lock at once; raises Conflict naming the owner, or StorageError when the file cannot be made."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StorageError(
                f"cannot open {self._path}: {error.strerror}",
                code="storage.state_dir",
                hint="run `outrider-agent init` as the user that runs the agent, or choose another --state",
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise Conflict(
                f"another agent (process {owner}) uses {self._path.parent}",
                code="conflict.running",
                hint=f"stop it (`kill {owner}`), or give this one another directory with --state",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def owner_pid(state_dir: Path) -> int | None:
    """The process id of the agent that runs on this directory now, or None; takes no lock that outlives the call."""
    try:
        fd = os.open(state_dir / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(fd)
    return None
