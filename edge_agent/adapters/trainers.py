"""Starts trainers, talks to them, notices when one is lost, and leaves none behind.

Rules:
- A trainer does one lesson at a time. It is nicer than everything that serves and has one thread. Whoever gives up a
  lesson, or its preparation, ends the trainer: it does not listen while it works.
- The end of the stream is the end of the trainer: it is killed if need be, reaped, and who waits gets HostLost.
- A trainer that takes more memory than its budget is killed. Lessons have no deadline here: who asks has one.
- What the child has not taken of its samples yet is bounded, here and in the socket.

Not here: the process itself (children.py), what runs inside it (edge_agent/trainers), and when to start or end one
(edge_agent/core/training.py; edge_agent/driver/rounds.py carries that out).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from edge_agent.adapters.children import Child, spawn
from edge_agent.adapters.streams import FrameLink
from edge_agent.core.lessons import BIAS, WEIGHT, CannotLearn, Lesson
from edge_agent.framing import Buffer
from edge_agent.ports import Learned, Sample
from edge_agent.trainers import protocol
from shared.errors import HostLost, ModelError, ProtocolViolation
from shared.federated import Array
from shared.limits import MIB
from shared.model import Manifest, Variant, encode_manifest

logger = logging.getLogger(__name__)

_GRACE_S: Final = 2.0
_WATCH_S: Final = 0.5
_FEED_BYTES: Final = 4 * MIB
_FEED_SAMPLES: Final = 100
"""Their labels and numbers fit into a frame's header, however long the labels are."""


class TrainerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How trainers are started and when they are given up.

    Attributes:
        python: the interpreter.
        memory_bytes: resident size beyond which a trainer is killed; 0 for no limit.
        start_ms: a trainer that is not ready by then is killed.
        niceness: added to the core's, 0 to 19.
    """

    python: str = sys.executable
    memory_bytes: int = 0
    start_ms: int = 30_000
    niceness: int = 10


class LiveTrainers:
    """Starts trainers as child processes; implements ports.Trainers."""

    def __init__(self, *, directory: Path, options: TrainerOptions | None = None) -> None:
        """Keep process ids in `directory`, which is made if it is missing."""
        self._directory = directory
        self._options = options or TrainerOptions()

    async def start(
        self, *, manifest: Manifest, variant: Variant, features: str, model_fd: int, on_lost: Callable[[str], None]
    ) -> LiveTrainer:
        """Start a child and load the model in it; closes the descriptor. Raises ModelError, CannotLearn, HostLost."""
        options = self._options
        try:
            process, link, record = spawn(
                (options.python, "-I", "-X", "no_debug_ranges", "-m", "edge_agent.trainers"),
                directory=self._directory,
                descriptors=(model_fd,),
                arguments=(str(options.niceness),),
            )
        finally:
            os.close(model_fd)
        trainer = LiveTrainer(process=process, record=record, options=options, on_lost=on_lost)
        try:
            await trainer.attach(link)
            loaded = await trainer.load(manifest, variant, features)
        except BaseException:  # a cancelled start must not leave its child behind
            await trainer.kill("it was given up while starting")
            raise
        logger.info("trainer ready", extra={"pid": process.pid, "rss_bytes": loaded.rss_bytes})
        return trainer


class LiveTrainer:
    """One child process with one release's features in it; implements ports.Trainer."""

    def __init__(
        self,
        *,
        process: subprocess.Popen[bytes],
        record: Path,
        options: TrainerOptions,
        on_lost: Callable[[str], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._child = Child(process=process, record=record, on_gone=self._on_gone)
        self._options = options
        self._on_lost = on_lost
        self._link: FrameLink | None = None
        self._ready: asyncio.Future[protocol.Loaded] = self._loop.create_future()
        self._lesson: tuple[int, Lesson, asyncio.Future[Learned]] | None = None
        self._last_id = 0
        self._newest = 0
        self._is_up = False
        self._stopping = False
        self._watch: asyncio.TimerHandle | None = None
        self._flowing = asyncio.Event()
        self._flowing.set()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    @property
    def newest(self) -> int:
        """The number of the newest sample that it was fed; 0 for none."""
        return self._newest

    def rss_bytes(self) -> int:
        """The child's resident size now; 0 once it is gone."""
        return self._child.rss_bytes()

    async def attach(self, link: socket.socket) -> None:
        """Take over the core's end of the socket pair and start watching."""
        frames = FrameLink(
            on_frame=self._on_frame, on_refused=self._on_refused, on_end=self._child.reap, on_clogged=self._on_clogged
        )
        try:
            await self._loop.create_unix_connection(lambda: frames, sock=link)
        except BaseException:  # cancellation included: until a transport has it, the socket is ours to close
            link.close()
            raise
        self._link = frames
        frames.limit_unsent(_FEED_BYTES)
        self._watch_once()

    async def load(self, manifest: Manifest, variant: Variant, features: str) -> protocol.Loaded:
        """Have the model loaded; raises ModelError, CannotLearn or HostLost."""
        load = protocol.Load(variant=variant.name, features=features, threads=1)
        self._send(load, (encode_manifest(manifest),))
        try:
            async with asyncio.timeout(self._options.start_ms / 1000):
                return await asyncio.shield(self._ready)
        except TimeoutError as error:
            raise ModelError(
                f"the trainer was not ready after {self._options.start_ms} ms", code="model.load_timeout"
            ) from error

    async def feed(self, samples: Sequence[Sample], *, newest: int, forget_before: int) -> None:
        """Hand over samples up to the number `newest`, no faster than the child takes them; raises HostLost.

        Those with lower numbers than `forget_before` are forgotten. A feed that is given up ends the trainer.
        """
        part: list[Sample] = []
        for sample in samples:
            size = sum(len(one.payload) for one in (*part, sample))
            if part and (part[0].inputs != sample.inputs or size > _FEED_BYTES or len(part) == _FEED_SAMPLES):
                await self._feed(part, forget_before)
                part = []
            part.append(sample)
        await self._feed(part, forget_before)
        self._newest = newest

    async def _feed(self, part: Sequence[Sample], forget_before: int) -> None:
        try:
            await self._flowing.wait()
        except asyncio.CancelledError:
            self._child.condemn("it was given up while it was fed")
            raise
        if self._stopping or self._child.is_gone:
            raise HostLost("the trainer is not running")
        feed = protocol.Feed(
            numbers=tuple(sample.number for sample in part),
            labels=tuple(sample.label for sample in part),
            inputs=part[0].inputs if part else (),
            forget_before=forget_before,
        )
        self._send(feed, [sample.payload for sample in part])

    async def learn(self, lesson: Lesson) -> Learned:
        """Do the lesson on what was fed; raises ModelError, CannotLearn for what the task is to blame, HostLost."""
        if self._stopping or self._child.is_gone:
            raise HostLost("the trainer is not running")
        if self._lesson is not None:
            raise ModelError("the trainer is at another lesson", code="overload")
        self._last_id += 1
        labels = msgspec.json.encode(lesson.labels)
        head = ((WEIGHT, lesson.weight), (BIAS, lesson.bias))
        learn = protocol.Learn(
            id=self._last_id,
            kind=lesson.kind,
            labels_bytes=len(labels),
            arrays=tuple(
                protocol.ArrayHead(name=name, dtype=array.dtype, shape=array.shape, length=len(array.data))
                for name, array in head
            ),
            learning_rate=lesson.learning_rate,
            epochs=lesson.epochs,
            batch_size=lesson.batch_size,
            seed=lesson.seed,
        )
        future: asyncio.Future[Learned] = self._loop.create_future()
        self._lesson = (learn.id, lesson, future)
        try:
            self._send(learn, (labels, *(array.data for _, array in head)))
            return await future
        except asyncio.CancelledError:
            self._child.condemn("its lesson was given up")  # it would not hear of it before its end
            raise
        finally:
            self._lesson = None

    async def stop(self) -> None:
        """End and reap the child; kills it when it is at a lesson or does not end. Safe to call twice."""
        self._stopping = True
        if self._lesson is None and not self._child.is_gone:
            self._send(protocol.Stop(), ())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    await self._child.wait()
        await self.kill("it was stopped")

    async def kill(self, reason: str) -> None:
        """End the child at once and wait until it is reaped."""
        self._stopping = True
        self._child.condemn(reason)
        if self._link is None or not self._link.is_open:
            self._child.reap()
        await self._child.wait()

    def _send(self, header: protocol.ToTrainer, payload: Sequence[Buffer]) -> None:
        if self._link is not None:
            self._link.send(protocol.encode(header), payload)

    def _on_frame(self, header: bytes, payload: bytearray) -> None:
        try:
            self._take(protocol.decode_from_trainer(header), payload)
        except ProtocolViolation as error:
            self._child.condemn(error.message)

    def _on_clogged(self, is_clogged: bool) -> None:
        if is_clogged:
            self._flowing.clear()
        else:
            self._flowing.set()

    def _on_refused(self, error: ProtocolViolation) -> None:
        self._child.condemn(error.message)

    def _take(self, reply: protocol.FromTrainer, payload: bytearray) -> None:
        match reply:
            case protocol.Loaded():
                if not self._ready.done():
                    self._is_up = True
                    self._ready.set_result(reply)
            case protocol.LoadFailed():
                self._fail_ready(_error(reply.code, reply.message, reply.hint))
            case protocol.Learned():
                lesson, future = self._asked(reply.id)
                learned = Learned(arrays=_arrays(reply, payload, lesson), metrics=reply.metrics)
                if not future.done():
                    future.set_result(learned)
            case protocol.LearnFailed():
                _, future = self._asked(reply.id)
                if not future.done():
                    future.set_exception(_error(reply.code, reply.message, reply.hint))

    def _asked(self, lesson: int) -> tuple[Lesson, asyncio.Future[Learned]]:
        if self._lesson is None or self._lesson[0] != lesson:
            raise ProtocolViolation("the trainer answered what it was not asked", code="protocol.trainer")
        return self._lesson[1], self._lesson[2]

    def _watch_once(self) -> None:
        self._watch = self._loop.call_later(_WATCH_S, self._watch_once)
        rss, budget = self.rss_bytes(), self._options.memory_bytes
        if budget and rss > budget:
            self._child.condemn(f"it took {rss} bytes of memory, {budget} are allowed")

    def _on_gone(self, reason: str) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._link is not None:
            self._link.abort()
        self._flowing.set()
        lost = HostLost(f"the trainer ended: {reason}")
        if self._lesson is not None and not self._lesson[2].done():
            self._lesson[2].set_exception(lost)
        self._fail_ready(lost)
        if self._is_up and not self._stopping:
            self._on_lost(reason)

    def _fail_ready(self, error: ModelError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # nobody may be waiting any more


def _arrays(reply: protocol.Learned, payload: bytearray, lesson: Lesson) -> dict[str, Array]:
    """The arrays as the hub shall get them; raises ProtocolViolation unless they are the head that went in."""
    expected = {WEIGHT: lesson.weight.shape, BIAS: lesson.bias.shape} if lesson.kind == "train" else {}
    if {head.name: head.shape for head in reply.arrays} != expected:
        raise ProtocolViolation("the trainer's arrays are not the head that it was given", code="protocol.trainer")
    if sum(head.length for head in reply.arrays) != len(payload) or any(head.length < 0 for head in reply.arrays):
        raise ProtocolViolation("the trainer's answer does not fit its header", code="protocol.trainer")
    arrays, view, offset = {}, memoryview(payload), 0
    for head in reply.arrays:
        data = view[offset : offset + head.length]
        arrays[head.name] = Array(dtype=head.dtype, shape=head.shape, data=data)
        offset += head.length
    return arrays


def _error(code: str, message: str, hint: str) -> ModelError:
    leaf = CannotLearn if code.partition(".")[0] == CannotLearn.code else ModelError
    return leaf(message, code=code, hint=hint)
