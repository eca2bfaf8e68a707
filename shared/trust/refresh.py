"""The client workflow of the TUF specification 1.0.3x, sections 5.3 to 5.6, and what Outrider adds after it.

Without I/O: a generator that says which file it needs next, is sent the bytes (None where the hub has none), and
returns the verified assignment or raises. The reference time is fixed once for the whole run: the latest of this
device's clock, its time floor, and the moment at which the assignment says it was issued. That last one is signed, so
a device without a clock cannot be shown old metadata beside a new assignment.

Rules: intermediate roots may have expired, final metadata may not; floors outrank the cache; unchanged metadata is
not asked for again; only accepted metadata is kept, and the root chain link by link.

Not here: hash bins (SuccinctRoles work, nothing of ours publishes them), multiple repositories, downloads of models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from typing import Final, TypeVar

from shared import limits
from shared.errors import InvalidValue, TransferRefused, TrustError
from shared.model import FileRef, Manifest, decode_manifest
from shared.release import AssignedModel, Assignment, Floors, VerifiedAssignment, VerifiedModel
from shared.trust import assignment as assignments
from shared.trust import metadata as md
from shared.trust import strict, time
from shared.trust.library import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from shared.trust.roles import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, file_name
from shared.wire.verification import Job, Keep, Need, TimeJob

R = TypeVar("R")
Steps = Generator[Need | Keep, bytes | None, R]

MAX_ROLES_PER_SEARCH: Final = 32
"""How many delegated roles one target's search may visit."""


def verify(job: Job) -> Steps[VerifiedAssignment]:
    """Decide whether a device may trust this assignment and the releases that it names.

    Yields:
        Need: to be answered with bytes, or None. Keep: to be answered with None.

    Raises:
        TrustError: whose code names the attack.
        TransferRefused: the hub lacks a file that must be there.
    """
    return (yield from _Refresh(job).run())


def attest(job: TimeJob) -> Steps[int]:
    """Follow the roots that came with the hub's answer, then hold it against the newest: milliseconds since 1970.

    Asks for nothing; roots are worth keeping whatever becomes of the answer.

    Raises:
        TrustError: with a code below `trust.time` for the answer, or that of a root.
    """
    follower = _Refresh(
        Job(document=b"", device=job.device, root=job.root, cache={}, floors=job.floors, wall_ms=job.floors.time_ms)
    )
    root = yield from _served(follower.follow_roots(), time.newer_roots(job.answer))
    return time.verify_time(job.answer, root=root, device=job.device, nonce=job.nonce, floor_ms=job.floors.time_ms)


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


class _Refresh:
    """One run. Each method is one step of the specification and leaves what it verified in a field."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cache = dict(job.cache)
        self._floors = dict(job.floors.roles)
        self._floor_names: dict[str, str] = {}
        self._now_ms = 0
        self._root: Root
        self._timestamp: Timestamp
        self._snapshot: Snapshot
        self._targets: dict[tuple[str, str], Targets] = {}

    def run(self) -> Steps[VerifiedAssignment]:
        yield from self.follow_roots()
        time.check_attested(self._root, attested=self._job.time_attested)
        assignment = self._open_assignment()
        md.check_fresh(self._root, role=ROOT, now_ms=self._now_ms)
        yield from self._load_timestamp()
        yield from self._load_snapshot()
        models = []
        for assigned in assignment.models:
            models.append((yield from self._verify_model(assigned)))
        return VerifiedAssignment(assignment=assignment, models=tuple(models), floors=self._raised(assignment, models))

    def _open_assignment(self) -> Assignment:
        """Verify the assignment and fix the reference time; it comes before any fetch that it could spare."""
        job = self._job
        self._now_ms = max(job.wall_ms, job.floors.time_ms)
        assignment = assignments.verify_assignment(
            job.document,
            root=self._root,
            device=job.device,
            now_ms=self._now_ms,
            floors=job.floors,
            previous=job.previous,
        )
        self._now_ms = max(self._now_ms, assignment.issued_ms)
        return assignment

    def follow_roots(self) -> Steps[Root]:
        """5.3: from the trusted root to the newest one, each signed by the one before and by itself."""
        trusted = md.load(Root, self._job.root, role=ROOT, max_bytes=limits.MAX_ROOT_BYTES)
        md.check_signatures(trusted.signed, ROOT, trusted)
        self._root = trusted.signed
        for _ in range(limits.MAX_ROOT_ROTATIONS):
            version = self._root.version + 1
            data = yield Need(name=file_name(ROOT, version), max_bytes=limits.MAX_ROOT_BYTES)
            if data is None:
                break
            newer = md.load(Root, data, role=ROOT, max_bytes=limits.MAX_ROOT_BYTES)
            md.check_signatures(self._root, ROOT, newer)
            md.check_signatures(newer.signed, ROOT, newer)
            if newer.signed.version != version:
                raise TrustError(
                    f"root {version} calls itself version {newer.signed.version}", code="trust.rollback", hint=md.RESEND
                )
            drops = self._rotated(newer.signed)
            self._root = newer.signed
            yield Keep(role=ROOT, data=data, drops=drops)
        else:
            raise TrustError(
                f"more than {limits.MAX_ROOT_ROTATIONS} roots in one go",
                code="trust.endless_data",
                hint="what was verified is kept; a further try goes on from there",
            )
        md.check_version(self._root.version, floor=self._floors.get(ROOT, 0), role=ROOT)
        self._floors[ROOT] = self._root.version
        return self._root

    def _rotated(self, newer: Root) -> tuple[str, ...]:
        """5.3.11: when timestamp or snapshot keys change, what they signed before is no base for comparison."""
        if all(md.key_set(self._root, role) == md.key_set(newer, role) for role in (TIMESTAMP, SNAPSHOT)):
            return ()
        self._cache.pop(TIMESTAMP, None)
        self._cache.pop(SNAPSHOT, None)
        return TIMESTAMP, SNAPSHOT

    def _load_timestamp(self) -> Steps[None]:
        """5.4. An equal version means that nothing has changed: the one at hand stays."""
        trusted = self._cached(Timestamp, TIMESTAMP, limits.MAX_TIMESTAMP_BYTES)
        data = yield from self._fetch(TIMESTAMP, None, limits.MAX_TIMESTAMP_BYTES)
        newer = md.load(Timestamp, data, role=TIMESTAMP, max_bytes=limits.MAX_TIMESTAMP_BYTES)
        md.check_signatures(self._root, TIMESTAMP, newer)
        floor = self._floor(self._root, TIMESTAMP)
        if trusted is not None:
            floor = max(floor, trusted.signed.version)
        md.check_version(newer.signed.version, floor=floor, role=TIMESTAMP)
        if trusted is not None and newer.signed.version == trusted.signed.version:
            self._timestamp = trusted.signed
            md.check_fresh(self._timestamp, role=TIMESTAMP, now_ms=self._now_ms)
            return
        floor = self._floor(self._root, SNAPSHOT)
        if trusted is not None:
            floor = max(floor, trusted.signed.snapshot_meta.version)
        md.check_version(newer.signed.snapshot_meta.version, floor=floor, role=SNAPSHOT)
        md.check_fresh(newer.signed, role=TIMESTAMP, now_ms=self._now_ms)
        self._timestamp = newer.signed
        yield Keep(role=TIMESTAMP, data=data)

    def _load_snapshot(self) -> Steps[None]:
        """5.5. The snapshot at hand serves if the timestamp names it, and as a base for comparison if not."""
        meta = self._timestamp.snapshot_meta
        trusted = self._cached(Snapshot, SNAPSHOT, limits.MAX_SNAPSHOT_BYTES)
        if trusted is not None and self._is_promised(meta, trusted, SNAPSHOT):
            md.check_fresh(trusted.signed, role=SNAPSHOT, now_ms=self._now_ms)
            self._snapshot = trusted.signed
            return
        data = yield from self._fetch(SNAPSHOT, meta.version, _cap(meta.length, limits.MAX_SNAPSHOT_BYTES))
        md.check_promise(meta, data, role=SNAPSHOT)
        newer = md.load(Snapshot, data, role=SNAPSHOT, max_bytes=limits.MAX_SNAPSHOT_BYTES)
        md.check_signatures(self._root, SNAPSHOT, newer)
        _check_promised_version(newer.signed.version, meta, SNAPSHOT)
        for name, before in trusted.signed.meta.items() if trusted is not None else ():
            now = newer.signed.meta.get(name)
            if now is None:
                raise TrustError(
                    f"snapshot {newer.signed.version} no longer lists {name[:120]!r}",
                    code="trust.rollback",
                    hint="the hub's database may have been restored from a backup; publish the release again",
                )
            md.check_version(now.version, floor=before.version, role=name.removesuffix(".json"))
        md.check_fresh(newer.signed, role=SNAPSHOT, now_ms=self._now_ms)
        self._snapshot = newer.signed
        yield Keep(role=SNAPSHOT, data=data)

    def _load_targets(self, role: str, delegator: Root | Targets, delegator_name: str) -> Steps[Targets]:
        """5.6: the role as this delegator trusts it; one that came through another delegator is checked again."""
        known = self._targets.get((delegator_name, role))
        if known is not None:
            return known
        meta = self._snapshot.meta.get(f"{role}.json")
        if meta is None:
            raise TrustError(
                f"the snapshot does not list {role!r}",
                code="trust.mix_and_match",
                hint="publish the release again; the snapshot must name every role that is delegated to",
            )
        md.check_version(meta.version, floor=self._floor(delegator, role), role=role)
        trusted = self._cached_targets(role, delegator, meta)
        data: bytes | None = None
        if trusted is None:
            data = yield from self._fetch(role, meta.version, _cap(meta.length, limits.MAX_TARGETS_BYTES))
            md.check_promise(meta, data, role=role)
            trusted = md.load(Targets, data, role=role, max_bytes=limits.MAX_TARGETS_BYTES)
            md.check_signatures(delegator, role, trusted)
            _check_promised_version(trusted.signed.version, meta, role)
        md.check_fresh(trusted.signed, role=role, now_ms=self._now_ms)
        if data is not None:
            self._cache[role] = data
            yield Keep(role=role, data=data)
        self._targets[(delegator_name, role)] = trusted.signed
        self._raise_floor(delegator, role, meta.version)
        return trusted.signed

    def _find(self, path: str) -> Steps[TargetFile]:
        """5.6.7: search the delegations in pre-order; the first role that lists the path decides."""
        stack: list[tuple[str, str]] = [(TARGETS, ROOT)]
        visited: set[str] = set()
        loaded: dict[str, Root | Targets] = {ROOT: self._root}
        while stack and len(visited) < MAX_ROLES_PER_SEARCH:
            role, delegator_name = stack.pop()
            if role in visited:
                continue
            visited.add(role)
            targets = yield from self._load_targets(role, loaded[delegator_name], delegator_name)
            loaded[role] = targets
            if path in targets.targets:
                return targets.targets[path]
            children: list[tuple[str, str]] = []
            with md.translated(f"delegations of {role}"):
                for name, terminating in targets.delegations.get_roles_for_target(path) if targets.delegations else ():
                    children.append((name, role))
                    if terminating:
                        stack.clear()
                        break
            stack.extend(reversed(children))
        raise TrustError(
            f"no signed release holds {path!r}",
            code="trust.unknown_target",
            hint="sign and publish the release before it is assigned",
        )

    def _verify_model(self, assigned: AssignedModel) -> Steps[VerifiedModel]:
        """Both signatures must agree: the file that the assignment names is the one that the release role signed."""
        ref = assigned.manifest
        _check_listed(ref, (yield from self._find(ref.path)))
        data = yield Need(name=ref.path, max_bytes=ref.length, file=ref)
        if data is None:
            raise _missing(ref.path)
        if len(data) > ref.length:
            raise TrustError(f"{ref.path} has more than {ref.length} bytes", code="trust.endless_data", hint=md.RESEND)
        if len(data) != ref.length or hashlib.sha256(data).hexdigest() != ref.digest:
            raise TrustError(f"{ref.path} is not the file that was signed", code="trust.digest", hint=md.RESEND)
        manifest = _open_manifest(data, assigned)
        floor = self._job.floors.releases.get(assigned.family, 0)
        if manifest.release_counter < floor:
            raise TrustError(
                f"{assigned.family} {assigned.version} has release counter {manifest.release_counter}, the security "
                f"floor is {floor}",
                code="trust.rollback",
                hint="this release was withdrawn by a newer one; assign a release that is at or above the floor",
            )
        for file in (manifest.golden.file, *(variant.file for variant in manifest.variants)):
            _check_listed(file, (yield from self._find(file.path)))
        return VerifiedModel(manifest=manifest, manifest_digest=ref.digest)

    def _raised(self, assignment: Assignment, models: list[VerifiedModel]) -> Floors:
        """The floors after this run: only upwards, except for roles whose keys the root has replaced."""
        self._raise_floor(self._root, TIMESTAMP, self._timestamp.version)
        self._raise_floor(self._root, SNAPSHOT, self._snapshot.version)
        releases = dict(self._job.floors.releases)
        for model in models:
            family = model.manifest.family
            releases[family] = max(releases.get(family, 0), model.manifest.min_release_counter)
        return Floors(
            assignment_version=assignment.version,
            roles={n: v for n, v in self._floors.items() if self._floor_names.get(n.rpartition("@")[0], n) == n},
            releases=releases,
            time_ms=max(self._job.floors.time_ms, assignment.issued_ms),
        )

    def _raise_floor(self, delegator: Root | Targets, role: str, version: int) -> None:
        name = md.floor_name(delegator, role)
        self._floors[name] = version
        self._floor_names[role] = name

    def _floor(self, delegator: Root | Targets, role: str) -> int:
        return self._floors.get(md.floor_name(delegator, role), 0)

    def _cached(self, kind: type[md.S], role: str, max_bytes: int) -> Metadata[md.S] | None:
        """What the cache holds, if today's root still stands behind it; a damaged cache is no error."""
        data = self._cache.get(role)
        if data is None:
            return None
        try:
            cached = md.load(kind, data, role=role, max_bytes=max_bytes)
            md.check_signatures(self._root, role, cached)
        except TrustError:
            return None
        return cached

    def _cached_targets(self, role: str, delegator: Root | Targets, meta: MetaFile) -> Metadata[Targets] | None:
        data = self._cache.get(role)
        if data is None:
            return None
        try:
            cached = md.load(Targets, data, role=role, max_bytes=limits.MAX_TARGETS_BYTES)
            md.check_signatures(delegator, role, cached)
        except TrustError:
            return None
        return cached if self._is_promised(meta, cached, role) else None

    def _is_promised(self, meta: MetaFile, cached: Metadata[md.S], role: str) -> bool:
        if cached.signed.version != meta.version:
            return False
        try:
            md.check_promise(meta, self._cache[role], role=role)
        except TrustError:
            return False
        return True

    def _fetch(self, role: str, version: int | None, max_bytes: int) -> Steps[bytes]:
        name = file_name(role, version)
        data = yield Need(name=name, max_bytes=max_bytes)
        if data is None:
            raise _missing(name)
        if len(data) > max_bytes:
            raise TrustError(
                f"{name} has more than the {max_bytes} bytes that may be", code="trust.endless_data", hint=md.RESEND
            )
        return data


def _cap(length: int | None, bound: int) -> int:
    return bound if length is None else min(length, bound)


def _missing(name: str) -> TransferRefused:
    return TransferRefused(
        f"the hub has no {name}",
        code="transfer.missing",
        hint="publish the release again; the hub's store lacks a file",
    )


def _check_promised_version(found: int, meta: MetaFile, role: str) -> None:
    if found != meta.version:
        raise TrustError(
            f"{role} metadata has version {found} where version {meta.version} is promised",
            code="trust.mix_and_match",
            hint=md.RESEND,
        )


def _check_listed(file: FileRef, target: TargetFile) -> None:
    """Raise TrustError `trust.digest` unless the signed target has this very length and digest."""
    if target.length != file.length or target.hashes.get("sha256") != file.digest:
        raise TrustError(
            f"{file.path} is not the file that the release signed under this name",
            code="trust.digest",
            hint="the hub and the signed release disagree; build, sign and publish the release again",
        )


def _open_manifest(data: bytes, assigned: AssignedModel) -> Manifest:
    strict.parse_json(data, what="the manifest", max_bytes=limits.MAX_MANIFEST_BYTES, floats=True)
    try:
        manifest = decode_manifest(data)
    except InvalidValue as error:
        raise TrustError(error.message, code="trust.malformed", hint=error.hint) from error
    if (manifest.family, manifest.version) != (assigned.family, assigned.version):
        raise TrustError(
            f"the manifest under {assigned.manifest.path} is that of {manifest.family} {manifest.version}",
            code="trust.mix_and_match",
            hint="sign the release again; a manifest must lie under its own name and version",
        )
    return manifest
