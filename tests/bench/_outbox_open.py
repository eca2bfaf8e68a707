"""Opens the journal in a directory, in a process of its own, and says how long that took and what it made of it."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from pathlib import Path

from edge_agent.adapters.disk import PosixDisk
from edge_agent.adapters.journal import Journal
from edge_agent.core import frames
from edge_agent.core.journal import Moment, bounds_for
from shared.limits import MIB
from shared.telemetry import RecordClass

BOUNDS = bounds_for(640 * MIB)


def main(path: Path) -> None:
    """Open, hand the first batch out, and print the figures."""
    now = Moment("bench", time.monotonic_ns() // 10**6, 0, False)
    forget_pages(path)
    began = time.perf_counter()
    disk = PosixDisk(path)
    journal = Journal.open(disk, BOUNDS, moment=now, draw=secrets.token_bytes)
    open_ms = (time.perf_counter() - began) * 1000
    journal.load(RecordClass.READING, after=0, moment=now)
    waiting = journal.depth(now).records[RecordClass.READING]
    rss_kb = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text("ascii").splitlines() if "VmRSS" in line
    )
    figures = {"open_ms": open_ms, "records": waiting, "rss_kb": rss_kb, "scan_ms": scan_ms(disk)}
    sys.stdout.write(json.dumps(figures))
    journal.close(now)


def forget_pages(path: Path) -> None:
    """Let the kernel forget what it holds of these files."""
    for file in path.iterdir():
        if not file.is_file():
            continue
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def scan_ms(disk: PosixDisk) -> float:
    """Milliseconds for reading and checking every frame of the oldest segment; 0 where there is none."""
    names = sorted(name for name in map(frames.parse_segment_name, disk.names()) if name is not None)
    if not names:
        return 0.0
    began = time.perf_counter()
    data = disk.read(str(names[0]), 0, BOUNDS.segment_bytes)
    offset = 0
    while (frame := frames.read_frame(data, offset, start=0, segment=names[0])) is not None:
        offset = frame.end
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    main(Path(sys.argv[1]))
