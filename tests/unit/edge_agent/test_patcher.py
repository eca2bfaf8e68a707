"""A patch that is given up: no descriptor is left open, and no name is given to what was not hashed."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.adapters import shelf as module
from edge_agent.adapters.patcher import LivePatcher, Outcome
from edge_agent.adapters.shelf import FileShelf
from shared.errors import TransferCorrupt
from shared.ids import Digest
from shared.model import FileRef
from shared.release import Patch
from tests.fakes.agent_world import until

BASE, RESULT = b"base" * 1000, b"result" * 1000


def ref(data: bytes) -> FileRef:
    return FileRef(path="models/m/1.0.0/int8.onnx", length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))


PATCH = Patch(base=ref(BASE).digest, result=ref(RESULT).digest, digest=Digest("2" * 64), length=9)


class Hashing:
    """Files are hashed, and then nobody goes on until he is let."""

    def __init__(self) -> None:
        self.done, self.may_go_on = threading.Event(), threading.Event()
        self.of_file = module._verify

    def __call__(self, fd: int, file: FileRef) -> None:
        self.of_file(fd, file)
        self.done.set()
        assert self.may_go_on.wait(10)


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hashing]:
    made = Hashing()
    monkeypatch.setattr(module, "_verify", made)
    yield made
    made.may_go_on.set()


def put(shelf: FileShelf, data: bytes) -> None:
    shelf.append(ref(data).digest, data, offset=0)
    shelf.publish(ref(data))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def given_up(hashing: Hashing, patcher: LivePatcher) -> asyncio.Task[None]:
    """The patch's task, cancelled twice while a file is hashed."""
    task = asyncio.create_task(patcher.apply(PATCH, base=ref(BASE), result=ref(RESULT)))
    await asyncio.to_thread(hashing.done.wait, 10)
    for _ in range(2):
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
    return task


def test_a_patch_that_is_given_up_while_its_base_is_hashed_leaves_no_descriptor(
    tmp_path: Path, hashing: Hashing
) -> None:
    shelf = FileShelf(tmp_path)
    hashing.may_go_on.set()
    put(shelf, BASE)

    async def story() -> None:
        hashing.done.clear()
        hashing.may_go_on.clear()
        await asyncio.to_thread(lambda: None)
        before = descriptors()
        task = await given_up(hashing, LivePatcher(shelf=shelf))
        hashing.may_go_on.set()
        await asyncio.wait({task})
        assert task.cancelled()
        await until(lambda: descriptors() <= before, "closed")

    asyncio.run(story())


def test_a_patch_that_is_given_up_while_its_result_gets_its_name_empties_nothing(
    tmp_path: Path, hashing: Hashing, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = FileShelf(tmp_path)

    async def ran(*_: Any, **__: Any) -> Outcome:
        shelf.append(ref(RESULT).digest, RESULT, offset=0)
        return Outcome()

    monkeypatch.setattr(LivePatcher, "_run", ran)

    async def story() -> None:
        patcher = LivePatcher(shelf=shelf)
        task = await given_up(hashing, patcher)
        assert patcher._turn.locked()  # the next patch to this file comes after
        assert shelf.resume_at(ref(RESULT).digest) == len(RESULT)
        hashing.may_go_on.set()
        await asyncio.wait({task})
        assert task.cancelled()
        os.close(shelf.open(ref(RESULT)))

    asyncio.run(story())


def test_what_is_emptied_after_it_was_hashed_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = FileShelf(tmp_path)
    of_file = module._verify

    def verify(fd: int, file: FileRef) -> None:
        of_file(fd, file)
        shelf.append(file.digest, b"", offset=0)

    monkeypatch.setattr(module, "_verify", verify)
    with pytest.raises(TransferCorrupt):
        put(shelf, RESULT)
    assert not shelf.has(ref(RESULT).digest)
