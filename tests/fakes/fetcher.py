"""A `Fetcher` over files in memory that keeps to the promise of the real one, and misbehaves when told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from edge_agent.update_ports import Shelf
from shared.errors import TransferCorrupt, TransferRefused, Unreachable
from shared.model import FileRef

PIECE_BYTES = 64 * 1024


class FakeFetcher:
    """Files by digest.

    Attributes:
        files: what the hub serves, by digest; another content than the digest's is a hub that serves junk.
        away: nobody answers.
        hangs: transfers stop after their first piece and never go on.
        breaks_after: bytes after which the next transfer breaks off, once.
        fetched: path of each file that was asked for, once for each call.
        asked_bytes: what was sent, kept or not.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.away = False
        self.hangs = False
        self.breaks_after: int | None = None
        self.fetched: list[str] = []
        self.asked_bytes = 0
        self.uploads: dict[str, bytes] = {}
        self.on_piece: Callable[[], None] = lambda: None

    async def metadata(self, name: str, *, max_bytes: int) -> bytes | None:
        """The trust fake needs none."""
        return None

    async def blob(self, file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        """Copy onto the shelf, in pieces."""
        if self.away:
            raise Unreachable("the hub is away")
        if shelf.has(file.digest):
            return
        self.fetched.append(file.path)
        data = self.files.get(file.digest)
        if data is None:
            raise TransferRefused("the hub has no such file", code="transfer.not_found")
        end = file.length if up_to is None else min(up_to, file.length)
        offset = min(shelf.resume_at(file.digest), file.length)
        while offset < end and offset < len(data):
            piece = data[offset : min(end, offset + PIECE_BYTES)]
            if self.breaks_after is not None:
                piece = piece[: self.breaks_after]
                self.breaks_after -= len(piece)
            self.asked_bytes += len(piece)
            shelf.append(file.digest, piece, offset=offset)
            offset += len(piece)
            self.on_piece()
            await asyncio.sleep(0)
            if self.breaks_after == 0:
                self.breaks_after = None
                raise Unreachable("the connection broke")
            if self.hangs:
                await asyncio.Event().wait()
        if offset < end or (end == file.length and len(data) > file.length):
            shelf.append(file.digest, b"", offset=0)
            raise TransferCorrupt(f"the hub has {len(data)} bytes of {file.path}, {file.length} are signed")
        if end == file.length:
            shelf.publish(file)

    async def upload(self, path: str, data: bytes) -> None:
        """Keep it."""
        if self.away:
            raise Unreachable("the hub is away")
        self.uploads[path] = data
