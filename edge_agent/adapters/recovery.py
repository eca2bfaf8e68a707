"""Opening a journal: what the names, the cursor and the last segments say (docs/adr/0009-the-journal.md).

Rules of this file:
1. Reading decides nothing twice: whatever was durable before a crash is found, and what was not was promised to nobody.
2. A number that lies nowhere, and of which the cursor says nothing, is a gap.

Writes only where there is no store yet, and takes away what a crash left half-done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.adapters.chain import Chain, Window
from edge_agent.core import frames
from edge_agent.core.frames import CONTINUES, Cursor, Frame, SegmentName
from edge_agent.core.journal import LARGEST_SEGMENT_BYTES, JournalBounds, Moment, store_time
from edge_agent.ports import Disk
from shared.telemetry import RecordClass


@dataclass(slots=True)
class Recovered:
    """What was found; `place` and `generation` are those of the newest cursor slot."""

    epoch: str
    chains: dict[RecordClass, Chain]
    spares: list[str]
    has_reserve: bool
    foreign: set[SegmentName]
    lost: dict[str, int]
    generation: int
    place: int
    opened: Moment
    store_ms: int


def recover(disk: Disk, bounds: JournalBounds, *, moment: Moment, draw: Callable[[int], bytes]) -> Recovered:
    """The store on this disk; a new one where there is none. Raises OSError."""
    names = disk.names()
    epoch = _epoch(disk, names, draw)
    found = _cursor(disk, names)
    place, cursor = found if found is not None else (frames.SLOTS - 1, None)
    is_same_size = cursor is None or cursor.segment_bytes == bounds.segment_bytes
    # What a killed process did to the names is seen here and may not be on the disk; what is found is handed out.
    disk.sync_names()
    spares = [name for name in sorted(names) if name.startswith("spare-")]
    has_reserve = frames.RESERVE_NAME in names
    if not is_same_size:
        for name in (*spares, *([frames.RESERVE_NAME] if has_reserve else [])):
            disk.remove(name)
        spares, has_reserve = [], False
    segments = sorted(name for name in map(frames.parse_segment_name, names) if name is not None)
    window = Window(disk)
    chains: dict[RecordClass, Chain] = {}
    newest_ms = 0
    for klass in RecordClass:
        chain = Chain(klass, disk=disk, window=window, bounds=bounds)
        chains[klass] = chain
        own = [name for name in segments if name.klass == klass]
        newest_ms = max(newest_ms, _fill(chain, own, cursor, disk=disk))
        chain.lose(chain.settled + 1, chain.base() - 1, "damaged")
        if cursor is None:
            # What of it the hub has, the hub knows, and ignores; here it cannot be counted.
            chain.lost.clear()
    return Recovered(
        epoch=epoch,
        chains=chains,
        spares=spares,
        has_reserve=has_reserve,
        foreign=set() if is_same_size else {name for chain in chains.values() for name in chain.segments},
        lost=dict(cursor.lost) if cursor is not None else {},
        generation=cursor.generation if cursor is not None else 0,
        place=place,
        opened=moment,
        store_ms=store_time(cursor, newest_ms=newest_ms, now=moment),
    )


def _epoch(disk: Disk, names: list[str], draw: Callable[[int], bytes]) -> str:
    known = sorted(epoch for epoch in map(frames.parse_epoch_name, names) if epoch is not None)
    if known:
        return known[0]
    epoch = draw(8).hex()
    if frames.CURSOR_NAME not in names:
        disk.create(frames.CURSOR_NAME, frames.SLOTS * frames.SLOT_BYTES, zeroed=True)
        disk.sync(frames.CURSOR_NAME)
        disk.sync_names()
    # Last: a store whose epoch is there is whole.
    disk.create(frames.epoch_name(epoch), 0, zeroed=True)
    disk.sync_names()
    return epoch


def _cursor(disk: Disk, names: list[str]) -> tuple[int, Cursor] | None:
    if frames.CURSOR_NAME not in names and not any(name.startswith("epoch-") for name in names):
        return None
    if frames.CURSOR_NAME not in names:
        disk.create(frames.CURSOR_NAME, frames.SLOTS * frames.SLOT_BYTES, zeroed=True)
        disk.sync_names()
        return None
    data = disk.read(frames.CURSOR_NAME, 0, frames.SLOTS * frames.SLOT_BYTES)
    found = frames.newest_slot(data)
    if found is not None:
        begin = found[0] * frames.SLOT_BYTES
        _save_again(disk, frames.CURSOR_NAME, data[begin : begin + frames.SLOT_BYTES], offset=begin)
    return found


def _fill(chain: Chain, own: list[SegmentName], cursor: Cursor | None, *, disk: Disk) -> int:
    """Give the chain its segments and numbers; returns the store's time of the newest frame that was read."""
    if cursor is not None:
        known = cursor.classes[int(chain.klass)]
        chain.settled, chain.next = known.settled, known.next
        chain.early, chain.gaps = known.early, known.gaps
    chain.next = max(chain.next, chain.settled + 1, *(gap.last + 1 for gap in chain.gaps), 1)
    own = _without_empty_twins(own, disk)
    newest_ms = 0
    if own:
        data = disk.read(str(own[-1]), 0, LARGEST_SEGMENT_BYTES)
        last, commit_at = _last_frame(data, own[-1])
        if last is not None:
            newest_ms = last.store_ms
            _save_again(disk, str(own[-1]), data[commit_at : last.end], offset=commit_at)
        chain.segments = own
        chain.end = last.end if last is not None else 0
        chain.next = max(chain.next, last.last + 1 if last is not None else own[-1].base)
    chain.begin_batch()
    return newest_ms


def _without_empty_twins(own: list[SegmentName], disk: Disk) -> list[SegmentName]:
    """Of files that begin with one number, the one that holds frames: the other was never written to, or failed."""
    kept: list[SegmentName] = []
    for name in own:
        if kept and kept[-1].base == name.base:
            data = disk.read(str(name), 0, LARGEST_SEGMENT_BYTES)
            loser = name if _last_frame(data, name)[0] is None else kept[-1]
            if loser is kept[-1]:
                kept[-1] = name
            disk.remove(str(loser))
            continue
        kept.append(name)
    return kept


def _save_again(disk: Disk, name: str, data: bytes, *, offset: int) -> None:
    """Write what was found there once more, and sync it.

    It is about to be acted on, and it may not be on the disk: the process before may have been killed before its sync,
    or the sync may have failed, after which the system takes what it has in memory for saved. The same bytes again
    cannot tear.
    """
    disk.write(name, offset, data)
    disk.sync(name)


def _last_frame(data: bytes, segment: SegmentName) -> tuple[Frame | None, int]:
    """The last frame that was whole when its commit returned, and where its commit begins.

    A frame behind damage counts, unless it continues a commit whose beginning is the damage: that commit never
    returned.
    """
    last: Frame | None = None
    offset, commit_at, is_torn = 0, 0, False
    while True:
        frame = frames.read_frame(data, offset, start=0, segment=segment)
        if frame is None:
            frame = frames.find_frame(data, offset, start=0, segment=segment)
            is_torn = True
        if frame is None:
            return last, commit_at
        if is_torn and frame.flags & CONTINUES:
            offset = frame.end
            continue
        if not frame.flags & CONTINUES:
            commit_at = frame.offset
        is_torn = False
        last, offset = frame, frame.end
