"""The trust directory of a device: what was accepted, for the next verification and for a start without the hub.

    trust/root.json              the newest root; the first one comes with the enrolment
    trust/<role>.json            accepted metadata, the role's name percent-encoded
    trust/assignment             the assignment document accepted last (no role's file is called that)
    trust/manifests/<digest>     the manifests of accepted releases, as they were signed

Rules: a file is written aside, synced, renamed, and the directory synced; when the root has replaced keys, what the
old ones signed is removed before the new root is written; losing any of these files but the root costs a download and
nothing else, because the floors are kept elsewhere, so a disk that refuses to keep one does not stop a verification.

Not here: what the files mean. This module loads neither tuf nor cryptography.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from shared import limits
from shared.errors import TrustError
from shared.ids import Digest
from shared.wire.verification import Keep

logger = logging.getLogger(__name__)

MAX_CACHE_BYTES: Final = limits.MAX_FRAME_PAYLOAD_BYTES - 16 * limits.MIB
"""What of the cache is handed to a verification; the rest of a frame is for the job itself."""

MANIFESTS: Final = "manifests"
_ROOT: Final = "root"
_SUFFIX: Final = ".json"


class TrustFolder:
    """The trust directory. Blocking; small files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def root(self) -> bytes:
        """The newest trusted root; raises TrustError `trust.no_root` before the enrolment."""
        try:
            return self._read(self._path(_ROOT), limits.MAX_ROOT_BYTES)
        except OSError as error:
            raise TrustError(
                f"there is no trusted root in {self._directory}",
                code="trust.no_root",
                hint="enrol this device: outrider-agent enroll TOKEN",
            ) from error

    def cache(self) -> dict[str, bytes]:
        """Accepted metadata by role, as far as it can be read and fits into a job."""
        found: dict[str, bytes] = {}
        room = MAX_CACHE_BYTES
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            role = unquote(path.name.removesuffix(_SUFFIX))
            if role == _ROOT or path.is_symlink():
                continue
            with contextlib.suppress(OSError):
                data = self._read(path, limits.MAX_TARGETS_BYTES)
                if len(data) <= room:
                    found[role] = data
                    room -= len(data)
        return found

    def previous(self) -> bytes | None:
        """The assignment document accepted last, if it is still there."""
        try:
            return self._read(self._directory / "assignment", limits.MAX_ASSIGNMENT_BYTES)
        except OSError:
            return None

    def keep(self, step: Keep) -> None:
        """Remove what the step drops, then write what it keeps; a disk that refuses is logged and no error."""
        try:
            for role in step.drops:
                self._path(role).unlink(missing_ok=True)
            self._write(self._path(step.role), step.data)
        except OSError as error:
            logger.warning("accepted metadata could not be kept", extra={"role": step.role, "reason": error.strerror})

    def manifest(self, digest: Digest) -> bytes | None:
        """The bytes kept under this digest, whatever they are by now; None when there are none."""
        try:
            return self._read(self._directory / MANIFESTS / digest, limits.MAX_MANIFEST_BYTES)
        except OSError:
            return None

    def keep_manifest(self, digest: Digest, data: bytes) -> None:
        """Write an accepted release's manifest; a disk that refuses is logged and no error."""
        try:
            (self._directory / MANIFESTS).mkdir(mode=0o700, exist_ok=True)
            self._write(self._directory / MANIFESTS / digest, data)
        except OSError as error:
            logger.warning("an accepted manifest could not be kept", extra={"reason": error.strerror})

    def collect_manifests(self, keep: frozenset[Digest], *, at_most: int = 0) -> None:
        """Remove the oldest manifests that are not to be kept, until at most this many of them are left."""
        try:
            others = [path for path in (self._directory / MANIFESTS).iterdir() if path.name not in keep]
            others.sort(key=lambda path: path.stat().st_mtime_ns)
            for path in others[: max(len(others) - at_most, 0)]:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except OSError as error:
            logger.warning("old manifests could not be removed", extra={"reason": error.strerror})

    def keep_assignment(self, document: bytes) -> None:
        """The same for the accepted assignment."""
        try:
            self._write(self._directory / "assignment", document)
        except OSError as error:
            logger.warning("the accepted assignment could not be kept", extra={"reason": error.strerror})

    def _path(self, role: str) -> Path:
        return self._directory / f"{quote(role, safe='')}{_SUFFIX}"

    def _read(self, path: Path, max_bytes: int) -> bytes:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise OSError(f"{path.name} is larger than {max_bytes} bytes")
        return data

    def _write(self, path: Path, data: bytes) -> None:
        # A name that no role's file can have; one verification at a time, so one name is enough.
        aside = self._directory / ".new"
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
