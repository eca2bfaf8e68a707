"""Each defence is taken out in turn, and its test must then fail (tests/attacks/tables); the page lists them."""

from __future__ import annotations

import re
import subprocess
import sys

import msgspec
import pytest

from tests.attacks.removing import Verdict
from tests.attacks.table import DEFENCES
from tests.conftest import ROOT

ROWS = 36
PAGE = ROOT / "docs" / "attacks.md"


@pytest.fixture(scope="module")
def verdicts() -> list[Verdict]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.attacks"], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    found = [msgspec.json.decode(line, type=Verdict) for line in ran.stdout.splitlines()]
    assert len(found) == len(DEFENCES), ran.stderr[-4000:]
    return found


@pytest.mark.live
@pytest.mark.timeout(300)  # the first of them waits for all: some 250 runs of tests
@pytest.mark.parametrize("index", range(len(DEFENCES)), ids=[f"{d.row}-{d.test.split('::')[-1]}" for d in DEFENCES])
def test_the_attack_succeeds_without_its_defence(verdicts: list[Verdict], index: int) -> None:
    verdict = verdicts[index]
    if verdict.guarded == "skipped":
        pytest.skip("its test skips here")
    assert verdict.guarded == "passed", f"{verdict.test}: {verdict.why}"
    assert verdict.bare == "failed", f"{verdict.test} is {verdict.bare} without {verdict.removed}: it shows nothing"


def test_every_attack_has_a_test() -> None:
    assert {defence.row for defence in DEFENCES} == set(range(1, ROWS + 1))


def test_the_page_lists_every_attack_and_every_test_of_it() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE))
    assert [int(row) for row in rows] == list(range(1, ROWS + 1))
    for defence in DEFENCES:
        file = defence.test.split("::")[0].removeprefix("tests/")
        assert f"`{file}`" in rows[str(defence.row)], f"row {defence.row} does not name {file}"
