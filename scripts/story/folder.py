"""Where the demo keeps everything: one folder, cleared at the start, locked while a demo runs."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
"""The project's folder."""


class FolderBusy(Exception):
    """Another demo runs in this folder, or the folder is not a demo's and holds something."""


@dataclass(frozen=True, slots=True)
class Folder:
    """The demo's folder and the places in it; made by `claim`.

    Attributes:
        path: the folder.
        lock: descriptor that holds the lock; it is closed, and so given up, when the process ends.
    """

    path: Path
    lock: int

    @property
    def hub(self) -> Path:
        """The hub's data directory."""
        return self.path / "hub"

    @property
    def offline(self) -> Path:
        """The offline keys: on the operator's machine, never on the hub's."""
        return self.path / "offline-keys"

    @property
    def operator(self) -> Path:
        """Where the operator works: models, samples, signed bundles."""
        return self.path / "operator"

    @property
    def logs(self) -> Path:
        """One log file per process."""
        return self.path / "logs"

    def device(self, name: str) -> Path:
        """A device's state directory; its name is short because Unix socket paths end at 107 bytes."""
        return self.path / "devices" / name

    def environment(self) -> dict[str, str]:
        """What children see of the environment: paths inside the folder, nothing of the developer's shell."""
        home, temporary = self.path / "home", self.path / "tmp"
        return {
            "PATH": os.pathsep.join([str(ROOT / ".venv" / "bin"), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "XDG_CACHE_HOME": str(home / ".cache"),
            "XDG_CONFIG_HOME": str(home / ".config"),
            "OUTRIDER_CONFIG": str(self.operator / "contexts.json"),
            "LANG": "C.UTF-8",
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
        }


def _is_ours(path: Path) -> bool:
    """Whether it is empty, or a demo's: those hold a lock with a process id."""
    if not path.is_dir():
        return False
    held = {entry.name for entry in path.iterdir()}
    if not held - {"lock"}:
        return True
    return "lock" in held and (path / "lock").read_bytes()[:32].strip().isdigit()


def claim(path: Path) -> Folder:
    """Lock the folder and clear it; raises FolderBusy while another demo runs in it, or when no demo has made it."""
    if path.exists() and not _is_ours(path):
        raise FolderBusy(f"{path} is not a demo's folder and would be cleared; name a new or an empty one")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.read(lock, 32).decode().strip() or "unknown"
        os.close(lock)
        raise FolderBusy(f"a demo is running in {path} (process {pid}); end it with Ctrl-C first") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    for entry in path.iterdir():
        if entry.name == "lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    folder = Folder(path=path, lock=lock)
    for place in (folder.operator, folder.logs, path / "devices", path / "home", path / "tmp"):
        place.mkdir(mode=0o700)
    return folder
