"""The vocabulary of results: closed, complete for what the slots say, and read by rollouts as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shared.results import RESULTS, Blame, blame

CORE = Path(__file__).resolve().parents[3] / "edge_agent" / "core"


@pytest.mark.parametrize(
    ("code", "whom"),
    [
        ("model.golden", Blame.RELEASE),
        ("model.something_new", Blame.RELEASE),
        ("transfer.timeout", Blame.ELSEWHERE),
        ("set.member_failed", Blame.ELSEWHERE),
        ("operator.rollback", Blame.PERSON),
        ("operator", Blame.UNKNOWN),
        ("quantum.flux", Blame.UNKNOWN),
        ("transferred", Blame.UNKNOWN),
    ],
)
def test_a_result_counts_against_someone(code: str, whom: Blame) -> None:
    assert blame(code) is whom


def test_every_code_that_the_slots_say_is_a_word_of_the_vocabulary() -> None:
    said: set[str] = set()
    for name in ("slot_steps.py", "slot_moves.py", "set_steps.py", "sets.py", "offering.py"):
        text = (CORE / name).read_text(encoding="utf-8")
        said |= set(
            re.findall(r'"((?:set|operator|model)\.[a-z_]+|release\.(?:loads|loops|silent|quarantined))"', text)
        )
    assert said
    assert said <= set(RESULTS)
