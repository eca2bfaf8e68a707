"""The hub's database: one writer at a time, readers beside it, every commit on disk.

Rules:
1. Work is a function of a `Connection`; it runs in one transaction, which is committed when the function returns and
   rolled back when it raises. It must not keep the connection.
2. A write transaction takes the write lock before it reads (`BEGIN IMMEDIATE`), so that what it decided on cannot
   change under it, and never fails half-way for want of the lock.
3. Reads cannot write (`PRAGMA query_only`).

Several processes may use the same file: the commands work beside a running hub.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from shared.errors import Conflict, StorageError, StorageFull

T = TypeVar("T")

BUSY_TIMEOUT_MS: Final = 5000
_READERS: Final = 4


class Database:
    """A SQLAlchemy database that is written by one thread and read by a few.

    Args:
        url: SQLAlchemy URL, `sqlite:////data/hub.db`.

    Raises:
        Conflict: from any method, when a constraint refused the work.
        StorageError: from any method, when the database could not do it (locked, full, damaged).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._writer = _engine(url, begin="BEGIN IMMEDIATE", read_only=False)
        self._reader = _engine(url, begin="BEGIN", read_only=True)
        self._write_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="db-write")
        self._read_threads = ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="db-read")

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run the work in a write transaction and return its value once it is on disk.

        A caller that is cancelled meanwhile does not undo the work: it is committed or not as if nobody waited.
        """
        return await asyncio.get_running_loop().run_in_executor(self._write_thread, self.write_now, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run the work in a read transaction: one consistent picture, however many statements it takes."""
        return await asyncio.get_running_loop().run_in_executor(self._read_threads, self.read_now, work)

    def write_now(self, work: Callable[[Connection], T]) -> T:
        """`write` for callers without an event loop; blocks."""
        with _translated(), self._writer.begin() as connection:
            return work(connection)

    def read_now(self, work: Callable[[Connection], T]) -> T:
        """`read` for callers without an event loop; blocks."""
        with _translated(), self._reader.begin() as connection:
            return work(connection)

    def close(self) -> None:
        """Finish what was handed in and close all connections. Safe to call twice."""
        self._write_thread.shutdown(wait=True)
        self._read_threads.shutdown(wait=True)
        self._writer.dispose()
        self._reader.dispose()


def _engine(url: str, *, begin: str, read_only: bool) -> Engine:
    engine = sa.create_engine(url, connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000})

    def on_connect(raw: Any, _record: object) -> None:
        # The driver's own idea of when a transaction begins is turned off: ours begins it below.
        raw.isolation_level = None
        cursor = raw.cursor()
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"query_only={'ON' if read_only else 'OFF'}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    sa.event.listen(engine, "connect", on_connect)
    sa.event.listen(engine, "begin", on_begin)
    return engine


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sa.exc.IntegrityError as error:
        raise Conflict(f"the database refused: {error.orig}", code="conflict.constraint") from error
    except sa.exc.DBAPIError as error:
        raise _storage_error(error.orig) from error
    except sqlite3.Error as error:
        raise _storage_error(error) from error


def _storage_error(cause: BaseException | None) -> StorageError:
    text = str(cause)
    name = getattr(cause, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL"):
        return StorageFull(f"no room for the database: {text}", hint="free disk space on the hub's data directory")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        busy = StorageError(
            f"the database is locked: {text}", code="storage.busy", hint="another command is writing; try again"
        )
        busy.retry = True
        return busy
    if "no such table" in text or "no such column" in text:
        return StorageError(
            f"the database is not of this version: {text}", code="storage.schema", hint="run `outrider-hub migrate`"
        )
    return StorageError(f"the database failed: {text}", hint="run `outrider-hub doctor`")
