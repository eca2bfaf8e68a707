"""The simulator is itself tried: it notices every planted fault, and the same seed is clean without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sim.faults import FAULTS
from tests.sim.profiles import PROFILES
from tests.sim.run import HONEST, Outcome, run

MOST_SEEDS = 2_000


def first_caught(name: str) -> Outcome:
    """What the first seed says that notices the fault."""
    fault = FAULTS[name]
    with fault.planted(HONEST) as parts:
        for seed in range(MOST_SEEDS):
            outcome = run(fault.profile, seed, parts=parts)
            if outcome.violation is not None:
                return outcome
    raise AssertionError(f"{name} was not noticed in {MOST_SEEDS} seeds of {fault.profile}")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed_and_without_it_the_same_seed_is_clean(name: str) -> None:
    caught = first_caught(name)
    assert caught.name in FAULTS[name].shows_as, caught.violation
    assert run(caught.profile, caught.seed).violation is None


def test_a_fault_is_gone_once_it_is_taken_out() -> None:
    for fault in FAULTS.values():
        before = [patch.owner.__dict__[patch.name] for patch in fault.patches]
        with fault.planted(HONEST):
            during = [patch.owner.__dict__[patch.name] for patch in fault.patches]
        assert all(one is not other for one, other in zip(before, during, strict=True))
        assert [patch.owner.__dict__[patch.name] for patch in fault.patches] == before


def test_the_document_names_every_fault_profile_and_property() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "simulator.md").read_text()
    shown = {name for fault in FAULTS.values() for name in fault.shows_as} - {"crash"}
    for name in {*FAULTS, *PROFILES, *shown}:
        assert f"`{name}`" in text, f"docs/simulator.md does not name {name}"
