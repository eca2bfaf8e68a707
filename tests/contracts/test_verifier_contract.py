"""What every verifier does with an assignment: the fake of the agent's tests, and the real one with its child."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

import pytest

from edge_agent.adapters.verifier import LiveVerifier
from edge_agent.update_ports import Verifier
from shared import limits
from shared.errors import OutriderError, TrustError, Unreachable
from shared.release import Floors, VerifiedAssignment
from tests.fakes.agent_world import AgentWorld, release
from tests.fakes.hub_fetcher import HubFetcher
from tests.fakes.trust_repository import DEVICE, NOW_MS, TrustRepository, make_manifest


class Place(Protocol):
    """A verifier, and who signs for it."""

    verifier: Verifier

    def assign(self) -> bytes:
        """The next assignment's document; the first has version 1."""
        ...

    def lose_hub(self) -> None:
        """From now on nothing can be fetched."""
        ...


class FakePlace:
    """The world of the agent's tests."""

    def __init__(self) -> None:
        self._world = AgentWorld()
        self._release = release(self._world, "1.0.0")
        self.verifier: Verifier = self._world.verifier

    def assign(self) -> bytes:
        return self._world.publish(self._release)

    def lose_hub(self) -> None:
        self._world.verifier.error = Unreachable("the hub is away")


class LivePlace:
    """Real signatures, a real child, a hub in memory."""

    def __init__(self, folder: Path) -> None:
        self._hub = TrustRepository()
        self._hub.release(make_manifest())
        folder.mkdir()
        (folder / "root.json").write_bytes(self._hub.first_root)
        self._fetcher = HubFetcher(self._hub)
        self.verifier: Verifier = LiveVerifier(
            trust_dir=folder, device=DEVICE, profile="generic", fetcher=self._fetcher
        )

    def assign(self) -> bytes:
        return self._hub.assign(("digits", "1.0.0"))

    def lose_hub(self) -> None:
        self._fetcher.error = Unreachable("the hub is away")


@pytest.fixture(params=["fake", "live"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return FakePlace() if request.param == "fake" else LivePlace(tmp_path / "trust")


def verify(place: Place, document: bytes, floors: Floors | None = None) -> VerifiedAssignment:
    return asyncio.run(place.verifier.verify(document, floors=floors or Floors(), wall_ms=NOW_MS))


def test_a_good_assignment_is_accepted_with_its_releases_and_floors(place: Place) -> None:
    document = place.assign()
    verified = verify(place, document)
    assert [model.manifest.version for model in verified.models] == ["1.0.0"]
    assert [model.manifest.family for model in verified.models] == [m.family for m in verified.assignment.models]
    assert verified.floors.assignment_version == verified.assignment.version == 1
    assert verify(place, document, verified.floors).assignment == verified.assignment


def test_a_newer_one_raises_the_floor_and_then_the_older_is_an_attack(place: Place) -> None:
    older, newer = place.assign(), place.assign()
    verified = verify(place, newer)
    assert verified.floors.assignment_version == 2
    with pytest.raises(TrustError) as caught:
        verify(place, older, verified.floors)
    assert caught.value.code == "trust.rollback"


@pytest.mark.parametrize("harm", ["nothing", "junk", "altered"])
def test_what_nobody_signed_is_an_attack_and_not_a_reason_to_try_again(place: Place, harm: str) -> None:
    document = place.assign()
    harmed = {"nothing": b"", "junk": b"\xff" * 100, "altered": document[:-4] + b"!" + document[-3:]}[harm]
    with pytest.raises(TrustError) as caught:
        verify(place, harmed)
    assert caught.value.code.startswith("trust.")
    assert not caught.value.retry


def test_a_document_without_end_is_refused(place: Place) -> None:
    with pytest.raises(TrustError):
        verify(place, b" " * (limits.MAX_ASSIGNMENT_BYTES + 1))


def test_a_hub_that_is_away_is_no_word_on_the_assignment(place: Place) -> None:
    document = place.assign()
    place.lose_hub()
    with pytest.raises(OutriderError) as caught:
        verify(place, document)
    assert not isinstance(caught.value, TrustError)
    assert caught.value.retry
