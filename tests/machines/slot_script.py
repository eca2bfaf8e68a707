"""A script for the slot machine: events are said, and what it wanted done is looked at."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_agent.core import slots
from edge_agent.core.slot_bytes import decode_state, encode_state
from edge_agent.core.slot_values import (
    AnswerGood,
    Effect,
    Event,
    FilesHere,
    FilesVerified,
    HostFailed,
    HostReady,
    Note,
    Phase,
    ProbationTimedOut,
    Slot,
    WarmUpAllowed,
)
from tests.machines.slot_parts import PROBATION, empty_slot, key, offer


@dataclass
class Script:
    """A slot, and everything that it wanted done since it was last asked."""

    slot: Slot = field(default_factory=empty_slot)
    effects: list[Effect] = field(default_factory=list)

    def say(self, *events: Event) -> Script:
        """Say events in order; each state goes through its bytes, as over a restart."""
        self.effects = []
        for event in events:
            decision = slots.decide(self.slot, event)
            self.slot = decode_state(encode_state(decision.state))
            self.effects += decision.effects
        return self

    @property
    def notes(self) -> list[str]:
        """Names of the events for the hub."""
        return [effect.name for effect in self.effects if isinstance(effect, Note)]

    def stands(self, phase: Phase) -> None:
        """The slot is in this phase now."""
        assert self.slot.phase is phase

    def wants(self, *effects: Effect) -> None:
        """These were wanted, in this order, whatever stands between them."""
        rest = iter(self.effects)
        for effect in effects:
            assert any(effect == one for one in rest), f"{effect} is missing or out of order in {self.effects}"

    def wants_no(self, *kinds: type) -> None:
        """Nothing of these kinds was wanted."""
        assert not [effect for effect in self.effects if isinstance(effect, kinds)]


def on_probation(version: str, *, at: int, floor: int = 0) -> list[Event]:
    """What brings a release from its offer to its probation."""
    name = key(version, floor=floor)
    arriving: list[Event] = [offer(version, at=at, floor=floor), FilesHere(name), FilesVerified(name)]
    return [*arriving, WarmUpAllowed(name), HostReady(name)]


def committed(version: str, *, at: int, floor: int = 0) -> list[Event]:
    """What brings a release from its offer to its commitment."""
    name = key(version, floor=floor)
    good: list[Event] = [AnswerGood(name)] * PROBATION.good_answers
    return [*on_probation(version, at=at, floor=floor), *good, ProbationTimedOut()]


def host_lost(name: str) -> HostFailed:
    """The host ended without having been stopped."""
    return HostFailed(key=name, code="model.host_lost", message="signal 9", retry=True)
