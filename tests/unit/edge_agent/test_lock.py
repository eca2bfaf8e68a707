"""One agent per state directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_agent.adapters.lock import AgentLock, owner_pid
from shared.errors import Conflict, StorageError


def test_the_second_agent_learns_who_the_first_is(tmp_path: Path) -> None:
    assert owner_pid(tmp_path) is None
    with AgentLock(tmp_path):
        assert owner_pid(tmp_path) == os.getpid()
        with pytest.raises(Conflict) as caught, AgentLock(tmp_path):
            pass
        assert str(os.getpid()) in str(caught.value)
        assert "--state" in caught.value.hint
    assert owner_pid(tmp_path) is None
    with AgentLock(tmp_path):
        pass


def test_a_directory_that_is_not_there_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, AgentLock(tmp_path / "nowhere"):
        pass
    assert "init" in caught.value.hint
