"""What the hub and its build child say to each other: a job on standard input, steps on standard output, a report file.

Values only; light enough for both sides to import. The report's shape is in rules.py, because rules decide on it.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cloud_hub.releases.rules import Push

MODULE: Final = "cloud_hub.releases.builder"
REPORT_FILE: Final = "report.json"
MAX_JOB_BYTES: Final = 4 * 1024 * 1024
MAX_REPORT_BYTES: Final = 4 * 1024 * 1024


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A build to do.

    Attributes:
        parent: process id of the hub; the child ends when it is not its parent any more.
        model, golden, calibration: files to read; calibration is empty when the golden set serves for it.
        cpu_s: processor seconds after which the kernel ends the child.
    """

    parent: int
    model: str
    golden: str
    calibration: str
    push: Push
    cpu_s: int


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """A model to load and hold, so that its resident size can be read.

    Attributes:
        parent: process id of the build child.
        model: file to load.
        shapes: input names with their graph types and the shape of one row.
    """

    parent: int
    model: str
    shapes: tuple[tuple[str, str, tuple[int, ...]], ...]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: resident bytes after loading and one run."""

    ram_bytes: int


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One line of progress, for people who wait."""

    step: str
