"""Several places that serve the same files, as `edge_agent.update_ports.Fetcher`: mirrors first, the hub at the end.

Rules of this file:
1. A mirror is trusted in nothing: what it serves is held against what was signed, by whoever asked.
2. Whatever goes wrong at a mirror, the next source is asked, at once or by whoever asks again within a budget; what
   the hub says at the end is the answer.
3. A mirror that failed is left alone for a while, longer each time; the hub never is.

Metadata and uploads concern the hub alone. Not here: how a source is spoken to (`fetcher.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from edge_agent.core.backoff import doubled_ms
from edge_agent.update_ports import Fetcher, Shelf
from shared.clock import Clock
from shared.errors import TransferCorrupt, TransferError
from shared.model import FileRef

logger = logging.getLogger(__name__)

FIRST_REST_MS: Final = 30_000
LONGEST_REST_MS: Final = 3_600_000


class SourcedFetcher:
    """`Fetcher` over several."""

    def __init__(self, *, hub: Fetcher, mirrors: Sequence[Fetcher], clock: Clock) -> None:
        self._hub = hub
        self._mirrors = tuple(mirrors)
        self._clock = clock
        self._failures = [0] * len(self._mirrors)
        self._rests_until_ms = [0] * len(self._mirrors)

    async def metadata(self, name: str, *, max_bytes: int) -> bytes | None:
        """The hub's."""
        return await self._hub.metadata(name, max_bytes=max_bytes)

    async def blob(self, file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        """From the first source that has it; raises what the hub raises."""
        for number, mirror in enumerate(self._mirrors):
            if self._clock.mono_ms() < self._rests_until_ms[number]:
                continue
            try:
                await mirror.blob(file, shelf, up_to=up_to)
            except TransferError as error:
                self._rest(number, error)
                if isinstance(error, TransferCorrupt):
                    shelf.drop(file.digest)  # the next source shall not go on from somebody's junk
                    if up_to is not None:
                        raise  # from the beginning would be more than was allowed
            else:
                self._failures[number] = 0
                return
        await self._hub.blob(file, shelf, up_to=up_to)

    async def upload(self, path: str, data: bytes) -> None:
        """To the hub."""
        await self._hub.upload(path, data)

    def _rest(self, number: int, error: TransferError) -> None:
        rest_ms = doubled_ms(FIRST_REST_MS, times=self._failures[number], longest_ms=LONGEST_REST_MS)
        self._failures[number] += 1
        self._rests_until_ms[number] = self._clock.mono_ms() + rest_ms
        logger.warning("mirror left alone", extra={"mirror": number, "why": error.message, "rest_ms": rest_ms})
