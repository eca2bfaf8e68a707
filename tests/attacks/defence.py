"""What the tables are made of: a defence, the test that shows it, and how it is taken out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Removal = tuple[str, Any]
"""A place (`module.name`, as monkeypatch takes it) and what stands there when the defence is gone."""


@dataclass(frozen=True, eq=False)
class Defence:
    """One defence against one attack.

    Attributes:
        row: the attack's number in docs/attacks.md.
        test: pytest's name of the test that shows the attack refused; with `[case]` only that case.
        removals: what is to be taken out; several where another defence stands behind the first.
        may_hang: without the defence the test need not come to an end.
    """

    row: int
    test: str
    removals: tuple[Removal, ...]
    may_hang: bool = False

    @property
    def names(self) -> str:
        """The places, for people."""
        return ", ".join(place for place, _ in self.removals)


def against(row: int, test: str, *removals: str | Removal, may_hang: bool = False) -> Defence:
    """A defence; a place without a stand-in does nothing and returns nothing when it is gone."""
    pairs = tuple((one, nothing) if isinstance(one, str) else one for one in removals)
    return Defence(row, test, pairs, may_hang)


def nothing(*_: Any, **__: Any) -> None:
    """Stands where a check stood."""


def always(value: Any) -> Callable[..., Any]:
    """Stands where a question stood: this is always the answer."""
    return lambda *_, **__: value
