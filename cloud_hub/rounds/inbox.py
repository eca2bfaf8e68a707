"""Takes devices' answers, from messages and from uploads: stored once, in time, and only from who was asked.

An answer is settled by its task's name: the first one counts, each further one is told that it was here before. One
that comes after its round is over is worth nothing and is counted as late.

Uploads go to a file of the run's folder as they come (`.part`, then `.reply`). One of each answer runs at a time, and
so many in all; each has to end in time, and leaves no file unless it is the one that counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncIterable, Callable, Iterator
from pathlib import Path
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.ground import arrivals
from cloud_hub.ground.arrivals import Arrival
from cloud_hub.ground.database import Database
from cloud_hub.ground.refusals import NotFound, Throttled
from cloud_hub.rounds import rules, tables
from cloud_hub.rounds.counts import Counts
from cloud_hub.rounds.tables import TaskRow
from shared import limits
from shared.clock import Clock
from shared.errors import Conflict, InvalidValue, OutriderError, ProtocolViolation
from shared.ids import DeviceId
from shared.wire.envelope import Envelope
from shared.wire.messages import RoundReply

MAX_NAME_CHARS: Final = 64
MAX_UPLOADS: Final = 64
"""At a time; each has up to a megabyte in memory."""
AGAIN_S: Final = 5


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
        self._uploading: set[str] = set()

    async def replied(self, device: DeviceId, _envelope: Envelope, reply: RoundReply) -> None:
        """Take an answer from a message; raises ProtocolViolation for one that nobody asked for."""
        task = await self._task(device, run=reply.run, message=reply.message)
        if task is None:
            if await self._is_past(device, run=reply.run, message=reply.message):
                self._counts.replies.labels("late").inc()
                return
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
            Conflict: the round is over, or the same answer is being uploaded.
            Throttled: too many answers are being uploaded.
            TransferCorrupt: more or fewer bytes arrived than were announced, or not in time.
            StorageError: the disk refused.
        """
        task = await self._task(device, run=run, message=message)
        if task is None:
            if await self._is_past(device, run=run, message=message):
                self._counts.replies.labels("late").inc()
                raise Conflict("the round is over", code="conflict.round_over")
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
        with self._alone(message):
            name = f"{hashlib.sha256(message.encode()).hexdigest()[:24]}-{secrets.token_hex(4)}.reply"
            file = self._root / task.run / name
            await self._receive(file, length, pieces)
            try:
                taken = await self._keep(task, content=None, file=name, length=length)
            except OutriderError:
                await asyncio.to_thread(file.unlink, missing_ok=True)
                raise
            if not taken:
                await asyncio.to_thread(file.unlink, missing_ok=True)
        return taken

    @contextlib.contextmanager
    def _alone(self, message: str) -> Iterator[None]:
        """Be the one who uploads this answer.

        The second one is refused and not the first: a device asks again while its first upload still runs.
        """
        if message in self._uploading:
            raise Conflict(
                "this answer is being uploaded already", code="conflict.uploading", hint="wait until it has ended"
            )
        if len(self._uploading) >= MAX_UPLOADS:
            raise Throttled("too many answers are being uploaded", retry_after_s=AGAIN_S)
        self._uploading.add(message)
        try:
            yield
        finally:
            self._uploading.discard(message)

    async def _receive(self, file: Path, length: int, pieces: AsyncIterable[bytes]) -> None:
        arrival = await asyncio.to_thread(_begin, file.with_suffix(".part"), length)
        try:
            await arrivals.fill(arrival, length, pieces, within_s=arrivals.longest_s(length))
            await asyncio.to_thread(_settle, arrival, file)
        finally:
            # Shielded by being synchronous: a cancelled upload must not leave its file behind.
            arrival.discard()

    async def _task(self, device: DeviceId, *, run: str, message: str) -> TaskRow | None:
        """The task of this name, if it is this device's and this run's."""
        if len(message) > MAX_NAME_CHARS:
            return None
        task = await self._database.read(lambda conn: tables.find_task(conn, message))
        return task if task is not None and task.device == device and task.run == run else None

    async def _is_past(self, device: DeviceId, *, run: str, message: str) -> bool:
        """Whether this was the device's task in a round that is so long over that its row is gone."""
        number = rules.round_of(message, run=run, node=rules.node_of(device))
        if number is None:
            return False
        row = await self._database.read(lambda conn: tables.find_run(conn, run))
        return row is not None and (number <= row.round or row.state not in rules.ACTIVE)

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


def _begin(draft: Path, length: int) -> Arrival:
    with arrivals.translated():
        return Arrival(draft, max_bytes=length)


def _settle(arrival: Arrival, file: Path) -> None:
    with arrivals.translated():
        arrival.settle(file)
