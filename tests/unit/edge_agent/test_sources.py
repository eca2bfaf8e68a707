"""A mirror before the hub: whatever it does, the file comes, and a bad one is not asked each time."""

from __future__ import annotations

import asyncio
import hashlib

import pytest

from edge_agent.adapters.sources import FIRST_REST_MS, LONGEST_REST_MS, SourcedFetcher
from shared.errors import TransferCorrupt, Unreachable
from shared.ids import Digest
from shared.model import FileRef
from tests.fakes.clock import FakeClock
from tests.fakes.fetcher import FakeFetcher
from tests.fakes.shelf import FakeShelf

DATA = b"model" * 50_000
FILE = FileRef(path="models/a/1.0.0/int8.onnx", length=len(DATA), digest=Digest(hashlib.sha256(DATA).hexdigest()))


class Place:
    """A hub that has the file and a mirror that may have something."""

    def __init__(self) -> None:
        self.hub, self.mirror = FakeFetcher(), FakeFetcher()
        self.hub.files[FILE.digest] = DATA
        self.mirror.files[FILE.digest] = DATA
        self.clock = FakeClock()
        self.fetcher = SourcedFetcher(hub=self.hub, mirrors=(self.mirror,), clock=self.clock)

    def fetch(self, *, up_to: int | None = None, shelf: FakeShelf | None = None) -> FakeShelf:
        shelf = shelf or FakeShelf()
        asyncio.run(self.fetcher.blob(FILE, shelf, up_to=up_to))
        return shelf


def test_a_good_mirror_spares_the_hub() -> None:
    place = Place()
    assert place.fetch().files[FILE.digest] == DATA
    assert place.hub.fetched == []


@pytest.mark.parametrize("trouble", ["junk", "too long", "404", "away", "breaks"])
def test_attack_6_whatever_a_mirror_does_the_file_comes_from_the_hub(trouble: str) -> None:
    place = Place()
    match trouble:
        case "junk":
            place.mirror.files[FILE.digest] = b"!" + DATA[1:]
        case "too long":
            place.mirror.files[FILE.digest] = DATA + b"!"
        case "404":
            place.mirror.files.clear()
        case "away":
            place.mirror.away = True
        case "breaks":
            place.mirror.breaks_after = 1000
    assert place.fetch().files[FILE.digest] == DATA
    # What came of it before it broke is kept; junk is not.
    assert place.hub.asked_bytes == len(DATA) - (1000 if trouble == "breaks" else 0)


def test_junk_within_a_budget_is_told_to_whoever_keeps_it_and_the_next_try_goes_to_the_hub() -> None:
    place = Place()
    place.mirror.files[FILE.digest] = b"!" + DATA[1:]
    with pytest.raises(TransferCorrupt):
        place.fetch(up_to=len(DATA))
    assert place.fetch(up_to=len(DATA)).files[FILE.digest] == DATA
    assert (len(place.mirror.fetched), len(place.hub.fetched)) == (1, 1)


def test_attack_6_junk_slices_of_a_mirror_that_never_gives_the_last_keep_no_file_away() -> None:
    place, shelf = Place(), FakeShelf()
    place.mirror.files[FILE.digest] = b"!" + DATA[1:]

    def in_slices() -> None:
        for up_to in (100_000, 200_000, len(DATA)):
            place.mirror.away = up_to == len(DATA)
            place.fetch(up_to=up_to, shelf=shelf)

    with pytest.raises(TransferCorrupt):
        in_slices()
    asked = len(place.mirror.fetched)
    assert asked == 2
    place.clock.advance(LONGEST_REST_MS)
    in_slices()
    assert shelf.files[FILE.digest] == DATA
    assert len(place.mirror.fetched) == asked


def test_a_slice_makes_no_good_mirror_of_one_that_failed() -> None:
    place, shelf = Place(), FakeShelf()
    place.mirror.away = True
    place.fetch()
    place.clock.advance(FIRST_REST_MS)
    place.mirror.away = False
    place.fetch(up_to=1000, shelf=shelf)
    place.mirror.away = True
    place.fetch(up_to=2000, shelf=shelf)
    place.mirror.away = False
    asked = len(place.mirror.fetched)
    place.clock.advance(2 * FIRST_REST_MS - 1)
    place.fetch(up_to=3000, shelf=shelf)
    assert len(place.mirror.fetched) == asked
    place.clock.advance(1)
    place.fetch(up_to=4000, shelf=shelf)
    assert len(place.mirror.fetched) == asked + 1


def test_a_mirror_that_gave_slices_of_a_file_that_came_right_begins_anew() -> None:
    place, shelf = Place(), FakeShelf()
    place.mirror.away = True
    place.fetch()
    place.clock.advance(FIRST_REST_MS)
    place.mirror.away = False
    for up_to in (1000, len(DATA)):
        place.fetch(up_to=up_to, shelf=shelf)
    assert shelf.files[FILE.digest] == DATA
    place.mirror.away = True
    place.fetch()
    place.mirror.away = False
    place.clock.advance(FIRST_REST_MS)
    asked = len(place.mirror.fetched)
    place.fetch()
    assert len(place.mirror.fetched) == asked + 1


def test_a_mirror_that_failed_rests_and_longer_each_time() -> None:
    place = Place()
    place.mirror.files.clear()
    for rest_ms in (FIRST_REST_MS, 2 * FIRST_REST_MS, 4 * FIRST_REST_MS):
        asked = len(place.mirror.fetched)
        place.fetch()
        place.clock.advance(rest_ms - 1)
        place.fetch()
        assert len(place.mirror.fetched) == asked + 1
        place.clock.advance(1)
    place.mirror.files[FILE.digest] = DATA
    place.fetch()
    place.mirror.files.clear()
    place.fetch()
    place.clock.advance(FIRST_REST_MS)
    asked = len(place.mirror.fetched)
    place.fetch()  # having served once, it begins anew
    assert len(place.mirror.fetched) == asked + 1


def test_what_the_hub_says_at_the_end_is_the_answer() -> None:
    place = Place()
    place.mirror.files.clear()
    place.hub.away = True
    with pytest.raises(Unreachable):
        place.fetch()


def test_metadata_and_uploads_are_the_hubs_alone() -> None:
    place = Place()
    place.mirror.away = True
    asyncio.run(place.fetcher.upload("/v1/x", b"data"))
    assert asyncio.run(place.fetcher.metadata("timestamp.json", max_bytes=10)) is None
    assert place.hub.uploads == {"/v1/x": b"data"}
