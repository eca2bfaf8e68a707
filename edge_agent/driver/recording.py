"""Results on their way to the disk: many with one commit, right after their answers have left.

Rules of this file:
1. An answer does not wait for the disk. When results pile up faster than the disk takes them, answers wait, but never
   beyond their own time: then the result is lost, and counted.
2. What the outbox refuses is lost and counted too, and ends nothing.

Not here: what a result says (edge_agent/driver/answering.py), and durability (the outbox).
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from edge_agent.driver.uplink import Uplink
from shared.clock import Clock
from shared.errors import OutriderError
from shared.telemetry import Result

logger = logging.getLogger(__name__)

MAX_UNRECORDED: Final = 2_000
"""Results that may wait for the disk before answers wait too."""
MAX_RECORDED_AT_ONCE: Final = 500


class Recording:
    """Takes results from answers and brings them into the outbox.

    Attributes:
        lost: results that were never recorded.
    """

    def __init__(self, *, clock: Clock, uplink: Uplink) -> None:
        self._clock = clock
        self._uplink = uplink
        self._unrecorded: asyncio.Queue[tuple[int, Result]] = asyncio.Queue(MAX_UNRECORDED)
        self._recording = asyncio.Lock()
        self._is_behind = False
        self._disk_refuses = False
        self.lost = 0

    async def keep(self, result: Result, *, until: float) -> bool:
        """Take a result; where there is no room for it, wait until this moment on the event loop's clock.

        Returns:
            Whether it had to wait.
        """
        entry = (self._clock.wall_ms(), result)
        if not self._unrecorded.full():
            self._unrecorded.put_nowait(entry)
            return False
        try:
            async with asyncio.timeout_at(until):
                await self._unrecorded.put(entry)
        except TimeoutError:
            self.lost += 1
            if not self._is_behind:
                self._is_behind = True
                logger.error("results are lost: the disk does not keep up", extra={"waiting": MAX_UNRECORDED})
        return True

    async def run(self) -> None:
        """Bring results into the outbox, many with one commit; runs until cancelled."""
        while True:
            batch = [await self._unrecorded.get()]
            while len(batch) < MAX_RECORDED_AT_ONCE and not self._unrecorded.empty():
                batch.append(self._unrecorded.get_nowait())
            async with self._recording:
                await self._record(batch)
            if self._is_behind and self._unrecorded.empty():
                self._is_behind = False
                logger.info("results are kept again", extra={"lost": self.lost})

    async def finish(self) -> None:
        """Bring what is left into the outbox, and wait for what `run` has in hand; before its end."""
        rest = []
        while not self._unrecorded.empty():
            rest.append(self._unrecorded.get_nowait())
        async with self._recording:
            await self._record(rest)

    async def _record(self, batch: list[tuple[int, Result]]) -> None:
        puts = (self._uplink.keep(result, at_ms=at_ms) for at_ms, result in batch)
        told = await asyncio.gather(*puts, return_exceptions=True)
        # A result that no outbox takes (a label without end, from a model's own process) must not end the recording.
        refusals = [error for error in told if isinstance(error, OutriderError)]
        for error in told:
            if isinstance(error, BaseException) and not isinstance(error, OutriderError):
                raise error
        self.lost += len(refusals)
        if bool(refusals) != self._disk_refuses:
            self._disk_refuses = bool(refusals)
            if refusals:
                logger.error("results are not recorded", extra={"why": refusals[0].message})
            else:
                logger.info("results are recorded again")
