"""What every ledger does, on the fake and on SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edge_agent.adapters.database import Database
from edge_agent.adapters.ledger import SqliteLedger
from edge_agent.core.spending import Spending, Strike
from edge_agent.ports import Ledger
from shared.ids import DeviceId, Digest, FamilyName, ModelVersion
from shared.model import FileRef
from shared.release import AssignedModel, Assignment, Floors, VerifiedAssignment
from tests.fakes.clock import FakeClock
from tests.fakes.ledger import FakeLedger

Story = Callable[[Ledger], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture(params=["fake", "sqlite"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Runs acts one after the other, each after a restart of the agent."""

    def run(*acts: Story) -> None:
        fake = FakeLedger()

        async def one(act: Story) -> None:
            if request.param == "fake":
                await act(fake)
                return
            database = await Database.open(tmp_path / "agent.db", clock=FakeClock())
            try:
                await act(SqliteLedger(database))
            finally:
                await database.close()

        for act in acts:
            asyncio.run(one(act))

    return run


def verified(version: int, *, floors: Floors) -> VerifiedAssignment:
    file = FileRef(path="models/digits/1.0.0/manifest.json", length=1, digest=Digest("0" * 64))
    model = AssignedModel(family=FamilyName("digits"), version=ModelVersion("1.0.0"), manifest=file)
    assignment = Assignment(device=DeviceId("a"), version=version, issued_ms=1, expires_ms=2, models=(model,))
    return VerifiedAssignment(assignment=assignment, models=(), floors=floors)


def test_boots_are_counted_over_restarts(play: Play) -> None:
    seen: list[int] = []

    async def start(ledger: Ledger) -> None:
        seen.append(await ledger.next_boot())

    play(start, start, start)
    assert seen == [1, 2, 3]


def test_slots_are_kept_and_replaced(play: Play) -> None:
    async def save(ledger: Ledger) -> None:
        assert await ledger.load_slots() == {}
        await ledger.save_slots({"digits": b"one"})
        await ledger.save_slots({"faces": b"\x00\xff", "digits": b"two"})
        await ledger.save_slots({})

    async def look(ledger: Ledger) -> None:
        assert await ledger.load_slots() == {"digits": b"two", "faces": b"\x00\xff"}

    play(save, look)


def test_floors_start_at_zero_and_never_go_down(play: Play) -> None:
    high = Floors(assignment_version=5, roles={"root": 2, "snapshot": 9}, releases={"digits": 4}, time_ms=100)

    async def rise(ledger: Ledger) -> None:
        assert await ledger.load_floors() == Floors()
        assert await ledger.raise_floors(high) == high

    async def try_to_lower(ledger: Ledger) -> None:
        low = Floors(assignment_version=1, roles={"root": 1, "snapshot": 10}, releases={"faces": 1}, time_ms=7)
        merged = Floors(
            assignment_version=5, roles={"root": 2, "snapshot": 10}, releases={"digits": 4, "faces": 1}, time_ms=100
        )
        assert await ledger.raise_floors(low) == merged
        assert await ledger.load_floors() == merged

    play(rise, try_to_lower)


def test_roles_that_are_not_given_are_forgotten(play: Play) -> None:
    async def story(ledger: Ledger) -> None:
        await ledger.raise_floors(Floors(roles={"root": 2, "snapshot": 9, "models/digits": 3}))
        after = await ledger.raise_floors(Floors(roles={"root": 3}))
        assert after.roles == {"root": 3}

    play(story)


def test_a_verified_assignment_is_kept_with_its_floors(play: Play) -> None:
    saved = verified(3, floors=Floors(assignment_version=3, time_ms=50))

    async def save(ledger: Ledger) -> None:
        assert await ledger.load_verified() is None
        await ledger.raise_floors(Floors(time_ms=80))
        await ledger.save_verified(saved)

    async def look(ledger: Ledger) -> None:
        assert await ledger.load_verified() == saved
        assert await ledger.load_floors() == Floors(assignment_version=3, time_ms=80)

    play(save, look)


def test_what_was_attested_last_replaces_what_was_attested_before_and_documents_leave_it_alone(play: Play) -> None:
    async def attest(ledger: Ledger) -> None:
        await ledger.raise_floors(Floors(assignment_version=3, time_ms=50))
        await ledger.remember_time(900)
        await ledger.remember_time(700)

    async def raise_them(ledger: Ledger) -> None:
        assert await ledger.load_floors() == Floors(assignment_version=3, time_ms=50, attested_ms=700)
        await ledger.save_verified(verified(4, floors=Floors(assignment_version=4, time_ms=60, attested_ms=5_000)))
        assert await ledger.load_floors() == Floors(assignment_version=4, time_ms=60, attested_ms=700)

    play(attest, raise_them)


def test_the_first_attestation_is_remembered_before_there_are_floors(play: Play) -> None:
    async def attest(ledger: Ledger) -> None:
        await ledger.remember_time(700)

    async def look(ledger: Ledger) -> None:
        assert await ledger.load_floors() == Floors(attested_ms=700)

    play(attest, look)


def test_what_was_fetched_is_kept_and_replaced(play: Play) -> None:
    spent = Spending(clock_ms=5, boot="b", hours={0: 7}, strikes={"0" * 64: Strike(2, 9)}, total_bytes=7)

    async def save(ledger: Ledger) -> None:
        assert await ledger.load_spending() == Spending()
        await ledger.save_spending(Spending(total_bytes=1))
        await ledger.save_spending(spent)

    async def look(ledger: Ledger) -> None:
        assert await ledger.load_spending() == spent

    play(save, look)
