"""The hub's database: SQLite, or PostgreSQL where several hubs share one. Every commit is on disk.

Rules:
1. Work is a function of a `Connection`; it runs in one transaction, which is committed when the function returns and
   rolled back when it raises. It must not keep the connection, and may be run again after a rollback.
2. A write transaction takes the write lock before it reads, so that what it decided on cannot change under it, and
   never fails half-way for want of the lock: SQLite's (`BEGIN IMMEDIATE`), or a lock of ours in PostgreSQL, which all
   hubs on it share.
3. Work that is `beside` others takes no such lock. It locks by itself what it decides on (`lock`), so that on
   PostgreSQL hubs store telemetry at the same time.
4. Reads cannot write, and see one moment.
5. PostgreSQL ends what takes too long, so that a hub which froze or vanished in a transaction does not stop the others
   with its locks; and a hub finds out that its server vanished instead of waiting for ever.

Several processes may use the same database: the commands work beside a running hub.
"""

from __future__ import annotations

import asyncio
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from shared.errors import ConfigError, Conflict, StorageError, StorageFull

T = TypeVar("T")

BUSY_TIMEOUT_MS: Final = 5000
CHECKPOINT_PAGES: Final = 4000
"""Of the log, 4 KiB each, until they are written to their place: a page that many commits touch is written once."""
MAX_TRIES: Final = 5
"""Of a transaction that PostgreSQL ended because another one stood in its way."""
STATEMENT_MS: Final = 30_000
"""The longest statement on PostgreSQL; migrations have as long as they take."""
IDLE_MS: Final = 30_000
"""How long a transaction on PostgreSQL may hold its locks and do nothing."""
VANISHED_MS: Final = 20_000
"""Without a sign of life from the other machine, until a connection counts as lost."""
_READERS: Final = 4
_CONNECT_S: Final = 5
_IN_THE_WAY: Final = ("40001", "40P01")
_NOT_AVAILABLE: Final = "55P03"
_DEADLINES: Final = ("57014", "25P03")
"""Of a statement, and of a transaction that does nothing."""
_POSTGRES: Final = "postgresql+psycopg"


class Lock(IntEnum):
    """What can be locked until the end of a transaction."""

    HOUSE = 1
    """The write lock: every transaction that is not beside others."""
    AUDIT = 2
    """The end of the audit chain."""
    TELEMETRY = 3
    """What is known of a device's records."""
    HUB = 4
    """The whole database, for the one hub that runs on it; held by a connection, not by a transaction."""


class Database:
    """A SQLAlchemy database that is written by one thread (two on PostgreSQL) and read by a few.

    Args:
        url: `sqlite:////data/hub.db`, or `postgresql+psycopg://user@host/name`.

    Raises:
        ConfigError: the URL is of no database that can be used here.
        Conflict: from any method, when a constraint refused the work.
        StorageError: from any method, when the database could not do it (locked, full, damaged, not there).
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        if self.is_sqlite:
            self._writer = _sqlite_engine(url, begin="BEGIN IMMEDIATE", read_only=False)
            self._reader = _sqlite_engine(url, begin="BEGIN", read_only=True)
        else:
            self._writer = _postgres_engine(url)
            self._reader = self._writer.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._claim: Connection | None = None
        self._write_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="db-write")
        self._beside_thread = (
            self._write_thread if self.is_sqlite else ThreadPoolExecutor(max_workers=1, thread_name_prefix="db-beside")
        )
        self._read_threads = ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="db-read")

    async def write(self, work: Callable[[Connection], T], *, beside: bool = False) -> T:
        """Run the work in a write transaction and return its value once it is on disk.

        A caller that is cancelled meanwhile does not undo the work: it is committed or not as if nobody waited.

        Args:
            work: what to do.
            beside: it locks what it decides on; on PostgreSQL others may write meanwhile.
        """
        thread = self._beside_thread if beside else self._write_thread
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(thread, lambda: self.write_now(work, beside=beside))

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run the work in a read transaction: one consistent picture, however many statements it takes."""
        return await asyncio.get_running_loop().run_in_executor(self._read_threads, self.read_now, work)

    def write_now(self, work: Callable[[Connection], T], *, beside: bool = False) -> T:
        """`write` for callers without an event loop; blocks."""
        with _translated():
            for tries_left in reversed(range(MAX_TRIES)):
                try:
                    with self._writer.begin() as connection:
                        if not beside:
                            lock(connection, Lock.HOUSE)
                        return work(connection)
                except sa.exc.OperationalError as error:
                    if not tries_left or getattr(error.orig, "sqlstate", None) not in _IN_THE_WAY:
                        raise
        raise AssertionError("the last try returns or raises")

    def read_now(self, work: Callable[[Connection], T]) -> T:
        """`read` for callers without an event loop; blocks."""
        with _translated(), self._reader.begin() as connection:
            return work(connection)

    def claim(self) -> None:
        """Hold the database for this process, until `close`; to be called again and again, since a server forgets.

        Waits a moment for a hub that is just ending. Blocks. Without effect on SQLite, where the data directory is
        held (`folder.py`). Commands and whoever only stores telemetry need no claim.

        Raises:
            Conflict: another hub holds it.
        """
        if self.is_sqlite:
            return
        with _translated():
            if self._claim is not None:
                try:
                    self._claim.execute(sa.text("SELECT 1"))
                    return
                except sa.exc.DBAPIError:
                    self._claim.close()
                    self._claim = None
            connection = self._writer.connect().execution_options(isolation_level="AUTOCOMMIT")
            try:
                connection.execute(sa.text("SELECT pg_advisory_lock(:what, 0)"), {"what": int(Lock.HUB)})
            except sa.exc.OperationalError as error:
                connection.close()
                if getattr(error.orig, "sqlstate", None) != _NOT_AVAILABLE:
                    raise
                raise Conflict(
                    "another hub runs on this database",
                    code="conflict.running",
                    hint="stop it first; when its machine is gone, try again in a minute",
                ) from error
            # Out of the pool: closing it has to end the session, and with it the claim.
            connection.detach()
            self._claim = connection

    def close(self) -> None:
        """Finish what was handed in and close all connections. Safe to call twice."""
        if self._claim is not None:
            self._claim.close()
            self._claim = None
        for threads in (self._write_thread, self._beside_thread, self._read_threads):
            threads.shutdown(wait=True)
        self._writer.dispose()
        self._reader.dispose()


def lock(conn: Connection, what: Lock, keys: Collection[str] = ("",)) -> None:
    """Wait until nobody else holds these locks, and hold them until the transaction ends.

    Without effect on SQLite, where there is one write transaction at a time. Always taken in the same order, so that
    two who take the same ones in one call never wait for each other.
    """
    if conn.dialect.name == "sqlite":
        return
    numbers = sorted({zlib.crc32(key.encode()) - 2**31 for key in keys})
    conn.execute(_LOCK, {"what": int(what), "numbers": numbers})


def lift_deadlines(conn: Connection) -> None:
    """Let this transaction's statements take as long as they need; without effect on SQLite, which has no deadline."""
    if conn.dialect.name != "sqlite":
        conn.execute(sa.text("SET LOCAL statement_timeout = 0"))
        conn.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))


def upsert(conn: Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """An insert into the table that can say what to do about a row that is there (`on_conflict_do_update`)."""
    return sqlite.insert(table) if conn.dialect.name == "sqlite" else postgresql.insert(table)


_LOCK: Final = sa.text("SELECT pg_advisory_xact_lock(:what, number) FROM unnest(CAST(:numbers AS int[])) AS number")


def _sqlite_engine(url: str, *, begin: str, read_only: bool) -> Engine:
    engine = sa.create_engine(url, connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_MS / 1000})

    def on_connect(raw: Any, _record: object) -> None:
        # The driver's own idea of when a transaction begins is turned off: ours begins it below.
        raw.isolation_level = None
        cursor = raw.cursor()
        for pragma in (
            f"busy_timeout={BUSY_TIMEOUT_MS}",
            "journal_mode=WAL",
            f"wal_autocheckpoint={CHECKPOINT_PAGES}",
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


def _postgres_engine(url: str) -> Engine:
    try:
        drivername = sa.make_url(url).drivername
    except sa.exc.ArgumentError:
        drivername = ""
    if drivername != _POSTGRES:
        raise ConfigError("the database's URL is neither sqlite:/// nor postgresql+psycopg://", code="config.database")
    try:
        return sa.create_engine(
            url,
            isolation_level="READ COMMITTED",
            # A connection that the server or a firewall has dropped is found before work begins on it.
            pool_pre_ping=True,
            pool_size=_READERS + 2,
            pool_timeout=BUSY_TIMEOUT_MS / 1000,
            connect_args=_postgres_arguments(),
        )
    except ModuleNotFoundError as error:
        raise ConfigError(
            "PostgreSQL needs the package psycopg",
            code="config.database",
            hint="install it: pip install 'outrider[postgres]'",
        ) from error


def _postgres_arguments() -> dict[str, str | int]:
    """What libpq is told; the server watches its side of the connection as we watch ours."""
    every_s, tries = VANISHED_MS // 4000, 3
    settings = {
        "lock_timeout": BUSY_TIMEOUT_MS,
        "statement_timeout": STATEMENT_MS,
        "idle_in_transaction_session_timeout": IDLE_MS,
        "synchronous_commit": "on",
        "tcp_keepalives_idle": every_s,
        "tcp_keepalives_interval": every_s,
        "tcp_keepalives_count": tries,
        "tcp_user_timeout": VANISHED_MS,
    }
    return {
        "connect_timeout": _CONNECT_S,
        "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        # https://www.postgresql.org/docs/current/libpq-connect.html
        "keepalives": 1,
        "keepalives_idle": every_s,
        "keepalives_interval": every_s,
        "keepalives_count": tries,
        "tcp_user_timeout": VANISHED_MS,
    }


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except sa.exc.IntegrityError as error:
        raise Conflict(f"the database refused: {error.orig}", code="conflict.constraint") from error
    except sa.exc.DBAPIError as error:
        raise _storage_error(error.orig) from error
    except sa.exc.TimeoutError as error:
        raise _busy(str(error)) from error
    except sqlite3.Error as error:
        raise _storage_error(error) from error


def _storage_error(cause: BaseException | None) -> StorageError:
    text = str(cause)
    name: str = getattr(cause, "sqlite_errorname", "")
    # https://www.postgresql.org/docs/current/errcodes-appendix.html
    state: str | None = getattr(cause, "sqlstate", "")
    if name.startswith("SQLITE_FULL") or state == "53100":
        return StorageFull(f"no room for the database: {text}", hint="free disk space on the hub's data directory")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or state in (_NOT_AVAILABLE, *_IN_THE_WAY):
        return _busy(text)
    if "no such table" in text or "no such column" in text or state in ("42P01", "42703"):
        return StorageError(
            f"the database is not of this version: {text}", code="storage.schema", hint="run `outrider-hub migrate`"
        )
    if not name and (state is None or state.startswith(("08", "57P", "53300", *_DEADLINES))):
        # psycopg has no state for a server that does not answer.
        gone = StorageError(
            f"the database does not answer: {text}",
            code="storage.unreachable",
            hint="check database.url and the server",
        )
        gone.retry = True
        return gone
    return StorageError(f"the database failed: {text}", hint="run `outrider-hub doctor`")


def _busy(text: str) -> StorageError:
    busy = StorageError(
        f"the database is locked: {text}", code="storage.busy", hint="another command is writing; try again"
    )
    busy.retry = True
    return busy
