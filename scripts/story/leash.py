"""Runs a command that dies with the process that started it: `leash.py PARENT_PID COMMAND ...`.

The kernel sends the signal when the parent ends, however it ends (prctl(2), PR_SET_PDEATHSIG), so that even `kill -9`
of the demo leaves nothing running. The setting survives exec, which replaces this process by the command.
Standard library only, because it is run with `-I` before anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Put the leash on and become the command; leaves at once when the parent is already gone."""
    parent, command = int(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent:  # it died before the leash was on
        raise SystemExit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
