"""What a rollout may be asked to be: selections, stages, limits."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from shared.errors import InvalidValue
from shared.rollout import harmed_limit, parse_spec, stage_sizes, unresolved_limit

LEAST: dict[str, Any] = {"family": "digits", "version": "1.1.0"}


def test_the_least_that_is_needed_is_a_release() -> None:
    spec = parse_spec(LEAST)
    assert spec.select.all
    assert spec.stages == ("1%", "5%", "25%", "50%", "100%")
    assert spec.gates.outcomes.enabled


def test_a_file_says_everything() -> None:
    text = """
    family = "digits"
    version = "1.1.0"
    stages = [1, "3", "50 %", "100%"]
    soak_s = 60
    max_harmed = 0
    [select]
    labels = { site = "north" }
    [gates.outcomes]
    margin = 0.1
    [gates.latency]
    enabled = false
    """
    spec = parse_spec(tomllib.loads(text))
    assert spec.select.labels == {"site": "north"}
    assert not spec.select.all
    assert stage_sizes(spec, 100) == (1, 3, 50, 100)
    assert (harmed_limit(spec, 100), unresolved_limit(spec, 100)) == (0, 0)
    assert (spec.gates.outcomes.margin, spec.gates.latency.enabled) == (0.1, False)


@pytest.mark.parametrize(
    ("eligible", "sizes"),
    [
        (0, ()),
        (1, (1,)),
        (4, (1, 2, 4)),
        (50, (1, 3, 13, 25, 50)),
        (1000, (10, 50, 250, 500, 1000)),
        (100, (1, 5, 25, 50, 100)),
    ],
)
def test_stages_grow_and_those_that_add_nobody_are_left_out(eligible: int, sizes: tuple[int, ...]) -> None:
    assert stage_sizes(parse_spec(LEAST), eligible) == sizes


@pytest.mark.parametrize(("eligible", "limit"), [(1, 1), (4, 1), (50, 3), (1000, 50)])
def test_the_limit_of_harmed_devices_is_a_number(eligible: int, limit: int) -> None:
    assert harmed_limit(parse_spec(LEAST), eligible) == limit


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": "1"}, "version"),
        ({"family": "Digits"}, "family"),
        ({"surprise": 1}, "surprise"),
        ({"select": {}}, "select"),
        ({"select": {"all": True, "labels": {"a": "b"}}}, "select"),
        ({"select": {"devices": ["no/slash"]}}, "device"),
        ({"stages": []}, "stages"),
        ({"stages": ["5%", "50%"]}, "stages"),
        ({"stages": ["50%", "5%", "100%"]}, "stages"),
        ({"stages": [5, 5, "100%"]}, "stages"),
        ({"stages": [0, "100%"]}, "stages"),
        ({"stages": ["0%", "100%"]}, "stages"),
        ({"stages": ["101%"]}, "stages"),
        ({"stages": ["some"]}, "stages"),
        ({"soak_s": -1}, "soak_s"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"max_harmed": -1}, "max_harmed"),
        ({"gates": {"outcomes": {"alpha": 0}}}, "alpha"),
        ({"gates": {"outcomes": {"margin": 0.01}}}, "margin"),
        ({"gates": {"outcomes": {"margin": float("nan")}}}, "margin"),
        ({"gates": {"devices": {"tolerated": 0.2}}}, "tolerated"),
        ({"gates": {"latency": {"max_ratio": 0.5}}}, "max_ratio"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValue, match=field):
        parse_spec({**LEAST, **change})
