"""Knows what time it is for the whole agent, and asks the hub until it has said so in this boot.

Rules of this file:
1. A time counts only after it is on the disk as what was attested last.
2. The hub is asked at the start, whenever the link comes back, when an assignment waits for it, and when something
   does not agree with an attested time: the dates of a server's certificate, or of metadata. Until it answers, it is
   asked with growing pauses; a time that was attested is not asked for again within a minute. A hub that attests no
   time is left in peace until the link comes back, unless an assignment waits.
3. An answer that says what is known already is told to nobody: what failed goes on waiting for its own timer. A server
   certificate that really is out of date would otherwise be tried, doubted and tried again without a pause.
4. A question that brought nothing leaves everything as it was: whoever drops, replays or forges answers gains nothing.

Not here: the arithmetic (edge_agent/core/trusted_time.py), whose word counts (the verifier child).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final

from msgspec.structs import replace

from edge_agent.core import trusted_time
from edge_agent.core.trusted_time import Basis, TrustedTime
from edge_agent.driver.events import TimeAttested
from edge_agent.driver.loop import Loop
from edge_agent.ports import Ledger
from edge_agent.update_ports import TimeSource
from shared.clock import BootClock
from shared.errors import OutriderError, StorageError, TrustError, Unreachable
from shared.release import Floors

logger = logging.getLogger(__name__)

ASK_WITHIN_S: Final = 60.0
_WORK: Final = "time"


class Timekeeping:
    """The time, and the asking for it; `now_ms` may be called from any thread.

    Attributes:
        detail: why the hub's last answer brought no time; empty when it did, or was not asked yet.
        news: how often the hub has told a time by which others decide anew.
        waits: what waits for the time, in words; empty when nothing does.
    """

    def __init__(
        self,
        *,
        clock: BootClock,
        loop: Loop,
        ledger: Ledger,
        source: TimeSource,
        note: Callable[[str, dict[str, str]], None],
        issued_ms: int = 0,
    ) -> None:
        """
        Args:
            clock, loop, ledger: the agent's.
            source: the hub's word.
            note: keeps an event for the hub.
            issued_ms: when the device's certificate begins to be valid.
        """
        self._clock = clock
        self._inbox, self._works = loop.inbox, loop.works
        self._ledger = ledger
        self._source = source
        self._note = note
        self._issued_ms = issued_ms
        # Replaced as a whole, never changed: other threads read it.
        self._time = trusted_time.at_start(Floors(), issued_ms=issued_ms)
        self._failures = 0
        self._asking = asyncio.Lock()
        self._is_news = False
        self._doubted_boot_ms: int | None = None
        self._told: set[str] = set()
        self.news = 0
        self.detail = ""
        self.waits = ""

    # What others ask

    def now_ms(self) -> int:
        """The trusted time, in milliseconds since 1970."""
        return trusted_time.now_ms(self._time, wall_ms=self._clock.wall_ms(), boot_ms=self._clock.boot_ms())

    @property
    def attested(self) -> bool:
        """Whether the hub has attested the time in this boot."""
        return self._time.attested

    @property
    def basis(self) -> Basis:
        """On what the time rests."""
        return trusted_time.basis(self._time, wall_ms=self._clock.wall_ms())

    def clock_error_ms(self) -> int:
        """How far the system clock is ahead of the trusted time; before an attestation, how far behind at least."""
        return self._clock.wall_ms() - self.now_ms()

    # What happens

    async def start(self) -> None:
        """Read what is known, and begin to ask."""
        floors = await self._floors()
        self._time = trusted_time.at_start(floors or Floors(), issued_ms=self._issued_ms)
        self.ask()

    async def _floors(self) -> Floors | None:
        """None where they are lost: nothing is installed then, but connections still go by the time."""
        try:
            return await self._ledger.load_floors()
        except StorageError as error:
            if error.code != "storage.floors_lost":
                raise
            return None

    def proven(self, floor_ms: int) -> None:
        """A signed document proves that this moment has passed; it is on the disk already."""
        self._time = trusted_time.proven(self._time, floor_ms)

    def hurry(self) -> None:
        """Ask now instead of after the pause, unless the time is attested."""
        if not self._time.attested:
            self.ask()

    def reconnected(self) -> None:
        """The link is back, to a hub whose clock may have been put right: ask, unless it has just told the time."""
        if not self.attested or self._clock.boot_ms() - self._time.asked_boot_ms >= trusted_time.AGAIN_MS:
            self.ask()

    def doubt(self) -> None:
        """Dates do not agree with the time: ask, attested or not, but not more than once in AGAIN_MS."""
        if self._is_news:
            # What is doubted was judged by the time before, most likely: it is tried once more by this one.
            self._is_news = False
            self._inbox.post(TimeAttested())
        if not self._asking.locked() and self._may_doubt():
            self.ask()

    async def confirm(self) -> None:
        """Something has expired by this time: ask and wait for the answer, as seldom as `doubt` does."""
        if self._asking.locked():
            async with self._asking:
                return  # what was under way has ended
        if self._may_doubt():
            await self._ask_once()

    def _may_doubt(self) -> bool:
        boot_ms, last_ms = self._clock.boot_ms(), self._doubted_boot_ms
        if last_ms is not None and boot_ms - last_ms < trusted_time.AGAIN_MS:
            return False
        self._doubted_boot_ms = boot_ms
        return True

    def ask(self) -> None:
        """Ask now, attested or not; a question that is under way is enough."""
        if not self._asking.locked():
            self._works.start(_WORK, self._ask())

    async def _ask(self) -> None:
        while not await self._ask_once():
            self._failures += 1
            await asyncio.sleep(trusted_time.pause_ms(self._failures, jitter=random.random()) / 1000)

    async def _ask_once(self) -> bool:
        """Whether there is nothing more to ask for now."""
        async with self._asking:
            return await self._exchange()

    async def _exchange(self) -> bool:
        try:
            asked_boot_ms = self._clock.boot_ms()
            floors = await self._floors()
            async with asyncio.timeout(ASK_WITHIN_S):
                time_ms = await self._source.ask(floors=replace(floors or Floors(), time_ms=self._time.floor_ms))
            if floors is not None:
                await self._ledger.remember_time(time_ms)
        except TimeoutError:
            self._failed(Unreachable("the hub did not tell the time", code="transfer.timeout"))
            return False
        except OutriderError as error:
            self._failed(error)
            return error.code == "transfer.not_found" and not self.waits
        self._is_news = self._adopt(trusted_time.attested(self._time, time_ms, asked_boot_ms=asked_boot_ms))
        self._failures, self.detail = 0, ""
        error_ms = self.clock_error_ms()
        logger.info("the hub has told the time", extra={"clock_error_ms": error_ms})
        if abs(error_ms) >= trusted_time.WRONG_CLOCK_MS and "clock" not in self._told:
            self._told.add("clock")
            self._note("time.clock_wrong", {"ahead_by_ms": str(error_ms)})
        if self._is_news:
            self.news += 1
            self._inbox.post(TimeAttested())
        return True

    def _adopt(self, time: TrustedTime) -> bool:
        """Go by this time; returns whether that is news."""
        before, self._time = self._time, time
        return trusted_time.is_news(before, time, wall_ms=self._clock.wall_ms(), boot_ms=self._clock.boot_ms())

    def _failed(self, error: OutriderError) -> None:
        self.detail = f"{error.code}: {error.message}"
        if error.code in self._told:
            return
        self._told.add(error.code)
        logger.warning("the hub's time is not known", extra={"code": error.code, "why": error.message})
        if isinstance(error, TrustError):
            self._note("time.refused", {"code": error.code, "message": error.message})
