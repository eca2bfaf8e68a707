"""What a device's part in federated runs stands on, in memory: samples, kept answers, trainers without processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence

import numpy as np

from edge_agent.core.lessons import BIAS, WEIGHT, CannotLearn, Lesson
from edge_agent.ports import Learned, Sample
from edge_agent.trainers import head, npy
from shared.errors import HostLost, InvalidValue, ModelError, StorageError
from shared.federated import Array
from shared.model import Manifest, Variant


class FakeSamples:
    """`ports.Samples` without a disk; passing it to a new owner is a restart."""

    def __init__(self, *, max_samples: int = 2_000, max_bytes: int = 16 * 2**20) -> None:
        self._max_samples, self._max_bytes = max_samples, max_bytes
        self._kept: dict[str, list[Sample]] = {}
        self._last = 0

    async def keep(self, family: str, sample: Sample, *, at_ms: int) -> int:
        """Keep it, the oldest making room."""
        if len(sample.payload) > self._max_bytes:
            raise InvalidValue("too large", code="invalid.sample")
        kept = self._kept.setdefault(family, [])
        self._last += 1
        kept.append(Sample(label=sample.label, inputs=sample.inputs, payload=sample.payload, number=self._last))
        while len(kept) > self._max_samples or sum(_size(one) for one in kept) > self._max_bytes:
            kept.pop(0)
        return self._last

    async def load(self, family: str, *, after: int = 0, at_most: int = 256) -> tuple[Sample, ...]:
        """Those with higher numbers."""
        return tuple(sample for sample in self._kept.get(family, []) if sample.number > after)[:at_most]

    async def oldest(self, family: str) -> int:
        """The oldest one's number."""
        kept = self._kept.get(family)
        return kept[0].number if kept else 0

    async def drop(self, family: str) -> int:
        """Forget them."""
        return len(self._kept.pop(family, []))


def _size(sample: Sample) -> int:
    return len(sample.payload) + len(sample.label) + 20


class FakeReplies:
    """`ports.RoundReplies` without a disk; `refuses` makes the disk refuse, `refused` counts how often it did."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.refuses = False
        self.refused = 0

    async def load(self, run: str, message: str) -> bytes | None:
        """The kept answer."""
        found = self.kept.get((run, message))
        return None if found is None else found[1]

    async def keep(self, run: str, message: str, content: bytes, *, at_ms: int) -> None:
        """Keep it, and forget older ones."""
        if self.refuses:
            self.refused += 1
            raise StorageError("the disk refuses")
        old = [key for key, (kept_ms, _) in self.kept.items() if key[0] == run or kept_ms < at_ms - 86_400_000]
        for key in old:
            del self.kept[key]
        self.kept[run, message] = (at_ms, content)


class FakeTrainers:
    """`ports.Trainers` in this process: features are the sample's own float32 values.

    Attributes:
        started: every trainer that was started, in order.
        hang: while set, lessons do not end.
    """

    def __init__(self) -> None:
        self.started: list[FakeTrainer] = []
        self.hang = False

    async def start(
        self, *, manifest: Manifest, variant: Variant, features: str, model_fd: int, on_lost: Callable[[str], None]
    ) -> FakeTrainer:
        """Start one; the output `absent` is none that the model has."""
        os.close(model_fd)
        await asyncio.sleep(0)
        if features == "absent":
            raise CannotLearn("the model has no output 'absent'")
        trainer = FakeTrainer(self, pid=20_000 + len(self.started), on_lost=on_lost)
        self.started.append(trainer)
        return trainer


class FakeTrainer:
    """`ports.Trainer` with the real arithmetic."""

    def __init__(self, room: FakeTrainers, *, pid: int, on_lost: Callable[[str], None]) -> None:
        self._room = room
        self._pid = pid
        self._on_lost = on_lost
        self._newest = 0
        self._lesson: asyncio.Future[None] | None = None
        self.samples: dict[int, Sample] = {}
        self.lessons: list[Lesson] = []
        self.stopped = False

    @property
    def pid(self) -> int:
        """A number no process has."""
        return self._pid

    @property
    def newest(self) -> int:
        """Up to where it was fed."""
        return self._newest

    async def feed(self, samples: Sequence[Sample], *, newest: int, forget_before: int) -> None:
        """Take them."""
        if self.stopped:
            raise HostLost("the trainer is not running")
        self._newest = newest
        self.samples.update({sample.number: sample for sample in samples})
        self.samples = {number: sample for number, sample in self.samples.items() if number >= forget_before}

    async def learn(self, lesson: Lesson) -> Learned:
        """Learn here and now."""
        if self.stopped:
            raise HostLost("the trainer is not running")
        if self._lesson is not None and not self._lesson.done():
            raise ModelError("the trainer is at another lesson", code="overload")
        self.lessons.append(lesson)
        self._lesson = asyncio.get_running_loop().create_future()
        if not self._room.hang:
            self._lesson.set_result(None)
        try:
            await self._lesson
        except asyncio.CancelledError:
            if not self.stopped:
                self.crash("its lesson was given up")
            raise
        chosen = [sample for _, sample in sorted(self.samples.items()) if sample.label in lesson.labels]
        if not chosen:
            raise CannotLearn("the device has no sample with one of the run's labels")
        rows = np.stack([np.frombuffer(sample.payload, dtype=np.float32) for sample in chosen])
        classes = np.array([lesson.labels.index(sample.label) for sample in chosen])
        before = head.Head(
            npy.read(lesson.weight.data, shape=lesson.weight.shape, what=WEIGHT),
            npy.read(lesson.bias.data, shape=lesson.bias.shape, what=BIAS),
        )
        if lesson.kind == "evaluate":
            return Learned(arrays={}, metrics=head.measure(before, rows, classes))
        descent = head.Descent(lesson.learning_rate, lesson.epochs, lesson.batch_size, lesson.seed)
        after = head.learn(before, rows, classes, descent)
        arrays = {
            name: Array(dtype="float32", shape=array.shape, data=npy.write(array))
            for name, array in ((WEIGHT, after.weight), (BIAS, after.bias))
        }
        return Learned(arrays=arrays, metrics=head.measure(after, rows, classes))

    async def stop(self) -> None:
        """End without news."""
        self.stopped = True
        self._fail("it was stopped")

    def crash(self, reason: str = "ended by SIGKILL") -> None:
        """End as a killed process does."""
        self.stopped = True
        self._fail(reason)
        self._on_lost(reason)

    def _fail(self, reason: str) -> None:
        if self._lesson is not None and not self._lesson.done():
            self._lesson.set_exception(HostLost(f"the trainer ended: {reason}"))
