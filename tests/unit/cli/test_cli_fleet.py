"""Listing, showing, labels, audit: tables for people, documents for programs, exit codes for both."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from cloud_hub.cli import screen
from cloud_hub.cli.hub import MAX_ANSWER_BYTES
from tests.fakes.small_hub import Asked, SmallHub
from tests.unit.cli.conftest import Run


def device(name: str, **more: Any) -> dict[str, Any]:
    return {
        "id": name,
        "profile": "pi4",
        "online": True,
        "labels": {"site": "north"},
        "boot": 3,
        "last_seen_ms": 1,
        "assignment_version": 2,
        "agent_version": "0.1.0",
        "reported": {
            "models": [{"family": "digits", "phase": "committed", "version": "1.0.0"}],
            "queue_records": 4,
            "queue_bytes": 100,
        },
        "unknown_field": 1,
        **more,
    }


def test_a_list_follows_all_pages(logged_in: SmallHub, run: Run) -> None:
    def pages(asked: Asked) -> tuple[int, Any]:
        if "after=pi-1" in asked.query:
            return 200, {"items": [device("pi-2", online=False)], "next": None}
        return 200, {"items": [device("pi-1")], "next": "pi-1"}

    logged_in.answers[("GET", "/v1/devices")] = pages
    ended = run("ls", "devices")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].split()[:3] == ["DEVICE", "PROFILE", "LINK"]
    assert "digits/1.0.0 committed" in lines[1]
    assert lines[2].split()[:3] == ["pi-2", "pi4", "offline"]
    assert logged_in.asked[0].headers["Authorization"].startswith("Bearer orh_")


def test_json_shows_all_that_the_hub_said(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("GET", "/v1/devices")] = (200, {"items": [device("pi-1")], "next": None})
    assert run("ls", "devices", "--json").json["items"][0]["unknown_field"] == 1


def test_an_empty_list_says_so_on_stderr_only(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("GET", "/v1/releases")] = (200, {"items": [], "next": None})
    ended = run("ls", "releases")
    assert (ended.code, ended.out) == (0, "")
    assert "no releases" in ended.err


@pytest.mark.parametrize(
    ("status", "code", "exits"),
    [
        (401, "auth.unknown_token", 4),
        (403, "auth.role", 4),
        (404, "not_found", 3),
        (409, "conflict", 6),
        (422, "trust.signature", 9),
        (422, "invalid.labels", 2),
        (500, "internal", 1),
        (503, "storage", 5),
    ],
)
def test_exit_codes(logged_in: SmallHub, run: Run, status: int, code: str, exits: int) -> None:
    logged_in.answers[("GET", "/v1/devices/pi-1")] = (status, {"detail": "no", "code": code, "hint": "do this"})
    ended = run("get", "device", "pi-1")
    assert ended.code == exits
    assert ended.err == f"error: no\ncode: {code}\ntry: do this\n"
    assert ended.out == ""


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"items": 3}', b'{"items": [{"id": 3}]}', b"[" * 100_000])
def test_strange_answers_are_errors(logged_in: SmallHub, run: Run, body: bytes) -> None:
    logged_in.answers[("GET", "/v1/devices")] = (200, body)
    ended = run("ls", "devices")
    assert ended.code == 1
    assert "code: protocol.answer" in ended.err


def test_an_endless_answer_is_cut(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("GET", "/v1/devices")] = (200, b" " * (MAX_ANSWER_BYTES + 1))
    ended = run("ls", "devices")
    assert ended.code == 1
    assert "code: protocol.too_large" in ended.err


def test_labels_are_set_and_removed(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("PATCH", "/v1/devices/pi-1")] = (200, device("pi-1", labels={"a": "x=y"}))
    ended = run("device", "label", "pi-1", "a=x=y", "b-")
    assert (ended.code, ended.out) == (0, "pi-1: a=x=y\n")
    assert msgspec.json.decode(logged_in.asked[0].body) == {"labels": {"a": "x=y", "b": None}}


@pytest.mark.parametrize("change", ["=x", "b", "-"])
def test_odd_labels_never_reach_the_hub(logged_in: SmallHub, run: Run, change: str) -> None:
    assert run("device", "label", "pi-1", change).code == 2
    assert logged_in.asked == []


def test_a_queue_is_as_old_as_its_report(logged_in: SmallHub, run: Run) -> None:
    from cloud_hub.cli.system import SystemClock

    items = [
        device("pi-1", reported_ms=SystemClock().wall_ms() - 3 * 3_600_000),
        device("pi-2", reported_ms=None, reported=None),
    ]
    logged_in.answers[("GET", "/v1/devices")] = (200, {"items": items, "next": None})
    lines = run("ls", "devices").out.splitlines()
    assert "4 (3 h ago)" in lines[1]
    assert lines[2].split()[-2:] == ["-", "site=north"]


def test_one_device(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("GET", "/v1/devices/pi-1")] = (200, device("pi-1"))
    ended = run("get", "device", "pi-1")
    assert "digits/1.0.0 committed" in ended.out
    assert "4 records, 100 B" in ended.out


def test_audit(logged_in: SmallHub, run: Run) -> None:
    row = {"seq": 7, "at_ms": 0, "actor": "ann", "action": "device.labelled", "subject": "pi-1", "detail": {"a": "b"}}
    row["detail"] = {"a": "b c", "labels": {"site": "north", "old": None}, "uses": 1, "devices": ["x", "y"]}
    logged_in.answers[("GET", "/v1/audit")] = (200, {"items": [row], "next": None})
    ended = run("audit", "--after", "6")
    assert "1970-01-01 00:00:00  ann" in ended.out
    assert "after=6" in logged_in.asked[0].query
    assert ended.out.splitlines()[1].endswith("a=b c labels.site=north labels.old=null uses=1 devices=x,y")


def test_text_from_the_hub_cannot_move_the_cursor(logged_in: SmallHub, run: Run) -> None:
    logged_in.answers[("GET", "/v1/devices")] = (200, {"items": [device("pi-1", profile="\x1b[2Jx")], "next": None})
    assert "\x1b" not in run("ls", "devices").out


def test_tables_fit_the_terminal() -> None:
    lines = screen.table(["A", "B"], [["x" * 50, "y" * 60], ["1", "2"]], width=80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].endswith("…")
    assert lines[0].index("B") == lines[2].index("2")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["fly"], "invalid choice"), (["ls"], "required"), (["ls", "devices", "--js"], "unrecognized")],
)
def test_usage_errors(run: Run, arguments: list[str], said: str) -> None:
    ended = run(*arguments)
    assert ended.code == 2
    assert said in ended.err
    assert "code: usage" in ended.err


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom cloud_hub.cli.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'msgspec', 'ssl', 'http.client', 'numpy', 'tuf', 'cryptography'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_completion_knows_every_command(run: Run) -> None:
    script = run("completion", "bash").out
    words = "COMP_WORDS=(outrider release p); COMP_CWORD=2; _outrider; echo ${COMPREPLY[@]}"
    command = ["bash", "-c", f"{script}\n{words}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.stdout.split() == ["publish"]


def test_watching_ends_with_ctrl_c(logged_in: SmallHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    logged_in.answers[("GET", "/v1/devices")] = (200, {"items": [device("pi-1")], "next": None})
    looks = 0

    def wait(_clock: object, _duration_ms: int) -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("cloud_hub.cli.system.SystemClock.wait_ms", wait)
    ended = run("ls", "devices", "--watch", "--json")
    assert ended.code == 130
    assert [msgspec.json.decode(line)["items"][0]["id"] for line in ended.out.splitlines()] == ["pi-1", "pi-1"]


def test_a_device_is_revoked_with_a_reason(logged_in: SmallHub, run: Run) -> None:
    answer = {"id": "pi-1", "standing": "revoked", "reason": "stolen", "enforced": True}
    logged_in.answers[("POST", "/v1/devices/pi-1/revoke")] = (200, answer)
    ended = run("device", "revoke", "pi-1", "--reason", "stolen")
    assert (ended.code, ended.out) == (0, "pi-1: revoked; the hub takes nothing of it any more\n")
    assert msgspec.json.decode(logged_in.asked[0].body) == {"reason": "stolen"}


def test_a_broker_that_has_not_shown_it_is_told(logged_in: SmallHub, run: Run) -> None:
    answer = {"id": "pi-1", "standing": "revoked", "reason": "", "enforced": False}
    logged_in.answers[("POST", "/v1/devices/pi-1/revoke")] = (200, answer)
    ended = run("device", "revoke", "pi-1")
    assert ended.code == 5
    assert "code: transfer.broker" in ended.err
    assert "access list" in ended.err


def test_quarantine_and_its_end(logged_in: SmallHub, run: Run) -> None:
    path = "/v1/devices/pi-1/quarantine"
    logged_in.answers[("POST", path)] = (200, {"id": "pi-1", "standing": "quarantined"})
    logged_in.answers[("DELETE", path)] = (200, {"id": "pi-1", "standing": ""})
    assert run("device", "quarantine", "pi-1", "--reason", "odd").out == "pi-1: quarantined\n"
    assert run("device", "quarantine", "pi-1", "--lift").out == "pi-1: welcome again\n"
    assert run("device", "quarantine", "pi-1", "--lift", "--reason", "x").code == 2
    assert [asked.method for asked in logged_in.asked] == ["POST", "DELETE"]


def test_who_is_not_welcome_is_shown(logged_in: SmallHub, run: Run) -> None:
    barred = device("pi-1", standing="quarantined", standing_reason="one name in two places")
    logged_in.answers[("GET", "/v1/devices")] = (200, {"items": [barred], "next": None})
    logged_in.answers[("GET", "/v1/devices/pi-1")] = (200, barred)
    assert run("ls", "devices").out.splitlines()[1].split()[2] == "quarantined"
    assert "quarantined: one name in two places" in run("get", "device", "pi-1").out
