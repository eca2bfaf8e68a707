"""Transition tables: a pair is in the table or refused, a step ends where its row says, the drawing is the table."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.machine import Decision, Row, Table, UnexpectedEvent


class Door(Enum):
    OPEN = 1
    SHUT = 2
    LOCKED = 3


@dataclass(frozen=True, slots=True)
class Push:
    pass


@dataclass(frozen=True, slots=True)
class Turn:
    pass


Event = Push | Turn
Rows = dict[tuple[Door, type[Event]], Row[Door, Door, str]]


def a_row(leads_to: Door, *, listed: tuple[Door, ...] = ()) -> Row[Door, Door, str]:
    return Row(leads_to=listed or (leads_to,), step=lambda state, event: Decision(leads_to, (f"to {leads_to.name}",)))


ROWS: Rows = {
    (Door.OPEN, Push): a_row(Door.SHUT),
    (Door.SHUT, Push): a_row(Door.OPEN),
    (Door.SHUT, Turn): a_row(Door.LOCKED),
    (Door.LOCKED, Turn): a_row(Door.SHUT),
}


def a_table(rows: Rows) -> Table[Door, Door, Event, str]:
    return Table("door", phase_of=lambda state: state, rows=rows)


pairs = list(product(Door, (Push, Turn)))


@given(st.sets(st.sampled_from(pairs)), st.sampled_from(pairs))
def test_a_pair_is_decided_or_refused(listed: set[tuple[Door, type[Event]]], asked: tuple[Door, type[Event]]) -> None:
    table = a_table({pair: a_row(Door.SHUT) for pair in listed})
    state, kind = asked
    assert table.accepts(state, kind) == (asked in listed)
    if asked in listed:
        assert table.decide(state, kind()) == Decision(Door.SHUT, ("to SHUT",))
    else:
        with pytest.raises(UnexpectedEvent, match=f"{kind.__name__} cannot happen in {state.name}"):
            table.decide(state, kind())


def test_a_step_that_ends_elsewhere_than_listed_is_refused() -> None:
    table = a_table({(Door.OPEN, Push): a_row(Door.LOCKED, listed=(Door.SHUT, Door.OPEN))})
    with pytest.raises(UnexpectedEvent, match="unlisted LOCKED"):
        table.decide(Door.OPEN, Push())


def test_the_drawing_has_one_edge_per_pair_of_phases() -> None:
    assert a_table(ROWS).mermaid().splitlines() == [
        "stateDiagram-v2",
        "    LOCKED --> SHUT: Turn",
        "    OPEN --> SHUT: Push",
        "    SHUT --> LOCKED: Turn",
        "    SHUT --> OPEN: Push",
    ]


def test_the_table_does_not_change_with_the_rows_it_was_made_from() -> None:
    rows = dict(ROWS)
    table = a_table(rows)
    rows.clear()
    assert table.accepts(Door.OPEN, Push)
