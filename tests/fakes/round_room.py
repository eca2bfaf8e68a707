"""The rounds room on real parts (database, releases room, workers with Flower) with devices that are functions.

Each device holds samples of its own, trains a softmax head on the base's features with plain numpy, and answers in
Flower's format through the codec that devices use.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cloud_hub.devices.desk import Device
from cloud_hub.ground.bus import DeviceBorn
from cloud_hub.ground.post import Post
from cloud_hub.ground.system import SystemClock
from cloud_hub.releases import tables as release_tables
from cloud_hub.releases.rules import BuildReport
from cloud_hub.rounds.desk import Desk, Run, Spec
from shared.federated import Array, ArrayRecord, FlowerError, FlowerRecord, MetricRecord, reply_to
from shared.ids import DeviceId, FamilyName, ModelVersion
from shared.model import (
    FileRef,
    Golden,
    Learning,
    Manifest,
    Signature,
    TensorSpec,
    Variant,
    encode_manifest,
    target_path,
)
from shared.trust.repository import release_files
from shared.wire.envelope import decode_envelope
from shared.wire.flower import decode_message, encode_message
from shared.wire.messages import RoundReply, RoundTask, expect
from tests.fakes import classifier
from tests.fakes.hub_parts import envelope_of
from tests.fakes.release_room import ReleaseRoom

BASE = ModelVersion("1.0.0")
RESULT = ModelVersion("1.1.0")
FAMILY = FamilyName("digits")
HIDDEN = 32

Floats = NDArray[np.float32]
Answer = Callable[[bytes], bytes | None]


def base_model(weights: classifier.Weights, *, offer_features: bool = True) -> bytes:
    """The classifier with its hidden layer as a second output."""
    model = onnx.load_from_string(classifier.export(weights))
    if offer_features:
        model.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["rows", HIDDEN]))
    data: bytes = model.SerializeToString()
    return data


def npy(array: Any) -> bytes:
    """An array as .npy bytes."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


@dataclass(slots=True)
class Learner:
    """A device's samples as features, and how it trains on them."""

    features: Floats
    labels: NDArray[np.int64]

    def answer(self, content: bytes) -> bytes:
        """The reply to a task."""
        message = decode_message(content)
        config = message.settings("config") or {}
        arrays = message.arrays("arrays") or {}
        weight, bias = (np.load(io.BytesIO(bytes(arrays[name].data))) for name in ("head.weight", "head.bias"))
        random = np.random.default_rng(int(config["seed"]))  # type: ignore[arg-type]
        rate, size = float(config["learning_rate"]), int(config["batch_size"])  # type: ignore[arg-type]
        if message.metadata.message_type == "train":
            for _ in range(int(config["epochs"])):  # type: ignore[arg-type]
                order = random.permutation(len(self.labels))
                for rows in (order[start : start + size] for start in range(0, len(order), size)):
                    error = softmax(self.features[rows] @ weight + bias)
                    error[np.arange(len(rows)), self.labels[rows]] -= 1
                    weight = (weight - rate * self.features[rows].T @ error / len(rows)).astype(np.float32)
                    bias = (bias - rate * error.mean(axis=0)).astype(np.float32)
        scores = softmax(self.features @ weight + bias)
        metrics = MetricRecord(
            {
                "num-examples": len(self.labels),
                "loss": float(-np.log(scores[np.arange(len(scores)), self.labels] + 1e-9).mean()),
                "accuracy": float((scores.argmax(axis=1) == self.labels).mean()),
            }
        )
        outcome: dict[str, FlowerRecord] = {"metrics": metrics}
        if message.metadata.message_type == "train":
            outcome["arrays"] = ArrayRecord(
                {
                    name: Array(dtype=str(array.dtype), shape=array.shape, data=npy(array))
                    for name, array in (("head.weight", weight), ("head.bias", bias))
                }
            )
        return encode_message(reply_to(message.metadata, outcome, created_at=message.metadata.created_at))


def softmax(scores: Any) -> Any:
    """Rows of probabilities."""
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def refusal(content: bytes, *, code: int = 6, reason: str = "no samples") -> bytes:
    """An error reply."""
    message = decode_message(content)
    return encode_message(reply_to(message.metadata, FlowerError(code, reason), created_at=1.0))


def altered(content: bytes, change: Callable[[dict[str, FlowerRecord]], None]) -> bytes:
    """A reply with its records changed."""
    message = decode_message(content)
    records = dict(message.content or {})
    change(records)
    return encode_message(msgspec.structs.replace(message, content=records))


@dataclass(slots=True)
class Fleet:
    """The devices room as far as rounds ask, and the devices themselves.

    Attributes:
        answers: by device, what it says to a task; None says nothing.
        asked: messages in the order of their coming, with repetitions.
        uploads: whether answers come over HTTPS.
    """

    devices: dict[str, Device] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, RoundTask]] = field(default_factory=list)
    uploads: bool = False

    async def list(
        self, *, after: str = "", limit: int = 500, labels: Mapping[str, str] | None = None
    ) -> tuple[Device, ...]:
        """As the devices' desk."""
        wanted = (labels or {}).items()
        names = sorted(name for name, device in self.devices.items() if wanted <= device.labels.items())
        return tuple(self.devices[name] for name in names if name > after)[:limit]

    def add(self, name: str, answer: Answer, *, version: str = BASE, labels: Mapping[str, str] | None = None) -> None:
        """A device that is here and serves this version."""
        self.devices[name] = Device(
            id=DeviceId(name),
            profile="pi",
            labels=labels or {},
            enrolled_ms=0,
            online=True,
            last_seen_ms=None,
            boot=1,
            agent_version="",
            assignment_version=1,
            reported_ms=1,
            reported={"models": [{"family": FAMILY, "version": version, "phase": "committed"}]},
        )
        self.answers[name] = answer

    def set_online(self, name: str, *, online: bool) -> None:
        """Come or go."""
        self.devices[name] = replace(self.devices[name], online=online)


class RoundRoom:
    """Everything together; `close` when done."""

    def __init__(self, root: Path) -> None:
        self.releases = ReleaseRoom(root)
        self.root = root
        self.fleet = Fleet()
        self.desk: Desk | None = None
        self._posted: asyncio.Queue[tuple[str, RoundTask]] = asyncio.Queue()
        weights = classifier.train(rounds=30)
        self.weights = weights
        self.put_base(base_model(weights))

    def close(self) -> None:
        """End the database's threads."""
        self.releases.close()

    def features(self, pixels: Any) -> Floats:
        """What the base makes of pixels."""
        x = (pixels * classifier.SCALE - classifier.MEAN) / classifier.STD
        hidden: Floats = np.maximum(x @ self.weights.w1 + self.weights.b1, 0).astype(np.float32)
        return hidden

    def learner(self, *, seed: int, classes: tuple[int, ...] = tuple(range(10)), rows: int = 200) -> Learner:
        """Samples of these classes."""
        pixels, labels = classifier.samples(rows * 5, seed=seed)
        chosen = np.isin(labels, classes).nonzero()[0][:rows]
        return Learner(self.features(pixels[chosen]), labels[chosen])

    def put_base(
        self,
        model: bytes,
        *,
        version: str = BASE,
        outputs: tuple[str, ...] = ("scores", "r"),
        learning: Learning | None = None,
    ) -> None:
        """A version that is ready, without building it; one that may be learned on has a manifest, to be released."""
        golden = classifier.golden(300, seed=99)
        push = self.releases.push(model=model, golden=golden, version=ModelVersion(version))
        sizes = {"scores": 10, "r": HIDDEN}
        signature = Signature(
            inputs=(TensorSpec(name="pixels", dtype="fp32", shape=(-1, 64)),),
            outputs=tuple(TensorSpec(name=name, dtype="fp32", shape=(-1, sizes[name])) for name in outputs),
        )

        def work(conn: Any) -> None:
            release_tables.begin_build(conn, push, build=1, at_ms=1, actor="test")
            row = release_tables.find_model(conn, FAMILY, version)
            assert row is not None
            counters, floor = release_tables.family_counters(conn, FAMILY)
            file = FileRef(path=target_path(FAMILY, ModelVersion(version), "fp32.onnx"), length=1, digest=push.model)
            files: tuple[FileRef, ...] = (file,)
            if learning is not None:
                file = FileRef(path=file.path, length=len(model), digest=push.model)
                at = target_path(FAMILY, ModelVersion(version), "golden.bin")
                manifest = Manifest(
                    family=FAMILY, version=ModelVersion(version), release_counter=max(counters, default=0) + 1,
                    min_release_counter=floor, task="classification", signature=signature,
                    preparations=push.preparations, labels=push.labels,
                    golden=Golden(
                        file=FileRef(path=at, length=len(golden), digest=push.golden), samples=300, min_agreement=0.9
                    ),
                    variants=(Variant(name="fp32", runtime="onnx", file=file, accuracy=1.0, answers=(0,) * 300),),
                    learning=learning,
                )  # fmt: skip
                self.releases.desk.blobs.put(encode_manifest(manifest))
                files = release_files(manifest)
            release_tables.finish_build(
                conn, row, state="ready", report=BuildReport(signature=signature), at_ms=2,
                counters=(max(counters, default=0) + 1, floor), files=files,
            )  # fmt: skip

        self.releases.database.write_now(work)

    @contextlib.asynccontextmanager
    async def open(self, *, holds: bool = True) -> AsyncIterator[Desk]:
        """A start of the hub over the same data; leaving it is as sudden as being killed. `holds` holds runs, too."""
        self._posted = asyncio.Queue()
        desk = Desk(
            data=self.root,
            database=self.releases.database,
            clock=SystemClock(),
            metrics=type(self.releases.metrics)(),
            post=Post(publish=self._publish, clock=SystemClock()),
            bus=self.releases.bus,
            devices=self.fleet,  # type: ignore[arg-type]
            releases=self.releases.desk,
        )
        self.desk = desk
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._devices(desk)), group.create_task(self._build())]
            if holds:
                tasks.append(group.create_task(desk.run()))
            try:
                yield desk
            finally:
                for task in tasks:
                    task.cancel()

    async def born(self, name: str) -> None:
        """A device connects."""
        self.fleet.set_online(name, online=True)
        await self.releases.bus.publish(DeviceBorn(device=DeviceId(name), assignment_version=1, boot=1))

    async def until(self, desk: Desk, run: str, holds: Callable[[Run], bool], *, within_s: float = 50.0) -> Run:
        """The run once this holds."""
        async with asyncio.timeout(within_s):
            while True:
                found = await desk.get(run)
                if holds(found):
                    return found
                await asyncio.sleep(0.02)

    async def _publish(self, topic: str, payload: bytes, *, qos: int = 1) -> None:
        name = topic.split("/")[2]
        assert topic == f"outrider/1/{name}/down/round"
        self._posted.put_nowait((name, expect(decode_envelope(payload), RoundTask)))

    async def _devices(self, desk: Desk) -> None:
        while True:
            name, task = await self._posted.get()
            self.fleet.asked.append((name, task))
            if not self.fleet.devices[name].online:
                continue
            content = task.content
            if task.blob:
                found = self.releases.desk.blobs.find(task.blob)  # type: ignore[arg-type]
                assert found is not None
                content = found.path.read_bytes()
            said = await asyncio.to_thread(self.fleet.answers[name], content)
            if said is None:
                continue
            reply = RoundReply(run=task.run, message=task.message, content=said)
            if self.fleet.uploads:
                await desk.upload(
                    DeviceId(name), run=task.run, message=task.message, length=len(said), pieces=_pieces(said)
                )
                digest = hashlib.sha256(said).hexdigest()
                reply = RoundReply(run=task.run, message=task.message, blob=digest, length=len(said))
            await desk.replied(DeviceId(name), envelope_of(reply, device=name), reply)

    async def _build(self) -> None:
        """Stands for the build of the result: ready as soon as it is pushed."""
        while True:
            for row in await self.releases.database.read(release_tables.list_building):
                file = FileRef(path=target_path(FAMILY, row.version, "fp32.onnx"), length=1, digest=row.push.model)

                def work(conn: Any, row: Any = row, file: Any = file) -> None:
                    counters, floor = release_tables.family_counters(conn, FAMILY)
                    release_tables.finish_build(
                        conn, row, state="ready", report=BuildReport(), at_ms=3,
                        counters=(max(counters, default=0) + 1, floor), files=(file,),
                    )  # fmt: skip

                await self.releases.database.write(work)
            await asyncio.sleep(0.05)


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1000):
        yield data[start : start + 1000]


def spec(**fields: Any) -> Spec:
    """A short run."""
    given: dict[str, Any] = {
        "family": FAMILY,
        "base": BASE,
        "version": RESULT,
        "rounds": 3,
        "min_devices": 3,
        "round_timeout_s": 20.0,
        "learning_rate": 0.2,
        "seed": 7,
    }
    return Spec(**{**given, **fields})
