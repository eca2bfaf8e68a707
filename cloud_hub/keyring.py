"""Signing keys as files: ed25519, PEM (PKCS #8, unencrypted), mode 0600, never overwritten.

    offline  root.key targets.key release.key          on the signing machine; the hub never reads them
    online   snapshot.key timestamp.key assignment.key time.key   in the hub's data directory

Rules: a key file is created with O_EXCL and synced before its path is returned; one that others can read is refused;
no key material reaches a message or a log. Not here: what the keys sign (shared/trust), certificates (ground/ca.py).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from cloud_hub.files import sync
from shared.errors import ConfigError, Conflict, InvalidValue, StorageError
from shared.trust.keys import new_private_pem, signer_from_pem
from shared.trust.library import CryptoSigner, Key
from shared.trust.repository import RoleKeys, RootKeys

OFFLINE: Final = ("root", "targets", "release")
ONLINE: Final = ("snapshot", "timestamp", "assignment", "time")
LATER: Final = ("time",)
"""Online keys that a hub made earlier may lack; it goes on without what they sign."""

MAX_KEY_BYTES: Final = 16 * 1024


class Keyring:
    """A directory of signing keys, `NAME.key` each. Reads a key each time it is asked for one, and keeps none."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        """Where the keys lie."""
        return self._directory

    def path(self, name: str) -> Path:
        """The file of this key, whether it is there or not."""
        return self._directory / f"{name}.key"

    def has(self, name: str) -> bool:
        """Whether there is a key of this name, usable or not."""
        return self.path(name).exists()

    def create(self, *names: str) -> None:
        """Make these keys in a directory of mode 0700.

        Raises:
            Conflict: one of them exists; nothing is overwritten, and nothing is made.
            StorageError: the directory cannot be written.
        """
        for name in names:
            if self.path(name).exists():
                raise _exists(self.path(name))
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self._directory, error) from error
        for name in names:
            write_key(self.path(name))

    def signer(self, name: str) -> CryptoSigner:
        """The key, ready to sign; raises ConfigError when it is missing, unusable or readable by others."""
        return read_signer(self.path(name))

    def public(self, name: str) -> Key:
        """The key's public half, as metadata lists it."""
        return self.signer(name).public_key


def root_keys(offline: Keyring, online: Keyring) -> RootKeys:
    """What the first root authorises: one key for each role, threshold one; `keys rotate` can ask for more."""

    def one(keyring: Keyring, name: str) -> RoleKeys:
        return RoleKeys(keys=(keyring.public(name),))

    return RootKeys(
        root=one(offline, "root"),
        targets=one(offline, "targets"),
        snapshot=one(online, "snapshot"),
        timestamp=one(online, "timestamp"),
        assignment=one(online, "assignment"),
        time=one(online, "time") if online.has("time") else None,
    )


def write_key(path: Path) -> CryptoSigner:
    """Make a new key in a new file of mode 0600, durable on return; raises Conflict or StorageError."""
    data = new_private_pem()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    return signer_from_pem(data)


def read_signer(path: Path) -> CryptoSigner:
    """Read a key file; raises ConfigError when it is missing, readable by others, or no ed25519 key."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_KEY_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no key file {path}",
            code="config.key_missing",
            hint="point to the directory that 'outrider-hub init --offline' wrote, or restore the key",
        ) from error
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error.strerror}", code="config.key_unreadable") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"key file {path} is open to other users (mode {stat.S_IMODE(mode):04o})",
            code="config.key_permissions",
            hint=f"run 'chmod 600 {path}'; if others may have read it, replace the key",
        )
    try:
        return signer_from_pem(data)
    except InvalidValue as error:
        raise ConfigError(
            f"key file {path} is not an unencrypted ed25519 key in PEM",
            code="config.key_unusable",
            hint="restore the file from its backup",
        ) from error


def _exists(path: Path) -> Conflict:
    return Conflict(
        f"key file {path} exists",
        code="conflict.key_exists",
        hint="keys are never overwritten; choose another directory or move the old key away first",
    )


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written: {error.strerror}", hint="check the directory's owner and its space")
