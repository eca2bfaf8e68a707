"""The real clocks, the only place in the agent that reads them.

Not here: time that signed documents prove (floors, `shared/release.py`); this is what the machine believes.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from edge_agent.core.journal import Moment

_NS_PER_MS = 1_000_000
_STA_UNSYNC: Final = 0x40
_TIME_ERROR: Final = 5
_TIMEX_BYTES: Final = 512
"""More than `struct timex` has anywhere."""
_ASK_EVERY_MS: Final = 1_000

Adjtimex = Callable[[Any], int]


class SystemClock:
    """The machine's clocks as `shared.clock.BootClock`."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970-01-01 UTC, as far as this machine knows."""
        return time.time_ns() // _NS_PER_MS

    def mono_ms(self) -> int:
        """Milliseconds since an arbitrary moment of this boot, never backwards."""
        return time.monotonic_ns() // _NS_PER_MS

    def boot_ms(self) -> int:
        """Milliseconds since the boot, suspended time included."""
        return uptime_ms()


class SystemMoments:
    """All of the machine's clocks at once, for whoever must not trust one of them; may be called from any thread.

    Whether the wall clock is kept right is asked once in a second at most.
    """

    def __init__(self, adjtimex: Adjtimex | None = None) -> None:
        self._boot = boot_id()
        self._adjtimex = adjtimex or find_adjtimex()
        # One value, because threads may ask at the same time: when it was asked, and what was told.
        self._told = (-_ASK_EVERY_MS, False)

    def __call__(self) -> Moment:
        """What they say now."""
        wall_ms, now_ms = time.time_ns() // _NS_PER_MS, uptime_ms()
        asked_ms, synchronised = self._told
        if now_ms - asked_ms >= _ASK_EVERY_MS:
            synchronised = is_synchronised(self._adjtimex)
            self._told = (now_ms, synchronised)
        return Moment(boot=self._boot, uptime_ms=now_ms, wall_ms=wall_ms, synchronised=synchronised)


def boot_id(proc: Path = Path("/proc")) -> str:
    """What names this boot of the machine; empty where the kernel does not say."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def uptime_ms() -> int:
    """Milliseconds since the boot, suspended time included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // _NS_PER_MS


def find_adjtimex() -> Adjtimex | None:
    """The call adjtimex(2) of the C library; None where there is none."""
    # Imported here, because whoever only wants the time need not hold it in memory.
    import ctypes

    return getattr(ctypes.CDLL(None), "adjtimex", None)


def is_synchronised(adjtimex: Adjtimex | None) -> bool:
    """Whether something (NTP, PTP, a GPS receiver) keeps the wall clock right: adjtimex(2) says so; False in doubt."""
    import ctypes

    if adjtimex is None:
        return False
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: read, change nothing
    state = adjtimex(timex)
    # modes, offset, freq, maxerror and esterror stand before it, each as wide as a long.
    (status,) = struct.unpack_from("i", timex.raw, 5 * ctypes.sizeof(ctypes.c_long))
    return 0 <= state < _TIME_ERROR and not status & _STA_UNSYNC
