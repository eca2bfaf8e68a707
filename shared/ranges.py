"""Sets of record numbers as ranges, so that a stream without holes is one range however long it grows.

A range is a pair (first, last), both inclusive. Ranges are ascending and neither touch nor overlap; every function here
takes and gives them so.
"""

from __future__ import annotations

from collections.abc import Iterable

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def union(ranges: Ranges, more: Iterable[Range]) -> Ranges:
    """All numbers of both; `more` may be in any order and overlap."""
    found: list[Range] = []
    for first, last in sorted((*ranges, *more)):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


def without(ranges: Ranges, first: int, last: int) -> Ranges:
    """All numbers but those from first to last."""
    found: list[Range] = []
    for low, high in ranges:
        if high < first or low > last:
            found.append((low, high))
            continue
        if low < first:
            found.append((low, first - 1))
        if high > last:
            found.append((last + 1, high))
    return tuple(found)


def within(ranges: Ranges, first: int, last: int) -> Ranges:
    """The numbers from first to last that are in."""
    return tuple((max(low, first), min(high, last)) for low, high in ranges if low <= last and first <= high)


def missing(ranges: Ranges, first: int, last: int) -> Ranges:
    """The numbers from first to last that are not in."""
    found: list[Range] = []
    expected = first
    for low, high in within(ranges, first, last):
        if low > expected:
            found.append((expected, low - 1))
        expected = high + 1
    if expected <= last:
        found.append((expected, last))
    return tuple(found)


def count(ranges: Ranges) -> int:
    """How many numbers are in."""
    return sum(last - first + 1 for first, last in ranges)
