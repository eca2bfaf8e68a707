"""What a device knows of releases after the trust rules have spoken: values only, no signatures here."""

from __future__ import annotations

from typing import Final

import msgspec

from shared.ids import DeviceId, Digest, FamilyName, ModelVersion
from shared.model import FileRef, Learning, Manifest


class AssignedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model that a device shall run: which release, by the digest of its manifest."""

    family: FamilyName
    version: ModelVersion
    manifest: FileRef


LEARNED_CODE: Final = "trust.learned"
"""The code of a learned release that does not keep to its base (shared/learned.py)."""


class Patch(msgspec.Struct, frozen=True, kw_only=True):
    """A way from one file to another that is shorter than the other (shared/patch).

    Attributes:
        base, result: SHA-256 of the file that it starts from and of the one that it makes.
        digest, length: of the patch itself; checked before a byte of it is read.
    """

    base: Digest
    result: Digest
    digest: Digest
    length: int


class Assignment(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The full desired state of one device: never empty, bound to its name, monotone, expiring.

    Attributes:
        device: the only device that it is for.
        version: grows by at least one with each assignment for the device.
        issued_ms, expires_ms: hub's wall clock; expiry stops installing, never serving.
        models: at least one, one per family.
        force: families whose quarantine the operator lifts with this assignment.
        together: sets of families that change as one or not at all; no family is in two.
        patches: shorter ways to files of these releases, from what this device runs; only ever a help.
    """

    device: DeviceId
    version: int
    issued_ms: int
    expires_ms: int
    models: tuple[AssignedModel, ...]
    force: tuple[FamilyName, ...] = ()
    together: tuple[tuple[FamilyName, ...], ...] = ()
    patches: tuple[Patch, ...] = ()


class Floors(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What never goes down on a device, kept apart from the metadata cache so that losing the cache lowers nothing.

    Attributes:
        assignment_version: newest assignment accepted, whoever signed it; decides only until the first is in `roles`.
        roles: newest version accepted, for `root` by its name, for any other TUF role by name and fingerprint of the
            key set that signs it (`timestamp@9f3a…`, `models/digits@04bc…`): new keys begin with a floor of their own.
            For assignments too, version and moment of issue (shared/trust/floors.py).
        releases: highest `min_release_counter` seen by family.
        time_ms: a moment that has passed by this device's own clock and by signed documents; bound to no keys.
        attested_ms: what the hub attested last; the one that a later attestation may lower.
    """

    assignment_version: int = 0
    roles: dict[str, int] = {}
    releases: dict[str, int] = {}
    time_ms: int = 0
    attested_ms: int = 0


class Ground(msgspec.Struct, frozen=True, kw_only=True):
    """What the file of a learned release is held against before it is loaded (shared/learned.py).

    Attributes:
        file: the base's file of the same variant, signed by a person.
        bounds: what may differ from it.
    """

    file: FileRef
    bounds: Learning


class VerifiedModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A release that both signatures agree on: the manifest is signed and the assignment names it.

    Attributes:
        ground: of a learned release, what it was learned on; None for one that a person signed.
    """

    manifest: Manifest
    manifest_digest: Digest
    ground: Ground | None = None


class VerifiedAssignment(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of a verification: what to run, and the floors after it."""

    assignment: Assignment
    models: tuple[VerifiedModel, ...]
    floors: Floors
