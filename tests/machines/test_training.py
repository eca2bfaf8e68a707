"""The training machine, event by event; and what a task may ask for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_agent.core import lessons, training
from edge_agent.core.lessons import BIAS, WEIGHT, CannotLearn, read_task
from edge_agent.core.serving import Route
from edge_agent.core.slot_values import Installed
from edge_agent.core.training import (
    MAX_WAITING_TASKS,
    WARM_MS,
    ContentHere,
    ContentMissing,
    DeadlinePassed,
    EndTrainer,
    FetchContent,
    GiveUp,
    KeepWarm,
    LeaveToHub,
    Replied,
    Reply,
    ReplyAgain,
    StartDeadline,
    StopDeadline,
    StopWarmth,
    Task,
    TaskArrived,
    Training,
    TrainingEffect,
    TrainingEvent,
    TrainingPhase,
    WarmthOver,
    Work,
    Worked,
)
from shared.errors import InputRefused, ProtocolViolation
from shared.federated import (
    PRECONDITION,
    Array,
    ArrayRecord,
    ConfigRecord,
    ConfigValue,
    FlowerError,
    FlowerMessage,
    Metadata,
    MetricRecord,
)
from shared.inference import TensorHead
from tests.machines.slot_parts import model

DONE: Any = {"metrics": MetricRecord({"loss": 0.5})}


def task(message: str = "m1", *, until_ms: int = 1_000, blob: str = "", content: bytes = b"x") -> Task:
    return Task(run="r", message=message, until_ms=until_ms, content=b"" if blob else content, blob=blob, length=1)


def arrived(wanted: Task, *, answered: bool = False, now_ms: int = 0) -> TaskArrived:
    return TaskArrived(task=wanted, answered=answered, now_ms=now_ms)


def play(*events: TrainingEvent, state: Training | None = None) -> tuple[Training, list[TrainingEffect]]:
    """The state after these events, and the effects of the last one."""
    after, effects = state or Training(), []
    for event in events:
        decision = training.decide(after, event)
        after, effects = decision.state, list(decision.effects)
    return after, effects


def test_a_task_is_learned_answered_and_the_trainer_kept_warm() -> None:
    one = task()
    state, effects = play(arrived(one))
    assert effects == [StopWarmth(), StartDeadline(one.key, 1_000), Work(one)]
    state, effects = play(Worked(one.key, DONE), state=state)
    light = msgspec.structs.replace(one, content=b"")
    assert effects == [StopDeadline(), Reply(light, DONE)]
    assert state.phase is TrainingPhase.REPLYING
    state, effects = play(Replied(one.key, 10), state=state)
    assert (state, effects) == (Training(), [KeepWarm(WARM_MS)])
    assert play(WarmthOver(), state=state) == (Training(), [EndTrainer()])


def test_what_was_answered_is_answered_again_and_not_learned_twice() -> None:
    one = task()
    assert play(arrived(one, answered=True)) == (Training(), [ReplyAgain(one)])
    state, _ = play(arrived(task("m2")))
    assert play(arrived(one, answered=True), state=state) == (state, [ReplyAgain(one)])


def test_a_repeated_task_is_taken_once() -> None:
    state, _ = play(arrived(task()), arrived(task("m2")))
    assert [waiting.message for waiting in state.waiting] == ["m2"]
    for repeated in (task(), task("m2")):
        assert play(arrived(repeated, answered=True), state=state) == (state, [])


def test_tasks_wait_in_order_and_what_is_too_much_is_left_to_the_hub() -> None:
    names = [f"m{number}" for number in range(MAX_WAITING_TASKS + 2)]
    state, effects = play(*(arrived(task(name)) for name in names))
    assert effects == [LeaveToHub(task(names[-1]), "too many tasks wait")]
    assert [waiting.message for waiting in state.waiting] == names[1:-1]
    state, effects = play(Worked(("r", "m0"), DONE), Replied(("r", "m0"), 5), state=state)
    assert state.task == task("m1")
    assert effects == [StartDeadline(("r", "m1"), 995), Work(task("m1"))]


def test_a_large_task_is_fetched_first() -> None:
    one = task(blob="ab")
    state, effects = play(arrived(one))
    assert effects[-1] == FetchContent(one)
    state, effects = play(ContentHere(one.key, b"content"), state=state)
    assert effects == [Work(msgspec.structs.replace(one, content=b"content"))]


@pytest.mark.parametrize("retry", [True, False])
def test_a_task_that_cannot_be_fetched_is_refused_or_left_to_the_hub(retry: bool) -> None:
    one = task(blob="ab")
    missing = ContentMissing(key=one.key, reason="away", retry=retry, now_ms=5)
    state, effects = play(arrived(one), missing)
    if retry:
        assert (state, effects) == (Training(), [StopDeadline(), LeaveToHub(one, "away"), KeepWarm(WARM_MS)])
    else:
        assert state.phase is TrainingPhase.REPLYING
        assert effects == [StopDeadline(), Reply(one, FlowerError(PRECONDITION, "away"))]


@pytest.mark.parametrize("blob", ["", "ab"])
def test_a_deadline_ends_the_work_with_words(blob: str) -> None:
    one = task(blob=blob)
    state, effects = play(arrived(one), DeadlinePassed(one.key))
    assert isinstance(effects[0], GiveUp)
    assert isinstance(effects[1], Reply)
    assert isinstance(effects[1].outcome, FlowerError)
    assert "deadline" in effects[1].outcome.reason
    # What the work still says changes nothing.
    assert play(Worked(one.key, DONE), state=state) == (state, [])


def test_a_task_whose_deadline_passed_while_it_waited_is_not_begun() -> None:
    state, effects = play(arrived(task()), arrived(task("m2")), Worked(("r", "m1"), DONE), Replied(("r", "m1"), 1_000))
    assert state.phase is TrainingPhase.REPLYING
    assert [type(effect) for effect in effects] == [Reply]


def test_news_of_another_task_changes_nothing() -> None:
    other = ("r", "other")
    fetching, _ = play(arrived(task(blob="ab")))
    working, _ = play(arrived(task()))
    replying, _ = play(Worked(("r", "m1"), DONE), state=working)
    events: list[TrainingEvent] = [
        ContentHere(other, b""),
        ContentMissing(key=other, reason="", retry=False, now_ms=0),
        Worked(other, DONE),
        Replied(other, 0),
        DeadlinePassed(other),
    ]
    for state in (Training(), fetching, working, replying):
        for event in events:
            assert play(event, state=state) == (state, [])
    for state in (fetching, working, replying):
        assert play(WarmthOver(), state=state) == (state, [])


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a" * 129, "a b", "-a"])
def test_a_name_that_is_no_part_of_a_path_is_refused(name: str) -> None:
    with pytest.raises(ProtocolViolation):
        training.check_name(name)
    assert training.check_name("run-1.train_0") == "run-1.train_0"


@pytest.mark.parametrize(("digest", "length"), [("", 1), ("0" * 64, 0), ("0" * 64, 2**40), ("x", 1)])
def test_a_blob_that_cannot_be_is_refused(digest: str, length: int) -> None:
    with pytest.raises(ProtocolViolation):
        training.check_blob(digest, length)
    assert training.check_blob("0" * 64, 1) == "0" * 64


# What a task asks for

SETTINGS: dict[str, ConfigValue] = {
    "family": "digits",
    "version": "1.0.0",
    "features": "hidden",
    "labels": '["0", "1", "2"]',
    "learning_rate": 0.5,
    "epochs": 2,
    "batch_size": 16,
    "seed": 7,
}


def head(features: int = 4, classes: int = 3) -> dict[str, Array]:
    return {
        WEIGHT: Array(dtype="float32", shape=(features, classes), data=b""),
        BIAS: Array(dtype="float32", shape=(classes,), data=b""),
    }


def message(
    *, kind: str = "train", round_name: str = "1", arrays: dict[str, Array] | None = None, **changes: ConfigValue | None
) -> FlowerMessage:
    settings = {key: value for key, value in {**SETTINGS, **changes}.items() if value is not None}
    return FlowerMessage(
        metadata=Metadata(message_type=kind, group_id=round_name),
        content={"config": ConfigRecord(settings), "arrays": ArrayRecord(head() if arrays is None else arrays)},
    )


def routes(version: str = "1.0.0") -> dict[str, Route]:
    made = model(version)
    release = Installed(
        manifest=made.manifest, manifest_digest=made.manifest_digest, variant="fp32", assignment_version=1
    )
    return {"digits": Route(release=release, up=True), "empty": Route()}


def test_a_task_is_read() -> None:
    study = read_task(message(), routes=routes(), device="a")
    assert study.features == "hidden"
    assert study.release.manifest.version == "1.0.0"
    lesson = study.lesson
    assert (lesson.kind, lesson.labels) == ("train", ("0", "1", "2"))
    assert (lesson.learning_rate, lesson.epochs, lesson.batch_size) == (0.5, 2, 16)
    as_list = read_task(message(labels=["0", "1", "2"], kind="evaluate.head"), routes=routes(), device="a")
    assert (as_list.lesson.kind, as_list.lesson.labels) == ("evaluate", lesson.labels)


def test_chance_differs_by_seed_device_and_round_and_by_nothing_else() -> None:
    def seed(*, device: str = "a", **changes: Any) -> int:
        return read_task(message(**changes), routes=routes(), device=device).lesson.seed

    seeds = [seed(), seed(device="b"), seed(round_name="2"), seed(seed=8)]
    assert len(set(seeds)) == 4
    assert all(0 <= number < 2**64 for number in seeds)
    assert seed(epochs=9) == seed()
    assert seed(round_name="1t7") == seed(round_name="1t0") == seed()  # another attempt at the same round


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"family": "cats"}, "no release of 'cats'"),
        ({"family": "empty"}, "no release of 'empty'"),
        ({"version": "2.0.0"}, "1.0.0 is installed here, the run needs 2.0.0"),
        ({"features": None}, "'features' is missing"),
        ({"features": 5}, "'features' is missing"),
        ({"labels": "{}"}, "no JSON list"),
        ({"labels": None}, "no list of names"),
        ({"labels": [1, 2]}, "no list of names"),
        ({"labels": '["a"]'}, "2 to"),
        ({"labels": '["a", "a", "b"]'}, "distinct"),
        ({"learning_rate": float("nan")}, "no number"),
        ({"learning_rate": -1.0}, "possible is"),
        ({"learning_rate": True}, "no number"),
        ({"epochs": 0}, "possible is"),
        ({"epochs": 10**9}, "possible is"),
        ({"batch_size": 1.5}, "no whole number"),
        ({"kind": "query"}, "asks for nothing known"),
        ({"arrays": {}}, "the arrays are"),
        ({"arrays": head(classes=4)}, "expected are"),
        ({"arrays": head(features=0)}, "expected are"),
    ],
)
def test_what_cannot_be_learned_here_is_said(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CannotLearn, match=why):
        read_task(message(**changes), routes=routes(), device="a")


def test_a_model_that_takes_several_rows_only_is_not_taught() -> None:
    known = routes()
    release = known["digits"].release
    assert release is not None
    (spec,) = release.manifest.signature.inputs
    for rows, fixed in ((1, False), (8, True)):
        several = msgspec.structs.replace(
            release.manifest.signature, inputs=(msgspec.structs.replace(spec, shape=(rows, *spec.shape[1:])),)
        )
        manifest = msgspec.structs.replace(release.manifest, signature=several, labels=("a", "b"))
        changed = {"digits": Route(release=msgspec.structs.replace(release, manifest=manifest), up=True)}
        one = (TensorHead(name=spec.name, dtype=spec.dtype, shape=(1, *spec.shape[1:])),)
        if not fixed:
            assert read_task(message(), routes=changed, device="a")
            lessons.check_sample(manifest, one, payload_bytes=16, label="a")
            continue
        with pytest.raises(CannotLearn, match="8 rows at once"):
            read_task(message(), routes=changed, device="a")
        with pytest.raises(InputRefused, match="8 rows at once"):
            lessons.check_sample(manifest, one, payload_bytes=16, label="a")


def test_a_message_without_its_records_is_refused() -> None:
    bare = FlowerMessage(metadata=Metadata(message_type="train"), error=FlowerError(1, "?"))
    with pytest.raises(CannotLearn, match="needs a record"):
        read_task(bare, routes=routes(), device="a")


def test_a_sample_is_one_row_of_what_the_model_takes_with_a_label_of_its_own() -> None:
    manifest = routes()["digits"].release.manifest  # type: ignore[union-attr]
    manifest = msgspec.structs.replace(manifest, labels=("a", "b"))
    (spec,) = manifest.signature.inputs
    row = (TensorHead(name=spec.name, dtype=spec.dtype, shape=(1, *spec.shape[1:])),)
    lessons.check_sample(manifest, row, payload_bytes=16, label="a")
    assert lessons.fits(manifest.signature, row, 16)
    assert not lessons.fits(manifest.signature, row, 15)
    two = (TensorHead(name=spec.name, dtype=spec.dtype, shape=(2, *spec.shape[1:])),)
    for inputs, size, label in ((row, 16, "c"), (row, 16, ""), (row, 15, "a"), (two, 32, "a")):
        with pytest.raises(InputRefused):
            lessons.check_sample(manifest, inputs, payload_bytes=size, label=label)
    assert not lessons.fits(manifest.signature, two, 32)


def test_the_records_of_an_answer() -> None:
    assert list(lessons.records("train", head(), {"loss": 1.0})) == ["arrays", "metrics"]
    assert list(lessons.records("evaluate", {}, {"loss": 1.0})) == ["metrics"]
