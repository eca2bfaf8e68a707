"""Ten thousand links that lose their broker in the same moment, and one that is merely cut off."""

from __future__ import annotations

import random
from bisect import bisect_right

import pytest

from edge_agent.core import link
from edge_agent.core.link import Connected, ConnectFailed, Link, LinkEvent, Lost, StartLink, StartTimer, TimerFired

DEVICES = 10_000


def said(state: Link, event: LinkEvent) -> tuple[Link, int]:
    """The link after this event, and how long it waits now; 0 when it does not."""
    decision = link.decide(state, event)
    delays = [effect.delay_ms for effect in decision.effects if isinstance(effect, StartTimer)]
    return decision.state, delays[0] if delays else 0


def returns(seed: int, *, away_ms: int) -> int:
    """When a link that had held is back, counted from its loss; the broker is away for so long."""
    draw = random.Random(seed)
    state = Link()
    for event in (StartLink(), Connected(), TimerFired()):
        state, _ = said(state, event)
    state, now_ms = said(state, Lost(reason="broker gone", jitter=draw.random()))
    while True:
        state, _ = said(state, TimerFired())
        if now_ms >= away_ms:
            return now_ms
        state, delay_ms = said(state, ConnectFailed(reason="refused", jitter=draw.random()))
        now_ms += delay_ms


def busiest_second(moments: list[int]) -> int:
    """How many of these fall into the fullest second."""
    ordered = sorted(moments)
    return max(bisect_right(ordered, moment + 999) - index for index, moment in enumerate(ordered))


@pytest.mark.parametrize("away_ms", [0, 2_500, 5_000, 6_500, 11_000, 90_000])
def test_no_second_brings_back_more_than_a_quarter_of_the_fleet(away_ms: int) -> None:
    moments = [returns(seed, away_ms=away_ms) for seed in range(DEVICES)]
    assert busiest_second(moments) <= DEVICES // 4
    assert max(moments) <= away_ms + link.LONGEST_WINDOW_MS


@pytest.mark.parametrize("away_ms", [1_000, 3_000, 10_000, 20_000])
def test_a_hub_that_restarts_in_some_seconds_has_its_devices_back_soon(away_ms: int) -> None:
    waits = sorted(returns(seed, away_ms=away_ms) - away_ms for seed in range(1_000))
    assert waits[500] <= 5_000
    assert waits[990] <= 15_000
    assert waits[-1] <= 20_000


def test_whoever_was_merely_cut_off_is_back_within_six_seconds() -> None:
    moments = [returns(seed, away_ms=0) for seed in range(1_000)]
    assert max(moments) <= 6_000
    assert sum(moments) / len(moments) < 3_500
