"""The inbox under a flood: messages are dropped, what happened on the device is not."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.driver.events import MessageArrived, ReportDue, Stop
from edge_agent.driver.loop import MAX_UNHANDLED, Inbox


def test_a_flood_of_messages_is_bounded_and_nothing_else_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> list[object]:
        inbox = Inbox()
        for _ in range(MAX_UNHANDLED + 500):
            inbox.post(MessageArrived("t", b"x"))
        inbox.post(ReportDue())
        inbox.post(Stop("end"))
        taken: list[object] = []
        while not isinstance(event := await inbox.next(), Stop):
            taken.append(event)
        inbox.post(MessageArrived("t", b"again"))
        taken.append(await inbox.next())
        return taken

    taken = asyncio.run(story())
    assert len(taken) == MAX_UNHANDLED + 2
    assert isinstance(taken[-2], ReportDue)
    assert taken[-1] == MessageArrived("t", b"again")
    assert [record.message for record in caplog.records] == ["messages are dropped"]
