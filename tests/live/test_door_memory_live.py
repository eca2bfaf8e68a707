"""The door's memory: what waits for an answer is bounded by its bytes, not only by its number."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_agent.adapters import waiting
from edge_agent.adapters.door import Door
from edge_agent.client import AsyncClient
from edge_agent.framing import Buffer
from shared.errors import OutriderError
from shared.inference import Done, Reply, Request
from shared.limits import MIB

pytestmark = pytest.mark.live


def test_large_requests_that_wait_are_bounded_together(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MAX_HELD_BYTES", 3 * MIB)
    path = short_tmp / "door.sock"

    async def main() -> None:
        go_on = asyncio.Event()
        begun = 0

        async def wait(request: Request, _: bytearray, _arrived: float) -> tuple[Reply, Sequence[Buffer]]:
            nonlocal begun
            begun += 1
            await go_on.wait()
            return Done(id=request.id), ()

        async def ask(agent: AsyncClient) -> str:
            try:
                await agent.infer("m", {"x": np.zeros(MIB, dtype="uint8")}, deadline_ms=20_000)
            except OutriderError as error:
                return error.code
            return "answered"

        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks, AsyncClient(path) as agent:
            door = Door(path=path, handle=wait, tasks=tasks)
            await door.open()
            asked = [tasks.create_task(ask(agent)) for _ in range(5)]
            while sum(task.done() for task in asked) < 2:
                await asyncio.sleep(0.005)
            assert begun == 3
            go_on.set()
            codes = sorted([await task for task in asked])
            # The answers are no inference's; what counts is who was let in.
            assert codes == ["overload.memory"] * 2 + ["protocol.reply"] * 3
            assert await ask(agent) == "protocol.reply"
            await agent.close()
            await door.close()

    asyncio.run(main())
