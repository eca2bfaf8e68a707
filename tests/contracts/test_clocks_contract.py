"""What every clock of the device does, the fake one and the machine's."""

from __future__ import annotations

import time

import pytest

from edge_agent.adapters.system import SystemClock
from shared.clock import BootClock
from tests.fakes.clock import FakeClock


@pytest.fixture(params=["fake", "system"])
def clock(request: pytest.FixtureRequest) -> BootClock:
    return FakeClock() if request.param == "fake" else SystemClock()


def test_monotonic_and_boot_clock_never_go_back(clock: BootClock) -> None:
    readings = [(clock.mono_ms(), clock.boot_ms()) for _ in range(1_000)]
    assert readings == sorted(readings)
    assert [boot for _, boot in readings] == sorted(boot for _, boot in readings)


def test_readings_are_whole_milliseconds(clock: BootClock) -> None:
    assert all(type(reading) is int for reading in (clock.wall_ms(), clock.mono_ms(), clock.boot_ms()))


def test_the_boot_clock_is_the_kernels_that_counts_suspended_time() -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    reading = SystemClock().boot_ms()
    assert before <= reading <= time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def test_the_fakes_boot_clock_goes_on_in_a_suspend_and_its_monotonic_one_does_not() -> None:
    clock = FakeClock(mono_ms=5)
    clock.suspend(1_000)
    clock.advance(10)
    assert (clock.mono_ms(), clock.boot_ms()) == (15, 1_015)
