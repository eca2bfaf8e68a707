"""Clocks that jump, start in 1970 or are right: a record's time to live becomes neither shorter nor longer by them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_agent.adapters.journal import CURSOR_IDLE_MS, Journal
from edge_agent.core.journal import Moment, bounds_for
from shared.limits import MIB
from shared.telemetry import RecordClass
from tests.fakes.memory_disk import MemoryDisk

READING = RecordClass.READING
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
TTL_MS = 2 * DAY_MS
BOUNDS = replace(bounds_for(MIB), ttl_ms={READING: TTL_MS})
WALL_MS = 1_800_000_000_000
"""What time it is when everything begins."""


@dataclass
class Machine:
    """A machine with a journal, the time that really passes, and clocks that say what the test makes them say.

    Attributes:
        passed_ms: since the record was put.
        up_ms: of it, how long the machine was up.
        unsure_ms: of that, how much may have been forgotten at power cuts.
        error_ms: by how much the wall clock is wrong, unless it is synchronised.
    """

    disk: MemoryDisk = field(default_factory=MemoryDisk)
    boots: int = 1
    booted_ms: int = -5_000
    passed_ms: int = 0
    up_ms: int = 0
    unsure_ms: int = 0
    error_ms: int = 0
    synchronised: bool = False

    def __post_init__(self) -> None:
        self._draws = itertools.count(1)
        self.restart()
        self.journal.append(READING, [(0, b"one")], moment=self.now())

    def now(self) -> Moment:
        """What the clocks say."""
        wall_ms = WALL_MS + self.passed_ms + (0 if self.synchronised else self.error_ms)
        return Moment(f"boot-{self.boots}", self.passed_ms - self.booted_ms, wall_ms, self.synchronised)

    def restart(self) -> None:
        """Only the agent; it was killed."""
        self.journal = Journal.open(
            self.disk, BOUNDS, moment=self.now(), draw=lambda size: next(self._draws).to_bytes(size, "big")
        )

    def run(self, ms: int) -> None:
        """Be up, as long as that, with a tick in each minute that matters."""
        while ms > 0:
            step = min(ms, HOUR_MS)
            self.passed_ms += step
            self.up_ms += step
            ms -= step
            self.journal.tick(self.now())

    def cut_power(self, off_ms: int, *, error_ms: int, synchronised: bool) -> None:
        """Be off for a while, and come back with such a clock."""
        self.boots += 1
        self.passed_ms += off_ms
        self.booted_ms = self.passed_ms
        self.unsure_ms += CURSOR_IDLE_MS
        self.error_ms, self.synchronised = error_ms, synchronised
        self.restart()

    def set_clock(self, *, error_ms: int, synchronised: bool) -> None:
        """Let somebody, or something that knows, set it."""
        self.error_ms, self.synchronised = error_ms, synchronised

    def look(self) -> None:
        """See that the record is there as long as it should be, and no longer."""
        portion = self.journal.load(READING, after=0, moment=self.now())
        assert portion is not None
        if portion.reason is not None:
            assert portion.reason == "expired"
            assert self.passed_ms >= TTL_MS
        else:
            assert self.up_ms - self.unsure_ms < TTL_MS


Step = tuple[str | int | bool, ...]

errors = st.sampled_from([0, -HOUR_MS, 3 * DAY_MS, -WALL_MS, 3650 * DAY_MS])
spans = st.sampled_from([1, 60_000, HOUR_MS, 7 * HOUR_MS, DAY_MS, TTL_MS - 1])
steps = st.one_of(
    st.tuples(st.just("run"), spans),
    st.tuples(st.just("restart")),
    st.tuples(st.just("power"), spans, errors, st.booleans()),
    st.tuples(st.just("clock"), errors, st.booleans()),
)


@given(st.lists(steps, max_size=12))
@example([("clock", 3 * DAY_MS, False), ("restart",)])
@example([("power", HOUR_MS, -WALL_MS, False), ("clock", 0, True), ("run", DAY_MS)])
@example([("run", TTL_MS - 1), ("power", 1, -HOUR_MS, False), ("run", HOUR_MS), ("run", HOUR_MS)])
def test_no_clock_makes_a_record_live_shorter_or_longer(story: list[Step]) -> None:
    machine = Machine()
    for step in story:
        match step:
            case ("run", int(ms)):
                machine.run(ms)
            case ("restart",):
                machine.restart()
            case ("power", int(off_ms), int(error_ms), bool(synchronised)):
                machine.cut_power(off_ms, error_ms=error_ms, synchronised=synchronised)
            case ("clock", int(error_ms), bool(synchronised)):
                machine.set_clock(error_ms=error_ms, synchronised=synchronised)
            case _:
                raise AssertionError(f"no such step: {step}")
    machine.look()


def test_time_without_power_counts_where_the_clock_is_right_on_both_sides() -> None:
    machine = Machine()
    machine.set_clock(error_ms=0, synchronised=True)
    machine.run(HOUR_MS)
    machine.cut_power(TTL_MS, error_ms=0, synchronised=True)
    portion = machine.journal.load(READING, after=0, moment=machine.now())
    assert portion is not None
    assert portion.reason == "expired"


def test_an_idle_journal_writes_its_clock_down_once_an_hour_and_only_while_something_waits() -> None:
    machine = Machine()
    before = machine.disk.calls.count(("sync", "cursor"))
    machine.run(10 * HOUR_MS)
    assert machine.disk.calls.count(("sync", "cursor")) == before + 10
    portion = machine.journal.load(READING, after=0, moment=machine.now())
    assert portion is not None
    machine.journal.settle(READING, portion.first, portion.last)
    machine.run(HOUR_MS)
    settled = machine.disk.calls.count(("sync", "cursor"))
    machine.run(10 * HOUR_MS)
    assert machine.disk.calls.count(("sync", "cursor")) == settled
