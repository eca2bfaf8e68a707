"""The command line as a program sees it: stdout, stderr, exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from edge_agent.__main__ import foreign_shared, main
from edge_agent.commands.checks import check_time
from edge_agent.commands.enroll import read_token
from edge_agent.commands.exits import Exit, exit_of
from edge_agent.commands.status import duration, updates_line
from edge_agent.config import load_config
from edge_agent.core.trusted_time import BUILT_MS
from shared import errors
from shared.inference import (
    AgentState,
    Answer,
    Control,
    Describe,
    Description,
    Done,
    Infer,
    ModelState,
    Refusal,
    Reply,
    Request,
    Status,
)
from shared.limits import MIB
from shared.model import Signature, TensorSpec
from tests.fakes.door import FakeDoor

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ModelState(
    family="digits",
    phase="committed",
    version="1.0.0",
    variant="int8",
    digest="a" * 64,
    signature=Signature(
        inputs=(TensorSpec(name="image", dtype="fp32", shape=(-1, 4)),),
        outputs=(TensorSpec(name="scores", dtype="fp32", shape=(-1, 3)),),
    ),
    labels=("zero", "one", "two"),
)
STATE = AgentState(
    id="",
    device="dev-a",
    agent_version="0.1.0",
    profile="pi4",
    boot=3,
    pid=77,
    uptime_ms=3_725_000,
    link="offline",
    link_detail="the broker is away",
    models=(DIGITS,),
    queue={"event": 1, "outcome": 0, "result": 40, "reading": 1},
    queue_bytes=2048,
    queue_oldest_ms={"event": 90_061_000, "result": 5_000},
    queue_lost={"evicted": 7, "expired": 0},
    queue_buried=2,
    queue_buried_given_up=5,
    queue_unkept={"result": 8, "reading": 9},
    queue_written_bytes=4096,
    queue_syncs=3,
    assignment_version=2,
    updates={
        "day_bytes": 2 * MIB,
        "total_bytes": 9 * MIB,
        "saved_bytes": 5 * MIB,
        "patched": 3,
        "patch_failed": 1,
        "daily_bytes": 10 * MIB,
        "left_bytes": 8 * MIB,
    },
)


def answering(request: Request, payload: bytearray) -> tuple[Reply, bytes]:
    """An agent with one model, which says for each row the index of its first element."""
    match request:
        case Status(id=name):
            return named(STATE, name), b""
        case Describe(id=name):
            return Description(id=name, models=(DIGITS,)), b""
        case Control(id=name, command="queue.flush"):
            return Done(id=name, detail="link online"), b""
        case Control(id=name, command="queue.drop", argument=klass):
            return Done(id=name, detail=f"dropped {klass}"), b""
        case Control(id=name):
            return Refusal(id=name, code="release.no_previous", message="no earlier release", hint="see ls"), b""
        case Infer(id=name, inputs=(head,)):
            elements = list(memoryview(bytes(payload)).cast("f"))
            labels = tuple(DIGITS.labels[int(first)] for first in elements[:: head.shape[1]])
            return (
                Answer(
                    id=name,
                    model="digits",
                    version="1.0.0",
                    variant="int8",
                    digest="a" * 64,
                    rung="full",
                    labels=labels,
                    confidences=(0.9,) * len(labels),
                    outputs=(),
                    took_us=10,
                ),
                b"",
            )
        case _:
            raise AssertionError(request)


QUEUE = """\
CLASS    RECORDS  OLDEST
event    1        1 d 1 h
outcome  0        -
result   40       5 s
reading  1        -

on disk      2048 bytes
lost         7 evicted
never kept   9 reading, 8 result
put aside    2 batches, 5 more went to make room
since start  4096 bytes written, 3 syncs
link         offline
"""


def named(state: AgentState, name: str) -> AgentState:
    return AgentState(**{**{field: getattr(state, field) for field in state.__struct_fields__}, "id": name})


@pytest.fixture
def state(short_tmp: Path) -> Path:
    return short_tmp


def run(*words: str, state: Path) -> int:
    return main([*words, "--state", str(state)])


def test_status_for_people_and_for_programs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeDoor(state / "door.sock", answering):
        assert run("status", state=state) == 0
        text = capsys.readouterr().out
        for part in (
            "dev-a",
            "offline (the broker is away)",
            "42 records, 2048 bytes, the oldest for 1 d 1 h",
            "1 h 2 min",
            "committed",
            "2.0 MiB fetched in 24 h, 8.0 of 10.0 MiB left; 3 files patched (5.0 MiB saved), 1 patches failed",
        ):
            assert part in text
        assert run("status", "--json", state=state) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["queue"]["result"] == 40
    assert document["queue_lost"] == {"evicted": 7, "expired": 0}
    assert document["answered"] == 0
    assert document["models"][0]["digest"] == "a" * 64
    assert "id" not in document


def test_without_a_budget_nothing_is_said_of_what_is_left() -> None:
    assert updates_line({"day_bytes": 0, "patched": 0}) == "0.0 MiB fetched in 24 h"
    assert updates_line({}) == "0.0 MiB fetched in 24 h"


def test_queue_and_model(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeDoor(state / "door.sock", answering) as door:
        assert run("queue", "ls", "--json", state=state) == 0
        assert json.loads(capsys.readouterr().out) == {
            "records": STATE.queue, "oldest_ms": STATE.queue_oldest_ms, "bytes": 2048, "lost": STATE.queue_lost,
            "buried": 2, "buried_given_up": 5, "unkept": STATE.queue_unkept,
            "written_bytes": 4096, "syncs": 3, "link": "offline",
        }  # fmt: skip
        assert run("queue", "ls", state=state) == 0
        assert capsys.readouterr().out == QUEUE
        assert run("queue", "flush", state=state) == 0
        assert capsys.readouterr().out == "link online\n"
        assert run("queue", "drop", "reading", state=state) == 0
        assert capsys.readouterr().out == "dropped reading\n"
        with pytest.raises(SystemExit) as caught:
            run("queue", "drop", "event", state=state)
        assert caught.value.code == Exit.USAGE
        assert "choose from" in capsys.readouterr().err
        assert run("model", "ls", "--json", state=state) == 0
        assert json.loads(capsys.readouterr().out)["items"][0]["signature"]["inputs"][0]["shape"] == [-1, 4]
        assert run("model", "rollback", "digits", state=state) == Exit.CONFLICT
        assert capsys.readouterr().err == "error: no earlier release\ncode: release.no_previous\ntry: see ls\n"
        assert [item.command for item in door.asked if isinstance(item, Control)] == [
            "queue.flush", "queue.drop", "model.rollback",
        ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["csv", "json", "npy", "folder"])
def test_infer_reads_files_and_gives_a_line_per_row(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    import numpy as np

    rows = [[float(i % 3), 0, 0, 0] for i in range(7)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        path.write_text("a,b,c,d\n" + "\n".join(",".join(map(str, row)) for row in rows))
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "npy":
        np.save(path, np.array(rows, dtype="float64").reshape(7, 2, 2))
    else:
        path.mkdir()
        (path / "one.json").write_text(json.dumps(rows[:3]))
        (path / "two.json").write_text(json.dumps({"image": rows[3:]}))
        (path / "readme.txt").write_text("not read")
    with FakeDoor(state / "door.sock", answering) as door:
        assert run("infer", "digits", str(path), "--batch", "3", "--json", state=state) == 0
    shown = capsys.readouterr()
    said = [json.loads(line) for line in shown.out.splitlines()]
    assert [item["label"] for item in said] == [DIGITS.labels[i % 3] for i in range(7)]
    assert said[0]["rung"] == "full"
    assert "7 rows" in shown.err
    sizes = [item.inputs[0].shape[0] for item in door.asked if isinstance(item, Infer)]
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("rows.json", "[[1, 2, 3]]", "expected fp32[any, 4]"),
        ("rows.json", "{", "cannot be read"),
        ("rows.csv", "1,2,3,4\n1,2\n", "different numbers of cells"),
        ("rows.csv", "", "empty"),
        ("rows.txt", "1", "of a kind that is not read here"),
        ("rows.json", '{"picture": [[1, 2, 3, 4]]}', "['image'] are expected"),
        ("rows.json", '[["a", "b", "c", "d"]]', "image"),
        ("rows.npy", "no array", "cannot be read"),
    ],
)
def test_rows_that_do_not_fit_are_a_usage_error(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, part: str
) -> None:
    (tmp_path / name).write_text(text)
    with FakeDoor(state / "door.sock", answering):
        assert run("infer", "digits", str(tmp_path / name), state=state) == Exit.USAGE
    assert part in capsys.readouterr().err


def test_an_unknown_model_and_a_missing_agent_have_their_own_codes(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.json").write_text("[[1, 2, 3, 4]]")
    with FakeDoor(state / "door.sock", answering):
        assert run("infer", "faces", str(tmp_path / "rows.json"), state=state) == Exit.NOT_FOUND
    (state / "door.sock").unlink()
    assert run("status", state=state) == Exit.UNREACHABLE
    assert "outrider-agent run" in capsys.readouterr().err


def test_configuration_is_checked_shown_and_refused(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--check-config", state=state) == 0
    assert run("run", "--print-config", "--log-level", "error", state=state) == 0
    assert 'log.level = "error"  # flag --log-level' in capsys.readouterr().out
    (state / "agent.toml").write_text("profile = 'pi9'\n")
    assert run("run", "--check-config", state=state) == Exit.BAD_CONFIGURATION
    said = capsys.readouterr().err
    assert "did you mean 'pi" in said
    assert "the configuration is good" not in said
    (state / "agent.toml").write_text("profile = 'pi4'\n")
    assert run("run", "--check-config", state=state) == 0
    (state / "agent.toml").write_text("profil = 'x'\n")
    assert run("status", state=state) == Exit.BAD_CONFIGURATION
    assert "did you mean 'profile'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["nonsense"], ["queue"], ["infer"], ["infer", "a", "b", "--batch", "0"], []])
def test_words_that_make_no_command_are_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == Exit.USAGE
    assert capsys.readouterr().err


def test_init_writes_a_file_once(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--state", str(state / "new"), "init", "--profile", "pi4"]) == 0
    assert 'profile = "pi4"' in (state / "new" / "agent.toml").read_text().splitlines()
    (state / "new" / "agent.toml").write_text("# mine\n")
    assert main(["--state", str(state / "new"), "init"]) == 0
    assert (state / "new" / "agent.toml").read_text() == "# mine\n"
    assert main(["--state", str(state / "new"), "init", "--profile", "pi44"]) == Exit.BAD_CONFIGURATION
    assert "did you mean 'pi4'" in capsys.readouterr().err


def test_doctor_of_a_new_device_says_what_to_do(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json", state=state) == Exit.FAILED
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    findings = {item["check"]: item for item in report["findings"]}
    assert findings["state"]["result"] == "ok"
    assert findings["identity"]["result"] == "fail"
    assert "enroll" in findings["identity"]["todo"]
    assert main(["doctor", "--state", str(state / "none")]) == Exit.FAILED
    assert "outrider-agent init" in capsys.readouterr().out


def test_tokens_come_from_argument_stdin_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_token("orj1.abc") == "orj1.abc"
    monkeypatch.setattr(sys, "stdin", io.StringIO("orj1.stdin\n"))
    assert read_token("-") == "orj1.stdin"
    (tmp_path / "token").write_text("orj1.file\n")
    assert read_token(f"@{tmp_path / 'token'}") == "orj1.file"
    with pytest.raises(errors.InvalidValue, match="No such file"):
        read_token(f"@{tmp_path / 'none'}")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(errors.InvalidValue, match="is not text") as caught:
        read_token(f"@{tmp_path / 'binary'}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.OutriderError("x"), 1),
        (errors.InvalidValue("x"), 2),
        (errors.InputRefused("x"), 2),
        (errors.ModelError("x", code="model.unknown"), 3),
        (errors.TransferRefused("x"), 4),
        (errors.TransferRefused("x", code="enrol.token_spent"), 4),
        (errors.TransferRefused("x", code="enrol.name_taken"), 6),
        (errors.TransferRefused("x", code="invalid.device_id"), 2),
        (errors.Unreachable("x"), 5),
        (errors.Conflict("x"), 6),
        (errors.Unreachable("x", code="transfer.timeout"), 8),
        (errors.TrustError("x", code="trust.rollback"), 9),
        (errors.TransferCorrupt("x"), 9),
        (errors.ConfigError("x", code="config.not_enrolled"), 78),
        (errors.StorageFull("x"), 1),
    ],
)
def test_errors_end_with_the_codes_of_the_contract(error: errors.OutriderError, code: int) -> None:
    assert exit_of(error) == code


def test_durations_read_well() -> None:
    assert [duration(ms) for ms in (0, 999, 61_000, 3_600_000, 90_061_000)] == [
        "0 s", "0 s", "1 min 1 s", "1 h", "1 d 1 h",
    ]  # fmt: skip


def test_the_entry_is_light_and_a_shadowed_shared_is_refused(tmp_path: Path) -> None:
    heavy = "numpy,cryptography,tuf,onnxruntime,paho,sqlite3,asyncio,msgspec"
    code = f"import sys, edge_agent.__main__; print([m for m in {heavy.split(',')} if m in sys.modules])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert child.stdout == "[]\n"
    assert foreign_shared(sys.modules["shared"]) == ""
    shadow = ModuleType("shared")
    shadow.__file__ = str(tmp_path / "shared" / "__init__.py")
    assert foreign_shared(shadow) == str(tmp_path / "shared")


ATTESTED: dict[str, Any] = {"time_ms": 1_800_000_000_000, "time_basis": "attested"}


@pytest.mark.parametrize(
    ("fields", "words", "result"),
    [
        ({**ATTESTED, "clock_error_ms": 40}, "attested by the hub; the system clock agrees", "ok"),
        (
            {**ATTESTED, "clock_error_ms": -90_000_000},
            "attested by the hub; the system clock is 1 d 1 h behind",
            "warn",
        ),
        (
            {**ATTESTED, "clock_error_ms": 7_260_000},
            "attested by the hub; the system clock is 2 h 1 min ahead",
            "warn",
        ),
        (
            {"time_basis": "floor", "clock_error_ms": -7_260_000, "time_detail": "transfer.unreachable: gone"},
            "not attested, the system clock is behind what has passed; the system clock is 2 h 1 min behind; "
            "transfer.unreachable: gone",
            "warn",
        ),
        ({"time_basis": "clock"}, "not attested, by the system clock", "ok"),
        ({"time_basis": "clock", "assignment_waits": "nobody attested"}, "not attested, by the system clock", "fail"),
        ({}, "by the system clock", "ok"),
    ],
)
def test_status_and_doctor_say_what_the_time_rests_on(
    state: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], words: str, result: str
) -> None:
    told = msgspec.structs.replace(STATE, **fields)

    def answer(request: Request, payload: bytearray) -> tuple[Reply, bytes]:
        return (named(told, request.id), b"") if isinstance(request, Status) else answering(request, payload)

    with FakeDoor(state / "door.sock", answer):
        assert run("status", state=state) == 0
        text = capsys.readouterr().out
        config = load_config(state_dir=str(state), environ={}).config
        finding, now_ms = check_time(config, issued_ms=0, wall_ms=1_790_000_000_000)
    shown = next(line for line in text.splitlines() if line.startswith("time "))
    assert shown.removeprefix("time").strip() == words
    assert ("waits: nobody attested" in text) == ("assignment_waits" in fields)
    assert finding.result == result
    assert finding.text.startswith(words)
    assert bool(finding.todo) == (result != "ok")
    assert now_ms == fields.get("time_ms", 1_790_000_000_000)


def test_doctor_knows_a_clock_of_1970_when_no_agent_runs(state: Path) -> None:
    config = load_config(state_dir=str(state), environ={}).config
    finding, now_ms = check_time(config, issued_ms=BUILT_MS + 86_400_000, wall_ms=0)
    assert (finding.result, now_ms) == ("warn", BUILT_MS + 86_400_000)
    assert "days behind" in finding.text
    assert check_time(config, issued_ms=0, wall_ms=BUILT_MS)[0].result == "ok"
