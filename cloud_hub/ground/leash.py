"""Starts a program that dies with its parent: `python -I -S leash.py PARENT PROGRAM ARGUMENT…`.

Asks the kernel for SIGKILL at the parent's death, makes sure that the parent is still there, and becomes the program.
On systems without parent-death signals the program is started all the same. Standard library only, run as a file.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Bind to the parent, then exec."""
    parent, program, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(parent):
        # It died before the kernel knew that we care.
        sys.exit(1)
    os.execv(program, [program, *arguments])  # noqa: S606 - an argument list needs no shell


if __name__ == "__main__":
    main()
