"""A look at what is installed when a device starts: from what is stored, without the hub, expiry aside.

Everything else counts as in a refresh: the root by its own keys, the assignment by the root's, the device's name, the
roles on the way to each release by their delegators, the manifests by the digests that were signed, profiles, and the
security floors. Never stop answering because metadata has grown old; stop only installing.

Two kinds of "no", because a device shall neither serve what was revoked nor fall silent over a lost file:

    refused     something is there and does not hold: revoked keys, another device's state, a damaged manifest,
                a release below the floor
    undecided   a file is gone, torn, signed with keys that were replaced since, or not the one that its neighbours
                speak of (a refresh broke off, a disk refused): what runs was accepted once, its files are hashed
                before they are loaded, and it runs on

A root is kept as soon as it is known, what it stands behind only by the refresh that follows. Until then a role that
the newest root does not stand behind says nothing of a theft: planned changes of keys look the same. Once a refresh was
accepted under that root, it is refused. A root that its own keys have not signed is one that the disk has changed.

A refusal that can be seen past a lost file is given all the same.
"""

from __future__ import annotations

from typing import Final

from shared import limits
from shared.errors import OutriderError, TransferRefused, TrustError
from shared.ids import Digest
from shared.model import FileRef, manifest_path
from shared.release import AssignedModel
from shared.trust import assignment as assignments
from shared.trust import floors
from shared.trust import metadata as md
from shared.trust.client import Delegator, Found, Steps, is_promised, promised, search
from shared.trust.library import Metadata, Root, Snapshot, Targets, Timestamp
from shared.trust.refresh import check_fit, check_listed, check_origin, open_manifest
from shared.trust.roles import ROOT, SNAPSHOT, TIMESTAMP
from shared.wire.verification import Judged, Refused, StoredJob, StoredRelease


def judge(job: StoredJob) -> Judged:
    """Which of the stored releases do not hold any more, and of which that cannot be said."""
    refused: dict[Digest, Refused] = {}
    undecided: dict[Digest, Refused] = {}
    try:
        state = _State(job)
    except OutriderError as error:
        table = undecided if isinstance(error, TransferRefused) else refused
        table.update({release.digest: _said(error) for release in job.releases})
        return Judged(refused=refused, undecided=undecided)
    for release in job.releases:
        try:
            state.check(release)
        except TransferRefused as error:
            undecided[release.digest] = _said(error)
        except TrustError as error:
            refused[release.digest] = _said(error)
    return Judged(refused=refused, undecided=undecided)


class _State:
    """The stored metadata, as far as it is there; the constructor judges what all releases stand on."""

    def __init__(self, job: StoredJob) -> None:
        self._job = job
        self._lacks: str | None = None
        root = self._stored(Root, ROOT, None, limits.MAX_ROOT_BYTES)
        try:
            md.check_signatures(root.signed, ROOT, root)
        except TrustError as error:
            raise _gone("a root.json that its own keys have signed", hint=_ENROL) from error
        self._root = root.signed
        if self._root.version < job.floors.roles.get(ROOT, 0):
            raise _gone("root.json of the version that was accepted last")
        self._check_assignment()
        self._snapshot = self._open_snapshot()

    def check(self, release: StoredRelease) -> None:
        """Raise TrustError unless this release holds, TransferRefused where that cannot be said."""
        path = manifest_path(release.family, release.version)
        lacks = self._lacks
        files: tuple[FileRef, ...] = ()
        if release.data:
            # Before the search for its role: what the manifest itself says no to needs no other file.
            ref = FileRef(path=path, length=len(release.data), digest=release.digest)
            assigned = AssignedModel(family=release.family, version=release.version, manifest=ref)
            manifest = open_manifest(release.data, assigned)
            check_fit(manifest, profile=self._job.profile, floors=self._job.floors)
            files = (ref, manifest.golden.file, *(variant.file for variant in manifest.variants))
        else:
            lacks = lacks or path
            self._check_digest(path, release)
        for file in files:
            found = self._find(file.path)
            check_listed(file, found)
            check_origin(release.family, release.version, found, accepts=self._job.accept_learned)
        if lacks is not None:
            raise _gone(lacks)

    def _check_digest(self, path: str, release: StoredRelease) -> None:
        """The manifest is gone; the release role still says whether one of this digest was signed."""
        found = self._find(path)
        length = 0 if found is None else found.target.length
        check_listed(FileRef(path=path, length=length, digest=release.digest), found)
        check_origin(release.family, release.version, found, accepts=self._job.accept_learned)

    def _find(self, path: str) -> Found | None:
        return _finished(search(path, self._root, self._load))

    @property
    def _root_is_new(self) -> bool:
        """Whether nothing was accepted under this root yet."""
        return self._root.version > self._job.floors.roles.get(ROOT, 0)

    def _check_assignment(self) -> None:
        """The assignment is what lets this device run anything, so one that does not hold takes all with it."""
        job = self._job
        if job.document is None:
            self._lacks = "assignment"
            return
        try:
            assignment, _ = assignments.open_assignment(job.document, self._root)
            assignments.check_device(assignment, job.device)
            assignments.check_assignment(assignment)
        except TrustError as error:
            if error.code not in _TORN and error.code != _OTHER_KEYS:
                raise
            self._lacks = "assignment that the root's keys have signed"
            return
        if assignment.version < floors.version_floor(job.floors, self._root):
            self._lacks = "assignment of the version that was accepted last"

    def _open_snapshot(self) -> Snapshot | None:
        try:
            timestamp = self._stored(Timestamp, TIMESTAMP, self._root, limits.MAX_TIMESTAMP_BYTES)
            snapshot = self._stored(Snapshot, SNAPSHOT, self._root, limits.MAX_SNAPSHOT_BYTES)
        except TransferRefused as error:
            self._lacks = self._lacks or error.message
            return None
        except TrustError as error:
            if error.code != _OTHER_KEYS:
                raise
            self._lacks = self._lacks or "a snapshot that the root's keys have signed"
            return None
        meta = timestamp.signed.snapshot_meta
        if not is_promised(meta, snapshot, self._job.cache[SNAPSHOT], role=SNAPSHOT):
            self._lacks = self._lacks or "the snapshot that the timestamp names"
            return None
        return snapshot.signed

    def _load(self, role: str, delegator: Delegator, delegator_name: str) -> Steps[Targets]:  # noqa: ARG002
        """The stored role, if its delegator still stands behind it; nothing is asked for."""
        yield from ()
        try:
            stored = self._stored(Targets, role, delegator, limits.MAX_TARGETS_BYTES)
        except TrustError as error:
            if error.code != _OTHER_KEYS or not self._root_is_new:
                raise
            raise _gone(f"a {role} that the keys of the newest root have signed") from error
        floor = self._job.floors.roles.get(md.floor_name(delegator, role), 0)
        if stored.signed.version < floor:
            raise _gone(f"{role} of the version that was accepted last")
        if self._snapshot is not None and not is_promised(
            promised(self._snapshot, role), stored, self._job.cache[role], role=role
        ):
            raise _gone(f"the {role} that the snapshot names")
        return stored.signed

    def _stored(self, kind: type[md.S], role: str, delegator: Delegator | None, max_bytes: int) -> Metadata[md.S]:
        """Raises TransferRefused when it is gone or torn, TrustError when its delegator does not stand behind it."""
        data = self._job.root if role == ROOT else self._job.cache.get(role)
        if data is None:
            raise _gone(role)
        try:
            found = md.load(kind, data, role=role, max_bytes=max_bytes)
        except TrustError as error:
            raise _gone(role) from error
        if delegator is not None:
            md.check_signatures(delegator, role, found)
        return found


_ENROL: Final = "the disk has changed it: what is installed runs on; to install again, enrol the device anew"
_TORN: Final = frozenset({"trust.malformed", "trust.endless_data"})
"""What a file cut off by a power cut looks like; nobody signed that."""


_OTHER_KEYS: Final = "trust.signature"
"""Keys that were replaced while a refresh broke off. The online ones say what is newest and vouch for no model."""


def _finished(steps: Steps[Found | None]) -> Found | None:
    try:
        next(steps)
    except StopIteration as end:
        found: Found | None = end.value
        return found
    raise AssertionError("what is stored asks for nothing")


def _gone(
    what: str, *, hint: str = "the next refresh brings it again; until then the release runs on"
) -> TransferRefused:
    return TransferRefused(f"not stored: {what}", code="transfer.not_stored", hint=hint)


def _said(error: OutriderError) -> Refused:
    return Refused(code=error.code, message=error.message, hint=error.hint)
