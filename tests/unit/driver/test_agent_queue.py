"""Records on their way through the agent: what the broker, the courier and the disk do to them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Never

import pytest

from edge_agent.core import pump
from edge_agent.driver import agent as agent_module
from edge_agent.driver import records as records_module
from edge_agent.driver import uplink as uplink_module
from edge_agent.driver.events import Noted
from edge_agent.ports import Ticket
from shared.errors import InvalidValue, StorageError, StorageFull
from shared.inference import AgentState, Control, Done, Measure, Reply, Status
from shared.telemetry import BatchId, Body, DeviceEvent, Grade, Reading, RecordClass, Result
from shared.wire.messages import Ack, Batch, Verdict
from tests.fakes.agent_world import AgentWorld, until
from tests.fakes.courier import FakeCourier
from tests.fakes.outbox import KeptTicket

RESULT = Result(request="r1", model="digits", version="1.0.0", variant="int8", rung="full")


async def online(world: AgentWorld) -> None:
    await until(lambda: world.uplink.online, "online")


async def drained(world: AgentWorld) -> None:
    await until(lambda: world.waiting() == 0, "nothing waits")


async def measured(world: AgentWorld, name: str) -> Reply:
    return await world.ask(Measure(name=name, value=1.0))


def test_what_the_broker_will_never_take_is_put_aside_and_told() -> None:
    world = AgentWorld()

    async def story() -> None:
        await online(world)
        await drained(world)
        world.broker.bounces = 0x99
        await measured(world, "bad")
        await until(lambda: world.outbox.depth().buried > 0, "put aside")
        world.broker.bounces = None
        await measured(world, "good")
        await until(lambda: world.hub.readings() == ["good"], "the next one arrives")
        status = await world.ask(Status())
        assert isinstance(status, AgentState)
        assert status.queue_buried > 0

    world.life(story)


def test_a_refusal_is_told_to_the_hub_by_the_class_that_is_not_refused() -> None:
    world = AgentWorld()
    failure = world.broker.failure

    def no_telemetry(device: str, topic: str, payload: bytes) -> tuple[int, str] | None:
        return (0x95, "too large") if topic.endswith("telemetry") else failure(device, topic, payload)

    async def story() -> None:
        world.broker.failure = no_telemetry  # type: ignore[method-assign]
        await measured(world, "large")
        await until(lambda: "telemetry.refused" in world.hub.events(), "told")
        (note,) = [
            record.body
            for record in world.hub.records.values()
            if isinstance(record.body, DeviceEvent) and record.body.name == "telemetry.refused"
        ]
        assert note.detail["code"] == "broker.packet_too_large"
        await drained(world)
        assert world.hub.readings() == []

    world.life(story)


@pytest.mark.parametrize("code", [0x97, 0x80], ids=["quota", "unspecified"])
def test_a_refusal_for_now_holds_the_records_until_it_is_over(code: int) -> None:
    world = AgentWorld()

    async def story() -> None:
        await online(world)
        await drained(world)
        world.broker.bounces = code
        await measured(world, "patient")
        await asyncio.sleep(0)
        world.broker.bounces = None
        await until(lambda: world.hub.readings() == ["patient"], "it arrives")
        assert world.outbox.depth().buried == 0

    world.life(story)


def test_a_person_ends_the_rest_of_a_class_that_has_its_rights_back() -> None:
    world = AgentWorld()

    async def story() -> None:
        await online(world)
        await drained(world)
        world.broker.bounces = 0x87
        await measured(world, "barred")
        await until(
            lambda: world.uplink._pump.lanes[RecordClass.READING].phase is pump.LanePhase.RESTING, "the class rests"
        )
        world.broker.bounces = None
        assert await world.ask(Control(command="queue.flush")) == Done(id="", detail="link online")
        await until(lambda: world.hub.readings() == ["barred"], "it arrives at once")

    world.life(story)


def test_a_courier_without_room_is_asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    world = AgentWorld()

    async def story() -> None:
        await online(world)
        await drained(world)
        monkeypatch.setattr(FakeCourier, "WINDOW", 0)
        await measured(world, "waits")
        await until(
            lambda: world.uplink._pump.lanes[RecordClass.READING].phase is pump.LanePhase.RESTING, "no room for it"
        )
        monkeypatch.setattr(FakeCourier, "WINDOW", 64)
        await until(lambda: world.hub.readings() == ["waits"], "it arrives", within_s=5)

    world.life(story)


def test_a_batch_that_waits_for_a_slow_line_is_not_published_again() -> None:
    world = AgentWorld()

    def sent() -> tuple[BatchId, ...]:
        return world.uplink._pump.lanes[RecordClass.READING].sent

    def published() -> int:
        return sum(topic.endswith("telemetry") for topic, _ in world.broker.published)

    async def story() -> None:
        await online(world)
        await drained(world)
        world.broker.acknowledges, world.hub.silent = False, True
        before = published()
        await measured(world, "slow")
        await until(lambda: published() == before + 1, "on its way")
        (claim,) = sent()
        late = pump.AckTimedOut(RecordClass.READING, claim.digest)
        await world.uplink.on_pump(late)
        assert sent() == (claim,), "it has yet to leave"
        await world.uplink.on_pump(pump.WentOnline())
        await until(lambda: sent() == (claim,), "loaded again")
        assert published() == before + 1
        world.broker.acknowledge()
        world.hub.silent = False
        await world.uplink.on_pump(late)
        await until(lambda: world.hub.readings() == ["slow"], "the broker had it, and no answer came")
        assert published() == before + 2

    world.life(story)


def test_a_disk_that_fails_rests_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    world = AgentWorld()
    load, settle = world.outbox.load, world.outbox.settle
    failures = {"load": 2, "settle": 2}

    async def loads(klass: RecordClass, *, after: int = 0) -> Batch | None:
        if klass is RecordClass.READING and failures["load"]:
            failures["load"] -= 1
            raise StorageError("input/output error")
        return await load(klass, after=after)

    async def settles(batch: object) -> bool:
        if failures["settle"]:
            failures["settle"] -= 1
            raise StorageError("input/output error")
        return await settle(batch)  # type: ignore[arg-type]

    async def story() -> None:
        world.outbox.load, world.outbox.settle = loads, settles  # type: ignore[method-assign]
        await measured(world, "kept")
        await until(lambda: failures == {"load": 0, "settle": 0}, "failed")
        await drained(world)
        assert world.hub.readings() == ["kept"]

    monkeypatch.setattr(pump, "STORAGE_REST_MS", 5)
    world.life(story)


def test_a_disk_that_does_not_answer_stops_neither_the_link_nor_the_slots_nor_the_end() -> None:
    world = AgentWorld()
    put = world.outbox.put

    async def never(*_: object, **__: object) -> Never:
        await asyncio.Event().wait()
        raise AssertionError

    def kept_never(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> Ticket:
        if isinstance(body, DeviceEvent):
            return SimpleNamespace(durable=never)
        return put(body, at_ms=at_ms, grade=grade)

    async def story() -> None:
        await online(world)
        await drained(world)
        await measured(world, "stays")
        await drained(world)
        outbox = world.outbox
        outbox.load = outbox.settle = outbox.bury = never  # type: ignore[method-assign]
        outbox.put = kept_never  # type: ignore[method-assign,assignment]
        await measured(world, "not read")
        claim = BatchId(epoch="0" * 16, klass=3, first=1, last=1, digest="")
        await world.uplink.on_pump(pump.AckArrived(Ack(verdicts=(Verdict(batch=claim, status="stored"),))))
        world.inbox.post(Noted("host.lost", {}))
        world.broker.go_down()
        await until(lambda: not world.uplink.online, "offline")
        world.broker.up = True
        await world.ask(Control(command="queue.flush"))
        await online(world)

    world.life(story)


def test_a_disk_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = AgentWorld()
    load, stalls = world.outbox.load, 2

    async def loads(klass: RecordClass, *, after: int = 0) -> Batch | None:
        nonlocal stalls
        if klass is RecordClass.READING and stalls:
            stalls -= 1
            await asyncio.Event().wait()
        return await load(klass, after=after)

    async def story() -> None:
        world.outbox.load = loads  # type: ignore[method-assign]
        await measured(world, "kept")
        await until(lambda: world.hub.readings() == ["kept"], "the disk is back")

    monkeypatch.setattr(uplink_module, "DISK_WITHIN_S", 0.01)
    monkeypatch.setattr(pump, "STORAGE_REST_MS", 5)
    world.life(story)
    assert stalls == 0


def test_what_happened_right_before_the_end_is_kept() -> None:
    world = AgentWorld()
    world.broker.up = False

    async def story() -> None:
        await until(lambda: world.uplink.state == "offline", "tried")
        world.inbox.post(Noted("host.lost", {}))

    world.life(story)
    assert world.outbox.depth().records[RecordClass.EVENT] == 1


def test_an_event_that_the_disk_keeps_late_is_kept_once() -> None:
    world = AgentWorld()
    put, go_on = world.outbox.put, asyncio.Event()
    puts = 0

    def late(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> Ticket:
        nonlocal puts
        ticket = put(body, at_ms=at_ms, grade=grade)
        if not isinstance(body, DeviceEvent):
            return ticket
        puts += 1

        async def durable() -> int:
            await go_on.wait()
            return await ticket.durable()

        return SimpleNamespace(durable=durable)

    async def story() -> None:
        world.outbox.put = late  # type: ignore[method-assign,assignment]
        world.inbox.post(Noted("host.lost", {}))
        await until(lambda: puts == 1, "put")
        await measured(world, "meanwhile")
        go_on.set()
        await until(lambda: world.hub.events() == ["host.lost"], "told")
        assert puts == 1

    world.life(story)


def test_dropping_a_class_tells_the_hub_of_the_gap() -> None:
    world = AgentWorld()

    async def story() -> None:
        await online(world)
        await drained(world)
        world.broker.go_down()
        await until(lambda: not world.uplink.online, "offline")
        for number in range(3):
            await measured(world, f"dropped-{number}")
        assert isinstance(await world.ask(Control(command="queue.drop", argument="reading")), Done)
        world.broker.up = True
        await world.ask(Control(command="queue.flush"))
        await until(lambda: bool(world.hub.gaps), "told")
        (_, gap) = world.hub.gaps[0]
        assert (gap.reason, gap.records) == ("dropped", 3)
        await drained(world)
        assert world.hub.readings() == []

    world.life(story)


def test_each_record_has_the_grade_that_it_is_worth() -> None:
    world = AgentWorld()
    graded: list[tuple[str, Grade]] = []
    put = world.outbox.put

    def spy(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> KeptTicket:
        name = body.name if isinstance(body, Reading) else type(body).__name__
        graded.append((name, grade))
        return put(body, at_ms=at_ms, grade=grade)

    async def story() -> None:
        world.outbox.put = spy  # type: ignore[method-assign]
        await world.records.keep_soon(RESULT)
        await measured(world, "by an application")
        world.inbox.post(Noted("host.lost", {}))
        await until(lambda: ("DeviceEvent", Grade.DURABLE) in graded, "noted")
        await until(lambda: ("queue_syncs", Grade.MEMORY) in graded, "of itself")
        assert ("Result", Grade.BUFFERED) in graded
        assert ("by an application", Grade.DURABLE) in graded

    world.life(story)


def test_a_reading_that_the_disk_refuses_is_not_confirmed() -> None:
    world = AgentWorld()

    def full(body: Body, *, at_ms: int, grade: Grade) -> KeptTicket:
        return KeptTicket(error=StorageFull("no room left"))

    async def story() -> None:
        world.outbox.put = full  # type: ignore[method-assign,assignment]
        with pytest.raises(StorageFull):
            await measured(world, "unkept")

    world.life(story)


def test_an_event_that_finds_no_room_is_held_and_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = AgentWorld()
    put, refusals = world.outbox.put, 3

    def full(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> KeptTicket:
        nonlocal refusals
        if isinstance(body, DeviceEvent) and refusals:
            refusals -= 1
            return KeptTicket(error=StorageFull("no room left"))
        return put(body, at_ms=at_ms, grade=grade)

    async def story() -> None:
        world.outbox.put = full  # type: ignore[method-assign]
        world.inbox.post(Noted("release.rolled_back", {"family": "digits"}))
        await until(lambda: world.hub.events() == ["release.rolled_back"], "told at last")

    monkeypatch.setattr(agent_module, "RETRY_MS", 2)
    world.life(story)


def test_results_wait_for_a_disk_that_is_behind_and_only_so_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = AgentWorld()
    put, flush = world.outbox.put, world.outbox.flush
    is_behind, stalls = True, False

    def behind(body: Body, *, at_ms: int, grade: Grade = Grade.DURABLE) -> Ticket:
        if is_behind and isinstance(body, Result):
            raise StorageFull("the disk is slower", code="storage.behind")
        return put(body, at_ms=at_ms, grade=grade)

    async def flushes() -> None:
        nonlocal is_behind
        if stalls:
            await asyncio.Event().wait()
        is_behind = False
        await flush()

    async def story() -> None:
        nonlocal is_behind, stalls
        await online(world)
        world.outbox.put, world.outbox.flush = behind, flushes  # type: ignore[method-assign,assignment]
        await world.records.keep_soon(RESULT)
        await until(lambda: world.hub.results() == 1, "after the next commit")
        is_behind = stalls = True
        await world.records.keep_soon(RESULT)
        is_behind = stalls = False
        await world.records.keep_soon(RESULT)
        await until(lambda: world.hub.results() == 2, "the disk is back")

    caplog.set_level("INFO")
    monkeypatch.setattr(records_module, "ROOM_WITHIN_S", 0.05)
    world.life(story)
    told = [record.message for record in caplog.records]
    assert told.count("records are not kept") == told.count("records are kept again") == 1


def test_an_event_is_not_dropped_by_a_command() -> None:
    world = AgentWorld()

    async def story() -> None:
        with pytest.raises(InvalidValue) as caught:
            await world.ask(Control(command="queue.drop", argument="event"))
        assert caught.value.code == "invalid.class"

    world.life(story)
