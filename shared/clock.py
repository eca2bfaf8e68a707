"""Time as an argument. Nobody below the composition roots reads a clock on their own."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Two clocks: one to say when something was, one to say how long it took.

    `wall_ms` may jump either way and may be wrong by decades on a device without a clock of its own: never
    subtract two of its readings. `mono_ms` only moves forward and means nothing outside this boot.
    """

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        ...

    def mono_ms(self) -> int:
        """Milliseconds since an arbitrary moment of this boot, never backwards."""
        ...


class BootClock(Clock, Protocol):
    """A third hand for what must not stand still while the machine sleeps."""

    def boot_ms(self) -> int:
        """Milliseconds since an arbitrary moment of this boot, suspended time included, never backwards."""
        ...
