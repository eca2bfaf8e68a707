"""A day's bytes over every kind of clock and cut, and what is held against files that came wrong."""

from __future__ import annotations

import random

import msgspec
import pytest

from edge_agent.core.spending import (
    DAY_HOURS,
    HOUR_MS,
    LONGEST_BAR_MS,
    MAX_STRIKES,
    SMALLEST_GRANT_BYTES,
    Spending,
    barred_ms,
    charged,
    forgiven,
    grant_bytes,
    left_bytes,
    moved,
    struck,
)
from shared.limits import MIB
from tests.fakes.clock import FakeMoments

DAILY = 10 * MIB


def spent_all(moments: FakeMoments) -> Spending:
    return charged(moved(Spending(), moments()), DAILY)


def test_no_24_hours_hold_more_than_a_days_budget() -> None:
    moments, draw = FakeMoments(), random.Random(5)
    spending = Spending()
    grants: list[tuple[int, int]] = []
    for _ in range(3_000):
        moments.advance(draw.randrange(1, 2 * HOUR_MS // 10))
        spending = moved(spending, moments())
        granted = grant_bytes(spending, daily_bytes=DAILY, wanted_bytes=draw.randrange(1, 3 * MIB))
        spending = charged(spending, granted)
        grants.append((spending.clock_ms, granted))
    for at_ms, _ in grants[::50]:
        day = [count for when, count in grants if at_ms <= when < at_ms + DAY_HOURS * HOUR_MS]
        assert sum(day) <= DAILY
    days = grants[-1][0] / (DAY_HOURS * HOUR_MS)
    assert sum(count for _, count in grants) > 0.8 * days * DAILY  # and it is not held back without need


def test_a_power_cut_resets_no_budget_and_time_off_refills_none_unless_both_clocks_are_right() -> None:
    moments = FakeMoments()
    spending = spent_all(moments)
    moments.reboot(off_ms=40 * DAY_HOURS * HOUR_MS)
    assert left_bytes(moved(spending, moments()), daily_bytes=DAILY) == 0
    moments.synchronised = True
    assert left_bytes(moved(spending, moments()), daily_bytes=DAILY) == 0
    right = moved(spending, moments())
    moments.reboot(off_ms=2 * DAY_HOURS * HOUR_MS)
    assert left_bytes(moved(right, moments()), daily_bytes=DAILY) == DAILY


@pytest.mark.parametrize("jump_ms", [-(10**12), 10**14])
def test_a_wall_clock_that_jumps_moves_nothing(jump_ms: int) -> None:
    moments = FakeMoments()
    moments.synchronised = True
    spending = spent_all(moments)
    moments.wall_ms += jump_ms
    assert left_bytes(moved(spending, moments()), daily_bytes=DAILY) == 0


def test_the_budget_refills_by_the_time_that_the_machine_is_up() -> None:
    moments = FakeMoments()
    spending = spent_all(moments)
    for _ in range(5):  # five boots of five hours
        moments.reboot()
        moments.advance(5 * HOUR_MS)
        spending = moved(spending, moments())
    assert left_bytes(spending, daily_bytes=DAILY) == DAILY


def test_what_did_not_come_is_given_back_also_when_the_hour_has_changed() -> None:
    moments = FakeMoments()
    spending = charged(moved(Spending(), moments()), 8 * MIB)
    moments.advance(HOUR_MS)
    spending = charged(moved(spending, moments()), -3 * MIB)
    assert (left_bytes(spending, daily_bytes=DAILY), spending.total_bytes) == (5 * MIB, 5 * MIB)
    assert left_bytes(charged(spending, -100 * MIB), daily_bytes=DAILY) == DAILY


def test_grants_are_slices_and_a_rest_that_is_not_worth_a_connection_waits() -> None:
    empty = Spending()
    assert grant_bytes(empty, daily_bytes=0, wanted_bytes=10**9) == 10**9
    assert grant_bytes(empty, daily_bytes=DAILY, wanted_bytes=10**9) == DAILY // 16
    assert grant_bytes(empty, daily_bytes=1000, wanted_bytes=10**9) == 1000
    little = charged(empty, DAILY - 100)
    assert grant_bytes(little, daily_bytes=DAILY, wanted_bytes=MIB) == 0
    assert grant_bytes(little, daily_bytes=DAILY, wanted_bytes=100) == 100
    assert grant_bytes(charged(empty, DAILY - SMALLEST_GRANT_BYTES), daily_bytes=DAILY, wanted_bytes=MIB) > 0


def test_what_came_wrong_is_left_alone_for_longer_each_time_and_that_is_bounded() -> None:
    moments = FakeMoments()
    spending = moved(Spending(), moments())
    bars = []
    for _ in range(12):
        spending = struck(spending, "a" * 64)
        bars.append(barred_ms(spending, "a" * 64))
    assert bars[:3] == [HOUR_MS, 2 * HOUR_MS, 4 * HOUR_MS]
    assert bars[-1] == LONGEST_BAR_MS
    moments.reboot()
    assert barred_ms(moved(spending, moments()), "a" * 64) == LONGEST_BAR_MS
    moments.advance(LONGEST_BAR_MS)
    assert barred_ms(moved(spending, moments()), "a" * 64) == 0
    assert barred_ms(forgiven(spending, "a" * 64), "a" * 64) == 0
    for number in range(3 * MAX_STRIKES):
        spending = struck(spending, f"{number}")
    assert len(spending.strikes) == MAX_STRIKES
    assert f"{3 * MAX_STRIKES - 1}" in spending.strikes


def test_the_first_times_may_be_free() -> None:
    spending = Spending()
    bars = []
    for _ in range(4):
        spending = struck(spending, "a", free=2)
        bars.append(barred_ms(spending, "a"))
    assert bars == [0, 0, HOUR_MS, 2 * HOUR_MS]


def test_the_record_survives_being_written() -> None:
    moments = FakeMoments()
    spending = struck(spent_all(moments), "a" * 64)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spending), type=Spending) == spending
