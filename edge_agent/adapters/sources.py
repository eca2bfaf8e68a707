"""Several places that serve the same files, as `edge_agent.update_ports.Fetcher`: mirrors first, the hub at the end.

Rules of this file:
1. A mirror is trusted in nothing: what it serves is held against what was signed, by whoever asked.
2. Whatever goes wrong at a mirror, the next source is asked, at once or by whoever asks again within a budget; what
   the hub says at the end is the answer.
3. A mirror that failed is left alone for a while, longer each time; the hub never is. It counts as well again when a
   file of which it gave something has come right, and not before: a slice says nothing yet.
4. A file that came wrong is brought by the hub alone from then on: of one that came in slices nobody can say whose
   were wrong, and a mirror that gives some of them could keep it wrong for ever. Which mirrors gave some is
   remembered, and they rest.

Metadata and uploads concern the hub alone. Not here: how a source is spoken to (`fetcher.py`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

from edge_agent.core.backoff import doubled_ms
from edge_agent.update_ports import Fetcher, Shelf
from shared.clock import Clock
from shared.errors import TransferCorrupt, TransferError
from shared.ids import Digest
from shared.model import FileRef

logger = logging.getLogger(__name__)

FIRST_REST_MS: Final = 30_000
LONGEST_REST_MS: Final = 3_600_000
MAX_REMEMBERED: Final = 256
"""Files of which something is remembered; the oldest is forgotten for a new one."""


class SourcedFetcher:
    """`Fetcher` over several."""

    def __init__(self, *, hub: Fetcher, mirrors: Sequence[Fetcher], clock: Clock) -> None:
        self._hub = hub
        self._mirrors = tuple(mirrors)
        self._clock = clock
        self._failures = [0] * len(self._mirrors)
        self._rests_until_ms = [0] * len(self._mirrors)
        self._given: OrderedDict[Digest, set[int]] = OrderedDict()
        self._hub_alone: OrderedDict[Digest, None] = OrderedDict()

    async def metadata(self, name: str, *, max_bytes: int) -> bytes | None:
        """The hub's."""
        return await self._hub.metadata(name, max_bytes=max_bytes)

    async def blob(self, file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        """From the first source that has it; raises what the hub raises."""
        if file.digest not in self._hub_alone and await self._from_mirrors(file, shelf, up_to=up_to):
            return
        try:
            await self._hub.blob(file, shelf, up_to=up_to)
        except TransferCorrupt as error:
            self._came_wrong(file, error)
            raise
        if up_to is None or up_to >= file.length:
            self._came_right(file)

    async def _from_mirrors(self, file: FileRef, shelf: Shelf, *, up_to: int | None) -> bool:
        """Whether one of them brought what was asked for."""
        for number, mirror in enumerate(self._mirrors):
            if self._clock.mono_ms() < self._rests_until_ms[number]:
                continue
            before = shelf.resume_at(file.digest)
            try:
                await mirror.blob(file, shelf, up_to=up_to)
            except TransferCorrupt as error:
                self._remember_giver(file, number)
                self._came_wrong(file, error)
                shelf.drop(file.digest)  # the next source shall not go on from somebody's junk
                if up_to is not None:
                    raise  # from the beginning would be more than was allowed
                return False
            except TransferError as error:
                self._rest(number, error)
                if shelf.resume_at(file.digest) != before:
                    self._remember_giver(file, number)
            else:
                self._remember_giver(file, number)
                if up_to is None or up_to >= file.length:
                    self._came_right(file)
                return True
        return False

    async def upload(self, path: str, data: bytes) -> None:
        """To the hub."""
        await self._hub.upload(path, data)

    def _remember_giver(self, file: FileRef, number: int) -> None:
        self._given.setdefault(file.digest, set()).add(number)
        _bound(self._given)

    def _came_right(self, file: FileRef) -> None:
        for number in self._given.pop(file.digest, ()):
            self._failures[number] = 0

    def _came_wrong(self, file: FileRef, error: TransferCorrupt) -> None:
        self._hub_alone[file.digest] = None
        _bound(self._hub_alone)
        for number in self._given.pop(file.digest, ()):
            self._rest(number, error)

    def _rest(self, number: int, error: TransferError) -> None:
        rest_ms = doubled_ms(FIRST_REST_MS, times=self._failures[number], longest_ms=LONGEST_REST_MS)
        self._failures[number] += 1
        self._rests_until_ms[number] = self._clock.mono_ms() + rest_ms
        logger.warning("mirror left alone", extra={"mirror": number, "why": error.message, "rest_ms": rest_ms})


def _bound(known: OrderedDict[Digest, Any]) -> None:
    if len(known) > MAX_REMEMBERED:
        known.popitem(last=False)
