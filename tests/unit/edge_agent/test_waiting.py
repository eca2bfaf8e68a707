"""What the waiting room tells of a request besides its bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from edge_agent.adapters.oip import Conversation, HttpRequest
from edge_agent.adapters.waiting import Place, WaitingRoom
from edge_agent.framing import Buffer
from shared.inference import Description, Done, Reply, Request, Status


def test_a_requests_time_begins_when_it_was_read_and_not_when_its_turn_came() -> None:
    told: list[float] = []

    async def handle(request: Request, _payload: bytearray, arrived: float) -> tuple[Reply, Sequence[Buffer]]:
        told.append(arrived)
        return Done(id=request.id) if isinstance(request, Status) else Description(id=request.id, models=()), ()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        before = loop.time()
        async with asyncio.TaskGroup() as tasks:
            room = WaitingRoom(handle=handle, tasks=tasks)
            room.open()

            async def in_a_frame(place: Place) -> None:
                await room.reply_to(Status(id="1"), bytearray(), place.arrived)

            async def over_http(place: Place) -> None:
                request = HttpRequest(method="GET", target="/v2/health/ready", headers={}, body=bytearray())
                await Conversation(reply_to=room.reply_to).respond(request, place)

            assert room.enter("1", 0, in_a_frame) is None
            assert room.enter("", 0, over_http) is None
            read = loop.time()
        assert len(told) == 2
        assert all(before <= arrived <= read for arrived in told)

    asyncio.run(main())
