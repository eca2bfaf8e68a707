"""What births say of two devices under one name: never a false word, whatever the delivery, and a true one soon."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_hub.devices.clones import LATE_BIRTHS, MAX_KEPT, WINDOW_MS, SeenBirth, note_birth

A, B = "a" * 16, "b" * 16


def said(epoch: str, boot: int, session: int, message: str = "") -> SeenBirth:
    return SeenBirth(epoch=epoch, boot=boot, session=session, message=message or f"{epoch}{boot}.{session}", at_ms=0)


def arrive(births: Sequence[SeenBirth], *, every_ms: int = 1000) -> list[str]:
    """The reasons that were found, in the order of arrival."""
    seen: tuple[SeenBirth, ...] = ()
    reasons = []
    for number, birth in enumerate(births):
        arrived = SeenBirth(birth.epoch, birth.boot, birth.session, birth.message, at_ms=number * every_ms)
        seen, reason = note_birth(seen, arrived)
        assert len(seen) <= MAX_KEPT
        reasons.append(reason)
    return reasons


@st.composite
def one_device(draw: st.DrawFn) -> list[SeenBirth]:
    """Births of one device as they arrive: it reboots, loses its store, and its births come late and twice."""
    births: list[SeenBirth] = []
    for epoch in ("a" * 16, "b" * 16, "c" * 16)[: draw(st.integers(1, 3))]:
        boot = draw(st.integers(1, 5))
        for _ in range(draw(st.integers(1, 4))):
            births += [said(epoch, boot, session) for session in range(1, draw(st.integers(1, 9)) + 1)]
            boot += draw(st.integers(1, 3))
    # Late: behind at most LATE_BIRTHS that were said after it.
    late = [draw(st.integers(0, LATE_BIRTHS)) for _ in births]
    arrived = [birth for _, birth in sorted(enumerate(births), key=lambda pair: (pair[0] + late[pair[0]], pair[0]))]
    # Twice, or more often, and at any time after the first.
    for _ in range(draw(st.integers(0, 10))):
        again = draw(st.integers(0, len(arrived) - 1))
        arrived.insert(draw(st.integers(again, len(arrived))), arrived[again])
    return arrived


@settings(max_examples=300, deadline=None)
@given(births=one_device())
def test_one_device_is_never_taken_for_two(births: list[SeenBirth]) -> None:
    assert not any(arrive(births))


@settings(max_examples=100, deadline=None)
@given(order=st.permutations([said(A, 3, session) for session in range(1, 8)] * 2))
def test_one_boot_may_arrive_in_any_order_and_twice(order: list[SeenBirth]) -> None:
    assert not any(arrive(order))


def test_copies_of_a_disk_are_noticed_at_once() -> None:
    assert arrive([said(A, 4, 1, "one"), said(A, 4, 1, "two")]) == ["", "two births of boot 4, session 1"]


@given(first=st.integers(1, 50), second=st.integers(1, 50), other=st.booleans(), uneven=st.integers(1, 2))
def test_two_that_push_each_other_out_are_noticed_after_a_few_turns(
    first: int, second: int, other: bool, uneven: int
) -> None:
    births = []
    for turn in range(1, 15):
        births.append(said(A, first, turn, f"one {turn}"))
        births += [
            said(B if other else A, second, turn * uneven + step, f"two {turn} {step}") for step in range(uneven)
        ]
    reasons = arrive(births)
    assert any(reasons)
    assert next(number for number, reason in enumerate(reasons) if reason) <= 3 * (LATE_BIRTHS + 2)


def test_a_device_that_is_set_back_to_an_older_boot_is_not_a_clone() -> None:
    newer = [said(A, 10, session) for session in range(1, 12)]
    older = [said(A, 8, session) for session in range(1, 12)]
    assert not any(arrive([*newer, *older]))


def test_what_is_long_ago_says_nothing() -> None:
    births = [said(A, 4, 1, "one"), said(A, 4, 1, "two")]
    assert arrive(births, every_ms=WINDOW_MS) == ["", ""]
    assert any(arrive(births, every_ms=WINDOW_MS - 1))
