"""The machine under the hub: its clocks, of which this is the only reader, and what it lets a process have."""

from __future__ import annotations

import resource
import sys
import time
from typing import Final

MAX_FILES: Final = 65_536
"""Open files, and so connections, that the hub and the broker it starts may each have if the machine allows."""


def raise_file_limit() -> None:
    """Take what the machine allows: the usual default is a thousand, which is a thousand devices."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def take_turns_sooner() -> None:
    """Have threads hand the interpreter over after half a millisecond instead of five.

    An engine's thread that comes back from a run would otherwise wait for the event loop for longer than the run took
    (`scripts/bench offload`: a sixth more answers a second, p99 a quarter lower).
    """
    sys.setswitchinterval(0.0005)


class SystemClock:
    """The machine's clocks, as `shared.clock.BootClock`."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC."""
        return time.time_ns() // 1_000_000

    def mono_ms(self) -> int:
        """Milliseconds since an arbitrary moment of this boot, never backwards."""
        return time.monotonic_ns() // 1_000_000

    def boot_ms(self) -> int:
        """Milliseconds since the machine started, suspended time included."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def mono_us(self) -> int:
        """The same moment in microseconds, for what takes less than a millisecond."""
        return time.monotonic_ns() // 1000
