"""The patcher: a short-lived child that makes a file from another and a patch, so that the core reads no patch.

    python -I -m edge_agent.patcher PARENT_PID BASE_FD PATCH_FD OUTPUT_FD TERMS       TERMS is JSON (Order)

It gets three open descriptors and opens nothing itself: the base and the patch, both hashed by the shelf through the
same descriptors, and an empty unfinished file. Before it reads a byte of them it gives up the network, every
capability, further files, and all but a bounded share of processor time and memory; it dies with its parent. It says
how it ended in one line of JSON on standard output (Outcome). The only process of the agent that reads patches.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import Final

import msgspec

from edge_agent.host import confine
from shared.errors import PatchFailed
from shared.limits import MIB
from shared.patch.format import Terms

NICENESS: Final = 10
CPU_LIMIT_S: Final = 300
WALL_LIMIT_S: Final = 900
"""Longer than the parent's deadline; this one holds if the parent is stopped."""
DATA_LIMIT_BYTES: Final = 160 * MIB
"""Memory of its own beyond what libraries have mapped at the start; a patch needs some 12 MiB of it."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be made: the files, and the patch's length."""

    terms: Terms
    patch_length: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How it ended: no code when the result was written.

    Attributes:
        peak_bytes: the most memory that the process held.
    """

    code: str = ""
    message: str = ""
    peak_bytes: int = 0


def make(order: Order, *, base: int, patch: int, output: int) -> None:
    """Write the result to its descriptor; raises PatchFailed, or OSError when the disk refuses."""
    from shared.patch import applying

    def write(data: memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(output, view) :]

    applying.apply(
        patch=lambda at, count: os.pread(patch, count, at),
        patch_length=order.patch_length,
        base=lambda at, count: os.pread(base, count, at),
        write=write,
        terms=order.terms,
    )


def limit(*, parent: int, output_bytes: int) -> None:
    """Give up what applying a patch does not need."""
    confine.give_up_rights(parent=parent, niceness=NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT_BYTES, DATA_LIMIT_BYTES))
    # The kernel itself stops a result that grows beyond what was signed; Python hears of it as EFBIG.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (output_bytes, output_bytes))
    # What is open stays open (getrlimit(2)); nothing more can be.
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    signal.alarm(WALL_LIMIT_S)


def main() -> int:
    """Run as a child of the core; returns the exit status."""
    parent, base, patch, output = (int(argument) for argument in sys.argv[1:5])
    order = msgspec.json.decode(sys.argv[5], type=Order)
    confine.bind_to_parent(parent)
    # Loaded before the limits, because loading reads files and maps a good deal of memory once.
    import shared.patch.applying  # noqa: F401

    status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    limit(parent=parent, output_bytes=order.terms.result_length)
    code, message = "", ""
    try:
        make(order, base=base, patch=patch, output=output)
    except PatchFailed as error:
        code, message = error.code, error.message
    except OSError as error:
        code, message = f"errno.{error.errno}", error.strerror or ""
    except MemoryError:
        code, message = "transfer.patch.memory", "the patch took more memory than a patch may"
    outcome = Outcome(code=code, message=message, peak_bytes=peak_bytes(status))
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    return 0


def peak_bytes(status: int) -> int:
    """The most memory that the process held since it began, by an open `/proc/self/status` (VmHWM, proc(5)).

    Not from getrusage(2): its figure counts what the parent held when it made this process.
    """
    for line in os.pread(status, 8192, 0).splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
