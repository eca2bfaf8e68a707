"""Records that an agent before the journal left in the SQLite file, as the driver's `OldRecords`.

Rules of this file:
1. A sealed batch becomes single records again, in one transaction; then all go class by class, oldest first.
2. What cannot be read is given up, and that is logged: it could not be sent before either.

The hub may have a sealed batch already whose acknowledgement did not arrive before the update. It comes again under the
new store's epoch, which the hub cannot know for the same: of each class one batch may be counted twice, none is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from edge_agent.adapters.database import Connection, Database
from shared import limits
from shared.errors import ProtocolViolation
from shared.telemetry import Body
from shared.wire.columns import decode_columns

logger = logging.getLogger(__name__)

_FREED_PAGES: Final = 2048
"""Given back to the file system with each step."""

_decoder: Final[msgspec.msgpack.Decoder[Body]] = msgspec.msgpack.Decoder(Body)
_Row = tuple[int, int, int, Body]


class SqliteOldRecords:
    """The tables `batches` and `records`, until they are empty."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._taken: list[_Row] = []

    async def oldest(self) -> Sequence[tuple[int, Body]]:
        """A few of those that are left, with their times; empty when none is."""
        self._taken = await self._database.write(_take)
        return [(at_ms, body) for _, _, at_ms, body in self._taken]

    async def forget(self, places: Collection[int]) -> None:
        """Delete those at these places of what `oldest` gave last."""
        gone = [self._taken[place][:2] for place in places]

        def work(connection: Connection) -> None:
            connection.executemany("DELETE FROM records WHERE klass = ? AND seq = ?", gone)
            connection.execute(f"PRAGMA incremental_vacuum({_FREED_PAGES})").fetchall()

        await self._database.write(work)


def _take(connection: Connection) -> list[_Row]:
    _unseal(connection)
    taken: list[_Row] = []
    size = 0
    rows = connection.execute("SELECT klass, seq, at_ms, body FROM records ORDER BY klass, seq")
    unreadable: list[tuple[int, int]] = []
    for klass, number, at_ms, data in rows:
        size += len(data)
        if len(taken) == limits.MAX_BATCH_RECORDS or (taken and size > limits.MAX_BATCH_BYTES):
            break
        try:
            taken.append((klass, number, at_ms, _decoder.decode(data)))
        except (msgspec.MsgspecError, RecursionError) as error:
            unreadable.append((klass, number))
            logger.error("an old record cannot be read", extra={"class": klass, "seq": number, "why": str(error)})
    connection.executemany("DELETE FROM records WHERE klass = ? AND seq = ?", unreadable)
    return taken


def _unseal(connection: Connection) -> None:
    for klass, columns in connection.execute("SELECT klass, columns FROM batches").fetchall():
        try:
            rows = [(klass, one.seq, one.at_ms, msgspec.msgpack.encode(one.body)) for one in decode_columns(columns)]
        except ProtocolViolation as error:
            rows = []
            logger.error("an old batch cannot be read", extra={"class": klass, "why": error.message})
        connection.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", rows)
        connection.execute("DELETE FROM batches WHERE klass = ?", (klass,))
