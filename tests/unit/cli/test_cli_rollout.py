"""`outrider rollout`: what is asked of the hub, what people and programs see, exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.fakes.small_hub import Asked, SmallHub
from tests.unit.cli.conftest import Run

READING = {
    "gate": "outcomes",
    "verdict": "fail",
    "why": "answers worse than before",
    "figures": {"wrong": 31, "p": 0.5},
}


def rollout(phase: str = "running", **more: Any) -> dict[str, Any]:
    return {
        "id": "digits-1.1.0-1",
        "family": "digits",
        "version": "1.1.0",
        "phase": phase,
        "reason": "",
        "stage": {"number": 1, "of": 3, "size": 1, "phase": "soaking", "since_ms": 1},
        "eligible": 4,
        "devices": {"waiting": 3, "offered": 0, "healthy": 1, "harmed": 0, "unresolved": 0},
        "max_harmed": 1,
        "gates": [READING],
        "created_ms": 1,
        "created_by": "token:ann",
        "started_ms": 1,
        "ended_ms": None,
        "unknown_field": 1,
        **more,
    }


DEVICE = {"device": "pi-1", "condition": "healthy", "wish": "target", "before": "1.0.0", "reason": "", "position": 0}


def prepare(hub: SmallHub, phase: str = "running", **more: Any) -> None:
    document = rollout(phase, **more)
    hub.answers[("POST", "/v1/rollouts")] = (201, document)
    hub.answers[("GET", "/v1/rollouts/digits-1.1.0-1")] = (200, document)
    hub.answers[("GET", "/v1/rollouts/digits-1.1.0-1/devices")] = (200, {"items": [DEVICE], "next": None})


def sent(hub: SmallHub) -> Any:
    return msgspec.json.decode(hub.asked[-1].body)


def test_a_release_and_options_become_a_specification(logged_in: SmallHub, run: Run) -> None:
    prepare(logged_in)
    ended = run(
        "rollout", "start", "digits/1.1.0", "--selector", "site=north", "--stages", "1,50%,100%", "--soak", "0",
        "--max-harmed", "0", "--min-answers", "5", "--deadline", "60", "--gates", "devices,outcomes",
        "--margin", "0.2", "--max-ratio", "3",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.out == "digits-1.1.0-1: started\n"
    assert sent(logged_in) == {
        "draft": False,
        "spec": {
            "family": "digits",
            "version": "1.1.0",
            "select": {"labels": {"site": "north"}},
            "stages": ["1", "50%", "100%"],
            "soak_s": 0,
            "max_harmed": 0,
            "min_answers": 5,
            "deadline_s": 60,
            "gates": {
                "devices": {"enabled": True},
                "outcomes": {"enabled": True, "margin": 0.2},
                "latency": {"enabled": False, "max_ratio": 3.0},
            },
        },
    }


def test_a_file_says_it_and_options_say_more(logged_in: SmallHub, run: Run, tmp_path: Path) -> None:
    prepare(logged_in)
    file = tmp_path / "rollout.toml"
    file.write_text('family = "digits"\nversion = "1.1.0"\nsoak_s = 9\n[gates.outcomes]\nmargin = 0.1\n')
    ended = run("rollout", "start", "rollout.toml", "--soak", "5", "--draft", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["unknown_field"] == 1
    body = sent(logged_in)
    assert (body["draft"], body["spec"]["soak_s"]) == (True, 5)
    assert body["spec"]["gates"] == {"outcomes": {"margin": 0.1}}


def test_a_draft_is_started_by_its_name(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("POST", "/v1/rollouts/digits-1.1.0-1/start")] = (200, rollout())
    assert run("rollout", "start", "digits-1.1.0-1").code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("start", "digits-1.1.0-1", "--soak", "10"),
        ("start", "digits-1.1.0-1", "--max-harmed", "0"),
        ("start", "digits-1.1.0-1", "--all"),
        ("start", "digits-1.1.0-1", "--selector", "site=north"),
        ("start", "digits-1.1.0-1", "--draft"),
        ("start", "digits/1.1.0", "--draft", "--wait"),
        ("start", "digits/1.1.0", "--timeout", "5"),
        ("status", "--wait"),
        ("status", "digits-1.1.0-1", "--timeout", "5"),
        ("status", "digits-1.1.0-1", "--watch", "--wait"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(logged_in: SmallHub, run: Run, words: tuple[str, ...]) -> None:
    prepare(logged_in)
    ended = run("rollout", *words)
    assert ended.code == 2, ended.err
    assert "does nothing here" in ended.err
    assert logged_in.asked == []


def test_a_plan_is_not_made_of_a_draft(logged_in: SmallHub, run: Run) -> None:
    assert "DRAFT" not in run("rollout", "plan", "--help").out
    assert run("rollout", "plan", "digits-1.1.0-1").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("digits/1.1.0", "--stages", "50%,5%,100%"),
        ("digits/1.1.0", "--stages", "50%"),
        ("digits/1.1.0", "--gates", "speed"),
        ("digits/1.1.0", "--selector", "north"),
        ("digits/1.1.0", "--margin", "0"),
        ("digits/1.1.0", "--all", "--device", "pi-1"),
        ("digits/one",),
        ("no such thing",),
    ],
)
def test_what_makes_no_sense_never_reaches_the_hub(logged_in: SmallHub, run: Run, arguments: tuple[str, ...]) -> None:
    ended = run("rollout", "start", *arguments)
    assert ended.code == 2, ended.err
    assert "error:" in ended.err
    assert logged_in.asked == []


@pytest.mark.parametrize("text", ["family = ", 'family = "digits"', 'family = "digits"\nversion = "1.0.0"\nwhat = 1'])
def test_a_file_that_is_no_rollout_is_refused(logged_in: SmallHub, run: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "rollout.toml").write_text(text)
    assert run("rollout", "plan", "rollout.toml").code == 2


@pytest.mark.parametrize(("phase", "code"), [("completed", 0), ("rolled_back", 7), ("aborted", 7)])
def test_waiting_ends_with_how_it_ended(logged_in: SmallHub, run: Run, phase: str, code: int) -> None:
    prepare(logged_in, phase, reason="outcomes: answers worse than before", ended_ms=2)
    ended = run("rollout", "start", "digits/1.1.0", "--wait", "--json")
    assert ended.code == code
    assert ended.json["phase"] == phase
    assert ("rollout explain" in ended.err) is (code == 7)


def test_waiting_follows_the_rollout_and_a_hub_that_is_away_is_waited_for(
    logged_in: SmallHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_hub.cli.rollouts.POLL_MS", 1)
    prepare(logged_in)
    answers = [
        (503, {"detail": "restarting", "code": "transfer.unreachable"}),
        (200, rollout(stage={"number": 2, "of": 3, "size": 2, "phase": "applying"})),
        (200, rollout("completed")),
    ]
    logged_in.answers[("GET", "/v1/rollouts/digits-1.1.0-1")] = lambda _: answers.pop(0)
    ended = run("rollout", "start", "digits/1.1.0", "--wait")
    assert ended.code == 0, ended.err
    assert "stage 2/3 applying" in ended.err
    assert "completed" in ended.out


def test_a_wait_that_takes_too_long_ends_with_eight(
    logged_in: SmallHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud_hub.cli.rollouts.POLL_MS", 200)
    prepare(logged_in)
    ended = run("rollout", "status", "digits-1.1.0-1", "--wait", "--timeout", "1")
    assert ended.code == 8
    assert "still running" in ended.err


def test_status_shows_stage_gates_and_devices(logged_in: SmallHub, run: Run) -> None:
    prepare(logged_in, returned=1, outstanding=2)
    ended = run("rollout", "status", "digits-1.1.0-1")
    assert ended.code == 0, ended.err
    for part in ("1 of 3", "1 healthy", "answers worse than before", "pi-1", "1 returned, 2 not yet"):
        assert part in ended.out
    assert run("rollout", "status", "digits-1.1.0-1", "--json").json["id"] == "digits-1.1.0-1"


def test_status_without_a_name_lists_all(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("GET", "/v1/rollouts")] = (200, {"items": [rollout()], "next": None})
    lines = run("rollout", "status").out.splitlines()
    assert lines[0].split()[:3] == ["ROLLOUT", "RELEASE", "PHASE"]
    assert lines[1].split()[:3] == ["digits-1.1.0-1", "digits/1.1.0", "running"]
    assert run("ls", "rollouts", "--json").json["items"][0]["id"] == "digits-1.1.0-1"


def test_explain_shows_each_decision_with_its_numbers(logged_in: SmallHub, run: Run) -> None:
    decision = {"seq": 1, "at_ms": 1, "actor": "hub", "kind": "failed", "text": "rolls back", "readings": [READING]}
    path = "/v1/rollouts/digits-1.1.0-1/decisions"
    logged_in.answers[("GET", path)] = (200, {"items": [decision], "next": None})
    ended = run("rollout", "explain", "digits-1.1.0-1")
    assert "failed: rolls back" in ended.out
    assert "outcomes fail: answers worse than before" in ended.out
    assert "wrong=31 p=0.5" in ended.out
    assert run("rollout", "explain", "digits-1.1.0-1", "--json").json["items"][0]["readings"][0]["gate"] == "outcomes"


@pytest.mark.parametrize(
    ("words", "path", "body"),
    [
        (("pause", "--reason", "lunch"), "pause", {"reason": "lunch"}),
        (("resume",), "resume", {}),
        (("abort",), "abort", {"revert": True}),
        (("abort", "--keep"), "abort", {"revert": False}),
    ],
)
def test_steering(logged_in: SmallHub, run: Run, words: tuple[str, ...], path: str, body: dict[str, Any]) -> None:
    logged_in.answers[("POST", f"/v1/rollouts/digits-1.1.0-1/{path}")] = (200, rollout("paused"))
    verb, *options = words
    ended = run("rollout", verb, "digits-1.1.0-1", *options)
    assert ended.code == 0, ended.err
    assert sent(logged_in) == body


def test_a_conflict_ends_with_six_and_a_stranger_with_three(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("POST", "/v1/rollouts")] = (409, {"detail": "in rollout x", "code": "conflict.rollout"})
    assert run("rollout", "start", "digits/1.1.0").code == 6
    logged_in.answers[("GET", "/v1/rollouts/none")] = (404, {"detail": "no rollout", "code": "not_found.rollout"})
    assert run("rollout", "status", "none").code == 3
    assert run("rollout", "status", "../whoami").code == 2


def test_a_plan_shows_stages_power_and_who_is_left_out(logged_in: SmallHub, run: Run) -> None:
    plan = {
        "family": "digits", "version": "1.1.0", "manifest": "1" * 64, "eligible": ["pi-1", "pi-2"],
        "skipped": [{"device": "pi-9", "reason": "runs it already"}], "unreachable": 0, "without_before": 0,
        "stages": [{"number": 1, "devices": 1, "added": 1, "profiles": {"pi4": 1}, "missed_rate": 0.95, "bytes": 9}],
        "bytes_per_device": 9, "bytes": 18, "max_harmed": 1, "before_told": 600, "before_wrong": 15,
        "answers_to_find": 45, "answers_to_clear": 140, "least_s": 60, "warnings": ["mind the gap"],
    }  # fmt: skip

    def answer(asked: Asked) -> tuple[int, Any]:
        assert msgspec.json.decode(asked.body) == {"family": "digits", "version": "1.1.0"}
        return 200, plan

    logged_in.answers[("POST", "/v1/rollouts/plan")] = answer
    ended = run("rollout", "plan", "digits/1.1.0")
    assert ended.code == 0, ended.err
    for part in ("2 devices", "< 95.0%", "15 of 600 answers wrong", "about 45 answers", "pi-9", "runs it already"):
        assert part in ended.out
    assert "mind the gap" in ended.err
    assert run("rollout", "plan", "digits/1.1.0", "--json").json == plan
