"""One row per batch instead of one per record, and what is declared lost beside what is here.

Records that are here are put together again into batches: of one stream, without a hole, of one moment of arrival, and
within what a batch may hold. They keep the order in which they arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from alembic import op

from shared import limits
from shared.telemetry import Body, Record
from shared.wire.columns import decode_columns, encode_columns
from shared.wire.messages import digest_of

revision = "0010_batches"
down_revision = "0009_round_tasks"
branch_labels = None
depends_on = None

_PAGE: Final = 5000
_NUMBER: Final = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_NOTHING_LOST: Final = b"\x90"
"""An empty list in MessagePack."""
_NOTHING_FOLDED: Final = b"\x80"
"""An empty map."""
_MOST: Final = 2**63 - 1
_Row = sa.Row[Any]

_old = sa.table(
    "telemetry_records",
    *(sa.column(name) for name in ("id", "device", "epoch", "klass", "seq", "at_ms", "received_ms", "kind", "body")),
)
_streams = sa.table("telemetry_streams", sa.column("lost", sa.LargeBinary), sa.column("folded", sa.LargeBinary))
_new = sa.table(
    "telemetry_batches",
    *(
        sa.column(name)
        for name in (
            "id", "device", "epoch", "klass", "first", "last", "digest", "received_ms", "records", "columns",
        )
    ),
)  # fmt: skip


def upgrade() -> None:
    """Create the new table, carry the records over, remove theirs."""
    conn = op.get_bind()
    op.drop_table("telemetry_batches")
    op.create_table(
        "telemetry_batches",
        sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("epoch", sa.String(16), nullable=False),
        sa.Column("klass", sa.Integer, nullable=False),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("received_ms", sa.BigInteger, nullable=False),
        sa.Column("records", sa.Integer, nullable=False),
        sa.Column("columns", sa.LargeBinary, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_telemetry_batches_first", "telemetry_batches", ["device", "epoch", "klass", "first"])
    op.create_index("ix_telemetry_batches_id", "telemetry_batches", ["device", "klass", "id"])
    for rows in _batches(conn):
        conn.execute(sa.insert(_new), _batch(rows))
    if conn.dialect.name == "postgresql":
        # Ids that were given do not count the sequence up; SQLite's does.
        conn.exec_driver_sql(
            "SELECT setval(pg_get_serial_sequence('telemetry_batches', 'id'), max(id)) FROM telemetry_batches"
        )
    op.drop_table("telemetry_records")
    op.create_index("ix_telemetry_figures_device", "telemetry_figures", ["device", "minute"])
    for name in ("lost", "folded"):
        op.add_column("telemetry_streams", sa.Column(name, sa.LargeBinary))
    conn.execute(sa.update(_streams).values(lost=_NOTHING_LOST, folded=_NOTHING_FOLDED))
    with op.batch_alter_table("telemetry_streams") as table:
        for name in ("lost", "folded"):
            table.alter_column(name, existing_type=sa.LargeBinary(), nullable=False)


def downgrade() -> None:
    """Explode the batches into records again; what is declared lost is forgotten."""
    conn = op.get_bind()
    op.drop_index("ix_telemetry_figures_device", "telemetry_figures")
    op.create_table(
        "telemetry_records",
        sa.Column("id", _NUMBER, primary_key=True, autoincrement=True),
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("epoch", sa.String(16), nullable=False),
        sa.Column("klass", sa.Integer, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("at_ms", sa.BigInteger, nullable=False),
        sa.Column("received_ms", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("device", "epoch", "klass", "seq", name=op.f("uq_telemetry_records_device")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_telemetry_records_device", "telemetry_records", ["device", "klass", "id"])
    last, query = 0, sa.select(_new).order_by(_new.c.id).limit(1)
    while (row := conn.execute(query.where(_new.c.id > last)).one_or_none()) is not None:
        conn.execute(sa.insert(_old), [_exploded(row, record) for record in decode_columns(bytes(row.columns))])
        last = row.id
    op.drop_table("telemetry_batches")
    op.create_table(
        "telemetry_batches",
        sa.Column("device", sa.String(63), nullable=False),
        sa.Column("epoch", sa.String(16), nullable=False),
        sa.Column("klass", sa.Integer, nullable=False),
        sa.Column("first", sa.BigInteger, nullable=False),
        sa.Column("last", sa.BigInteger, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("device", "epoch", "klass", "first", "last", name=op.f("pk_telemetry_batches")),
    )
    for name in ("lost", "folded"):
        op.drop_column("telemetry_streams", name)


def _exploded(row: _Row, record: Record) -> dict[str, object]:
    fields = {name: value for name, value in msgspec.structs.asdict(record.body).items() if value is not None}
    return {
        "device": row.device,
        "epoch": row.epoch,
        "klass": row.klass,
        "seq": record.seq,
        "at_ms": record.at_ms,
        "received_ms": row.received_ms,
        "kind": str(record.body.__struct_config__.tag),
        "body": msgspec.msgpack.encode(fields),
    }


def _batches(conn: sa.Connection) -> Iterator[list[_Row]]:
    """All records, in the rows that they become."""
    rows: list[_Row] = []
    size = 0
    for row in _records(conn):
        size += len(row.body) + 64
        if rows and (
            _key(row) != _key(rows[-1])
            or row.seq != rows[-1].seq + 1
            or len(rows) == limits.MAX_BATCH_RECORDS
            or size > limits.MAX_BATCH_BYTES // 2
        ):
            yield rows
            rows, size = [], len(row.body) + 64
        rows.append(row)
    if rows:
        yield rows


def _records(conn: sa.Connection) -> Iterator[_Row]:
    """All records, stream by stream, in the order of their numbers."""
    c = _old.c
    order = (c.device, c.epoch, c.klass, c.seq)
    query = sa.select(_old).order_by(*order).limit(_PAGE)
    page = conn.execute(query).all()
    while page:
        yield from page
        last = page[-1]
        after = sa.tuple_(*order) > sa.tuple_(last.device, last.epoch, last.klass, last.seq)
        page = conn.execute(query.where(after)).all()


def _key(row: _Row) -> tuple[object, ...]:
    return row.device, row.epoch, row.klass, row.received_ms


def _batch(rows: Sequence[_Row]) -> dict[str, object]:
    columns = encode_columns([Record(seq=row.seq, at_ms=row.at_ms, body=_body(row)) for row in rows])
    first = rows[0]
    return {
        # Ids tell the order of arrival, and no two batches have the same record.
        "id": min(row.id for row in rows),
        "device": first.device,
        "epoch": first.epoch,
        "klass": first.klass,
        "first": first.seq,
        "last": rows[-1].seq,
        "digest": digest_of(columns=columns, gap=None),
        "received_ms": first.received_ms,
        "records": len(rows),
        "columns": columns,
    }


def _body(row: _Row) -> Body:
    fields = msgspec.msgpack.decode(row.body, type=dict[str, object])
    for name, value in fields.items():
        # The former hub took numbers that columns do not hold.
        if isinstance(value, int) and value > _MOST:
            fields[name] = _MOST
    body: Body = msgspec.convert({**fields, "kind": row.kind}, type=Body)
    return body
