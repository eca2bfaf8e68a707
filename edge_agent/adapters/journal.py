"""The journal: records of all classes in segments on one disk, bounded by bytes (docs/adr/0009-the-journal.md).

    journal = Journal.open(disk, bounds, moment=…, draw=…)
    first = journal.append(klass, entries, moment=…)      durable when it returns
    portion = journal.load(klass, after=…, moment=…)      a batch, or a gap, whose boundaries are durable
    journal.settle(klass, first, last)                    the hub has it
    journal.tick(moment)                                  about once a second: what is due

Rules of this file:
1. No threads, no clock, no randomness: the disk, the moment and the draw are arguments. Whoever calls serialises.
2. A gap is in the cursor, synced, before the segment that it stands for is given to another.
3. A segment is given back only after a cursor that no longer needs it is on the disk.
4. A file whose sync failed is never synced again: its pages may count as written. What was not on the disk yet is
   written anew to another file.

Not here: what a record is, when to commit, tickets (`outbox.py`).
"""

from __future__ import annotations

import contextlib
import errno
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from edge_agent.adapters import recovery
from edge_agent.adapters.chain import Chain
from edge_agent.adapters.spares import Spares
from edge_agent.core import frames
from edge_agent.core.frames import Cursor, Entry, SegmentName
from edge_agent.core.journal import JournalBounds, Moment, Portion, StoreClock, cut, victim
from edge_agent.core.standing import Standing
from edge_agent.ports import Depth, Disk, Wear
from shared.errors import InvalidValue, StorageError, StorageFull
from shared.telemetry import GapReason, RecordClass

CURSOR_EVERY_MS: Final = 1_000
CURSOR_EVERY_RECORDS: Final = 1_000
EXPIRE_EVERY_MS: Final = 1_000
CURSOR_IDLE_MS: Final = 3_600_000
"""So often the store's clock is written down while records wait, so that a power cut takes no more of their time."""

FULL: Final = (errno.ENOSPC, errno.EDQUOT)

Draw = Callable[[int], bytes]


class Journal:
    """Records that wait, by class. Made by `open`."""

    def __init__(
        self, disk: Disk, bounds: JournalBounds, *, moment: Moment, draw: Draw, state: recovery.Recovered
    ) -> None:
        self.epoch = state.epoch
        self._disk = disk
        self._bounds = bounds
        self._draw = draw
        self._chains: Mapping[RecordClass, Chain] = state.chains
        self._spares = state.spares
        self._cursor = state.cursor
        self._lost = dict(state.cursor.cursor.lost) if state.cursor.cursor is not None else {}
        self._store_clock = StoreClock(state.store_ms, moment.uptime_ms)
        self._expired_ms = moment.uptime_ms - EXPIRE_EVERY_MS
        self._unsaved = 0
        self.is_dirty = False
        self._syncs = 0

    @classmethod
    def open(cls, disk: Disk, bounds: JournalBounds, *, moment: Moment, draw: Draw) -> Journal:
        """Open the store on this disk, or make one.

        Reads the names, the cursor, and the last segment of each class.

        Raises:
            StorageFull: there is no room for a new store.
            StorageError: the disk refused.
        """
        with _translated():
            state = recovery.recover(disk, bounds, moment=moment, draw=draw)
            journal = cls(disk, bounds, moment=moment, draw=draw, state=state)
            # Ties the store's clock to this boot, and gives back what a crash left behind a cursor that was written.
            journal._checkpoint(moment)
            journal._spares.restock(has_room=journal._has_room)
        return journal

    # Records

    def append(self, klass: RecordClass, entries: Sequence[Entry], *, moment: Moment) -> int:
        """Store these records, in order, and return the first one's number; all of them are durable, or none.

        Args:
            klass: their class.
            entries: at least one; together at most what a segment holds.
            moment: now.

        Raises:
            InvalidValue: too many at once.
            StorageFull: there is no room, and none may be made for this class.
            StorageError: the disk refused twice, on two files.
        """
        chain = self._chains[klass]
        parts = cut(entries, bounds=self._bounds)
        need = sum([frames.frame_bytes(len(part.entries), part.size) for part in parts])
        if need > self._bounds.segment_bytes:
            raise InvalidValue(f"{len(entries)} records exceed a segment", code="invalid.record")
        store_ms = self._store_clock.at(moment)
        with _translated():
            if not chain.room_for(need):
                self._add_segment(chain, moment)
            try:
                first = chain.append(parts, store_ms=store_ms)
            except OSError:
                self._add_segment(chain, moment)
                first = chain.append(parts, store_ms=store_ms)
        self._syncs += 1
        self._spares.note_commit(need)
        return first

    def load(self, klass: RecordClass, *, after: int, moment: Moment) -> Portion | None:
        """The first batch or gap of the class above `after` that is not settled; None when there is none.

        Raises:
            StorageError: the disk refused. Damage is no error: it is a gap.
        """
        ttl_ms = self._bounds.ttl_ms.get(klass, 0)
        expired_ms = self._store_clock.at(moment) - ttl_ms if ttl_ms else None
        chain = self._chains[klass]
        before = chain.standing.gaps
        with _translated():
            portion = chain.load(after=after, expired_ms=expired_ms)
            if portion is not None and chain.is_unsure and portion.last + 1 == chain.standing.next:
                # What failed behind it would be found as a part of it one day: another file ends it for good. Where
                # that would take room from records it goes out all the same, because only that makes room; should it
                # grow, the hub compares record by record.
                try:
                    self._add_segment(chain, moment, may_evict=False)
                except (StorageFull, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in FULL:
                        raise
        self.is_dirty |= chain.standing.gaps is not before
        return portion

    def settle(self, klass: RecordClass, first: int, last: int) -> bool:
        """Let go of a portion that was handed out; False for any other, or when all of it was settled."""
        if not self._chains[klass].settle(first, last):
            return False
        self.is_dirty = True
        self._unsaved += last - first + 1
        return True

    def lose(self, klass: RecordClass, first: int, last: int, *, reason: GapReason, moment: Moment) -> int:
        """Make a gap of what waits of these numbers, which is durable when this returns; returns how many those were.

        For records that are whole on the disk and will not be sent. Raises StorageError with nothing changed.
        """
        with _translated():
            return self._lose(self._chains[klass], first, last, reason, moment)

    def drop(self, klass: RecordClass, *, moment: Moment) -> int:
        """Drop everything that waits of this class, leaving a gap; returns how many records. Not class 0."""
        chain = self._chains[klass]
        with _translated():
            dropped = self._lose(chain, chain.standing.settled + 1, chain.standing.next - 1, "dropped", moment)
            # The last one stays: its name says from where numbers go on, whatever becomes of the cursor.
            chain.begin_batch()
            # A file that cannot be given back now still counts, and is the next to be used.
            while len(chain.segments) > 1:
                with contextlib.suppress(OSError):
                    self._spares.give_back(chain.take_oldest())
        return dropped

    def tick(self, moment: Moment) -> None:
        """Expire what is due, write the cursor where it is due, give settled segments back; raises StorageError.

        To be called about once a second while `is_dirty`, and once a minute always.
        """
        with _translated():
            if moment.uptime_ms - self._expired_ms >= EXPIRE_EVERY_MS:
                self._expired_ms = moment.uptime_ms
                for klass, ttl_ms in self._bounds.ttl_ms.items():
                    if ttl_ms:
                        self._expire(self._chains[klass], self._store_clock.at(moment) - ttl_ms, moment)
            saved = self._cursor.cursor
            since_ms = moment.uptime_ms - (saved.uptime_ms if saved is not None else 0)
            due = since_ms >= CURSOR_EVERY_MS or self._unsaved >= CURSOR_EVERY_RECORDS
            idle = since_ms >= CURSOR_IDLE_MS and any(chain.standing.waiting() for chain in self._chains.values())
            if (self.is_dirty and due) or idle:
                self._checkpoint(moment)
                self._spares.restock(has_room=self._has_room)

    def close(self, moment: Moment) -> None:
        """Write the cursor if it would say something else, and let go of the files. Safe to call twice.

        It then says how far numbers go, so that damage at the very end is known for what it is. After a crash it looks
        like a commit that never returned.
        """
        try:
            with _translated():
                saved = self._cursor.cursor
                if self.is_dirty or saved is None or saved.classes != _standings(self._chains.values()):
                    self._checkpoint(moment)
        finally:
            self._disk.close()

    def depth(self, moment: Moment) -> Depth:
        """How much waits, and what it has cost. `buried` is not known here: 0."""
        oldest: dict[RecordClass, int] = {}
        now_ms = self._store_clock.at(moment)
        for klass, chain in self._chains.items():
            try:
                began_ms = chain.oldest_ms()
            except OSError:
                began_ms = None
            if began_ms is not None:
                oldest[klass] = max(0, now_ms - began_ms)
        written = sum(chain.written_bytes for chain in self._chains.values())
        written += self._cursor.written_bytes + self._spares.written_bytes
        return Depth(
            records={klass: chain.standing.waiting() for klass, chain in self._chains.items()},
            bytes=_files(self._chains.values(), self._spares) * self._bounds.segment_bytes
            + frames.SLOTS * frames.SLOT_BYTES,
            oldest_ms=oldest,
            lost=_losses(self._lost, self._chains.values()),
            buried=0,
            wear=Wear(written_bytes=written, syncs=self._syncs + self._cursor.writes),
        )

    # Room

    def _has_room(self) -> bool:
        """Whether there may be one file more, and the file system has the room for it."""
        wanted = self._bounds.segment_bytes + self._bounds.min_free_bytes
        return _files(self._chains.values(), self._spares) < self._bounds.segments and self._disk.free_bytes() >= wanted

    def _add_segment(self, chain: Chain, moment: Moment, *, may_evict: bool = True) -> None:
        """Let the chain go on in another file: one that is spare, a new one, or one taken from records."""
        if any(len(one.segments) > 1 and one.stop(0) - 1 <= one.standing.settled for one in self._chains.values()):
            self._checkpoint(moment)
        if chain.failed is not None:
            # Its name must not be found beside that of the file that takes its place.
            with contextlib.suppress(FileNotFoundError):
                self._disk.remove(str(chain.failed))
            chain.failed = None
        held = self._room(chain, moment, may_evict=may_evict)
        name = SegmentName(int(chain.klass), chain.standing.next, int.from_bytes(self._draw(4), "little"))
        try:
            if held is None:
                held = self._create(str(name), chain, moment, may_evict=may_evict)
            if held != str(name):
                self._disk.rename(held, str(name))
                held = str(name)
            self._disk.sync_names()
        except OSError:
            # There may be a file of this name now, and numbers from its first one on will be looked for in it: nothing
            # more goes to the file before.
            chain.leave()
            if held is not None:
                self._spares.put(held)
            raise
        self._syncs += 1
        chain.add(name)

    def _room(self, chain: Chain, moment: Moment, *, may_evict: bool) -> str | None:
        """A file that may be written over, None for a new one."""
        if len(chain.segments) >= self._bounds.quota(chain.klass):
            if chain.klass is RecordClass.EVENT or not may_evict:
                raise _full(chain.klass)
            return self._spares.reuse(self._lose_oldest(chain, moment))
        spare = self._spares.take()
        if spare is not None or self._has_room():
            return spare
        return self._make_room(chain, moment, may_evict=may_evict)

    def _create(self, name: str, chain: Chain, moment: Moment, *, may_evict: bool) -> str:
        """Make a new file of this name; where the disk has no room after all, another file to write over."""
        try:
            self._spares.create(name)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return self._make_room(chain, moment, may_evict=may_evict)
        return name

    def _make_room(self, chain: Chain, moment: Moment, *, may_evict: bool) -> str:
        if not may_evict:
            raise _full(chain.klass)
        held = {klass: len(one.segments) for klass, one in self._chains.items()}
        loser = victim(held, chain.klass)
        if loser is not None:
            return self._spares.reuse(self._lose_oldest(self._chains[loser], moment))
        reserve = self._spares.take_reserve() if chain.klass is RecordClass.EVENT else None
        if reserve is None:
            raise _full(chain.klass)
        return reserve

    def _expire(self, chain: Chain, until_ms: int, moment: Moment) -> None:
        """Declare the segments lost whose every record is as old as that; times ascend, so they are the first ones."""

        def is_expired(index: int) -> bool:
            newest_ms = chain.newest_before(index)
            return newest_ms is not None and newest_ms <= until_ms

        if not is_expired(0):
            return
        count = bisect_left(range(len(chain.segments)), True, key=lambda index: not is_expired(index))
        self._lose(chain, chain.segments[0].base, chain.stop(count - 1) - 1, "expired", moment)
        for _ in range(count):
            self._spares.give_back(chain.take_oldest())

    def _lose_oldest(self, chain: Chain, moment: Moment) -> SegmentName:
        """Declare what waits in the oldest segment lost, durably, and take it out of the chain."""
        self._lose(chain, chain.segments[0].base, chain.stop(0) - 1, "evicted", moment)
        if len(chain.segments) == 1:
            # Then only the cursor says from where numbers go on: so both of its slots do.
            self._save(moment)
        return chain.take_oldest()

    def _lose(self, chain: Chain, first: int, last: int, reason: GapReason, moment: Moment) -> int:
        standing, lost = chain.standing, dict(chain.lost)
        records = chain.lose(first, last, reason)
        try:
            self._save(moment)
        except OSError:
            chain.standing, chain.lost = standing, lost
            raise
        return records

    # Cursor

    def _checkpoint(self, moment: Moment) -> None:
        """Write the cursor, then give back every segment that it no longer needs."""
        self._save(moment)
        for chain in self._chains.values():
            while len(chain.segments) > 1 and chain.stop(0) - 1 <= chain.standing.settled:
                self._spares.give_back(chain.take_oldest())

    def _save(self, moment: Moment) -> None:
        cursor = Cursor(
            generation=self._cursor.generation + 1,
            store_ms=self._store_clock.at(moment),
            boot=moment.boot,
            uptime_ms=moment.uptime_ms,
            wall_ms=moment.wall_ms,
            synchronised=moment.synchronised,
            segment_bytes=self._bounds.segment_bytes,
            classes=_standings(self._chains.values()),
            lost=_losses(self._lost, self._chains.values()),
        )
        self._cursor.write(cursor)
        self.is_dirty, self._unsaved = False, 0


def _files(chains: Iterable[Chain], spares: Spares) -> int:
    """How many files of a segment's size there are."""
    return spares.count() + sum(len(chain.segments) + (chain.failed is not None) for chain in chains)


def _standings(chains: Iterable[Chain]) -> tuple[Standing, ...]:
    return tuple(chain.standing.kept(base=chain.base()) for chain in chains)


def _losses(before: Mapping[str, int], chains: Iterable[Chain]) -> dict[str, int]:
    """Records lost by reason: before the journal was opened, and since."""
    losses = dict(before)
    for chain in chains:
        for reason, records in chain.lost.items():
            losses[reason] = losses.get(reason, 0) + records
    return losses


def _full(klass: RecordClass) -> StorageFull:
    return StorageFull(
        f"no room for records of class {klass.name.lower()}",
        hint="free disk space, or connect the device: what waits goes to the hub first",
    )


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull("no room left for records", hint="free disk space; what waited is kept") from error
        raise StorageError(
            f"the disk refused: {error.strerror}", hint="check the disk and the rights of the state directory"
        ) from error
