"""What must not end the daemon, nor make it forget: hostile lengths, a disk that refuses for a while, a busy host."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from edge_agent.core.slot_values import Phase, Withdrawn
from edge_agent.driver.events import ReconcileDue
from edge_agent.ports import HostAnswer, Ticket
from edge_agent.update_ports import Shelf
from shared.errors import ModelError, StorageError, StorageFull
from shared.ids import Digest, FamilyName
from shared.inference import Answer, Control, Measure, TensorHead
from shared.model import FileRef, Manifest, Variant, encode_manifest
from shared.profile import MemoryBudget
from shared.release import VerifiedModel
from shared.telemetry import RecordClass
from shared.wire.messages import Ack, Verdict
from tests.fakes.agent_world import AgentWorld, answer, profile, release, until
from tests.fakes.hosts import FakeHosts


def phase(world: AgentWorld, family: str = "digits") -> Phase | None:
    slot = world.models.slot(family)
    return None if slot is None else slot.phase


async def serve(world: AgentWorld) -> None:
    world.arrive(world.publish(release(world, "1.0.0")))
    await until(lambda: phase(world) is Phase.COMMITTED, "committed")


def test_a_label_without_end_is_not_recorded_and_the_agent_lives_on() -> None:
    world = AgentWorld()
    hostile = False

    def rant(manifest: Manifest, variant: Variant, inputs: tuple[TensorHead, ...], payload: bytes) -> HostAnswer:
        told = answer(manifest, variant, inputs, payload)
        return msgspec.structs.replace(told, labels=("x" * 40_000,)) if hostile else told

    async def story() -> None:
        nonlocal hostile
        await serve(world)
        hostile = True
        await world.infer("r1")
        hostile = False
        assert isinstance(await world.infer("r2"), Answer)
        await until(lambda: world.hub.results() == 1, "the good answer is recorded")

    world.hosts = FakeHosts(rant)
    world.life(story)


def test_a_refusal_of_the_hub_with_an_endless_code_does_not_end_the_agent() -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await until(lambda: world.waiting() == 0, "nothing waits")
        world.hub.silent = True
        await world.infer("r1")
        await until(lambda: world.outbox.depth().records.get(RecordClass.RESULT, 0) > 0, "a record waits")
        batch = await world.outbox.load(RecordClass.RESULT)
        assert batch is not None
        verdict = Verdict(batch=batch.batch, status="refused", code="c" * 100_000)
        world.hub.send("ack", Ack(verdicts=(verdict,)))
        world.hub.silent = False
        await until(lambda: "telemetry.refused" in world.hub.events(), "the refusal is told")
        assert isinstance(await world.infer("r2"), Answer)

    world.life(story)


def test_an_accepted_assignment_is_carried_out_once_the_disk_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    world = AgentWorld()
    save = world.ledger.save_slots
    refusals = 2

    async def full(states: Mapping[str, bytes]) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise StorageFull("no room left")
        await save(states)

    async def story() -> None:
        world.ledger.save_slots = full  # type: ignore[method-assign]
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: refusals == 0, "tried again")
        await until(lambda: phase(world) is Phase.COMMITTED, "committed")

    monkeypatch.setattr("edge_agent.driver.agent.RETRY_MS", 5)
    world.life(story)


def test_one_warm_up_at_a_time_however_many_slots_ask_at_once() -> None:
    world = AgentWorld()
    families = [FamilyName("a-first"), FamilyName("b-second"), FamilyName("c-third")]
    resting = (Phase.STAGED, Phase.PROBATION, Phase.COMMITTED)
    start = world.hosts.start
    most = 0

    async def never(**_: Any) -> Any:
        await asyncio.Event().wait()

    async def slowly(**wanted: Any) -> Any:
        nonlocal most
        # As long as anybody else might begin too: every other slot rests until this one is through.
        others = [family for family in families if family != wanted["manifest"].family]
        await until(lambda: all(phase(world, family) in resting for family in others), "the others rest")
        most = max(most, sum(phase(world, family) is Phase.WARMUP for family in families))
        return await start(**wanted)

    async def first() -> None:
        world.hosts.start = never  # type: ignore[method-assign]
        world.arrive(world.publish(*(other_family(release(world, "1.0.0"), family) for family in families)))
        await until(
            lambda: sorted(phase(world, family) is Phase.STAGED for family in families) == [False, True, True],
            "one is warming up, two wait for it",
        )

    async def second() -> None:
        await until(lambda: all(phase(world, family) is Phase.COMMITTED for family in families), "all committed")

    world.life(first, clean=False)
    world.hosts.start = slowly  # type: ignore[method-assign]
    world.life(second)
    assert most == 1


def test_a_release_that_does_not_fit_is_told_once() -> None:
    world = AgentWorld()
    world.profile = msgspec.structs.replace(profile(), memory=MemoryBudget(host_bytes=1, total_bytes=1))

    async def story() -> None:
        big = release(world, "1.0.0")
        variants = tuple(msgspec.structs.replace(variant, ram_bytes=2) for variant in big.manifest.variants)
        big = msgspec.structs.replace(big, manifest=msgspec.structs.replace(big.manifest, variants=variants))
        world.arrive(world.publish(big))
        await until(lambda: "release.misfit" in world.hub.events(), "told")
        for _ in range(3):
            world.inbox.post(ReconcileDue())
        await world.ask(Measure(name="last", value=1.0))
        await until(lambda: world.hub.readings() == ["last"], "all of it arrived")
        assert world.hub.events().count("release.misfit") == 1

    world.life(story)


def test_an_overloaded_host_is_no_fault_of_the_release() -> None:
    world = AgentWorld()
    world.profile = profile(duration_ms=150)

    def busy(*_: Any) -> HostAnswer:
        error = ModelError("256 requests wait for the model", code="overload")
        error.retry = True
        raise error

    async def story() -> None:
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: phase(world) is Phase.PROBATION, "on trial")
        for _ in range(5):
            with pytest.raises(ModelError):
                await world.infer()
        await until(lambda: phase(world) in (Phase.COMMITTED, Phase.IDLE), "the trial is over")
        assert phase(world) is Phase.COMMITTED

    world.hosts = FakeHosts(busy)
    world.life(story)


def test_answers_given_right_before_the_end_are_recorded() -> None:
    world = AgentWorld()
    world.broker.up = False
    put = world.outbox.put

    class Slow:
        """A ticket that takes its time."""

        def __init__(self, ticket: Ticket) -> None:
            self._ticket = ticket

        async def durable(self) -> int:
            await asyncio.sleep(0.05)
            return await self._ticket.durable()

    async def story() -> None:
        await serve(world)
        world.outbox.put = lambda *about, **how: Slow(put(*about, **how))  # type: ignore[method-assign,assignment]
        await asyncio.gather(*(world.infer(f"r{number}") for number in range(20)))

    world.life(story)
    assert world.outbox.depth().records[RecordClass.RESULT] == 20


def test_a_host_that_ends_right_after_its_start_is_started_again() -> None:
    world = AgentWorld()
    start = world.hosts.start
    crashes = 1

    async def short(**wanted: Any) -> Any:
        nonlocal crashes
        host, ready = await start(**wanted)
        if crashes:
            crashes -= 1
            host.crash()
        return host, ready

    async def story() -> None:
        await serve(world)
        world.hosts.start = short  # type: ignore[method-assign]
        world.hosts.started[-1].crash()
        await until(lambda: len(world.hosts.started) == 3, "started again")
        await until(lambda: world.models.routes()["digits"].up, "up")
        assert isinstance(await world.infer(), Answer)

    world.life(story)


def test_a_disk_that_refuses_for_a_moment_does_not_take_the_model_away() -> None:
    world = AgentWorld()
    refusals = 2
    opened = world.shelf.open

    def refuse(file: FileRef) -> int:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise StorageError("too many open files")
        return opened(file)

    async def story() -> None:
        await serve(world)
        world.broker.go_down()
        world.fetcher.away = True
        world.shelf.open = refuse  # type: ignore[method-assign]
        world.hosts.started[-1].crash()
        await until(lambda: refusals == 0 and world.models.routes()["digits"].up, "up again without the hub")
        assert isinstance(await world.infer(), Answer)

    world.life(story)


def test_a_start_that_is_given_up_leaves_no_descriptor_open() -> None:
    world = AgentWorld()
    opened = world.shelf.open
    descriptors: list[int] = []
    go_on = threading.Event()

    def slowly(file: FileRef) -> int:
        descriptors.append(opened(file))
        assert go_on.wait(10)
        return descriptors[-1]

    async def story() -> None:
        await serve(world)
        world.shelf.open = slowly  # type: ignore[method-assign]
        world.hosts.started[-1].crash()
        await until(lambda: len(descriptors) == 1, "the start is under way")
        await world.models.handle(FamilyName("digits"), Withdrawn())
        assert is_open(descriptors[0])
        go_on.set()
        await until(lambda: not is_open(descriptors[0]), "closed")

    world.life(story)


def test_no_more_than_two_families_are_fetched_at_once() -> None:
    world = AgentWorld()
    families = [FamilyName(f"family-{number}") for number in range(5)]
    fetch = world.fetcher.blob
    running = most = 0
    go_on = asyncio.Event()

    async def slowly(file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go_on.wait()
        await fetch(file, shelf, up_to=up_to)
        running -= 1

    async def story() -> None:
        world.fetcher.blob = slowly  # type: ignore[method-assign]
        releases = (other_family(release(world, f"{number}.0.0"), name) for number, name in enumerate(families, 1))
        world.arrive(world.publish(*releases))
        await until(lambda: all(phase(world, family) is Phase.FETCHING for family in families), "all want to fetch")
        await until(lambda: running == 2, "two do")
        go_on.set()
        await until(lambda: all(phase(world, family) is Phase.COMMITTED for family in families), "all committed")

    world.life(story)
    assert most == 2


def test_a_link_that_comes_back_does_not_begin_a_running_fetch_anew() -> None:
    world = AgentWorld()
    begun = 0
    go_on = asyncio.Event()
    fetch = world.fetcher.blob

    async def slowly(file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
        nonlocal begun
        begun += 1
        await go_on.wait()
        await fetch(file, shelf, up_to=up_to)

    async def story() -> None:
        world.fetcher.blob = slowly  # type: ignore[method-assign]
        world.arrive(world.publish(release(world, "1.0.0")))
        await until(lambda: begun == 1, "begun")
        births = world.hub.births
        world.broker.go_down()
        world.broker.up = True
        await until(lambda: world.hub.births > births, "the link is back")
        go_on.set()
        await until(lambda: phase(world) is Phase.COMMITTED, "committed")
        assert begun == 2  # the model and its golden set, once each

    world.life(story)


def test_a_hub_that_was_never_there_is_told_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    world = AgentWorld()
    world.broker.up = False

    async def story() -> None:
        await until(lambda: world.uplink.state == "offline" and bool(world.uplink.detail), "tried once")
        for _ in range(3):
            await world.ask(Control(command="queue.flush"))
            await until(lambda: world.uplink.state == "offline", "tried again")

    world.life(story)
    assert [record.message for record in caplog.records].count("hub cannot be reached") == 1


def is_open(descriptor: int) -> bool:
    """Whether the descriptor is one."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def other_family(model: VerifiedModel, family: FamilyName) -> VerifiedModel:
    """The same release under another name."""
    manifest = msgspec.structs.replace(model.manifest, family=family)
    digest = Digest(hashlib.sha256(encode_manifest(manifest)).hexdigest())
    return VerifiedModel(manifest=manifest, manifest_digest=digest)
