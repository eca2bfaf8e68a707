"""Planted faults: each takes the place of one part of the honest system, and the simulator must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from tests.sim.parts import Parts

Fault = Callable[[Parts], Parts]


def parts_with(name: str, honest: Parts) -> Parts:
    """The parts with this fault in them."""
    return FAULTS[name](honest)


FAULTS: Final[Mapping[str, Fault]] = MappingProxyType({})
