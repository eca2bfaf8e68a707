"""Brings the files of one release onto the shelf: by patches where they help, whole otherwise, within the day's budget.

Rules of this file:
1. Room and budget are asked for before bytes are. What waits for either fails with `retry` and a reason that does not
   change, so that it is said once; nothing of what has arrived is dropped.
2. A patch is only a help: whatever is wrong with it, the whole file is fetched, once, and the patch is left alone.
3. What came wrong is fetched once more from its beginning; then it is left alone, for longer each time. That is kept
   on the disk, so that no restart and no new offer makes a loop of it.
4. Every step can be cancelled. What is charged then is what came, or more.

Not here: which way a file comes (`edge_agent/core/ways.py`), the budget's rules (`edge_agent/core/spending.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from edge_agent.core.slot_values import MAX_REFETCHES
from edge_agent.core.ways import PatchPolicy, Way, against_room, bytes_to_write, choose_way
from edge_agent.driver.metering import Meter
from edge_agent.update_ports import Comparer, Fetcher, Patcher, Shelf
from shared.errors import (
    OutriderError,
    PatchFailed,
    StorageError,
    StorageFull,
    TransferCorrupt,
    TransferRefused,
    TrustError,
    Unreachable,
)
from shared.ids import Digest
from shared.limits import KIB
from shared.model import FileRef
from shared.release import Ground, Patch

logger = logging.getLogger(__name__)

PATCH_DEADLINE_S: Final = 600.0
"""For one file; the patcher's child has limits of its own."""
UNDER_WAY_BYTES: Final = 256 * KIB
"""What a transfer that is cancelled may still take from its connection."""

Note = Callable[[str, dict[str, str]], None]
Kept = Mapping[Digest, FileRef]


@dataclass(frozen=True, slots=True)
class Supplies:
    """What releases are brought with: made where the agent is composed.

    Attributes:
        fetcher, meter: the parts at work.
        patcher: what applies patches; without one none is taken.
        comparer: what holds learned releases against their bases; without one none of them is taken.
        policy: whether patches are used.
    """

    fetcher: Fetcher
    meter: Meter
    patcher: Patcher | None = None
    comparer: Comparer | None = None
    policy: PatchPolicy = "prefer_patch"

    def bringing(
        self, *, shelf: Shelf, models_bytes: int, kept: Callable[[], Kept], make_room: Callable[[], None]
    ) -> Bringing:
        """The one who fetches for this shelf; the arguments are those of `Bringing`."""
        return Bringing(supplies=self, shelf=shelf, models_bytes=models_bytes, kept=kept, make_room=make_room)


class Bringing:
    """The one who fetches; several releases may be brought at the same time."""

    def __init__(
        self,
        *,
        supplies: Supplies,
        shelf: Shelf,
        models_bytes: int,
        kept: Callable[[], Kept],
        make_room: Callable[[], None],
    ) -> None:
        """
        Args:
            supplies: what it fetches and patches with.
            shelf: where files go.
            models_bytes: what the profile allows to model files.
            kept: every file that slots run, may go back to and bring in, by digest.
            make_room: remove what nobody keeps.
        """
        self._shelf = shelf
        self._fetcher, self._patcher, self._meter = supplies.fetcher, supplies.patcher, supplies.meter
        self._comparer = supplies.comparer
        self._policy: PatchPolicy = supplies.policy
        self._models_bytes = models_bytes
        self._kept = kept
        self._make_room = make_room

    async def bring(self, files: tuple[FileRef, ...], patches: tuple[Patch, ...], *, note: Note) -> None:
        """Return once all files are on the shelf.

        Raises:
            StorageFull: `storage.room`, nothing was fetched; or the disk filled up meanwhile.
            Unreachable: `transfer.budget` when the day's bytes are spent; what arrived stays.
            TransferRefused: `transfer.patch_only` when the policy allows no way; or the hub said no.
            TransferCorrupt: `transfer.barred` for a file that came wrong before, with nothing fetched.
            TransferError, StorageError: as the fetcher and the shelf give them.
        """
        await self._meter.load()
        ways = [self._way(file, patches) for file in files if not self._shelf.has(file.digest)]
        self._require_room(ways)
        for way in ways:
            if way.patch is None or not await self._by_patch(way.file, way.patch, note=note):
                await self._whole(way.file)

    async def check(self, file: FileRef) -> None:
        """Hash a file on the shelf once more, and remember how that went.

        One that the disk changes each time is left alone after as many times as the slot has it brought in anew.

        Raises:
            TransferCorrupt: the disk changed it.
            StorageError: the disk refuses to show it, or it is gone.
        """
        try:
            await asyncio.to_thread(_check, self._shelf, file)
        except TransferCorrupt:
            with contextlib.suppress(StorageError):
                await self._meter.strike(file.digest, free=MAX_REFETCHES)
            raise
        with contextlib.suppress(StorageError):
            await self._meter.forgive(file.digest)

    async def compare(self, file: FileRef, ground: Ground) -> None:
        """Hold a learned file on the shelf against what it was learned on.

        Raises:
            TrustError: `trust.learned`, it moved further than that allows; or this agent cannot tell.
            OutriderError: as the comparer gives it; no word on the file.
        """
        if self._comparer is None:
            raise TrustError("this agent cannot hold learned releases against their bases", code="trust.learned")
        await self._comparer.compare(file, ground)

    def _way(self, file: FileRef, patches: tuple[Patch, ...]) -> Way:
        way = choose_way(
            file,
            patches if self._patcher is not None else (),
            policy=self._policy,
            is_here=lambda digest: digest in self._kept() and self._shelf.has(digest),
            part_bytes=self._shelf.resume_at,
            is_barred=self._meter.is_barred,
        )
        if way is None:
            raise TransferRefused(
                f"no patch leads to {file.path} from what is here, and nothing may be fetched whole",
                code="transfer.patch_only",
                hint="set updates.policy to prefer_patch, or assign a release that has a patch from what runs here",
            )
        return way

    def _require_room(self, ways: list[Way]) -> None:
        against = self._against_room(ways)
        if against:
            self._make_room()
            against = self._against_room(ways)
        if against:
            raise StorageFull(against, code="storage.room", hint="free disk space; the agent goes on by itself then")

    def _against_room(self, ways: list[Way]) -> str:
        if not ways:
            return ""
        patch_bytes = sum(way.patch.length for way in ways if way.patch is not None)
        return against_room(
            write_bytes=bytes_to_write(ways, part_bytes=self._shelf.resume_at),
            free_bytes=self._shelf.free_bytes(),
            kept_bytes=sum(file.length for file in self._kept().values()) + patch_bytes,
            models_bytes=self._models_bytes,
        )

    # Patches

    async def _by_patch(self, file: FileRef, patch: Patch, *, note: Note) -> bool:
        """Make the file from what is here; False when it is to be fetched whole."""
        as_file = FileRef(path=f"a patch to {file.path}", length=patch.length, digest=patch.digest)
        try:
            if not self._shelf.has(patch.digest):
                await self._within_budget(as_file)
            base = self._kept().get(patch.base)
            if base is None:
                raise PatchFailed("its base has gone meanwhile")
            await self._apply(patch, base=base, result=file)
        except (StorageFull, Unreachable):
            raise  # nothing is wrong with the patch
        except OutriderError as error:
            self._shelf.drop(patch.digest)
            await self._meter.patch_failed(patch.digest)
            logger.warning("patch failed", extra={"file": file.path, "code": error.code, "why": error.message})
            note("patch.failed", {"patch": patch.digest, "code": error.code, "message": error.message})
            if self._policy == "patch_only":
                raise TransferRefused(
                    f"the patch to {file.path} failed and nothing may be fetched whole", code="transfer.patch_only"
                ) from error
            return False
        self._shelf.drop(patch.digest)
        await self._meter.patched(saved_bytes=file.length - patch.length)
        return True

    async def _apply(self, patch: Patch, *, base: FileRef, result: FileRef) -> None:
        patcher = self._patcher
        assert patcher is not None, "a way by a patch without a patcher"
        try:
            async with asyncio.timeout(PATCH_DEADLINE_S):
                await patcher.apply(patch, base=base, result=result)
        except TimeoutError as error:
            raise PatchFailed(f"not done within {PATCH_DEADLINE_S:.0f} s", code="transfer.patch") from error
        if not self._shelf.has(result.digest):
            raise PatchFailed("the patcher says it is done and the file is not there", code="transfer.patch")

    # Whole files

    async def _whole(self, file: FileRef) -> None:
        if self._meter.is_barred(file.digest):
            raise TransferCorrupt(
                f"{file.path} came wrong before and is left alone for now",
                code="transfer.barred",
                hint="what the hub serves is not what was signed: upload the release's files again",
            )
        try:
            await self._within_budget(file)
        except TransferCorrupt as first:
            logger.warning("file came wrong, fetched anew", extra={"file": file.path, "why": first.message})
            self._shelf.drop(file.digest)
            try:
                await self._within_budget(file)
            except TransferCorrupt:
                self._shelf.drop(file.digest)
                await self._meter.strike(file.digest)
                raise

    async def _within_budget(self, file: FileRef) -> None:
        while not self._shelf.has(file.digest):
            start = self._shelf.resume_at(file.digest)
            if start > file.length:
                self._shelf.drop(file.digest)
                start = 0
            wanted = file.length - start
            granted = await self._meter.take(wanted) if wanted else 0
            if wanted and not granted:
                raise Unreachable(
                    f"waits for the budget of {self._meter.daily_bytes} bytes a day",
                    code="transfer.budget",
                    hint="it goes on by itself; updates.daily_bytes is the budget",
                )
            await self._part(file, up_to=start + granted, granted=granted)
            if not self._shelf.has(file.digest) and self._shelf.resume_at(file.digest) <= start:
                raise Unreachable(f"nothing more of {file.path} came", code="transfer.stalled")

    async def _part(self, file: FileRef, *, up_to: int, granted: int) -> None:
        counted = _CountingShelf(self._shelf)
        under_way = 0
        try:
            await self._fetcher.blob(file, counted, up_to=up_to)
        except asyncio.CancelledError:
            under_way = UNDER_WAY_BYTES
            raise
        finally:
            arrived = counted.arrived_bytes
            self._meter.give_back(max(0, granted - arrived - under_way) if arrived <= granted else granted - arrived)


def _check(shelf: Shelf, file: FileRef) -> None:
    os.close(shelf.open(file))


class _CountingShelf:
    """A shelf that counts what is appended: that is what came over the network, kept or not."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.arrived_bytes = 0

    def has(self, digest: Digest) -> bool:
        return self._shelf.has(digest)

    def resume_at(self, digest: Digest) -> int:
        return self._shelf.resume_at(digest)

    def append(self, digest: Digest, data: bytes, *, offset: int) -> None:
        self.arrived_bytes += len(data)
        self._shelf.append(digest, data, offset=offset)

    def part(self, digest: Digest) -> int:
        return self._shelf.part(digest)

    def publish(self, file: FileRef) -> None:
        self._shelf.publish(file)

    def open(self, file: FileRef) -> int:
        return self._shelf.open(file)

    def drop(self, digest: Digest) -> None:
        self._shelf.drop(digest)

    def collect(self, keep: frozenset[Digest]) -> int:
        return self._shelf.collect(keep)

    def free_bytes(self) -> int:
        return self._shelf.free_bytes()
