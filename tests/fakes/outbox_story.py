"""A story of an outbox, told by a seed: puts, windows, settling, eviction, drops, expiry, restarts; and its judge.

The store may fail at any step: the story takes down what was promised and goes on. `judge` then asks a store, opened
from whatever the disk holds, whether every promise was kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edge_agent.adapters.buried import Buried
from edge_agent.adapters.journal import Journal
from edge_agent.adapters.records import RecordStore, encode_record
from edge_agent.core.journal import JournalBounds, Moment
from edge_agent.ports import Disk
from shared.errors import StorageError
from shared.limits import KIB, MIB
from shared.telemetry import BatchId, Body, DeviceEvent, Outcome, Reading, RecordClass, Result
from shared.wire.columns import decode_columns
from shared.wire.messages import Batch

Place = tuple[int, int]
"""Class and number."""

HOUR_MS = 3_600_000
STEPS = 60
MOST_LOADS = 10_000
EVENT, OUTCOME, RESULT, READING = RecordClass
BOUNDS = JournalBounds(
    total_bytes=7 * 2 * KIB + 16 * KIB,
    segment_bytes=2 * KIB,
    batch_bytes=900,
    batch_records=6,
    ttl_ms={OUTCOME: HOUR_MS},
)
"""So small that a story fills segments, evicts and gives back."""


def body_of(klass: RecordClass, value: int, text: str = "") -> Body:
    """A record of this class that says its value."""
    match klass:
        case RecordClass.EVENT:
            return DeviceEvent(name=str(value), detail={"text": text})
        case RecordClass.OUTCOME:
            return Outcome(request=str(value), label=text)
        case RecordClass.RESULT:
            return Result(request=str(value), model=text, version="1", variant="int8", rung="full")
        case RecordClass.READING:
            return Reading(name=text, value=value)


def value_of(body: Body) -> int:
    """What `body_of` was given."""
    match body:
        case DeviceEvent(name=text) | Outcome(request=text) | Result(request=text):
            return int(text)
        case Reading(value=value):
            return int(value)


@dataclass
class Story:
    """What happened so far, and when: `at` counts the disk's calls.

    Attributes:
        disks: opens the two directories: that of the journal, and that for what is put aside.
        promised: what an append that returned said, by place.
        settling: when it was begun to settle a place.
        handed: when a batch was first handed out, its last number and digest, by the place of its first.
        dropping: when it was begun to drop a class, and everything in it so far.
        told: the reason of every gap that was handed out, by place.
        uptimes_ms: what the machine's clock said, and when.
    """

    disks: Callable[[], tuple[Disk, Disk]]
    seed: int
    at: Callable[[], int]
    bounds: JournalBounds = BOUNDS
    promised: dict[Place, tuple[int, int]] = field(default_factory=dict)
    values: dict[int, RecordClass] = field(default_factory=dict)
    settling: dict[Place, int] = field(default_factory=dict)
    handed: dict[Place, tuple[int, int, str]] = field(default_factory=dict)
    dropping: list[tuple[int, RecordClass]] = field(default_factory=list)
    told: dict[Place, str] = field(default_factory=dict)
    errors: list[StorageError] = field(default_factory=list)
    uptime_ms: int = 0
    buried: int = 0
    uptimes_ms: list[tuple[int, int]] = field(default_factory=list)

    def tell(self, *, steps: int = STEPS) -> None:
        """All of it; the store's errors are taken down, and any other goes through."""
        chance = random.Random(self.seed)
        self._draws = random.Random(self.seed + 1)
        self._open_disks: tuple[Disk, ...] = ()
        self.store: RecordStore | None = None
        acts: list[tuple[int, Callable[[random.Random], None]]] = [
            (40, self._put),
            (20, self._send),
            (20, self._tick),
            (2, self._drop),
            (4, self._restart),
            (4, self._crash),
            (2, self._wait),
        ]
        for _ in range(steps):
            (act,) = chance.choices([act for _, act in acts], [weight for weight, _ in acts])
            # Of its own seed, so that a step that failed changes nothing about the ones behind it.
            own = random.Random(chance.random())
            self.uptimes_ms.append((self.at(), self.uptime_ms))
            try:
                if self.store is None:
                    self.store = self.open()
                act(own)
            except StorageError as error:
                self.errors.append(error)

    def stop(self) -> None:
        """End as one should."""
        (self.store or self.open()).close(self.moment())

    def open(self) -> RecordStore:
        """Open the store; as a new process would, after the end of the one before."""
        for disk in self._open_disks:
            disk.close()
        self._open_disks = self.disks()
        disk, aside = self._open_disks
        journal = Journal.open(disk, self.bounds, moment=self.moment(), draw=self._draw)
        return RecordStore(journal, buried=Buried(aside, most_bytes=MIB))

    def moment(self) -> Moment:
        """Now, in a world with one boot."""
        self.uptime_ms += 1
        return Moment("story", self.uptime_ms, 0, False)

    def _draw(self, size: int) -> bytes:
        return self._draws.randbytes(size)

    def _open_store(self) -> RecordStore:
        assert self.store is not None
        return self.store

    def _put(self, chance: random.Random) -> None:
        (klass,) = chance.choices(list(RecordClass), (2, 1, 2, 5))
        values = [len(self.values) + i for i in range(chance.choice((1, 2, 4, 8)))]
        self.values |= dict.fromkeys(values, klass)
        entries = [
            (value * 1000, encode_record(body_of(klass, value, "x" * chance.choice((0, 20, 150))))) for value in values
        ]
        first = self._open_store().append(klass, entries, moment=self.moment())
        for number, value in enumerate(values, first):
            assert (klass, number) not in self.promised, f"number {klass, number} was given twice"
            self.promised[klass, number] = self.at(), value

    def _send(self, chance: random.Random) -> None:
        klass, after = chance.choice(list(RecordClass)), 0
        window: list[BatchId] = []
        while len(window) < 3 and (batch := self._open_store().load(klass, after=after, moment=self.moment())):
            self._see(batch)
            window.append(batch.batch)
            after = batch.batch.last
        chance.shuffle(window)
        for name in window[: chance.choice((0, 1, 3, 3))]:
            for number in range(name.first, name.last + 1):
                self.settling.setdefault((klass, number), self.at())
            if chance.random() < 0.1:
                self.buried += self._open_store().bury(name, reason="telemetry.columns", moment=self.moment())
            else:
                self._open_store().settle(name)

    def _see(self, batch: Batch) -> None:
        name = batch.batch
        if batch.gap is not None:
            self.told |= dict.fromkeys(((name.klass, n) for n in range(name.first, name.last + 1)), batch.gap.reason)
        else:
            _, *known = self.handed.setdefault((name.klass, name.first), (self.at(), name.last, name.digest))
            assert known == [name.last, name.digest], f"{name} was {known}"

    def _tick(self, chance: random.Random) -> None:
        self.uptime_ms += chance.choice((1, 1_000))
        self._open_store().tick(self.moment())

    def _drop(self, chance: random.Random) -> None:
        klass = chance.choice((OUTCOME, RESULT, READING))
        self.dropping.append((self.at(), klass))
        self._open_store().drop(klass, moment=self.moment())

    def _restart(self, chance: random.Random) -> None:
        store, self.store = self._open_store(), None
        store.close(self.moment())

    def _crash(self, chance: random.Random) -> None:
        self.store = None

    def _wait(self, chance: random.Random) -> None:
        self.uptime_ms += HOUR_MS


@dataclass
class _Answer:
    """What a store gave when it was drained."""

    found: dict[Place, int] = field(default_factory=dict)
    gaps: dict[Place, str] = field(default_factory=dict)


def judge(
    story: Story,
    store: RecordStore,
    *,
    at: int,
    legit: Mapping[Place, str] | None = None,
    may_be_damaged: bool = False,
    may_repeat: bool = False,
) -> Mapping[Place, str]:
    """Drain a store and see that everything was kept which was promised up to that moment; returns its gaps.

    Args:
        story: what was promised.
        store: opened from what the disk held.
        at: the moment, as the story counts.
        legit: where given, what may have been evicted is in it.
        may_be_damaged: gaps for damage are no surprise.
        may_repeat: what was handed out may come back in other batches.
    """
    answer = _Answer()
    for klass in RecordClass:
        _drain(story, store, klass, answer, at=None if may_repeat else at)
    for klass in RecordClass:
        value = len(story.values)
        story.values[value] = klass
        following = store.append(klass, [(0, encode_record(body_of(klass, value)))], moment=story.moment())
        places = {place for place in (*story.promised, *answer.found, *answer.gaps) if place[0] == klass}
        known = {place for place in places if place not in story.promised or story.promised[place][0] <= at}
        highest = max((number for _, number in known), default=0)
        assert following > highest, f"class {klass}: {following} would be given again, {highest} was"
        holes = {(int(klass), n) for n in range(1, following)} - answer.found.keys() - answer.gaps.keys()
        assert all(story.settling.get(hole, at + 1) <= at for hole in holes), f"class {klass} has holes: {holes}"
        values = [value for (one, _), value in answer.found.items() if one == klass]
        assert values == sorted(set(values)), f"class {klass} is out of order"
    assert may_be_damaged or "damaged" not in answer.gaps.values()
    for place, (promised_at, value) in story.promised.items():
        if promised_at > at:
            continue
        if place in answer.found:
            assert answer.found[place] == value, f"{place} held {value}, and holds {answer.found[place]}"
        elif place in answer.gaps:
            reason = answer.gaps[place]
            is_legit = _may_be(story, place, reason, at=at)
            is_legit &= reason != "evicted" or legit is None or legit.get(place) == reason
            assert is_legit or (may_be_damaged and reason == "damaged"), f"{place} was promised, and is {reason}"
        else:
            assert story.settling.get(place, at + 1) <= at, f"{place} was promised, and is gone"
    return answer.gaps


def _drain(story: Story, store: RecordStore, klass: RecordClass, answer: _Answer, *, at: int | None) -> None:
    last = 0
    for _ in range(MOST_LOADS):
        batch = store.load(klass, after=0, moment=story.moment())
        if batch is None:
            return
        name = batch.batch
        assert name.first > last, f"{name} comes behind {last}"
        last = name.last
        if batch.gap is not None:
            answer.gaps |= dict.fromkeys(((int(klass), n) for n in range(name.first, last + 1)), batch.gap.reason)
        else:
            handed_at, *known = story.handed.get((int(klass), name.first), (MOST_LOADS**2, last, name.digest))
            assert at is None or handed_at > at or known == [last, name.digest], f"{name} was {known}"
            for record in decode_columns(batch.columns):
                value = value_of(record.body)
                assert story.values[value] == klass
                answer.found[int(klass), record.seq] = value
        assert store.settle(name)
    raise AssertionError(f"class {klass} does not end")


def _may_be(story: Story, place: Place, reason: str, *, at: int) -> bool:
    """Whether there may be such a gap there at all."""
    match reason:
        case "evicted":
            return place[0] != EVENT
        case "expired":
            return place[0] == OUTCOME
        case "dropped":
            return any(began <= at and klass == place[0] for began, klass in story.dropping)
        case "refused":
            return story.settling.get(place, at + 1) <= at
        case _:
            return False
