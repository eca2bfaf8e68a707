"""Who may load a model next: one at a time, because loading is when a device is short of memory and processor time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_agent.core import sets
from edge_agent.core.slot_values import Phase, Slot
from shared.ids import FamilyName


class WarmUps:
    """The slots that wait for their turn to load."""

    def __init__(self, *, allow: Callable[[FamilyName, str], None]) -> None:
        """`allow` tells a slot that the release with this key may be loaded."""
        self._allow = allow
        self._waiting: list[tuple[FamilyName, str]] = []
        self._allowed = False

    def ask(self, family: FamilyName, key: str) -> None:
        """Wait for a turn."""
        self._waiting.append((family, key))

    def cancel(self, family: FamilyName, key: str) -> None:
        """Wait no longer."""
        self._waiting = [entry for entry in self._waiting if entry != (family, key)]

    def heard(self) -> None:
        """The slot that was allowed has heard of it."""
        self._allowed = False

    def admit(self, slots: Mapping[FamilyName, Slot]) -> None:
        """Allow the next one, unless one is allowed or loading."""
        if self._allowed or not self._waiting:
            return  # an allowance counts from when it was given, not from when its slot hears of it
        if any(slot.phase is Phase.WARMUP for slot in slots.values()):
            return
        # Those that others of their set wait for come first, so that no two sets wait for each other's memory.
        admitted = (entry for entry in self._waiting if sets.may_warm_up(slots, entry[0]))
        entry = next(admitted, self._waiting[0])
        self._allowed = True
        self._waiting.remove(entry)
        self._allow(*entry)
