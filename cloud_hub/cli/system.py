"""The command line's only reader of clocks."""

from __future__ import annotations

import time


class SystemClock:
    """The machine's clocks, as `shared.clock.Clock`, and a way to wait."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        return time.time_ns() // 1_000_000

    def mono_ms(self) -> int:
        """Milliseconds since an arbitrary moment of this boot, never backwards."""
        return time.monotonic_ns() // 1_000_000

    def wait_ms(self, duration_ms: int) -> None:
        """Wait; Ctrl-C ends it."""
        time.sleep(duration_ms / 1000)
