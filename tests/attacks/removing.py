"""Runs tests with a defence taken out, in one process: a test that still passes then shows nothing.

    python -m tests.attacks [ROW …]        one line of JSON for each defence

Each test runs twice, as it is and without the defence. Every fixture is made anew for each run, so that none of them
was built while the defence was there.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import pytest
from _pytest.runner import runtestprotocol

from tests.attacks.defence import Defence

MAX_RUN_S: Final = 60
"""Without its defence a test may hang, which counts as failed."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How one test did: `guarded` with the defence, `bare` without it."""

    row: int
    test: str
    removed: str
    guarded: str
    bare: str

    @property
    def holds(self) -> bool:
        """Whether the attack is refused because of the defence."""
        return (self.guarded == "passed" and self.bare == "failed") or self.guarded == "skipped"


class Removing:
    """A plugin for pytest that runs each collected test as the table says."""

    def __init__(self, defences: Sequence[Defence]) -> None:
        self._defences = defences
        self._runs: dict[Defence, list[tuple[str, str]]] = {defence: [] for defence in defences}

    def verdicts(self) -> list[Verdict]:
        """One for each defence; a parametrized test counts as failed when any of its cases did."""
        return [
            Verdict(
                row=defence.row,
                test=defence.test,
                removed=defence.names,
                guarded=_worst([guarded for guarded, _ in runs]),
                bare="failed" if any(bare == "failed" for _, bare in runs) else "passed" if runs else "missing",
            )
            for defence, runs in self._runs.items()
        ]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """Run the item once for each defence that names it, and once as it is."""
        asked = [defence for defence in self._defences if item.nodeid.split("[")[0] == defence.test.split("[")[0]]
        asked = [defence for defence in asked if "[" not in defence.test or defence.test == item.nodeid]
        if not asked:
            return True
        guarded = _run(item)
        for defence in asked:
            bare = "skipped"
            if guarded == "passed":
                with pytest.MonkeyPatch.context() as patch:
                    for place, stand_in in defence.removals:
                        patch.setattr(place, stand_in)
                    bare = _run(item)
            self._runs[defence].append((guarded, bare))
        return True


def run(defences: Sequence[Defence]) -> list[Verdict]:
    """Run all of them in this process."""
    plugin = Removing(defences)
    tests = sorted({defence.test.split("[")[0] for defence in defences})
    # The tables load the project, and with it packages whose plugins for pytest would have been rewritten else.
    quiet = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *quiet, *tests], plugins=[plugin])
    return plugin.verdicts()


def _run(item: pytest.Item) -> str:
    def expire(*_: Any) -> None:
        raise TimeoutError(f"{item.nodeid} ran longer than {MAX_RUN_S} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(MAX_RUN_S)
    try:
        if hasattr(item, "_initrequest"):
            item._initrequest()
        reports = runtestprotocol(item, log=False, nextitem=None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return _worst([report.outcome for report in reports])


def _worst(outcomes: Sequence[str]) -> str:
    for outcome in ("failed", "skipped", "passed"):
        if outcome in outcomes:
            return outcome
    return "missing"
