"""Records that wait for the hub, as `edge_agent.ports.Outbox`, in the agent's SQLite file.

Rules of this file:
1. A number is given out once: `heads.next_seq` is raised in the transaction that stores the record and survives
   everything being acknowledged. A number therefore never repeats within an epoch, and none is skipped.
2. Sealing moves the oldest records of a class into one batch and stores its columns as they will be sent. What is
   sent again, after any crash or update of the agent, is the same bytes with the same digest.
3. Room is made before it is needed, by dropping the oldest unsealed records of the least precious class that is
   not more precious than the newcomer. A sealed batch may be at the hub already and is never dropped; class 0 is
   never dropped. What was dropped is told in a class 0 event `queue.evicted` {class, first, last, records}, which
   grows in place while it is unsealed, so that a month offline does not fill the queue with such notes.

Not here: when to send, and what an acknowledgement means (the driver and `edge_agent/core/outbox.py`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import Final

import msgspec

from edge_agent.adapters.database import Connection, Database
from edge_agent.ports import Depth
from shared import limits
from shared.errors import InvalidValue, StorageError, StorageFull
from shared.telemetry import CLASS_OF, BatchId, Body, DeviceEvent, Record, RecordClass
from shared.wire.columns import encode_columns
from shared.wire.messages import Batch

RECORD_OVERHEAD_BYTES: Final = 32
"""What a row costs beside its body: keys, lengths and its share of half-filled pages, rounded up."""

NOTE_BYTES: Final = 192
"""Freed beyond what is needed, for the note that tells of the gap."""

CLASS_SHARES: Final[Mapping[RecordClass, float]] = {
    RecordClass.EVENT: 1.0,
    RecordClass.OUTCOME: 0.9,
    RecordClass.TELEMETRY: 0.8,
}
"""The share of the whole budget that one class may fill, so that the precious ones always find room."""

_Heads = Mapping[RecordClass, tuple[int, int]]
_body_decoder: Final[msgspec.msgpack.Decoder[Body]] = msgspec.msgpack.Decoder(Body)


class SqliteOutbox:
    """`Outbox` on a `Database`; made by `open`."""

    def __init__(self, database: Database, *, epoch: str, heads: _Heads, limit_bytes: int) -> None:
        self._database = database
        self._epoch = epoch
        self._limit_bytes = limit_bytes
        self._heads = heads

    @classmethod
    async def open(cls, database: Database, *, limit_bytes: int) -> SqliteOutbox:
        """Read the epoch (drawn on the first start) and the counters; `limit_bytes` bounds all classes together."""

        def work(connection: Connection) -> tuple[str, _Heads]:
            row = connection.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
            if row is not None:
                return str(row[0]), _read_heads(connection)
            epoch = secrets.token_hex(8)
            connection.execute("INSERT INTO meta (key, value) VALUES ('epoch', ?)", (epoch,))
            return epoch, _read_heads(connection)

        epoch, heads = await database.write(work)
        return cls(database, epoch=epoch, heads=heads, limit_bytes=limit_bytes)

    @property
    def epoch(self) -> str:
        """16 hex digits, drawn when this outbox was created."""
        return self._epoch

    async def put(self, *, at_ms: int, body: Body) -> int:
        """Append a record to its class and return its number once it is durable.

        Raises:
            InvalidValue: the record exceeds MAX_RECORD_BYTES.
            StorageFull: the disk is full, or the budget is, with nothing in it that may be dropped for this class.
        """
        data = msgspec.msgpack.encode(body)
        if len(data) > limits.MAX_RECORD_BYTES:
            raise InvalidValue(
                f"record of {len(data)} bytes exceeds {limits.MAX_RECORD_BYTES}",
                code="invalid.record",
                hint="send large data as a file, not as a record",
            )
        klass = CLASS_OF[type(body)]

        def work(connection: Connection) -> tuple[int, _Heads]:
            self._make_room(connection, klass, cost=_cost(len(data)), at_ms=at_ms)
            seq = _append(connection, klass, at_ms=at_ms, data=data)
            return seq, _read_heads(connection)

        seq, _ = await self._database.write(work, after=lambda result: self._keep_heads(result[1]))
        return seq

    async def next_batch(self, klass: RecordClass) -> Batch | None:
        """The oldest batch of the class that is not acknowledged; its boundaries are durable before this returns."""
        if self._heads[klass][0] == 0:
            return None

        def work(connection: Connection) -> tuple[Batch | None, _Heads]:
            batch = _sealed(connection, klass, self._epoch) or self._seal(connection, klass)
            return batch, _read_heads(connection)

        batch, _ = await self._database.write(work, after=lambda result: self._keep_heads(result[1]))
        return batch

    async def settle(self, batch: BatchId) -> bool:
        """Delete what the hub acknowledged; False when no such batch is open (a late or repeated answer)."""
        if batch.epoch != self._epoch or batch.klass not in set(RecordClass):
            return False
        klass = RecordClass(batch.klass)

        def work(connection: Connection) -> tuple[bool, _Heads]:
            row = connection.execute(
                "DELETE FROM batches WHERE klass = ? AND first = ? AND last = ? AND digest = ?"
                " RETURNING LENGTH(columns)",
                (klass, batch.first, batch.last, batch.digest),
            ).fetchone()
            if row is None:
                return False, _read_heads(connection)
            _count(connection, klass, records=-(batch.last - batch.first + 1), size=-_cost(row[0]))
            heads = _read_heads(connection)
            if not any(records for records, _ in heads.values()):
                connection.execute("PRAGMA incremental_vacuum(2048)").fetchall()
            return True, heads

        settled, _ = await self._database.write(work, after=lambda result: self._keep_heads(result[1]))
        return settled

    def depth(self) -> Depth:
        """How much waits; kept in memory, exact."""
        heads = self._heads
        return Depth(
            records={klass: records for klass, (records, _) in heads.items()},
            bytes=sum(size for _, size in heads.values()),
        )

    async def drop(self, klass: RecordClass, *, at_ms: int) -> int:
        """Drop the class's unsealed records at a person's word, leaving the note; returns how many. Not class 0."""
        if klass is RecordClass.EVENT:
            raise InvalidValue("events are never dropped", code="invalid.class")

        def work(connection: Connection) -> tuple[int, _Heads]:
            before = _read_heads(connection)[klass][0]
            _evict(connection, klass, need=2**62, at_ms=at_ms)
            heads = _read_heads(connection)
            return before - heads[klass][0], heads

        dropped, _ = await self._database.write(work, after=lambda result: self._keep_heads(result[1]))
        return dropped

    def _keep_heads(self, heads: _Heads) -> None:
        # Called in the writer thread after each commit; one reference is replaced, so readers see old or new.
        self._heads = heads

    def _make_room(self, connection: Connection, klass: RecordClass, *, cost: int, at_ms: int) -> None:
        heads = _read_heads(connection)
        step = max(cost + NOTE_BYTES, self._limit_bytes // 64)
        over_class = heads[klass][1] + cost - int(self._limit_bytes * CLASS_SHARES[klass])
        if over_class > 0 and klass is not RecordClass.EVENT:
            _evict(connection, klass, need=max(over_class + NOTE_BYTES, step), at_ms=at_ms)
            heads = _read_heads(connection)
        for victim in sorted(heads, reverse=True):
            total = sum(size for _, size in heads.values())
            if total + cost <= self._limit_bytes or victim < klass or victim is RecordClass.EVENT:
                break
            _evict(connection, victim, need=max(total + cost - self._limit_bytes + NOTE_BYTES, step), at_ms=at_ms)
            heads = _read_heads(connection)
        if sum(size for _, size in heads.values()) + cost > self._limit_bytes:
            raise StorageFull(
                f"the queue holds {self._limit_bytes} bytes that may not be dropped for a new {klass.name.lower()}",
                hint="bring the device online so that the hub takes the queue, or raise disk.queue_bytes",
            )

    def _seal(self, connection: Connection, klass: RecordClass) -> Batch | None:
        rows = _oldest(connection, klass)
        if not rows:
            return None
        try:
            records = [Record(seq=seq, at_ms=at_ms, body=_body_decoder.decode(body)) for seq, at_ms, body in rows]
        except (msgspec.MsgspecError, RecursionError) as error:
            raise StorageError(f"a stored record cannot be read: {error}", code="storage.unreadable") from error
        columns = encode_columns(records)
        while len(columns) > limits.MAX_BATCH_BYTES:
            records = records[: len(records) // 2]
            columns = encode_columns(records)
        first, last = records[0].seq, records[-1].seq
        digest = hashlib.sha256(columns).hexdigest()
        connection.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", (klass, first, last, digest, columns))
        connection.execute("DELETE FROM records WHERE klass = ? AND seq <= ?", (klass, last))
        freed = sum(_cost(len(body)) for _, _, body in rows[: len(records)])
        _count(connection, klass, records=0, size=_cost(len(columns)) - freed)
        batch = BatchId(epoch=self._epoch, klass=int(klass), first=first, last=last, digest=digest)
        return Batch(batch=batch, columns=columns)


def _cost(payload_bytes: int) -> int:
    return payload_bytes + RECORD_OVERHEAD_BYTES


def _read_heads(connection: Connection) -> _Heads:
    rows = connection.execute("SELECT klass, records, bytes FROM heads")
    return {RecordClass(klass): (records, size) for klass, records, size in rows}


def _count(connection: Connection, klass: RecordClass, *, records: int, size: int) -> None:
    connection.execute(
        "UPDATE heads SET records = records + ?, bytes = bytes + ? WHERE klass = ?", (records, size, klass)
    )


def _append(connection: Connection, klass: RecordClass, *, at_ms: int, data: bytes) -> int:
    (seq,) = connection.execute(
        "UPDATE heads SET next_seq = next_seq + 1, records = records + 1, bytes = bytes + ? WHERE klass = ?"
        " RETURNING next_seq - 1",
        (_cost(len(data)), klass),
    ).fetchone()
    connection.execute("INSERT INTO records VALUES (?, ?, ?, ?)", (klass, seq, at_ms, data))
    return int(seq)


def _oldest(connection: Connection, klass: RecordClass) -> list[tuple[int, int, bytes]]:
    """The oldest unsealed records, about a batch full: counted here so that large bodies do not fill the memory."""
    rows: list[tuple[int, int, bytes]] = []
    size = 0
    for seq, at_ms, body in connection.execute(
        "SELECT seq, at_ms, body FROM records WHERE klass = ? ORDER BY seq LIMIT ?", (klass, limits.MAX_BATCH_RECORDS)
    ):
        size += len(body)
        if rows and size > limits.MAX_BATCH_BYTES:
            break
        rows.append((seq, at_ms, body))
    return rows


def _sealed(connection: Connection, klass: RecordClass, epoch: str) -> Batch | None:
    row = connection.execute("SELECT first, last, digest, columns FROM batches WHERE klass = ?", (klass,)).fetchone()
    if row is None:
        return None
    first, last, digest, columns = row
    batch = BatchId(epoch=epoch, klass=int(klass), first=first, last=last, digest=digest)
    return Batch(batch=batch, columns=bytes(columns))


def _evict(connection: Connection, klass: RecordClass, *, need: int, at_ms: int) -> None:
    freed, count, first, last = 0, 0, 0, 0
    for seq, size in connection.execute("SELECT seq, LENGTH(body) FROM records WHERE klass = ? ORDER BY seq", (klass,)):
        first = first or seq
        last = seq
        freed += _cost(size)
        count += 1
        if freed >= need:
            break
    if count == 0:
        return
    connection.execute("DELETE FROM records WHERE klass = ? AND seq <= ?", (klass, last))
    _count(connection, klass, records=-count, size=-freed)
    _note_gap(connection, klass, first=first, last=last, at_ms=at_ms)


def _note_gap(connection: Connection, klass: RecordClass, *, first: int, last: int, at_ms: int) -> None:
    """Tell of what was dropped; the note before is extended where it is unsealed and ends where this begins."""
    key = f"gap.{klass.name.lower()}"
    events = int(RecordClass.EVENT)
    note = connection.execute(
        "SELECT seq, body FROM records WHERE klass = ? AND seq = (SELECT value FROM meta WHERE key = ?)", (events, key)
    ).fetchone()
    if note is not None:
        before = _body_decoder.decode(note[1])
        if isinstance(before, DeviceEvent) and int(before.detail["last"]) + 1 == first:
            data = _gap(klass, first=int(before.detail["first"]), last=last)
            connection.execute("UPDATE records SET body = ? WHERE klass = ? AND seq = ?", (data, events, note[0]))
            _count(connection, RecordClass.EVENT, records=0, size=len(data) - len(note[1]))
            return
    seq = _append(connection, RecordClass.EVENT, at_ms=at_ms, data=_gap(klass, first=first, last=last))
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, seq))


def _gap(klass: RecordClass, *, first: int, last: int) -> bytes:
    detail = {
        "class": klass.name.lower(),
        "first": str(first),
        "last": str(last),
        "records": str(last - first + 1),
    }
    return msgspec.msgpack.encode(DeviceEvent(name="queue.evicted", detail=detail))
