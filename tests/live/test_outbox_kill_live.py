"""kill -9 while records are put and settled: all that was acknowledged is there, and no number is given twice."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.adapters.database import Database
from edge_agent.adapters.outbox import SqliteOutbox
from shared.telemetry import Reading, RecordClass
from shared.wire.columns import decode_columns
from tests.fakes.clock import FakeClock

pytestmark = pytest.mark.live

ROUNDS = 15
WRITER = """
import asyncio, sys
from pathlib import Path
from edge_agent.adapters.database import Database
from edge_agent.adapters.outbox import SqliteOutbox
from edge_agent.adapters.system import SystemClock
from shared.telemetry import Reading, RecordClass

async def put(outbox, value):
    seq = await outbox.put(at_ms=1, body=Reading(name="x", value=value))
    print("put", seq, int(value), flush=True)

async def main():
    database = await Database.open(Path(sys.argv[1]), clock=SystemClock())
    outbox = await SqliteOutbox.open(database, limit_bytes=10**8)
    value = int(sys.argv[2])
    while True:
        await asyncio.gather(*(put(outbox, value + i) for i in range(7)))
        value += 7
        if value % 5 == 0:
            batch = await outbox.next_batch(RecordClass.TELEMETRY)
            print("settling", batch.batch.last, flush=True)
            await outbox.settle(batch.batch)
            print("settled", batch.batch.last, flush=True)

asyncio.run(main())
"""


def test_nothing_acknowledged_is_lost_and_no_number_repeats(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    chance = random.Random(7)
    promised: dict[int, int] = {}
    settled = maybe_settled = 0
    for number in range(ROUNDS):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(number * 1_000_000)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        ) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(chance.randint(1, 60))]
            child.kill()
            lines += child.stdout.readlines()
        for line in (line for line in lines if line.endswith("\n")):
            match line.split():
                case ["put", seq, value]:
                    assert int(seq) not in promised, f"number {seq} was given twice"
                    promised[int(seq)] = int(value)
                case ["settling", last]:
                    maybe_settled = int(last)
                case ["settled", last]:
                    settled = int(last)
    assert len(promised) > ROUNDS

    found, following, depth = asyncio.run(_drain(path))
    for number, kept in promised.items():
        assert found.get(number, kept) == kept
        assert number in found or number <= max(settled, maybe_settled)
    assert min(found, default=following) in (settled + 1, maybe_settled + 1)
    assert sorted(found) == list(range(min(found, default=following), following))
    assert depth == len(found)


async def _drain(path: Path) -> tuple[dict[int, int], int, int]:
    database = await Database.open(path, clock=FakeClock())
    outbox = await SqliteOutbox.open(database, limit_bytes=10**8)
    depth = outbox.depth().records[RecordClass.TELEMETRY]
    found: dict[int, int] = {}
    while (batch := await outbox.next_batch(RecordClass.TELEMETRY)) is not None:
        for record in decode_columns(batch.columns):
            assert isinstance(record.body, Reading)
            found[record.seq] = int(record.body.value)
        assert await outbox.settle(batch.batch)
    following = await outbox.put(at_ms=1, body=Reading(name="x", value=0))
    await database.close()
    return found, following, depth
