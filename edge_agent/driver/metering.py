"""The day's byte budget at work: charged on the disk before bytes are asked for, given back when they did not come.

The rules are those of `edge_agent/core/spending.py`. Not here: what is fetched (`bringing.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from edge_agent.core import spending as rules
from edge_agent.core.journal import Moment
from edge_agent.core.spending import Spending
from edge_agent.ports import Ledger
from shared.errors import StorageError

logger = logging.getLogger(__name__)


class Meter:
    """What this device may still fetch today, and what it knows of files that came wrong."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        moments: Callable[[], Moment],
        daily_bytes: int,
        note: Callable[[str, dict[str, str]], None],
    ) -> None:
        """`daily_bytes` 0 is no budget; bytes are counted all the same. `note` tells the hub of an event."""
        self._ledger = ledger
        self._moments = moments
        self._daily_bytes = daily_bytes
        self._note = note
        self._spending: Spending | None = None
        self._turn = asyncio.Lock()

    @property
    def daily_bytes(self) -> int:
        """The budget; 0 for none."""
        return self._daily_bytes

    def figures(self) -> dict[str, int]:
        """What an operator may see, as of now."""
        now = self._now(self._spending or Spending())
        figures = {
            "day_bytes": sum(now.hours.values()),
            "total_bytes": now.total_bytes,
            "saved_bytes": now.saved_bytes,
            "patched": now.patched,
            "patch_failed": now.patch_failed,
        }
        if self._daily_bytes:
            left = rules.left_bytes(now, daily_bytes=self._daily_bytes)
            figures |= {"daily_bytes": self._daily_bytes, "left_bytes": left}
        return figures

    async def load(self) -> None:
        """Read what was kept; once in a life, and again only when that failed. Raises StorageError.

        A record that the disk has damaged is replaced by one of a day that is spent: installing goes on
        when that day is over, and damage refills no budget.
        """
        async with self._turn:
            if self._spending is None:
                self._spending = await self._read()

    async def _read(self) -> Spending:
        try:
            return await self._ledger.load_spending()
        except StorageError as error:
            if error.code != "storage.unreadable":
                raise
            logger.error("what was fetched cannot be read, a day counts as spent", extra={"why": error.message})
            spent = rules.spent_day(self._moments(), daily_bytes=self._daily_bytes)
            await self._ledger.save_spending(spent)
            self._note("spending.unreadable", {"message": error.message})
            return spent

    async def take(self, wanted_bytes: int) -> int:
        """Charge and return how much may be asked for now, 0 for nothing; on the disk when this returns."""
        await self.load()
        async with self._turn:
            now = self._known()
            granted = rules.grant_bytes(now, daily_bytes=self._daily_bytes, wanted_bytes=wanted_bytes)
            # The clock is kept even where nothing is granted: it is what refills the budget after a restart.
            try:
                await self._save(rules.charged(now, granted))
            except StorageError:
                self.give_back(granted)
                raise
            return granted

    def give_back(self, count: int) -> None:
        """So many bytes of what was taken did not come; fewer than none: so many more did. Kept with the next change.

        Until then a power cut leaves the higher figure.
        """
        self._spending = rules.charged(self._known(), -count)

    def is_barred(self, digest: str) -> bool:
        """Whether this file came wrong and is left alone for now."""
        return rules.barred_ms(self._known(), digest) > 0

    async def strike(self, digest: str, *, free: int = 0) -> None:
        """This file was wrong; the first `free` times it is only counted."""
        await self._change(lambda now: rules.struck(now, digest, free=free))

    async def forgive(self, digest: str) -> None:
        """This file came right."""
        await self.load()
        if self._spending is not None and digest in self._spending.strikes:
            await self._change(lambda now: rules.forgiven(now, digest))

    async def patched(self, *, saved_bytes: int) -> None:
        """A patch made a file, and so many bytes need not be fetched."""
        replace = msgspec.structs.replace
        await self._change(
            lambda now: replace(now, patched=now.patched + 1, saved_bytes=now.saved_bytes + max(0, saved_bytes))
        )

    async def patch_failed(self, digest: str) -> None:
        """This patch did not make what it promised: it is counted and left alone."""
        replace = msgspec.structs.replace
        await self._change(lambda now: rules.struck(replace(now, patch_failed=now.patch_failed + 1), digest))

    async def _change(self, change: Callable[[Spending], Spending]) -> None:
        await self.load()
        async with self._turn:
            await self._save(change(self._known()))

    def _known(self) -> Spending:
        assert self._spending is not None, "the meter is used before it was loaded"
        return self._now(self._spending)

    def _now(self, spending: Spending) -> Spending:
        return rules.moved(spending, self._moments())

    async def _save(self, spending: Spending) -> None:
        # Kept in memory first: what is given back meanwhile must not be lost, and a disk that refuses charges too much.
        self._spending = spending
        await self._ledger.save_spending(spending)
