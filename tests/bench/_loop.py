"""A block device of our own, so that what reaches it can be counted: a loop device with ext4. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

SECTOR_BYTES = 512
_WRITTEN = 6
"""Sectors written, among the fields of /sys/block/…/stat (kernel documentation, block/stat)."""


class NoLoop(Exception):
    """There is none to be had here; says why."""


@contextlib.contextmanager
def loop_device(folder: Path, *, megabytes: int) -> Iterator[tuple[Path, Callable[[], int]]]:
    """Where it is mounted, and how many bytes were written to it so far; raises NoLoop.

    It is given back whatever happens.
    """
    image, mounted = folder / "image", folder / "mounted"
    if os.geteuid() != 0:
        raise NoLoop("a loop device needs root")
    with contextlib.ExitStack() as stack, image.open("wb") as file:
        file.truncate(megabytes * 1024 * 1024)
        device = _done("losetup", "--find", "--show", str(image)).strip()
        stack.callback(_done, "losetup", "--detach", device)
        # Blocks as large file systems have them; a small one would get smaller ones.
        _done("mkfs.ext4", "-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        mounted.mkdir()
        _done("mount", device, str(mounted))
        stack.callback(_done, "umount", str(mounted))

        def written() -> int:
            os.sync()
            fields = Path(f"/sys/block/{Path(device).name}/stat").read_text("ascii").split()
            return int(fields[_WRITTEN]) * SECTOR_BYTES

        yield mounted, written


def _done(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except FileNotFoundError as error:
        raise NoLoop(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise NoLoop(f"{' '.join(command)}: {error.stderr.strip()}") from error
