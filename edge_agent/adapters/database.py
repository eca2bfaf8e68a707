"""The agent's SQLite file and the one thread that owns it; the only module that imports sqlite3.

Rules of this file:
1. One connection, used by one thread. Work is a function of the connection; it runs in a savepoint of its own.
2. Group commit: all work that waits when the thread comes round shares one transaction and one sync. `write`
   returns only after that commit, so what it returned is on disk (WAL, synchronous=FULL).
3. A file that SQLite finds damaged is moved aside with its name and reason told, never deleted; the next start
   begins with an empty file, into which the floors were carried over when they could still be read. When they could
   not, they are marked as lost: they are never zero because a disk failed.
4. What takes its place is written whole, floors included, under a name of its own before the damaged file is touched.
   From that moment on it is what counts: a start that finds it puts it in place, wherever a power cut came.

Not here: what the tables mean (`ledger.py`, `samples.py`; `records`, `batches` and `heads`: `old_records.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from edge_agent.keeping import sync, translated
from shared.clock import Clock
from shared.errors import StorageError, StorageFull

Connection = sqlite3.Connection
T = TypeVar("T")

DATABASE_NAME: Final = "agent.db"
REPLACEMENT: Final = ".fresh"
"""Suffix of the file that takes a damaged one's place."""
MAX_GROUP: Final = 256
"""Work per transaction: enough that the sync costs next to nothing each, few enough that nobody waits long."""

FLOORS_KEY: Final = "floors"
LOST: Final = b""
"""What stands for floors that there were and that nobody can read any more; no encoding is empty."""

_MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID",
        "CREATE TABLE slots (family TEXT PRIMARY KEY, state BLOB NOT NULL) WITHOUT ROWID",
        "CREATE TABLE records (klass INTEGER NOT NULL, seq INTEGER NOT NULL, at_ms INTEGER NOT NULL,"
        " body BLOB NOT NULL, PRIMARY KEY (klass, seq)) WITHOUT ROWID",
        "CREATE TABLE batches (klass INTEGER PRIMARY KEY, first INTEGER NOT NULL, last INTEGER NOT NULL,"
        " digest TEXT NOT NULL, columns BLOB NOT NULL)",
        "CREATE TABLE heads (klass INTEGER PRIMARY KEY, next_seq INTEGER NOT NULL, records INTEGER NOT NULL,"
        " bytes INTEGER NOT NULL)",
        "INSERT INTO heads VALUES (0, 1, 0, 0), (1, 1, 0, 0), (2, 1, 0, 0)",
    ),
    (
        # Numbers are never used twice: whoever was fed up to one asks for what came after it.
        "CREATE TABLE samples (number INTEGER PRIMARY KEY AUTOINCREMENT, family TEXT NOT NULL,"
        " at_ms INTEGER NOT NULL, bytes INTEGER NOT NULL, body BLOB NOT NULL)",
        "CREATE INDEX samples_by_family ON samples (family, number, bytes)",
        "CREATE TABLE round_replies (run TEXT NOT NULL, message TEXT NOT NULL, at_ms INTEGER NOT NULL,"
        " content BLOB NOT NULL, PRIMARY KEY (run, message))",
    ),
)
"""Statements that lead from schema version n to n + 1; released ones are never edited."""


@dataclass(slots=True)
class _Job:
    work: Callable[[Connection], Any]
    after: Callable[[Any], None] | None
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = field(default=None)


class Database:
    """A SQLite file behind one writer thread. Made by `open`; `close` ends the thread after what was handed in."""

    def __init__(self, path: Path, connection: Connection) -> None:
        self.path = path
        self._connection = connection
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        # A daemon thread: an interpreter that ends without `close` (a crash elsewhere) must not hang on it.
        self._thread = threading.Thread(target=self._run, name="database", daemon=True)
        self._thread.start()

    @classmethod
    async def open(cls, path: Path, *, clock: Clock) -> Database:
        """Open or create the file, check it and bring it to this schema.

        Raises:
            StorageError: `storage.corrupt` after a damaged file was moved aside; `storage.schema` for a file of a
                newer agent; `storage` otherwise.
        """
        connection = await asyncio.to_thread(_open_checked, path, clock)
        return cls(path, connection)

    async def write(self, work: Callable[[Connection], T], *, after: Callable[[T], None] | None = None) -> T:
        """Run the work in the writer thread and return its result once the transaction is on disk.

        Args:
            work: reads and writes; must not keep the connection. What it raises undoes its own changes only.
            after: called in the writer thread after the commit and before this returns, even when the caller
                has been cancelled meanwhile: the place to keep memory in step with the disk.

        Raises:
            StorageError, StorageFull: the disk refused; nothing of the work is stored.
        """
        if self._closed:
            raise StorageError("the database is closed", code="storage.closed")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(work=work, after=after, loop=loop, done=done))
        return await done

    async def close(self) -> None:
        """Finish what was handed in, end the thread and close the file. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        stop = False
        while not stop:
            job = self._jobs.get()
            if job is None:
                break
            group = [job]
            with contextlib.suppress(queue.Empty):
                while len(group) < MAX_GROUP:
                    following = self._jobs.get_nowait()
                    if following is None:
                        stop = True
                        break
                    group.append(following)
            self._commit(group)
            _answer(group)
        self._connection.close()

    def _commit(self, group: list[_Job]) -> None:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in group:
                _run_job(connection, job)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            for job in group:
                job.error = _translated(error, self.path)
            return
        for job in group:
            if job.error is None and job.after is not None:
                job.after(job.result)


def _run_job(connection: Connection, job: _Job) -> None:
    connection.execute("SAVEPOINT job")
    try:
        job.result = job.work(connection)
    except sqlite3.Error:
        raise
    except Exception as error:  # whatever the work raises belongs to the one who handed it in, not to the others
        job.error = error
        connection.execute("ROLLBACK TO job")
    connection.execute("RELEASE job")


def _answer(group: list[_Job]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in group:
        by_loop.setdefault(job.loop, []).append(job)
    for loop, jobs in by_loop.items():
        # The loop may have been closed while its last work was under way; nobody is left to be told then.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_resolve, jobs)


def _resolve(jobs: list[_Job]) -> None:
    for job in jobs:
        if job.done.cancelled():
            continue
        if job.error is not None:
            job.done.set_exception(job.error)
        else:
            job.done.set_result(job.result)


def _translated(error: sqlite3.Error, path: Path) -> StorageError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL"):
        return StorageFull(f"no room left for {path}", hint="free disk space; what waited is kept")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StorageError(
            f"{path} is damaged: {error}",
            code="storage.corrupt",
            hint="restart the agent: it moves the damaged file aside and starts with an empty one",
        )
    return StorageError(f"{path}: {error}", hint="check the disk and the rights of the state directory")


def _open_checked(path: Path, clock: Clock) -> Connection:
    if _beside(path, REPLACEMENT).exists():
        _put_in_place(path, clock)
    try:
        connection = _connect(path)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise _quarantine(path, reason=str(error), clock=clock) from error
        raise _translated(error, path) from error
    try:
        verdict = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict is None or verdict[0] != "ok":
            raise sqlite3.DatabaseError(verdict[0] if verdict else "no answer to the integrity check")
        _migrate(connection, path)
    except sqlite3.DatabaseError as error:
        connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise _translated(error, path) from error
        raise _quarantine(path, reason=str(error), clock=clock) from error
    except StorageError:
        connection.close()
        raise
    return connection


def _connect(path: Path) -> Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise StorageError(f"{path}: this file system cannot hold a write-ahead log", code="storage.wal")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA journal_size_limit=4194304")
        # Little is asked for twice: a large cache would hold what nobody asks for again.
        connection.execute("PRAGMA cache_size=-256")
        path.chmod(0o600)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: Connection, path: Path) -> None:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(_MIGRATIONS):
        raise StorageError(
            f"{path} has schema {version}, this agent knows {len(_MIGRATIONS)}",
            code="storage.schema",
            hint="update the agent, or restore the state directory that belongs to this version",
        )
    for target in range(version, len(_MIGRATIONS)):
        connection.execute("BEGIN IMMEDIATE")
        for statement in _MIGRATIONS[target]:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={target + 1}")
        connection.execute("COMMIT")


def _quarantine(path: Path, *, reason: str, clock: Clock) -> StorageError:
    """Move the damaged file aside, carry the floors over when they can be read, and return what to raise.

    Raises:
        StorageError: the disk refuses that; the damaged file is where it was, and the next start tries again.
    """
    floors = _salvage_floors(path)
    _build_replacement(path, floors)
    aside = _put_in_place(path, clock)
    kept = "could not be read from it, so nothing new is installed" if floors == LOST else "were carried over"
    return StorageError(
        f"{path} is damaged ({reason}) and was moved to {aside}; the trust floors {kept}",
        code="storage.corrupt",
        hint="start the agent again: it fetches its models anew, and its queue is not touched; keep the moved file",
    )


def _build_replacement(path: Path, floors: bytes | None) -> None:
    """Write a file with this schema and these floors beside the damaged one; it has its name once it is whole."""
    draft = _beside(path, ".new")
    for suffix in ("", "-journal"):
        with translated(draft):
            _beside(draft, suffix).unlink(missing_ok=True)
    try:
        # With a rollback journal, which is gone after the commit: the file alone is all there is of it.
        connection = sqlite3.connect(draft, isolation_level=None)
        try:
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("BEGIN IMMEDIATE")
            for statement in (statement for migration in _MIGRATIONS for statement in migration):
                connection.execute(statement)
            if floors is not None:
                connection.execute("INSERT INTO meta (key, value) VALUES (?, ?)", (FLOORS_KEY, floors))
            connection.execute(f"PRAGMA user_version={len(_MIGRATIONS)}")
            connection.execute("COMMIT")
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise _translated(error, draft) from error
    with translated(draft):
        draft.chmod(0o600)
        draft.rename(_beside(path, REPLACEMENT))
    sync(path.parent)


def _put_in_place(path: Path, clock: Clock) -> Path:
    """Move the damaged file aside, as far as it is still there, and the replacement to its name; returns where to."""
    aside = _beside(path, f".corrupt-{clock.wall_ms()}")
    with translated(path):
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                _beside(path, suffix).rename(_beside(aside, suffix))
        # Its log must be gone for good before another file has the name that the log belongs to.
        sync(path.parent)
        _beside(path, REPLACEMENT).rename(path)
    sync(path.parent)
    return aside


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _salvage_floors(path: Path) -> bytes | None:
    """The floors as stored, None where there never were any, LOST where that cannot be told."""
    with contextlib.suppress(sqlite3.Error):
        # As a URI, because a path may hold characters that mean something in one (`?`, `#`, `%`).
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (FLOORS_KEY,)).fetchone()
            return bytes(row[0]) if row is not None else None
        finally:
            connection.close()
    return LOST


def begin_floors_anew(path: Path, floors: bytes, *, when: Callable[[bytes], bool]) -> None:
    """Put these floors in this file, if it has none or what is stored is so; nobody else has the file open.

    Raises:
        StorageError: the file cannot be read or written.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            row = connection.execute("SELECT value FROM meta WHERE key = ?", (FLOORS_KEY,)).fetchone()
            if row is None or when(bytes(row[0])):
                connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (FLOORS_KEY, floors))
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise _translated(error, path) from error
