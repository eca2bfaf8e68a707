"""The steps of `scripts/check`, each named, timed, and quiet unless it fails. All run even when one fails."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STEPS: dict[str, list[str]] = {
    "format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "lint": [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
    "shell": ["bash", "-n", "scripts/setup.sh", "scripts/test", "scripts/check", "scripts/bench", "scripts/lock"],
    "types": [sys.executable, "-m", "mypy"],
    "contracts": [str(BIN / "lint-imports"), "--no-logo", "--no-cache"],
    "house": [sys.executable, "-m", "pytest", "-q", "tests/house"],
}


def main(names: list[str]) -> int:
    """Run the named steps, or all; 0 when every one passed, 2 for a name that does not exist."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        print(f"check: unknown step {unknown[0]!r}; there are {', '.join(STEPS)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or STEPS:
        begun = time.perf_counter()
        done = subprocess.run(STEPS[name], cwd=ROOT, capture_output=True, text=True, check=False)
        verdict = "ok" if done.returncode == 0 else "FAILED"
        print(f"check: {name:9} {verdict:6} {time.perf_counter() - begun:6.1f} s", flush=True)
        if done.returncode != 0:
            failed.append(name)
            print(done.stdout + done.stderr, flush=True)
    if failed:
        print(f"check: failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
