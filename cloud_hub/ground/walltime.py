"""Whether the hub's wall clock may be told to devices and be signed into what they keep.

A clock that is ahead for seconds is no small thing: a device that is told so renews at once, and its new certificate
begins when the clock will have caught up. So the wall clock is held against the one that nobody can set.

Rules:
1. While the hub runs, the wall clock may leave that other one by an hour and no further. When it is back, all is well.
2. When the hub starts, the clock may lie an hour before the newest audit row and no further.
3. What is doubted is told, and the hub tells no time and issues nothing to devices: they ask again.
4. A person who has looked restarts the hub: the next start takes the clock as it is.

Not here: what depends on the time and is the hub's own (ports' certificates, revocation lists); those are made anew.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from cloud_hub.ground import audit
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from shared.clock import BootClock
from shared.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_JUMP_MS: Final = 3600 * 1000
LOOK_S: Final = 5.0
CODE: Final = "config.clock"
HINT: Final = "set the machine's clock; if it is right, restart the hub, which then takes it as it is"


def doubt(*, now_ms: int, expected_ms: int, newest_ms: int | None) -> str:
    """What speaks against a wall clock; empty when nothing does.

    Args:
        now_ms: what it says.
        expected_ms: what it said when the hub started, and what has passed since.
        newest_ms: the time of the audit row that was the newest when the hub started; None without one.
    """
    off_ms = now_ms - expected_ms
    if abs(off_ms) > MAX_JUMP_MS:
        way = "forward" if off_ms > 0 else "back"
        return f"the clock was set {way} by {abs(off_ms) // 1000} s since the hub started"
    if newest_ms is not None and newest_ms - now_ms > MAX_JUMP_MS:
        return f"the clock was {(newest_ms - now_ms) // 1000} s behind the newest audit row when the hub started"
    return ""


class WallTime:
    """The wall clock of a running hub, from its start.

    Args:
        clock: whose boot hand counts suspends too.
        newest_ms: the time of the newest audit row.
        metrics: tells whether the clock is doubted.
    """

    def __init__(self, clock: BootClock, *, newest_ms: int | None, metrics: Metrics) -> None:
        self._clock = clock
        self._newest_ms = newest_ms
        self._began_ms = clock.wall_ms() - clock.boot_ms()
        self._is_doubted = False
        gauge = metrics.gauge("outrider_hub_clock_doubted", "1 while the clock is not told to devices.")
        gauge.set_function(lambda: float(bool(self.doubt(clock.wall_ms()))))

    def doubt(self, now_ms: int) -> str:
        """What speaks against this reading of the clock, which was just taken; empty when nothing does."""
        expected_ms = self._began_ms + self._clock.boot_ms()
        return doubt(now_ms=now_ms, expected_ms=expected_ms, newest_ms=self._newest_ms)

    def require(self, now_ms: int) -> None:
        """Raise ConfigError when something speaks against this reading of the clock, which was just taken."""
        found = self.doubt(now_ms)
        if found:
            raise ConfigError(found, code=CODE, hint=HINT)

    def sure_ms(self) -> int:
        """The time, in milliseconds since 1970-01-01 UTC; raises ConfigError when it is doubted."""
        now_ms = self._clock.wall_ms()
        self.require(now_ms)
        return now_ms

    async def run(self) -> None:
        """Tell whoever reads the log, until cancelled; metrics and `doctor` say it too."""
        while True:
            self.look()
            await asyncio.sleep(LOOK_S)

    def look(self) -> None:
        """Log that the clock is doubted, once, and once that it is no longer."""
        found = self.doubt(self._clock.wall_ms())
        if bool(found) != self._is_doubted:
            self._is_doubted = bool(found)
            if found:
                logger.error("the clock is not told to devices: %s; %s", found, HINT)
            else:
                logger.info("the clock is told to devices again")


def begin(database: Database, clock: BootClock, *, metrics: Metrics) -> WallTime:
    """Take the clock as it is now, unless it lies before what the hub has written already; raises StorageError.

    That is written down as well, so that the next start takes the clock as it is.
    """
    newest_ms = database.read_now(audit.newest_ms)
    time, now_ms = WallTime(clock, newest_ms=newest_ms, metrics=metrics), clock.wall_ms()
    found = time.doubt(now_ms)
    if found:
        database.write_now(
            lambda conn: audit.record(
                conn, at_ms=now_ms, actor="hub", action="clock.doubted", subject="hub", detail={"why": found}
            )
        )
    return time
