"""The agent's small durable state, as `edge_agent.ports.Ledger`, in the agent's SQLite file.

Values are stored as MessagePack of the structs in `shared/release.py`; slot states are opaque bytes.
Not here: what the states mean, and the thread and transaction behind every call (`database.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec

from edge_agent.adapters.database import Connection, Database
from shared.errors import StorageError
from shared.release import Floors, VerifiedAssignment

_FLOORS: Final = "floors"
_VERIFIED: Final = "verified"
_BOOT: Final = "boot"

_S = TypeVar("_S", Floors, VerifiedAssignment, int)


class SqliteLedger:
    """`Ledger` on a `Database`; every write is on disk when its call returns."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def next_boot(self) -> int:
        """Count this start; the first is 1."""

        def work(connection: Connection) -> int:
            boot = (_get(connection, _BOOT, int) or 0) + 1
            _set(connection, _BOOT, boot)
            return boot

        return await self._database.write(work)

    async def load_slots(self) -> dict[str, bytes]:
        """Slot states by family, as saved."""

        def work(connection: Connection) -> dict[str, bytes]:
            return {family: bytes(state) for family, state in connection.execute("SELECT family, state FROM slots")}

        return await self._database.write(work)

    async def save_slots(self, states: Mapping[str, bytes]) -> None:
        """Save the states of these slots, replacing those before, in one transaction: all of them or none."""
        rows = list(states.items())

        def work(connection: Connection) -> None:
            connection.executemany("INSERT OR REPLACE INTO slots (family, state) VALUES (?, ?)", rows)

        await self._database.write(work)

    async def load_floors(self) -> Floors:
        """The floors; zeros on the first start."""
        return await self._database.write(lambda connection: _get(connection, _FLOORS, Floors) or Floors())

    async def raise_floors(self, floors: Floors) -> Floors:
        """Raise each floor to the higher of saved and given, in one transaction; roles not given are dropped."""
        return await self._database.write(lambda connection: _raise(connection, floors))

    async def load_verified(self) -> VerifiedAssignment | None:
        """The newest assignment that was accepted."""
        return await self._database.write(lambda connection: _get(connection, _VERIFIED, VerifiedAssignment))

    async def save_verified(self, verified: VerifiedAssignment) -> None:
        """Save the accepted assignment and raise the floors to its floors, in one transaction."""

        def work(connection: Connection) -> None:
            _set(connection, _VERIFIED, verified)
            _raise(connection, verified.floors)

        await self._database.write(work)


def merged_floors(saved: Floors, given: Floors) -> Floors:
    """Each floor at the higher of the two; of the roles only those that are given (a dropped role is forgotten)."""
    return Floors(
        assignment_version=max(saved.assignment_version, given.assignment_version),
        roles={role: max(version, saved.roles.get(role, 0)) for role, version in given.roles.items()},
        releases={
            family: max(saved.releases.get(family, 0), given.releases.get(family, 0))
            for family in sorted({*saved.releases, *given.releases})
        },
        time_ms=max(saved.time_ms, given.time_ms),
    )


def _raise(connection: Connection, floors: Floors) -> Floors:
    merged = merged_floors(_get(connection, _FLOORS, Floors) or Floors(), floors)
    _set(connection, _FLOORS, merged)
    return merged


def _get(connection: Connection, key: str, kind: type[_S]) -> _S | None:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    try:
        return msgspec.msgpack.decode(row[0], type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise StorageError(
            f"the saved {key!r} cannot be read: {error}",
            code="storage.unreadable",
            hint="the state directory may belong to a newer agent; update the agent",
        ) from error


def _set(connection: Connection, key: str, value: Floors | VerifiedAssignment | int) -> None:
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, msgspec.msgpack.encode(value)))
