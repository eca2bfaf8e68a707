"""`python -m tests.sim`: run seeds; see tests/sim/command.py."""

from __future__ import annotations

import sys

from tests.sim.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
