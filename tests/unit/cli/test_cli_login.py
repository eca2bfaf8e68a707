"""Logging in: the CA is pinned before a token travels, and the saved context is private."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cloud_hub.cli.hub import fingerprint
from cloud_hub.ground.ca import make_ca
from tests.fakes.small_hub import SmallHub, serve
from tests.unit.cli.conftest import TOKEN, Run


def test_login_pins_the_ca_and_keeps_the_token_private(hub: SmallHub, run: Run, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    pin = fingerprint(hub.ca_pem).upper()
    ended = run("login", hub.url, "--token-file", "token", "--fingerprint", pin, "--context", "lab", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["name"] == "ann"
    assert TOKEN not in ended.out + ended.err
    path = tmp_path / "config" / "contexts.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    saved = msgspec.json.decode(path.read_bytes())
    assert saved["current"] == "lab"
    assert saved["contexts"]["lab"]["fingerprint"] == fingerprint(hub.ca_pem)


def test_nothing_secret_travels_to_another_ca(hub: SmallHub, run: Run, tmp_path: Path) -> None:
    ended = run("login", hub.url, "--token", TOKEN, "--fingerprint", "0" * 64)
    assert ended.code == 9
    assert "code: trust.ca" in ended.err
    assert [asked.path for asked in hub.asked] == ["/v1/ca"]
    assert "Authorization" not in hub.asked[0].headers
    assert not (tmp_path / "config").exists()


def test_a_second_ca_behind_the_pinned_one_is_not_trusted(hub: SmallHub, run: Run, tmp_path: Path) -> None:
    """Decoders of PEM stop at the padding: the pin would hold for the first, and TLS trust the second."""
    ours = next(pem for pem in _new_cas() if "=" in pem)
    hub.answers["GET", "/v1/ca"] = (200, f"{ours.strip()}\n{hub.ca_pem}".encode())
    ended = run("login", hub.url, "--token", TOKEN, "--fingerprint", fingerprint(ours))
    assert ended.code == 9
    assert "code: trust.hub_certificate" in ended.err
    assert [asked.path for asked in hub.asked] == ["/v1/ca"]
    (tmp_path / "both.pem").write_text(f"{ours}{hub.ca_pem}")
    assert run("login", hub.url, "--token", TOKEN, "--ca", "both.pem").code == 2
    assert not (tmp_path / "config").exists()


def test_without_a_pin_and_a_terminal_login_is_refused(hub: SmallHub, run: Run) -> None:
    ended = run("login", hub.url, "--token", TOKEN)
    assert ended.code == 9
    assert fingerprint(hub.ca_pem) in ended.err
    assert "--fingerprint" in ended.err


def test_a_hub_that_changed_its_ca_is_not_spoken_to(logged_in: SmallHub, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config" / "contexts.json"
    (tmp_path / "other").mkdir()
    with serve(tmp_path / "other") as other:
        path.write_text(path.read_text().replace(logged_in.url, other.url))
        ended = run("ls", "devices")
        assert ended.code == 9
        assert "code: trust.hub_certificate" in ended.err
        assert other.asked == []


@pytest.mark.parametrize("url", ["http://hub:1", "hub:8443", "https://hub/path", "https://user@hub", "https://h:x"])
def test_odd_addresses_are_refused(run: Run, url: str) -> None:
    ended = run("login", url, "--token", TOKEN)
    assert ended.code == 2
    assert "code: invalid.url" in ended.err


def test_nobody_there(run: Run, free_port: int) -> None:
    ended = run("login", f"https://127.0.0.1:{free_port}", "--token", TOKEN, "--fingerprint", "0" * 64)
    assert ended.code == 5
    assert "try: " in ended.err


def test_not_logged_in(run: Run) -> None:
    ended = run("ls", "devices")
    assert ended.code == 78
    assert "outrider login" in ended.err


def test_a_damaged_file_of_contexts(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "contexts.json").write_text('{"current": 3}')
    ended = run("ls", "devices")
    assert ended.code == 78
    assert "contexts.json" in ended.err


def test_an_unknown_context_names_those_that_exist(logged_in: SmallHub, run: Run) -> None:
    ended = run("ls", "devices", "--context", "moon")
    assert ended.code == 78
    assert "127.0.0.1" in ended.err


def _new_cas() -> Iterator[str]:
    while True:
        yield make_ca(now_ms=time.time_ns() // 1_000_000, label="ours").certificate_pem.decode()
