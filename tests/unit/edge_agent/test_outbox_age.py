"""The age of what waits in the outbox goes on, also while nothing is written."""

from __future__ import annotations

import asyncio
from pathlib import Path

from edge_agent.adapters.outbox import JournalOutbox
from edge_agent.core.journal import Moment, bounds_for
from shared.limits import MIB
from shared.telemetry import DeviceEvent, RecordClass
from tests.fakes.clock import FakeClock


def test_what_waits_grows_older_without_a_commit(tmp_path: Path) -> None:
    clock = FakeClock()

    def moment() -> Moment:
        return Moment(boot="b", uptime_ms=clock.boot_ms(), wall_ms=clock.wall_ms(), synchronised=False)

    async def story() -> None:
        outbox = await JournalOutbox.open(
            tmp_path, bounds=bounds_for(16 * MIB), clock=clock, moments=moment, flush_ms=0
        )
        try:
            assert outbox.depth().oldest_ms == {}
            body = DeviceEvent(name="host.lost", detail={})
            await outbox.put(body, at_ms=1).durable()
            before = outbox.depth().oldest_ms[RecordClass.EVENT]
            clock.advance(40_000)
            assert outbox.depth().oldest_ms[RecordClass.EVENT] == before + 40_000
        finally:
            await outbox.close()

    asyncio.run(story())
