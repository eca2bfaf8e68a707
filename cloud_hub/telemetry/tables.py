"""The room's tables and the statements on them. Private to the room: others ask the desk.

Functions take a connection inside the caller's transaction; none of them begins, commits or decides. The same
statements run on SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import merge
from itertools import islice
from typing import Any, Final, TypeVar

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloud_hub.ground import audit
from cloud_hub.ground.database import Lock, lock, upsert
from cloud_hub.ground.schema import metadata
from cloud_hub.telemetry.figures import Figures, Tallies, Tally, bounded
from cloud_hub.telemetry.rules import MAX_SPAN, Stream
from cloud_hub.telemetry.taking import BatchRow, Lost, Note, Received
from shared.errors import StorageError
from shared.ids import DeviceId
from shared.ranges import Ranges
from shared.sketch import Sketch, decode_sketch, merge_all
from shared.telemetry import RecordClass

T = TypeVar("T")

_Number: Final = sa.BigInteger().with_variant(sa.Integer, "sqlite")
"""SQLite counts up only what it calls INTEGER, which has 64 bits there."""

batches = sa.Table(
    "telemetry_batches",
    metadata,
    sa.Column("id", _Number, primary_key=True, autoincrement=True),
    sa.Column("device", sa.String(63), nullable=False),
    sa.Column("epoch", sa.String(16), nullable=False),
    sa.Column("klass", sa.Integer, nullable=False),
    sa.Column("first", sa.BigInteger, nullable=False),
    sa.Column("last", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("received_ms", sa.BigInteger, nullable=False),
    sa.Column("records", sa.Integer, nullable=False),
    sa.Column("columns", sa.LargeBinary, nullable=False),
    # Of a claim's numbers; not unique, because what was new of a batch is stored under its whole claim.
    sa.Index("ix_telemetry_batches_first", "device", "epoch", "klass", "first"),
    sa.Index("ix_telemetry_batches_id", "device", "klass", "id"),
    sqlite_autoincrement=True,
)

streams = sa.Table(
    "telemetry_streams",
    metadata,
    sa.Column("device", sa.String(63), primary_key=True),
    sa.Column("epoch", sa.String(16), primary_key=True),
    sa.Column("klass", sa.Integer, primary_key=True),
    sa.Column("ranges", sa.LargeBinary, nullable=False),
    sa.Column("lost", sa.LargeBinary, nullable=False),
    sa.Column("folded", sa.LargeBinary, nullable=False),
    sa.Column("records", sa.BigInteger, nullable=False),
    sa.Column("duplicates", sa.BigInteger, nullable=False),
    sa.Column("conflicts", sa.BigInteger, nullable=False),
    sa.Column("first_received_ms", sa.BigInteger, nullable=False),
    sa.Column("last_received_ms", sa.BigInteger, nullable=False),
)

figures = sa.Table(
    "telemetry_figures",
    metadata,
    # In the order in which gates ask: one family, from a minute on.
    sa.Column("family", sa.String(63), primary_key=True),
    sa.Column("minute", sa.BigInteger, primary_key=True),
    sa.Column("device", sa.String(63), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column("answered", sa.BigInteger, nullable=False),
    sa.Column("right", sa.BigInteger, nullable=False),
    sa.Column("wrong", sa.BigInteger, nullable=False),
    sa.Column("latency", sa.LargeBinary, nullable=False),
    # In the order in which they are counted up: a device's minute.
    sa.Index("ix_telemetry_figures_device", "device", "minute"),
)

_PER_QUERY: Final = 200
_COLUMNS_AT_ONCE: Final = 8
_ROWS_AT_ONCE: Final = 32
_encoder: Final = msgspec.msgpack.Encoder()
_ranges_decoder: Final = msgspec.msgpack.Decoder(Ranges)
_lost_decoder: Final = msgspec.msgpack.Decoder(tuple[Lost, ...])
_folded_decoder: Final = msgspec.msgpack.Decoder(dict[str, int])


@dataclass(frozen=True, slots=True)
class StoredColumns:
    """A batch as it is listed; `id` grows in the order of arrival."""

    id: int
    stream: Stream
    first: int
    received_ms: int
    columns: bytes


class SqlStore:
    """`taking.Store` on a connection inside a write transaction.

    What ingest does for each batch is said in the drivers' own words, many rows to a statement: SQLAlchemy would pass
    over every value, and the driver give the interpreter's lock away for every row (`scripts/bench ingest`).
    """

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._mark = "?" if conn.dialect.name == "sqlite" else "%s"

    def read(self, wanted: Collection[Stream]) -> dict[Stream, Received]:
        """What is known of these streams; their devices are locked until the transaction ends."""
        lock(self._conn, Lock.TELEMETRY, {stream.device for stream in wanted})
        found: dict[Stream, Received] = {}
        for some in _portions(sorted(wanted), _PER_QUERY):
            keys = tuple(value for stream in some for value in (stream.device, stream.epoch, int(stream.klass)))
            rows = self._conn.exec_driver_sql(_select_streams(len(some), self._mark), keys)
            found.update(_received(row) for row in rows)
        return found

    def epochs(self, device: DeviceId) -> frozenset[str]:
        """All epochs of the device."""
        query = sa.select(streams.c.epoch).where(streams.c.device == device).distinct()
        return frozenset(self._conn.execute(query).scalars())

    def holds(self, stream: Stream, first: int, last: int, digest: str) -> bool:
        """Whether a batch with this very claim is stored."""
        c = batches.c
        query = sa.select(c.id).where(_of(stream), c.first == first, c.last == last, c.digest == digest).limit(1)
        return self._conn.execute(query).first() is not None

    def overlapping(self, stream: Stream, first: int, last: int, *, most: int) -> Sequence[BatchRow] | None:
        """The stream's batches that hold a number from first to last; None for more bytes than this."""
        c = batches.c
        # The lower bound keeps the index's walk short: no batch spans more.
        near = sa.and_(_of(stream), c.first <= last, c.first > first - MAX_SPAN, c.last >= first)
        size = self._conn.execute(sa.select(sa.func.sum(sa.func.length(c.columns))).where(near)).scalar_one()
        if (size or 0) > most:
            return None
        return [
            BatchRow(stream, row.first, row.last, row.digest, row.records, bytes(row.columns))
            for row in self._conn.execute(sa.select(batches).where(near).order_by(c.first, c.id))
        ]

    def insert(self, rows: Sequence[BatchRow], *, at_ms: int) -> None:
        """Add batches."""
        for some in _portions(rows, _ROWS_AT_ONCE):
            values: list[object] = []
            for row in some:
                stream = row.stream
                values += (
                    stream.device, stream.epoch, int(stream.klass), row.first, row.last, row.digest,
                    at_ms, row.records, row.columns,
                )  # fmt: skip
            self._conn.exec_driver_sql(_insert_batches(len(some), self._mark), tuple(values))

    def write(self, changed: Mapping[Stream, Received]) -> None:
        """Replace what is known of these streams."""
        for some in _portions(sorted(changed), _ROWS_AT_ONCE):
            values: list[object] = []
            for stream in some:
                known = changed[stream]
                values += (
                    stream.device, stream.epoch, int(stream.klass), _encoder.encode(known.here),
                    _encoder.encode(known.lost), _encoder.encode(known.folded),
                    known.records, known.duplicates, known.conflicts,
                    known.first_received_ms, known.last_received_ms,
                )  # fmt: skip
            self._conn.exec_driver_sql(_upsert_streams(len(some), self._mark), tuple(values))

    def count(self, device: DeviceId, tallies: Tallies, *, minute: int) -> None:
        """Add to the minute's figures of the device, which is locked as its streams are; two statements for all."""
        c = figures.c
        query = sa.select(figures).where(c.device == device, c.minute == minute)
        before = {(row.family, row.version): row for row in self._conn.execute(query)}
        rows = [
            {
                "family": key[0],
                "version": key[1],
                "minute": minute,
                "device": device,
                **_counted(before.get(key), tally),
            }
            for key, tally in bounded(before, tallies).items()
        ]
        if not rows:
            return
        statement = upsert(self._conn, figures).values(rows)
        changed = {name: statement.excluded[name] for name in ("answered", "right", "wrong", "latency")}
        self._conn.execute(
            statement.on_conflict_do_update(index_elements=["family", "minute", "device", "version"], set_=changed)
        )

    def note(self, note: Note, *, at_ms: int) -> None:
        """Write an audit event."""
        audit.record(
            self._conn,
            at_ms=at_ms,
            actor=f"device:{note.device}",
            action=note.action,
            subject=f"device:{note.device}",
            detail=note.detail,
        )


def _counted(before: sa.Row[Any] | None, tally: Tally) -> dict[str, object]:
    if before is None:
        return {
            "answered": tally.answered, "right": tally.right, "wrong": tally.wrong, "latency": tally.latency.encode(),
        }  # fmt: skip
    latency = bytes(before.latency)
    return {
        "answered": before.answered + tally.answered,
        "right": before.right + tally.right,
        "wrong": before.wrong + tally.wrong,
        "latency": decode_sketch(latency).merge(tally.latency).encode() if tally.latency.buckets else latency,
    }


def _of(stream: Stream) -> sa.ColumnElement[bool]:
    c = batches.c
    return sa.and_(c.device == stream.device, c.epoch == stream.epoch, c.klass == int(stream.klass))


def _quoted(table: sa.Table, *, but: tuple[str, ...] = ()) -> list[str]:
    """The table's columns for a statement: some of their names are words of SQL in some database."""
    return [f'"{column.name}"' for column in table.c if column.name not in but]


def _values(rows: int, columns: int, mark: str) -> str:
    return ", ".join([f"({', '.join([mark] * columns)})"] * rows)


# The texts are made of our own names and marks; values travel beside them.


@cache
def _insert_batches(rows: int, mark: str) -> str:
    names = _quoted(batches, but=("id",))
    return f"INSERT INTO telemetry_batches ({', '.join(names)}) VALUES {_values(rows, len(names), mark)}"  # noqa: S608


@cache
def _select_streams(rows: int, mark: str) -> str:
    names = ", ".join(_quoted(streams))
    # SQLite looks each key up only in this form: `(…) IN (VALUES …)` reads the whole table from two keys on.
    keys = f"(VALUES {_values(rows, 3, mark)}) AS k CROSS JOIN telemetry_streams"
    return f"SELECT {names} FROM {keys} WHERE device = column1 AND epoch = column2 AND klass = column3"  # noqa: S608


@cache
def _upsert_streams(rows: int, mark: str) -> str:
    names = _quoted(streams)
    kept = ", ".join(f"{name} = excluded.{name}" for name in _quoted(streams, but=("device", "epoch", "klass")))
    insert = f"INSERT INTO telemetry_streams ({', '.join(names)}) VALUES {_values(rows, len(names), mark)}"  # noqa: S608
    return f"{insert} ON CONFLICT (device, epoch, klass) DO UPDATE SET {kept}"


def list_batches(
    conn: Connection, device: DeviceId, *, klass: RecordClass | None, from_id: int
) -> Iterator[StoredColumns]:
    """The device's batches in the order of arrival, from this id on; read as far as someone asks."""
    # One query per class, because that is how the index is ordered.
    wanted = tuple(RecordClass) if klass is None else (klass,)
    return merge(*(_list_class(conn, device, one, from_id=from_id) for one in wanted), key=lambda row: row.id)


def _list_class(conn: Connection, device: DeviceId, klass: RecordClass, *, from_id: int) -> Iterator[StoredColumns]:
    c = batches.c
    of_class = sa.select(batches).where(c.device == device, c.klass == int(klass))
    # A few at once: what a batch holds may be large.
    while True:
        rows = conn.execute(of_class.where(c.id >= from_id).order_by(c.id).limit(_COLUMNS_AT_ONCE)).all()
        for row in rows:
            yield StoredColumns(
                id=row.id,
                stream=Stream(device, row.epoch, klass),
                first=row.first,
                received_ms=row.received_ms,
                columns=bytes(row.columns),
            )
            from_id = row.id + 1
        if len(rows) < _COLUMNS_AT_ONCE:
            return


def list_streams(conn: Connection, device: DeviceId, *, limit: int) -> list[tuple[Stream, Received]]:
    """The device's newest streams, oldest epoch first."""
    c = streams.c
    newest = (c.first_received_ms.desc(), c.epoch.desc(), c.klass.desc())
    query = sa.select(streams).where(c.device == device).order_by(*newest).limit(limit)
    return [_received(row) for row in conn.execute(query)][::-1]


def count_streams(conn: Connection, device: DeviceId) -> tuple[int, int]:
    """How many streams the device has, and how many records they have together."""
    query = sa.select(sa.func.count(), sa.func.sum(streams.c.records)).where(streams.c.device == device)
    many, records = conn.execute(query).one()
    return many, int(records or 0)


def read_figures(
    conn: Connection, family: str, *, since_minute: int, devices: Sequence[DeviceId] | None
) -> list[Figures]:
    """The family's figures from this minute on, one per device and version, in their order."""
    c = figures.c
    query = sa.select(figures).where(c.family == family, c.minute >= since_minute)
    rows: list[sa.Row[tuple[object, ...]]] = []
    if devices is None:
        rows.extend(conn.execute(query))
    else:
        for some in _portions(devices, _PER_QUERY):
            rows.extend(conn.execute(query.where(c.device.in_(some))))
    groups: dict[tuple[str, str], list[sa.Row[tuple[object, ...]]]] = {}
    for row in rows:
        groups.setdefault((row.device, row.version), []).append(row)
    return [_sum(DeviceId(device), version, group) for (device, version), group in sorted(groups.items())]


def _sum(device: DeviceId, version: str, rows: Sequence[sa.Row[tuple[object, ...]]]) -> Figures:
    latency: Sketch = merge_all(decode_sketch(bytes(row.latency)) for row in rows)
    return Figures(
        device=device,
        version=version,
        answered=sum(row.answered for row in rows),
        right=sum(row.right for row in rows),
        wrong=sum(row.wrong for row in rows),
        latency=latency,
    )


def _received(row: Sequence[Any]) -> tuple[Stream, Received]:
    """A row of streams, in the order of the table's columns."""
    device, epoch, klass, here, lost, folded, records, duplicates, conflicts, first_received_ms, last_received_ms = row
    try:
        known = Received(
            here=_ranges_decoder.decode(here),
            lost=_lost_decoder.decode(lost),
            folded=_folded_decoder.decode(folded),
            records=records,
            duplicates=duplicates,
            conflicts=conflicts,
            first_received_ms=first_received_ms,
            last_received_ms=last_received_ms,
        )
    except msgspec.MsgspecError as error:
        raise StorageError(
            f"what is known of {device}'s telemetry is damaged: {error}", hint="run `outrider-hub doctor`"
        ) from error
    return Stream(DeviceId(device), epoch, RecordClass(klass)), known


def _portions(items: Sequence[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
