"""Two thousand worlds in which everything goes wrong that can, and nothing is lost in any; and a seed is a world."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.sim.profiles import PROFILES
from tests.sim.run import run

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 2_000
PART = 100
REACHED = (
    "effects", "doubtful_effects", "lost", "sent_again", "batches_again", "buried",
    "refused", "conflicts", "epochs", "gap.evicted", "gap.expired", "gap.dropped", "gap.damaged",
)  # fmt: skip


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_every_property_holds(first: int) -> None:
    broken = [outcome for seed in range(first, first + PART) if (outcome := run("mixed", seed)).violation]
    assert not broken, [(outcome.seed, outcome.violation) for outcome in broken]


@pytest.mark.parametrize("profile", sorted(set(PROFILES) - {"mixed"}))
def test_every_property_holds_in_each_profile(profile: str) -> None:
    broken = [outcome for seed in range(20) if (outcome := run(profile, seed)).violation]
    assert not broken, [(outcome.seed, outcome.violation) for outcome in broken]


def test_the_worlds_reach_what_they_are_made_for() -> None:
    total = Counter[str]()
    for profile in ("power", "fullness", "network", "clocks", "rot", "copies"):
        for seed in range(30):
            total.update(run(profile, seed).figures)
    assert [name for name in REACHED if not total[name]] == []


def test_a_calm_world_loses_and_repeats_nothing() -> None:
    for seed in range(20):
        figures = run("calm", seed).figures
        assert figures["effects"] == figures["records"] > 0
        assert figures["lost"] == 0


def test_a_seed_is_the_same_world_each_time() -> None:
    for profile in ("mixed", "fleet", "slots"):
        assert run(profile, 7, traced=True).digest == run(profile, 7, traced=True).digest
    assert run("mixed", 7, traced=True).digest != run("mixed", 8, traced=True).digest


def test_tracing_changes_nothing() -> None:
    for seed in range(20):
        assert run("mixed", seed, traced=True).figures == run("mixed", seed).figures


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_another_process_with_another_hash_seed_has_the_same_worlds(hash_seed: str) -> None:
    code = "from tests.sim.run import run\nfor s in range(12): print(run('mixed', s, traced=True).digest)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True, text=True, check=True, timeout=50,
    )  # fmt: skip
    assert done.stdout.split() == [run("mixed", seed, traced=True).digest for seed in range(12)]
