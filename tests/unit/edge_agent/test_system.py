"""The machine's clocks: that they agree with the kernel, and that doubt is said."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import pytest

from edge_agent.adapters import system
from edge_agent.adapters.system import SystemMoments, boot_id, find_adjtimex, is_synchronised, uptime_ms


def test_the_boot_has_one_name(tmp_path: Path) -> None:
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip() == SystemMoments()().boot
    assert boot_id(tmp_path) == ""


def test_the_uptime_is_the_kernels() -> None:
    before = float(Path("/proc/uptime").read_text().split()[0])
    told = uptime_ms() / 1000
    after = float(Path("/proc/uptime").read_text().split()[0])
    assert before - 0.02 <= told <= after + 0.02  # the file has hundredths


@pytest.mark.parametrize(
    ("state", "status", "told"),
    [(0, 0x01, True), (1, 0x2001, True), (0, 0x40, False), (5, 0x40, False), (5, 0x00, False), (-1, 0x00, False)],
    ids=["kept", "leap second ahead", "unsync", "unsync and error", "error", "refused"],
)
def test_a_clock_is_synchronised_when_the_kernel_has_no_doubt(state: int, status: int, told: bool) -> None:
    def adjtimex(timex: Any) -> int:
        struct.pack_into("@IllllI", timex, 0, 0, 5, 6, 7, 8, status)
        return state

    assert is_synchronised(adjtimex) is told


def test_a_moment_is_all_of_them_at_once() -> None:
    moment = SystemMoments()()
    assert moment.synchronised == is_synchronised(find_adjtimex())
    assert abs(moment.wall_ms - time.time() * 1000) < 60_000
    assert abs(moment.uptime_ms - uptime_ms()) < 60_000


def test_the_kernel_is_asked_for_its_doubt_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms, asked = 500, 0

    def adjtimex(_: Any) -> int:
        nonlocal asked
        asked += 1
        return 5 if asked == 2 else 0

    monkeypatch.setattr(system, "uptime_ms", lambda: now_ms)
    moments = SystemMoments(adjtimex)
    told = []
    for later in (500, 501, 1_499, 1_500, 2_499, 2_500):
        now_ms = later
        told.append(moments().synchronised)
    assert told == [True, True, True, False, False, True]
    assert asked == 3


def test_where_the_kernel_cannot_be_asked_there_is_doubt() -> None:
    assert is_synchronised(None) is False
