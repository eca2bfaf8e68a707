"""The files of releases at work: has them brought onto the shelf and hashes them once more.

Rules of this file:
1. One transfer for each family, and few of them at a time; one that runs is not begun anew.
2. Every answer carries the key of the release that it is about.
3. What waits (budget, room) is told to the hub once for each release and reason.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from typing import Final

from edge_agent.core.slot_values import (
    Fetch,
    FetchFailed,
    FilesBad,
    FilesHere,
    FilesRefused,
    FilesVerified,
    VerifyFiles,
)
from edge_agent.driver.bringing import Bringing, Note
from edge_agent.driver.events import ForSlot
from edge_agent.driver.loop import Loop
from edge_agent.update_ports import Shelf
from shared.errors import OutriderError, TransferCorrupt, TrustError
from shared.ids import FamilyName
from shared.model import FileRef

logger = logging.getLogger(__name__)

FETCHES_AT_ONCE: Final = 2
"""Each holds a thread for as long as the hub takes: more of them could keep the link and the hosts from theirs."""
WAITING_CODES: Final = frozenset({"transfer.budget", "storage.room"})
"""Why a release may wait for long without anything being wrong with it."""


class Files:
    """Fetches and verifies, for every slot."""

    def __init__(self, *, loop: Loop, bringing: Bringing, note: Note) -> None:
        self._inbox, self._works = loop.inbox, loop.works
        self._bringing = bringing
        self._note = note
        self._fetching: dict[FamilyName, str] = {}
        self._told: dict[FamilyName, tuple[str, str]] = {}
        self._turns = asyncio.Semaphore(FETCHES_AT_ONCE)

    def fetch(self, family: FamilyName, wanted: Fetch) -> None:
        """Bring the files onto the shelf; answered by FilesHere or FetchFailed."""
        # A link that came back asks for it again; a transfer that runs on is not begun anew for that.
        if self._fetching.get(family) == wanted.key:
            return
        self._fetching[family] = wanted.key
        self._works.start(("fetch", family), self._fetch(family, wanted))

    def verify(self, family: FamilyName, wanted: VerifyFiles) -> None:
        """Hash the files on the shelf once more; answered by FilesVerified, FilesBad or FilesRefused."""
        self._works.start(("verify", family), self._verify(family, wanted))

    def cancel(self, family: FamilyName) -> None:
        """Give up what is under way for this family."""
        self._fetching.pop(family, None)
        self._works.cancel(("fetch", family))
        self._works.cancel(("verify", family))

    async def _fetch(self, family: FamilyName, wanted: Fetch) -> None:
        def note(name: str, detail: dict[str, str]) -> None:
            self._note(name, {"family": family, **detail})

        key = wanted.key
        try:
            async with self._turns:
                await self._bringing.bring(wanted.files, wanted.patches, note=note)
        except OutriderError as error:
            self._fetching.pop(family, None)
            if error.code in WAITING_CODES and self._told.get(family) != (key, error.code):
                self._told[family] = key, error.code
                note("release.waits", {"manifest": key, "code": error.code, "message": error.message})
            failed = FetchFailed(
                key=key, code=error.code, message=error.message, retry=error.retry, jitter=random.random()
            )
            self._inbox.post(ForSlot(family, failed))
        else:
            self._fetching.pop(family, None)
            self._told.pop(family, None)
            self._inbox.post(ForSlot(family, FilesHere(key)))

    async def _verify(self, family: FamilyName, wanted: VerifyFiles) -> None:
        key = wanted.key
        try:
            for file in wanted.files:
                await self._bringing.check(file)
            if wanted.ground is not None:
                await self._bringing.compare(wanted.files[0], wanted.ground)
        except TrustError as error:
            logger.warning("learned release refused", extra={"family": family, "why": error.message})
            refused = FilesRefused(key=key, code=error.code, message=error.message)
            self._inbox.post(ForSlot(family, refused))
        except OutriderError as error:
            # Of a disk that refuses, or a comparison that came to no end, nothing is said against the release.
            may_be_right = not isinstance(error, TransferCorrupt)
            bad = FilesBad(key=key, code=error.code, message=error.message, retry=may_be_right)
            self._inbox.post(ForSlot(family, bad))
        else:
            self._inbox.post(ForSlot(family, FilesVerified(key)))


async def open_verified(shelf: Shelf, file: FileRef) -> int:
    """The shelf's descriptor; closed again if by then nobody waits for it, because the thread cannot be stopped."""
    opening = asyncio.get_running_loop().run_in_executor(None, shelf.open, file)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


def _close(opening: asyncio.Future[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())
