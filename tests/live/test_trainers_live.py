"""Trainers as real processes: what they learn, warmth, crashes, limits, and nothing left behind; and three devices."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_agent.adapters import trainers as adapter
from edge_agent.adapters.children import sweep_orphans
from edge_agent.adapters.trainers import LiveTrainer, LiveTrainers, TrainerOptions
from edge_agent.core.lessons import BIAS, WEIGHT, CannotLearn, Lesson
from edge_agent.ports import Learned, Sample
from edge_agent.trainers import head, npy
from shared.errors import HostLost, ModelError
from shared.federated import Array
from shared.inference import TensorHead
from shared.limits import MIB
from shared.model import Preparation
from shared.tensors import prepare
from tests.conftest import ROOT
from tests.fakes import classifier
from tests.fakes.releases import Build, build

pytestmark = pytest.mark.live
HIDDEN = 48
LABELS = tuple("0123456789")
PREPARATION = Preparation(input="pixels", scale=1 / 16, mean=(0.5,), std=(0.25,))
HEADS = (TensorHead(name="pixels", dtype="fp32", shape=(1, classifier.PIXELS)),)

Work = Callable[[LiveTrainer], Awaitable[None]]


def backbone() -> Build:
    """A raw model with frozen random features `hidden` and scores on top of them."""
    random = np.random.default_rng(5)
    weights = {
        "w1": random.normal(0, 0.3, (classifier.PIXELS, HIDDEN)).astype(np.float32),
        "b1": np.zeros(HIDDEN, np.float32),
        "w2": random.normal(0, 0.1, (HIDDEN, 10)).astype(np.float32),
        "b2": np.zeros(10, np.float32),
    }
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["pixels", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["hidden"]),
            helper.make_node("Gemm", ["hidden", "w2", "b2"], ["scores"]),
        ],
        "backbone",
        [value("pixels", TensorProto.FLOAT, [None, classifier.PIXELS])],
        [value("scores", TensorProto.FLOAT, [None, 10]), value("hidden", TensorProto.FLOAT, [None, HIDDEN])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    golden = {"pixels": classifier.samples(8, seed=9)[0]}
    return build(graph, golden=golden, preparations=(PREPARATION,))


def quantized(made: Build) -> Build:
    """The same model as static int8 in QDQ form."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    pixels = prepare(PREPARATION, made.manifest.signature.inputs[0], classifier.samples(200, seed=11)[0])

    rows = [{"pixels": pixels}]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return rows.pop() if rows else None

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(made.model)
        quantize_static(str(source), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        data = target.read_bytes()
    file = msgspec.structs.replace(made.variant.file, length=len(data))
    variant = msgspec.structs.replace(made.variant, name="int8", file=file)
    return Build(manifest=msgspec.structs.replace(made.manifest, variants=(variant,)), model=data, golden=made.golden)


def taught(rows: int, *, seed: int, only: Sequence[int] = range(10), first: int = 1) -> list[Sample]:
    """Samples as an application taught them."""
    pixels, labels = classifier.samples(rows * 10, seed=seed)
    chosen = [index for index, label in enumerate(labels) if label in only][:rows]
    return [
        Sample(number=first + place, label=str(labels[index]), inputs=HEADS, payload=pixels[index].tobytes())
        for place, index in enumerate(chosen)
    ]


def lesson(before: head.Head, *, kind: str = "train", seed: int = 3, epochs: int = 2) -> Lesson:
    return Lesson(
        kind=kind,  # type: ignore[arg-type]
        labels=LABELS,
        weight=Array(dtype="float32", shape=before.weight.shape, data=npy.write(before.weight)),
        bias=Array(dtype="float32", shape=before.bias.shape, data=npy.write(before.bias)),
        learning_rate=0.02,
        epochs=epochs,
        batch_size=16,
        seed=seed,
    )


def fresh() -> head.Head:
    return head.Head(np.zeros((HIDDEN, 10), np.float32), np.zeros(10, np.float32))


def learned(told: Learned) -> head.Head:
    return head.Head(
        npy.read(told.arrays[WEIGHT].data, shape=(HIDDEN, 10), what="w"),
        npy.read(told.arrays[BIAS].data, shape=(10,), what="b"),
    )


async def start(
    tmp_path: Path, made: Build, *, features: str = "hidden", lost: list[str] | None = None, memory_bytes: int = 0
) -> LiveTrainer:
    options = TrainerOptions(memory_bytes=memory_bytes, python=sys.executable)
    trainers = LiveTrainers(directory=tmp_path / "hosts", options=options)
    model_fd, golden_fd = made.open(tmp_path)
    os.close(golden_fd)
    on_lost = (lost if lost is not None else []).append
    return await trainers.start(
        manifest=made.manifest, variant=made.variant, features=features, model_fd=model_fd, on_lost=on_lost
    )


def play(tmp_path: Path, work: Work, *, made: Build | None = None, memory_bytes: int = 0) -> list[str]:
    """Start a trainer, do the work, stop it; returns what `on_lost` was told."""
    lost: list[str] = []

    async def main() -> None:
        trainer = await start(tmp_path, made or backbone(), lost=lost, memory_bytes=memory_bytes)
        try:
            async with asyncio.timeout(40):
                await work(trainer)
        finally:
            await trainer.stop()
        assert not Path(f"/proc/{trainer.pid}").exists()
        assert [path.name for path in (tmp_path / "hosts").iterdir()] == ["empty"]

    asyncio.run(main())
    return lost


def test_what_is_learned_is_what_the_arithmetic_says(tmp_path: Path) -> None:
    samples = taught(150, seed=1)

    async def work(trainer: LiveTrainer) -> None:
        await trainer.feed(samples, newest=150, forget_before=1)
        told = await trainer.learn(lesson(fresh()))
        assert told.metrics["num-examples"] == 150
        assert told.metrics["accuracy"] > 0.9
        expected = reference(samples)
        assert np.allclose(learned(told).weight, expected.weight, atol=1e-4)
        measured = await trainer.learn(lesson(learned(told), kind="evaluate"))
        assert measured.arrays == {}
        assert measured.metrics["accuracy"] == pytest.approx(told.metrics["accuracy"])
        again = await trainer.learn(lesson(fresh()))
        assert bytes(again.arrays[WEIGHT].data) == bytes(told.arrays[WEIGHT].data)

    assert play(tmp_path, work) == []


def test_features_may_come_from_a_quantized_model(tmp_path: Path) -> None:
    async def work(trainer: LiveTrainer) -> None:
        await trainer.feed(taught(150, seed=1), newest=150, forget_before=1)
        assert (await trainer.learn(lesson(fresh()))).metrics["accuracy"] > 0.85

    play(tmp_path, work, made=quantized(backbone()))


def reference(samples: Sequence[Sample]) -> head.Head:
    made = backbone()
    pixels = np.stack([np.frombuffer(sample.payload, dtype=np.float32) for sample in samples])
    import onnxruntime

    session = onnxruntime.InferenceSession(made.model, providers=["CPUExecutionProvider"])
    features = session.run(["hidden"], {"pixels": prepare(PREPARATION, made.manifest.signature.inputs[0], pixels)})[0]
    classes = np.array([int(sample.label) for sample in samples])
    return head.learn(fresh(), features, classes, head.Descent(0.02, 2, 16, 3))


def test_a_warm_trainer_takes_what_is_new_and_forgets_what_is_old(tmp_path: Path) -> None:
    async def work(trainer: LiveTrainer) -> None:
        assert trainer.newest == 0
        await trainer.feed(taught(50, seed=1), newest=50, forget_before=1)
        await trainer.feed(taught(30, seed=2, first=51), newest=80, forget_before=11)
        assert trainer.newest == 80
        assert (await trainer.learn(lesson(fresh()))).metrics["num-examples"] == 70
        await trainer.feed([], newest=90, forget_before=81)
        with pytest.raises(CannotLearn, match="no sample"):
            await trainer.learn(lesson(fresh()))
        await trainer.feed(taught(20, seed=3, first=91), newest=110, forget_before=81)
        assert (await trainer.learn(lesson(fresh()))).metrics["num-examples"] == 20

    play(tmp_path, work)


def test_it_is_nicer_than_what_serves_and_has_one_thread(tmp_path: Path) -> None:
    async def work(trainer: LiveTrainer) -> None:
        await trainer.feed(taught(50, seed=1), newest=50, forget_before=1)
        await trainer.learn(lesson(fresh()))
        fields = Path(f"/proc/{trainer.pid}/stat").read_text().rpartition(")")[2].split()
        assert int(fields[16]) >= os.nice(0) + 10 or int(fields[16]) == 19
        assert int(fields[17]) == 1

    play(tmp_path, work)


def test_a_lesson_that_cannot_be_is_refused_and_the_next_one_is_done(tmp_path: Path) -> None:
    async def work(trainer: LiveTrainer) -> None:
        await trainer.feed(taught(30, seed=1), newest=30, forget_before=1)
        junk = msgspec.structs.replace(
            lesson(fresh()), weight=Array(dtype="float32", shape=(HIDDEN, 10), data=b"\x80\x04junk")
        )
        with pytest.raises(CannotLearn, match="npy array"):
            await trainer.learn(junk)
        narrow = head.Head(np.zeros((7, 10), np.float32), np.zeros(10, np.float32))
        with pytest.raises(CannotLearn, match="48 wide, the head expects 7"):
            await trainer.learn(lesson(narrow))
        assert (await trainer.learn(lesson(fresh()))).metrics["num-examples"] == 30

    assert play(tmp_path, work) == []


def test_a_model_without_the_output_or_with_other_bytes_is_refused(tmp_path: Path) -> None:
    made = backbone()
    with pytest.raises(CannotLearn, match="no output 'absent'"):
        asyncio.run(start(tmp_path, made, features="absent"))
    with pytest.raises(ModelError):
        asyncio.run(start(tmp_path, msgspec.structs.replace(made, model=b"x" * len(made.model))))
    assert [path.name for path in (tmp_path / "hosts").iterdir()] == ["empty"]


def test_a_killed_trainer_is_told_to_who_waits_and_to_the_owner(tmp_path: Path) -> None:
    async def work(trainer: LiveTrainer) -> None:
        await trainer.feed(taught(100, seed=1), newest=100, forget_before=1)
        learning = asyncio.get_running_loop().create_task(trainer.learn(lesson(fresh(), epochs=1_000)))
        await asyncio.sleep(0.05)
        os.kill(trainer.pid, signal.SIGKILL)
        with pytest.raises(HostLost, match="SIGKILL"):
            await learning
        with pytest.raises(HostLost):
            await trainer.learn(lesson(fresh()))

    (reason,) = play(tmp_path, work)
    assert "SIGKILL" in reason


def test_a_long_lesson_can_be_stopped(tmp_path: Path) -> None:
    async def work(trainer: LiveTrainer) -> None:
        await trainer.feed(taught(300, seed=1), newest=300, forget_before=1)
        learning = asyncio.get_running_loop().create_task(trainer.learn(lesson(fresh(), epochs=1_000)))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await trainer.stop()
        assert time.monotonic() - began < 5
        with pytest.raises(HostLost):
            await learning

    assert play(tmp_path, work) == []


def test_a_lesson_that_was_given_up_ends_the_trainer_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_GRACE_S", 60.0)

    async def work(trainer: LiveTrainer) -> None:
        await trainer.feed(taught(300, seed=1), newest=300, forget_before=1)
        learning = asyncio.get_running_loop().create_task(trainer.learn(lesson(fresh(), epochs=1_000)))
        while trainer._lesson is None:
            await asyncio.sleep(0)
        os.kill(trainer.pid, signal.SIGSTOP)  # a lesson without end, which does not listen either
        learning.cancel()
        async with asyncio.timeout(20):
            with pytest.raises(asyncio.CancelledError):
                await learning
            await trainer.stop()

    play(tmp_path, work)


def test_samples_are_handed_over_no_faster_than_they_are_taken(tmp_path: Path) -> None:
    wide = TensorHead(name="pixels", dtype="fp32", shape=(1, 256 * 1024))
    many = [Sample(number=number, label="1", inputs=(wide,), payload=bytes(MIB)) for number in range(1, 33)]

    async def work(trainer: LiveTrainer) -> None:
        os.kill(trainer.pid, signal.SIGSTOP)
        feeding = asyncio.get_running_loop().create_task(trainer.feed(many, newest=32, forget_before=1))
        while trainer._flowing.is_set():
            await asyncio.sleep(0)
        transport = trainer._link._transport if trainer._link is not None else None
        assert transport is not None
        assert transport.get_write_buffer_size() <= 9 * MIB
        assert not feeding.done()
        feeding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await feeding
        async with asyncio.timeout(20):
            await trainer.stop()
            with pytest.raises(HostLost):
                await trainer.feed(many, newest=32, forget_before=1)

    play(tmp_path, work)


def test_a_trainer_beyond_its_memory_is_killed(tmp_path: Path) -> None:
    async def work(trainer: LiveTrainer) -> None:
        while Path(f"/proc/{trainer.pid}").exists():
            await asyncio.sleep(0.02)

    try:
        (reason,) = play(tmp_path, work, memory_bytes=2**20)
    except HostLost as error:  # before it was ready
        reason = error.message
    assert "of memory" in reason


CORE = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.live.test_trainers_live import backbone, fresh, lesson, start, taught
async def main():
    trainer = await start(Path(sys.argv[2]), backbone())
    await trainer.feed(taught(200, seed=1), newest=200, forget_before=1)
    learning = asyncio.get_running_loop().create_task(trainer.learn(lesson(fresh(), epochs=1000)))
    await asyncio.sleep(0)
    print(trainer.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_kill_9_of_the_core_takes_a_busy_trainer_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CORE, str(ROOT), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as core:
        assert core.stdout is not None
        pid = int(core.stdout.readline())
        assert is_alive(pid)
        core.kill()
        core.wait(timeout=10)
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the trainer outlived its core"
        time.sleep(0.02)


def test_a_trainer_that_outlived_its_core_is_swept(tmp_path: Path) -> None:
    lookalike = [sys.executable, "-c", "import time; time.sleep(60)", "edge_agent.trainers"]
    with subprocess.Popen(lookalike) as orphan:
        try:
            proc = Path(f"/proc/{orphan.pid}")
            deadline = time.monotonic() + 10
            while b"edge_agent.trainers" not in (proc / "cmdline").read_bytes():  # the new program is not there at once
                assert time.monotonic() < deadline
                time.sleep(0.01)
            fields = (proc / "stat").read_text().rpartition(")")[2].split()
            (tmp_path / str(orphan.pid)).write_text(f"{fields[19]}\n")
            assert sweep_orphans(tmp_path) == 1
            assert orphan.wait(timeout=10) == -signal.SIGKILL
        finally:
            orphan.kill()


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that nobody reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_three_devices_learn_together_what_none_of_them_learns_alone(tmp_path: Path) -> None:
    """Each device has seen other digits; averaged after each round, their heads know all of them."""
    made = backbone()
    shares = (range(4), range(4, 7), range(7, 10))
    unseen = taught(400, seed=99)
    rounds = 12

    async def main() -> tuple[float, list[float]]:
        trainers = [await start(tmp_path, made) for _ in shares]
        judge = await start(tmp_path, made)
        await judge.feed(unseen, newest=400, forget_before=1)

        async def judged(one: head.Head) -> float:
            return (await judge.learn(lesson(one, kind="evaluate"))).metrics["accuracy"]

        try:
            for place, (trainer, share) in enumerate(zip(trainers, shares, strict=True)):
                await trainer.feed(taught(120, seed=20 + place, only=share), newest=120, forget_before=1)
            alone = [fresh() for _ in trainers]
            together = fresh()
            for number in range(rounds):
                for place, trainer in enumerate(trainers):
                    alone[place] = learned(await trainer.learn(lesson(alone[place], seed=number)))
                told = [await trainer.learn(lesson(together, seed=number)) for trainer in trainers]
                weights = [one.metrics["num-examples"] for one in told]
                heads = [learned(one) for one in told]
                together = head.Head(
                    np.average([one.weight for one in heads], axis=0, weights=weights).astype(np.float32),
                    np.average([one.bias for one in heads], axis=0, weights=weights).astype(np.float32),
                )
            return await judged(together), [await judged(one) for one in alone]
        finally:
            for trainer in (*trainers, judge):
                await trainer.stop()

    together, alone = asyncio.run(main())
    print(f"together {together:.3f}, alone {[round(one, 3) for one in alone]}")
    assert together > 0.85
    assert together > max(alone) + 0.3
    assert together > float(np.mean(alone)) + 0.4
