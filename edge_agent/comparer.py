"""The comparer: a short-lived child that holds a learned release's file against its base; the core reads neither.

    python -I -m edge_agent.comparer PARENT_PID LEARNED_FD BASE_FD ORDER         ORDER is JSON (Order)

It gets two open descriptors, both hashed by the shelf through the same descriptors, and opens nothing itself. Before it
reads a byte of them it gives up the network, every capability, further files, and all but a bounded share of processor
time and memory; it dies with its parent. What may differ is what the base's signed manifest says (shared/learned.py).
It says how it ended in one line of JSON on standard output (Outcome).
"""

from __future__ import annotations

import mmap
import resource
import signal
import sys
from typing import Final

import msgspec

from edge_agent.host import confine
from shared.errors import InvalidValue, TrustError
from shared.learned import check_learned_file
from shared.limits import MIB
from shared.model import Learning
from shared.release import LEARNED_CODE

NICENESS: Final = 10
CPU_LIMIT_S: Final = 120
WALL_LIMIT_S: Final = 300
"""Longer than the parent's deadline; this one holds if the parent is stopped."""
DATA_LIMIT_BYTES: Final = 256 * MIB
"""Memory of its own beyond the mapped files; the tensors of the head are copied once."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is allowed to differ, and how long both files are."""

    bounds: Learning
    length: int


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How it ended: no code when the file keeps to its bounds, and then how far its head moved."""

    code: str = ""
    message: str = ""
    shift: float = 0.0


def compare(order: Order, *, learned: int, base: int) -> Outcome:
    """Hold one file against the other."""
    try:
        with (
            mmap.mmap(learned, order.length, access=mmap.ACCESS_READ) as theirs,
            mmap.mmap(base, order.length, access=mmap.ACCESS_READ) as ours,
            memoryview(theirs) as learned_view,
            memoryview(ours) as base_view,
        ):
            shift = check_learned_file(
                learned_view, base_view, tensors=order.bounds.tensors, max_shift=order.bounds.max_shift
            )
    except TrustError as error:
        return Outcome(code=error.code, message=error.message)
    except InvalidValue as error:
        return Outcome(code=LEARNED_CODE, message=f"the base does not read: {error.message}")
    except (OSError, ValueError) as error:  # shorter than both should be: the disk lost something
        return Outcome(code="storage.damaged", message=str(error))
    return Outcome(shift=shift)


def limit(*, parent: int) -> None:
    """Give up what a comparison does not need."""
    confine.give_up_rights(parent=parent, niceness=NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT_BYTES, DATA_LIMIT_BYTES))
    # What is open stays open (getrlimit(2)); nothing more can be, but for the copies that mmap makes of the two.
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    signal.alarm(WALL_LIMIT_S)


def main() -> int:
    """Run as a child of the core; returns the exit status."""
    parent, learned, base = (int(argument) for argument in sys.argv[1:4])
    order = msgspec.json.decode(sys.argv[4], type=Order)
    confine.bind_to_parent(parent)
    limit(parent=parent)
    try:
        outcome = compare(order, learned=learned, base=base)
    except MemoryError:
        outcome = Outcome(code="storage.memory", message="the comparison took more memory than it may")
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
