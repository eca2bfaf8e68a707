"""Signing keys as files: ed25519, PEM (PKCS #8, unencrypted), mode 0600, never overwritten.

    offline  root.key targets.key release.key                     on the signing machines; the hub never reads them
    online   snapshot.key timestamp.key assignment.key time.key   in the hub's data directory
             learned-FAMILY-<identifier>.key                      beside them, where a person allowed it

A second key of a role lies beside the first as `root-2.key`; one that the hub made to replace `snapshot.key` as
`snapshot-<identifier>.key`, until a root names it. Which of them signs is decided by the metadata, never by the name.
Public halves are `ROLE-<identifier>.pub.json`: they are what is carried.

Rules: a key file is created with O_EXCL and synced before its path is returned; one that others can read is refused;
no key material reaches a message or a log. Not here: what the keys sign (shared/trust), certificates (ground/ca.py).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Final

from cloud_hub.files import replace, sync
from shared.errors import ConfigError, Conflict, InvalidValue, StorageError
from shared.ids import FamilyName
from shared.trust.authority import SHORT
from shared.trust.keys import new_private_pem, public_half, read_public_half, signer_from_pem
from shared.trust.library import CryptoSigner, Key
from shared.trust.repository import RoleKeys, RootKeys

OFFLINE: Final = ("root", "targets", "release")
ONLINE: Final = ("snapshot", "timestamp", "assignment", "time")
LATER: Final = ("time",)
"""Online keys that a hub made earlier may lack; it goes on without what they sign."""

MAX_KEY_BYTES: Final = 16 * 1024
TRUSTED_ROOT: Final = "trusted-root.json"
"""Beside offline keys: the root that their holder's machine signed or followed last. Not a secret."""
MAX_KEYS: Final = 16
"""Of one role in one directory."""


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
        self._make_directory()
        for name in names:
            write_key(self.path(name))

    def signer(self, name: str) -> CryptoSigner:
        """The key, ready to sign; raises ConfigError when it is missing, unusable or readable by others."""
        return read_signer(self.path(name))

    def public(self, name: str) -> Key:
        """The key's public half, as metadata lists it."""
        return self.signer(name).public_key

    def add(self, role: str) -> CryptoSigner:
        """Make one more key of a role, under the first name that is free; raises Conflict or StorageError."""
        path = self.free_path(role)
        self._make_directory()
        return write_key(path)

    def free_path(self, role: str) -> Path:
        """The file of a role's next key: `root.key`, then `root-2.key`; raises Conflict when there are too many."""
        for name in (role, *(f"{role}-{number}" for number in range(2, MAX_KEYS + 1))):
            if not self.path(name).exists():
                return self.path(name)
        raise _exists(self.path(role))

    def add_next(self, role: str) -> CryptoSigner:
        """Make the key that shall replace an online one, under a name of its own; the old key stays."""
        self._make_directory()
        data = new_private_pem()
        return write_key(self.path(f"{role}-{signer_from_pem(data).public_key.keyid[:SHORT]}"), data)

    def signers(self) -> tuple[CryptoSigner, ...]:
        """Every key that lies here; raises ConfigError when there is none, or one is unusable or open to others."""
        paths = sorted(self._directory.glob("*.key"))
        if not paths:
            raise ConfigError(
                f"there is no key in {self._directory}",
                code="config.key_missing",
                hint="name the folder that holds your .key files",
            )
        return tuple(read_signer(path) for path in paths)

    def find(self, role: str, keyids: Collection[str]) -> CryptoSigner:
        """The key of a role that has one of these identifiers; raises ConfigError when it is not here."""
        return read_signer(self._find(role, keyids))

    def _find(self, role: str, keyids: Collection[str]) -> Path:
        others: list[Path] = sorted(self._directory.glob(f"{role}-*.key"))
        for path in [self.path(role), *others] if self.path(role).exists() else others:
            if read_signer(path).public_key.keyid in keyids:
                return path
        wanted = ", ".join(sorted(keyid[:SHORT] for keyid in keyids))
        raise ConfigError(
            f"{self._directory} holds no {role} key that the root lists ({wanted})",
            code="config.key_missing",
            hint="restore it from the backup, or replace it: `outrider-hub keys rotate`",
        )

    def take_over(self, role: str, keyids: Collection[str], source: Keyring) -> None:
        """Copy one of these keys from another directory, under the role's own name; raises ConfigError or Conflict."""
        data = source._find(role, keyids).read_bytes()
        self._make_directory()
        write_key(self.path(role), data)

    def write_public(self, role: str, key: Key) -> Path:
        """Write a key's public half beside it; raises StorageError."""
        path = self._directory / f"{role}-{key.keyid[:SHORT]}.pub.json"
        try:
            replace(path, public_half(role, key))
        except OSError as error:
            raise _unwritable(path, error) from error
        return path

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self._directory, error) from error


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


def learned_name(family: FamilyName) -> str:
    """What a family's online key for learned releases is called: `learned-digits`."""
    return f"learned-{family}"


def write_key(path: Path, data: bytes | None = None) -> CryptoSigner:
    """Put a key, by default a new one, into a new file of mode 0600, durable; raises Conflict or StorageError."""
    data = data or new_private_pem()
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


def read_public(path: Path) -> tuple[str, Key]:
    """Role and key of a public half; raises InvalidValue that names the file."""
    try:
        with path.open("rb") as file:
            return read_public_half(file.read(MAX_KEY_BYTES))
    except OSError as error:
        raise InvalidValue(f"{path} cannot be read: {error.strerror}", code="invalid.public_key") from error
    except InvalidValue as error:
        raise InvalidValue(f"{path}: {error.message}", code=error.code, hint=error.hint) from error


def _exists(path: Path) -> Conflict:
    return Conflict(
        f"key file {path} exists",
        code="conflict.key_exists",
        hint="keys are never overwritten; choose another directory or move the old key away first",
    )


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written: {error.strerror}", hint="check the directory's owner and its space")
