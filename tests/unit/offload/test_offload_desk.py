"""Models are loaded on first use, let go when others are asked for, and answer each caller with its own rows."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from cloud_hub.offload import desk as desk_room
from cloud_hub.offload import engine as engine_room
from cloud_hub.offload import served
from cloud_hub.offload.desk import FAILURE_US, Answered, Ask, Desk, OffloadSettings, Overload
from shared.errors import InputRefused, ModelError, OutriderError, StorageError
from shared.tensors import from_wire, to_wire
from tests.fakes.offload_room import Shelf, now_us, running
from tests.fakes.releases import sign_classifier


def ask(*values: tuple[float, ...], model: str = "sign", version: str = "", within_ms: int = 10_000) -> Ask:
    heads, payload = to_wire({"x": np.array(values, dtype=np.float32)})
    began = now_us()
    return Ask(model, version, heads, tuple(payload), began, began + within_ms * 1000)


def scores(answered: Answered) -> list[list[float]]:
    said = answered.said
    table: list[list[float]] = from_wire(said.outputs, b"".join(said.payload))["scores"].tolist()
    return table


def sample(metrics: Any, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def outcome_of(desk: Desk, one: Ask) -> str:
    """`answered`, or the code of what went wrong."""
    try:
        await desk.infer(one)
    except OutriderError as error:
        return error.code
    return "answered"


async def all_of(desk: Desk, asks: list[Ask]) -> list[Answered]:
    return await asyncio.gather(*(desk.infer(one) for one in asks))


class Gateway:
    """Holds an engine in its run until let go, so that a test decides what waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.sizes: list[int] = []
        inner = engine_room.Engine.answer

        def answer(made: engine_room.Engine, requests: Any) -> Any:
            self.sizes.append(len(requests))
            self.entered.set()
            assert self.go.wait(20)
            return inner(made, requests)

        monkeypatch.setattr(engine_room.Engine, "answer", answer)


def test_many_callers_at_once_each_get_exactly_their_own_rows() -> None:
    async def story() -> None:
        async with running(Shelf(sign=sign_classifier())) as (desk, metrics):
            await desk.infer(ask((0, 0)))  # loads it: fewer may wait for that
            asks = [ask(*((n + 0.25, k) for k in range(n % 4 + 1))) for n in range(200)]
            for number, answered in enumerate(await all_of(desk, asks)):
                assert scores(answered) == [[number + 0.25 - k, k - number - 0.25] for k in range(number % 4 + 1)]
                assert len(answered.said.labels) == number % 4 + 1
                assert answered.deadline_met
            batches = sample(metrics, "outrider_hub_offload_batch_rows_count")
            assert sample(metrics, "outrider_hub_offload_batch_rows_sum") == 1 + sum(n % 4 + 1 for n in range(200))
            assert batches < 100
            assert sample(metrics, "outrider_hub_offload_answers_total", outcome="answered") == 201

    asyncio.run(story())


def test_what_waits_while_the_engine_runs_is_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(monkeypatch)

    async def story() -> None:
        async with running(Shelf(sign=sign_classifier())) as (desk, _), asyncio.TaskGroup() as group:
            first = group.create_task(desk.infer(ask((1, 0))))
            await asyncio.to_thread(gateway.entered.wait, 20)
            rest = [group.create_task(desk.infer(ask((n, 0)))) for n in range(2, 42)]
            while desk_line(desk).waiting_rows < 40:
                await asyncio.sleep(0)
            gateway.go.set()
            assert scores(await first) == [[1, -1]]
            assert [scores(await one) for one in rest] == [[[n, -n]] for n in range(2, 42)]

    asyncio.run(story())
    assert gateway.sizes == [1, 32, 8]


def test_who_could_not_be_in_time_is_refused_at_once_and_the_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway = Gateway(monkeypatch)

    async def story() -> None:
        async with running(Shelf(sign=sign_classifier())) as (desk, metrics), asyncio.TaskGroup() as group:
            first = group.create_task(desk.infer(ask((1, 0))))
            await asyncio.to_thread(gateway.entered.wait, 20)
            desk_line(desk).pace.note(1, 60_000_000)
            with pytest.raises(Overload) as refused:
                await desk.infer(ask((2, 0), within_ms=100))
            assert (refused.value.code, refused.value.retry) == ("overload.late", True)
            gateway.go.set()
            assert scores(await first) == [[1, -1]]
            assert sample(metrics, "outrider_hub_offload_rejects_total", reason="late") == 1

    asyncio.run(story())


def test_a_model_is_loaded_once_for_all_who_come_meanwhile() -> None:
    shelf = Shelf(sign=sign_classifier())

    async def story() -> None:
        async with running(shelf) as (desk, metrics):
            await all_of(desk, [ask((n, 0)) for n in range(20)])
            assert sample(metrics, "outrider_hub_offload_models_loaded") == 1

    asyncio.run(story())
    assert shelf.opened == ["sign"]


def test_the_model_used_longest_ago_goes_and_comes_back() -> None:
    shelf = Shelf(a=sign_classifier(), b=sign_classifier(), c=sign_classifier())

    async def story() -> None:
        async with running(shelf, settings=OffloadSettings(max_models=2)) as (desk, metrics):
            for model in ("a", "b", "a", "c", "a", "b"):
                assert scores(await desk.infer(ask((2, 0), model=model))) == [[2, -2]]
            while sample(metrics, "outrider_hub_offload_models_loaded") > 2:
                await asyncio.sleep(0.01)

    asyncio.run(story())
    assert shelf.opened == ["a", "b", "c", "b"]


def test_a_model_that_has_to_go_ends_what_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(monkeypatch)
    shelf = Shelf(a=sign_classifier(), b=sign_classifier())

    async def story() -> None:
        async with (
            running(shelf, settings=OffloadSettings(max_models=1)) as (desk, _),
            asyncio.TaskGroup() as group,
        ):
            first = [group.create_task(desk.infer(ask((n, 0), model="a"))) for n in range(5)]
            await asyncio.to_thread(gateway.entered.wait, 20)
            other = group.create_task(desk.infer(ask((1, 0), model="b")))
            while ("a", "1.0.0") in desk._places:
                await asyncio.sleep(0.01)
            gateway.go.set()
            assert [scores(await one) for one in first] == [[[n, -n]] for n in range(5)]
            assert scores(await other) == [[1, -1]]

    asyncio.run(story())


class Census:
    """Counts the engines that are in memory, and the loads that run at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = self.loads = self.most_alive = self.most_loads = 0
        make, end, warm = engine_room.Engine.__init__, engine_room.Engine.close, engine_room.Engine.warm_up

        def made(engine: engine_room.Engine, **given: Any) -> None:
            self.alive, self.loads = self.alive + 1, self.loads + 1
            self.most_alive, self.most_loads = max(self.most_alive, self.alive), max(self.most_loads, self.loads)
            make(engine, **given)

        def warmed(engine: engine_room.Engine, *args: Any, **given: Any) -> Any:
            try:
                return warm(engine, *args, **given)
            finally:
                self.loads -= 1

        def ended(engine: engine_room.Engine) -> None:
            self.alive -= 1
            end(engine)

        for name, function in (("__init__", made), ("warm_up", warmed), ("close", ended)):
            monkeypatch.setattr(engine_room.Engine, name, function)


def test_however_many_models_are_asked_at_once_only_so_many_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    census = Census(monkeypatch)
    names = "abcdefgh"
    shelf = Shelf(**dict.fromkeys(names, sign_classifier()))

    async def story() -> None:
        async with running(shelf, settings=OffloadSettings(max_models=2)) as (desk, _):
            found = await all_of(desk, [ask((2, 0), model=name) for name in names])
            assert [scores(one) for one in found] == [[[2, -2]]] * len(names)

    asyncio.run(story())
    assert shelf.opened == list(names)
    assert (census.most_alive, census.most_loads) == (2, 1)


def test_only_so_many_models_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(desk_room, "MAX_LOADS", 2)
    shelf = Shelf(a=sign_classifier(), b=sign_classifier(), c=sign_classifier())
    inner = shelf.files
    monkeypatch.setattr(shelf, "files", lambda manifest: (held.wait(20), inner(manifest))[1])

    async def story() -> None:
        async with running(shelf) as (desk, _), asyncio.TaskGroup() as group:
            first = [group.create_task(desk.infer(ask((1, 0), model=name))) for name in "ab"]
            await asyncio.sleep(0)
            with pytest.raises(Overload) as refused:
                await desk.infer(ask((1, 0), model="c"))
            assert refused.value.code == "model.loading"
            held.set()
            assert [scores(await one) for one in first] == [[[1, -1]]] * 2
            assert scores(await desk.infer(ask((1, 0), model="c"))) == [[1, -1]]

    asyncio.run(story())


def test_a_load_that_does_not_end_is_given_up_and_keeps_its_place_until_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = threading.Event()
    monkeypatch.setattr(desk_room, "LOAD_S", 0.05)
    shelf = Shelf(a=sign_classifier(), b=sign_classifier())
    inner = shelf.files
    monkeypatch.setattr(
        shelf, "files", lambda manifest: (held.wait(20) if manifest.family == "a" else None, inner(manifest))[1]
    )

    async def story() -> None:
        async with running(shelf, settings=OffloadSettings(max_models=1)) as (desk, _):
            with pytest.raises(ModelError) as stuck:
                await desk.infer(ask((1, 0), model="a"))
            assert stuck.value.code == "model.stuck"
            with pytest.raises(Overload) as full:
                await desk.infer(ask((1, 0), model="b"))
            assert full.value.code == "overload.stuck"
            monkeypatch.setattr(desk_room, "LOAD_S", 20)
            held.set()
            while desk._engines:
                await asyncio.sleep(0.01)
            desk._places.clear()
            assert scores(await desk.infer(ask((1, 0), model="b"))) == [[1, -1]]

    asyncio.run(story())


def test_an_engine_that_does_not_come_back_is_given_up_and_tried_again_when_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shelf = Shelf(a=sign_classifier(), b=sign_classifier())

    async def story() -> None:
        async with running(shelf, settings=OffloadSettings(max_models=2)) as (desk, metrics), asyncio.TaskGroup() as g:
            for model in "ab":
                await desk.infer(ask((1, 0), model=model))
            with monkeypatch.context() as patched:
                gateway = Gateway(patched)
                patched.setattr(served, "STUCK_S", 0.1)
                runs = g.create_task(outcome_of(desk, ask((2, 0), model="a")))
                await asyncio.to_thread(gateway.entered.wait, 20)
                waits = g.create_task(outcome_of(desk, ask((3, 0), model="a")))
                assert [await runs, await waits] == ["model.stuck", "model.unavailable"]
                assert await outcome_of(desk, ask((4, 0), model="a")) == "model.stuck"
                assert shelf.opened == ["a", "b"]
            assert await outcome_of(desk, ask((4, 0), model="b")) == "answered"
            gateway.go.set()
            while sample(metrics, "outrider_hub_offload_models_loaded") > 1:
                await asyncio.sleep(0.01)
            assert await outcome_of(desk, ask((5, 0), model="a")) == "answered"

    asyncio.run(story())
    assert shelf.opened == ["a", "b", "a"]


def test_who_waits_in_vain_is_told_at_the_deadline_and_leaves_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with running(Shelf(sign=sign_classifier())) as (desk, _), asyncio.TaskGroup() as group:
            await desk.infer(ask((0, 0)))
            gateway = Gateway(monkeypatch)
            first = group.create_task(desk.infer(ask((1, 0))))
            await asyncio.to_thread(gateway.entered.wait, 20)
            patient = group.create_task(desk.infer(ask((2, 0))))
            hasty = group.create_task(outcome_of(desk, ask((3, 0), within_ms=200)))
            gone = group.create_task(desk.infer(ask((4, 0))))
            while desk_line(desk).waiting_rows < 3:
                await asyncio.sleep(0)
            gone.cancel()
            assert await hasty == "overload.late"
            assert desk_line(desk).waiting_rows == 1
            gateway.go.set()
            assert [scores(await one) for one in (first, patient)] == [[[1, -1]], [[2, -2]]]

    asyncio.run(story())


def test_a_model_that_does_not_load_says_why_and_is_tried_again_later() -> None:
    shelf = Shelf(sign=sign_classifier())
    shelf.failing = StorageError("the blob has rotted", code="storage.corrupt")
    time_us = [0]

    def late(*values: tuple[float, ...]) -> Ask:
        return _at(ask(*values), time_us[0])

    async def story() -> None:
        async with running(shelf, clock=lambda: time_us[0]) as (desk, _):
            for _again in range(2):
                with pytest.raises(StorageError):
                    await desk.infer(late((1, 0)))
            assert shelf.opened == ["sign"]
            shelf.failing = None
            time_us[0] += FAILURE_US + 1
            assert scores(await desk.infer(late((1, 0)))) == [[1, -1]]

    asyncio.run(story())
    assert shelf.opened == ["sign", "sign"]


def test_a_model_that_is_not_loaded_in_time_is_an_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    shelf = Shelf(sign=sign_classifier())
    inner = shelf.files
    monkeypatch.setattr(shelf, "files", lambda manifest: (held.wait(20), inner(manifest))[1])

    async def story() -> None:
        async with running(shelf) as (desk, metrics):
            with pytest.raises(Overload) as refused:
                await desk.infer(ask((1, 0), within_ms=20))
            assert refused.value.code == "model.loading"
            held.set()
            assert scores(await desk.infer(ask((1, 0)))) == [[1, -1]]
            assert sample(metrics, "outrider_hub_offload_rejects_total", reason="loading") == 1

    asyncio.run(story())


def test_a_defect_in_an_engine_fails_its_callers_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with running(Shelf(sign=sign_classifier())) as (desk, _):
            await desk.infer(ask((1, 0)))
            with monkeypatch.context() as patched:
                patched.setattr(engine_room.Engine, "answer", lambda *_: 1 / 0)
                with pytest.raises(ModelError, match="engine failed"):
                    await desk.infer(ask((1, 0)))
            assert scores(await desk.infer(ask((3, 0)))) == [[3, -3]]

    asyncio.run(story())


def test_stopping_lets_everybody_go(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway(monkeypatch)

    async def story() -> list[Answered | BaseException]:
        async with running(Shelf(sign=sign_classifier())) as (desk, _):
            loop = asyncio.get_running_loop()
            waiting = [loop.create_task(desk.infer(ask((n, 0)))) for n in range(3)]
            await asyncio.to_thread(gateway.entered.wait, 20)
        gateway.go.set()
        with pytest.raises(Overload):
            await desk.infer(ask((1, 0)))
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert [type(one) for one in asyncio.run(story())] == [Overload] * 3


def test_what_does_not_fit_is_the_callers_fault() -> None:
    async def story() -> None:
        async with running(Shelf(sign=sign_classifier())) as (desk, _):
            for wrong in (ask((1, 2, 3)), ask(*[(0, 0)] * 1025)):
                with pytest.raises(InputRefused):
                    await desk.infer(wrong)
            with pytest.raises(ModelError) as unknown:
                await desk.infer(ask((1, 0), model="nobody"))
            assert unknown.value.code == "model.unknown"
            with pytest.raises(ModelError):
                await desk.infer(ask((1, 0), version="9.9.9"))

    asyncio.run(story())


def test_a_busy_event_loop_is_noticed_and_forgotten() -> None:
    async def story() -> None:
        async with running(Shelf(sign=sign_classifier())) as (desk, _):
            until = now_us() + 300_000
            while now_us() < until:
                pass
            seen = 0
            async with asyncio.timeout(20):
                while not seen:
                    await asyncio.sleep(0)
                    seen = desk.lag_us
                while desk.lag_us >= 100_000:
                    await asyncio.sleep(0.005)
            assert seen >= 100_000

    asyncio.run(story())


def desk_line(desk: Desk) -> Any:
    """The line of the only model."""
    (place,) = desk._places.values()
    outcome: Any = place.outcome
    return outcome.line


def _at(one: Ask, at_us: int) -> Ask:
    return Ask(one.model, one.version, one.inputs, one.payload, at_us, at_us + 10_000_000)
