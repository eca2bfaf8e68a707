"""The outbox's price: against SQLite that keeps the same promise, against the bare disk, and on the disk itself.

Everything here is 200 bytes a record. `enqueue_vs_sqlite_full`: records a second of commits of 100, over those of
Python's sqlite3 with WAL and `synchronous=FULL` (BEGIN, executemany of the same bytes, COMMIT); both stores grow.
`drain_vs_sqlite_full`: the same for taking them out again in hundreds: load, settle, tick, against SELECT, DELETE,
COMMIT. `enqueue_vs_write_fdatasync`: against pwrite and fdatasync of the same payload on a file of zeros. Blocks of all
are taken in turns; the figures are medians of the blocks' ratios.

`device_bytes_per_byte_b1`, `…_b100`, `…_b1000`: bytes that reach the block device for a byte of payload, by records in
a commit, on files that are used for the first time; `ack_device_bytes_per_byte`: for a byte that is acknowledged, a
hundred records at once. On a loop device with ext4, which needs root; left out elsewhere (tests/bench/_loop.py).

`open_ms_1m_pending`: opening with a million records waiting, not one page of them in memory; `scan_ms_one_segment`:
reading and checking one segment, which is what opening has to do; `rss_mb_1m_pending`: how much larger the process is
than one that opened an empty store, each fresh, after handing the first batch out. `disk_mb_after_drain`: what the same
store takes once it is drained. `disk_mb_30_days`: what 2,592,000 commits of one record take, from the files of a real
run that filled ten segments. `typed_enqueue_us`, `typed_drain_us`: a record's share of the whole path with its thread,
tickets, columns and digests, in hundreds of readings.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import secrets
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from edge_agent.adapters.disk import PosixDisk
from edge_agent.adapters.journal import Journal
from edge_agent.adapters.outbox import JournalOutbox
from edge_agent.adapters.system import SystemClock
from edge_agent.core.frames import Entry
from edge_agent.core.journal import JournalBounds, Moment, bounds_for
from shared.limits import MIB
from shared.telemetry import Reading, RecordClass
from tests.bench._loop import NoLoop, loop_device

ROOT = Path(__file__).resolve().parents[2]
RECORD_BYTES = 200
BATCH = 100
BLOCKS = 50
COMMITS = 20
"""In a block."""
MILLION = 1_000_000
SECONDS_30_DAYS = 30 * 24 * 3600
BOUNDS = bounds_for(640 * MIB)
HUNDREDS = replace(BOUNDS, batch_records=BATCH)
"""Of these bounds a batch is what one commit of a hundred put there."""
READING = RecordClass.READING
MB = 1_000_000


def run() -> dict[str, float]:
    """Measure; takes a quarter of a minute, on a slow disk a whole one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = against_sqlite(folder)
        figures |= on_the_device(folder)
        figures |= with_a_million(folder)
        figures["disk_mb_30_days"] = thirty_days(folder)
        return figures | asyncio.run(whole_path(folder))


def moment() -> Moment:
    """Now, as far as the journal cares."""
    return Moment("bench", time.monotonic_ns() // 10**6, 0, False)


def open_journal(path: Path, *, bounds: JournalBounds = BOUNDS) -> Journal:
    """A journal on this directory."""
    return Journal.open(PosixDisk(path), bounds, moment=moment(), draw=secrets.token_bytes)


def records(count: int) -> list[Entry]:
    """So many of them."""
    data = secrets.token_bytes(RECORD_BYTES + count)
    return [(1_800_000_000_000 + i, data[i : i + RECORD_BYTES]) for i in range(count)]


# Against SQLite and the bare disk


def against_sqlite(folder: Path) -> dict[str, float]:
    """Both ways, in turns."""
    journal, entries = open_journal(folder / "journal", bounds=HUNDREDS), records(BATCH)
    rows = [(at_ms, data) for at_ms, data in entries]
    database = sqlite3.connect(folder / "queue.db", isolation_level=None)
    database.executescript(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL;"
        "CREATE TABLE queue (number INTEGER PRIMARY KEY, at_ms INTEGER, data BLOB)"
    )
    payload = b"".join(data for _, data in entries)
    descriptor = _zeros(folder / "bare", (BLOCKS + 1) * COMMITS * len(payload))
    offset = 0

    def append() -> None:
        journal.append(READING, entries, moment=moment())

    def insert() -> None:
        database.execute("BEGIN")
        database.executemany("INSERT INTO queue (at_ms, data) VALUES (?, ?)", rows)
        database.execute("COMMIT")

    def write() -> None:
        nonlocal offset
        os.pwrite(descriptor, payload, offset)
        os.fdatasync(descriptor)
        offset += len(payload)

    def let_go() -> None:
        portion = journal.load(READING, after=0, moment=moment())
        assert portion is not None
        assert portion.last - portion.first + 1 == BATCH
        assert journal.settle(READING, portion.first, portion.last)
        journal.tick(moment())

    def delete() -> None:
        database.execute("BEGIN")
        found = database.execute("SELECT number, at_ms, data FROM queue ORDER BY number LIMIT 100").fetchall()
        assert len(found) == BATCH
        database.execute("DELETE FROM queue WHERE number <= ?", (found[-1][0],))
        database.execute("COMMIT")

    put = in_turns(append, insert, write)
    taken = in_turns(let_go, delete)
    journal.close(moment())
    database.close()
    os.close(descriptor)
    return {
        "enqueue_vs_sqlite_full": ratio(put[1], put[0]),
        "drain_vs_sqlite_full": ratio(taken[1], taken[0]),
        "enqueue_vs_write_fdatasync": ratio(put[2], put[0]),
        "enqueue_records_per_s": BATCH / statistics.median(put[0]),
        "drain_records_per_s": BATCH / statistics.median(taken[0]),
    }


def in_turns(*works: Callable[[], None]) -> list[list[float]]:
    """Seconds of one call of each, by block; blocks of all take turns, and the first of each does not count."""
    took: list[list[float]] = [[] for _ in works]
    gc.collect()
    for block in range(BLOCKS + 1):
        for work, seconds in zip(works, took, strict=True):
            began = time.perf_counter()
            for _ in range(COMMITS):
                work()
            if block:
                seconds.append((time.perf_counter() - began) / COMMITS)
    return took


def ratio(others: list[float], ours: list[float]) -> float:
    """How many times as fast as the other we are."""
    return statistics.median(other / own for other, own in zip(others, ours, strict=True))


def _zeros(path: Path, size: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    for offset in range(0, size, MIB):
        os.pwrite(descriptor, bytes(min(MIB, size - offset)), offset)
    os.fsync(descriptor)
    return descriptor


# What reaches the device


def on_the_device(folder: Path) -> dict[str, float]:
    """For each way of committing, on a new store; nothing where there is no device to count on."""
    figures: dict[str, float] = {}
    try:
        with loop_device(folder, megabytes=160) as (mounted, written):
            for count, commits in ((1, 4_000), (100, 200), (1_000, 40)):
                journal, entries = open_journal(mounted / str(count)), records(count)
                before = written()
                for _ in range(commits):
                    journal.append(READING, entries, moment=moment())
                figures[f"device_bytes_per_byte_b{count}"] = (written() - before) / (commits * count * RECORD_BYTES)
                journal.close(moment())
            figures["ack_device_bytes_per_byte"] = _acknowledged(mounted / "ack", written)
    except NoLoop as error:
        sys.stderr.write(f"outbox: no figures of device bytes: {error}\n")
    return figures


def _acknowledged(path: Path, written: Callable[[], int]) -> float:
    journal, entries = open_journal(path, bounds=HUNDREDS), records(BATCH)
    commits = 400
    for _ in range(commits):
        journal.append(READING, entries, moment=moment())
    before = written()
    for number in range(commits):
        portion = journal.load(READING, after=0, moment=moment())
        assert portion is not None
        assert portion.last == (number + 1) * BATCH
        journal.settle(READING, portion.first, portion.last)
        journal.tick(moment())
    journal.close(moment())
    return (written() - before) / (commits * BATCH * RECORD_BYTES)


# A million records


def with_a_million(folder: Path) -> dict[str, float]:
    """Fill a store, open it in a fresh process, and drain it."""
    full, empty = folder / "million", folder / "empty"
    journal, entries = open_journal(full), records(1_000)
    for _ in range(MILLION // len(entries)):
        journal.append(READING, entries, moment=moment())
    journal.close(moment())
    open_journal(empty).close(moment())
    opened = [_open_apart(full) for _ in range(5)]
    bare = [_open_apart(empty) for _ in range(3)]
    assert all(one["records"] == MILLION for one in opened)
    figures = {
        "open_ms_1m_pending": statistics.median(one["open_ms"] for one in opened),
        "scan_ms_one_segment": statistics.median(one["scan_ms"] for one in opened),
        "rss_mb_1m_pending": _median_kb(opened) / 1024 - _median_kb(bare) / 1024,
    }
    journal = open_journal(full)
    while (portion := journal.load(READING, after=0, moment=moment())) is not None:
        journal.settle(READING, portion.first, portion.last)
        journal.tick(moment())
    journal.close(moment())
    figures["disk_mb_after_drain"] = disk_bytes(full) / MIB
    return figures


def _open_apart(path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench._outbox_open", str(path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _median_kb(opened: list[dict[str, float]]) -> float:
    return statistics.median(one["rss_kb"] for one in opened)


def disk_bytes(path: Path) -> int:
    """What the files of a directory take, by the blocks that they have."""
    return sum(file.stat().st_blocks * 512 for file in path.iterdir())


class _Unsynced(PosixDisk):
    """A disk whose syncs cost nothing, where only the size of the files is looked at."""

    def sync(self, name: str) -> None:
        """Nothing."""


def thirty_days(folder: Path) -> float:
    """MB of 2,592,000 commits of one record each, scaled by whole segments from a run that filled ten."""
    path = folder / "days"
    journal = Journal.open(_Unsynced(path), BOUNDS, moment=moment(), draw=secrets.token_bytes)
    entries = records(1)
    written = 0
    while len(segments := sorted(path.glob(f"{READING:d}-*.seg"))) <= 10:
        for _ in range(100):
            written += 1
            assert journal.append(READING, entries, moment=moment()) == written
    journal.close(moment())
    in_ten = int(segments[10].name.split("-")[1], 16) - 1
    ten = sum(segment.stat().st_blocks * 512 for segment in segments[:10])
    others = disk_bytes(path) - sum(segment.stat().st_blocks * 512 for segment in segments)
    needed = math.ceil(SECONDS_30_DAYS / (in_ten / 10))
    assert needed <= BOUNDS.quota(READING)
    return (needed * ten / 10 + others) / MB


# The whole path


async def whole_path(folder: Path) -> dict[str, float]:
    """Microseconds a record, in hundreds of readings: until all are durable, and until all are settled."""
    outbox = await JournalOutbox.open(
        folder / "typed", bounds=HUNDREDS, clock=SystemClock(), moments=moment, flush_ms=0
    )
    bodies = [Reading(name="cpu_temp_c", value=40 + i / 8) for i in range(BATCH)]
    put_s: list[float] = []
    drained_s: list[float] = []
    for _ in range(BLOCKS):
        began = time.perf_counter()
        for _ in range(COMMITS):
            tickets = [outbox.put(body, at_ms=1_800_000_000_000) for body in bodies]
            await tickets[-1].durable()
        put_s.append(time.perf_counter() - began)
        began, left = time.perf_counter(), COMMITS * BATCH
        while left:
            batch = await outbox.load(READING)
            assert batch is not None
            assert await outbox.settle(batch.batch)
            left -= batch.batch.last - batch.batch.first + 1
        drained_s.append(time.perf_counter() - began)
    await outbox.close()
    one_us = 1_000_000 / (COMMITS * BATCH)
    return {
        "typed_enqueue_us": statistics.median(put_s) * one_us,
        "typed_drain_us": statistics.median(drained_s) * one_us,
    }


if __name__ == "__main__":
    for key, figure in run().items():
        sys.stdout.write(f"{key} {figure:.3f}\n")
