"""Key files: private from the first byte, never overwritten, refused when others could have read them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cloud_hub.keyring import LATER, OFFLINE, ONLINE, Keyring, read_signer, root_keys, write_key
from shared.errors import ConfigError, Conflict, StorageError
from shared.trust import repository as repo
from tests.fakes.trust_repository import NOW_MS


def test_a_key_is_made_once_and_read_back(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "a" / "keys")
    keyring.create(*OFFLINE)
    assert {path.name for path in keyring.directory.iterdir()} == {"root.key", "targets.key", "release.key"}
    assert stat.S_IMODE(keyring.directory.stat().st_mode) == 0o700
    for name in OFFLINE:
        assert stat.S_IMODE(keyring.path(name).stat().st_mode) == 0o600
    before = keyring.path("root").read_bytes()
    with pytest.raises(Conflict):
        keyring.create("another", "root")
    assert keyring.path("root").read_bytes() == before
    assert not keyring.path("another").exists()
    assert keyring.public("root") == keyring.signer("root").public_key
    assert keyring.public("root") != keyring.public("targets")


def test_a_key_is_private_whatever_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_key(tmp_path / "a.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Conflict):
        write_key(tmp_path / "a.key")
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_directory_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        write_key(tmp_path / "missing" / "a.key")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Keyring(tmp_path / "file").create("root")


def test_what_is_no_usable_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_signer(tmp_path / "missing.key")
    assert caught.value.code == "config.key_missing"
    write_key(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o640)
    with pytest.raises(ConfigError) as caught:
        read_signer(tmp_path / "a.key")
    assert caught.value.code == "config.key_permissions"
    (tmp_path / "b.key").write_text("secret text")
    (tmp_path / "b.key").chmod(0o600)
    with pytest.raises(ConfigError) as caught:
        read_signer(tmp_path / "b.key")
    assert caught.value.code == "config.key_unusable"
    assert "secret text" not in str(caught.value)


def test_the_first_root_names_all_keys(tmp_path: Path) -> None:
    offline, online = Keyring(tmp_path / "offline"), Keyring(tmp_path / "online")
    offline.create(*OFFLINE)
    online.create(*ONLINE)
    root = repo.sign(repo.new_root(root_keys(offline, online), now_ms=NOW_MS), offline.signer("root"))
    assert set(repo.read_root(root).signed.keys) == {
        keyring.public(name).keyid
        for keyring, names in ((offline, ("root", "targets")), (online, ONLINE))
        for name in names
    }


def test_a_hub_that_was_made_before_there_was_a_time_key_goes_on_without(tmp_path: Path) -> None:
    offline, online = Keyring(tmp_path / "offline"), Keyring(tmp_path / "online")
    offline.create(*OFFLINE)
    online.create(*(name for name in ONLINE if name not in LATER))
    root = repo.read_root(repo.sign(repo.new_root(root_keys(offline, online), now_ms=NOW_MS), offline.signer("root")))
    assert list(root.signed.unrecognized_fields["x-outrider"]) == ["assignment"]
