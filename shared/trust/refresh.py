"""What a device asks beyond TUF: is this assignment for me, and are the releases that it names signed and fit for me?

The TUF workflow is shared/trust/client.py; this puts the assignment, the manifests and the other floors on top, in the
same style: a generator that says what it needs. The reference time is fixed once for the whole run: the latest of this
device's clock, its time floor, and the moment at which the assignment says it was issued. That last one is signed, so
a device without a clock cannot be shown old metadata beside a new assignment.

Order: roots, then the assignment (its keys are in the root; a refused one costs no further request), then timestamp,
snapshot and the roles on the way to each release, then the manifests.

Not here: downloads of models, and what is installed already (shared/trust/stored.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from typing import TypeVar

from shared import limits
from shared.errors import InvalidValue, TrustError
from shared.model import FileRef, Manifest, decode_manifest
from shared.release import AssignedModel, Assignment, Floors, VerifiedAssignment, VerifiedModel
from shared.trust import assignment as assignments
from shared.trust import floors, strict, time
from shared.trust import metadata as md
from shared.trust.client import Client, missing
from shared.trust.library import Root, TargetFile
from shared.wire.verification import Job, Keep, KeepManifest, Need, TimeJob

R = TypeVar("R")
Steps = Generator[Need | Keep | KeepManifest, bytes | None, R]


def verify(job: Job) -> Steps[VerifiedAssignment]:
    """Decide whether a device may trust this assignment and the releases that it names.

    Yields:
        Need: to be answered with bytes, or None. Keep: to be answered with None.

    Raises:
        TrustError: whose code names the attack.
        TransferRefused: the hub lacks a file that must be there.
    """
    client = Client(root=job.root, cache=job.cache, floors=job.floors.roles)
    root = yield from client.follow_roots()
    time.check_attested(root, attested=job.time_attested)
    assignment = _open_assignment(job, root)
    yield from client.refresh(now_ms=max(_now_ms(job, root), assignment.issued_ms))
    models = []
    for assigned in assignment.models:
        models.append((yield from _verify_model(client, job, assigned)))
    return VerifiedAssignment(
        assignment=assignment, models=tuple(models), floors=_raised(job, root, client, assignment, models)
    )


def attest(job: TimeJob) -> Steps[int]:
    """Follow the roots that came with the hub's answer, then hold it against the newest: milliseconds since 1970.

    Asks for nothing; roots are worth keeping whatever becomes of the answer.

    Raises:
        TrustError: with a code below `trust.time` for the answer, or that of a root.
    """
    client = Client(root=job.root, cache={}, floors=job.floors.roles)
    root = yield from _served(client.follow_roots(), time.newer_roots(job.answer))
    floor_ms = floors.time_floor(job.floors, root)
    return time.verify_time(job.answer, root=root, device=job.device, nonce=job.nonce, floor_ms=floor_ms)


def _served(run: Steps[R], files: Mapping[str, bytes]) -> Steps[R]:
    """The run with its needs served from these files, by name."""
    answer: bytes | None = None
    while True:
        try:
            step = run.send(answer)
        except StopIteration as end:
            result: R = end.value
            return result
        answer = files.get(step.name) if isinstance(step, Need) else (yield step)


def _open_assignment(job: Job, root: Root) -> Assignment:
    assignment = assignments.verify_assignment(
        job.document,
        root=root,
        device=job.device,
        now_ms=_now_ms(job, root),
        floor=floors.version_floor(job.floors, root),
        previous=job.previous,
    )
    if job.time_attested:
        floors.check_issued(assignment, now_ms=job.wall_ms)
    return assignment


def _now_ms(job: Job, root: Root) -> int:
    return max(job.wall_ms, floors.time_floor(job.floors, root))


def _verify_model(client: Client, job: Job, assigned: AssignedModel) -> Steps[VerifiedModel]:
    """Both signatures must agree: the file that the assignment names is the one that the release role signed."""
    ref = assigned.manifest
    check_listed(ref, (yield from client.find(ref.path)))
    data = yield Need(name=ref.path, max_bytes=ref.length, file=ref)
    if data is None:
        raise missing(ref.path)
    manifest = open_manifest(data, assigned)
    check_fit(manifest, profile=job.profile, floors=job.floors)
    for file in (manifest.golden.file, *(variant.file for variant in manifest.variants)):
        check_listed(file, (yield from client.find(file.path)))
    yield KeepManifest(digest=ref.digest, data=data)
    return VerifiedModel(manifest=manifest, manifest_digest=ref.digest)


def check_listed(file: FileRef, target: TargetFile | None) -> None:
    """Raise TrustError unless a signed release holds this file (`trust.unknown_target`) with this very content.

    A target of another length or digest under the same name is `trust.digest`.
    """
    if target is None:
        raise TrustError(
            f"no signed release holds {file.path!r}",
            code="trust.unknown_target",
            hint="sign and publish the release before it is assigned",
        )
    if target.length != file.length or target.hashes.get("sha256") != file.digest:
        raise TrustError(
            f"{file.path} is not the file that the release signed under this name",
            code="trust.digest",
            hint="the hub and the signed release disagree; build, sign and publish the release again",
        )


def open_manifest(data: bytes, assigned: AssignedModel) -> Manifest:
    """The manifest in these bytes, if they are those that the assignment names and speak of the same release.

    Raises:
        TrustError: `trust.endless_data`, `trust.digest`, `trust.malformed`, `trust.mix_and_match`.
    """
    ref = assigned.manifest
    if len(data) > ref.length:
        raise TrustError(f"{ref.path} has more than {ref.length} bytes", code="trust.endless_data", hint=md.RESEND)
    if len(data) != ref.length or hashlib.sha256(data).hexdigest() != ref.digest:
        raise TrustError(f"{ref.path} is not the file that was signed", code="trust.digest", hint=md.RESEND)
    strict.parse_json(data, what="the manifest", max_bytes=limits.MAX_MANIFEST_BYTES, floats=True)
    try:
        manifest = decode_manifest(data)
    except InvalidValue as error:
        raise TrustError(error.message, code="trust.malformed", hint=error.hint) from error
    if (manifest.family, manifest.version) != (assigned.family, assigned.version):
        raise TrustError(
            f"the manifest under {ref.path} is that of {manifest.family} {manifest.version}",
            code="trust.mix_and_match",
            hint="sign the release again; a manifest must lie under its own name and version",
        )
    return manifest


def check_fit(manifest: Manifest, *, profile: str, floors: Floors) -> None:
    """Raise TrustError when the release was signed for other devices, or lies below its family's security floor.

    Args:
        profile: this device's.
        floors: `releases` holds the security floors.
    """
    if manifest.profiles and profile not in manifest.profiles:
        raise TrustError(
            f"{manifest.family} {manifest.version} was signed for {', '.join(manifest.profiles)[:200]}, this device "
            f"is a {profile!r}",
            code="trust.wrong_hardware",
            hint="assign a release that was signed for this profile, or correct the profile in the agent's settings",
        )
    floor = floors.releases.get(manifest.family, 0)
    if manifest.release_counter < floor:
        raise TrustError(
            f"{manifest.family} {manifest.version} has release counter {manifest.release_counter}, the security "
            f"floor is {floor}",
            code="trust.rollback",
            hint="this release was withdrawn by a newer one; assign a release that is at or above the floor",
        )


def _raised(job: Job, root: Root, client: Client, assignment: Assignment, models: list[VerifiedModel]) -> Floors:
    """The floors after this run: only upwards, except for roles and assignments whose keys were replaced."""
    before = job.floors
    releases = dict(before.releases)
    for model in models:
        family = model.manifest.family
        releases[family] = max(releases.get(family, 0), model.manifest.min_release_counter)
    return Floors(
        assignment_version=assignment.version,
        roles=floors.raised(client.floors(), before, root, assignment),
        releases=releases,
        time_ms=max(before.time_ms, 0 if job.time_attested else min(assignment.issued_ms, job.wall_ms)),
    )
