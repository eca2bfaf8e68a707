"""What is sent in for publishing, held against the newest root and against what is published now; pure.

The hub asks here before it stores a release, and the signer's machine before it lets a bundle go, so that both say no
to the same things. Not here: changes of keys (ceremony.py), making metadata (repository.py).
"""

from __future__ import annotations

import msgspec

from shared import limits
from shared.errors import Conflict, TrustError
from shared.ids import FamilyName
from shared.model import FileRef
from shared.trust import metadata as md
from shared.trust import repository
from shared.trust.authority import family_keys, require_signed, role_keys
from shared.trust.library import Metadata, Root, Targets
from shared.trust.roles import LEARNED, ROOT, TARGETS, family_paths, family_role, learned_paths


class Publication(msgspec.Struct, frozen=True, kw_only=True):
    """A release that was checked: what the hub stores and puts into its next snapshot.

    Attributes:
        targets: the new top-level targets' bytes, None when they stay as they are.
        role_name: `models/digits`.
        role: the new role's bytes.
        files: what the release role lists now and did not list before.
    """

    targets: bytes | None
    role_name: str
    role: bytes
    files: tuple[FileRef, ...]


def check_publication(
    root: bytes,
    *,
    family: FamilyName,
    current_targets: bytes,
    current_role: bytes | None,
    targets: bytes | None,
    role: bytes,
    now_ms: int,
    is_signed: bool = True,
) -> Publication:
    """Hold what an operator sends for publishing against the root and against what is published now.

    Args:
        root: the newest root.
        family: whose release it is.
        current_targets, current_role: what is published; the role is None before the family's first release.
        targets: new top-level targets, None when only the role is new.
        role: the new metadata of `models/<family>`.
        is_signed: False looks at everything but the new pieces' signatures, for a bundle that is still going round.

    Raises:
        TrustError: a signature, version or expiry does not hold.
        Conflict: something else was published in the meantime, or a released file would change or vanish.
    """
    trusted = repository.read_root(root)
    md.check_fresh(trusted.signed, role=ROOT, now_ms=now_ms)
    top = repository.read_targets(current_targets)
    if targets is not None:
        newer = repository.read_targets(targets)
        if is_signed:
            require_signed(trusted.signed, TARGETS, newer)
        check_next(newer, top, role=TARGETS)
        check_kept(newer, top, role=TARGETS)
        top = newer
    else:
        require_signed(trusted.signed, TARGETS, top)
    md.check_fresh(top.signed, role=TARGETS, now_ms=now_ms)
    name = family_role(family)
    check_delegation(top, family)
    check_learned_delegations(top, trusted.signed)
    incoming = repository.read_targets(role, role=name)
    if is_signed:
        require_signed(top.signed, name, incoming)
    md.check_fresh(incoming.signed, role=name, now_ms=now_ms)
    before = repository.read_targets(current_role, role=name) if current_role is not None else None
    check_next(incoming, before, role=name)
    if before is not None:
        check_kept(incoming, before, role=name)
    known = before.signed.targets if before is not None else {}
    return Publication(
        targets=targets, role_name=name, role=role, files=_new_files(incoming, known=frozenset(known), family=family)
    )


def check_delegation(targets: Metadata[Targets], family: FamilyName) -> None:
    """Devices would search other delegations first or further; only the plain layout is published."""
    name = family_role(family)
    delegations = targets.signed.delegations
    role = (delegations.roles or {}).get(name) if delegations is not None else None
    if role is None or role.paths != [family_paths(family)] or not role.terminating or targets.signed.targets:
        raise TrustError(
            f"the targets do not give {family_paths(family)!r} to {name!r} alone",
            code="trust.unknown_target",
            hint="sign the release with 'outrider release sign', with the targets key at hand for a new family",
        )


def check_learned_delegations(targets: Metadata[Targets], root: Root) -> None:
    """Raise TrustError unless what lets the hub sign learned releases does that and no more.

    One key for each family, which is nobody's who signs anything else of targets or root; only for learned versions;
    before the families' own roles, which still have their say.
    """
    delegations = targets.signed.delegations
    roles = (delegations.roles or {}) if delegations is not None else {}
    people = {
        md.key_material(key)
        for held in (
            *(role_keys(root, role) for role in (ROOT, TARGETS)),
            *(family_keys(targets.signed, role) for role in roles if not role.startswith(LEARNED)),
        )
        if held is not None
        for key in held.keys
    }
    seen_family = False
    for name, role in roles.items():
        if not name.startswith(LEARNED):
            seen_family = True
            continue
        family = FamilyName(name.removeprefix(LEARNED))
        keys = family_keys(targets.signed, name)
        is_plain = role.paths == [learned_paths(family)] and not role.terminating and not seen_family
        if (
            keys is None
            or not is_plain
            or family_role(family) not in roles
            or role.threshold != 1
            or len(keys.keys) != 1
            or md.key_material(keys.keys[0]) in people
        ):
            raise TrustError(
                f"the targets give {name[:120]!r} more than learned releases, or to a key that signs for people",
                code="trust.delegation",
                hint="make the change again: outrider-hub keys rotate learned/FAMILY",
            )


def check_next(newer: Metadata[Targets], current: Metadata[Targets] | None, *, role: str) -> None:
    """Raise Conflict unless this is the version that follows."""
    expected = 1 if current is None else current.signed.version + 1
    if newer.signed.version != expected:
        raise Conflict(
            f"{role} has version {newer.signed.version}, version {expected} is next",
            code="conflict.metadata_version",
            hint="another release was published in the meantime; fetch the proposal and sign again",
        )


def check_kept(newer: Metadata[Targets], current: Metadata[Targets], *, role: str) -> None:
    """Raise Conflict unless every released file and every delegated family is still there, unchanged."""
    for path, before in current.signed.targets.items():
        now = newer.signed.targets.get(path)
        if now is None or not repository.is_same_file(before, now):
            raise Conflict(
                f"{role} would change or drop {path}, which was released",
                code="conflict.release",
                hint="fetch the proposal and sign again",
            )
    if role != TARGETS:
        return
    old, new = current.signed.delegations, newer.signed.delegations
    lost = set((old.roles or {}) if old else ()) - set((new.roles or {}) if new else ())
    # What lets the hub itself sign can be withdrawn, whatever it has signed by then.
    lost = {name for name in lost if not name.startswith(LEARNED)}
    if lost:
        raise Conflict(f"the targets would drop {sorted(lost)}", code="conflict.release", hint="sign again")


def _new_files(role: Metadata[Targets], *, known: frozenset[str], family: FamilyName) -> tuple[FileRef, ...]:
    if role.signed.delegations is not None:
        raise TrustError("a release role may not delegate further", code="trust.unknown_target")
    files = []
    for path, target in role.signed.targets.items():
        parts = path.split("/")
        digest = target.hashes.get("sha256", "")
        if len(parts) != 4 or parts[:2] != ["models", family] or any(part in ("", ".", "..") for part in parts):
            raise TrustError(f"{path[:120]!r} does not belong to {family}", code="trust.unknown_target")
        try:
            file = msgspec.convert({"path": path, "length": target.length, "digest": digest}, FileRef)
        except msgspec.ValidationError as error:
            raise TrustError(f"{path[:120]!r} is not a usable file: {error}", code="trust.malformed") from error
        if len(digest) != 64 or not 0 < file.length <= limits.MAX_MODEL_BYTES:
            raise TrustError(f"{path[:120]!r} has no usable digest or length", code="trust.malformed")
        if path not in known:
            files.append(file)
    return tuple(files)
