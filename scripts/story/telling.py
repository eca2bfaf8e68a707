"""How the story is told and checked: steps with words and figures, and a loud stop when one of them is not true."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

Figure = int | float | str | bool
T = TypeVar("T")

POLL_S: Final = 0.05
LOG_LINES: Final = 30


class NotTrue(Exception):
    """Something that the story claims is not so."""


class NeverTrue(NotTrue):
    """The same, and waiting cannot change it: a process that has ended, say."""


def expect(claim: str, *, wanted: object, found: object) -> None:
    """Raise NotTrue unless both are equal."""
    if found != wanted:
        raise NotTrue(f"{claim}: expected {wanted!r}, found {found!r}")


def require(condition: object, claim: str) -> None:
    """Raise NotTrue unless the condition holds."""
    if not condition:
        raise NotTrue(claim)


def until(claim: str, look: Callable[[], T | None], *, seconds: float) -> T:
    """Look again and again until something comes of it; raises NotTrue when the time is over.

    `look` gives a value when the claim holds, else None or something false. What it raises last is shown.
    """
    deadline = time.monotonic() + seconds
    seen: object = None
    while True:
        try:
            found = look()
        except NeverTrue:
            raise
        except NotTrue as error:
            found, seen = None, error
        if found:
            return found
        if time.monotonic() >= deadline:
            raise NotTrue(f"{claim}: not so within {seconds:.0f} s" + (f" ({seen})" if seen else ""))
        time.sleep(POLL_S)


@dataclass(slots=True)
class Told:
    """One step as it went."""

    name: str
    ok: bool = False
    figures: dict[str, Figure] = field(default_factory=dict)


class Teller:
    """Prints the story and keeps its figures."""

    def __init__(self, names: Sequence[str], *, logs: Path) -> None:
        self._names = list(names)
        self._logs = logs
        self.steps: list[Told] = []

    def play(self, name: str, title: str, act: Callable[[], Mapping[str, Figure]]) -> bool:
        """Play one step; False when it failed, after saying what was expected and showing the logs' ends."""
        told = Told(name)
        self.steps.append(told)
        number = self._names.index(name) + 1
        print(f"\n[{number}/{len(self._names)}] {name}: {title}", flush=True)
        began = time.monotonic()
        try:
            told.figures.update(act())
            told.ok = True
        except NotTrue as error:
            self._fail(name, str(error))
        took = time.monotonic() - began
        told.figures["seconds"] = round(took, 2)
        if told.ok:
            print(f"      ok ({took:.1f} s)", flush=True)
        return told.ok

    def say(self, text: str) -> None:
        """A sentence of the story, wrapped."""
        print(textwrap.fill(text, width=96, initial_indent="      ", subsequent_indent="      "), flush=True)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A few figures in columns."""
        cells = [[str(cell) for cell in row] for row in rows]
        widths = [max(len(line[column]) for line in [list(titles), *cells]) for column in range(len(titles))]
        for line in [list(titles), *cells]:
            print("        " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
        sys.stdout.flush()

    def write_json(self, path: Path) -> None:
        """Write the steps with their figures."""
        steps = [{"name": told.name, "ok": told.ok, "figures": told.figures} for told in self.steps]
        path.write_text(json.dumps({"steps": steps}, indent=2) + "\n", encoding="utf-8")

    def _fail(self, name: str, reason: str) -> None:
        print(f"\nFAILED at {name}: {reason}", file=sys.stderr)
        for log in sorted(self._logs.glob("*.log")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            print(f"\n--- the end of {log}", *lines, sep="\n    ", file=sys.stderr)
        sys.stderr.flush()
