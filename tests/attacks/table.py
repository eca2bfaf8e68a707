"""Attack, test, defence. The rows are numbered as in docs/attacks.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, eq=False)
class Defence:
    """One defence against one attack.

    Attributes:
        row: the attack's number.
        test: pytest's name of the test that shows the attack refused; with `[case]` only that case.
        removals: places (`module.name`, as monkeypatch takes them) and what stands there when the defence is gone.
    """

    row: int
    test: str
    removals: tuple[tuple[str, Any], ...]

    @property
    def names(self) -> str:
        """The places, for people."""
        return ", ".join(place for place, _ in self.removals)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


_TRUST: Final = "tests/unit/trust"
_GATE: Final = "tests/unit/shared/test_model_gate.py"

DEFENCES: Final[tuple[Defence, ...]] = (
    Defence(
        1,
        f"{_TRUST}/test_refresh_keys.py::test_metadata_signed_by_another_key_is_refused",
        (("shared.trust.metadata.check_signatures", _nothing),),
    ),
    Defence(
        5,
        f"{_TRUST}/test_refresh.py::test_expired_metadata_is_refused",
        (("shared.trust.metadata.check_fresh", _nothing),),
    ),
    Defence(
        8, f"{_TRUST}/test_refresh.py::test_rollback_is_refused", (("shared.trust.metadata.check_version", _nothing),)
    ),
    Defence(
        7,
        f"{_TRUST}/test_refresh.py::test_mixed_versions_are_refused",
        (("shared.trust.metadata.check_promise", _nothing),),
    ),
)

ELSEWHERE: Final[dict[int, str]] = {}
"""Rows without a test here, and why."""
