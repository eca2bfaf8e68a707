"""Every transition table of the product: no phase is forgotten, out of reach or a trap; the page is drawn from it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any

import pytest

from scripts.checks import machines_page
from shared.machine import Decision, Row, Table

MACHINES = machines_page.machines()


def phases_of(table: Table[Any, Any, Any, Any]) -> type[Enum]:
    """The enumeration that the table's phases belong to."""
    (kind,) = {type(phase) for phase, _ in table.rows}
    return kind


def test_there_are_machines() -> None:
    assert {"slot"} <= {table.name for table in MACHINES.values()}
    assert len({table.name for table in MACHINES.values()}) == len(MACHINES)


def faults(table: Table[Any, Any, Any, Any]) -> Iterator[str]:
    """Phases without a row, out of reach from the first one, or without a way out; an end that can be left."""
    phases = list(phases_of(table))
    edges = {
        phase: {to for (at, _), row in table.rows.items() if at is phase for to in row.leads_to} for phase in phases
    }
    reached, new = {phases[0]}, {phases[0]}
    while new:
        new = {to for phase in new for to in edges[phase]} - reached
        reached |= new
    for phase in phases:
        if phase in table.ends:
            if edges[phase] - {phase}:
                yield f"{phase.name} is an end and can be left"
        elif not any(at is phase for at, _ in table.rows):
            yield f"{phase.name} refuses every event"
        elif not edges[phase] - {phase}:
            yield f"{phase.name} cannot be left"
        if phase not in reached:
            yield f"{phase.name} is out of reach from {phases[0].name}"


@pytest.mark.parametrize("name", MACHINES)
def test_every_phase_has_rows_and_can_be_reached_and_left(name: str) -> None:
    assert list(faults(MACHINES[name])) == []


class Lamp(Enum):
    OFF = 1
    ON = 2
    BROKEN = 3


@pytest.mark.parametrize(
    ("edges", "fault"),
    [
        ({Lamp.OFF: Lamp.ON, Lamp.ON: Lamp.OFF}, "BROKEN refuses every event"),
        ({Lamp.OFF: Lamp.ON, Lamp.ON: Lamp.OFF, Lamp.BROKEN: Lamp.OFF}, "BROKEN is out of reach from OFF"),
        ({Lamp.OFF: Lamp.ON, Lamp.ON: Lamp.BROKEN, Lamp.BROKEN: Lamp.BROKEN}, "BROKEN cannot be left"),
    ],
)
def test_a_faulty_table_is_noticed(edges: dict[Lamp, Lamp], fault: str) -> None:
    def row(to: Lamp) -> Row[Lamp, Lamp, str]:
        return Row(leads_to=(to,), step=lambda state, event: Decision(to))

    rows = {(at, str): row(to) for at, to in edges.items()}
    table: Table[Lamp, Lamp, str, str] = Table("lamp", phase_of=lambda state: state, rows=rows)
    assert fault in list(faults(table))


def test_an_end_needs_no_way_out_and_has_none() -> None:
    def table(ends: tuple[Lamp, ...]) -> Table[Lamp, Lamp, str, str]:
        edges = {Lamp.OFF: Lamp.ON, Lamp.ON: Lamp.BROKEN}
        rows: dict[tuple[Lamp, type[str]], Row[Lamp, Lamp, str]] = {
            (at, str): Row(leads_to=(to,), step=lambda state, event: Decision(state)) for at, to in edges.items()
        }
        return Table("lamp", phase_of=lambda state: state, rows=rows, ends=ends)

    assert list(faults(table((Lamp.BROKEN,)))) == []
    assert list(faults(table((Lamp.ON, Lamp.BROKEN)))) == ["ON is an end and can be left"]
    assert table((Lamp.BROKEN,)).mermaid().endswith("BROKEN --> [*]")


def test_the_page_of_machines_is_drawn_from_the_tables() -> None:
    assert machines_page.PAGE.read_text() == machines_page.render(), "run: python -m scripts.checks.machines_page"
