"""The files of releases at work: brings them onto the shelf and hashes them once more.

Rules of this file:
1. One transfer for each family, and few of them at a time; one that runs is not begun anew.
2. Every answer carries the key of the release that it is about.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

from edge_agent.core.slot_values import FetchFailed, FilesBad, FilesHere, FilesVerified
from edge_agent.driver.events import ForSlot
from edge_agent.driver.loop import Loop
from edge_agent.update_ports import Fetcher, Shelf
from shared.errors import StorageError, TransferCorrupt, TransferError
from shared.ids import FamilyName
from shared.model import FileRef

FETCHES_AT_ONCE: Final = 2
"""Each holds a thread for as long as the hub takes: more of them could keep the link and the hosts from theirs."""


class Files:
    """Fetches and verifies, for every slot."""

    def __init__(self, *, loop: Loop, shelf: Shelf, fetcher: Fetcher) -> None:
        self._inbox, self._works = loop.inbox, loop.works
        self._shelf = shelf
        self._fetcher = fetcher
        self._fetching: dict[FamilyName, str] = {}
        self._turns = asyncio.Semaphore(FETCHES_AT_ONCE)

    def fetch(self, family: FamilyName, key: str, files: tuple[FileRef, ...]) -> None:
        """Bring the files onto the shelf; answered by FilesHere or FetchFailed."""
        # A link that came back asks for it again; a transfer that runs on is not begun anew for that.
        if self._fetching.get(family) == key:
            return
        self._fetching[family] = key
        self._works.start(("fetch", family), self._fetch(family, key, files))

    def verify(self, family: FamilyName, key: str, files: tuple[FileRef, ...]) -> None:
        """Hash the files on the shelf once more; answered by FilesVerified or FilesBad."""
        self._works.start(("verify", family), self._verify(family, key, files))

    def cancel(self, family: FamilyName) -> None:
        """Give up what is under way for this family."""
        self._fetching.pop(family, None)
        self._works.cancel(("fetch", family))
        self._works.cancel(("verify", family))

    async def _fetch(self, family: FamilyName, key: str, files: tuple[FileRef, ...]) -> None:
        try:
            async with self._turns:
                for file in files:
                    if not self._shelf.has(file.digest):
                        await self._fetcher.blob(file, self._shelf)
        except (TransferError, StorageError) as error:
            self._fetching.pop(family, None)
            failed = FetchFailed(key=key, code=error.code, message=error.message, retry=error.retry)
            self._inbox.post(ForSlot(family, failed))
        else:
            self._fetching.pop(family, None)
            self._inbox.post(ForSlot(family, FilesHere(key)))

    async def _verify(self, family: FamilyName, key: str, files: tuple[FileRef, ...]) -> None:
        try:
            await asyncio.to_thread(_check_files, self._shelf, files)
        except (TransferCorrupt, StorageError) as error:
            is_disk = isinstance(error, StorageError)
            bad = FilesBad(key=key, code=error.code, message=error.message, retry=is_disk)
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


def _check_files(shelf: Shelf, files: tuple[FileRef, ...]) -> None:
    for file in files:
        os.close(shelf.open(file))
