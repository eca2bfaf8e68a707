"""What a planted fault is, and how it is planted and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from tests.sim.parts import Parts


@dataclass(frozen=True, slots=True)
class Patch:
    """While it lasts, `owner.name` is what `make` makes of what it was."""

    owner: Any
    name: str
    make: Callable[[Any], Any]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """For the length of a block."""
        original = self.owner.__dict__[self.name]
        setattr(self.owner, self.name, self.make(original))
        try:
            yield
        finally:
            setattr(self.owner, self.name, original)


def _same(parts: Parts) -> Parts:
    return parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that somebody might get wrong.

    Attributes:
        what: in a sentence.
        profile: in which it shows soonest.
        shows_as: the properties that may report it.
    """

    what: str
    profile: str
    shows_as: frozenset[str]
    parts: Callable[[Parts], Parts] = _same
    patches: tuple[Patch, ...] = ()

    @contextmanager
    def planted(self, honest: Parts) -> Iterator[Parts]:
        """The parts with the fault in them, for the length of a block."""
        with ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch.applied())
            yield self.parts(honest)
