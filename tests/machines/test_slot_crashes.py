"""The power goes at every boundary of every story, up to three times, and every device ends as it should."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest

from edge_agent.core.slot_values import MAX_LOADS, Phase, Slot
from tests.machines.slot_parts import key, offer
from tests.machines.slot_world import Nature, Story, World

ONE = (offer("1.0.0", at=1),)
TWO = (offer("1.0.0", at=1), offer("2.0.0", at=2))
SECOND = key("2.0.0")

# A story, the version that must serve in the end, and what must be quarantined then.
STORIES: dict[str, tuple[Story, str | None, frozenset[str]]] = {
    "a first release that is good": (Story(ONE), "1.0.0", frozenset()),
    "a first release that fails the golden check": (
        Story(ONE, natures={key("1.0.0"): Nature(golden=False)}),
        None,
        frozenset({key("1.0.0")}),
    ),
    "an update that is good": (Story(TWO), "2.0.0", frozenset()),
    "an update that fails the golden check": (
        Story(TWO, natures={SECOND: Nature(golden=False)}),
        "1.0.0",
        frozenset({SECOND}),
    ),
    "an update that crashes in probation": (
        Story(TWO, natures={SECOND: Nature(crashes=True)}),
        "1.0.0",
        frozenset({SECOND}),
    ),
    "an update that answers wrongly": (Story(TWO, natures={SECOND: Nature(wrong=True)}), "1.0.0", frozenset({SECOND})),
    "an update whose files the disk changes each time": (
        Story(TWO, natures={SECOND: Nature(damaged=True)}),
        "1.0.0",
        frozenset(),
    ),
    "an update that is fetched at the fifth try": (Story(TWO, fetch_failures=4), "2.0.0", frozenset()),
    "an update that the hub does not have": (Story(TWO, refuse_fetch=frozenset({SECOND})), "1.0.0", frozenset()),
    "an update that is superseded while it is on probation": (
        Story((*TWO, offer("3.0.0", at=3)), interrupt_in=Phase.PROBATION),
        "3.0.0",
        frozenset(),
    ),
    "a bad update that is superseded during its rollback": (
        Story((*TWO, offer("3.0.0", at=3)), natures={SECOND: Nature(wrong=True)}, interrupt_in=Phase.ROLLING_BACK),
        "3.0.0",
        frozenset({SECOND}),
    ),
    "a bad update that is offered again with force, then a good one": (
        Story((*TWO, offer("2.0.0", at=3, force=True), offer("3.0.0", at=4)), natures={SECOND: Nature(golden=False)}),
        "3.0.0",
        frozenset({SECOND}),
    ),
}


def plans(boundaries: int, *, most: int) -> Iterator[frozenset[int]]:
    """Where the power goes: every single boundary, every pair and triple, thinned out evenly above `most` each."""
    yield frozenset()
    for number in (1, 2, 3):
        every = list(combinations(range(1, boundaries + 1), number))
        yield from (frozenset(cut) for cut in every[:: max(1, len(every) // most)])


@pytest.mark.parametrize("name", STORIES)
def test_every_crash_ends_well(name: str) -> None:
    story, version, quarantine = STORIES[name]
    untouched = World(story, cuts=frozenset())
    check_end(untouched.run(), version=version, quarantine=quarantine)
    lives = 0
    for cuts in plans(untouched.boundary + 12, most=450):
        world = World(story, cuts=cuts)
        end = world.run()
        lives += world.lives
        check_end(end, version=version, quarantine=quarantine)
        check_rest(world)
    assert lives > 1500


def check_end(end: Slot, *, version: str | None, quarantine: frozenset[str]) -> None:
    """The right release serves, nothing is left over, and only what was at fault is quarantined."""
    assert end.phase is (Phase.IDLE if version is None else Phase.COMMITTED)
    assert (end.active.manifest.version if end.active else None) == version
    assert end.candidate is None
    assert set(end.quarantine) == quarantine


def check_rest(world: World) -> None:
    """At rest the committed release's host is up and gets the requests, and no other host is left running."""
    active = world.slot.active
    assert world.route == (active.key if active else None)
    assert world.up == ({active.key} if active else set())


def test_power_cuts_in_every_probation_end_in_a_rollback() -> None:
    """A release that takes the power with it whenever it is loaded is not tried for ever."""
    story = Story(TWO)
    cuts: set[int] = set()
    for _ in range(60):
        world = World(story, cuts=frozenset(cuts))
        end = world.run()
        if end.quarantine:
            break
        cuts.add(boundary_in_probation(story, frozenset(cuts)))
    assert end.active is not None
    assert end.active.manifest.version == "1.0.0"
    assert end.quarantine == (SECOND,)
    assert len(cuts) == MAX_LOADS


def boundary_in_probation(story: Story, cuts: frozenset[int]) -> int:
    """The first boundary after the last cut at which the second release is on probation."""

    class Watched(World):
        seen = 0

        def _cross(self) -> None:
            super()._cross()
            on_trial = self.slot.phase is Phase.PROBATION and self.route == SECOND
            if on_trial and not self.seen and self.boundary > max(cuts, default=0):
                self.seen = self.boundary

    world = Watched(story, cuts=cuts)
    world.run()
    assert world.seen
    return world.seen
