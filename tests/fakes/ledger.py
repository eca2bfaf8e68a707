"""The ledger in memory."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from edge_agent.adapters.ledger import merged_floors
from edge_agent.core.spending import Spending
from shared.release import Floors, VerifiedAssignment


class FakeLedger:
    """`edge_agent.ports.Ledger` without a disk; passing it to a new owner is a restart."""

    def __init__(self) -> None:
        self.boot = 0
        self.slots: dict[str, bytes] = {}
        self.floors = Floors()
        self.verified: VerifiedAssignment | None = None
        self.spending = Spending()

    async def next_boot(self) -> int:
        """Count this start."""
        self.boot += 1
        return self.boot

    async def load_slots(self) -> dict[str, bytes]:
        """Slot states by family."""
        return dict(self.slots)

    async def save_slots(self, states: Mapping[str, bytes]) -> None:
        """Replace the states of these slots."""
        self.slots |= states

    async def load_floors(self) -> Floors:
        """The floors."""
        return self.floors

    async def raise_floors(self, floors: Floors) -> Floors:
        """Raise each floor, forgetting roles that are not given."""
        self.floors = merged_floors(self.floors, floors)
        return self.floors

    async def remember_time(self, time_ms: int) -> None:
        """Replace what was attested."""
        self.floors = replace(self.floors, attested_ms=time_ms)

    async def load_verified(self) -> VerifiedAssignment | None:
        """The newest accepted assignment."""
        return self.verified

    async def save_verified(self, verified: VerifiedAssignment) -> None:
        """Save it and raise the floors."""
        self.verified = verified
        await self.raise_floors(verified.floors)

    async def load_spending(self) -> Spending:
        """What was fetched."""
        return self.spending

    async def save_spending(self, spending: Spending) -> None:
        """Replace it."""
        self.spending = spending
