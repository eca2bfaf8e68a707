"""Which numbers of a class are settled, which will not come, and which wait: arithmetic only.

A class's numbers run from 1. Every one below `next` is settled, or in a gap, or waits. A batch that was settled before
an older one is `early`; gaps are kept until they are settled themselves, because the hub has to be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from shared import ranges
from shared.ranges import Ranges
from shared.telemetry import GapReason

MAX_GAPS: Final = 60
"""Of a class, in the cursor."""


class GapSpan(msgspec.Struct, frozen=True, array_like=True):
    """Numbers that will not come, and why (`shared.telemetry.Gap.reason`)."""

    first: int
    last: int
    reason: GapReason


class Standing(msgspec.Struct, frozen=True, array_like=True):
    """Where a class stands.

    Attributes:
        settled: every number up to it is settled.
        next: the number after the highest that was given out.
        early: numbers above `settled` that are settled too.
        gaps: numbers above `settled` that will not come, and that the hub has not taken yet; ascending.
    """

    settled: int = 0
    next: int = 1
    early: Ranges = ()
    gaps: tuple[GapSpan, ...] = ()

    def waiting(self) -> int:
        """How many records wait: neither settled nor lost."""
        gone = ranges.count(self.early) + sum(gap.last - gap.first + 1 for gap in self.gaps)
        return self.next - 1 - self.settled - gone

    def unsettled_above(self, number: int) -> int:
        """The first number above this one that is not settled; it may lie in a gap, or not be given out yet."""
        first = max(number, self.settled) + 1
        for low, high in self.early:
            if low <= first <= high:
                first = high + 1
        return first

    def gap_at(self, number: int) -> GapSpan | None:
        """The gap that this number lies in."""
        return next((gap for gap in self.gaps if gap.first <= number <= gap.last), None)

    def known_above(self, number: int) -> int:
        """The next number above this one that is settled or lost already; `next` where there is none."""
        known = [gap.first for gap in self.gaps if gap.first > number]
        known += [low for low, _ in self.early if low > number]
        return min(known, default=self.next)

    def with_settled(self, first: int, last: int) -> Standing | None:
        """The standing once these numbers are settled; None when they all are."""
        if not ranges.missing(self.early, max(first, self.settled + 1), last):
            return None
        early = ranges.union(self.early, [(max(first, self.settled + 1), last)])
        settled = self.settled
        if early[0][0] == settled + 1:
            settled, early = early[0][1], early[1:]
        return Standing(settled, self.next, early, _without(self.gaps, first, last))

    def with_lost(self, first: int, last: int, reason: GapReason) -> tuple[Standing, int]:
        """The standing once what waits of these numbers is a gap, and how many those were."""
        known = ranges.union(self.early, [(gap.first, gap.last) for gap in self.gaps])
        lost = ranges.missing(known, max(first, self.settled + 1), last)
        return replace(self, gaps=_with(self.gaps, lost, reason)), ranges.count(lost)

    def kept(self, *, base: int) -> Standing:
        """The standing as the cursor keeps it, with MAX_GAPS gaps at most.

        Those below `base`, the first number that still lies in a segment, are in no other place. Where they are too
        many, the two nearest become one, over numbers between them that were settled: the hub ignores the part of a gap
        that it has. Those above are damage, and are found again.
        """
        kept = [gap for gap in self.gaps if gap.first < base]
        while len(kept) > MAX_GAPS:
            at = min(range(len(kept) - 1), key=lambda i: kept[i + 1].first - kept[i].last)
            kept[at : at + 2] = [GapSpan(kept[at].first, kept[at + 1].last, kept[at].reason)]
        kept.extend(gap for gap in self.gaps if gap.first >= base)
        return replace(self, gaps=tuple(kept[:MAX_GAPS]))


def _with(gaps: Sequence[GapSpan], found: Ranges, reason: GapReason) -> tuple[GapSpan, ...]:
    """The gaps and these numbers, which are in none of them; neighbours with one reason become one."""
    joined: list[GapSpan] = []
    for gap in sorted((*gaps, *(GapSpan(first, last, reason) for first, last in found)), key=lambda gap: gap.first):
        if joined and joined[-1].last + 1 == gap.first and joined[-1].reason == gap.reason:
            joined[-1] = GapSpan(joined[-1].first, gap.last, gap.reason)
        else:
            joined.append(gap)
    return tuple(joined)


def _without(gaps: Sequence[GapSpan], first: int, last: int) -> tuple[GapSpan, ...]:
    """The gaps without the numbers from first to last."""
    return tuple(
        GapSpan(low, high, gap.reason)
        for gap in gaps
        for low, high in ranges.missing(((first, last),), gap.first, gap.last)
    )
