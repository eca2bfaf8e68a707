"""The hub's data directory: which file is where, and how files with secrets are written.

hub.toml              configuration
hub.db                everything but files, unless that is on PostgreSQL
hub.lock              held by the one hub that runs here
ca/ca.pem, ca.key     the certificate authority that issues
ca/next.*, old.*      the other one while it is changed (ground/rotation.py)
tls/server.pem, .key  the HTTPS port
keys/*.key            online signing keys (cloud_hub/keyring.py)
broker/               the managed broker's files, and the hub's client certificate
blobs/ab/<sha256>     models and what belongs to them
"""

from __future__ import annotations

import fcntl
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloud_hub import files
from shared.errors import ConfigError, Conflict, StorageError


class DataFolder:
    """Paths below the data directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.config = self.root / "hub.toml"
        self.database = self.root / "hub.db"
        self.lock = self.root / "hub.lock"
        self.ca_certificate = self.root / "ca" / "ca.pem"
        self.ca_key = self.root / "ca" / "ca.key"
        self.next_ca = self.root / "ca" / "next.pem", self.root / "ca" / "next.key"
        self.old_ca = self.root / "ca" / "old.pem", self.root / "ca" / "old.key"
        self.server_certificate = self.root / "tls" / "server.pem"
        self.server_key = self.root / "tls" / "server.key"
        self.keys = self.root / "keys"
        self.broker = self.root / "broker"
        self.blobs = self.root / "blobs"

    @property
    def database_url(self) -> str:
        """SQLAlchemy's URL of the database."""
        return f"sqlite:///{self.database}"

    def make(self) -> None:
        """Make the folders, for their owner only."""
        for folder in (self.root, self.root / "ca", self.root / "tls", self.keys, self.broker, self.blobs):
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"{folder} cannot be made: {error.strerror}", hint="choose a directory that you may write to"
                ) from error

    def require(self, *, has_database: bool = True) -> None:
        """Raise ConfigError unless a hub was made here, with its database unless that is elsewhere."""
        if (has_database and not self.database.is_file()) or not self.ca_certificate.is_file():
            raise ConfigError(
                f"there is no hub in {self.root}",
                code="config.no_hub",
                hint=f"make one with `outrider-hub init --data {self.root} --offline DIR`, or name another with --data",
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the directory for one hub; raises Conflict while another one has it.

        Two hubs would each throw away what the other builds and receives, and forget who is connected to the other.
        The kernel lets go when the process ends, however it does; no child inherits the hold.
        """
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{self.lock} cannot be opened: {error.strerror}", hint="check its owner") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Conflict(
                    f"a hub is running in {self.root}",
                    code="conflict.running",
                    hint="stop it first, or name another data directory with --data",
                ) from error
            yield
        finally:
            os.close(descriptor)


def read(path: Path) -> bytes:
    """A small file's bytes; raises ConfigError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}",
            code="config.file",
            hint="restore it from the backup, or check who owns it",
        ) from error


def write(path: Path, data: bytes) -> None:
    """Replace a file in one step, durably; it is readable by its owner only from its first byte."""
    try:
        files.replace(path, data)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", hint="check its owner and space") from error


def local_user() -> str | None:
    """The name of who runs this process, None where its number has none (containers).

    From the system's table and not from the environment, which keeps another's name under `su` and `sudo -E`.
    """
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None
