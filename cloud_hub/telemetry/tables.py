"""The room's tables and the statements on them. Private to the room: others ask the desk.

Functions take a connection inside the caller's transaction; none of them begins, commits or decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import Connection

from cloud_hub.ground.schema import metadata
from cloud_hub.telemetry.figures import Figures, Tally
from cloud_hub.telemetry.rules import (
    OpenBatch,
    Received,
    StoredRecord,
    Stream,
    decode_ranges,
    encode_ranges,
)
from shared.ids import DeviceId
from shared.sketch import Sketch, decode_sketch, merge_all
from shared.telemetry import RecordClass

records = sa.Table(
    "telemetry_records",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("device", sa.String(63), nullable=False),
    sa.Column("epoch", sa.String(16), nullable=False),
    sa.Column("klass", sa.Integer, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Column("received_ms", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("device", "epoch", "klass", "seq"),
    sa.Index("ix_telemetry_records_device", "device", "klass", "id"),
    sqlite_autoincrement=True,
)

streams = sa.Table(
    "telemetry_streams",
    metadata,
    sa.Column("device", sa.String(63), primary_key=True),
    sa.Column("epoch", sa.String(16), primary_key=True),
    sa.Column("klass", sa.Integer, primary_key=True),
    sa.Column("ranges", sa.LargeBinary, nullable=False),
    sa.Column("records", sa.BigInteger, nullable=False),
    sa.Column("duplicates", sa.BigInteger, nullable=False),
    sa.Column("conflicts", sa.BigInteger, nullable=False),
    sa.Column("first_received_ms", sa.BigInteger, nullable=False),
    sa.Column("last_received_ms", sa.BigInteger, nullable=False),
)

batches = sa.Table(
    "telemetry_batches",
    metadata,
    sa.Column("device", sa.String(63), primary_key=True),
    sa.Column("epoch", sa.String(16), primary_key=True),
    sa.Column("klass", sa.Integer, primary_key=True),
    sa.Column("first", sa.BigInteger, primary_key=True),
    sa.Column("last", sa.BigInteger, primary_key=True),
    sa.Column("digest", sa.String(64), nullable=False),
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
)

_DEVICES_PER_QUERY = 500


@dataclass(frozen=True, slots=True)
class RecordRow:
    """A record with its place in the order of arrival, `id`."""

    id: int
    epoch: str
    klass: RecordClass
    seq: int
    at_ms: int
    received_ms: int
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class StreamRow:
    """A stream and what has arrived of it."""

    stream: Stream
    received: Received
    first_received_ms: int
    last_received_ms: int


def read_stream(conn: Connection, stream: Stream) -> Received:
    """What has arrived of the stream; nothing for an unknown one."""
    row = conn.execute(sa.select(streams).where(*_of(streams, stream))).one_or_none()
    if row is None:
        return Received()
    return Received(
        ranges=decode_ranges(row.ranges), records=row.records, duplicates=row.duplicates, conflicts=row.conflicts
    )


def write_stream(conn: Connection, stream: Stream, received: Received, *, at_ms: int) -> None:
    """Replace what is known of the stream."""
    changed = {
        "ranges": encode_ranges(received.ranges),
        "records": received.records,
        "duplicates": received.duplicates,
        "conflicts": received.conflicts,
        "last_received_ms": at_ms,
    }
    statement = insert(streams).values(**_key(stream), first_received_ms=at_ms, **changed)
    conn.execute(statement.on_conflict_do_update(index_elements=["device", "epoch", "klass"], set_=changed))


def batch_digest(conn: Connection, batch: OpenBatch) -> str | None:
    """The digest of the batch that brought exactly these numbers, None if none did."""
    c = batches.c
    query = sa.select(c.digest).where(*_of(batches, batch.stream), c.first == batch.id.first, c.last == batch.id.last)
    return conn.execute(query).scalar_one_or_none()


def insert_batch(conn: Connection, batch: OpenBatch) -> None:
    """Remember the batch."""
    claim = batch.id
    conn.execute(batches.insert().values(**_key(batch.stream), first=claim.first, last=claim.last, digest=claim.digest))


def records_between(conn: Connection, stream: Stream, first: int, last: int) -> list[StoredRecord]:
    """The stream's records with these numbers, as far as they are here."""
    c = records.c
    query = sa.select(c.seq, c.at_ms, c.kind, c.body).where(*_of(records, stream), c.seq.between(first, last))
    return [StoredRecord(seq=r.seq, at_ms=r.at_ms, kind=r.kind, body=bytes(r.body)) for r in conn.execute(query)]


def insert_records(conn: Connection, stream: Stream, fresh: Sequence[StoredRecord], *, at_ms: int) -> None:
    """Add records to the stream; the constraint refuses a number that is here."""
    key = _key(stream)
    conn.execute(
        records.insert(),
        [{**key, "seq": r.seq, "at_ms": r.at_ms, "received_ms": at_ms, "kind": r.kind, "body": r.body} for r in fresh],
    )


def list_records(
    conn: Connection, device: DeviceId, *, klass: RecordClass | None, after: int, limit: int
) -> list[RecordRow]:
    """The device's records in the order of arrival, from after a row's id."""
    # One query per class, because that is how the index is ordered.
    wanted = tuple(RecordClass) if klass is None else (klass,)
    found = [row for one in wanted for row in _list_class(conn, device, one, after=after, limit=limit)]
    return sorted(found, key=lambda row: row.id)[:limit]


def _list_class(conn: Connection, device: DeviceId, klass: RecordClass, *, after: int, limit: int) -> list[RecordRow]:
    c = records.c
    of_class = sa.select(records).where(c.device == device, c.klass == int(klass))
    query = of_class.where(c.id > after).order_by(c.id).limit(limit)
    return [
        RecordRow(
            id=row.id,
            epoch=row.epoch,
            klass=klass,
            seq=row.seq,
            at_ms=row.at_ms,
            received_ms=row.received_ms,
            kind=row.kind,
            body=bytes(row.body),
        )
        for row in conn.execute(query)
    ]


def list_streams(conn: Connection, device: DeviceId) -> list[StreamRow]:
    """The device's streams, oldest epoch first."""
    c = streams.c
    query = sa.select(streams).where(c.device == device).order_by(c.first_received_ms, c.epoch, c.klass)
    return [
        StreamRow(
            stream=Stream(device=DeviceId(row.device), epoch=row.epoch, klass=RecordClass(row.klass)),
            received=Received(
                ranges=decode_ranges(row.ranges),
                records=row.records,
                duplicates=row.duplicates,
                conflicts=row.conflicts,
            ),
            first_received_ms=row.first_received_ms,
            last_received_ms=row.last_received_ms,
        )
        for row in conn.execute(query)
    ]


def add_figures(conn: Connection, device: DeviceId, tallies: Mapping[tuple[str, str], Tally], *, minute: int) -> None:
    """Add what a batch brought to the minute's figures."""
    c = figures.c
    for (family, version), tally in tallies.items():
        key = {"family": family, "minute": minute, "device": device, "version": version}
        same = sa.and_(c.family == family, c.minute == minute, c.device == device, c.version == version)
        latency = tally.latency
        if latency.buckets:
            before = conn.execute(sa.select(c.latency).where(same)).scalar_one_or_none()
            latency = latency if before is None else latency.merge(decode_sketch(bytes(before)))
        statement = insert(figures).values(
            **key, answered=tally.answered, right=tally.right, wrong=tally.wrong, latency=latency.encode()
        )
        changed: dict[str, object] = {
            "answered": c.answered + statement.excluded.answered,
            "right": c.right + statement.excluded.right,
            "wrong": c.wrong + statement.excluded.wrong,
        }
        if latency.buckets:
            changed["latency"] = statement.excluded.latency
        conn.execute(
            statement.on_conflict_do_update(index_elements=["family", "minute", "device", "version"], set_=changed)
        )


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
        for start in range(0, len(devices), _DEVICES_PER_QUERY):
            rows.extend(conn.execute(query.where(c.device.in_(devices[start : start + _DEVICES_PER_QUERY]))))
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


def _key(stream: Stream) -> dict[str, object]:
    return {"device": stream.device, "epoch": stream.epoch, "klass": int(stream.klass)}


def _of(table: sa.Table, stream: Stream) -> tuple[sa.ColumnElement[bool], ...]:
    c = table.c
    return c.device == stream.device, c.epoch == stream.epoch, c.klass == int(stream.klass)
