"""What a verification and the one who drives it say to each other, as values and as MessagePack in a frame's payload.

refresh → driver    Need      answer with the bytes, or None where the hub has no such file
refresh → driver    Keep      write this to the cache, after removing what it drops; answer with None
refresh → driver    KeepManifest  the same for a release's manifest
refresh → driver    Accepted  the end: everything holds
refresh → driver    Attested  the end of a TimeJob: the hub's answer holds
refresh → driver    Refused   the end: a TrustError (or a TransferError for a mandatory file that is missing)
driver → refresh    Job       verify an assignment that came
driver → refresh    StoredJob judge what is installed, from what is stored, without asking for anything
refresh → driver    Judged    the end of a StoredJob
"""

from __future__ import annotations

from typing import Final

import msgspec

from shared.errors import ProtocolViolation
from shared.ids import DeviceId, Digest, FamilyName, ModelVersion
from shared.model import FileRef
from shared.release import Floors, VerifiedAssignment

UNATTESTED: Final = "trust.time.unattested"
"""The code with which an assignment is refused until the time was attested; any other refusal is final."""


class Need(msgspec.Struct, frozen=True, kw_only=True, tag="need"):
    """A file of the hub.

    Attributes:
        name: metadata by its consistent-snapshot name, already percent-encoded (`3.targets.json`,
            `1.models%2Fdigits.json`); for a release's file, its target path.
        max_bytes: more than this is an attack; stop reading there.
        file: set when the file is a release's (fetched by digest), None when it is metadata.
    """

    name: str
    max_bytes: int
    file: FileRef | None = None


class Keep(msgspec.Struct, frozen=True, kw_only=True, tag="keep"):
    """Metadata of this role was accepted and is worth a place in the cache.

    Attributes:
        role: its TUF name, not a file name.
        data: the bytes as they came.
        drops: roles whose cached metadata goes first, because the keys that signed it were replaced.
    """

    role: str
    data: bytes
    drops: tuple[str, ...] = ()


class KeepManifest(msgspec.Struct, frozen=True, kw_only=True, tag="keep_manifest"):
    """A manifest was accepted; its bytes are needed again when the device starts without the hub."""

    digest: Digest
    data: bytes


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    """The assignment and every release in it are to be trusted."""

    verified: VerifiedAssignment


class Attested(msgspec.Struct, frozen=True, kw_only=True, tag="attested"):
    """The hub's answer is to be trusted: what its clock said when it answered, in milliseconds since 1970."""

    time_ms: int


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """It is not to be trusted, or cannot be decided for want of a file (`code` starts with `transfer`)."""

    code: str
    message: str
    hint: str = ""


class Job(msgspec.Struct, frozen=True, kw_only=True, tag="job"):
    """What a verification starts from.

    Attributes:
        document: the assignment as it came.
        device: the name on this device's own certificate.
        root: the newest root that this device trusts; the first comes with the enrolment.
        cache: metadata accepted earlier, by role.
        previous: the assignment document accepted last, if it is still there.
        floors: what must not be undercut, whatever the cache holds.
        wall_ms: the trusted time, or the best guess at it (edge_agent/core/trusted_time.py).
        profile: the name of this device's profile.
        time_attested: whether the hub has attested the time since the device started.
        accept_learned: whether this device opted in to learned releases.
    """

    document: bytes
    device: DeviceId
    profile: str
    root: bytes
    cache: dict[str, bytes]
    floors: Floors
    wall_ms: int
    previous: bytes | None = None
    time_attested: bool = False
    accept_learned: bool = False


class TimeJob(msgspec.Struct, frozen=True, kw_only=True, tag="time"):
    """What the check of an attested time starts from; it needs no file, and may have roots to keep.

    Attributes:
        answer: as it came from the hub, newer roots included.
        nonce: what the hub was asked with.
    """

    answer: bytes
    device: DeviceId
    nonce: str
    root: bytes
    floors: Floors


class StoredRelease(msgspec.Struct, frozen=True, kw_only=True):
    """A release that this device may serve, and its manifest's bytes, None when they are gone."""

    family: FamilyName
    version: ModelVersion
    digest: Digest
    data: bytes | None = None


class StoredJob(msgspec.Struct, frozen=True, kw_only=True, tag="stored"):
    """What is on the disk of a device that starts; the fields are those of Job.

    Attributes:
        document: the assignment accepted last, None when it is gone.
        releases: what the device may serve.
    """

    document: bytes | None
    device: DeviceId
    profile: str
    root: bytes
    cache: dict[str, bytes]
    floors: Floors
    releases: tuple[StoredRelease, ...]
    accept_learned: bool = False


class Judged(msgspec.Struct, frozen=True, kw_only=True, tag="judged"):
    """Of each stored release that was not found good, why: by the digest of its manifest.

    Attributes:
        refused: it does not hold any more and must not be served.
        undecided: files that would say are gone; it runs on.
    """

    refused: dict[Digest, Refused]
    undecided: dict[Digest, Refused]


class Fed(msgspec.Struct, frozen=True, kw_only=True, tag="fed"):
    """The answer to a Need or a Keep."""

    data: bytes | None = None


ToVerifier = Job | StoredJob | TimeJob | Fed
FromVerifier = Need | Keep | KeepManifest | Accepted | Attested | Refused | Judged

_encoder = msgspec.msgpack.Encoder()
_to_decoder: msgspec.msgpack.Decoder[ToVerifier] = msgspec.msgpack.Decoder(ToVerifier)
_from_decoder: msgspec.msgpack.Decoder[FromVerifier] = msgspec.msgpack.Decoder(FromVerifier)


def encode(message: ToVerifier | FromVerifier) -> bytes:
    """The message as bytes."""
    return _encoder.encode(message)


def decode_to_verifier(data: bytes | bytearray | memoryview) -> ToVerifier:
    """What the verifier was sent; raises ProtocolViolation."""
    try:
        return _to_decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"the verifier was sent what it cannot read: {error}") from error


def decode_from_verifier(data: bytes | bytearray | memoryview) -> FromVerifier:
    """What the verifier says; raises ProtocolViolation."""
    try:
        return _from_decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"the verifier says what cannot be read: {error}") from error
