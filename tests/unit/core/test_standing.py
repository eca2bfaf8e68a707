"""Which numbers are settled, lost and waiting: against sets of numbers, and what the cursor keeps of too many gaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from edge_agent.core.standing import MAX_GAPS, GapSpan, Standing

HIGHEST = 40
spans = st.tuples(st.integers(1, HIGHEST), st.integers(0, 12)).map(lambda pair: (pair[0], min(HIGHEST, sum(pair))))
acts = st.lists(st.tuples(st.sampled_from(["settle", "lose"]), spans), max_size=25)


def numbers(found: Standing) -> tuple[set[int], set[int]]:
    """Settled and lost."""
    settled = set(range(1, found.settled + 1)) | {n for low, high in found.early for n in range(low, high + 1)}
    return settled, {n for gap in found.gaps for n in range(gap.first, gap.last + 1)}


@given(acts)
def test_it_is_what_sets_of_numbers_say(script: list[tuple[str, tuple[int, int]]]) -> None:
    standing = Standing(next=HIGHEST + 1)
    settled: set[int] = set()
    lost: set[int] = set()
    for act, (first, last) in script:
        span = set(range(first, last + 1))
        if act == "settle":
            after = standing.with_settled(first, last)
            assert (after is None) == (span <= settled)
            settled |= span
            lost -= span
            standing = after or standing
        else:
            standing, count = standing.with_lost(first, last, "evicted")
            assert count == len(span - settled - lost)
            lost |= span - settled
        assert numbers(standing) == (settled, lost)
        assert standing.waiting() == HIGHEST - len(settled) - len(lost)
        assert standing.settled + 1 not in settled
        for number in range(HIGHEST + 1):
            above = standing.unsettled_above(number)
            assert above > number
            assert above not in settled
            gap = standing.gap_at(number)
            assert (gap is not None) == (number in lost)


def test_neighbouring_gaps_of_one_reason_are_one() -> None:
    standing, _ = Standing(next=10).with_lost(1, 3, "evicted")
    standing, _ = standing.with_lost(4, 5, "evicted")
    standing, _ = standing.with_lost(6, 6, "expired")
    assert standing.gaps == (GapSpan(1, 5, "evicted"), GapSpan(6, 6, "expired"))


def many(count: int, *, reason: str, step: int = 2) -> tuple[GapSpan, ...]:
    return tuple(GapSpan(1 + step * n, 1 + step * n, reason) for n in range(count))  # type: ignore[arg-type]


def test_of_too_many_gaps_below_the_segments_neighbours_become_one_and_none_is_forgotten() -> None:
    gaps = many(3 * MAX_GAPS, reason="evicted")
    kept = Standing(next=1000, gaps=gaps).kept(base=900).gaps
    assert len(kept) == MAX_GAPS
    for gap in gaps:
        assert any(one.first <= gap.first and gap.last <= one.last for one in kept)


def test_what_was_dropped_above_the_segments_beginning_is_kept_before_damage() -> None:
    gaps = (*many(MAX_GAPS - 1, reason="evicted"), GapSpan(500, 600, "damaged"), GapSpan(700, 710, "dropped"))
    kept = Standing(next=1000, gaps=gaps).kept(base=400).gaps
    assert GapSpan(700, 710, "dropped") in kept
    assert GapSpan(500, 600, "damaged") not in kept


def test_gaps_are_never_joined_over_records_that_wait() -> None:
    dropped = tuple(GapSpan(500 + 3 * n, 500 + 3 * n, "dropped") for n in range(MAX_GAPS + 5))
    standing = replace(Standing(next=1000), settled=499, gaps=dropped)
    assert all(gap.first == gap.last for gap in standing.kept(base=500).gaps)
