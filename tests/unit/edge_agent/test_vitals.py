"""Vitals from a kernel that offers everything, and from one that offers nothing."""

from __future__ import annotations

import os
from pathlib import Path

from edge_agent.adapters.vitals import Vitals


def test_readings_come_in_their_units(tmp_path: Path) -> None:
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    for zone, text in (("thermal_zone0", "48312\n"), ("thermal_zone1", "51000\n")):
        (sys / "class" / "thermal" / zone).mkdir(parents=True)
        (sys / "class" / "thermal" / zone / "temp").write_text(text)
    (proc / "pressure").mkdir(parents=True)
    (proc / str(os.getpid())).mkdir()
    (proc / "loadavg").write_text("0.52 0.40 0.30 1/234 5678\n")
    (proc / "meminfo").write_text("MemTotal: 2000 kB\nMemAvailable:    1000 kB\n")
    (proc / "pressure" / "memory").write_text("some avg10=1.25 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00\n")
    (proc / "pressure" / "io").write_text("some avg10=0.50 avg60=0.00 avg300=0.00 total=1\n")
    (proc / str(os.getpid()) / "statm").write_text("9000 100 1 1 0 1 0\n")
    readings = {item.name: item.value for item in Vitals(state_dir=tmp_path, proc=proc, sys=sys).read()}
    assert readings.pop("disk_free_bytes") > 0
    assert readings == {
        "cpu_temp_c": 51.0,
        "load_1m": 0.52,
        "memory_available_bytes": 1_024_000.0,
        "memory_pressure_pct": 1.25,
        "io_pressure_pct": 0.5,
        "core_rss_bytes": 100.0 * os.sysconf("SC_PAGE_SIZE"),
    }


def test_what_the_kernel_does_not_offer_is_left_out(tmp_path: Path) -> None:
    assert Vitals(state_dir=tmp_path / "none", proc=tmp_path, sys=tmp_path).read() == ()
