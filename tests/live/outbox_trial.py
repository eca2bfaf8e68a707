"""A writer that is stopped at a random moment, again and again, and what must hold of its outbox afterwards.

    python -m tests.live.outbox_trial --kills 100              kill -9, on a directory of its own
    python -m tests.live.outbox_trial --cuts 20                power cuts, through LazyFS (needs it on the PATH)

The writer puts records of three classes in all grades, hands batches out and settles them, and says on its standard
output what was promised to it. What must hold: whatever was promised is there with its own content, or was settled; no
number is promised twice; a class's records lie in the order in which they were put, without holes; a batch that was
handed out comes back with the same numbers and the same bytes until it is settled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edge_agent.adapters.outbox import JournalOutbox, JournalTicket
from edge_agent.adapters.system import SystemClock
from edge_agent.core.journal import JournalBounds, Moment
from shared.limits import KIB, MIB
from shared.telemetry import BatchId, Body, DeviceEvent, Grade, Reading, RecordClass, Result
from shared.wire.columns import decode_columns

ROOT = Path(__file__).resolve().parents[2]
CLASSES = (RecordClass.EVENT, RecordClass.RESULT, RecordClass.READING)
BOUNDS = JournalBounds(total_bytes=32 * MIB, segment_bytes=64 * KIB, batch_bytes=32 * KIB, batch_records=50)
"""Small segments, so that some begin and some are given back in each round."""
VALUES_A_ROUND = 1_000_000
MOST_LINES = 4_000


def moment() -> Moment:
    """By this machine's clocks; nothing expires here."""
    return Moment("trial", time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 10**6, 0, False)


async def open_outbox(path: Path) -> JournalOutbox:
    """The outbox of both sides of the trial."""
    return await JournalOutbox.open(path, bounds=BOUNDS, clock=SystemClock(), moments=moment, flush_ms=5)


# The writer


def body_of(klass: RecordClass, value: int) -> Body:
    """A record of this class that says its value, and is not always of one size."""
    text = "x" * (value * 37 % 400)
    match klass:
        case RecordClass.EVENT:
            return DeviceEvent(name=str(value), detail={"text": text})
        case RecordClass.RESULT:
            return Result(request=str(value), model=text, version="1", variant="int8", rung="full")
        case _:
            return Reading(name=text, value=value)


def value_of(body: Body) -> int:
    """What `body_of` was given."""
    match body:
        case DeviceEvent(name=name):
            return int(name)
        case Result(request=request):
            return int(request)
        case Reading(value=value):
            return int(value)
        case _:
            raise AssertionError(f"nobody put {body}")


def say(*words: object) -> None:
    """One line, whole, at once: what comes behind it had not happened before."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def write(path: Path, *, seed: int) -> None:
    """Put, hand out and settle until somebody ends this process."""
    chance = random.Random(seed)
    say("opening")
    outbox = await open_outbox(path)
    value = seed * VALUES_A_ROUND
    async with asyncio.TaskGroup() as group:
        while True:
            for _ in range(chance.randint(1, 40)):
                value += 1
                klass = chance.choice(CLASSES)
                say("putting", int(klass), value)
                ticket = outbox.put(body_of(klass, value), at_ms=value, grade=chance.choice(list(Grade)))
                group.create_task(_promised(ticket, klass, value))
            if chance.random() < 0.5:
                await outbox.flush()
            await asyncio.sleep(0)
            if chance.random() < 0.6:
                await _send(outbox, chance.choice(CLASSES), chance)


async def _promised(ticket: JournalTicket, klass: RecordClass, value: int) -> None:
    say("put", int(klass), await ticket.durable(), value)


async def _send(outbox: JournalOutbox, klass: RecordClass, chance: random.Random) -> None:
    """Hand a window of batches out, and settle some of them, in any order."""
    window: list[BatchId] = []
    after = 0
    while len(window) < 4 and (batch := await outbox.load(klass, after=after)) is not None:
        window.append(batch.batch)
        after = batch.batch.last
        say("handed", int(klass), batch.batch.first, batch.batch.last, batch.batch.digest)
    chance.shuffle(window)
    for name in window[: chance.randint(0, len(window))]:
        say("settling", int(klass), name.first, name.last)
        await outbox.settle(name)


# The judge

Place = tuple[int, int]


@dataclass
class Judge:
    """What the writers were promised, over all rounds."""

    put: dict[int, int] = field(default_factory=dict)
    promised: dict[Place, int] = field(default_factory=dict)
    settled: set[Place] = field(default_factory=set)
    handed: dict[Place, tuple[int, str]] = field(default_factory=dict)
    stops: int = 0

    def hear(self, lines: list[str]) -> None:
        """Take down what a writer said; a line that was cut short was not said."""
        for line in (line for line in lines if line.endswith("\n")):
            match line.split():
                case ["putting", klass, value]:
                    self.put[int(value)] = int(klass)
                case ["put", klass, number, value]:
                    place = int(klass), int(number)
                    assert place not in self.promised, f"number {place} was given twice"
                    self.promised[place] = int(value)
                case ["handed", klass, first, last, digest]:
                    self.see_handed((int(klass), int(first)), int(last), digest)
                case ["settling", klass, first, last]:
                    self.settled |= {(int(klass), number) for number in range(int(first), int(last) + 1)}

    def see_handed(self, place: Place, last: int, digest: str) -> None:
        """A batch was handed out: as before, if it was before."""
        known = self.handed.setdefault(place, (last, digest))
        assert known == (last, digest), f"batch {place} was {known}, and is {(last, digest)}"

    def look(self, path: Path) -> None:
        """Read everything that waits, settle nothing, and put one more record of each class."""
        self.stops += 1
        found = asyncio.run(self._read(path))
        for place, value in self.promised.items():
            assert found.get(place, value) == value, f"{place} held {value}, and holds {found[place]}"
            assert place in found or place in self.settled, f"{place} was promised, and is gone"
        for (klass, number), value in found.items():
            assert self.put[value] == klass, f"{klass, number} holds {value}, which nobody put there"
        for klass in CLASSES:
            numbers = [number for one, number in found if one == klass]
            values = [value for (one, _), value in found.items() if one == klass]
            assert values == sorted(set(values)), f"class {klass} is out of order"
            holes = set(range(1, numbers[-1])) - set(numbers)
            assert all((klass, number) in self.settled for number in holes), f"class {klass} has holes"

    async def _read(self, path: Path) -> dict[Place, int]:
        found: dict[Place, int] = {}
        outbox = await open_outbox(path)
        try:
            for klass in CLASSES:
                # So it is seen whether a number would be given twice.
                value = self.stops * VALUES_A_ROUND - 1 - int(klass)
                number = await outbox.put(body_of(klass, value), at_ms=value).durable()
                self.hear([f"putting {klass} {value}\n", f"put {klass} {number} {value}\n"])
                after = 0
                while (batch := await outbox.load(klass, after=after)) is not None:
                    assert batch.gap is None, f"a gap where nothing was lost: {batch}"
                    self.see_handed((int(klass), batch.batch.first), batch.batch.last, batch.batch.digest)
                    for record in decode_columns(batch.columns):
                        found[int(klass), record.seq] = value_of(record.body)
                    after = batch.batch.last
            assert not outbox.depth().lost
        finally:
            await outbox.close()
        return found


# The trial


def stop_writers(path: Path, *, rounds: int, seed: int, cut: Callable[[], None] | None = None) -> Judge:
    """Start a writer, stop it at a random moment and look, so many times; AssertionError for a broken promise.

    Args:
        path: the outbox's directory.
        rounds: how many writers there are, one after the other.
        seed: for the moments.
        cut: takes the power away while the writer stands still, before it is killed; None only kills.
    """
    judge, chance = Judge(), random.Random(seed)
    for number in range(rounds):
        judge.hear(run_writer(path, seed=number, lines=1 + int(MOST_LINES ** chance.random()), cut=cut))
        judge.look(path)
    return judge


def run_writer(path: Path, *, seed: int, lines: int, cut: Callable[[], None] | None) -> list[str]:
    """What a writer said until it was killed, soon after it had said so many lines."""
    command = [sys.executable, "-m", "tests.live.outbox_trial", "--write", str(path), "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        assert child.stdout is not None
        try:
            said = [child.stdout.readline() for _ in range(lines)]
            assert said[-1], "the writer ended by itself"
            if cut is not None:
                child.send_signal(signal.SIGSTOP)
                cut()
        finally:
            child.kill()
        return said + child.stdout.readlines()


@contextlib.contextmanager
def lazyfs(folder: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system that forgets what was not synced, at a word: where it is mounted, and the word."""
    mounted, kept, orders, done = (folder / name for name in ("mounted", "kept", "orders", "done"))
    config = folder / "lazyfs.toml"
    config.write_text(
        f'[faults]\nfifo_path="{orders}"\nfifo_path_completed="{done}"\n'
        '[cache]\napply_eviction=false\n[cache.simple]\ncustom_size="256mb"\nblocks_per_page=1\n'
        '[filesystem]\nlog_all_operations=false\nlogfile=""\n'
    )
    mounted.mkdir()
    kept.mkdir()
    os.mkfifo(orders)
    os.mkfifo(done)
    command = [
        "lazyfs",
        str(mounted),
        "--config-path",
        str(config),
        "-o",
        "modules=subdir",
        "-o",
        f"subdir={kept}",
        "-f",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as system:
        try:
            with done.open() as answers, orders.open("w") as words:

                def cut() -> None:
                    words.write("lazyfs::clear-cache\n")
                    words.flush()
                    assert answers.readline() == "finished::clear-cache\n"

                # Orders are read once the file system is mounted.
                cut()
                assert mounted.is_mount()
                yield mounted, cut
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(mounted)], check=False)
            system.terminate()


def main(arguments: list[str]) -> int:
    """Run the trial, or be its writer."""
    parser = argparse.ArgumentParser(prog="python -m tests.live.outbox_trial")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.write is not None:
        asyncio.run(write(options.write, seed=options.seed))
        return 0
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cut = None
        path = Path(folder)
        if options.cuts:
            path, cut = stack.enter_context(lazyfs(path))
        judge = stop_writers(path / "outbox", rounds=options.cuts or options.kills, seed=options.seed, cut=cut)
        sys.stdout.write(f"{judge.stops} stops, {len(judge.promised)} records promised, none lost, none given twice\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
