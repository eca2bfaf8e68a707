"""`outrider-hub init`, `token create`, `ca show`, `migrate`, `doctor`: what they leave and what they refuse."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from cloud_hub.__main__ import main
from cloud_hub.commands import init as init_command
from cloud_hub.devices import tables
from cloud_hub.ground import audit, ca, rotation, transport
from cloud_hub.ground.database import Database
from cloud_hub.ground.folder import DataFolder
from cloud_hub.ground.revocation import make_list
from cloud_hub.ground.system import SystemClock
from shared.join import decode_join_token
from shared.trust import repository
from shared.trust.time import check_nonce
from tests.fakes.https import HttpsServer, Request, answer
from tests.fakes.pki import TestCa


def init(tmp_path: Path, *more: str) -> int:
    return main(
        [
            "init",
            "--data",
            str(tmp_path / "data"),
            "--offline",
            str(tmp_path / "offline"),
            "--name",
            "hub.example",
            *more,
        ]
    )


def output(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def actions(tmp_path: Path) -> list[str]:
    database = Database(f"sqlite:///{tmp_path / 'data' / 'hub.db'}")
    try:
        assert database.read_now(audit.verify).broken_at is None
        return [row.action for row in database.read_now(lambda conn: audit.entries(conn, after=0, limit=100))]
    finally:
        database.close()


def test_init_makes_a_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token_file = tmp_path / "token"
    assert init(tmp_path, "--json", "--port", "9443", "--broker-port", "9883", "--token-file", str(token_file)) == 0
    made = output(capsys)
    assert made["hub_url"] == "https://hub.example:9443"
    assert made["broker"] == "mqtts://hub.example:9883"
    assert token_file.read_text().strip() == made["token"]
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert files(tmp_path / "offline") == {"root.key", "targets.key", "release.key", "trusted-root.json"}
    expected = {
        "hub.db",
        "hub.toml",
        "ca/ca.key",
        "keys/snapshot.key",
        "broker/hub.pem",
        "tls/server.pem",
        "broker/acl",
    }
    assert expected <= files(tmp_path / "data")
    broker_file = (tmp_path / "data" / "broker" / "mosquitto.conf").read_text()
    assert f"cafile {tmp_path}/data/broker/ca.pem" in broker_file
    assert not files(tmp_path / "data") & {"root.key", "keys/root.key", "keys/targets.key", "keys/release.key"}
    assert actions(tmp_path) == ["hub.created", "repository.founded", "token.created"]
    assert made["token"] not in (tmp_path / "data" / "hub.db").read_bytes().decode("latin-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "offline", "token"]


def test_a_token_that_cannot_be_written_is_said_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path, "--token-file", str(tmp_path / "nowhere" / "token")) == 2
    assert "code: invalid.token_file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_init_leaves_what_is_there_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path) == 0
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    assert init(tmp_path) == 6
    assert "conflict.exists" in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_offline_keys_do_not_lie_with_the_hub(tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert main(["init", "--data", str(data), "--offline", str(data / "offline")]) == 2
    assert main(["init", "--data", str(data), "--offline", str(data)]) == 2
    assert not data.exists()


def test_init_refuses_a_name_that_is_none(tmp_path: Path) -> None:
    assert init(tmp_path, "--name", "not a host") == 2
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("step", ["make_ca", "ensure", "found", "rename offline", "rename data", "token"])
def test_a_crash_at_any_step_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: str
) -> None:
    class Killed(BaseException):
        """As if the process had been killed here."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    rename = Path.rename

    def rename_until(self: Path, target: Path) -> Path:
        if target.name == step.removeprefix("rename "):
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        if step == "make_ca":
            patch.setattr(ca, "make_ca", die)
        elif step == "ensure":
            patch.setattr(transport, "ensure", die)
        elif step == "found":
            patch.setattr(init_command, "found", die)
        elif step == "token":
            patch.setattr(init_command, "issue_api_token", die)
        else:
            patch.setattr(Path, "rename", rename_until)
        with pytest.raises(Killed):
            init(tmp_path)
    if step == "token":
        # The hub is whole; only its first token is missing, and another is made like this.
        assert init(tmp_path) == 6
        assert "token create" in capsys.readouterr().err
        assert main(["token", "create", "--data", str(tmp_path / "data"), "--kind", "api", "--role", "admin"]) == 0
    else:
        assert init(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "offline"]
    assert files(tmp_path / "offline") == {"root.key", "targets.key", "release.key", "trusted-root.json"}
    assert main(["doctor", "--data", str(tmp_path / "data"), "--json"]) in (0, 1)
    capsys.readouterr()


def test_root_is_signed_by_the_offline_key_and_names_the_assignment_key(tmp_path: Path) -> None:
    assert init(tmp_path) == 0
    database = Database(f"sqlite:///{tmp_path / 'data' / 'hub.db'}")
    try:
        (document,) = database.read_now(
            lambda conn: list(
                conn.exec_driver_sql("SELECT document FROM signed_metadata WHERE role = 'root'").scalars()
            )
        )
    finally:
        database.close()
    root = repository.read_root(document).signed
    assert root.version == 1
    assert root.unrecognized_fields["x-outrider"]["assignment"]["threshold"] == 1
    assert {role: held.threshold for role, held in root.roles.items()} == dict.fromkeys(root.roles, 1)


def test_tokens_are_made_and_only_their_hash_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path, "--json") == 0
    fingerprint = output(capsys)["ca_fingerprint"]
    data = str(tmp_path / "data")
    assert main(["token", "create", "--data", data, "--kind", "join", "--device", "pi-1", "--ttl", "15m"]) == 0
    text = capsys.readouterr().out.strip()
    token = decode_join_token(text)
    assert (token.hub_url, token.ca_fingerprint) == ("https://hub.example:8443", fingerprint)
    database = Database(f"sqlite:///{tmp_path / 'data' / 'hub.db'}")
    try:
        digest = hashlib.sha256(token.secret).hexdigest()
        grant = database.read_now(lambda conn: tables.find_grant(conn, digest))
    finally:
        database.close()
    assert grant is not None
    assert (grant.device, grant.uses_left) == ("pi-1", 1)
    assert main(["ca", "show", "--data", data]) == 0
    assert capsys.readouterr().out.strip() == fingerprint
    assert actions(tmp_path)[-1] == "join_token.created"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--kind", "join", "--role", "admin"],
        ["--kind", "api", "--device", "pi-1"],
        ["--kind", "join", "--uses", "0"],
        ["--kind", "join", "--device", "hub"],
        ["--kind", "join", "--device", "pi-1", "--uses", "2"],
        ["--kind", "api", "--ttl", "3661d"],
    ],
)
def test_tokens_that_make_no_sense(tmp_path: Path, arguments: list[str]) -> None:
    assert init(tmp_path) == 0
    assert main(["token", "create", "--data", str(tmp_path / "data"), *arguments]) == 2


@pytest.mark.parametrize("arguments", [["serve", "--prt", "1"], ["serve", "--por", "1"], ["token", "create"], ["x"]])
def test_wrong_arguments_end_as_every_error_does(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error, code, advice = capsys.readouterr().err.splitlines()
    assert (error[:7], code, advice[:5]) == ("error: ", "code: usage", "try: ")


def test_commands_without_a_hub_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["serve"], ["migrate"], ["ca", "show"], ["token", "create", "--kind", "join"]):
        assert main([*command, "--data", str(tmp_path)]) == 78
        assert "config.no_hub" in capsys.readouterr().err


def test_migrate_says_where_the_database_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path) == 0
    capsys.readouterr()
    assert main(["migrate", "--data", str(tmp_path / "data")]) == 0
    assert "the database is at 0" in capsys.readouterr().out


def test_nothing_migrates_under_a_running_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init(tmp_path)
    with DataFolder(tmp_path / "data").alone():
        assert main(["migrate", "--data", str(tmp_path / "data")]) == 6
    assert "code: conflict.running" in capsys.readouterr().err


def test_doctor_finds_what_is_wrong(tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path, "--port", str(free_port), "--broker-port", str(free_port + 1)) == 0
    data = tmp_path / "data"
    shutil.rmtree(data / "keys")
    data.chmod(0o755)
    (data / "tls" / "server.pem").write_text("nonsense")
    capsys.readouterr()
    assert main(["doctor", "--data", str(data), "--json"]) == 1
    found = {check["check"]: check["ok"] for check in output(capsys)["checks"]}
    assert not any(found[name] for name in ("data", "keys", "certificates"))
    assert all(found[name] for name in ("database", "audit", "ca", "disk"))


def test_the_time_key_is_made_listed_and_not_missed_where_a_hub_is_older(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path, "--port", str(free_port), "--broker-port", str(free_port + 1)) == 0
    data = tmp_path / "data"

    def keys() -> dict[str, Any]:
        capsys.readouterr()
        main(["doctor", "--data", str(data), "--json"])
        found: dict[str, Any] = next(item for item in output(capsys)["checks"] if item["check"] == "keys")
        return found

    assert (data / "keys" / "time.key").stat().st_mode & 0o777 == 0o600
    assert keys()["detail"] == "snapshot, timestamp, assignment, time"
    (data / "keys" / "time.key").unlink()
    assert keys()["ok"] is False  # its root names the key, so devices wait for the time


@pytest.mark.parametrize(
    ("age_days", "ok", "words"),
    [(0, True, "0 certificates, 0 hours old, 29 days left"), (4, False, "96 hours old"), (40, False, "nobody in")],
)
def test_doctor_tells_the_age_of_the_revocation_list(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str], age_days: int, ok: bool, words: str
) -> None:
    init(tmp_path, "--port", str(free_port), "--broker-port", str(free_port + 1))
    folder = DataFolder(tmp_path / "data")
    made_ms = SystemClock().wall_ms() - age_days * 24 * 3600 * 1000
    made = make_list(transport.load_authority(folder), (), now_ms=made_ms, after_ms=None)
    (folder.broker / "crl.pem").write_bytes(made)
    capsys.readouterr()
    main(["doctor", "--data", str(folder.root), "--json"])
    (found,) = [check for check in output(capsys)["checks"] if check["check"] == "revocation"]
    assert found["ok"] is ok
    assert words in found["detail"]


@pytest.mark.parametrize(
    ("days", "phase", "ok", "words"),
    [
        (181, "steady", True, "180 days left"),
        (181, "begun", True, "180 days left; a change is under way, phase begun"),
        (180, "steady", False, "the CA ends in 179 days"),
        (180, "begun", False, "the CA ends in 179 days"),
        (1, "steady", False, "the CA has expired"),
    ],
)
def test_doctor_warns_long_before_the_ca_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], days: int, phase: str, ok: bool, words: str
) -> None:
    folder = DataFolder(tmp_path)
    folder.make()
    now_ms = SystemClock().wall_ms()
    made = ca.make_ca(now_ms=now_ms, label="test", days=days)
    folder.ca_key.write_bytes(made.key_pem)
    folder.ca_certificate.write_bytes(made.certificate_pem)
    if phase == "begun":
        rotation.begin(folder, now_ms=now_ms, label="next")
    main(["doctor", "--data", str(tmp_path), "--json"])
    (found,) = [check for check in output(capsys)["checks"] if check["check"] == "ca"]
    assert (found["ok"], words in found["detail"]) == (ok, True), found
    if words.startswith("the CA ends"):
        assert f"outrider-hub ca rotate {'begin' if phase == 'steady' else 'switch'}" in found["hint"]


def test_doctor_tells_of_a_clock_that_is_doubted(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what is written, and by what the running hub says, which alone knows of a jump."""
    pki_folder = tmp_path / "pki"
    pki_folder.mkdir()
    pki = TestCa(pki_folder)
    told = {"code": "config.clock", "detail": "the clock was set forward", "hint": "look at it"}

    def clock() -> dict[str, Any]:
        capsys.readouterr()
        main(["doctor", "--data", str(tmp_path / "data"), "--json"])
        found: dict[str, Any] = next(item for item in output(capsys)["checks"] if item["check"] == "clock")
        return found

    def reply(request: Request, handler: BaseHTTPRequestHandler) -> None:
        answer(handler, 503, json.dumps(told if request.path == "/v1/time" else {}).encode())

    with HttpsServer(pki, reply) as hub:
        port = int(hub.url.rpartition(":")[2])
        assert init(tmp_path, "--port", str(port), "--broker-port", str(free_port)) == 0
        assert clock()["ok"], "somebody else answers there"
        (tmp_path / "data" / "broker" / "ca.pem").write_bytes(pki.pem)
        found = clock()
        assert (found["ok"], found["detail"], found["hint"]) == (False, "the clock was set forward", "look at it")
        (asked,) = [request for request in hub.requests if request.path == "/v1/time"]
        check_nonce(json.loads(asked.body)["nonce"])
    assert clock()["ok"]
    later_ms = SystemClock().wall_ms() + 2 * 3600 * 1000
    with closing(Database(f"sqlite:///{tmp_path / 'data' / 'hub.db'}")) as database:
        database.write_now(lambda conn: audit.record(conn, at_ms=later_ms, actor="a", action="x", subject="s"))
    found = clock()
    assert not found["ok"]
    assert "behind the newest audit row" in found["detail"]
