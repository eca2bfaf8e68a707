"""A change of the CA, in steps that a person takes and a crash cannot tear: which files say which phase.

    steady      ca.pem, ca.key
    begun       and next.pem, next.key: made, trusted, not yet issuing
    switched    ca.* is the new one; old.pem, old.key is the former

A pair counts when its certificate is there, which is written after its key and removed before it. While `old.pem` and
`next.pem` are both there, a switch was cut off: it is completed before anything else is done, and whoever only reads
sees what will come of it.

Not here: whether the fleet is ready for a step (the devices room).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloud_hub.ground import folder as files
from cloud_hub.ground.authorities import Phase, Stamp, TrustedPair
from cloud_hub.ground.ca import Authority, make_ca
from cloud_hub.ground.folder import DataFolder
from shared.errors import Conflict, StorageError


def load(folder: DataFolder, *, now_ms: int) -> TrustedPair:
    """The authorities and the phase; raises ConfigError when files are missing or do not belong together."""
    # First, so that a step which is taken while we read is noticed by whoever compares.
    seen, phase = stamp(folder), phase_of(folder)
    next_pem, old_pem = folder.next_ca[0], folder.old_ca[0]
    if phase == "steady":
        return TrustedPair(phase=phase, issuing=_pair(folder.ca_certificate, folder.ca_key), stamp=seen)
    if phase == "begun":
        issuing, other = _pair(folder.ca_certificate, folder.ca_key), _pair(*folder.next_ca)
        return TrustedPair(phase=phase, issuing=issuing, other=other, stamp=seen)
    torn = next_pem.is_file()
    new = _pair(*folder.next_ca) if torn else _pair(folder.ca_certificate, folder.ca_key)
    old = _pair(old_pem, folder.old_ca[1])
    return TrustedPair(phase=phase, issuing=new, other=old, link=old.link_to(new, now_ms=now_ms), stamp=seen)


def phase_of(folder: DataFolder) -> Phase:
    """Which phase the files say."""
    if folder.old_ca[0].is_file():
        return "switched"
    return "begun" if folder.next_ca[0].is_file() else "steady"


def stamp(folder: DataFolder) -> Stamp:
    """What changes whenever the authorities do: who looks again and again compares this."""
    found = []
    for path in (folder.ca_certificate, folder.next_ca[0], folder.old_ca[0]):
        try:
            state = path.stat()
        except OSError:
            continue
        found.append((path.name, state.st_mtime_ns, state.st_ino))
    return tuple(found)


@contextmanager
def alone(folder: DataFolder) -> Iterator[None]:
    """Take a step while nobody else does, after a former one was completed; raises Conflict."""
    path = folder.ca_certificate.parent / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict("the CA is being changed by another command", code="conflict.ca", hint="wait") from error
        if folder.old_ca[0].is_file() and folder.next_ca[0].is_file():
            _complete_switch(folder)
        yield
    finally:
        os.close(descriptor)


def begin(folder: DataFolder, *, now_ms: int, label: str) -> None:
    """Make the next CA; raises Conflict unless the phase is `steady`."""
    _require(folder, "steady")
    made = make_ca(now_ms=now_ms, label=label)
    certificate, key = folder.next_ca
    files.write(key, made.key_pem)
    files.write(certificate, made.certificate_pem)


def switch(folder: DataFolder) -> None:
    """Let the next CA issue from here on; raises Conflict unless the phase is `begun`."""
    _require(folder, "begun")
    certificate, key = folder.old_ca
    files.write(key, files.read(folder.ca_key))
    files.write(certificate, files.read(folder.ca_certificate))
    _complete_switch(folder)


def finish(folder: DataFolder) -> None:
    """Trust the old CA no longer; raises Conflict unless the phase is `switched`."""
    _require(folder, "switched")
    _remove(*folder.old_ca)


def _complete_switch(folder: DataFolder) -> None:
    certificate, key = folder.next_ca
    files.write(folder.ca_key, files.read(key))
    files.write(folder.ca_certificate, files.read(certificate))
    _remove(certificate, key)


def _require(folder: DataFolder, wanted: Phase) -> None:
    phase = phase_of(folder)
    if phase != wanted:
        step = {"steady": "begin", "begun": "switch", "switched": "finish"}[phase]
        raise Conflict(
            f"the change of the CA is in phase {phase!r}, not {wanted!r}",
            code="conflict.ca_phase",
            hint=f"the next step is `outrider-hub ca rotate {step}`",
        )


def _pair(certificate: Path, key: Path) -> Authority:
    return Authority(files.read(certificate), files.read(key))


def _remove(certificate: Path, key: Path) -> None:
    try:
        for path in (certificate, key):
            path.unlink(missing_ok=True)
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        raise StorageError(f"{certificate} cannot be removed: {error.strerror}", hint="check its owner") from error
