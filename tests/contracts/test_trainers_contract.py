"""What every implementation of ports.Trainers must do, on the fake and on real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.adapters.trainers import LiveTrainers
from edge_agent.core.lessons import BIAS, WEIGHT, CannotLearn, Lesson
from edge_agent.ports import Sample, Trainer, Trainers
from edge_agent.trainers import head, npy
from shared.errors import HostLost, ModelError
from shared.federated import Array
from shared.inference import TensorHead
from tests.fakes.releases import Build, build
from tests.fakes.rounds import FakeTrainer, FakeTrainers

pytestmark = pytest.mark.live

WIDTH = 4
HEADS = (TensorHead(name="x", dtype="fp32", shape=(1, WIDTH)),)
LABELS = ("a", "b")

Story = Callable[["Kit", Trainer], Awaitable[None]]


def plain() -> Build:
    """A model whose features are its inputs, as the fake's are."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["features"]), helper.make_node("MatMul", ["x", "w"], ["scores"])],
        "plain",
        [value("x", TensorProto.FLOAT, [None, WIDTH])],
        [value("scores", TensorProto.FLOAT, [None, 2]), value("features", TensorProto.FLOAT, [None, WIDTH])],
        [numpy_helper.from_array(np.ones((WIDTH, 2), np.float32), "w")],
    )
    return build(graph, golden={"x": np.ones((2, WIDTH), np.float32)})


class Kit:
    """Trainers of one kind, and how one of them is made to hang or to crash."""

    def __init__(self, trainers: Trainers, folder: Path) -> None:
        self.trainers = trainers
        self.lost: list[str] = []
        self._folder = folder
        self._made = plain()

    async def start(self, features: str = "features") -> Trainer:
        """Start one; its descriptor must be closed by then, whatever comes of it."""
        model_fd, golden_fd = self._made.open(self._folder)
        os.close(golden_fd)
        try:
            return await self.trainers.start(
                manifest=self._made.manifest,
                variant=self._made.variant,
                features=features,
                model_fd=model_fd,
                on_lost=self.lost.append,
            )
        finally:
            with pytest.raises(OSError, match="descriptor"):
                os.fstat(model_fd)

    def hang(self, trainer: Trainer) -> None:
        """Its lessons do not end from now on."""
        if isinstance(self.trainers, FakeTrainers):
            self.trainers.hang = True
        else:
            os.kill(trainer.pid, signal.SIGSTOP)

    def crash(self, trainer: Trainer) -> None:
        """It ends as a killed process does."""
        if isinstance(trainer, FakeTrainer):
            trainer.crash()
        else:
            os.kill(trainer.pid, signal.SIGKILL)


@pytest.fixture(params=["fake", "processes"])
def kit(request: pytest.FixtureRequest, tmp_path: Path) -> Kit:
    """Each implementation in turn."""
    fake = request.param == "fake"
    return Kit(FakeTrainers() if fake else LiveTrainers(directory=tmp_path / "hosts"), tmp_path)


def play(kit: Kit, story: Story) -> None:
    """Start a trainer, play, stop it."""

    async def main() -> None:
        async with asyncio.timeout(40):
            trainer = await kit.start()
            try:
                await story(kit, trainer)
            finally:
                await trainer.stop()

    asyncio.run(main())


def samples(*labels: str, first: int = 1) -> list[Sample]:
    rows = {"a": (1.0, 0.0, 0.5, 0.0), "b": (0.0, 1.0, 0.0, 0.5), "elsewhere": (9.0, 9.0, 9.0, 9.0)}
    return [
        Sample(number=number, label=label, inputs=HEADS, payload=np.array(rows[label], np.float32).tobytes())
        for number, label in enumerate(labels, start=first)
    ]


def lesson(*, kind: str = "train", before: head.Head | None = None) -> Lesson:
    before = before or fresh()
    return Lesson(
        kind=kind,  # type: ignore[arg-type]
        labels=LABELS,
        weight=Array(dtype="float32", shape=before.weight.shape, data=npy.write(before.weight)),
        bias=Array(dtype="float32", shape=before.bias.shape, data=npy.write(before.bias)),
        learning_rate=0.5,
        epochs=5,
        batch_size=2,
        seed=7,
    )


def fresh() -> head.Head:
    return head.Head(np.zeros((WIDTH, 2), np.float32), np.zeros(2, np.float32))


def test_what_is_learned_is_what_the_arithmetic_says_each_time(kit: Kit) -> None:
    async def story(_kit: Kit, trainer: Trainer) -> None:
        taught = samples("a", "b", "elsewhere", "a")
        await trainer.feed(taught, newest=4, forget_before=1)
        assert trainer.newest == 4
        used = [sample for sample in taught if sample.label in LABELS]
        rows = np.stack([np.frombuffer(sample.payload, np.float32) for sample in used])
        classes = np.array([LABELS.index(sample.label) for sample in used])
        expected = head.learn(fresh(), rows, classes, head.Descent(0.5, 5, 2, 7))
        for _ in range(2):
            told = await trainer.learn(lesson())
            assert told.arrays.keys() == {WEIGHT, BIAS}
            weight = npy.read(told.arrays[WEIGHT].data, shape=(WIDTH, 2), what="weight")
            assert np.allclose(weight, expected.weight, atol=1e-5)
            assert told.metrics["num-examples"] == 3
        measured = await trainer.learn(lesson(kind="evaluate", before=expected))
        assert measured.arrays == {}
        assert measured.metrics["accuracy"] == 1.0

    play(kit, story)
    assert kit.lost == []


def test_samples_are_added_and_forgotten_by_number(kit: Kit) -> None:
    async def story(_: Kit, trainer: Trainer) -> None:
        assert trainer.newest == 0
        with pytest.raises(CannotLearn):
            await trainer.learn(lesson())
        await trainer.feed(samples("a", "b"), newest=2, forget_before=1)
        await trainer.feed(samples("a", "b", first=3), newest=9, forget_before=2)
        assert trainer.newest == 9
        assert (await trainer.learn(lesson())).metrics["num-examples"] == 3
        await trainer.feed([], newest=9, forget_before=9)
        with pytest.raises(CannotLearn):
            await trainer.learn(lesson())

    play(kit, story)


def test_an_output_that_is_not_there_is_the_tasks_fault(kit: Kit) -> None:
    async def main() -> None:
        with pytest.raises(CannotLearn, match="absent"):
            await kit.start("absent")

    asyncio.run(main())
    assert kit.lost == []


def test_one_lesson_at_a_time(kit: Kit) -> None:
    async def story(kit: Kit, trainer: Trainer) -> None:
        await trainer.feed(samples("a", "b"), newest=2, forget_before=1)
        kit.hang(trainer)
        learning = asyncio.ensure_future(trainer.learn(lesson()))
        await asyncio.sleep(0)
        with pytest.raises(ModelError) as caught:
            await trainer.learn(lesson())
        assert caught.value.code == "overload"
        await trainer.stop()
        with pytest.raises(HostLost):
            await learning

    play(kit, story)
    assert kit.lost == []


def test_a_crash_is_told_to_who_waits_and_once_to_the_owner(kit: Kit) -> None:
    async def story(kit: Kit, trainer: Trainer) -> None:
        await trainer.feed(samples("a", "b"), newest=2, forget_before=1)
        kit.hang(trainer)
        learning = asyncio.ensure_future(trainer.learn(lesson()))
        await asyncio.sleep(0)
        kit.crash(trainer)
        with pytest.raises(HostLost):
            await learning
        await ended(trainer)
        assert len(kit.lost) == 1

    play(kit, story)
    assert len(kit.lost) == 1


def test_a_lesson_that_is_given_up_ends_the_trainer(kit: Kit) -> None:
    async def story(kit: Kit, trainer: Trainer) -> None:
        await trainer.feed(samples("a", "b"), newest=2, forget_before=1)
        kit.hang(trainer)
        learning = asyncio.ensure_future(trainer.learn(lesson()))
        await asyncio.sleep(0)
        learning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await learning
        with pytest.raises(HostLost):
            await trainer.learn(lesson())
        await ended(trainer)

    play(kit, story)


def test_what_was_stopped_stays_so(kit: Kit) -> None:
    async def story(_: Kit, trainer: Trainer) -> None:
        await trainer.stop()
        await trainer.stop()
        await ended(trainer)

    play(kit, story)
    assert kit.lost == []


async def ended(trainer: Trainer) -> None:
    """It takes nothing any more."""
    with pytest.raises(HostLost):
        await trainer.learn(lesson())
    with pytest.raises(HostLost):
        await trainer.feed(samples("a"), newest=1, forget_before=1)
