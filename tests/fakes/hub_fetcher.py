"""A `Fetcher` in front of a repository in memory."""

from __future__ import annotations

import asyncio

from edge_agent.update_ports import Shelf
from shared.errors import TransferCorrupt, TransferError
from shared.model import FileRef
from shared.wire.verification import Need
from tests.fakes.trust_repository import TrustRepository


class HubFetcher:
    """Serves what the repository serves. `error` is raised at once if set; `stalls` makes every call wait for ever."""

    def __init__(self, hub: TrustRepository) -> None:
        self.hub = hub
        self.asked: list[str] = []
        self.error: TransferError | None = None
        self.stalls = False

    async def metadata(self, name: str, *, max_bytes: int) -> bytes | None:
        return await self._get(Need(name=name, max_bytes=max_bytes))

    async def blob(self, file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        end = file.length if up_to is None else up_to
        data = await self._get(Need(name=file.path, max_bytes=file.length, file=file))
        if data is None:
            raise TransferError("the hub has no such file", code="transfer.missing")
        offset = shelf.resume_at(file.digest)
        shelf.append(file.digest, data[offset:end], offset=offset)
        if end >= file.length:
            shelf.publish(file)

    async def _get(self, need: Need) -> bytes | None:
        self.asked.append(need.name)
        if self.stalls:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        data = self.hub.serve(need)
        if data is not None and len(data) > need.max_bytes:
            raise TransferCorrupt("longer than asked for", code="transfer.too_large")
        return data

    async def upload(self, path: str, data: bytes) -> None:
        raise TransferError("this repository takes nothing", code="transfer.refused")
