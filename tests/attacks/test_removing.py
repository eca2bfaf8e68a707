"""The judge of the tables: what counts as a test that fails without its defence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.attacks.removing import Verdict
from tests.conftest import ROOT

GUARDED = """
import guard

def test_it():
    assert guard.check() != "wrong"
"""
SCRIPT = """
import contextlib, sys, time
import msgspec
from tests.attacks import removing
from tests.attacks.defence import against

removing.MIN_BARE_S = 1

def slow():
    time.sleep(60)

stand_in = {"slow": slow, "wrong": lambda: "wrong", "nothing": lambda: None}[sys.argv[1]]
with contextlib.redirect_stdout(sys.stderr):
    defence = against(1, "test_it.py::test_it", ("guard.check", stand_in), may_hang=sys.argv[2] == "True")
    (verdict,) = removing.run([defence])
print(msgspec.json.encode(verdict).decode())
"""


@pytest.mark.live
@pytest.mark.parametrize(
    ("stand_in", "may_hang", "bare", "holds"),
    [
        ("wrong", False, "failed", True),
        ("nothing", False, "passed", False),
        ("slow", False, "hung", False),
        ("slow", True, "failed", True),
    ],
)
def test_a_test_that_takes_too_long_shows_nothing_unless_it_may_hang(
    tmp_path: Path, stand_in: str, may_hang: bool, bare: str, holds: bool
) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")  # the place may lie below ours, whose settings name other tests
    (tmp_path / "guard.py").write_text("def check():\n    return None\n")
    (tmp_path / "test_it.py").write_text(GUARDED)
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, stand_in, str(may_hang)],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    verdict = msgspec.json.decode(ran.stdout, type=Verdict)
    assert (verdict.bare, verdict.holds) == (bare, holds), ran.stderr[-2000:]
