"""The link machine as a script."""

from __future__ import annotations

from itertools import product
from typing import get_args

import pytest

from edge_agent.core import link
from edge_agent.core.link import (
    Announce,
    Connect,
    Connected,
    ConnectFailed,
    Disconnect,
    Link,
    LinkEvent,
    LinkPhase,
    Lost,
    StartLink,
    StartTimer,
    StopLink,
    StopTimer,
    TimerFired,
)


def said(*events: LinkEvent, start: Link | None = None) -> tuple[Link, list[link.LinkEffect]]:
    """The link after these events, and what the last one wanted."""
    state, effects = start or Link(), []
    for event in events:
        decision = link.decide(state, event)
        state, effects = decision.state, list(decision.effects)
    return state, effects


def failed(jitter: float = 1.0) -> ConnectFailed:
    """A connect that failed."""
    return ConnectFailed(reason="no route", jitter=jitter)


def waits(effects: list[link.LinkEffect]) -> list[int]:
    """The timers among them."""
    return [effect.delay_ms for effect in effects if isinstance(effect, StartTimer)]


def test_a_link_comes_up() -> None:
    state, effects = said(StartLink())
    assert (state.phase, effects) == (LinkPhase.CONNECTING, [StopTimer(), Connect()])
    state, effects = said(Connected(), start=state)
    assert state.phase is LinkPhase.ONLINE
    assert effects == [StartTimer(link.STEADY_MS), Announce()]


def test_waiting_widens_up_to_a_minute() -> None:
    state, _ = said(StartLink())
    delays = []
    for _ in range(20):
        state, effects = said(failed(), start=state)
        assert state.phase is LinkPhase.OFFLINE
        delays += waits(effects)
        state, effects = said(TimerFired(), start=state)
        assert effects == [Connect()]
    assert delays[:5] == [750, 1_500, 3_000, 6_000, 15_000]
    assert delays == sorted(delays)
    assert delays[-1] == max(delays) == 60_000


@pytest.mark.parametrize(("jitter", "delay_ms"), [(0.0, 50), (0.5, 375), (1.0, 750), (9.0, 750), (-1.0, 50)])
def test_jitter_is_full_and_bounded(jitter: float, delay_ms: int) -> None:
    _, effects = said(StartLink(), failed(jitter))
    assert waits(effects) == [delay_ms]


def test_a_link_that_is_lost_at_once_goes_on_waiting_longer() -> None:
    state, _ = said(StartLink(), failed(), TimerFired(), failed(), TimerFired(), Connected())
    delays = []
    for _ in range(3):
        state, effects = said(Lost(reason="kicked", jitter=1.0), start=state)
        delays += waits(effects)
        state, _ = said(TimerFired(), Connected(), start=state)
    assert delays == [6_000, 15_000, 15_000]


def test_a_link_that_held_starts_over() -> None:
    state, _ = said(StartLink(), failed(), TimerFired(), failed(), TimerFired(), Connected(), TimerFired())
    state, effects = said(Lost(reason="gone", jitter=1.0), start=state)
    assert waits(effects) == [6_000]
    assert state.detail == "gone"


def test_starting_cuts_the_waiting_short() -> None:
    _, effects = said(StartLink(), failed(), StartLink())
    assert effects == [StopTimer(), Connect()]


def test_a_stopped_link_stays_down() -> None:
    state, effects = said(StartLink(), Connected(), StopLink())
    assert effects == [StopTimer(), Disconnect()]
    assert said(TimerFired(), start=state) == (state, [])
    assert said(Lost(reason="gone", jitter=1.0), start=state) == (state, [])
    assert said(Connected(), start=state) == (state, [Disconnect()])


def test_every_pair_has_a_row() -> None:
    assert set(link.LINK.rows) == set(product(LinkPhase, get_args(LinkEvent)))
