"""The machine's clocks: that they agree with the kernel, and that doubt is said."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import pytest

from edge_agent.adapters.system import SystemMoments, boot_id, is_synchronised, uptime_ms


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
    assert moment.synchronised == is_synchronised()
    assert abs(moment.wall_ms - time.time() * 1000) < 60_000
    assert abs(moment.uptime_ms - uptime_ms()) < 60_000
