"""A clock that only moves when told."""

from __future__ import annotations


class FakeClock:
    """`shared.clock.Clock` with two hands that the test moves."""

    def __init__(self, *, wall_ms: int = 1_800_000_000_000, mono_ms: int = 1_000) -> None:
        self.wall = wall_ms
        self.mono = mono_ms

    def wall_ms(self) -> int:
        """The wall hand."""
        return self.wall

    def mono_ms(self) -> int:
        """The monotonic hand."""
        return self.mono

    def advance(self, ms: int) -> None:
        """Let time pass on both."""
        self.wall += ms
        self.mono += ms
