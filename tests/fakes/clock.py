"""A clock that only moves when told."""

from __future__ import annotations


class FakeClock:
    """`shared.clock.BootClock` with hands that the test moves."""

    def __init__(self, *, wall_ms: int = 1_800_000_000_000, mono_ms: int = 1_000) -> None:
        self.wall = wall_ms
        self.mono = mono_ms
        self.slept = 0

    def wall_ms(self) -> int:
        """The wall hand."""
        return self.wall

    def mono_ms(self) -> int:
        """The monotonic hand."""
        return self.mono

    def boot_ms(self) -> int:
        """The monotonic hand, and what was slept through."""
        return self.mono + self.slept

    def suspend(self, ms: int) -> None:
        """Sleep: the monotonic hand stands still."""
        self.wall += ms
        self.slept += ms

    def advance(self, ms: int) -> None:
        """Let time pass on all."""
        self.wall += ms
        self.mono += ms
