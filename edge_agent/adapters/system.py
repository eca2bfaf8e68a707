"""The real clock, the only place in the agent that reads one.

Not here: time that signed documents prove (floors, `shared/release.py`); this is what the machine believes.
"""

from __future__ import annotations

import time

_NS_PER_MS = 1_000_000


class SystemClock:
    """The machine's two clocks as `shared.clock.Clock`."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC, as far as this machine knows."""
        return time.time_ns() // _NS_PER_MS

    def mono_ms(self) -> int:
        """Milliseconds since an arbitrary moment of this boot, never backwards."""
        return time.monotonic_ns() // _NS_PER_MS
