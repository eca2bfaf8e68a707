"""The time on a device without a clock: what it rests on, what moves it, and what never does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import trusted_time as tt
from edge_agent.core.trusted_time import BUILT_MS, LONGEST_PAUSE_MS, TrustedTime
from shared.release import Floors

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
TRUE_MS = BUILT_MS + 100 * DAY_MS
YEAR_1970, YEAR_2099 = 0, 4_083_000_000_000
CLOCKS = {"1970": YEAR_1970, "right": TRUE_MS, "2099": YEAR_2099}


def test_before_anything_is_known_it_is_the_clock_but_never_before_the_agent_was_built() -> None:
    fresh = tt.at_start(Floors(), issued_ms=0)
    assert tt.now_ms(fresh, wall_ms=TRUE_MS, boot_ms=5) == TRUE_MS
    assert tt.now_ms(fresh, wall_ms=YEAR_1970, boot_ms=5) == BUILT_MS


@pytest.mark.parametrize(
    ("floors", "issued_ms"),
    [
        (Floors(time_ms=TRUE_MS), 0),
        (Floors(attested_ms=TRUE_MS), 0),
        (Floors(), TRUE_MS),
    ],
)
def test_what_is_known_to_have_passed_has_passed(floors: Floors, issued_ms: int) -> None:
    time = tt.at_start(floors, issued_ms=issued_ms)
    assert tt.now_ms(time, wall_ms=YEAR_1970, boot_ms=0) == TRUE_MS
    assert tt.basis(time, wall_ms=YEAR_1970) == "floor"
    assert tt.basis(time, wall_ms=TRUE_MS) == "clock"


@pytest.mark.parametrize("clock", CLOCKS)
def test_once_attested_it_runs_with_the_boot_clock_whatever_the_system_clock_says(clock: str) -> None:
    time = tt.attested(tt.at_start(Floors(), issued_ms=0), TRUE_MS, asked_boot_ms=1_000)
    assert tt.now_ms(time, wall_ms=CLOCKS[clock], boot_ms=1_000) == TRUE_MS
    assert tt.now_ms(time, wall_ms=CLOCKS[clock], boot_ms=1_000 + HOUR_MS) == TRUE_MS + HOUR_MS
    assert tt.basis(time, wall_ms=CLOCKS[clock]) == "attested"


def test_an_answer_that_was_held_back_does_not_make_it_late() -> None:
    """Asked at 1 s, answered at once by the hub, delivered a minute later by who wants metadata to live longer."""
    time = tt.attested(TrustedTime(), TRUE_MS, asked_boot_ms=1_000)
    assert tt.now_ms(time, wall_ms=0, boot_ms=61_000) == TRUE_MS + 60_000


def test_a_later_attestation_may_set_it_back_but_not_below_what_documents_prove() -> None:
    ahead = tt.attested(TrustedTime(), TRUE_MS + 300 * DAY_MS, asked_boot_ms=0)  # of a thief, or of a wrong hub
    back = tt.attested(ahead, TRUE_MS, asked_boot_ms=10)
    assert tt.now_ms(back, wall_ms=0, boot_ms=10) == TRUE_MS
    documented = tt.attested(tt.proven(ahead, TRUE_MS + DAY_MS), TRUE_MS, asked_boot_ms=10)
    assert tt.now_ms(documented, wall_ms=0, boot_ms=10) == TRUE_MS + DAY_MS


def test_what_was_attested_in_an_earlier_boot_binds_until_it_is_attested_anew() -> None:
    time = tt.at_start(Floors(attested_ms=TRUE_MS + DAY_MS), issued_ms=0)
    assert tt.now_ms(time, wall_ms=TRUE_MS, boot_ms=0) == TRUE_MS + DAY_MS
    assert tt.now_ms(tt.attested(time, TRUE_MS, asked_boot_ms=0), wall_ms=0, boot_ms=0) == TRUE_MS


def test_a_document_proves_time_after_an_attestation_too() -> None:
    time = tt.proven(tt.attested(TrustedTime(), TRUE_MS, asked_boot_ms=0), TRUE_MS + HOUR_MS)
    assert tt.now_ms(time, wall_ms=0, boot_ms=0) == TRUE_MS + HOUR_MS


@given(
    st.lists(
        st.tuples(st.sampled_from(["attest", "prove"]), st.integers(0, 2**53), st.integers(0, 2**40)), max_size=20
    ),
    st.integers(-(2**40), 2**53),
)
def test_whatever_happens_it_is_never_before_what_is_proven(steps: list[tuple[str, int, int]], wall_ms: int) -> None:
    time, proven_ms = TrustedTime(), BUILT_MS
    for kind, moment_ms, boot_ms in steps:
        if kind == "prove":
            time, proven_ms = tt.proven(time, moment_ms), max(proven_ms, moment_ms)
        else:
            time = tt.attested(time, moment_ms, asked_boot_ms=boot_ms)
        assert tt.now_ms(time, wall_ms=wall_ms, boot_ms=boot_ms) >= proven_ms
        assert time.floor_ms == proven_ms


def test_news_is_a_first_attestation_and_a_time_that_has_moved() -> None:
    unknown = tt.at_start(Floors(attested_ms=TRUE_MS), issued_ms=0)
    known = tt.attested(unknown, TRUE_MS, asked_boot_ms=0)
    assert tt.is_news(unknown, known, wall_ms=TRUE_MS, boot_ms=0)
    for moved_ms, is_news in ((0, False), (tt.MOVED_MS, False), (-tt.MOVED_MS - 1, True), (tt.MOVED_MS + 1, True)):
        after = tt.attested(known, TRUE_MS + HOUR_MS + moved_ms, asked_boot_ms=HOUR_MS)
        assert tt.is_news(known, after, wall_ms=0, boot_ms=HOUR_MS) is is_news


def test_the_hub_is_asked_again_after_pauses_that_grow_and_are_spread() -> None:
    longest = [tt.pause_ms(failures, jitter=1.0) for failures in range(1, 40)]
    assert longest == sorted(longest)
    assert longest[0] == 2_000
    assert longest[-1] == LONGEST_PAUSE_MS
    assert tt.pause_ms(20, jitter=0.0) == tt.FIRST_PAUSE_MS
