"""One run at the hub: what its worker asks is asked of the fleet, and what the fleet answers is kept and handed over.

Rules:
1. Tasks are stored before they are sent, answers before the worker gets them. So whatever is killed, the next worker
   asks the same questions by the same names and gets the answers that are here; only missing ones are asked again.
2. A task is sent when it is made, again when its device is born, and again every few seconds until its time is over.
3. That time counts from when the task was first stored, whatever was restarted since.
4. Nothing polls but that repetition: births, reports and answers wake whoever waits, and so does the worker's end.

Not here: what a good answer is (replies.py, in the worker), restarts of the worker (course.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Protocol, TypeVar, assert_never

from sqlalchemy.engine import Connection

from cloud_hub.ground.database import Database
from cloud_hub.ground.post import Post
from cloud_hub.releases.desk import Blob
from cloud_hub.rounds import checkpoint, frames, rules, tables
from cloud_hub.rounds.counts import Counts
from cloud_hub.rounds.process import Worker
from cloud_hub.rounds.rules import RoundResult
from cloud_hub.rounds.tables import RunRow, TaskRow
from shared.clock import Clock
from shared.errors import OutriderError, ProtocolViolation, StorageError, Unreachable
from shared.ids import DeviceId, Digest
from shared.limits import KIB
from shared.wire.messages import RoundTask

MAX_INLINE_BYTES: Final = 192 * KIB
"""A task up to this size travels in the message; a larger one is fetched."""
RESEND_S: Final = 10.0
GRACE_S: Final = 15.0
"""How long devices are waited for after a restart: those of the last round, and answers whose time is over."""
PRESENT_S: Final = 600.0
"""How long a run waits for enough devices."""

T = TypeVar("T")


class RunFailed(OutriderError):
    """The run has ended and trying again would not help."""

    code = "rounds.failed"


class Store(Protocol):
    """The releases room's files, as far as tasks need them."""

    def put(self, data: bytes) -> Blob:
        """Store bytes under their digest."""
        ...

    def forget(self, digest: Digest) -> None:
        """Remove a file that nobody else refers to."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a session works with; `present` tells the devices that can be asked now."""

    database: Database
    clock: Clock
    post: Post
    store: Store
    counts: Counts
    present: Callable[[rules.Spec], Awaitable[tuple[DeviceId, ...]]]


@dataclass(frozen=True, slots=True)
class Letter:
    """A task as it goes out."""

    message: str
    content: bytes
    blob: str
    length: int


class Session:
    """A run and its worker's questions.

    Args:
        row: the run as it was when the worker started.
        worker: its worker, which was told to begin.
        folder: where large answers and checkpoints are.
        around: what it works with.
    """

    def __init__(self, row: RunRow, *, worker: Worker, folder: Path, around: Surroundings) -> None:
        self._run, self._spec = row.run, row.spec
        self._worker = worker
        self._folder = folder
        self._around = around
        self._stirred = asyncio.Event()
        self._news: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._open: dict[str, tuple[DeviceId, Letter]] = {}
        self._message_of: dict[DeviceId, str] = {}
        self._began_ms: int | None = None

    def stir(self) -> None:
        """Something about the fleet has changed."""
        self._stirred.set()

    def born(self, device: DeviceId) -> None:
        """A device has connected: what it was asked may not have reached it."""
        message = self._message_of.get(device)
        if message is not None:
            self._news.put_nowait(("born", message))
        self.stir()

    def replied(self, message: str) -> None:
        """An answer was stored."""
        self._news.put_nowait(("replied", message))

    async def serve(self) -> Path:
        """Answer the worker until the run is trained; returns the file with the result.

        Raises:
            RunFailed: the run cannot go on.
            WorkerLost: the worker ended by itself.
        """
        while True:
            frame = await self._worker.receive()
            match frame:
                case frames.Gather():
                    await self._gather(frame)
                case frames.Ask():
                    await self._ask(frame)
                case frames.RoundDone():
                    await self._round_done(frame)
                case frames.Trained():
                    return self._folder / Path(frame.model).name
                case frames.Failed(code=checkpoint.UNWRITTEN):
                    raise StorageError(frame.reason, code=frame.code, hint="free disk space in the hub's data folder")
                case frames.Failed():
                    raise RunFailed(frame.reason, code=frame.code, hint=frame.hint)
                case frames.Inspected():
                    raise ProtocolViolation("the worker answers what was not asked", code="protocol.frame")
                case _:
                    assert_never(frame)

    async def _gather(self, frame: frames.Gather) -> None:
        """Tell who takes part: those who were asked already, else all who are here once enough are."""
        if self._began_ms is None:
            self._began_ms = self._around.clock.mono_ms()
        database = self._around.database
        group = rules.group_of(frame.round, phase=frame.phase, attempt=frame.attempt)
        tasks = await database.read(lambda conn: tables.tasks_of(conn, self._run, group))
        nodes = {task.node: task.device for task in tasks}
        if not nodes:
            present = await self._while_worker_waits(self._enough())
            nodes = {rules.node_of(device): device for device in present}
            await database.write(lambda conn: tables.bind_nodes(conn, nodes))
        await self._worker.send(frames.Cohort(nodes=tuple(sorted(nodes))))

    async def _enough(self) -> tuple[DeviceId, ...]:
        expected = await self._around.database.read(lambda conn: tables.last_cohort(conn, self._run))
        present: tuple[DeviceId, ...] = ()
        for wait_s, waited in ((GRACE_S, False), (PRESENT_S, True)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    while True:
                        self._stirred.clear()
                        present = await self._around.present(self._spec)
                        if rules.may_begin(self._spec, present, expected=expected, waited=waited):
                            return present
                        await self._stirred.wait()
        raise RunFailed(
            f"{self._spec.min_devices} devices are needed, {len(present)} are online and serve "
            f"{self._spec.family}/{self._spec.base}",
            code="rounds.too_few_devices",
            hint="`outrider ls devices` shows who is there; lower --min-devices, or bring more of them up",
        )

    async def _ask(self, frame: frames.Ask) -> None:
        """Send tasks, hand answers over as they come, and close the question in time."""
        letters = await self._store_tasks(frame)
        group = rules.group_of(frame.round, phase=frame.phase, attempt=frame.attempt)
        # First what is known is forgotten, then the tasks are read: an answer that comes between is in both.
        while not self._news.empty():
            self._news.get_nowait()
        tasks = await self._around.database.read(lambda conn: tables.tasks_of(conn, self._run, group))
        left_s = self._left_s(tasks)
        deadline_ms = self._around.clock.mono_ms() + round(left_s * 1000)
        try:
            async with asyncio.timeout(left_s):
                await self._while_worker_waits(self._collect(tasks, letters, deadline_ms=deadline_ms))
        except TimeoutError:
            pass  # who has not answered is left out; the worker counts whether enough have
        finally:
            self._open.clear()
            self._message_of.clear()
            digests = {letter.blob for letter in letters.values() if letter.blob}
            for digest in digests:
                await asyncio.to_thread(self._around.store.forget, Digest(digest))
        await self._worker.send(frames.Closed())

    def _left_s(self, tasks: Sequence[TaskRow]) -> float:
        """What is left of the question's time; after a restart at least as long as devices need to come back with it.

        The wall's clock is the only one that goes on while the hub is down. One that was set back gives no more time
        than a question has.
        """
        whole_s = self._spec.round_timeout_s
        asked_ms = min((task.asked_ms for task in tasks), default=self._around.clock.wall_ms())
        gone_s = max(0, self._around.clock.wall_ms() - asked_ms) / 1000
        return max(whole_s - gone_s, min(GRACE_S, whole_s))

    async def _while_worker_waits(self, doing: Awaitable[T]) -> T:
        """Do this while the worker waits for it; raises WorkerLost as soon as the worker has ended by itself."""
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch_worker())
                done = await doing
                watching.cancel()
                return done
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from several

    async def _watch_worker(self) -> NoReturn:
        frame = await self._worker.receive()
        raise ProtocolViolation(
            f"the worker says {type(frame).__name__} where it was to wait for an answer", code="protocol.frame"
        )

    async def _store_tasks(self, frame: frames.Ask) -> dict[str, Letter]:
        contents = []
        for content in frame.contents:
            blob = ""
            if len(content) > MAX_INLINE_BYTES:
                blob = (await asyncio.to_thread(self._around.store.put, content)).digest
            contents.append((b"" if blob else content, blob, len(content) if blob else 0))
        letters = {task.message: Letter(task.message, *contents[task.content]) for task in frame.tasks}
        nodes = {task.message: task.node for task in frame.tasks}
        group = rules.group_of(frame.round, phase=frame.phase, attempt=frame.attempt)
        at_ms = self._around.clock.wall_ms()

        def work(conn: Connection) -> None:
            row = tables.find_run(conn, self._run)
            if row is None or row.state != "running":
                raise RunFailed("the run has ended meanwhile", code="rounds.ended")
            devices = tables.devices_of(conn, nodes.values())
            tasks = {message: (node, devices[node]) for message, node in nodes.items()}
            tables.add_tasks(conn, self._run, group, tasks, number=frame.round, at_ms=at_ms)

        await self._around.database.write(work)
        return letters

    async def _collect(self, tasks: Sequence[TaskRow], letters: dict[str, Letter], *, deadline_ms: int) -> None:
        self._open = {task.message: (task.device, letters[task.message]) for task in tasks}
        self._message_of = {task.device: task.message for task in tasks}
        for task in tasks:
            if task.replied_ms is not None:
                await self._hand_over(task)
        await self._send(tuple(self._open), deadline_ms)
        while self._open:
            try:
                async with asyncio.timeout(RESEND_S):
                    kind, message = await self._news.get()
            except TimeoutError:
                await self._send(tuple(self._open), deadline_ms)
                continue
            if kind == "born":
                await self._send((message,), deadline_ms)
            elif message in self._open:
                found = await self._find(message)
                if found is not None and found.replied_ms is not None:
                    await self._hand_over(found)

    async def _find(self, message: str) -> TaskRow | None:
        return await self._around.database.read(lambda conn: tables.find_task(conn, message))

    async def _hand_over(self, task: TaskRow) -> None:
        if self._open.pop(task.message, None) is not None:
            self._message_of.pop(task.device, None)
            await self._worker.send(frames.Reply(message=task.message, content=task.content, file=task.file))

    async def _send(self, messages: Sequence[str], deadline_ms: int) -> None:
        """Send those of these tasks that are open."""
        left_ms = max(1, deadline_ms - self._around.clock.mono_ms())
        for message in messages:
            if message not in self._open:
                continue
            device, letter = self._open[message]
            task = RoundTask(
                run=self._run,
                message=letter.message,
                deadline_ms=left_ms,
                content=letter.content,
                blob=letter.blob,
                length=letter.length,
            )
            try:
                await self._around.post.send(device, task, leaf="round")
            except Unreachable:
                self._around.counts.tasks.labels("no_link").inc()
            else:
                self._around.counts.tasks.labels("sent").inc()

    async def _round_done(self, frame: frames.RoundDone) -> None:
        """Store the result; only then may the worker go on."""
        began_ms, self._began_ms = self._began_ms, None
        took_ms = 0 if began_ms is None else self._around.clock.mono_ms() - began_ms
        group = rules.group_of(frame.round, phase="train", attempt=frame.attempt)

        def work(conn: Connection) -> bool:
            tasks = tables.tasks_of(conn, self._run, group)
            devices = {task.message: task.device for task in tasks}
            result = RoundResult(
                round=frame.round,
                attempt=frame.attempt,
                asked=len(tasks),
                answered=frame.answered,
                accepted=frame.accepted,
                took_ms=took_ms,
                metrics=frame.metrics,
                refused={
                    str(devices.get(message, message)): reason[: rules.MAX_REASON_CHARS]
                    for message, reason in frame.refused.items()
                },
            )
            return tables.finish_round(
                conn, self._run, result, checkpoint=Path(frame.checkpoint).name, digest=frame.digest
            )

        if not await self._around.database.write(work):
            raise RunFailed("the run has ended meanwhile", code="rounds.ended")
        self._around.counts.round_seconds.observe(took_ms / 1000)
        await asyncio.to_thread(self._tidy, Path(frame.checkpoint).name)
        await self._worker.send(frames.Stored())

    def _tidy(self, kept: str) -> None:
        """Remove older checkpoints, what killed workers left of others, and the answers of the round that is over."""
        for file in (file for ending in ("checkpoint", "new", "reply") for file in self._folder.glob(f"*.{ending}")):
            if file.name != kept:
                file.unlink(missing_ok=True)
