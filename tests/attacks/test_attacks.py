"""Each defence is taken out in turn, and its test must then fail (tests/attacks/table.py); the page lists every row."""

from __future__ import annotations

import re
import subprocess
import sys

import msgspec
import pytest

from tests.attacks.removing import Verdict
from tests.attacks.table import DEFENCES, ELSEWHERE
from tests.conftest import ROOT

ROWS = 36


@pytest.fixture(scope="session")
def verdicts() -> list[Verdict]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.attacks"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    found = [msgspec.json.decode(line, type=Verdict) for line in ran.stdout.splitlines()]
    assert len(found) == len(DEFENCES), ran.stderr[-4000:]
    return found


@pytest.mark.parametrize("index", range(len(DEFENCES)), ids=[f"{d.row}-{d.test.split('::')[-1]}" for d in DEFENCES])
def test_the_attack_succeeds_without_its_defence(verdicts: list[Verdict], index: int) -> None:
    verdict = verdicts[index]
    if verdict.guarded == "skipped":
        pytest.skip("its test skips here")
    assert verdict.guarded == "passed"
    assert verdict.bare == "failed", f"{verdict.test} passes without {verdict.removed}: it shows nothing"


def test_every_attack_has_a_test_or_a_reason() -> None:
    tested = {defence.row for defence in DEFENCES}
    assert tested | set(ELSEWHERE) == set(range(1, ROWS + 1))
    assert not tested & set(ELSEWHERE)


def test_the_page_lists_every_attack() -> None:
    page = (ROOT / "docs" / "attacks.md").read_text()
    assert [int(row) for row in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == list(range(1, ROWS + 1))
