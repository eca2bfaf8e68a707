"""What a person or a program sees: aligned tables, one JSON document, notes on stderr, questions on a terminal.

Rules: stdout carries data only; with `--json` it is exactly one document (with `--watch`, one line per look). Progress,
notes and errors go to stderr. Text from the hub is shown without its control characters, so that a label cannot move
the cursor.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any, Final, TextIO

import msgspec

from shared.errors import OutriderError

_GAP: Final = "  "
_LEAST_WIDTH: Final = 10


def clean(text: str) -> str:
    """The text without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def clean_lines(lines: Sequence[str]) -> str:
    """Lines of text, each without its control characters."""
    return "\n".join(clean(line) for line in lines)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """Aligned columns below their titles; where a width is given, the widest column gives way with an ellipsis."""
    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in [titles, *cells]) for column in range(len(titles))]
    if width is not None:
        while sum(widths) + len(_GAP) * (len(widths) - 1) > width and max(widths) > _LEAST_WIDTH:
            widths[widths.index(max(widths))] -= 1
    lines = [
        _GAP.join(_fit(cell, room) for cell, room in zip(line, widths, strict=True)).rstrip()
        for line in [list(titles), *cells]
    ]
    return "\n".join(lines)


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """One thing, a line per property, values aligned."""
    room = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name:<{room}}  {clean(value)}".rstrip() for name, value in pairs)


def show_table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, nothing: str) -> None:
    """Print a table, or on stderr that there is nothing."""
    if not rows:
        note(nothing)
        return
    width = shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else None
    print(table(titles, rows, width=width))


def show_json(document: Any, *, line: bool = False) -> None:
    """Print one JSON document; `line` puts it on one line."""
    data = msgspec.json.encode(document)
    print((data if line else msgspec.json.format(data, indent=2)).decode())
    sys.stdout.flush()


def note(text: str) -> None:
    """Say something to the person, on stderr, in as many lines as it has."""
    print("\n".join(clean(line) for line in text.split("\n")), file=sys.stderr)


def show_error(error: OutriderError) -> None:
    """Say what went wrong, its code and what to try."""
    # Further lines are set in, so that none of them can pass for the code or the advice.
    message = "\n  ".join(clean(line.strip()) for line in error.message.split("\n"))
    print(f"error: {message}", file=sys.stderr)
    print(f"code: {clean(error.code)}", file=sys.stderr)
    if error.hint:
        print(f"try: {clean(error.hint)}", file=sys.stderr)


def confirm(question: str) -> bool:
    """Ask on the terminal; no answer, or anything but y or yes, is no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def can_ask() -> bool:
    """Whether somebody sits at a terminal who can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


class Bar:
    """Progress of one transfer: on a terminal a line that is redrawn, else nothing."""

    def __init__(self, title: str, *, stream: TextIO | None = None) -> None:
        self._title = title
        self._stream = stream or sys.stderr
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are through."""
        percent = 100 if total == 0 else done * 100 // total
        if percent == self._shown or not self._stream.isatty():
            return
        self._shown = percent
        filled = percent * 30 // 100
        end = "\n" if done >= total else ""
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r{self._title:<24.24} [{bar}] {percent:3d} %", end=end, file=self._stream, flush=True)


def ago(at_ms: int | None, *, now_ms: int) -> str:
    """How long something is past, in the largest fitting unit: `12 s`, `3 min`, `5 h`, `2 d`."""
    if at_ms is None or at_ms <= 0:
        return "never"
    seconds = max(0, now_ms - at_ms) // 1000
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def size(length: int) -> str:
    """Bytes for people: `812 B`, `69.3 kB`, `4.1 MB`."""
    if length < 1000:
        return f"{length} B"
    return f"{length / 1000:.1f} kB" if length < 1_000_000 else f"{length / 1_000_000:.1f} MB"


def _fit(cell: str, room: int) -> str:
    return f"{cell:<{room}}" if len(cell) <= room else cell[: room - 1] + "…"
