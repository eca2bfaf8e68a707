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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from edge_agent.adapters import recovery
from edge_agent.adapters.chain import Chain
from edge_agent.core import frames
from edge_agent.core.frames import ClassCursor, Cursor, Entry, SegmentName
from edge_agent.core.journal import JournalBounds, Moment, Portion, cut, kept_gaps, victim
from edge_agent.ports import Depth, Disk, Wear
from shared.errors import InvalidValue, StorageError, StorageFull
from shared.telemetry import GapReason, RecordClass

CURSOR_EVERY_MS: Final = 1_000
CURSOR_EVERY_RECORDS: Final = 1_000
CURSOR_IDLE_MS: Final = 3_600_000
"""So often the store's clock is written down while records wait, so that a power cut takes no more of their time."""
SMALL_COMMIT_BYTES: Final = 32 * 1024
"""Commits below this go to a file of zeros, those above to one that only has its room set aside.

A commit to the latter also changes the file system's own records: that costs about 16 KiB on the device and, of a
commit of 20 KiB, a third of the time; zeros cost each byte twice, until the file is used again.
"""

Draw = Callable[[int], bytes]
_MEMORY: Final = 8
"""How many commits the mean size looks back on."""


class Journal:
    """Records that wait, by class. Made by `open`."""

    def __init__(self, disk: Disk, bounds: JournalBounds, *, draw: Draw, state: recovery.Recovered) -> None:
        self.epoch = state.epoch
        self._disk = disk
        self._bounds = bounds
        self._draw = draw
        self._chains: Mapping[RecordClass, Chain] = state.chains
        self._spares = state.spares
        self._has_reserve = state.has_reserve
        self._foreign = state.foreign
        self._lost = dict(state.lost)
        self._generation = state.generation
        self._place = state.place
        self._opened = state.opened
        self._opened_store_ms = state.store_ms
        self._saved_ms = state.opened.uptime_ms
        self._unsaved = 0
        self._saved_next = self._next()
        self.is_dirty = False
        self._commit_bytes = 0.0
        self._other_bytes = 0
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
            journal = cls(disk, bounds, draw=draw, state=state)
            # Ties the store's clock to this boot, and gives back what a crash left behind a cursor that was written.
            journal._checkpoint(moment)
            journal._restock()
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
        store_ms = self._store_ms(moment)
        with _translated():
            if not chain.room_for(need):
                self._add_segment(chain, moment)
            try:
                first = chain.append(parts, store_ms=store_ms)
            except OSError:
                self._add_segment(chain, moment)
                first = chain.append(parts, store_ms=store_ms)
        self._syncs += 1
        self._commit_bytes += (need - self._commit_bytes) / _MEMORY
        return first

    def load(self, klass: RecordClass, *, after: int, moment: Moment) -> Portion | None:
        """The first batch or gap of the class above `after` that is not settled; None when there is none.

        Raises:
            StorageError: the disk refused. Damage is no error: it is a gap.
        """
        ttl_ms = self._bounds.ttl_ms.get(klass, 0)
        expired_ms = self._store_ms(moment) - ttl_ms if ttl_ms else None
        chain = self._chains[klass]
        before = len(chain.gaps)
        with _translated():
            portion = chain.load(after=after, expired_ms=expired_ms)
            if portion is not None and chain.is_unsure and portion.last + 1 == chain.next:
                # What failed behind it would be found as a part of it one day: another file ends it for good.
                self._add_segment(chain, moment)
        self.is_dirty |= len(chain.gaps) != before
        return portion

    def settle(self, klass: RecordClass, first: int, last: int) -> bool:
        """Let go of a portion that was handed out; False for any other, or when all of it was settled."""
        if not self._chains[klass].settle(first, last):
            return False
        self.is_dirty = True
        self._unsaved += last - first + 1
        return True

    def give_up(self, klass: RecordClass, number: int) -> None:
        """Declare one record damaged that is whole on the disk and means nothing to whoever reads it."""
        self._chains[klass].lose(number, number, "damaged")
        self.is_dirty = True

    def drop(self, klass: RecordClass, *, moment: Moment) -> int:
        """Drop everything that waits of this class, leaving a gap; returns how many records. Not class 0."""
        chain = self._chains[klass]
        with _translated():
            dropped = self._lose(chain, chain.settled + 1, chain.next - 1, "dropped", moment)
            # The last one stays: its name says from where numbers go on, whatever becomes of the cursor.
            while len(chain.segments) > 1:
                self._give_back(chain.take_oldest())
            chain.begin_batch()
        return dropped

    def tick(self, moment: Moment) -> None:
        """Expire what is due, write the cursor where it is due, give settled segments back; raises StorageError.

        To be called about once a second while `is_dirty`, and once a minute always.
        """
        with _translated():
            for klass, ttl_ms in self._bounds.ttl_ms.items():
                chain = self._chains[klass]
                while ttl_ms and len(chain.segments) > 1:
                    newest_ms = chain.newest_before(0)
                    if newest_ms is None or newest_ms > self._store_ms(moment) - ttl_ms:
                        break
                    self._give_back(self._lose_oldest(chain, "expired", moment))
            since_ms = moment.uptime_ms - self._saved_ms
            due = since_ms >= CURSOR_EVERY_MS or self._unsaved >= CURSOR_EVERY_RECORDS
            idle = since_ms >= CURSOR_IDLE_MS and any(chain.waiting() for chain in self._chains.values())
            if (self.is_dirty and due) or idle:
                self._checkpoint(moment)
                self._restock()

    def close(self, moment: Moment) -> None:
        """Write the cursor if it would say something else, and let go of the files. Safe to call twice.

        It then says how far numbers go, so that damage at the very end is known for what it is. After a crash it looks
        like a commit that never returned.
        """
        try:
            with _translated():
                if self.is_dirty or self._saved_next != self._next():
                    self._checkpoint(moment)
        finally:
            self._disk.close()

    def depth(self, moment: Moment) -> Depth:
        """How much waits, and what it has cost. `buried` is not known here: 0."""
        oldest: dict[RecordClass, int] = {}
        now_ms = self._store_ms(moment)
        for klass, chain in self._chains.items():
            try:
                began_ms = chain.oldest_ms()
            except OSError:
                began_ms = None
            if began_ms is not None:
                oldest[klass] = max(0, now_ms - began_ms)
        written = self._other_bytes + sum(chain.written_bytes for chain in self._chains.values())
        return Depth(
            records={klass: chain.waiting() for klass, chain in self._chains.items()},
            bytes=self._files() * self._bounds.segment_bytes + frames.SLOTS * frames.SLOT_BYTES,
            oldest_ms=oldest,
            lost=self._losses(),
            buried=0,
            wear=Wear(written_bytes=written, syncs=self._syncs),
        )

    # Room

    def _files(self) -> int:
        used = sum(len(chain.segments) + (chain.failed is not None) for chain in self._chains.values())
        return used + len(self._spares) + int(self._has_reserve)

    def _add_segment(self, chain: Chain, moment: Moment) -> None:
        """Let the chain go on in another file: one that is spare, a new one, or one taken from records."""
        if any(len(one.segments) > 1 and one.stop(0) - 1 <= one.settled for one in self._chains.values()):
            self._checkpoint(moment)
        if chain.failed is not None:
            # Its name must not be found beside that of the file that takes its place.
            with contextlib.suppress(FileNotFoundError):
                self._disk.remove(str(chain.failed))
            chain.failed = None
        held = self._room(chain, moment)
        name = SegmentName(int(chain.klass), chain.next, int.from_bytes(self._draw(4), "little"))
        try:
            if held is None:
                held = self._create(str(name), chain, moment)
            if held != str(name):
                self._disk.rename(held, str(name))
                held = str(name)
            self._disk.sync_names()
        except OSError:
            # There may be a file of this name now, and numbers from its first one on will be looked for in it: nothing
            # more goes to the file before.
            chain.leave()
            if held is not None:
                self._spares.append(held)
            raise
        self._syncs += 1
        chain.add(name)

    def _room(self, chain: Chain, moment: Moment) -> str | None:
        """A file that may be written over, None for a new one."""
        if len(chain.segments) >= self._bounds.quota(chain.klass):
            if chain.klass is RecordClass.EVENT:
                raise _full(chain.klass)
            return self._evict(chain, moment)
        if self._spares:
            return self._spares.pop()
        has_room = self._files() < self._bounds.segments
        if has_room and self._disk.free_bytes() >= self._bounds.segment_bytes + self._bounds.min_free_bytes:
            return None
        return self._make_room(chain, moment)

    def _create(self, name: str, chain: Chain, moment: Moment) -> str:
        """Make a new file of this name; where the disk has no room after all, another file to write over."""
        zeroed = self._commit_bytes < SMALL_COMMIT_BYTES
        try:
            self._disk.create(name, self._bounds.segment_bytes, zeroed=zeroed)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return self._make_room(chain, moment)
        self._other_bytes += self._bounds.segment_bytes if zeroed else 0
        return name

    def _make_room(self, chain: Chain, moment: Moment) -> str:
        held = {klass: len(one.segments) for klass, one in self._chains.items()}
        loser = victim(held, chain.klass)
        if loser is not None:
            return self._evict(self._chains[loser], moment)
        if chain.klass is RecordClass.EVENT and self._has_reserve:
            self._has_reserve = False
            return frames.RESERVE_NAME
        raise _full(chain.klass)

    def _evict(self, chain: Chain, moment: Moment) -> str:
        """A file that may be written over: the chain's oldest, whose records are declared lost."""
        name = self._lose_oldest(chain, "evicted", moment)
        if name not in self._foreign:
            return str(name)
        self._foreign.discard(name)
        self._disk.remove(str(name))
        spare = self._spare_name()
        self._disk.create(spare, self._bounds.segment_bytes, zeroed=self._commit_bytes < SMALL_COMMIT_BYTES)
        return spare

    def _lose_oldest(self, chain: Chain, reason: GapReason, moment: Moment) -> SegmentName:
        """Declare what waits in the oldest segment lost, durably, and take it out of the chain."""
        self._lose(chain, chain.segments[0].base, chain.stop(0) - 1, reason, moment)
        if len(chain.segments) == 1:
            # Then only the cursor says from where numbers go on: so both of its slots do.
            self._save(moment)
        return chain.take_oldest()

    def _lose(self, chain: Chain, first: int, last: int, reason: GapReason, moment: Moment) -> int:
        gaps, lost = chain.gaps, dict(chain.lost)
        records = chain.lose(first, last, reason)
        try:
            self._save(moment)
        except OSError:
            chain.gaps, chain.lost = gaps, lost
            raise
        return records

    def _losses(self) -> dict[str, int]:
        losses = dict(self._lost)
        for chain in self._chains.values():
            for reason, records in chain.lost.items():
                losses[reason] = losses.get(reason, 0) + records
        return losses

    def _give_back(self, name: SegmentName) -> None:
        if name in self._foreign:
            self._foreign.discard(name)
            self._disk.remove(str(name))
            return
        if len(self._spares) >= self._bounds.spares:
            self._remove(str(name))
            return
        spare = self._spare_name()
        try:
            self._disk.rename(str(name), spare)
        except OSError:
            self._spares.append(str(name))
            raise
        self._spares.append(spare)

    def _remove(self, name: str) -> None:
        """Take a file away; where the disk refuses, it still counts, and is the next to be used."""
        try:
            self._disk.remove(name)
        except OSError:
            self._spares.append(name)
            raise

    def _spare_name(self) -> str:
        return f"spare-{self._draw(4).hex()}.seg"

    def _restock(self) -> None:
        """Have a file in reserve for class 0 again, where there is room."""
        if self._has_reserve:
            return
        if self._spares:
            self._disk.rename(self._spares[-1], frames.RESERVE_NAME)
            self._spares.pop()
            self._has_reserve = True
            return
        size = self._bounds.segment_bytes
        if self._files() < self._bounds.segments and self._disk.free_bytes() >= size + self._bounds.min_free_bytes:
            try:
                self._disk.create(frames.RESERVE_NAME, size, zeroed=False)
            except OSError:
                return
            self._has_reserve = True

    # Cursor

    def _checkpoint(self, moment: Moment) -> None:
        """Write the cursor, then give back every segment that it no longer needs."""
        self._save(moment)
        for chain in self._chains.values():
            while len(chain.segments) > 1 and chain.stop(0) - 1 <= chain.settled:
                self._give_back(chain.take_oldest())

    def _save(self, moment: Moment) -> None:
        classes = tuple(
            ClassCursor(chain.settled, chain.next, chain.early, kept_gaps(chain.gaps, base=chain.base()))
            for chain in self._chains.values()
        )
        cursor = Cursor(
            generation=self._generation + 1,
            store_ms=self._store_ms(moment),
            boot=moment.boot,
            uptime_ms=moment.uptime_ms,
            wall_ms=moment.wall_ms,
            synchronised=moment.synchronised,
            segment_bytes=self._bounds.segment_bytes,
            classes=classes,
            lost=self._losses(),
        )
        data = frames.encode_slot(cursor)
        place = (self._place + 1) % frames.SLOTS
        self._disk.write(frames.CURSOR_NAME, place * frames.SLOT_BYTES, data)
        self._disk.sync(frames.CURSOR_NAME)
        # Only now: after a failure the other slot is still the good one, and this one is written again.
        self._place, self._generation = place, cursor.generation
        self.is_dirty, self._unsaved, self._saved_ms = False, 0, moment.uptime_ms
        self._saved_next = self._next()
        self._other_bytes += len(data)
        self._syncs += 1

    def _next(self) -> tuple[int, ...]:
        return tuple(chain.next for chain in self._chains.values())

    def _store_ms(self, moment: Moment) -> int:
        return self._opened_store_ms + max(0, moment.uptime_ms - self._opened.uptime_ms)


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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("no room left for records", hint="free disk space; what waited is kept") from error
        raise StorageError(
            f"the disk refused: {error.strerror}", hint="check the disk and the rights of the state directory"
        ) from error
