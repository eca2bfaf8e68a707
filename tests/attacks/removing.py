"""Runs tests with a defence taken out, in one process: a test that still passes then shows nothing.

    python -m tests.attacks [ROW …]        one line of JSON for each defence

Each test runs twice, as it is and without the defence. Every fixture is made anew for each run, so that none of them
was built while the defence was there. Only an assertion or an error of the test itself counts as its failure: one that
fails while it is set up says nothing of the attack. One that takes too long counts only where the table says that it
may hang, because a slow test would look the same when its removal does nothing.
"""

from __future__ import annotations

import gc
import math
import signal
import time
import warnings
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import pytest
from _pytest.runner import runtestprotocol

from tests.attacks.defence import Defence

MAX_RUN_S: Final = 60
"""Of one test as it is."""
MIN_BARE_S: Final = 5
BARE_TIMES: Final = 4
"""Without its defence a test may hang: it is ended after so many times what it takes with it, at least MIN_BARE_S."""
MAX_WHY_CHARS: Final = 160


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How one test did.

    Attributes:
        guarded: with the defence: `passed`, `failed`, `broken` (before or after the test itself), `hung` or `skipped`.
        bare: without it.
        why: what failed then, for people.
    """

    row: int
    test: str
    removed: str
    guarded: str
    bare: str
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether the attack is refused because of the defence."""
        return (self.guarded == "passed" and self.bare == "failed") or self.guarded == "skipped"


class Run(msgspec.Struct, frozen=True):
    """What became of one run of one test."""

    outcome: str
    why: str = ""


class Removing:
    """A plugin for pytest that runs each collected test as the table says."""

    def __init__(self, defences: Sequence[Defence]) -> None:
        self._defences = defences
        self._runs: dict[Defence, list[tuple[Run, Run]]] = {defence: [] for defence in defences}

    def verdicts(self) -> list[Verdict]:
        """One for each defence; a parametrized test counts as failed when any of its cases did."""
        return [_verdict(defence, runs) for defence, runs in self._runs.items()]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """Run the item once for each defence that names it, and once as it is."""
        asked = [defence for defence in self._defences if item.nodeid.split("[")[0] == defence.test.split("[")[0]]
        asked = [defence for defence in asked if "[" not in defence.test or defence.test == item.nodeid]
        # One case that fails is enough; the others would only take their time.
        waiting = [defence for defence in asked if not any(bare.outcome == "failed" for _, bare in self._runs[defence])]
        if not waiting:
            return True
        began_s = time.monotonic()
        guarded = _run(item, within_s=MAX_RUN_S)
        within_s = max(MIN_BARE_S, math.ceil(BARE_TIMES * (time.monotonic() - began_s)))
        for defence in waiting:
            bare = Run("skipped")
            if guarded.outcome == "passed":
                bare = _run_without(defence, item, within_s=within_s)
                _forget()
            self._runs[defence].append((guarded, bare))
        return True


def run(defences: Sequence[Defence]) -> list[Verdict]:
    """Run all of them in this process."""
    plugin = Removing(defences)
    tests = sorted({defence.test for defence in defences})
    # The tables load the project, and with it packages whose plugins for pytest would have been rewritten else.
    quiet = ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
    pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", *quiet, *tests], plugins=[plugin])
    return plugin.verdicts()


def _verdict(defence: Defence, runs: Sequence[tuple[Run, Run]]) -> Verdict:
    guarded, bare = [one for one, _ in runs], [one for _, one in runs]
    failed = [one for one in bare if one.outcome == "failed" or (defence.may_hang and one.outcome == "hung")]
    worst = _worst(bare) if not failed else failed[0]
    return Verdict(
        row=defence.row,
        test=defence.test,
        removed=defence.names,
        guarded=_worst(guarded).outcome,
        bare="failed" if failed else worst.outcome,
        why=worst.why,
    )


def _run_without(defence: Defence, item: pytest.Item, *, within_s: int) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        for place, stand_in in defence.removals:
            try:
                patch.setattr(place, stand_in)
            except (AttributeError, ImportError) as error:
                return Run("missing", f"there is no {place}: {error}"[:MAX_WHY_CHARS])
        return _run(item, within_s=within_s)


def _run(item: pytest.Item, *, within_s: int) -> Run:
    expired: list[str] = []

    def expire(*_: Any) -> None:
        expired.append(f"longer than {within_s} s")
        raise TimeoutError(expired[0])

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(within_s)
    try:
        if hasattr(item, "_initrequest"):
            item._initrequest()
        reports = runtestprotocol(item, log=False, nextitem=None)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    # The test may have caught what ended it, and say something of its own.
    return Run("hung", expired[0]) if expired else _worst([_told(report) for report in reports])


def _told(report: pytest.TestReport) -> Run:
    crash = getattr(report.longrepr, "reprcrash", None)
    why = str(getattr(crash, "message", "")).splitlines()[:1]
    outcome = "broken" if report.failed and report.when != "call" else report.outcome
    return Run(outcome, why[0][:MAX_WHY_CHARS] if why else "")


def _worst(runs: Sequence[Run]) -> Run:
    for outcome in ("failed", "broken", "hung", "skipped", "passed"):
        for one in runs:
            if one.outcome == outcome:
                return one
    return Run("missing")


def _forget() -> None:
    """Let go of what a failed test has left open, before it is held against the next one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
