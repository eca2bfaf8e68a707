"""The power goes at every boundary of every story of one to three models, and no device ever runs a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest

from edge_agent.core.slot_values import MAX_LOADS, Phase
from shared.limits import MIB
from shared.profile import MemoryBudget
from tests.machines.set_world import HOST_MIB, Assigned, Nature, SetWorld, Story

ALONE_1, ALONE_2 = {"a": "1.0.0"}, {"a": "2.0.0"}
PAIR_1, PAIR_2 = {"a": "1.0.0", "b": "1.0.0"}, {"a": "2.0.0", "b": "2.0.0"}
THREE_1 = {"a": "1.0.0", "b": "1.0.0", "c": "1.0.0"}
THREE_2 = {"a": "2.0.0", "b": "2.0.0", "c": "2.0.0"}
PAIR, THREE = (("a", "b"),), (("a", "b", "c"),)
SECOND = ("b", "2.0.0")

Ends = list[dict[str, str]]


def pair(nature: Nature, **more: object) -> Story:
    """Two releases that change to two others together, of which the second is like this."""
    assigned = (Assigned(PAIR_1, PAIR), Assigned(PAIR_2, PAIR))
    return Story(assigned, natures={SECOND: nature}, **more)  # type: ignore[arg-type]


def three(nature: Nature) -> Story:
    """Three releases that change together, of which the second is like this."""
    return Story((Assigned(THREE_1, THREE), Assigned(THREE_2, THREE)), natures={SECOND: nature})


# A story, what may serve in the end, and what must be quarantined then (None: either).
STORIES: dict[str, tuple[Story, Ends, set[tuple[str, str]] | None]] = {
    "one that is good": (Story((Assigned(ALONE_1), Assigned(ALONE_2))), [ALONE_2], set()),
    "one that fails the golden check": (
        Story((Assigned(ALONE_1), Assigned(ALONE_2)), natures={("a", "2.0.0"): Nature(golden=False)}),
        [ALONE_1],
        {("a", "2.0.0")},
    ),
    "two that are good": (pair(Nature()), [PAIR_2], set()),
    "two that are good, the second first": (pair(Nature(), backwards=True), [PAIR_2], set()),
    "three that are good": (three(Nature()), [THREE_2], set()),
    "two of which one fails the golden check": (pair(Nature(golden=False)), [PAIR_1], {SECOND}),
    "two of which the disk damages one each time": (pair(Nature(damaged=True)), [PAIR_1], set()),
    "two of which the hub does not have one": (pair(Nature(missing=True)), [PAIR_1], set()),
    "two of which one answers wrongly": (pair(Nature(wrong=True)), [PAIR_1], {SECOND}),
    # With cuts on top of its crashes the other's loads may be used up too, and then both are blamed.
    "two of which one crashes on trial": (pair(Nature(crashes=True)), [PAIR_1], None),
    "two of which one is lost once on trial": (pair(Nature(loses_host=1)), [PAIR_1, PAIR_2], None),
    "three of which the second fails the golden check": (three(Nature(golden=False)), [THREE_1], {SECOND}),
    "three of which the second answers wrongly": (three(Nature(wrong=True)), [THREE_1], {SECOND}),
    "two of which one runs already": (
        Story((Assigned(PAIR_1, PAIR), Assigned({"a": "1.0.0", "b": "2.0.0"}, PAIR))),
        [{"a": "1.0.0", "b": "2.0.0"}],
        set(),
    ),
    "two that are superseded on trial": (
        Story(
            (Assigned(PAIR_1, PAIR), Assigned(PAIR_2, PAIR), Assigned({"a": "3.0.0", "b": "2.0.0"}, PAIR)),
            interrupt_in=Phase.PROBATION,
        ),
        [{"a": "3.0.0", "b": "2.0.0"}],
        set(),
    ),
    "two that are superseded while they are ready": (
        Story(
            (Assigned(PAIR_1, PAIR), Assigned(PAIR_2, PAIR), Assigned({"a": "3.0.0", "b": "3.0.0"}, PAIR)),
            interrupt_in=Phase.READY,
        ),
        [{"a": "3.0.0", "b": "3.0.0"}],
        set(),
    ),
    "a bad one of two, assigned again with force, then good ones": (
        Story(
            (
                Assigned(PAIR_1, PAIR),
                Assigned(PAIR_2, PAIR),
                Assigned(PAIR_2, PAIR, force=("b",)),
                Assigned({"a": "3.0.0", "b": "3.0.0"}, PAIR),
            ),
            natures={SECOND: Nature(golden=False)},
        ),
        [{"a": "3.0.0", "b": "3.0.0"}],
        {SECOND},
    ),
    "two for which there is no room": (
        pair(Nature(), memory=MemoryBudget(host_bytes=64 * MIB, total_bytes=(64 + 3 * HOST_MIB) * MIB)),
        [PAIR_1],
        set(),
    ),
}


def plans(boundaries: int, *, most: int) -> Iterator[frozenset[int]]:
    """Where the power goes: at every single boundary, and at pairs and triples, thinned out evenly."""
    yield from (frozenset({cut}) for cut in range(1, boundaries + 1))
    for number in (2, 3):
        step = max(1, int((boundaries**number / {2: 2, 3: 6}[number] / most) ** (1 / number)))
        yield from (frozenset(cut) for cut in combinations(range(number, boundaries + 1, step), number))


@pytest.mark.parametrize("name", STORIES)
def test_attack_34_power_cut_at_every_write_ends_with_all_old_or_all_new(name: str) -> None:
    story, ends, quarantine = STORIES[name]
    untouched = SetWorld(story)
    check_end(untouched, untouched.run(), ends, quarantine)
    assert {"ledger", "shelf", "trust"} <= set(untouched.disk.writes)
    lives = 0
    for cuts in plans(untouched.boundary + 8, most=40):
        world = SetWorld(story, cuts=cuts)
        check_end(world, world.run(), ends, quarantine)
        lives += world.lives
    assert lives > 250


def check_end(world: SetWorld, serving: dict[str, str], ends: Ends, quarantine: set[tuple[str, str]] | None) -> None:
    """One of the right ends serves, it is what is committed, no host is left over, and the right ones are blamed."""
    assert serving in ends, world.describe()
    assert world.committed() == serving, world.describe()
    assert len(world.up) == len(serving)
    assert quarantine is None or world.quarantined() == quarantine
    assert not world.disk.partial, "nothing half-fetched is left"


@pytest.mark.parametrize(
    ("phase", "blamed"),
    [(Phase.WARMUP, {SECOND}), (Phase.PROBATION, {("a", "2.0.0"), SECOND})],
)
def test_a_member_that_takes_the_power_ends_all_of_them(phase: Phase, blamed: set[tuple[str, str]]) -> None:
    world = SetWorld(pair(Nature(takes_power=phase)))
    check_end(world, world.run(), [PAIR_1], blamed)
    assert world.lives == 1 + MAX_LOADS
