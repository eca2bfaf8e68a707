"""What a federated run may take of a device: disk, the event loop's time, and how long an answer is on its way."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from edge_agent.driver import rounds
from edge_agent.update_ports import Shelf
from shared.ids import Digest
from shared.model import FileRef
from shared.wire.flower import decode_message, encode_message
from shared.wire.messages import RoundTask
from tests.fakes.agent_world import AgentWorld, until
from tests.unit.driver.test_agent_rounds import answers, content, refusal, send, serve, task, teach


def large(world: AgentWorld, message: str, *, deadline_ms: int = 10_000, **changes: Any) -> RoundTask:
    """A task whose content is fetched."""
    data = content(message, **changes)
    digest = Digest(hashlib.sha256(data).hexdigest())
    world.fetcher.files[digest] = data
    return RoundTask(run="run-1", message=message, deadline_ms=deadline_ms, blob=digest, length=len(data))


def leftover(world: AgentWorld, name: str) -> Digest:
    """A part of some earlier task's content."""
    digest = Digest(hashlib.sha256(name.encode()).hexdigest())
    world.tasks.append(digest, b"part", offset=0)
    return digest


def test_what_earlier_tasks_left_on_the_disk_goes_at_the_start_and_before_each_fetch() -> None:
    world = AgentWorld()
    old = leftover(world, "of an earlier life")

    async def story() -> None:
        assert world.tasks.resume_at(old) == 0
        await serve(world)
        await teach(world)
        stale = leftover(world, "of an earlier task")
        wanted = large(world, "m1")
        begun = world.fetcher.files[wanted.blob][:10]
        world.tasks.append(Digest(wanted.blob), begun, offset=0)
        resumed: list[int] = []
        fetch = world.fetcher.blob

        async def watched(file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
            resumed.append(shelf.resume_at(file.digest))
            await fetch(file, shelf)

        world.fetcher.blob = watched  # type: ignore[method-assign]
        send(world, wanted)
        await answers(world, 1)
        assert resumed == [10]
        assert world.tasks.resume_at(stale) == 0
        assert not world.tasks.has(Digest(wanted.blob))

    world.life(story)


def test_a_fetch_that_was_given_up_removes_nothing_of_the_next_one() -> None:
    world = AgentWorld()
    reading, go_on = threading.Event(), threading.Event()
    opened, dropped = world.tasks.open, threading.Event()
    drop = world.tasks.drop

    def slowly(file: FileRef) -> int:
        descriptor = opened(file)
        reading.set()
        assert go_on.wait(10)
        return descriptor

    def told(digest: Digest) -> None:
        drop(digest)
        dropped.set()

    async def story() -> None:
        await serve(world)
        await teach(world)
        world.tasks.open = slowly  # type: ignore[method-assign]
        world.tasks.drop = told  # type: ignore[method-assign]
        send(world, large(world, "m1", deadline_ms=100))
        await until(reading.is_set, "the first is being read")
        (late,) = await answers(world, 1)
        assert "deadline" in refusal(late)
        second = large(world, "m2")
        part, fetch, arriving = world.fetcher.files[second.blob][:10], world.fetcher.blob, asyncio.Event()

        async def held(file: FileRef, shelf: Shelf, *, up_to: int | None = None) -> None:
            shelf.append(file.digest, part, offset=0)
            arriving.set()
            await until(dropped.is_set, "the first has cleared up")
            assert shelf.resume_at(file.digest) == len(part)
            await fetch(file, shelf)

        world.fetcher.blob = held  # type: ignore[method-assign]
        send(world, second)
        await arriving.wait()
        go_on.set()
        _, done = await answers(world, 2)
        assert decode_message(done.content).error is None

    world.life(story)


def test_a_large_message_is_read_and_written_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    world = AgentWorld()
    seen: list[tuple[str, bool]] = []

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            seen.append((name, threading.current_thread() is threading.main_thread()))
            return work(*given)

        return run

    monkeypatch.setattr(rounds, "decode_message", watched("read", decode_message))
    monkeypatch.setattr(rounds, "encode_message", watched("write", encode_message))

    async def story() -> None:
        await serve(world)
        await teach(world)
        send(world, task("m1"))
        await answers(world, 1)
        send(world, large(world, "m2", padding="x" * 2 * rounds.CHEAP_BYTES))
        await answers(world, 2)

    world.life(story)
    assert seen == [("read", True), ("write", False), ("read", False), ("write", False)]


def test_an_answer_says_nothing_of_another_tasks_message() -> None:
    world = AgentWorld()

    async def story() -> None:
        await serve(world)
        await teach(world)
        world.trainers.hang = True
        send(world, task("m1", deadline_ms=50))
        send(world, task("m2", run="run-2", deadline_ms=1))
        await until(lambda: bool(world.trainers.started and world.trainers.started[0].lessons), "it learns")
        world.clock.advance(60)
        first, second = await answers(world, 2)
        assert (first.message, decode_message(first.content).metadata.run_id) == ("m1", 5)
        metadata = decode_message(second.content).metadata
        assert (second.message, metadata.reply_to_message_id) == ("m2", "m2")
        assert (metadata.run_id, metadata.dst_node_id, metadata.group_id) == (0, 0, "")

    world.life(story)


def test_an_answer_is_not_on_its_way_for_longer_than_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "INLINE_BYTES", 10)
    world = AgentWorld()
    upload, tried = world.fetcher.upload, 0

    async def stalls(path: str, data: bytes) -> None:
        nonlocal tried
        tried += 1
        await asyncio.Event().wait()

    async def story() -> None:
        await serve(world)
        await teach(world)
        world.fetcher.upload = stalls  # type: ignore[method-assign]
        send(world, task("m1", deadline_ms=300))
        await until(lambda: tried == 1, "it is being delivered")
        world.fetcher.upload = upload  # type: ignore[method-assign]
        send(world, task("m2"))
        (reply,) = await answers(world, 1)
        assert reply.message == "m2"

    world.life(story)
