"""Windows that widen, and moments of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.backoff import doubled_ms, drawn_ms


@pytest.mark.parametrize(
    ("times", "window_ms"), [(-1, 500), (0, 500), (1, 1_000), (3, 4_000), (7, 60_000), (10**9, 60_000)]
)
def test_a_window_doubles_up_to_its_longest(times: int, window_ms: int) -> None:
    assert doubled_ms(500, times=times, longest_ms=60_000) == window_ms


@given(window_ms=st.integers(0, 10**9), jitter=st.floats(allow_nan=False))
def test_a_moment_is_within_the_window_whatever_is_drawn(window_ms: int, jitter: float) -> None:
    assert 50 <= drawn_ms(window_ms, jitter=jitter, shortest_ms=50) <= max(50, window_ms)


def test_the_whole_of_the_window_is_drawn_from() -> None:
    assert [drawn_ms(800, jitter=jitter, shortest_ms=50) for jitter in (0.0, 0.5, 1.0)] == [50, 400, 800]
