"""Whole runs: the rounds room with real workers and stock Flower strategies, and devices that are functions.

What is killed here is the worker and the hub's whole room; the result must be the one of the undisturbed run.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cloud_hub.ground import audit
from cloud_hub.releases import tables
from cloud_hub.rounds import course, session
from cloud_hub.rounds.desk import Desk, Run
from shared.errors import Conflict
from shared.federated import Array, ArrayRecord, FlowerRecord, MetricRecord
from shared.ids import Digest
from shared.learned import check_learned_file
from shared.model import Learning
from shared.trust import repository
from shared.trust.library import CryptoSigner
from tests.fakes.round_room import FAMILY, RESULT, RoundRoom, altered, base_model, npy, refusal, spec

pytestmark = [pytest.mark.live, pytest.mark.timeout(120)]
pytest.importorskip("onnx")


@pytest.fixture
def room(tmp_path: Path) -> Iterator[RoundRoom]:
    room = RoundRoom(tmp_path)
    for number, classes in enumerate([(0, 1, 2, 3), (3, 4, 5, 6), (6, 7, 8, 9)]):
        room.fleet.add(f"dev-{number}", room.learner(seed=10 + number, classes=classes).answer)
    yield room
    room.close()


def head_of(room: RoundRoom) -> dict[str, Any]:
    """The learned head in the pushed result."""

    async def get() -> Any:
        return await room.releases.desk.catalogue.get(FAMILY, RESULT)

    row = asyncio.run(get())
    blob = room.releases.desk.blobs.find(row.push.model)
    assert blob is not None
    model = onnx.load(str(blob.path))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def hold(room: RoundRoom, **fields: Any) -> Run:
    """A run from start to end, undisturbed."""

    async def work() -> Run:
        async with room.open() as desk:
            started = await desk.start(spec(**fields), actor="token:test")
            return await room.until(desk, started.row.run, lambda run: run.row.finished_ms is not None)

    return asyncio.run(work())


def test_a_run_learns_a_head_that_becomes_a_model(room: RoundRoom) -> None:
    run = hold(room, rounds=5, evaluate=True)
    assert run.row.state == "finished", run.row.reason
    assert [result.round for result in run.results] == [1, 2, 3, 4, 5]
    assert all((result.asked, result.accepted) == (3, 3) for result in run.results)
    assert run.results[-1].metrics["accuracy"] > 0.9
    assert {"loss", "train.loss", "train.accuracy", "evaluate.accuracy"} <= set(run.results[-1].metrics)
    assert (room.root / "rounds" / run.row.run).exists() is False or not list((room.root / "rounds").glob("*/*.reply"))

    async def look() -> Any:
        return await room.releases.desk.catalogue.get(FAMILY, RESULT)

    row = asyncio.run(look())
    assert row.push.lineage.parent == f"{FAMILY}/1.0.0"
    assert row.push.lineage.parameters["run"] == run.row.run
    assert row.push.model == run.row.model
    actions = [entry.action for entry in room.releases.database.read_now(lambda c: audit.entries(c, after=0, limit=50))]
    assert [action for action in actions if action.startswith("round.")] == ["round.started", "round.finished"]


def test_a_learned_run_starts_from_the_bases_head_and_changes_nothing_else(room: RoundRoom) -> None:
    """What comes out is the base's file with other numbers, within the norm that the base's manifest allows."""
    releases, learned = room.releases, "1.1.0-learned.1"
    base = base_model(room.weights)
    bounds = Learning(variant="fp32", tensors=("w2", "b2"), max_shift=50.0)
    room.put_base(base, version="1.1.0", learning=bounds)
    releases.learned = CryptoSigner.generate_ed25519()
    room.fleet.devices.clear()
    for number in range(3):
        room.fleet.add(f"dev-{number}", room.learner(seed=10 + number).answer, version="1.1.0")

    async def allow() -> None:
        await releases.publish("1.1.0")
        current = releases.database.read_now(tables.newest_metadata)
        assert releases.learned is not None
        targets = repository.delegate_learned(
            repository.read_targets(current["targets"].document),
            FAMILY,
            releases.learned.public_key,
            now_ms=releases.clock.wall,
        )
        signed = repository.sign(targets, releases.operator.targets).decode()
        await releases.desk.publishing.change_keys({"targets": signed}, actor="token:admin")

    with pytest.raises(ExceptionGroup) as refused:
        hold(room, base="1.1.0", version=learned, learned=True)
    assert isinstance(refused.value.exceptions[0], Conflict)
    asyncio.run(allow())
    run = hold(room, base="1.1.0", version=learned, learned=True, rounds=2)
    assert run.row.state == "finished", run.row.reason
    assert run.results[0].metrics["accuracy"] > 0.9, "it began with the base's head"
    row = asyncio.run(releases.desk.catalogue.get(FAMILY, learned))
    assert row.push.learned_on == "1.1.0"
    made = releases.desk.blobs.read(row.push.model, max_bytes=len(base))
    shift = check_learned_file(memoryview(made), memoryview(base), tensors=bounds.tensors, max_shift=bounds.max_shift)
    assert shift > 0


def test_large_tasks_and_answers_travel_as_files(room: RoundRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_INLINE_BYTES", 100)
    room.fleet.uploads = True
    run = hold(room, rounds=2)
    assert run.row.state == "finished", run.row.reason
    assert all(result.accepted == 3 for result in run.results)
    blobs = {task.blob for _, task in room.fleet.asked}
    assert len(blobs) == 2, "one file for all devices of a round"
    assert all(not task.content for _, task in room.fleet.asked)
    assert not any(room.releases.desk.blobs.find(Digest(blob)) for blob in blobs), "old tasks pile up"


@pytest.mark.parametrize("strategy", ["fedprox", "fedyogi", "fedmedian", "fedtrimmedavg", "krum", "multikrum"])
def test_every_strategy_holds_a_run(room: RoundRoom, strategy: str) -> None:
    run = hold(room, rounds=2, strategy=strategy)
    assert run.row.state == "finished", run.row.reason
    assert all(array.dtype == np.float32 for array in head_of(room).values())


def test_devices_that_send_nonsense_do_not_hurt_the_run(room: RoundRoom) -> None:
    good = room.learner(seed=30)

    def wrong_shape(content: bytes) -> bytes:
        def change(records: dict[str, FlowerRecord]) -> None:
            odd = Array(dtype="float32", shape=(1, 1), data=npy(np.zeros((1, 1), np.float32)))
            records["arrays"] = ArrayRecord({"head.weight": odd, "head.bias": odd})

        return altered(good.answer(content), change)

    def not_a_number(content: bytes) -> bytes:
        def change(records: dict[str, FlowerRecord]) -> None:
            arrays = records["arrays"]
            assert isinstance(arrays, ArrayRecord)
            bias = Array(dtype="float32", shape=(10,), data=npy(np.full(10, np.nan, np.float32)))
            records["arrays"] = ArrayRecord({**arrays.arrays, "head.bias": bias})

        return altered(good.answer(content), change)

    def no_examples(content: bytes) -> bytes:
        def change(records: dict[str, FlowerRecord]) -> None:
            records["metrics"] = MetricRecord({"num-examples": 0, "loss": 1.0})

        return altered(good.answer(content), change)

    room.fleet.add("bad-1", wrong_shape)
    room.fleet.add("bad-2", not_a_number)
    room.fleet.add("bad-3", no_examples)
    room.fleet.add("bad-4", lambda _content: b"\xff\xfe nonsense")
    room.fleet.add("bad-5", refusal)
    run = hold(room, rounds=2)
    assert run.row.state == "finished", run.row.reason
    (first, _) = run.results
    assert (first.asked, first.answered, first.accepted) == (8, 8, 3)
    assert set(first.refused) == {f"bad-{number}" for number in range(1, 6)}
    assert first.refused["bad-5"] == "no samples"
    assert all(np.isfinite(array).all() for array in head_of(room).values())


def test_the_deadline_leaves_out_who_is_late_and_too_few_answers_end_the_run(room: RoundRoom) -> None:
    room.fleet.answers["dev-2"] = lambda _content: None
    run = hold(room, rounds=1, quorum=2, round_timeout_s=1.5)
    assert (run.row.state, run.results[0].asked, run.results[0].accepted) == ("finished", 3, 2), run.row.reason
    room.fleet.answers["dev-1"] = lambda _content: None
    run = hold(room, rounds=1, quorum=2, round_timeout_s=1.0, version="1.2.0")
    assert (run.row.state, run.row.code) == ("failed", "rounds.quorum")


async def _worker_pid(room: RoundRoom, run: str) -> int:
    """The process whose folder is the run's."""
    async with asyncio.timeout(20):
        while True:
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    if (entry / "cwd").readlink() == room.root / "rounds" / run:
                        return int(entry.name)
                except OSError:
                    continue
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_a_killed_worker_and_a_killed_hub_change_nothing_in_the_result(
    room: RoundRoom, tmp_path_factory: Any, strategy: str
) -> None:
    calm = hold(room, rounds=5, strategy=strategy)
    assert calm.row.state == "finished", calm.row.reason
    expected = head_of(room)
    fresh = RoundRoom(tmp_path_factory.mktemp("again"))
    fresh.fleet = room.fleet
    room.fleet.asked.clear()
    try:
        asyncio.run(_disturbed(fresh, strategy))
        found = head_of(fresh)
    finally:
        fresh.close()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name


async def _disturbed(room: RoundRoom, strategy: str) -> None:
    """Kill the worker in round 2 and the whole room in round 4, with one answer of that round still missing."""
    hold_back = asyncio.Event()
    real = room.fleet.answers["dev-1"]

    def silent_in(number: int) -> None:
        def answer(content: bytes) -> bytes | None:
            from shared.wire.flower import decode_message

            if not hold_back.is_set() and (decode_message(content).settings("config") or {})["server-round"] == number:
                return None
            return real(content)

        room.fleet.answers["dev-1"] = answer

    async with room.open() as desk:
        silent_in(2)
        run = (await desk.start(spec(rounds=5, strategy=strategy), actor="token:test")).row.run
        await _two_answers(room, desk, run, done=1)
        os.kill(await _worker_pid(room, run), signal.SIGKILL)
        hold_back.set()
        await room.until(desk, run, lambda found: found.row.round >= 2)
        hold_back.clear()
        silent_in(4)
        await _two_answers(room, desk, run, done=3)
    for name in room.fleet.devices:
        room.fleet.set_online(name, online=False)
    hold_back.set()
    room.fleet.asked.clear()
    async with room.open() as desk:
        for name in room.fleet.devices:
            await room.born(name)
            await asyncio.sleep(0.1)
        ended = await room.until(desk, run, lambda found: found.row.finished_ms is not None)
        assert ended.row.state == "finished", ended.row.reason
        asked = [name for name, task in room.fleet.asked if "-4t1-" in task.message]
        assert set(asked) == {"dev-1"}, "answers that were here were asked for again"


async def _two_answers(room: RoundRoom, desk: Desk, run: str, *, done: int) -> None:
    """Until the round after `done` has two of its three answers."""
    await room.until(desk, run, lambda found: found.row.round == done)
    group = f"-{done + 1}t1-"
    async with asyncio.timeout(20):
        while True:
            replied = room.releases.database.read_now(
                lambda conn: conn.exec_driver_sql(
                    f"select count(*) from round_tasks where message like '%{group}%' and replied_ms is not null"
                ).scalar_one()
            )
            if replied == 2:
                return
            await asyncio.sleep(0.02)


def test_a_worker_that_always_dies_ends_the_run(room: RoundRoom) -> None:
    async def work() -> Run:
        async with room.open() as desk:
            for name in room.fleet.devices:
                room.fleet.answers[name] = lambda _content: None
            run = (await desk.start(spec(), actor="token:test")).row.run
            while (await desk.get(run)).row.state == "running":
                try:
                    async with asyncio.timeout(10):
                        os.kill(await _worker_pid(room, run), signal.SIGKILL)
                except (ProcessLookupError, TimeoutError):
                    pass
                await asyncio.sleep(0.1)
            return await desk.get(run)

    run = asyncio.run(work())
    assert (run.row.state, run.row.code) == ("failed", "rounds.worker_lost")


def test_a_stopped_run_ends_its_worker_and_takes_no_more_answers(room: RoundRoom) -> None:
    async def work() -> None:
        async with room.open() as desk:
            room.fleet.answers["dev-0"] = lambda _content: None
            run = (await desk.start(spec(), actor="token:test")).row.run
            pid = await _worker_pid(room, run)
            stopped = await desk.stop(run, actor="token:test")
            assert stopped.row.state == "stopped"
            assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()
            assert not (room.root / "rounds" / run).exists()
            assert (await desk.stop(run, actor="token:test")).row.state == "stopped"

    asyncio.run(work())


def test_a_disk_that_refuses_holds_a_run_up_and_does_not_end_it(
    room: RoundRoom, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(course, "RETRY_S", 0.1)

    async def work() -> Run:
        async with room.open() as desk:
            run = (await desk.start(spec(rounds=2), actor="token:test")).row.run
            # A folder in the checkpoint's place: the worker cannot put the file there, as on a full disk.
            obstacle = room.root / "rounds" / run / "round-1.checkpoint"
            obstacle.mkdir(parents=True, exist_ok=True)
            (obstacle / "x").touch()
            async with asyncio.timeout(30):
                while "a run is held up" not in caplog.text:
                    await asyncio.sleep(0.05)
            (obstacle / "x").unlink()
            obstacle.rmdir()
            return await room.until(desk, run, lambda found: found.row.finished_ms is not None)

    assert asyncio.run(work()).row.state == "finished"
