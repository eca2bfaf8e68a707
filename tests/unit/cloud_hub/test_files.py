"""A file is replaced as a whole, is its owner's only, and a failure leaves the old one and nothing beside it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from cloud_hub import files


def test_a_file_is_there_with_its_new_bytes_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    path.chmod(0o644)
    files.replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_refuses_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    files.replace(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_who_writes_at_the_same_time_does_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    texts = [bytes([letter]) * 10_000 for letter in b"abcdefgh"]
    writers = [threading.Thread(target=files.replace, args=(path, text)) for text in texts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() in texts
    assert list(tmp_path.iterdir()) == [path]
