"""`python -m tests.attacks [ROW …]`."""

from __future__ import annotations

import contextlib
import sys

import msgspec

from tests.attacks.removing import run
from tests.attacks.table import DEFENCES


def main() -> int:
    """Print a verdict for each defence of the rows that were named, or of all; 1 when one does not hold."""
    rows = {int(argument) for argument in sys.argv[1:]}
    with contextlib.redirect_stdout(sys.stderr):
        verdicts = run([defence for defence in DEFENCES if not rows or defence.row in rows])
    for verdict in verdicts:
        print(msgspec.json.encode(verdict).decode())
    return 0 if all(verdict.holds for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
