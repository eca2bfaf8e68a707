"""How the machine is, from /proc, /sys and the file system: readings for the hub.

Every source is optional; a reading that the kernel does not offer is left out, never guessed. The roots are arguments,
so that tests and containers can bring their own. Not here: what to do about heat or pressure (`edge_agent/core`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from shared.limits import KIB
from shared.telemetry import Reading


class Vitals:
    """Reads the machine's state; a call takes well under a millisecond."""

    def __init__(self, *, state_dir: Path, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        self._state_dir = state_dir
        self._proc = proc
        self._sys = sys

    def read(self) -> tuple[Reading, ...]:
        """All readings that this machine offers, in a fixed order."""
        sources: tuple[tuple[str, Callable[[], float]], ...] = (
            ("cpu_temp_c", self._temperature_c),
            ("load_1m", self._load_1m),
            ("memory_available_bytes", self._memory_available_bytes),
            ("memory_pressure_pct", lambda: self._pressure_pct("memory")),
            ("io_pressure_pct", lambda: self._pressure_pct("io")),
            ("disk_free_bytes", self._disk_free_bytes),
            ("core_rss_bytes", lambda: float(self.resident_bytes(os.getpid()))),
        )
        readings = []
        for name, source in sources:
            try:
                readings.append(Reading(name=name, value=source()))
            except (OSError, ValueError, IndexError, KeyError):
                continue  # this kernel or board does not offer it
        return tuple(readings)

    def resident_bytes(self, pid: int) -> int:
        """Resident memory of a process; raises OSError when it is gone."""
        pages = int((self._proc / str(pid) / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _temperature_c(self) -> float:
        zones = sorted((self._sys / "class" / "thermal").glob("thermal_zone*/temp"))
        return max(int(zone.read_text()) for zone in zones) / 1000

    def _load_1m(self) -> float:
        return float((self._proc / "loadavg").read_text().split()[0])

    def _memory_available_bytes(self) -> float:
        lines = (self._proc / "meminfo").read_text().splitlines()
        fields = {line.partition(":")[0]: line.split()[1] for line in lines if ":" in line}
        return float(int(fields["MemAvailable"]) * KIB)

    def _pressure_pct(self, resource: str) -> float:
        some = (self._proc / "pressure" / resource).read_text().splitlines()[0]
        return float(dict(item.split("=") for item in some.split()[1:])["avg10"])

    def _disk_free_bytes(self) -> float:
        info = os.statvfs(self._state_dir)
        return float(info.f_bavail * info.f_frsize)
