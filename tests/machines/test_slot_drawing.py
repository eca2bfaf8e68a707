"""The drawing and the vocabulary in docs/slots.md are the code's, and the table has a row for every phase and event.

After a change of the table, `python -m tests.machines.test_slot_drawing` writes the drawing anew.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from edge_agent.core import slots
from edge_agent.core.slot_values import Event, Phase, Restarted
from shared import results

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "slots.md"
BEGIN, END = "<!-- drawing -->\n", "<!-- /drawing -->"


def redrawn(text: str) -> str:
    """The document with the drawing and the vocabulary as the code has them now."""
    text = _replaced(text, BEGIN, f"```mermaid\n{slots.drawing()}\n```\n", END)
    return _replaced(text, "<!-- results -->\n", f"{results.table()}\n", "<!-- /results -->")


def _replaced(text: str, begin: str, content: str, end: str) -> str:
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}{content}{end}{after}"


def test_the_drawing_is_of_this_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == redrawn(text)


def test_the_document_names_every_phase() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"| `{phase.name}` |" in text for phase in Phase)


@pytest.mark.parametrize("kind", get_args(Event))
def test_every_phase_has_a_row_for_every_event(kind: type) -> None:
    assert {phase for phase in Phase if (phase, kind) in slots.TABLE.rows} == set(Phase)


@pytest.mark.parametrize("phase", Phase)
def test_every_phase_resumes_after_a_restart(phase: Phase) -> None:
    row = slots.TABLE.rows[phase, Restarted]
    assert Phase.WARMUP not in row.leads_to
    assert Phase.PROBATION not in row.leads_to


if __name__ == "__main__":
    DOCUMENT.write_text(redrawn(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
