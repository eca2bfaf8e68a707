"""Takes devices' answers, from messages and from uploads: stored once, in time, and only from who was asked.

An answer is settled by its task's name: the first one counts, each further one is told that it was here before. One
that comes after its round is over is worth nothing and is counted as late.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterable, Callable
from pathlib import Path
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.ground.database import Database
from cloud_hub.ground.refusals import NotFound
from cloud_hub.rounds import checkpoint, tables
from cloud_hub.rounds.counts import Counts
from cloud_hub.rounds.tables import TaskRow
from shared import limits
from shared.clock import Clock
from shared.errors import Conflict, InvalidValue, ProtocolViolation, TransferCorrupt
from shared.ids import DeviceId
from shared.wire.envelope import Envelope
from shared.wire.messages import RoundReply

MAX_NAME_CHARS: Final = 64


class Inbox:
    """Where answers arrive.

    Args:
        root: the room's folder; a run's large answers lie in the folder of its name.
        tell: called with run and message when an answer was stored.
    """

    def __init__(
        self, root: Path, *, database: Database, clock: Clock, counts: Counts, tell: Callable[[str, str], None]
    ) -> None:
        self._root = root
        self._database = database
        self._clock = clock
        self._counts = counts
        self._tell = tell

    async def replied(self, device: DeviceId, _envelope: Envelope, reply: RoundReply) -> None:
        """Take an answer from a message; raises ProtocolViolation for one that nobody asked for."""
        task = await self._task(device, run=reply.run, message=reply.message)
        if task is None:
            self._counts.replies.labels("unknown").inc()
            raise ProtocolViolation("an answer to what was not asked", code="protocol.unexpected")
        if reply.blob:
            # The upload was the answer; this only says so, and says it again when the first word was lost.
            if task.replied_ms is None and not task.closed:
                raise ProtocolViolation("an answer that was not uploaded", code="protocol.unexpected")
            self._counts.replies.labels("repeated").inc()
            return
        await self._keep(task, content=reply.content, file="", length=len(reply.content))

    async def upload(
        self, device: DeviceId, *, run: str, message: str, length: int, pieces: AsyncIterable[bytes]
    ) -> bool:
        """Take an answer as it arrives; False when there was one already.

        Raises:
            NotFound: the device was not asked this.
            InvalidValue: it announces nothing, or too much.
            Conflict: the round is over.
            TransferCorrupt: more or fewer bytes arrived than were announced.
        """
        task = await self._task(device, run=run, message=message)
        if task is None:
            self._counts.replies.labels("unknown").inc()
            raise NotFound("there is no such task for this device", code="not_found.round_task")
        if not 0 < length <= limits.MAX_ROUND_MESSAGE_BYTES:
            raise InvalidValue(
                f"an answer of {length} bytes is not taken; 1 to {limits.MAX_ROUND_MESSAGE_BYTES} are possible",
                code="invalid.length",
            )
        if task.replied_ms is not None:
            self._counts.replies.labels("repeated").inc()
            return False
        if task.closed:
            self._counts.replies.labels("late").inc()
            raise Conflict("the round is over", code="conflict.round_over")
        data = bytearray()
        async for piece in pieces:
            data += piece
            if len(data) > length:
                raise TransferCorrupt(f"more than the announced {length} bytes arrived")
        if len(data) != length:
            raise TransferCorrupt(f"{length - len(data)} of the announced {length} bytes did not arrive")
        file = f"{hashlib.sha256(message.encode()).hexdigest()[:24]}-{secrets.token_hex(4)}.reply"
        await asyncio.to_thread(checkpoint.write, self._root / task.run / file, bytes(data))
        return await self._keep(task, content=None, file=file, length=length)

    async def _task(self, device: DeviceId, *, run: str, message: str) -> TaskRow | None:
        """The task of this name, if it is this device's and this run's."""
        if len(message) > MAX_NAME_CHARS:
            return None
        task = await self._database.read(lambda conn: tables.find_task(conn, message))
        return task if task is not None and task.device == device and task.run == run else None

    async def _keep(self, task: TaskRow, *, content: bytes | None, file: str, length: int) -> bool:
        at_ms = self._clock.wall_ms()

        def work(conn: Connection) -> bool:
            return tables.set_reply(conn, task.message, content=content, file=file, length=length, at_ms=at_ms)

        taken = await self._database.write(work)
        if taken:
            self._counts.replies.labels("taken").inc()
            self._tell(task.run, task.message)
        else:
            self._counts.replies.labels("late" if task.closed else "repeated").inc()
        return taken
