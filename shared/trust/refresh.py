"""What a device asks beyond TUF: is this assignment for me, and are the releases that it names signed and fit for me?

The TUF workflow is shared/trust/client.py; this puts the assignment, the manifests and the other floors on top, in the
same style: a generator that says what it needs. The reference time is fixed once for the whole run: the latest of this
device's clock, its time floor, and the moment at which the assignment says it was issued. That last one is signed, so
a device without a clock cannot be shown old metadata beside a new assignment.

A learned release (docs/adr/0010-updates.md) is signed by a key that lies on the hub, so that signature is not asked
what the release is: its base, which a person signed, says that (`_verify_ground`).

Order: roots, then the assignment (its keys are in the root; a refused one costs no further request), then timestamp,
snapshot and the roles on the way to each release, then the manifests.

Not here: downloads of models, and what is installed already (shared/trust/stored.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from typing import Final, TypeVar

from shared import limits
from shared.errors import InvalidValue, TrustError
from shared.ids import FamilyName, ModelVersion
from shared.learned import check_learned_manifest
from shared.model import FileRef, Manifest, decode_manifest, is_learned, parse_manifest_path
from shared.release import LEARNED_CODE, AssignedModel, Assignment, Floors, Ground, VerifiedAssignment, VerifiedModel
from shared.trust import assignment as assignments
from shared.trust import floors, strict, time
from shared.trust import metadata as md
from shared.trust.client import Client, Found, missing
from shared.trust.library import Root
from shared.trust.roles import LEARNED, TARGETS, learned_role
from shared.wire.verification import Job, Keep, KeepManifest, Need, TimeJob

MAX_LEARNED_MS: Final = 14 * 86_400_000
"""How long from now a learned role's metadata may hold; a stolen key cannot sign for longer than it is stolen."""

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
    now_ms = max(_now_ms(job, root), assignment.issued_ms)
    yield from client.refresh(now_ms=now_ms)
    models = []
    for assigned in assignment.models:
        models.append((yield from _verify_model(client, job, assigned, now_ms=now_ms)))
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


def _verify_model(client: Client, job: Job, assigned: AssignedModel, *, now_ms: int) -> Steps[VerifiedModel]:
    """Both signatures must agree: the file that the assignment names is the one that the release role signed."""
    found = yield from client.find(assigned.manifest.path)
    manifest, data = yield from _fetch_manifest(assigned, found)
    check_fit(manifest, profile=job.profile, floors=job.floors)
    check_origin(manifest.family, manifest.version, found, accepts=job.accept_learned)
    ground = None
    if manifest.base is not None:
        check_life(found, now_ms=now_ms)
        ground = yield from _verify_ground(client, job, manifest, manifest.base)
    for file in (manifest.golden.file, *(variant.file for variant in manifest.variants)):
        listed = yield from client.find(file.path)
        check_listed(file, listed)
        check_origin(manifest.family, manifest.version, listed, accepts=job.accept_learned)
    yield KeepManifest(digest=assigned.manifest.digest, data=data)
    return VerifiedModel(manifest=manifest, manifest_digest=assigned.manifest.digest, ground=ground)


def _fetch_manifest(assigned: AssignedModel, found: Found | None) -> Steps[tuple[Manifest, bytes]]:
    """The manifest and its bytes, if it is listed where it was found and is what it is called."""
    ref = assigned.manifest
    check_listed(ref, found)
    data = yield Need(name=ref.path, max_bytes=ref.length, file=ref)
    if data is None:
        raise missing(ref.path)
    return open_manifest(data, assigned), data


def _verify_ground(client: Client, job: Job, learned: Manifest, ref: FileRef) -> Steps[Ground]:
    """What a learned release stands on: a base that a person signed, and that says all the rest of it."""
    family, version = parse_manifest_path(ref.path)
    found = yield from client.find(ref.path)
    base, data = yield from _fetch_manifest(AssignedModel(family=family, version=version, manifest=ref), found)
    check_origin(family, version, found, accepts=job.accept_learned)
    check_learned_manifest(learned, base)
    assert base.learning is not None, "checked with the manifest"
    ours = next(variant for variant in base.variants if variant.name == base.learning.variant)
    check_listed(ours.file, (yield from client.find(ours.file.path)))
    yield KeepManifest(digest=ref.digest, data=data)
    return Ground(file=ours.file, bounds=base.learning)


def check_listed(file: FileRef, found: Found | None) -> None:
    """Raise TrustError unless a signed release holds this file (`trust.unknown_target`) with this very content.

    A target of another length or digest under the same name is `trust.digest`.
    """
    if found is None:
        raise TrustError(
            f"no signed release holds {file.path!r}",
            code="trust.unknown_target",
            hint="sign and publish the release before it is assigned",
        )
    if found.target.length != file.length or found.target.hashes.get("sha256") != file.digest:
        raise TrustError(
            f"{file.path} is not the file that the release signed under this name",
            code="trust.digest",
            hint="the hub and the signed release disagree; build, sign and publish the release again",
        )


def check_origin(family: FamilyName, version: ModelVersion, found: Found | None, *, accepts: bool) -> None:
    """Raise TrustError unless those who list a release may say so, and the device takes what is learned.

    A release of its own is believed from people only, however the hub's role calls those that it delegates to; a
    learned one also from the hub's role itself.

    Args:
        found: where the manifest, or a file of it, is listed.
        accepts: whether this device opted in to learned releases.

    Raises:
        TrustError: `trust.learned_refused` without the opt-in, `trust.learned` for a role that may not say this.
    """
    if is_learned(version) and not accepts:
        raise TrustError(
            f"{family} {version} was learned and not signed by a person, and this device takes no such releases",
            code="trust.learned_refused",
            hint="set updates.accept_learned in the agent's settings, or assign its base",
        )
    chain = found.chain if found is not None else ()
    if not any(role.startswith(LEARNED) for role in chain):
        return
    if not is_learned(version) or chain != (TARGETS, learned_role(family)):
        raise TrustError(
            f"{family} {version} is listed by {' > '.join(chain)[:200]}, which may not sign such a release",
            code=LEARNED_CODE,
            hint="let a person sign this release; if nobody made it, the hub's learned key is stolen",
        )


def check_life(found: Found | None, *, now_ms: int) -> None:
    """Raise TrustError `trust.learned` when the hub's own role would hold for longer than it may."""
    if found is not None and found.chain[-1].startswith(LEARNED) and found.expires_ms - now_ms > MAX_LEARNED_MS:
        raise TrustError(
            f"{found.chain[-1]} metadata would hold for more than {MAX_LEARNED_MS // 86_400_000} days",
            code=LEARNED_CODE,
            hint="if the hub did not sign that, its learned key is stolen: withdraw the delegation",
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
