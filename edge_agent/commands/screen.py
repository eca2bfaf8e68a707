"""What a person or a program sees: aligned tables, JSON documents, notes and errors on stderr.

Rules: stdout carries data only; with `--json` it is one document, or one line per row where rows are a stream. Text
that came from elsewhere is shown without its control characters, so that a name cannot move the cursor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from shared.errors import OutriderError


def clean(text: str) -> str:
    """The text without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """One thing, a line per property, values aligned."""
    room = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name:<{room}}  {clean(value)}".rstrip() for name, value in pairs)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns below their titles."""
    cells = [list(titles), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(titles))]
    return "\n".join(
        "  ".join(f"{cell:<{room}}" for cell, room in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def show(text: str) -> None:
    """Data for stdout."""
    print(text)


def show_json(document: Any, *, is_row: bool = False) -> None:
    """One JSON document, or one row of a stream on a line of its own."""
    data = msgspec.json.encode(document)
    print((data if is_row else msgspec.json.format(data, indent=2)).decode(), flush=is_row)


def note(text: str) -> None:
    """Something beside the data, for stderr."""
    print(text, file=sys.stderr)


def show_error(error: OutriderError) -> None:
    """What went wrong, its code, and what to try."""
    lines = [f"error: {error.message}", f"code: {error.code}"]
    if error.hint:
        lines.append(f"try: {error.hint}")
    print("\n".join(lines), file=sys.stderr)
