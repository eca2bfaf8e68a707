"""The patch child: makes one patch and measures what the whole file would take; its own process, niced, with limits.

    python -I -m cloud_hub.releases.patch_job        in a folder of its own, with a Job as JSON on standard input

It leaves `patch` and `report.json` (Report) in the folder. Both files are mapped, not read, so that their pages can go
when memory is needed.
"""

from __future__ import annotations

import ctypes
import lzma
import mmap
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from shared.limits import MIB

MODULE: Final = "cloud_hub.releases.patch_job"
PATCH_FILE: Final = "patch"
REPORT_FILE: Final = "report.json"
MAX_REPORT_BYTES: Final = 4096
_MAX_JOB_BYTES: Final = 64 * 1024
_PR_SET_PDEATHSIG: Final = 1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A patch to make.

    Attributes:
        parent: process id of the hub; the child ends when it is not its parent any more.
        base, result: files to read.
        cpu_s: processor seconds after which the kernel ends the child.
        memory_bytes: what it may hold of its own, beside the mapped files.
    """

    parent: int
    base: str
    result: str
    cpu_s: int
    memory_bytes: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured: bytes of the patch, and of the whole file compressed with lzma."""

    length: int
    full_packed: int


def main() -> int:
    """Entry of the child."""
    from shared.patch.making import make

    job = msgspec.json.decode(sys.stdin.buffer.read(_MAX_JOB_BYTES), type=Job)
    _confine(job)
    with _mapped(job.base) as base, _mapped(job.result) as result:
        patch = make(base, result)
        full_packed = packed_length(result)
    Path(PATCH_FILE).write_bytes(patch)
    Path(REPORT_FILE).write_bytes(msgspec.json.encode(Report(length=len(patch), full_packed=full_packed)))
    return 0


def packed_length(data: mmap.mmap | bytes) -> int:
    """Bytes that a file takes when lzma compresses it, without holding either."""
    packer = lzma.LZMACompressor(preset=6)
    view = memoryview(data)
    try:
        total = sum(len(packer.compress(view[at : at + MIB])) for at in range(0, len(view), MIB))
    finally:
        view.release()
    return total + len(packer.flush())


@contextmanager
def _mapped(path: str) -> Iterator[mmap.mmap]:
    with Path(path).open("rb") as file:
        # Left to the end of the process: arrays over it may still be held by a traceback.
        yield mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _confine(job: Job) -> None:
    os.nice(15)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (job.cpu_s, job.cpu_s + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (job.memory_bytes, job.memory_bytes))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != job.parent:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main())
