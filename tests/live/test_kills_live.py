"""Agent, hub and broker are killed with -9 at random moments: every confirmed record is at the hub once, in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.kills import play

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


def test_nothing_confirmed_is_lost_or_counted_twice(short_tmp: Path, mosquitto_path: str) -> None:
    figures = play(short_tmp / "k", rounds=5, seed=11)
    assert figures.kills == {"agent": 5, "hub": 5, "broker": 5}
    assert (figures.lost, figures.twice, figures.in_order) == (0, 0, True)
    assert figures.confirmed > 100
    assert figures.confirmed <= figures.stored <= figures.confirmed + figures.doubtful
