"""Transition tables: a machine is the set of (state, event) pairs that it accepts.

Rules of this file:
1. A pair that is not in the table is refused with `UnexpectedEvent`; silence is never the answer to an event.
2. Events that a state knows and deliberately ignores are listed as such, with the reason in the table.

The drawings in the documentation are made from `Table.mermaid`, so they cannot disagree with the code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Any, Generic, TypeVar

import msgspec

from shared.errors import OutriderError

State = TypeVar("State")
Event = TypeVar("Event")
Effect = TypeVar("Effect")
Phase = TypeVar("Phase", bound=Enum)


class UnexpectedEvent(OutriderError):
    """The table has no entry for this event in this state: a defect of the caller, never of the outside."""

    code = "machine.unexpected_event"


class Decision(msgspec.Struct, Generic[State, Effect], frozen=True):
    """What a machine says to an event: the state to persist, then the effects to carry out, in order."""

    state: State
    effects: tuple[Effect, ...] = ()


class Row(msgspec.Struct, Generic[Phase, State, Effect], frozen=True):
    """One cell of a table.

    Attributes:
        leads_to: every phase that the step may end in; checked after each step and drawn in the docs.
        step: the pure function that decides. Its event's type is the one that the row is filed under, which the
            table looks up; the type checker cannot follow that, hence Any.
    """

    leads_to: tuple[Phase, ...]
    step: Callable[[State, Any], Decision[State, Effect]]


class Table(Generic[Phase, State, Event, Effect]):
    """A machine: rows by (phase, type of event), how to read the phase from a state, and the phases that are ends."""

    def __init__(
        self,
        name: str,
        *,
        phase_of: Callable[[State], Phase],
        rows: Mapping[tuple[Phase, type[Event]], Row[Phase, State, Effect]],
        ends: Collection[Phase] = (),
    ) -> None:
        self.name = name
        self._phase_of = phase_of
        self.rows = dict(rows)
        self.ends = frozenset(ends)

    def decide(self, state: State, event: Event) -> Decision[State, Effect]:
        """Return the decision for this event, or raise UnexpectedEvent when the table has no such pair."""
        phase = self._phase_of(state)
        row = self.rows.get((phase, type(event)))
        if row is None:
            raise UnexpectedEvent(f"{self.name}: {type(event).__name__} cannot happen in {phase.name}")
        decision = row.step(state, event)
        after = self._phase_of(decision.state)
        if after not in row.leads_to:
            raise UnexpectedEvent(f"{self.name}: {type(event).__name__} led from {phase.name} to unlisted {after.name}")
        return decision

    def accepts(self, state: State, kind: type[Event]) -> bool:
        """Whether an event of this type has a row in the state's phase."""
        return (self._phase_of(state), kind) in self.rows

    def mermaid(self) -> str:
        """The table as a Mermaid state diagram, one edge per pair of phases, sorted, labelled with its events."""
        edges: dict[tuple[str, str], set[str]] = {}
        for (phase, kind), row in self.rows.items():
            for target in row.leads_to:
                edges.setdefault((phase.name, target.name), set()).add(kind.__name__)
        lines = [f"    {a} --> {b}: {', '.join(sorted(kinds))}" for (a, b), kinds in sorted(edges.items())]
        lines += [f"    {name} --> [*]" for name in sorted(phase.name for phase in self.ends)]
        return "\n".join(["stateDiagram-v2", *lines])
