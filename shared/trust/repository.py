"""The publishing side, as pure functions: new metadata in, next version out, unsigned until `sign`.

Who calls what: `outrider-hub init` makes the first root and targets; `outrider release sign` delegates a family and
adds a release with the offline keys; the hub signs snapshot and timestamp with its online keys. Rules: nothing given
is changed in place; each call raises the version by one; times are arguments.

Not here: changes of keys (ceremony.py), what the hub checks of what comes in (publication.py), key files
(cloud_hub/keyring.py) and where metadata is kept.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from shared import limits
from shared.errors import Conflict, InvalidValue
from shared.ids import Digest, FamilyName
from shared.model import FileRef, Manifest, check_manifest, encode_manifest, manifest_path
from shared.trust import metadata as md
from shared.trust.assignment import EXTENSION
from shared.trust.library import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Role,
    Root,
    Signer,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from shared.trust.roles import (
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    family_paths,
    family_role,
    learned_paths,
    learned_role,
)

ROOT_DAYS: Final = 365
TARGETS_DAYS: Final = 90
SNAPSHOT_DAYS: Final = 7
LEARNED_DAYS: Final = 7
TIMESTAMP_DAYS: Final = 1


class RoleKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The public keys that may sign for a role, and how many of them must."""

    keys: tuple[Key, ...]
    threshold: int = 1


ONLINE_DOCUMENTS: Final = ("assignment", "time")
"""What the hub signs beside metadata; the root lists their keys in its extension."""


class RootKeys(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a root authorises; without keys for the time, devices keep to their own clocks."""

    root: RoleKeys
    targets: RoleKeys
    snapshot: RoleKeys
    timestamp: RoleKeys
    assignment: RoleKeys
    time: RoleKeys | None = None


def new_root(keys: RootKeys, *, now_ms: int, version: int = 1, days: int = ROOT_DAYS) -> Metadata[Root]:
    """A root that authorises exactly these keys; a successor is signed by the old keys and by the new ones."""
    root = Root(version=version, expires=in_days(now_ms, days), consistent_snapshot=True)
    for role in (ROOT, TARGETS, SNAPSHOT, TIMESTAMP):
        held: RoleKeys = getattr(keys, role)
        check_role_keys(held, role)
        root.roles[role] = Role([key.keyid for key in held.keys], held.threshold)
        root.keys.update({key.keyid: key for key in held.keys})
    extension: dict[str, dict[str, object]] = {}
    for kind in ONLINE_DOCUMENTS:
        signing: RoleKeys | None = getattr(keys, kind)
        if signing is not None:
            check_role_keys(signing, kind)
            root.keys.update({key.keyid: key for key in signing.keys})
            extension[kind] = {"keyids": [key.keyid for key in signing.keys], "threshold": signing.threshold}
    root.unrecognized_fields[EXTENSION] = extension
    return Metadata(root)


def new_targets(*, now_ms: int, days: int = TARGETS_DAYS) -> Metadata[Targets]:
    """The first top-level targets: no files and no families yet."""
    return Metadata(Targets(version=1, expires=in_days(now_ms, days), delegations=Delegations(keys={}, roles={})))


def is_delegated(targets: Metadata[Targets], family: FamilyName, keys: RoleKeys) -> bool:
    """Whether the targets already give this family to exactly these keys, so that nothing needs the targets key."""
    delegations = targets.signed.delegations
    role = (delegations.roles or {}).get(family_role(family)) if delegations is not None else None
    return (
        role is not None
        and role.threshold == keys.threshold
        and set(role.keyids) == {key.keyid for key in keys.keys}
        and role.paths == [family_paths(family)]
        and role.terminating
    )


def delegate_family(
    targets: Metadata[Targets], family: FamilyName, keys: RoleKeys, *, now_ms: int, days: int = TARGETS_DAYS
) -> Metadata[Targets]:
    """The next targets, in which these keys sign the family's releases, and only theirs: terminating, by path."""
    check_role_keys(keys, family)
    signed = copy.deepcopy(targets.signed)
    if signed.delegations is None or signed.delegations.roles is None:
        signed.delegations = Delegations(keys={}, roles={})
    roles = dict(signed.delegations.roles or {})
    name = family_role(family)
    roles[name] = DelegatedRole(
        name,
        [key.keyid for key in keys.keys],
        keys.threshold,
        terminating=True,
        paths=[family_paths(family)],
    )
    used = {keyid for role in roles.values() for keyid in role.keyids}
    known = {**signed.delegations.keys, **{key.keyid: key for key in keys.keys}}
    signed.delegations = Delegations(keys={keyid: key for keyid, key in known.items() if keyid in used}, roles=roles)
    return _next(signed, now_ms=now_ms, days=days)


def delegate_learned(
    targets: Metadata[Targets], family: FamilyName, key: Key | None, *, now_ms: int, days: int = TARGETS_DAYS
) -> Metadata[Targets]:
    """The next targets, in which this key of the hub signs the family's learned releases; without one, nobody does.

    The role comes before all others and is not terminating: what it does not list, the family's own may.
    """
    signed = copy.deepcopy(targets.signed)
    delegations = signed.delegations or Delegations(keys={}, roles={})
    name = learned_role(family)
    roles = {other: role for other, role in (delegations.roles or {}).items() if other != name}
    keys = dict(delegations.keys)
    if key is not None:
        keys[key.keyid] = key
        roles = {name: DelegatedRole(name, [key.keyid], 1, terminating=False, paths=[learned_paths(family)]), **roles}
    used = {keyid for role in roles.values() for keyid in role.keyids}
    signed.delegations = Delegations(keys={keyid: key for keyid, key in keys.items() if keyid in used}, roles=roles)
    return _next(signed, now_ms=now_ms, days=days)


def manifest_ref(manifest: Manifest) -> FileRef:
    """The manifest's own entry: path, length and digest of its canonical JSON."""
    data = encode_manifest(manifest)
    return FileRef(
        path=manifest_path(manifest.family, manifest.version),
        length=len(data),
        digest=_digest(data),
    )


def release_files(manifest: Manifest) -> tuple[FileRef, ...]:
    """Every file of a release: the manifest first, then the golden set and the variants."""
    return (manifest_ref(manifest), manifest.golden.file, *(variant.file for variant in manifest.variants))


def add_release(
    role: Metadata[Targets] | None,
    manifest: Manifest,
    files: tuple[FileRef, ...] | None = None,
    *,
    now_ms: int,
    days: int = TARGETS_DAYS,
) -> Metadata[Targets]:
    """The family's next role metadata, holding the earlier releases and this one.

    Args:
        role: the current metadata, None for the family's first release.
        manifest: of the release.
        files: all files of the release, the manifest included; by default what the manifest says.

    Raises:
        InvalidValue: the manifest or the files are unusable, or do not belong together.
        Conflict: a file of this name was signed with other content: a released version never changes.
    """
    check_manifest(manifest)
    listed = release_files(manifest) if files is None else files
    if not set(release_files(manifest)[1:]) <= set(listed) or listed[0].path != release_files(manifest)[0].path:
        raise InvalidValue("the files are not those of the manifest", code="invalid.release")
    signed = copy.deepcopy(role.signed) if role is not None else Targets(version=1, expires=in_days(now_ms, days))
    for file in listed:
        target = TargetFile(file.length, {"sha256": file.digest}, file.path)
        before = signed.targets.get(file.path)
        if before is not None and not is_same_file(before, target):
            raise Conflict(
                f"{file.path} was released with other content",
                code="conflict.release",
                hint="a released version never changes; choose the next version number",
            )
        signed.targets[file.path] = target
    return Metadata(signed) if role is None else _next(signed, now_ms=now_ms, days=days)


def new_snapshot(
    previous: Metadata[Snapshot] | None, files: Mapping[str, bytes], *, now_ms: int, days: int = SNAPSHOT_DAYS
) -> Metadata[Snapshot]:
    """The next snapshot, naming version, length and digest of `targets` and of every delegated role.

    Args:
        previous: the current one, None at first.
        files: the signed bytes by role name; must hold every role that the previous snapshot listed.
    """
    meta: dict[str, MetaFile] = {}
    for role, data in files.items():
        loaded = md.load(Targets, data, role=role, max_bytes=limits.MAX_TARGETS_BYTES)
        meta[f"{role}.json"] = MetaFile.from_data(loaded.signed.version, data, ["sha256"])
    for name, before in previous.signed.meta.items() if previous is not None else ():
        if name not in meta or meta[name].version < before.version:
            raise Conflict(f"the new snapshot would roll back {name}", code="conflict.snapshot")
    version = 1 if previous is None else previous.signed.version + 1
    return Metadata(Snapshot(version=version, expires=in_days(now_ms, days), meta=meta))


def new_timestamp(
    previous: Metadata[Timestamp] | None, snapshot: bytes, *, now_ms: int, days: int = TIMESTAMP_DAYS
) -> Metadata[Timestamp]:
    """The next timestamp, naming version, length and digest of the signed snapshot."""
    loaded = md.load(Snapshot, snapshot, role=SNAPSHOT, max_bytes=limits.MAX_SNAPSHOT_BYTES)
    version = 1 if previous is None else previous.signed.version + 1
    meta = MetaFile.from_data(loaded.signed.version, snapshot, ["sha256"])
    return Metadata(Timestamp(version=version, expires=in_days(now_ms, days), snapshot_meta=meta))


def sign(metadata: Metadata[md.S], *signers: Signer) -> bytes:
    """The signed bytes, with one signature per signer and none from before; what is stored and served."""
    signed: Metadata[md.S] = Metadata(copy.deepcopy(metadata.signed))
    for signer in signers:
        signed.sign(signer, append=True)
    return signed.to_bytes()


def read_root(data: bytes) -> Metadata[Root]:
    """Parse a root and check that it is signed by its own keys; raises TrustError."""
    root = md.load(Root, data, role=ROOT, max_bytes=limits.MAX_ROOT_BYTES)
    md.check_signatures(root.signed, ROOT, root)
    return root


def read_targets(data: bytes, *, role: str = TARGETS) -> Metadata[Targets]:
    """Parse targets or a delegated role, without checking who signed it; raises TrustError."""
    return md.load(Targets, data, role=role, max_bytes=limits.MAX_TARGETS_BYTES)


def read_snapshot(data: bytes) -> Metadata[Snapshot]:
    """Parse a snapshot, without checking who signed it; raises TrustError."""
    return md.load(Snapshot, data, role=SNAPSHOT, max_bytes=limits.MAX_SNAPSHOT_BYTES)


def read_timestamp(data: bytes) -> Metadata[Timestamp]:
    """Parse a timestamp, without checking who signed it; raises TrustError."""
    return md.load(Timestamp, data, role=TIMESTAMP, max_bytes=limits.MAX_TIMESTAMP_BYTES)


def _next(signed: Targets, *, now_ms: int, days: int) -> Metadata[Targets]:
    signed.version += 1
    signed.expires = in_days(now_ms, days)
    return Metadata(signed)


def is_same_file(one: TargetFile, other: TargetFile) -> bool:
    """Whether two entries name the same bytes."""
    return one.length == other.length and one.hashes.get("sha256") == other.hashes.get("sha256")


def check_role_keys(held: RoleKeys, role: str) -> None:
    """Raise InvalidValue unless there are at least as many different keys as the threshold asks for."""
    if not 1 <= held.threshold <= len({md.key_material(key) for key in held.keys}):
        raise InvalidValue(
            f"{role} needs {held.threshold} signatures but has {len(held.keys)} keys",
            code="invalid.keys",
            hint="give at least as many different keys as the threshold says",
        )


def in_days(now_ms: int, days: int) -> datetime:
    """The moment that many days later, to the second, as metadata holds it."""
    return datetime.fromtimestamp(now_ms // 1000, tz=UTC) + timedelta(days=days)


def _digest(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())
