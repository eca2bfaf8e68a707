"""Which rung answers, why, and that the ladder does not flutter."""

from __future__ import annotations

import pytest

from edge_agent.core.ladder import (
    CALM,
    CROWDED,
    LADDER,
    Choice,
    Ladder,
    Situation,
    Step,
    choose,
    situation,
)
from shared.limits import MAX_WAITING_REQUESTS


def at(waiting: int, *, up: bool = True, loaded: bool = True) -> Situation:
    return situation(loaded=loaded, up=up, waiting=waiting)


def after(*situations: Situation) -> Ladder:
    ladder = Ladder()
    for now in situations:
        ladder = LADDER.decide(ladder, now).state
    return ladder


@pytest.mark.parametrize(
    ("situations", "step"),
    [
        ([at(0)], Step.FULL),
        ([at(CROWDED - 1)], Step.FULL),
        ([at(CROWDED)], Step.CACHED),
        ([at(CROWDED), at(CROWDED - 1)], Step.CACHED),
        ([at(CROWDED), at(CALM)], Step.CACHED),
        ([at(CROWDED), at(CALM - 1)], Step.FULL),
        ([at(CROWDED), at(CALM - 1), at(CALM)], Step.FULL),
        ([at(0, up=False)], Step.CACHED),
        ([at(0, up=False), at(0)], Step.FULL),
        ([at(0, up=False), at(CALM)], Step.FULL),
        ([at(CROWDED), at(CROWDED, up=False), at(CALM)], Step.FULL),
        ([at(0, up=False), at(CROWDED), at(CALM)], Step.CACHED),
        ([at(0, loaded=False)], Step.REFUSE),
        ([at(0, loaded=False), at(0, up=False)], Step.CACHED),
        ([at(0, loaded=False), at(CALM)], Step.FULL),
        ([at(0, loaded=False), at(CROWDED)], Step.CACHED),
        ([at(0, up=False), at(0, up=False, loaded=False)], Step.REFUSE),
    ],
)
def test_where_it_stands(situations: list[Situation], step: Step) -> None:
    assert after(*situations).step is step


def test_every_situation_is_known_in_every_step() -> None:
    kinds = {type(now) for now in (at(0), at(CALM), at(CROWDED), at(0, up=False), at(0, loaded=False))}
    assert len(kinds) == 5
    assert set(LADDER.rows) == {(step, kind) for step in Step for kind in kinds}


def test_load_around_the_mark_does_not_make_it_flutter() -> None:
    ladder, steps = Ladder(), []
    for waiting in [CROWDED - 1, CROWDED] * 20:
        ladder = LADDER.decide(ladder, at(waiting)).state
        steps.append(ladder.step)
    assert steps == [Step.FULL] + [Step.CACHED] * 39


def test_what_may_wait_leaves_places_at_the_door_and_shrinks_while_crowded() -> None:
    assert after(at(0)).most_waiting == CROWDED < MAX_WAITING_REQUESTS
    assert after(at(CROWDED)).most_waiting == CALM
    assert after(at(0, up=False)).most_waiting == CROWDED


FULL, GONE, EMPTY = after(at(0)), after(at(0, up=False)), after(at(0, loaded=False))


@pytest.mark.parametrize(
    ("ladder", "hit", "cloud", "choice"),
    [
        (FULL, False, False, Choice("full")),
        (FULL, False, True, Choice("full")),
        (GONE, True, True, Choice("cached", kept=True, reason="w")),
        (GONE, False, True, Choice("cloud", reason="w")),
        (GONE, False, False, Choice("refused", reason="w")),
        (EMPTY, False, True, Choice("cloud", reason="w")),
        (EMPTY, False, False, Choice("refused", reason="w")),
        (after(at(CROWDED)), True, False, Choice("cached", kept=True, reason="w")),
    ],
)
def test_who_answers(ladder: Ladder, hit: bool, cloud: bool, choice: Choice) -> None:
    assert choose(ladder, hit=hit, cloud=cloud, why="w") == choice


def test_a_kept_answer_is_called_cached_only_where_the_model_could_not_have_given_it() -> None:
    saved = choose(FULL, hit=True, cloud=True, left_ms=50, expected_ms=49)
    assert (saved.rung, saved.kept) == ("full", True)
    assert "kept" in saved.reason
    hurried = choose(FULL, hit=True, cloud=True, left_ms=50, expected_ms=51)
    assert (hurried.rung, hurried.kept) == ("cached", True)
    assert "50 ms are left" in hurried.reason
