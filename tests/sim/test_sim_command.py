"""The command says which seed failed, how, and how to see it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.sim.command import main


def test_clean_seeds_end_with_zero_and_leave_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert main(["--seeds", "0..5", "--profile", "calm", "--json", str(report)]) == 0
    assert "5 seeds of calm, 0 failed" in capsys.readouterr().out
    document = json.loads(report.read_text())
    assert document["seeds"] == 5
    assert document["failed"] == []
    assert document["figures"]["records"] == document["figures"]["effects"] > 0


def test_a_failing_seed_ends_with_one_and_says_how_to_see_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    wanted = ["--seeds", "0..50", "--profile", "power", "--fault", "tail_not_read", "--json", str(report)]
    assert main(wanted) == 1
    said = capsys.readouterr().out
    (failed,) = json.loads(report.read_text())["failed"]
    assert failed["profile"] == "power"
    assert f"seed {failed['seed']} of power" in said
    assert failed["replay"] in said
    words = failed["replay"].split()
    assert words[:3] == ["python", "-m", "tests.sim"]
    assert main(words[3:]) == 1
    again = capsys.readouterr().out
    assert failed["violation"] in again
    assert "loses its power" in again, "the trace tells what happened"


def test_several_failures_are_told_when_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "0..20", "--profile", "crashes", "--fault", "epoch_anew", "--most", "3"]) == 1
    assert "3 failed" in capsys.readouterr().out


def test_only_the_aftermath_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--seeds", "0..20", "--profile", "power", "--fault", "no_sync"]
    assert main(wanted) == 1
    assert "undurable" in capsys.readouterr().out
    assert main([*wanted, "--aftermath"]) == 1
    assert "undurable" not in capsys.readouterr().out, "without looking at the disk, its consequences are noticed"


@pytest.mark.parametrize("seeds", ["", "a..b", "9..3", "-"])
def test_what_is_no_range_of_seeds_is_refused(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([f"--seeds={seeds}"])
    assert ended.value.code == 2
    assert "seed" in capsys.readouterr().err
