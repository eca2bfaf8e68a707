"""Takes batches: decides what each adds to what is here, over a store that someone else opens and commits.

    with a transaction of the store:
        taken = take_all(store, opened, at_ms=…)
    the transaction is committed: now, and not before, the verdicts may go out

Rules of this file:
1. A record has at most one effect, ever. What is here is kept as ranges of numbers per stream and written in the
   transaction of the rows; a number is here, or declared lost with its reason, or missing.
2. The same claim again (first, last, digest) is a duplicate. Other boundaries or another digest over numbers that are
   here, as an agent of another version may send, are compared record by record: equal ones are duplicates, and only
   new ones are stored.
3. A number that is here with other content is a conflict, and the batch is refused: two devices carry the same disk
   (a cloned card), or a device was set back to an older one. Neither may overwrite what is here.
4. A gap declares lost what is not here. A record that comes all the same, later, is stored and no longer lost.
5. A stream with too many ranges is shortened where it is settled: of the oldest losses only the counts are kept, and
   what comes there later counts as a duplicate. It is refused only when numbers are missing that nothing explains.
6. An epoch that a device never had before, while another one is known, means that its store was lost or replaced.
   That is taken, and told.

Not here: SQL, commits, acknowledgements, the clock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from operator import attrgetter, itemgetter
from typing import Final, Literal, Protocol

import msgspec
from msgspec.structs import replace

from cloud_hub.telemetry.figures import Tallies, add_all, minute_of, tally
from cloud_hub.telemetry.rules import Opened, Stream, TelemetryRefused, explode, open_batch
from shared import limits
from shared.errors import ProtocolViolation
from shared.ids import DeviceId
from shared.ranges import Ranges, count, meets, missing, union, within
from shared.telemetry import Record, RecordClass
from shared.wire.columns import Columns, encode_columns, open_columns
from shared.wire.messages import Batch, Verdict

MAX_RANGES: Final = 5000
"""Ranges that a stream may fall into; each group rewrites the list, so it must not grow without bound."""
MAX_OVERLAP_BYTES: Final = 8 * limits.MAX_BATCH_BYTES
"""Of stored columns that one batch is compared with. What an honest agent cut otherwise fits several times."""
MAX_EPOCHS: Final = 1000
"""Of one device. Each is an audit event, so a device must not make them without end."""
CONFLICT: Final = "telemetry.conflict"
NEW_EPOCH: Final = "telemetry.new_epoch"

_COUNTED: Final = frozenset({RecordClass.OUTCOME, RecordClass.RESULT})
_encoder: Final = msgspec.msgpack.Encoder()


class Lost(msgspec.Struct, frozen=True, array_like=True):
    """Numbers, both inclusive, that the device said will not come."""

    first: int
    last: int
    reason: str


class Received(msgspec.Struct, frozen=True):
    """What is known of a stream.

    Attributes:
        here: the numbers that are stored, apart from `folded`.
        lost: the numbers that are declared lost; ascending, apart from `here` and from each other.
        folded: how many numbers were lost, by reason, whose ranges are no longer kept; they count as `here`.
        records: how many are stored, each counted once.
        duplicates: records that came again and were dropped.
        conflicts: batches refused because their numbers are here with other content.
        first_received_ms, last_received_ms: when the first and the last batch came, by the hub's clock.
    """

    here: Ranges = ()
    lost: tuple[Lost, ...] = ()
    folded: Mapping[str, int] = msgspec.field(default_factory=dict)
    records: int = 0
    duplicates: int = 0
    conflicts: int = 0
    first_received_ms: int = 0
    last_received_ms: int = 0

    @property
    def settled(self) -> Ranges:
        """The numbers that are not waited for: here, or lost."""
        return union(self.here, tuple((lost.first, lost.last) for lost in self.lost))


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A batch as it is stored: its claim, and the records of it that were new (all of them, except after an overlap).

    Attributes:
        records: how many it added.
    """

    stream: Stream
    first: int
    last: int
    digest: str
    records: int
    columns: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """Something about a device that a person should see: an audit event."""

    device: DeviceId
    action: str
    detail: Mapping[str, str | int]


class Store(Protocol):
    """What is stored, inside one transaction: all that is written becomes visible at its commit, or nothing does.

    `tests/contracts/test_telemetry_store_contract.py` is what each store must hold.
    """

    def read(self, streams: Collection[Stream]) -> dict[Stream, Received]:
        """What is known of these; unknown ones are left out. Until the commit nobody else reads their devices so."""
        ...

    def epochs(self, device: DeviceId) -> frozenset[str]:
        """All epochs of the device of which a stream is written."""
        ...

    def holds(self, stream: Stream, first: int, last: int, digest: str) -> bool:
        """Whether a batch with this very claim is stored."""
        ...

    def overlapping(self, stream: Stream, first: int, last: int, *, most: int) -> Sequence[BatchRow] | None:
        """The stream's batches whose claim holds a number from first to last; None for more bytes than this."""
        ...

    def insert(self, rows: Sequence[BatchRow], *, at_ms: int) -> None:
        """Add batches, in this order."""
        ...

    def write(self, streams: Mapping[Stream, Received]) -> None:
        """Replace what is known of these."""
        ...

    def count(self, device: DeviceId, tallies: Tallies, *, minute: int) -> None:
        """Add to the minute's figures of the device, as far as `figures.bounded` lets."""
        ...

    def note(self, note: Note, *, at_ms: int) -> None:
        """Write an audit event."""
        ...


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a batch.

    Attributes:
        fresh: records that it added.
        duplicates: records of it that were here.
        lost: numbers that it declared lost.
        damaged: stored batches that it could not be compared with, because they do not parse.
    """

    status: Literal["stored", "duplicate", "refused"]
    code: str = ""
    fresh: int = 0
    duplicates: int = 0
    lost: int = 0
    damaged: int = 0


def take(store: Store, device: DeviceId, batch: Batch, *, at_ms: int) -> Verdict:
    """Open and take one batch; the verdict may go out once the store's transaction is committed."""
    try:
        opened = open_batch(device, batch)
    except TelemetryRefused as refused:
        return Verdict(batch=batch.batch, status="refused", code=refused.code)
    (taken,) = take_all(store, [opened], at_ms=at_ms)
    return Verdict(batch=batch.batch, status=taken.status, code=taken.code)


def take_all(store: Store, batches: Sequence[Opened], *, at_ms: int) -> list[Taken]:
    """Take batches in this order, in the caller's transaction; what a stream is known to hold is written once."""
    group = _Group(store, batches, at_ms=at_ms)
    taken = [group.take(batch) for batch in batches]
    group.finish()
    return taken


class _Group:
    """The batches of one transaction, and what is known of their streams meanwhile."""

    def __init__(self, store: Store, batches: Iterable[Opened], *, at_ms: int) -> None:
        self._store = store
        self._at_ms = at_ms
        self._streams = store.read({batch.stream for batch in batches})
        self._changed: set[Stream] = set()
        self._rows: list[BatchRow] = []
        self._tallies: dict[DeviceId, list[Tallies]] = {}
        self._epochs: dict[DeviceId, frozenset[str]] = {}

    def take(self, batch: Opened) -> Taken:
        try:
            known = self._known(batch.stream)
            if batch.content is None:
                return self._declare_lost(batch, known)
            # Nearly every batch lies behind all that is here.
            is_behind = not known.here or batch.id.first > known.here[-1][1]
            if is_behind or not any(meets(known.here, first, last) for first, last in batch.content.runs):
                self._add(batch, batch.content, known, batch.columns)
                return Taken("stored", fresh=batch.content.count)
            return self._take_overlap(batch, batch.content, known)
        except TelemetryRefused as refused:
            return Taken("refused", code=refused.code)

    def finish(self) -> None:
        self._flush()
        self._store.write({stream: self._streams[stream] for stream in self._changed})
        minute = minute_of(self._at_ms)
        for device, tallies in self._tallies.items():
            self._store.count(device, add_all(tallies), minute=minute)

    def _known(self, stream: Stream) -> Received:
        known = self._streams.get(stream)
        if known is None:
            self._meet(stream)
            known = Received(first_received_ms=self._at_ms)
        return known

    def _meet(self, stream: Stream) -> None:
        """A stream that was never written."""
        epochs = self._epochs.get(stream.device)
        if epochs is None:
            epochs = self._store.epochs(stream.device)
        if stream.epoch not in epochs:
            if len(epochs) >= MAX_EPOCHS:
                raise TelemetryRefused(f"{stream.device} has too many epochs", code="telemetry.epochs")
            if epochs:
                detail: dict[str, str | int] = {"epoch": stream.epoch, "epochs_before": len(epochs)}
                self._store.note(Note(stream.device, NEW_EPOCH, detail), at_ms=self._at_ms)
        self._epochs[stream.device] = epochs | {stream.epoch}

    def _add(self, batch: Opened, content: Columns, known: Received, columns: bytes) -> None:
        """Store records of which none is here."""
        fresh = content.count
        after = replace(
            known,
            here=_united(known.here, content.runs),
            lost=_trimmed(known.lost, content.runs),
            records=known.records + fresh,
            last_received_ms=self._at_ms,
        )
        claim = batch.id
        self._keep(batch, after, BatchRow(batch.stream, claim.first, claim.last, claim.digest, fresh, columns))
        if batch.stream.klass in _COUNTED:
            self._tallies.setdefault(batch.stream.device, []).append(tally(content))

    def _take_overlap(self, batch: Opened, content: Columns, known: Received) -> Taken:
        self._flush()
        stream, claim = batch.stream, batch.id
        # By its digest first: nothing has to be unpacked, and a hub of another version may have stored fewer fields.
        if self._store.holds(stream, claim.first, claim.last, claim.digest):
            return self._repeat(batch, known, content.count)
        rows = self._store.overlapping(stream, claim.first, claim.last, most=MAX_OVERLAP_BYTES)
        if rows is None:
            raise TelemetryRefused("the batch overlaps with too much that is here", code="telemetry.overlap")
        records = content.records()
        compared = _compared(records, rows)
        if compared.is_conflict:
            return self._refuse_conflict(batch, known)
        fresh = [
            record
            for record in records
            if record.seq not in compared.same and not meets(known.here, record.seq, record.seq)
        ]
        duplicates = content.count - len(fresh)
        if not fresh:
            return self._repeat(batch, known, duplicates, damaged=compared.damaged)
        columns, fresh_content = _encoded_again(fresh)
        known = replace(known, duplicates=known.duplicates + duplicates)
        self._add(batch, fresh_content, known, columns)
        return Taken("stored", fresh=len(fresh), duplicates=duplicates, damaged=compared.damaged)

    def _repeat(self, batch: Opened, known: Received, duplicates: int, *, damaged: int = 0) -> Taken:
        after = replace(known, duplicates=known.duplicates + duplicates, last_received_ms=self._at_ms)
        self._keep(batch, after, None)
        return Taken("duplicate", duplicates=duplicates, damaged=damaged)

    def _refuse_conflict(self, batch: Opened, known: Received) -> Taken:
        """Count it; the first of a stream is an audit event, the rest would only fill the log."""
        stream, claim = batch.stream, batch.id
        if known.conflicts == 0:
            detail: dict[str, str | int] = {
                "epoch": stream.epoch,
                "class": stream.klass.name.lower(),
                "first": claim.first,
                "last": claim.last,
                "digest": claim.digest,
            }
            self._store.note(Note(stream.device, CONFLICT, detail), at_ms=self._at_ms)
        self._keep(batch, replace(known, conflicts=known.conflicts + 1, last_received_ms=self._at_ms), None)
        return Taken("refused", code=CONFLICT)

    def _declare_lost(self, batch: Opened, known: Received) -> Taken:
        assert batch.gap is not None
        claim, reason = batch.id, batch.gap.reason
        settled = union(within(known.here, claim.first, claim.last), _lost_within(known.lost, claim.first, claim.last))
        new = missing(settled, claim.first, claim.last)
        if not new:
            return self._repeat(batch, known, 0)
        after = replace(known, lost=_declared(known.lost, new, reason), last_received_ms=self._at_ms)
        self._keep(batch, after, None)
        return Taken("stored", lost=count(new))

    def _keep(self, batch: Opened, after: Received, row: BatchRow | None) -> None:
        while _pieces(after) > MAX_RANGES:
            shorter = _folded(after)
            if shorter is after:
                raise TelemetryRefused("the stream has too many holes", code="telemetry.scattered")
            after = shorter
        if row is not None:
            self._rows.append(row)
        self._streams[batch.stream] = after
        self._changed.add(batch.stream)

    def _flush(self) -> None:
        if self._rows:
            self._store.insert(self._rows, at_ms=self._at_ms)
            self._rows = []


@dataclass(frozen=True, slots=True)
class _Compared:
    """Records beside stored batches.

    Attributes:
        same: numbers that are stored with the same content.
        is_conflict: whether one is stored with other content.
        damaged: how many of the batches do not parse.
    """

    same: Collection[int] = ()
    is_conflict: bool = False
    damaged: int = 0


def _compared(records: Sequence[Record], rows: Sequence[BatchRow]) -> _Compared:
    """Compare as bytes: a reading may be no number, which is not equal to itself."""
    mine = {record.seq: record for record in records}
    same: set[int] = set()
    damaged = 0
    for row in rows:
        try:
            stored = explode(row.columns)
        except ProtocolViolation:
            # Damaged on our disk. Its numbers are here, so what comes again under them is a duplicate.
            damaged += 1
            continue
        for record in stored:
            other = mine.get(record.seq)
            if other is None:
                continue
            if _encoder.encode(record) != _encoder.encode(other):
                return _Compared(is_conflict=True)
            same.add(record.seq)
    return _Compared(same=same, damaged=damaged)


def _encoded_again(records: Sequence[Record]) -> tuple[bytes, Columns]:
    """Some records of a batch as columns of their own.

    Raises:
        TelemetryRefused: they are larger than a batch may be. Texts that a batch names often may take more when fewer
            records name them; a device that keeps to the bound of unpacked records never gets there.
    """
    columns = encode_columns(records)
    try:
        return columns, open_columns(columns)
    except ProtocolViolation as error:
        raise TelemetryRefused(f"the new records do not fit: {error.message}", code="telemetry.too_large") from error


def _pieces(known: Received) -> int:
    return len(known.here) + len(known.lost)


def _folded(known: Received) -> Received:
    """With the older half of those losses only counted up to which all is settled; the same when there are none."""
    end = bisect_right(known.lost, _watermark(known), key=_last)
    if not end:
        return known
    oldest, rest = known.lost[: (end + 1) // 2], known.lost[(end + 1) // 2 :]
    folded = Counter(known.folded)
    for one in oldest:
        folded[one.reason] += one.last - one.first + 1
    return replace(known, here=union(known.here, ((1, oldest[-1].last),)), lost=rest, folded=dict(folded))


def _watermark(known: Received) -> int:
    """Of what is settled; looks no further than to the first hole."""
    reached = 0
    for first, last in merge(known.here, ((one.first, one.last) for one in known.lost)):
        if first > reached + 1:
            break
        reached = last
    return reached


def _united(here: Ranges, runs: Ranges) -> Ranges:
    """Both; only the ranges near the runs are looked at."""
    if len(runs) == 1:
        return union(here, runs)
    begin = bisect_left(here, runs[0][0] - 1, key=itemgetter(1))
    end = bisect_right(here, runs[-1][1] + 1, key=itemgetter(0))
    return (*here[:begin], *union(here[begin:end], runs), *here[end:])


def _declared(lost: tuple[Lost, ...], new: Ranges, reason: str) -> tuple[Lost, ...]:
    """With these numbers, of which none was lost before; neighbours with the same reason become one."""
    found: list[Lost] = []
    begin, end = _near(lost, new[0][0] - 1, new[-1][1] + 1)
    for one in sorted((*lost[begin:end], *(Lost(first, last, reason) for first, last in new)), key=_first):
        if found and found[-1].last + 1 == one.first and found[-1].reason == one.reason:
            found[-1] = Lost(found[-1].first, one.last, one.reason)
        else:
            found.append(one)
    return (*lost[:begin], *found, *lost[end:])


def _trimmed(lost: tuple[Lost, ...], runs: Ranges) -> tuple[Lost, ...]:
    """Without these numbers, which have come after all."""
    # Nearly every batch lies behind all that is lost.
    if not lost or runs[0][0] > lost[-1].last:
        return lost
    begin, end = _near(lost, runs[0][0], runs[-1][1])
    kept = [Lost(low, high, one.reason) for one in lost[begin:end] for low, high in missing(runs, one.first, one.last)]
    return (*lost[:begin], *kept, *lost[end:])


def _lost_within(lost: tuple[Lost, ...], first: int, last: int) -> Ranges:
    begin, end = _near(lost, first, last)
    return tuple((max(one.first, first), min(one.last, last)) for one in lost[begin:end])


def _near(lost: tuple[Lost, ...], first: int, last: int) -> tuple[int, int]:
    """Which losses hold a number from first to last: from one index up to before another."""
    return bisect_left(lost, first, key=_last), bisect_right(lost, last, key=_first)


_first: Final = attrgetter("first")
_last: Final = attrgetter("last")
