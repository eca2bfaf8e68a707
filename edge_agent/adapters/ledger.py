"""The agent's small durable state, as `edge_agent.ports.Ledger`, in the agent's SQLite file.

Values are stored as MessagePack of the structs in `shared/release.py`; slot states are opaque bytes.
Not here: what the states mean, and the thread and transaction behind every call (`database.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from msgspec.structs import replace

from edge_agent.adapters.database import FLOORS_KEY, LOST, Connection, Database, begin_floors_anew
from edge_agent.core.spending import Spending
from shared.errors import StorageError
from shared.release import Floors, VerifiedAssignment

_VERIFIED: Final = "verified"
_BOOT: Final = "boot"
_SPENDING: Final = "spending"

logger = logging.getLogger(__name__)

_S = TypeVar("_S", Floors, VerifiedAssignment, Spending, int)


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
        """The floors; zeros on the first start. Raises StorageError `storage.floors_lost` when there were some once."""
        return await self._database.write(_floors)

    async def settle_floors(self, *, accepted_before: bool) -> None:
        """See to it that there are floors, before anything else is written: to be called at each start.

        A ledger without any is new. Where this device has accepted something before (`accepted_before`), it had
        another ledger, and the floors are marked as lost; otherwise they are zeros, and there are some from now on.
        """
        floors = LOST if accepted_before else msgspec.msgpack.encode(Floors())
        await self._database.write(
            lambda connection: connection.execute(
                "INSERT OR IGNORE INTO meta (key, value) VALUES (?, ?)", (FLOORS_KEY, floors)
            )
        )

    async def raise_floors(self, floors: Floors) -> Floors:
        """Raise each floor to the higher of saved and given, in one transaction; roles not given are dropped."""
        return await self._database.write(lambda connection: _raise(connection, floors))

    async def remember_time(self, time_ms: int) -> None:
        """Save what the hub attested, in place of what it attested before."""

        def work(connection: Connection) -> None:
            _set(connection, FLOORS_KEY, replace(_floors(connection), attested_ms=time_ms))

        await self._database.write(work)

    async def load_verified(self) -> VerifiedAssignment | None:
        """The newest assignment that was accepted; None too for one that cannot be read: the hub sends it again."""

        def work(connection: Connection) -> VerifiedAssignment | None:
            try:
                return _get(connection, _VERIFIED, VerifiedAssignment)
            except StorageError as error:
                logger.error("the accepted assignment is damaged", extra={"why": error.message})
                return None

        return await self._database.write(work)

    async def save_verified(self, verified: VerifiedAssignment) -> None:
        """Save the accepted assignment and raise the floors to its floors, in one transaction."""

        def work(connection: Connection) -> None:
            _set(connection, _VERIFIED, verified)
            _raise(connection, verified.floors)

        await self._database.write(work)

    async def load_spending(self) -> Spending:
        """What was fetched, as saved; an empty record on the first start. Damaged: `storage.unreadable`."""
        return await self._database.write(lambda connection: _get(connection, _SPENDING, Spending) or Spending())

    async def save_spending(self, spending: Spending) -> None:
        """Save it, replacing the one before."""
        await self._database.write(lambda connection: _set(connection, _SPENDING, spending))


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
        attested_ms=saved.attested_ms,
    )


def _raise(connection: Connection, floors: Floors) -> Floors:
    merged = merged_floors(_floors(connection), floors)
    _set(connection, FLOORS_KEY, merged)
    return merged


def _floors(connection: Connection) -> Floors:
    try:
        return _get(connection, FLOORS_KEY, Floors) or Floors()
    except StorageError as error:
        raise StorageError(
            "the trust floors of this device are lost: what it accepted before is not known any more",
            code="storage.floors_lost",
            hint="what is installed runs on; to install again, enrol the device anew: outrider-agent enroll --force",
        ) from error


def forget_lost_floors(path: Path) -> None:
    """Let lost floors begin at zero, because a person enrols the device anew; floors that can be read stay.

    Raises:
        StorageError: the file cannot be read or written.
    """
    begin_floors_anew(path, msgspec.msgpack.encode(Floors()), when=_is_lost)


def _is_lost(data: bytes) -> bool:
    try:
        msgspec.msgpack.decode(data, type=Floors)
    except (msgspec.MsgspecError, RecursionError):
        return True
    return False


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


def _set(connection: Connection, key: str, value: Floors | VerifiedAssignment | Spending | int) -> None:
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, msgspec.msgpack.encode(value)))
