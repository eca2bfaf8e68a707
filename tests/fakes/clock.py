"""A clock that only moves when told."""

from __future__ import annotations

from edge_agent.core.journal import Moment


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


class FakeMoments:
    """All clocks at once, for `Moment`; a `reboot` begins a boot in which little time has passed."""

    def __init__(self) -> None:
        self.boot = 1
        self.uptime_ms = 1_000
        self.wall_ms = 1_800_000_000_000
        self.synchronised = False

    def __call__(self) -> Moment:
        """What they say."""
        return Moment(f"boot-{self.boot}", self.uptime_ms, self.wall_ms, self.synchronised)

    def advance(self, ms: int) -> None:
        """Let time pass."""
        self.uptime_ms += ms
        self.wall_ms += ms

    def reboot(self, *, off_ms: int = 0) -> None:
        """Be off for so long, and come up again."""
        self.boot += 1
        self.uptime_ms = 0
        self.wall_ms += off_ms
