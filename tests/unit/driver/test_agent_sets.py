"""A whole agent whose models change together: real driver and core on fakes, asked all the time by applications."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from edge_agent.core.slot_values import NoLongerTrusted, Phase
from edge_agent.driver.events import ForSlots
from shared.errors import ModelError, StorageError, StorageFull
from shared.ids import FamilyName
from shared.inference import Answer, Control, Done, Infer, Refusal, TensorHead
from shared.limits import MIB
from shared.profile import MemoryBudget
from shared.release import VerifiedModel
from shared.wire.verification import Judged, Refused
from tests.fakes.agent_world import AgentWorld, until
from tests.machines import set_world

A, B = FamilyName("a"), FamilyName("b")


def room_for(hosts: int) -> MemoryBudget:
    """Memory for that many hosts beside the agent."""
    return MemoryBudget(host_bytes=64 * MIB, total_bytes=(64 + hosts * set_world.HOST_MIB) * MIB)


def world_of_sets(*, hosts: int = 4) -> AgentWorld:
    """A device with room for two models, each twice."""
    world = AgentWorld()
    world.profile = msgspec.structs.replace(world.profile, memory=room_for(hosts))
    return world


def release(world: AgentWorld, family: str, version: str) -> VerifiedModel:
    """A release whose files lie at the hub."""
    made = set_world.release(family, version)
    for file in (made.manifest.golden.file, *(variant.file for variant in made.manifest.variants)):
        world.fetcher.files[file.digest] = set_world.content(file.path)
    return made


def both(world: AgentWorld, version: str) -> bytes:
    """An assignment of this version of both, as a set."""
    document = world.publish(release(world, "a", version), release(world, "b", version))
    known = world.verifier.known[document]
    assignment = msgspec.structs.replace(known.assignment, together=((A, B),))
    world.verifier.known[document] = msgspec.structs.replace(known, assignment=assignment)
    return document


def stand(world: AgentWorld) -> dict[str, tuple[Phase, str]]:
    """Phase and committed version of each slot."""
    slots = [slot for family in (A, B) if (slot := world.models.slot(family)) is not None]
    return {slot.family: (slot.phase, slot.active.manifest.version if slot.active else "") for slot in slots}


def at(version: str) -> dict[str, tuple[Phase, str]]:
    """Both committed at this version."""
    return {"a": (Phase.COMMITTED, version), "b": (Phase.COMMITTED, version)}


class Watch:
    """Asks both models in one breath, all the time, and remembers which versions answered together."""

    def __init__(self, world: AgentWorld) -> None:
        self.seen: set[tuple[str, str]] = set()
        self._world = world
        self._task = asyncio.get_running_loop().create_task(self._ask())

    async def _ask(self) -> None:
        while True:
            routes = self._world.models.routes()
            versions = [
                route.release.manifest.version
                if (route := routes.get(family)) is not None and route.release is not None and route.up
                else ""
                for family in ("a", "b")
            ]
            self.seen.add((versions[0], versions[1]))
            for family in ("a", "b"):
                head = TensorHead(name="x", dtype="fp32", shape=(1, 4))
                await self._world.ask(Infer(model=family, inputs=(head,)), bytes(16))
            await asyncio.sleep(0)

    def end(self) -> None:
        """No two answers were a mixture."""
        self._task.cancel()
        mixed = {(a, b) for a, b in self.seen if a and b and a != b}
        assert not mixed, mixed


def play(world: AgentWorld, story: Callable[[], Any], *, clean: bool = True) -> None:
    """One life, watched."""

    async def watched() -> None:
        watch = Watch(world)
        await story()
        watch.end()

    world.life(watched, clean=clean)


def test_two_models_change_together_and_nobody_is_answered_by_a_mixture() -> None:
    world = world_of_sets()

    async def story() -> None:
        for version in ("1.0.0", "2.0.0", "3.0.0"):
            world.arrive(both(world, version))
            await until(lambda version=version: stand(world) == at(version), version)  # type: ignore[misc]
        head = TensorHead(name="x", dtype="fp32", shape=(1, 4))
        answer = await world.ask(Infer(model="b", inputs=(head,)), bytes(16))
        assert isinstance(answer, Answer)
        assert answer.labels == ("3.0.0",)
        assert sorted(world.models.hosting.pids()) == sorted(set_world.key(name, "3.0.0") for name in "ab")

    play(world, story)


def test_a_member_that_fails_its_golden_check_keeps_both_where_they_are() -> None:
    world = world_of_sets()

    async def story() -> None:
        world.arrive(both(world, "1.0.0"))
        await until(lambda: stand(world) == at("1.0.0"), "first")
        world.hosts.fail_next = ModelError("7 of 10 labels", code="model.golden")
        world.arrive(both(world, "2.0.0"))
        await until(lambda: "set.member_failed" in {model.error_code for model in world.models.running()}, "failed")
        assert stand(world) == at("1.0.0")
        quarantined = [family for family in (A, B) if (slot := world.models.slot(family)) and slot.quarantine]
        assert len(quarantined) == 1

    play(world, story)


def test_a_set_without_room_is_refused_and_told() -> None:
    world = world_of_sets(hosts=3)

    async def story() -> None:
        world.arrive(both(world, "1.0.0"))
        await until(lambda: stand(world) == at("1.0.0"), "first")
        world.arrive(both(world, "2.0.0"))
        await until(lambda: {model.error_code for model in world.models.running()} == {"set.no_room"}, "refused")
        assert not [path for path in world.fetcher.fetched if "2.0.0" in path]
        await until(lambda: "release.refused" in world.hub.events(), "told")

    play(world, story)


def test_the_disk_takes_a_switch_whole_or_not_at_all() -> None:
    world = world_of_sets()
    save, refused = world.ledger.save_slots, 0

    async def full(states: Any) -> None:
        nonlocal refused
        if len(states) > 1 and refused < 6:
            refused += 1
            raise StorageFull("no room left")
        await save(states)

    async def story() -> None:
        world.arrive(both(world, "1.0.0"))
        await until(lambda: stand(world) == at("1.0.0"), "first")
        world.ledger.save_slots = full  # type: ignore[method-assign]
        world.arrive(both(world, "2.0.0"))
        await until(lambda: stand(world) == at("2.0.0"), "second")
        assert refused == 6

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_agent.driver.agent.RETRY_MS", 2)
        play(world, story)


def test_a_rollback_by_hand_of_one_takes_both_back_once() -> None:
    world = world_of_sets()

    async def story() -> None:
        for version in ("1.0.0", "2.0.0"):
            world.arrive(both(world, version))
            await until(lambda version=version: stand(world) == at(version), version)  # type: ignore[misc]
        assert isinstance(await world.ask(Control(command="model.rollback", argument="b")), Done)
        await until(lambda: stand(world) == at("1.0.0"), "back")
        refusal = await world.ask(Control(command="model.rollback", argument="a"))
        assert isinstance(refusal, Refusal)
        assert refusal.code == "release.no_previous"

    play(world, story)


def test_what_is_no_longer_trusted_is_left_together_and_what_is_before_it_first() -> None:
    world = world_of_sets()

    def gone(family: FamilyName, version: str) -> tuple[FamilyName, NoLongerTrusted]:
        event = NoLongerTrusted(key=set_world.key(family, version), code="trust.rollback", message="below the floor")
        return family, event

    async def story() -> None:
        for version in ("1.0.0", "2.0.0"):
            world.arrive(both(world, version))
            await until(lambda version=version: stand(world) == at(version), version)  # type: ignore[misc]
        world.inbox.post(ForSlots((gone(A, "2.0.0"),)))
        await until(lambda: stand(world) == at("1.0.0"), "back")
        reason = ("trust.rollback", "below the floor")
        await world.models.distrust({set_world.key(A, "1.0.0"): reason, set_world.key("unknown", "1.0.0"): reason})
        assert stand(world) == at("1.0.0")
        assert world.models.routes()["a"].release is None
        assert world.models.routes()["b"].release is not None

    play(world, story)


def test_of_a_set_whose_member_is_withheld_nobody_answers_and_both_come_back_with_what_is_accepted() -> None:
    world = world_of_sets()
    documents: list[bytes] = []

    async def install() -> None:
        documents.append(both(world, "1.0.0"))
        world.arrive(documents[0])
        await until(lambda: stand(world) == at("1.0.0"), "first")

    def served() -> list[bool]:
        return [world.models.routes()[family].release is not None for family in "ab"]

    async def withheld() -> None:
        await until(lambda: "release.revoked" in world.hub.events(), "told")
        await until(lambda: not any(served()) and not world.models.hosting.pids(), "nobody is served")
        assert stand(world) == at("1.0.0")
        assert len(world.shelf.files) == 4
        world.arrive(documents[0])
        await until(lambda: all(served()) and len(world.models.hosting.pids()) == 2, "back")

    play(world, install)
    refused = Refused(code="trust.wrong_hardware", message="mistyped")
    world.verifier.judged = Judged(refused={set_world.key(B, "1.0.0"): refused}, undecided={})
    play(world, withheld)


def test_a_killed_agent_begins_with_all_old_and_ends_with_all_new() -> None:
    world = world_of_sets()

    async def first() -> None:
        world.arrive(both(world, "1.0.0"))
        await until(lambda: stand(world) == at("1.0.0"), "first")
        world.profile = msgspec.structs.replace(
            world.profile, probation=msgspec.structs.replace(world.profile.probation, duration_ms=60_000)
        )

    play(world, first)

    async def killed_on_trial() -> None:
        world.arrive(both(world, "2.0.0"))
        await until(lambda: {phase for phase, _ in stand(world).values()} == {Phase.PROBATION}, "on trial")

    play(world, killed_on_trial, clean=False)
    world.profile = world_of_sets().profile

    async def after() -> None:
        await until(lambda: stand(world) == at("2.0.0"), "second")

    play(world, after)


def test_a_slot_whose_row_is_damaged_begins_empty_and_the_others_serve_on() -> None:
    world = world_of_sets()

    async def first() -> None:
        world.arrive(both(world, "1.0.0"))
        await until(lambda: stand(world) == at("1.0.0"), "first")

    play(world, first)
    world.ledger.slots["b"] = b"\xc1" + world.ledger.slots["b"][1:]

    async def after() -> None:
        assert stand(world) == {"a": (Phase.COMMITTED, "1.0.0")}
        await until(lambda: stand(world) == at("1.0.0"), "installed anew")
        await until(lambda: "slot.unreadable" in world.hub.events(), "told")

    play(world, after)


def test_a_slot_of_a_newer_agent_is_left_as_it_is() -> None:
    world = world_of_sets()
    newer = msgspec.msgpack.encode({"schema": 99})
    world.ledger.slots["a"] = newer

    async def story() -> None:
        raise AssertionError("it must not start")

    with pytest.raises(ExceptionGroup) as caught:
        world.life(story)
    assert caught.group_contains(StorageError, match="schema 99")
    assert world.ledger.slots["a"] == newer


def test_without_floors_nothing_new_is_installed_and_what_is_installed_serves() -> None:
    world = world_of_sets()

    async def first() -> None:
        world.arrive(both(world, "1.0.0"))
        await until(lambda: stand(world) == at("1.0.0"), "first")

    play(world, first)

    async def lost() -> None:
        raise StorageError("the trust floors are lost", code="storage.floors_lost")

    world.ledger.load_floors = lost  # type: ignore[method-assign,assignment]

    async def after() -> None:
        await until(lambda: "floors.lost" in world.hub.events(), "told")
        world.arrive(both(world, "2.0.0"))
        head = TensorHead(name="x", dtype="fp32", shape=(1, 4))
        await until(lambda: bool(world.models.hosting.pids()), "up")
        await asyncio.sleep(0.05)
        assert isinstance(await world.ask(Infer(model="a", inputs=(head,)), bytes(16)), Answer)
        assert stand(world) == at("1.0.0")

    play(world, after)
