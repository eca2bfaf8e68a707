"""Federated runs through the driver: what the hub, an application and a power cut see of a device's part in them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import pytest

from edge_agent.core.lessons import BIAS, WEIGHT
from edge_agent.core.training import WarmthOver
from edge_agent.driver import rounds
from edge_agent.driver.events import ForTraining
from shared.errors import InputRefused, ModelError
from shared.federated import (
    FAILED,
    PRECONDITION,
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigValue,
    FlowerMessage,
    Metadata,
    MetricRecord,
)
from shared.ids import Digest
from shared.inference import Control, Done, Teach, TensorHead
from shared.wire.flower import decode_message, encode_message
from shared.wire.messages import RoundReply, RoundTask
from tests.fakes.agent_world import AgentWorld, release, until
from tests.fakes.rounds import FakeSamples

HEAD = (TensorHead(name="x", dtype="fp32", shape=(1, 4)),)
ROWS = {"0": (1.0, 0.0, 0.5, 0.0), "1": (0.0, 1.0, 0.0, 0.5)}


def npy(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Array:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return Array(dtype="float32", shape=array.shape, data=stream.getvalue())


def content(message: str, *, kind: str = "train", rows: int = 4, **changes: ConfigValue) -> bytes:
    settings: dict[str, ConfigValue] = {
        "family": "digits",
        "version": "1.0.0",
        "features": "x",
        "labels": '["0", "1"]',
        "learning_rate": 0.5,
        "epochs": 5,
        "batch_size": 4,
        "seed": 1,
        **changes,
    }
    arrays = {WEIGHT: npy(np.zeros((rows, 2), np.float32)), BIAS: npy(np.zeros(2, np.float32))}
    return encode_message(
        FlowerMessage(
            metadata=Metadata(
                run_id=5, message_id=message, src_node_id=1, dst_node_id=7, group_id="1", message_type=kind
            ),
            content={"arrays": ArrayRecord(arrays), "config": ConfigRecord(settings)},
        )
    )


def task(message: str, *, deadline_ms: int = 10_000, run: str = "run-1", data: bytes | None = None) -> RoundTask:
    return RoundTask(
        run=run, message=message, deadline_ms=deadline_ms, content=content(message) if data is None else data
    )


async def serve(world: AgentWorld) -> None:
    world.arrive(world.publish(release(world, "1.0.0")))
    await until(lambda: world.models.routes().get("digits") is not None and world.models.routes()["digits"].up, "up")


async def teach(world: AgentWorld, labels: Sequence[str] = ("0", "1", "0", "1")) -> None:
    for label in labels:
        payload = np.array(ROWS[label], dtype=np.float32).tobytes()
        reply = await world.ask(Teach(model="digits", inputs=HEAD, label=label, id="t"), payload)
        assert isinstance(reply, Done)


async def answers(world: AgentWorld, count: int) -> list[RoundReply]:
    await until(lambda: len(world.hub.answers) >= count, f"{count} answers")
    return world.hub.answers


def send(world: AgentWorld, sent: RoundTask) -> None:
    world.hub.send("round", sent, kind="round_task")


def refusal(reply: RoundReply) -> str:
    error = decode_message(reply.content).error
    assert error is not None
    assert error.code == PRECONDITION
    return error.reason


def test_a_task_is_learned_from_the_samples_that_were_taught() -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        send(world, task("m1"))
        (reply,) = await answers(world, 1)
        assert (reply.run, reply.message) == ("run-1", "m1")
        message = decode_message(reply.content)
        assert message.error is None
        assert (message.metadata.reply_to_message_id, message.metadata.dst_node_id) == ("m1", 1)
        assert (message.metadata.src_node_id, message.metadata.group_id) == (7, "1")
        arrays = message.arrays("arrays")
        assert arrays is not None
        assert np.load(io.BytesIO(arrays[WEIGHT].data), allow_pickle=False).any()
        assert message.content is not None
        metrics = message.content["metrics"]
        assert isinstance(metrics, MetricRecord)
        assert metrics.metrics["num-examples"] == 4
        assert metrics.metrics["accuracy"] == 1.0
        send(world, task("m2", data=content("m2", kind="evaluate")))
        _, measured = await answers(world, 2)
        assert list(decode_message(measured.content).content or {}) == ["metrics"]

    world.life(story)
    (trainer,) = world.trainers.started
    assert trainer.stopped


def test_the_trainer_is_warm_within_a_run_and_is_fed_only_what_is_new() -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        send(world, task("m1"))
        await answers(world, 1)
        await teach(world, ("1",))
        send(world, task("m2"))
        await answers(world, 2)
        (trainer,) = world.trainers.started
        assert (len(trainer.samples), trainer.newest, len(trainer.lessons)) == (5, 5, 2)
        send(world, task("m3", run="run-2"))
        await answers(world, 3)
        assert len(world.trainers.started) == 2
        await until(lambda: trainer.stopped, "the first run's trainer ends")
        assert world.rounds.trainer_pid
        world.inbox.post(ForTraining(WarmthOver()))
        await until(lambda: world.trainers.started[1].stopped, "the trainer ends when it is not needed")
        assert world.rounds.trainer_pid == 0

    world.life(story)


def test_what_made_room_is_forgotten_by_the_trainer_too() -> None:
    world = AgentWorld()
    world.samples = FakeSamples(max_samples=3)

    async def story() -> None:
        await serve(world)
        await teach(world)
        send(world, task("m1"))
        await answers(world, 1)
        await teach(world, ("0", "1"))
        send(world, task("m2"))
        await answers(world, 2)
        (trainer,) = world.trainers.started
        assert sorted(trainer.samples) == [4, 5, 6]

    world.life(story)


def test_a_repeated_task_is_answered_from_what_is_kept_also_after_a_power_cut() -> None:
    world = AgentWorld()

    async def learn() -> None:
        await serve(world)
        await teach(world)
        send(world, task("m1"))
        await answers(world, 1)
        send(world, task("m1"))
        await answers(world, 2)

    async def again() -> None:
        await until(lambda: world.uplink.online, "online")
        send(world, task("m1"))
        await answers(world, 3)

    world.life(learn, clean=False)
    world.life(again)
    assert len({reply.content for reply in world.hub.answers}) == 1
    assert sum(len(trainer.lessons) for trainer in world.trainers.started) == 1


def test_an_answer_that_could_not_be_sent_is_sent_when_the_hub_asks_again() -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        world.broker.go_down()
        await world.rounds.on_task(task("m1"))
        await until(lambda: ("run-1", "m1") in world.replies.kept, "the answer is kept")
        assert world.hub.answers == []
        world.broker.up = True
        await world.ask(Control(command="queue.flush"))
        await until(lambda: world.uplink.online, "online")
        await world.rounds.on_task(task("m1"))
        await answers(world, 1)

    world.life(story)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (content("m", version="2.0.0"), "1.0.0 is installed here"),
        (content("m", features="absent"), "no output 'absent'"),
        (content("m", labels='["7", "8"]'), "no sample"),
        (content("m", family="cats"), "no release of 'cats'"),
        (b"\x0a\x05ab", "not protobuf"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(data: bytes, why: str) -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        send(world, task("m", data=data))
        (reply,) = await answers(world, 1)
        assert why in refusal(reply)
        assert decode_message(reply.content).metadata.reply_to_message_id == "m"

    world.life(story)


def test_a_device_without_samples_or_with_training_switched_off_refuses() -> None:
    world = AgentWorld()

    async def without_samples() -> None:
        await serve(world)
        send(world, task("m1"))
        (reply,) = await answers(world, 1)
        assert "no samples" in refusal(reply)

    async def switched_off() -> None:
        await until(lambda: world.uplink.online, "online")
        with pytest.raises(ModelError, match="does not learn"):
            await teach(world)
        send(world, task("m2"))
        _, reply = await answers(world, 2)
        assert "switched off" in refusal(reply)

    world.life(without_samples)
    world.learns = False
    world.life(switched_off)
    assert world.trainers.started == []


def test_a_deadline_ends_the_lesson_and_the_next_task_goes_on() -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        world.trainers.hang = True
        send(world, task("m1", deadline_ms=50))
        send(world, task("m2"))
        await until(lambda: bool(world.trainers.started and world.trainers.started[0].lessons), "it learns")
        world.trainers.hang = False
        late, done = await answers(world, 2)
        assert "deadline" in refusal(late)
        assert decode_message(done.content).error is None
        await until(lambda: world.trainers.started[0].stopped, "the late one is ended")

    world.life(story)


def test_a_trainer_that_dies_is_told_and_replaced() -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        world.trainers.hang = True
        send(world, task("m1"))
        await until(lambda: bool(world.trainers.started and world.trainers.started[0].lessons), "it learns")
        world.trainers.started[0].crash("ended by SIGSEGV")
        (reply,) = await answers(world, 1)
        error = decode_message(reply.content).error
        assert error is not None
        assert error.code == FAILED
        assert "SIGSEGV" in error.reason
        world.trainers.hang = False
        send(world, task("m2"))
        _, reply = await answers(world, 2)
        assert decode_message(reply.content).error is None

    world.life(story)


def test_large_tasks_are_fetched_and_large_answers_uploaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "INLINE_BYTES", 100)
    world = AgentWorld()
    data = content("m1")
    digest = Digest(hashlib.sha256(data).hexdigest())
    large = RoundTask(run="run-1", message="m1", deadline_ms=10_000, blob=digest, length=len(data))

    async def story() -> None:
        await serve(world)
        await teach(world)
        world.fetcher.away = True
        send(world, large)
        await world.rounds.on_task(large)  # left to the hub: it says it again
        world.fetcher.away = False
        world.fetcher.files[digest] = data
        await world.rounds.on_task(large)
        (reply,) = await answers(world, 1)
        uploaded = world.fetcher.uploads["/v1/rounds/run-1/replies/m1"]
        assert (reply.content, reply.blob) == (b"", hashlib.sha256(uploaded).hexdigest())
        assert reply.length == len(uploaded)
        assert decode_message(uploaded).error is None
        assert not world.tasks.has(digest)

    world.life(story)


def test_a_disk_that_refuses_an_answer_keeps_it_from_being_sent() -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        world.replies.refuses = True
        send(world, task("m1"))
        await until(lambda: world.replies.refused > 0, "the disk has refused its answer")
        world.replies.refuses = False
        send(world, task("m2"))
        (reply,) = await answers(world, 1)
        assert reply.message == "m2"

    world.life(story)


@pytest.mark.parametrize(
    "bad",
    [
        RoundTask(run="../x", message="m", deadline_ms=1, content=b"x"),
        RoundTask(run="r", message="", deadline_ms=1, content=b"x"),
        RoundTask(run="r", message="m", deadline_ms=1, blob="0" * 64, length=2**40),
        RoundTask(run="r", message="m", deadline_ms=1),
    ],
)
def test_a_task_that_cannot_be_is_left_alone(bad: RoundTask) -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        send(world, bad)
        send(world, task("m1"))
        (reply,) = await answers(world, 1)
        assert reply.message == "m1"

    world.life(story)


def test_a_sample_must_fit_the_model() -> None:
    world = AgentWorld()

    async def story() -> None:
        with pytest.raises(ModelError, match="no release of 'digits'"):
            await teach(world)
        await serve(world)
        with pytest.raises(InputRefused, match="no label"):
            await world.ask(Teach(model="digits", inputs=HEAD, label="7"), bytes(16))
        with pytest.raises(InputRefused):
            await world.ask(Teach(model="digits", inputs=HEAD, label="1"), bytes(15))
        await teach(world)
        dropped = await world.ask(Control(command="samples.drop", argument="digits"))
        assert isinstance(dropped, Done)
        assert dropped.detail == "4 samples dropped"
        assert await world.samples.load("digits") == ()

    world.life(story)
