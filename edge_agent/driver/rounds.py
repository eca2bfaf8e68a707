"""Federated runs at work: tasks fetched and learned by a child, answers kept and then sent; and samples taken in.

Rules of this file:
1. An answer is on disk before it is sent. Whether it arrives is the hub's to see: it says the task again, and the kept
   answer is sent again.
2. Samples are read here and go to the trainer, which is a child of this process, and nowhere else.
3. One trainer at a time, for one run and one release; another run or release ends it.
4. Of tasks' contents the disk holds one at a time, and none for longer than it takes to read it.
5. What reads, writes or hashes a large message runs beside the event loop.

Not here: what follows on what (edge_agent/core/training.py), and what a task may ask for (edge_agent/core/lessons.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from edge_agent.core import training
from edge_agent.core.lessons import CannotLearn, Study, check_sample, fits, read_task, records
from edge_agent.core.serving import Route
from edge_agent.core.training import Outcome, Task, Training
from edge_agent.driver.events import ForTraining
from edge_agent.driver.loop import Loop
from edge_agent.opening import open_verified
from edge_agent.ports import RoundReplies, Sample, Samples, Trainer, Trainers
from edge_agent.update_ports import Fetcher, Shelf
from shared import limits
from shared.clock import Clock
from shared.errors import ModelError, OutriderError, ProtocolViolation, StorageError, TransferError
from shared.federated import FAILED, PRECONDITION, FlowerError, FlowerMessage, Metadata, reply_to
from shared.ids import Digest
from shared.inference import Done, Teach
from shared.model import FileRef
from shared.wire.flower import decode_message, encode_message
from shared.wire.messages import RoundReply, RoundTask

logger = logging.getLogger(__name__)

INLINE_BYTES: Final = limits.MAX_MQTT_PACKET_BYTES - 4 * limits.KIB
"""What is larger than this, with room for the envelope and its names, travels over HTTPS."""
CHEAP_BYTES: Final = 64 * limits.KIB
"""A message up to this size is read sooner than a thread is asked to."""
MAX_DEADLINE_MS: Final = 86_400_000


class TrainingRoom(msgspec.Struct, frozen=True, kw_only=True):
    """What training stands on.

    Attributes:
        samples: what is learned from.
        replies: answers that may have to be said again.
        trainers: starts the child.
        shelf: the models' files.
        tasks: where large tasks are put down, apart from the models, and removed once they are read.
        fetcher: for tasks and answers that are too large for a message.
        enabled: whether this device learns at all.
    """

    samples: Samples
    replies: RoundReplies
    trainers: Trainers
    shelf: Shelf
    tasks: Shelf
    fetcher: Fetcher
    enabled: bool = True


class Rounds:
    """The device's part in federated runs."""

    def __init__(
        self,
        *,
        device: str,
        clock: Clock,
        loop: Loop,
        room: TrainingRoom,
        routes: Callable[[], Mapping[str, Route]],
        send: Callable[[RoundReply], bool],
    ) -> None:
        """`routes` says which release serves a family; `send` publishes an answer, False when it cannot now."""
        self._device = device
        self._clock = clock
        self._inbox, self._works, self._timers = loop.inbox, loop.works, loop.timers
        self._room = room
        self._routes = routes
        self._send = send
        self._state = Training()
        self._metadata: tuple[training.Key, Metadata] = (("", ""), Metadata())
        self._trainer: Trainer | None = None
        self._trainer_key: tuple[str, ...] = ()
        self._began_ms = 0

    @property
    def trainer_pid(self) -> int:
        """Process id of the trainer; 0 while there is none."""
        return 0 if self._trainer is None else self._trainer.pid

    # Samples

    async def teach(self, request: Teach, payload: bytes | bytearray | memoryview) -> Done:
        """Keep a labelled sample; confirmed once it is on disk. Raises InputRefused and ModelError."""
        if not self._room.enabled:
            raise ModelError("this device does not learn", code="training.off", hint="set training.enabled = true")
        route = self._routes().get(request.model)
        if route is None or route.release is None:
            raise ModelError(
                f"no release of {request.model[:80]!r} is installed here",
                code="model.unknown",
                hint="see 'outrider-agent model ls'",
            )
        manifest = route.release.manifest
        check_sample(manifest, request.inputs, payload_bytes=len(payload), label=request.label)
        sample = Sample(label=request.label, inputs=request.inputs, payload=bytes(payload))
        number = await self._room.samples.keep(request.model, sample, at_ms=self._clock.wall_ms())
        return Done(id=request.id, detail=f"sample {number}")

    async def forget(self, family: str) -> int:
        """Forget every sample of a family, here and in the trainer; returns how many there were."""
        dropped = await self._room.samples.drop(family)
        self._end_trainer()
        return dropped

    # Tasks

    async def on_task(self, message: RoundTask) -> None:
        """Take a task from the hub; raises StorageError, with nothing done, when the kept answers cannot be read."""
        try:
            task = _task(message, now_ms=self._clock.mono_ms())
        except ProtocolViolation as error:
            logger.warning("round task not understood", extra={"why": error.message})
            return
        kept = await self._room.replies.load(task.run, task.message)
        self.handle(training.TaskArrived(task=task, answered=kept is not None, now_ms=self._clock.mono_ms()))

    def handle(self, event: training.TrainingEvent) -> None:
        """Let the training machine decide and carry out what it says."""
        decision = training.decide(self._state, event)
        self._state = decision.state
        for effect in decision.effects:
            self._carry_out(effect)

    def start(self) -> None:
        """Let go of what the tasks of an earlier life left on the disk."""
        try:
            self._room.tasks.collect(frozenset())
        except StorageError as error:
            logger.warning("what round tasks left cannot be removed", extra={"why": error.message})

    async def stop(self) -> None:
        """End the trainer; for the end."""
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            await trainer.stop()

    def _carry_out(self, effect: training.TrainingEffect) -> None:
        match effect:
            case training.FetchContent(task):
                self._works.start("round work", self._fetch(task))
            case training.Work(task):
                self._began_ms = self._clock.mono_ms()
                self._works.start("round work", self._work(task))
            case training.GiveUp():
                self._works.cancel("round work")
                self._end_trainer()
            case training.Reply(task, outcome):
                self._works.start("round reply", self._reply(task, outcome))
            case training.ReplyAgain(task):
                if not self._works.running(("round reply", task.key)):  # a long upload is not begun anew
                    self._works.start(("round reply", task.key), self._reply_again(task))
            case training.LeaveToHub(task, reason):
                logger.info("round task left to the hub", extra={"run": task.run, "why": reason})
            case training.StartDeadline(key, delay_ms):
                self._timers.start("round deadline", delay_ms, ForTraining(training.DeadlinePassed(key)))
            case training.StopDeadline():
                self._timers.stop("round deadline")
            case training.KeepWarm(delay_ms):
                self._timers.start("trainer warmth", delay_ms, ForTraining(training.WarmthOver()))
            case training.StopWarmth():
                self._timers.stop("trainer warmth")
            case training.EndTrainer():
                self._end_trainer()

    # Work

    async def _fetch(self, task: Task) -> None:
        path = f"rounds/{task.run}/{task.message}"
        file = FileRef(path=path, length=task.length, digest=Digest(task.blob))
        try:
            # Not in a thread: one that was given up would remove what the next task has fetched by then.
            self._room.tasks.collect(frozenset({file.digest}))
            await self._room.fetcher.blob(file, self._room.tasks)
            content = await asyncio.to_thread(_take, self._room.tasks, file)
        except (TransferError, StorageError) as error:
            now_ms = self._clock.mono_ms()
            missing = training.ContentMissing(key=task.key, reason=error.message, retry=error.retry, now_ms=now_ms)
            self._inbox.post(ForTraining(missing))
        else:
            self._inbox.post(ForTraining(training.ContentHere(task.key, content)))

    async def _work(self, task: Task) -> None:
        outcome: Outcome
        try:
            message = await _read(task.content)
            self._metadata = task.key, message.metadata
            if not self._room.enabled:
                raise CannotLearn("training is switched off on this device")
            study = read_task(message, routes=self._routes(), device=self._device)
            outcome = await self._study(task.run, study)
        except OutriderError as error:
            by_task = isinstance(error, CannotLearn | ProtocolViolation)
            outcome = FlowerError(PRECONDITION if by_task else FAILED, error.message)
        self._inbox.post(ForTraining(training.Worked(task.key, outcome)))

    async def _study(self, run: str, study: Study) -> Outcome:
        family = study.release.manifest.family
        oldest = await self._room.samples.oldest(family)
        if oldest == 0:
            raise CannotLearn(f"the device has no samples of {family}")
        trainer = await self._trainer_for(run, study)
        while batch := await self._room.samples.load(family, after=trainer.newest):
            signature = study.release.manifest.signature
            usable = [sample for sample in batch if fits(signature, sample.inputs, len(sample.payload))]
            await trainer.feed(usable, newest=batch[-1].number, forget_before=oldest)
        learned = await trainer.learn(study.lesson)
        return records(study.lesson.kind, learned.arrays, learned.metrics)

    async def _trainer_for(self, run: str, study: Study) -> Trainer:
        key = (run, study.release.key, study.release.variant, study.features)
        if self._trainer is not None and self._trainer_key == key:
            return self._trainer
        self._end_trainer()
        lost: list[str] = []

        def on_lost(reason: str) -> None:
            lost.append(reason)
            if self._trainer is trainer:
                logger.warning("trainer lost", extra={"reason": reason})
                self._trainer = None

        model_fd = await open_verified(self._room.shelf, study.release.served.file)
        trainer: Trainer | None = None
        trainer = await self._room.trainers.start(
            manifest=study.release.manifest,
            variant=study.release.served,
            features=study.features,
            model_fd=model_fd,
            on_lost=on_lost,
        )
        if not lost:
            self._trainer, self._trainer_key = trainer, key
        return trainer

    def _end_trainer(self) -> None:
        trainer, self._trainer = self._trainer, None
        if trainer is not None:
            self._works.start(("end trainer", trainer.pid), trainer.stop())

    # Answers

    async def _reply(self, task: Task, outcome: Outcome) -> None:
        try:
            content = await self._encode(task, outcome)
            await self._room.replies.keep(task.run, task.message, content, at_ms=self._clock.wall_ms())
        except StorageError as error:
            # Not sent, since it could not be said again: the hub repeats the task, and the disk may have room then.
            logger.error("a round's answer cannot be kept", extra={"run": task.run, "why": error.message})
        else:
            await self._deliver(task, content)
            if isinstance(outcome, FlowerError):
                logger.warning("round task refused", extra={"run": task.run, "why": outcome.reason})
            else:
                took_ms = self._clock.mono_ms() - self._began_ms
                logger.debug("round task answered", extra={"run": task.run, "took_ms": took_ms})
        self._inbox.post(ForTraining(training.Replied(task.key, self._clock.mono_ms())))

    async def _encode(self, task: Task, outcome: Outcome) -> bytes:
        # The message of a task whose deadline passed first was never read: nothing is known of it but its name.
        known, metadata = self._metadata
        metadata = msgspec.structs.replace(metadata if known == task.key else Metadata(), message_id=task.message)
        now_s = self._clock.wall_ms() / 1000
        answer = reply_to(metadata, outcome, created_at=now_s)
        try:
            return (
                encode_message(answer)
                if isinstance(outcome, FlowerError)
                else await asyncio.to_thread(encode_message, answer)
            )
        except ProtocolViolation as error:
            return encode_message(reply_to(metadata, FlowerError(FAILED, error.message), created_at=now_s))

    async def _reply_again(self, task: Task) -> None:
        try:
            content = await self._room.replies.load(task.run, task.message)
        except StorageError as error:
            logger.error("a kept answer cannot be read", extra={"run": task.run, "why": error.message})
            return
        if content is not None:
            await self._deliver(task, content)

    async def _deliver(self, task: Task, content: bytes) -> None:
        if len(content) <= INLINE_BYTES:
            self._send(RoundReply(run=task.run, message=task.message, content=content))
            return
        left_ms = max(task.until_ms - self._clock.mono_ms(), 0)
        try:
            async with asyncio.timeout(left_ms / 1000):
                await self._room.fetcher.upload(f"/v1/rounds/{task.run}/replies/{task.message}", content)
        except (TransferError, TimeoutError) as error:
            why = error.message if isinstance(error, TransferError) else "nobody waits for it any more"
            logger.warning("a round's answer cannot be delivered", extra={"run": task.run, "why": why})
            return
        digest = await asyncio.to_thread(_sha256, content)
        self._send(RoundReply(run=task.run, message=task.message, blob=digest, length=len(content)))


def _task(message: RoundTask, *, now_ms: int) -> Task:
    """The task in the words of the core; raises ProtocolViolation for names or sizes that cannot be."""
    return Task(
        run=training.check_name(message.run),
        message=training.check_name(message.message),
        until_ms=now_ms + min(max(message.deadline_ms, 0), MAX_DEADLINE_MS),
        content=message.content,
        blob=training.check_blob(message.blob, message.length) if not message.content else "",
        length=message.length,
    )


async def _read(content: bytes) -> FlowerMessage:
    if len(content) <= CHEAP_BYTES:
        return decode_message(content)
    return await asyncio.to_thread(decode_message, content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _take(shelf: Shelf, file: FileRef) -> bytes:
    """Read a file that is on the shelf, and remove it, and no other: the next one may be arriving."""
    descriptor = shelf.open(file)
    with os.fdopen(descriptor, "rb") as opened:
        content = opened.read(file.length)
    shelf.drop(file.digest)
    return content
