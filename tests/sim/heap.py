"""Virtual time: a heap of what happens next, and the trace of what happened.

Rules of this file:
1. Time is whole milliseconds and moves only when nothing is left to do at the present one.
2. What is planned for the same moment happens in the order in which it was planned, so a seed replays exactly.
3. All randomness is one generator, drawn from in that order. It is seeded with text, which is hashed with SHA-512, so
   that neither the process nor its hash seed matter.

There is no event loop, no thread and no future here: an entry is a function and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any, Final

MAX_EVENTS: Final = 200_000
"""More than that in one seed is a world that goes in circles."""


class Circles(AssertionError):
    """The world is busy without end."""


class World:
    """The clock, the generator and the plan of what comes.

    Attributes:
        now: milliseconds since the world began.
        random: the only source of chance.
        trace: lines of what happened, when they were asked for; None otherwise.
        events: how many entries were carried out.
    """

    __slots__ = ("_count", "_heap", "events", "now", "random", "trace")

    def __init__(self, seed: str, *, traced: bool = False) -> None:
        self.now = 0
        self.random = Random(seed)
        self.trace: list[str] | None = [] if traced else None
        self.events = 0
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def after(self, delay_ms: int, action: Callable[..., None], *args: Any) -> None:
        """Carry this out when so much time has passed."""
        self._count += 1
        heappush(self._heap, (self.now + max(0, delay_ms), self._count, action, args))

    def at(self, when_ms: int, action: Callable[..., None], *args: Any) -> None:
        """Carry this out at this moment, or now if it has passed."""
        self._count += 1
        heappush(self._heap, (max(self.now, when_ms), self._count, action, args))

    def run(self, until_ms: int, *, done: Callable[[], bool] | None = None) -> None:
        """Let things happen up to this moment, or until `done` says so; raises Circles."""
        heap = self._heap
        while heap and heap[0][0] <= until_ms:
            self.now, _, action, args = heappop(heap)
            action(*args)
            self.events += 1
            if self.events > MAX_EVENTS:
                raise Circles(f"{MAX_EVENTS} events and still busy")
            if done is not None and done():
                return
        self.now = max(self.now, until_ms)

    def chance(self, probability: float) -> bool:
        """True as often as that; draws nothing where it cannot be."""
        return probability > 0.0 and self.random.random() < probability

    def span(self, mean_ms: float) -> int:
        """A time around this mean, now and then many times as long."""
        return int(self.random.expovariate(1.0 / mean_ms)) if mean_ms > 0 else 0

    def say(self, who: str, what: str, *about: object) -> None:
        """A line of the trace; callers that format for it look at `trace` first."""
        if self.trace is not None:
            self.trace.append(f"{self.now / 1000:10.3f}  {who:<10} {what} {' '.join(map(str, about))}".rstrip())
