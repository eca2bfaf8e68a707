"""What is recorded of requests: the model's own time, refusals, and what happens when the disk does not keep up."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.core.cascade import Policy
from edge_agent.core.slot_values import Phase
from edge_agent.ports import HostAnswer
from shared.errors import HostLost, ModelError, StorageFull
from shared.inference import AgentState, Infer, Refusal, Status, TensorHead
from shared.telemetry import Body, Grade, Result
from tests.fakes.agent_world import AgentWorld, profile, release, until
from tests.fakes.outbox import KeptTicket
from tests.unit.driver.test_answering import ask, host, infer, joined, records, tell, version


async def results(world: AgentWorld, count: int) -> dict[str, Result]:
    """Results at the hub, by request, once there are this many."""
    await until(lambda: world.hub.results() >= count, f"{count} results arrive")
    return {body.request: body for body in records(world, Result) if isinstance(body, Result)}


# The model's own time


@pytest.mark.parametrize("stalls", [True, False])
def test_the_wait_for_the_hub_is_not_the_local_models_time(stalls: bool) -> None:
    async def story(world: AgentWorld) -> None:
        world.cloud.stalls = stalls
        world.cloud.says = HostLost("no answer")  # whatever it is: the local answer comes
        given = await infer(world, "r1", deadline_ms=150)
        assert given.rung == "full"
        kept = (await results(world, 1))["r1"]
        assert 0 < kept.took_us < given.took_us
        if stalls:
            assert given.took_us > 100_000
            assert kept.took_us < 100_000

    tell(story)


def test_an_answer_of_the_hub_keeps_the_time_of_the_whole() -> None:
    async def story(world: AgentWorld) -> None:
        given = await infer(world, "r1")
        assert given.rung == "cloud"
        assert (await results(world, 1))["r1"].took_us == given.took_us

    tell(story)


def test_what_no_run_was_needed_for_took_the_model_no_time() -> None:
    async def story(world: AgentWorld) -> None:
        await infer(world, "ran")
        await infer(world, "kept")
        running = host(world)
        assert running is not None
        running.hang = True
        first = asyncio.create_task(infer(world, "first", value=1, deadline_ms=2_000))
        await until(lambda: len(running._pending) == 1, "on its way")
        shared = asyncio.create_task(infer(world, "shared", value=1, deadline_ms=2_000))
        await until(lambda: joined(world) == 1, "it waits for the first")
        for waiting in list(running._pending):
            waiting.set_result(None)
        await asyncio.gather(first, shared)
        running.crash()
        await infer(world, "cached")
        took_us = {name: result.took_us for name, result in (await results(world, 5)).items()}
        assert took_us.keys() == {"ran", "kept", "first", "shared", "cached"}
        assert {name for name, spent in took_us.items() if spent} == {"ran", "first"}

    tell(story, policy=Policy(), cache_entries=8)


# Requests without an answer


def test_a_missed_deadline_is_recorded_as_the_releases() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        running.hang = True
        refused = await ask(world, "slow", deadline_ms=30)
        assert isinstance(refused, Refusal)
        kept = (await results(world, 1))["slow"]
        assert kept == Result(request="slow", model="digits", version="1.0.0", variant="fp32", rung="refused")

    tell(story, policy=Policy())


@pytest.mark.parametrize("error", [ModelError("it broke", code="model.run"), HostLost("it was killed")])
def test_a_models_failure_is_recorded_and_counted(error: ModelError) -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None

        async def fail(*_: object, deadline_ms: int) -> HostAnswer:
            raise error

        running.infer = fail  # type: ignore[assignment]
        if isinstance(error, HostLost):
            assert isinstance(await ask(world, "r"), Refusal)
        else:
            with pytest.raises(ModelError, match="it broke"):
                await ask(world, "r")
        kept = (await results(world, 1))["r"]
        assert (kept.rung, kept.version, kept.took_us) == ("refused", "1.0.0", 0)
        status = await world.ask(Status())
        assert isinstance(status, AgentState)
        assert status.refused == 1

    tell(story, policy=Policy())


def test_what_is_no_fault_of_the_model_is_not_recorded() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None

        async def busy(*_: object, deadline_ms: int) -> HostAnswer:
            error = ModelError("many wait", code="overload")
            error.retry = True
            raise error

        usual, running.infer = running.infer, busy  # type: ignore[assignment]
        with pytest.raises(ModelError):
            await ask(world, "busy")
        running.infer = usual  # type: ignore[method-assign]
        head = TensorHead(name="x", dtype="fp32", shape=(1, 4))
        with pytest.raises(ModelError):
            await world.ask(Infer(model="digits", inputs=(head,), id="wrong"), bytes(15))
        assert isinstance(await ask(world, "late", deadline_ms=0), Refusal)
        await infer(world, "good")
        assert (await results(world, 1)).keys() == {"good"}

    tell(story, policy=Policy())


def test_a_candidate_that_misses_deadlines_which_the_one_before_kept_is_rolled_back() -> None:
    async def story() -> None:
        await until(lambda: "digits" in world.models.routes() and host(world) is not None, "up again")
        for number in range(3):
            await infer(world, f"before-{number}")
        world.arrive(world.publish(release(world, "2.0.0")))
        await until(lambda: version(world) == "2.0.0" and phase(world) is Phase.PROBATION, "on trial")
        running = host(world)
        assert running is not None
        running.hang = True
        for number in range(3):
            assert isinstance(await ask(world, f"slow-{number}", deadline_ms=60), Refusal)
        await until(lambda: version(world) == "1.0.0", "rolled back")

    async def commit(_: AgentWorld) -> None:
        pass

    world = tell(commit, policy=Policy())
    world.profile = profile(duration_ms=60_000, good_answers=10)
    world.life(story)


def phase(world: AgentWorld) -> Phase | None:
    slot = world.models.slot("digits")
    return None if slot is None else slot.phase


# One deadline


def test_who_waited_for_another_request_has_only_the_rest_of_its_time() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        running.hang = True
        short = asyncio.create_task(ask(world, "short", deadline_ms=100))
        await until(lambda: len(running._pending) == 1, "on its way")
        long = asyncio.create_task(ask(world, "long", deadline_ms=300))
        assert isinstance(await short, Refusal)
        assert isinstance(await long, Refusal)
        first, second = running.deadlines_ms
        assert first <= 100
        assert second <= 230

    tell(story, policy=Policy(), cache_entries=8)


# A disk that does not keep up


def test_no_answer_waits_for_a_stalled_disk_beyond_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def story(world: AgentWorld) -> None:
        go_on, put, flush = asyncio.Event(), world.outbox.put, world.outbox.flush

        def behind(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> KeptTicket:
            if isinstance(body, Result) and not go_on.is_set():
                raise StorageFull("the disk is slower than what is to be kept", code="storage.behind")
            return put(body, at_ms=at_ms, grade=grade)

        async def stalled() -> None:
            await go_on.wait()
            await flush()

        world.outbox.put, world.outbox.flush = behind, stalled  # type: ignore[method-assign]
        async with asyncio.timeout(5):
            answers = [await infer(world, f"r{number}", deadline_ms=300) for number in range(3)]
        assert all(given.labels == ("1.0.0",) and given.deadline_met for given in answers)
        assert min(given.took_us for given in answers) > 150_000  # they did wait
        status = await world.ask(Status())
        assert isinstance(status, AgentState)
        assert status.results_lost == 3
        go_on.set()
        await infer(world, "later")
        assert (await results(world, 1)).keys() == {"later"}

    tell(story, policy=Policy(margin_ms=100))
    told = [record.message for record in caplog.records if "records are" in record.message]
    assert told == ["records are not kept", "records are kept again"]


# The end


def test_a_request_that_is_on_its_way_at_the_end_is_refused() -> None:
    async def story(world: AgentWorld) -> None:
        running = host(world)
        assert running is not None
        running.hang = True
        asking = asyncio.create_task(ask(world, "r", deadline_ms=5_000))
        await until(lambda: bool(running._pending), "on its way")
        await world.models.stop()
        refused = await asking
        assert isinstance(refused, Refusal)
        assert (refused.code, refused.retry) == ("model.host_lost", True)

    tell(story, policy=Policy())


# What answers take


def test_the_cache_counts_what_rows_take_beside_their_outputs() -> None:
    async def story(world: AgentWorld) -> None:
        await infer(world, "one")
        one = world.answering._cache.held_bytes
        await infer(world, "many", rows=1_000)
        assert world.answering._cache.held_bytes - one > 1_000 * (8 + 90)

    tell(story, policy=Policy(), cache_entries=8)
