"""Sets of record numbers as ranges: pairs (first, last), both inclusive, ascending, neither touching nor overlapping.

A stream without losses is one range however long, and the end of the range that begins at 1 is its watermark.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from math import inf

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def ranges_of(numbers: Iterable[int]) -> Ranges:
    """The numbers, which must ascend, as ranges."""
    found: list[Range] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def union(ranges: Ranges, more: Sequence[Range]) -> Ranges:
    """All numbers of both; `more` may be in any order and overlap."""
    if len(more) == 1:
        return _add(ranges, *more[0])
    found: list[Range] = []
    for first, last in sorted((*ranges, *more)):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


def within(ranges: Ranges, first: int, last: int) -> Ranges:
    """The numbers from first to last that are in."""
    begin, end = _near(ranges, first, last)
    return tuple((max(low, first), min(high, last)) for low, high in ranges[begin:end])


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


def meets(ranges: Ranges, first: int, last: int) -> bool:
    """Whether any number from first to last is in."""
    begin, end = _near(ranges, first, last)
    return begin < end


def holes(ranges: Ranges) -> Ranges:
    """The numbers from 1 to the highest that are not in."""
    return missing(ranges, 1, ranges[-1][1]) if ranges else ()


def watermark(ranges: Ranges) -> int:
    """The highest number up to which all are in; 0 when the first is not."""
    return ranges[0][1] if ranges and ranges[0][0] <= 1 else 0


def count(ranges: Ranges) -> int:
    """How many numbers are in."""
    return sum(last - first + 1 for first, last in ranges)


def _add(ranges: Ranges, first: int, last: int) -> Ranges:
    if not ranges or first > ranges[-1][1] + 1:
        return (*ranges, (first, last))
    # Neighbours that only touch are merged too.
    begin, end = _near(ranges, first - 1, last + 1)
    if begin < end:
        first, last = min(first, ranges[begin][0]), max(last, ranges[end - 1][1])
    return (*ranges[:begin], (first, last), *ranges[end:])


def _near(ranges: Ranges, first: int, last: int) -> tuple[int, int]:
    """Which ranges hold a number from first to last: from one index up to before another."""
    end = bisect_right(ranges, (last, inf))
    begin = bisect_left(ranges, (first, -inf), 0, end)
    if begin and ranges[begin - 1][1] >= first:
        begin -= 1
    return begin, end
