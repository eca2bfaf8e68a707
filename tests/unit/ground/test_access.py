"""How sessions are ended: each name has its turn, whatever becomes of the others."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cloud_hub.ground import access as access_module
from cloud_hub.ground.access import BrokerAccess, PushedOut
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.courier import LinkSettings
from cloud_hub.ground.revocation import AccessLists
from shared.ids import DeviceId
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import NOW_MS, make_authority

REFUSED, TAKEN = 0x87, 0
A, B, C = DeviceId("a"), DeviceId("b"), DeviceId("c")


class Door(BrokerAccess):
    """Visits are the test's: what each name is answered, and the order in which they came."""

    def __init__(self, folder: Path, answers: dict[DeviceId, int | None]) -> None:
        authorities, clock = Authorities(make_authority()), FakeClock(wall_ms=NOW_MS)
        super().__init__(
            AccessLists(folder, authorities=authorities, hub_name="hub", clock=clock),
            authorities=authorities,
            link=LinkSettings(host="", port=1, name="hub", ca=folder, certificate=folder, key=folder),
            reload=lambda: None,
            clock=clock,
        )
        self.answers = answers
        self.most = 100
        self.visits: list[DeviceId] = []

    async def _visit(self, device: DeviceId, mark: str) -> int | None:
        assert mark
        if len(self.visits) >= self.most:
            await asyncio.Event().wait()  # cut off by the deadline
        self.visits.append(device)
        return self.answers[device]

    def push(self, *devices: DeviceId) -> PushedOut:
        return asyncio.run(self.enforce(revoked=(), denied=(), kick=devices))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "ENFORCE_S", 0.1)
    monkeypatch.setattr(access_module, "AGAIN_S", 0.001)


def test_one_that_stays_in_does_not_keep_the_others_in(tmp_path: Path) -> None:
    door = Door(tmp_path, {A: TAKEN, B: REFUSED, C: None})
    assert door.push(A, B, C) == PushedOut(ended=frozenset({A, B}), out=frozenset({B}))
    assert door.visits[:3] == [A, B, C]
    assert door.visits.count(B) == 1
    assert door.visits.count(A) > 1


def test_who_had_no_turn_in_time_comes_first_the_next_time(tmp_path: Path) -> None:
    """Many names at a broker that is slow: the time is over before all of them were visited."""
    door = Door(tmp_path, dict.fromkeys((A, B, C), TAKEN))
    door.most = 2
    assert door.push(A, B, C).ended == {A, B}
    door.most = 4
    assert door.push(A, B, C).ended == {C, A}
    assert door.visits == [A, B, C, A]
