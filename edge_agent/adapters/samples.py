"""Labelled samples and the answers to tasks of federated runs, in the agent's SQLite file.

Rules of this file:
1. A sample is on disk when `keep` returns, and nothing here sends one: what leaves the device are heads and figures.
2. Both tables are bounded. Samples by count and bytes for each family, the oldest going first; answers to one for each
   run and a day.

Implements ports.Samples and ports.RoundReplies. Not here: what is learned, and when an answer is sent.
"""

from __future__ import annotations

from typing import Final

import msgspec

from edge_agent.adapters.database import Connection, Database
from edge_agent.ports import Sample
from shared.errors import InvalidValue
from shared.inference import TensorHead
from shared.limits import MAX_ROUND_SAMPLES, MIB

MAX_SAMPLES_BYTES: Final = 16 * MIB
MAX_SAMPLE_BYTES: Final = 1 * MIB
REPLY_KEPT_MS: Final = 86_400_000

_Body = tuple[str, tuple[TensorHead, ...], bytes]
_body_decoder: Final[msgspec.msgpack.Decoder[_Body]] = msgspec.msgpack.Decoder(_Body)


class SqliteSamples:
    """`ports.Samples` on a `Database`."""

    def __init__(
        self, database: Database, *, max_samples: int = MAX_ROUND_SAMPLES, max_bytes: int = MAX_SAMPLES_BYTES
    ) -> None:
        """Keep at most this many samples and bytes of each family."""
        self._database = database
        self._max_samples = max_samples
        self._max_bytes = max_bytes

    async def keep(self, family: str, sample: Sample, *, at_ms: int) -> int:
        """Keep a sample and return its number once it is durable; raises InvalidValue when it is too large."""
        body = msgspec.msgpack.encode((sample.label, sample.inputs, sample.payload))
        if len(body) > min(MAX_SAMPLE_BYTES, self._max_bytes):
            raise InvalidValue(
                f"a sample of {len(body)} bytes exceeds {min(MAX_SAMPLE_BYTES, self._max_bytes)}",
                code="invalid.sample",
                hint="teach smaller inputs",
            )

        def work(connection: Connection) -> int:
            self._make_room(connection, family, len(body))
            cursor = connection.execute(
                "INSERT INTO samples (family, at_ms, bytes, body) VALUES (?, ?, ?, ?)",
                (family, at_ms, len(body), body),
            )
            return int(cursor.lastrowid or 0)

        return await self._database.write(work)

    async def load(self, family: str, *, after: int = 0, at_most: int = 256) -> tuple[Sample, ...]:
        """Kept samples with a number above `after`, oldest first."""

        def work(connection: Connection) -> list[tuple[int, bytes]]:
            return connection.execute(
                "SELECT number, body FROM samples WHERE family = ? AND number > ? ORDER BY number LIMIT ?",
                (family, after, at_most),
            ).fetchall()

        return tuple(_sample(number, body) for number, body in await self._database.write(work))

    async def oldest(self, family: str) -> int:
        """The number of the family's oldest sample; 0 when there is none."""

        def work(connection: Connection) -> int:
            row = connection.execute("SELECT min(number) FROM samples WHERE family = ?", (family,)).fetchone()
            return int(row[0] or 0)

        return await self._database.write(work)

    async def drop(self, family: str) -> int:
        """Forget every sample of the family; returns how many there were."""

        def work(connection: Connection) -> int:
            return connection.execute("DELETE FROM samples WHERE family = ?", (family,)).rowcount

        return await self._database.write(work)

    def _make_room(self, connection: Connection, family: str, size: int) -> None:
        count, total = connection.execute(
            "SELECT count(*), coalesce(sum(bytes), 0) FROM samples WHERE family = ?", (family,)
        ).fetchone()
        if count < self._max_samples and total + size <= self._max_bytes:
            return
        last = 0
        rows = connection.execute("SELECT number, bytes FROM samples WHERE family = ? ORDER BY number", (family,))
        for number, freed in rows:
            if count < self._max_samples and total + size <= self._max_bytes:
                break
            count, total, last = count - 1, total - freed, number
        rows.close()
        connection.execute("DELETE FROM samples WHERE family = ? AND number <= ?", (family, last))


class SqliteReplies:
    """`ports.RoundReplies` on a `Database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self, run: str, message: str) -> bytes | None:
        """The answer to this message, if it is kept."""

        def work(connection: Connection) -> bytes | None:
            row = connection.execute(
                "SELECT content FROM round_replies WHERE run = ? AND message = ?", (run, message)
            ).fetchone()
            return bytes(row[0]) if row is not None else None

        return await self._database.write(work)

    async def keep(self, run: str, message: str, content: bytes, *, at_ms: int) -> None:
        """Keep this answer, and forget the run's earlier ones and every run's that are older than a day."""

        def work(connection: Connection) -> None:
            connection.execute("DELETE FROM round_replies WHERE run = ? OR at_ms < ?", (run, at_ms - REPLY_KEPT_MS))
            connection.execute("INSERT INTO round_replies VALUES (?, ?, ?, ?)", (run, message, at_ms, content))

        await self._database.write(work)


def _sample(number: int, body: bytes) -> Sample:
    label, inputs, payload = _body_decoder.decode(body)
    return Sample(number=number, label=label, inputs=inputs, payload=payload)
