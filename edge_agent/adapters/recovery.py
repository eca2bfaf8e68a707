"""Opening a journal: what the names, the cursor and the last segments say (docs/adr/0009-the-journal.md).

Rules of this file:
1. Reading decides nothing twice: whatever was durable before a crash is found, and what was not was promised to nobody.
2. A number that lies nowhere, and of which the cursor says nothing, is a gap.

Writes only where there is no store yet, and takes away what a crash left half-done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from edge_agent.adapters.chain import Chain, Window
from edge_agent.adapters.cursor import CursorFile, save_again
from edge_agent.adapters.spares import Spares
from edge_agent.core import frames
from edge_agent.core.frames import CONTINUES, Cursor, Frame, SegmentName
from edge_agent.core.journal import LARGEST_SEGMENT_BYTES, JournalBounds, Moment, store_time
from edge_agent.core.standing import Standing
from edge_agent.ports import Disk
from shared.telemetry import RecordClass


@dataclass(slots=True)
class Recovered:
    """What was found; `store_ms` is what the store's clock says at the moment of opening."""

    epoch: str
    chains: dict[RecordClass, Chain]
    spares: Spares
    cursor: CursorFile
    store_ms: int


def recover(disk: Disk, bounds: JournalBounds, *, moment: Moment, draw: Callable[[int], bytes]) -> Recovered:
    """The store on this disk; a new one where there is none. Raises OSError."""
    names = disk.names()
    file = CursorFile.open(disk, names)
    epoch = _epoch(disk, names, draw)
    # What a killed process did to the names is seen here and may not be on the disk; what is found is handed out.
    disk.sync_names()
    segments = sorted(name for name in map(frames.parse_segment_name, names) if name is not None)
    window, newest_ms = Window(disk), 0
    chains: dict[RecordClass, Chain] = {}
    for klass in RecordClass:
        chain = Chain(klass, disk=disk, window=window, bounds=bounds)
        chains[klass] = chain
        own = [name for name in segments if name.klass == klass]
        newest_ms = max(newest_ms, _fill(chain, own, file.cursor, disk=disk))
        chain.lose(chain.standing.settled + 1, chain.base() - 1, "damaged")
        if file.cursor is None:
            # What of it the hub has, the hub knows, and ignores; here it cannot be counted.
            chain.lost.clear()
    return Recovered(
        epoch=epoch,
        chains=chains,
        spares=_spares(disk, bounds, names, file.cursor, chains, draw),
        cursor=file,
        store_ms=store_time(file.cursor, newest_ms=newest_ms, now=moment),
    )


def _epoch(disk: Disk, names: list[str], draw: Callable[[int], bytes]) -> str:
    known = sorted(epoch for epoch in map(frames.parse_epoch_name, names) if epoch is not None)
    if known:
        return known[0]
    epoch = draw(8).hex()
    # After the cursor: a store whose epoch is there is whole.
    disk.create(frames.epoch_name(epoch), 0, zeroed=True)
    disk.sync_names()
    return epoch


def _spares(
    disk: Disk,
    bounds: JournalBounds,
    names: list[str],
    cursor: Cursor | None,
    chains: Mapping[RecordClass, Chain],
    draw: Callable[[int], bytes],
) -> Spares:
    found = [name for name in sorted(names) if name.startswith("spare-")]
    has_reserve, foreign = frames.RESERVE_NAME in names, set[SegmentName]()
    if cursor is not None and cursor.segment_bytes != bounds.segment_bytes:
        for name in (*found, *([frames.RESERVE_NAME] if has_reserve else [])):
            disk.remove(name)
        found, has_reserve = [], False
        foreign = {name for chain in chains.values() for name in chain.segments}
    return Spares(disk, bounds, draw=draw, names=found, has_reserve=has_reserve, foreign=foreign)


def _fill(chain: Chain, own: list[SegmentName], cursor: Cursor | None, *, disk: Disk) -> int:
    """Give the chain its segments and numbers; returns the store's time of the newest frame that was read."""
    known = cursor.classes[int(chain.klass)] if cursor is not None else Standing()
    following = max(known.next, known.settled + 1, *(gap.last + 1 for gap in known.gaps), 1)
    own = _without_empty_twins(own, disk)
    newest_ms = 0
    if own:
        data = disk.read(str(own[-1]), 0, LARGEST_SEGMENT_BYTES)
        last, commit_at = _last_frame(data, own[-1])
        if last is not None:
            newest_ms = last.store_ms
            save_again(disk, str(own[-1]), data[commit_at : last.end], offset=commit_at)
        chain.segments = own
        chain.end = last.end if last is not None else 0
        following = max(following, last.last + 1 if last is not None else own[-1].base)
    chain.standing = replace(known, next=following)
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
