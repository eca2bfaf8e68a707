"""A process that switches two real models as one is killed before and after every write, and never runs a mixture."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALL_OLD, ALL_NEW = {"a=1.0.0", "b=1.0.0"}, {"a=2.0.0", "b=2.0.0"}
SAVES = (9, -6, 6)
"""Around the switch; a fourth time would be one too many for the releases. Tests of the machine cut everywhere."""

pytestmark = [pytest.mark.live, pytest.mark.timeout(90)]


def live(state: Path, version: str, saves: int) -> tuple[int, list[set[str]]]:
    """One life: its exit code, and which versions answered, in order."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.live._set_agent", str(state), version, str(saves)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode, [set(line.split()) - {"a=-", "b=-"} for line in done.stdout.splitlines()]


def test_attack_34_kills_around_the_switch_of_a_set_end_with_all_new(short_tmp: Path) -> None:
    assert live(short_tmp, "1.0.0", 0)[0] == 0
    kills, seen = 0, []
    for saves in SAVES:
        code, lines = live(short_tmp, "2.0.0", saves)
        seen += lines
        kills += code == -signal.SIGKILL
        if code == 0:
            break
    code, lines = live(short_tmp, "2.0.0", 0)
    assert (code, lines[-1]) == (0, ALL_NEW)
    for versions in [*seen, *lines]:
        assert versions <= ALL_OLD or versions <= ALL_NEW, f"a mixture answered: {versions}"
    assert kills >= 3
