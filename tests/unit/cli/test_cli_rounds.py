"""`outrider round …`: what is asked of the hub, and what people and programs see."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cloud_hub.cli import hub as hub_room
from cloud_hub.cli import rounds
from shared.errors import Unreachable
from tests.fakes.small_hub import Asked, SmallHub
from tests.unit.cli.conftest import Run

START = ("round", "start", "--family", "digits", "--base", "1.0.0", "--as", "1.1.0")


def document(state: str = "running", *, rounds: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "run": "r-1",
        "state": state,
        "round": rounds,
        "spec": {"family": "digits", "base": "1.0.0", "version": "1.1.0", "rounds": 2, "strategy": "fedavg"},
        "features": "hidden_1",
        "created_ms": 1,
        "created_by": "token:ann",
        "accuracy": 0.5 if rounds else None,
        "rounds": [
            {
                "round": number + 1,
                "asked": 3,
                "accepted": 2,
                "took_ms": 120,
                "metrics": {"accuracy": 0.5, "train.accuracy": 0.9},
                "refused": {"dev-3": "no samples"},
            }
            for number in range(rounds)
        ],
        **more,
    }


def test_start_sends_only_what_was_given(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("POST", "/v1/rounds")] = (201, document())
    ended = run(*START, "--rounds", "20", "--selector", "site=a", "--round-timeout", "30")
    assert ended.code == 0, ended.err
    assert msgspec.json.decode(logged_in.asked[-1].body) == {
        "family": "digits",
        "base": "1.0.0",
        "version": "1.1.0",
        "rounds": 20,
        "selector": {"site": "a"},
        "round_timeout_s": 30.0,
        "evaluate": False,
    }
    assert "outrider round status r-1" in ended.err


def test_a_learned_run_needs_no_signature_afterwards(logged_in: SmallHub, run: Run) -> None:
    spec = {"family": "digits", "base": "1.0.0", "version": "1.0.0-learned.1", "rounds": 2}
    logged_in.answers[("POST", "/v1/rounds")] = (201, document("finished", rounds=2, spec=spec))
    ended = run(*START, "--learned")
    assert ended.code == 0, ended.err
    assert msgspec.json.decode(logged_in.asked[-1].body)["learned"] is True
    assert "next: outrider rollout start digits/1.0.0-learned.1" in ended.err
    assert "release sign" not in ended.err


def test_waiting_tells_of_each_round_and_ends_with_what_to_do_next(logged_in: SmallHub, run: Run) -> None:
    looks = [document(rounds=1), document(rounds=2), document("building", rounds=2), document("finished", rounds=2)]

    def look(_asked: Asked) -> tuple[int, Any]:
        return 200, looks.pop(0)

    logged_in.answers[("POST", "/v1/rounds")] = (201, document())
    logged_in.answers[("GET", "/v1/rounds/r-1")] = look
    ended = run(*START, "--wait")
    assert ended.code == 0, ended.err
    assert ended.err.count("round 1/2") == ended.err.count("round 2/2") == 1
    assert "outrider release sign digits/1.1.0" in ended.err
    assert "50.0%" in ended.out
    assert "dev-3: no samples" in ended.out


@pytest.mark.parametrize(
    "arguments", [(*START, "--wait"), ("round", "status", "r-1", "--wait")], ids=["start", "status"]
)
def test_a_hub_that_is_away_for_a_while_is_waited_for(
    logged_in: SmallHub, run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(rounds, "POLL_MS", 1)
    looks: list[tuple[int, Any]] = [
        (200, document(rounds=1)),
        (503, {"detail": "restarting", "code": "transfer.unreachable"}),
        (200, document("finished", rounds=2)),
    ]
    gone = [False, True, True, False]
    inner = hub_room.Hub.get

    def get(hub: hub_room.Hub, path: str, kind: Any, **more: Any) -> Any:
        if gone and gone.pop(0):
            raise Unreachable("nobody answers")
        return inner(hub, path, kind, **more)

    monkeypatch.setattr(hub_room.Hub, "get", get)
    logged_in.answers[("POST", "/v1/rounds")] = (201, document())
    logged_in.answers[("GET", "/v1/rounds/r-1")] = lambda _: looks.pop(0)
    ended = run(*arguments)
    assert ended.code == 0, ended.err
    assert ended.err.count("round 1/2") == ended.err.count("round 2/2") == 1
    assert (looks, gone) == ([], [])


def test_a_hub_that_says_no_while_it_is_watched_ends_the_wait(
    logged_in: SmallHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "POLL_MS", 1)
    looks: list[tuple[int, Any]] = [(200, document()), (401, {"detail": "expired", "code": "auth.expired_token"})]
    logged_in.answers[("GET", "/v1/rounds/r-1")] = lambda _: looks.pop(0)
    assert run("round", "status", "r-1", "--wait").code not in (0, 8)
    assert looks == []


def test_a_wait_that_takes_too_long_ends_with_eight(
    logged_in: SmallHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "POLL_MS", 200)
    logged_in.answers[("GET", "/v1/rounds/r-1")] = (200, document())
    ended = run("round", "status", "r-1", "--wait", "--wait-s", "1")
    assert ended.code == 8
    assert "still running" in ended.err


@pytest.mark.parametrize(("state", "code"), [("failed", 1), ("stopped", 7)])
def test_a_run_that_did_not_finish_ends_the_command_with_its_reason(
    logged_in: SmallHub, run: Run, state: str, code: int
) -> None:
    logged_in.answers[("POST", "/v1/rounds")] = (201, document())
    logged_in.answers[("GET", "/v1/rounds/r-1")] = (
        200, document(state, code="rounds.quorum", reason="too few", hint="wait longer"),
    )  # fmt: skip
    ended = run(*START, "--wait", "--json")
    assert ended.code == code
    assert ended.json["state"] == state
    assert "code: rounds.quorum" in ended.err
    assert "try: wait longer" in ended.err


def test_status_ls_and_stop(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("GET", "/v1/rounds/r-1")] = (200, document(rounds=1))
    logged_in.answers[("GET", "/v1/rounds")] = (200, {"items": [document(rounds=1)], "next": None})
    logged_in.answers[("POST", "/v1/rounds/r-1/stop")] = (200, document("stopped"))
    assert run("round", "status", "r-1", "--json").json["rounds"][0]["accepted"] == 2
    listed = run("round", "ls")
    assert "digits/1.0.0 -> 1.1.0" in listed.out
    assert "1/2" in listed.out
    assert run("round", "stop", "r-1").code == 0


@pytest.mark.parametrize(
    "arguments", [("round", "status", "../x"), (*START, "--selector", "site"), (*START, "--rounds", "0")]
)
def test_what_makes_no_sense_is_refused_before_the_hub_is_asked(
    logged_in: SmallHub, run: Run, arguments: tuple[str, ...]
) -> None:
    assert run(*arguments).code == 2
    assert not logged_in.asked
