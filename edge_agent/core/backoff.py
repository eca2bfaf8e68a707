"""How long to wait after something failed: a window that widens, and any moment of it (full jitter).

Those who fail together shall not try again together (AWS Architecture Blog, "Exponential Backoff And Jitter"). The
driver draws the jitter, from 0 to 1, and hands it in.
"""

from __future__ import annotations


def doubled_ms(first_ms: int, *, times: int, longest_ms: int) -> int:
    """The window after so many failures more than one."""
    return min(longest_ms, first_ms << min(max(times, 0), 20))


def drawn_ms(window_ms: int, *, jitter: float, shortest_ms: int) -> int:
    """The moment of the window that this jitter means, but not before `shortest_ms`."""
    return max(shortest_ms, int(window_ms * min(max(jitter, 0.0), 1.0)))
