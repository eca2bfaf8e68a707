"""A hub that is logged in to, and the command line run in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_hub.cli.__main__ import main
from cloud_hub.cli.hub import fingerprint
from tests.fakes.small_hub import SmallHub, serve

TOKEN = "orh_abc_secret"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.out)


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `outrider` with these arguments, in a folder and with contexts of this test."""
    monkeypatch.setenv("OUTRIDER_CONFIG", str(tmp_path / "config" / "contexts.json"))
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> Ended:
        capsys.readouterr()
        try:
            code = int(main(arguments))
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return Ended(code, said.out, said.err)

    return go


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[SmallHub]:
    """A hub that knows one operator."""
    with serve(tmp_path) as running:
        running.answers[("GET", "/v1/whoami")] = (200, {"name": "ann", "role": "operator"})
        yield running


@pytest.fixture
def logged_in(hub: SmallHub, run: Run) -> SmallHub:
    """The hub, with a saved context for it."""
    ended = run("login", hub.url, "--token", TOKEN, "--fingerprint", fingerprint(hub.ca_pem))
    assert ended.code == 0, ended.err
    hub.asked.clear()
    return hub
