"""Ranges are sets of numbers written short."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from shared import ranges
from shared.ranges import Ranges, ranges_of

NUMBERS = st.sets(st.integers(1, 60))
FIRST, MORE = st.integers(1, 60), st.integers(0, 10)


def numbers(made: Ranges) -> set[int]:
    """The set that the ranges stand for."""
    return {number for first, last in made for number in range(first, last + 1)}


def made_of(found: set[int]) -> Ranges:
    """The set as ranges."""
    return ranges_of(sorted(found))


def is_short(made: Ranges) -> bool:
    """Whether neighbours neither touch nor overlap, and ascend."""
    return all(last + 1 < first for (_, last), (first, _) in pairwise(made))


@given(NUMBERS)
def test_ranges_hold_the_numbers_and_are_as_short_as_can_be(found: set[int]) -> None:
    made = made_of(found)
    assert numbers(made) == found
    assert ranges.count(made) == len(found)
    assert is_short(made)


@given(NUMBERS, NUMBERS)
def test_union_is_the_union_in_any_order(one: set[int], other: set[int]) -> None:
    assert ranges.union(made_of(one), made_of(other)) == made_of(one | other)
    assert ranges.union(made_of(other), made_of(one)) == made_of(one | other)


@given(NUMBERS, FIRST, MORE)
def test_parts_of_a_span_are_in_or_not(found: set[int], first: int, more: int) -> None:
    asked = set(range(first, first + more + 1))
    made = made_of(found)
    assert ranges.meets(made, first, first + more) == bool(asked & found)
    assert ranges.within(made, first, first + more) == made_of(asked & found)
    assert ranges.missing(made, first, first + more) == made_of(asked - found)


@given(NUMBERS)
def test_missing_is_what_lies_below_the_highest_and_is_not_in(found: set[int]) -> None:
    assert numbers(ranges.holes(made_of(found))) == set(range(1, max(found, default=0) + 1)) - found


@given(NUMBERS)
def test_the_watermark_is_the_end_of_what_begins_at_one(found: set[int]) -> None:
    mark = ranges.watermark(made_of(found))
    assert set(range(1, mark + 1)) <= found
    assert mark + 1 not in found
