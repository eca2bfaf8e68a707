"""Changes of keys, as pure functions: who may sign for a role from now on, and whether such a change holds.

A change is a few pieces of metadata that take effect together: the next root, the next targets, the next version of
families' roles. Whoever changes the keys of a role has what that role signs signed again in the same change, so that
no device ever sees a root under which the rest does not hold.

    root       the keys of root, targets and of every online role (the latter's list is in the extension `x-outrider`)
    targets    the keys of each family, and the hub's own key for what it may learn
    family     nothing but its releases

Rules: a root follows from the one before it, by one version, signed by a threshold of the old keys and of the new ones
(TUF specification 5.3); an offline key is never an online key; online roles need one signature, because the hub signs
alone; a change of keys changes no file. Not here: signatures that are still missing (drafts.py), releases.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Final

from shared import limits
from shared.errors import Conflict, InvalidValue, TrustError
from shared.ids import FamilyName, parse_family
from shared.trust import metadata as md
from shared.trust import publication, repository
from shared.trust.assignment import EXTENSION, TYPE, authorised_keys
from shared.trust.authority import family_keys, require_signed, role_keys, root_roles
from shared.trust.library import Delegations, Key, Metadata, Role, Root, Targets
from shared.trust.repository import ROOT_DAYS, TARGETS_DAYS, RoleKeys
from shared.trust.roles import LEARNED, ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP_LEVEL

FAMILIES: Final = "models/"
OFFLINE_ROLES: Final = (ROOT, TARGETS)


def first_root(keys: Mapping[str, RoleKeys], *, now_ms: int, days: int = ROOT_DAYS) -> Metadata[Root]:
    """Version 1, with exactly these keys by role."""
    empty = Root(version=1, expires=repository.in_days(now_ms, days), consistent_snapshot=True)
    root = next_root(Metadata(empty), keys, now_ms=now_ms, days=days)
    root.signed.version = 1
    return root


def next_root(
    current: Metadata[Root], changes: Mapping[str, RoleKeys], *, now_ms: int, days: int = ROOT_DAYS
) -> Metadata[Root]:
    """The root that follows, with other keys for these roles; without changes only its life begins anew.

    Raises:
        InvalidValue: a threshold that the keys cannot reach, or a key on both sides of the line between online and
            offline.
    """
    signed = copy.deepcopy(current.signed)
    signed.version += 1
    signed.expires = repository.in_days(now_ms, days)
    extension = dict(signed.unrecognized_fields.get(EXTENSION, {}))
    for role, held in changes.items():
        repository.check_role_keys(held, role)
        keyids = [key.keyid for key in held.keys]
        signed.keys.update({key.keyid: key for key in held.keys})
        if role in TOP_LEVEL:
            signed.roles[role] = Role(keyids, held.threshold)
        else:
            extension[role] = {"keyids": keyids, "threshold": held.threshold}
    signed.unrecognized_fields[EXTENSION] = extension
    used = {key.keyid for role in root_roles(signed) for key in _required(signed, role).keys}
    signed.keys = {keyid: key for keyid, key in signed.keys.items() if keyid in used}
    _check_sides(signed)
    return Metadata(signed)


def next_targets(
    current: Metadata[Targets],
    changes: Mapping[str, RoleKeys],
    *,
    now_ms: int,
    days: int = TARGETS_DAYS,
    learned: Mapping[FamilyName, Key | None] | None = None,
) -> Metadata[Targets]:
    """The targets that follow, with other keys for these families' roles; without changes only their life begins anew.

    Args:
        learned: the hub's own key for what is learned, by family; None ends it.

    Raises:
        InvalidValue: a threshold that the keys cannot reach.
    """
    signed = copy.deepcopy(current.signed)
    signed.version += 1
    signed.expires = repository.in_days(now_ms, days)
    if signed.delegations is None or signed.delegations.roles is None:
        signed.delegations = Delegations(keys={}, roles={})
    metadata = Metadata(signed)
    version = metadata.signed.version
    for role, held in changes.items():
        family = parse_family(role.removeprefix(FAMILIES))
        metadata = repository.delegate_family(metadata, family, held, now_ms=now_ms, days=days)
    for family, key in (learned or {}).items():
        metadata = repository.delegate_learned(metadata, family, key, now_ms=now_ms, days=days)
    metadata.signed.version = version
    return metadata


def next_role(current: Metadata[Targets], *, now_ms: int, days: int = TARGETS_DAYS) -> Metadata[Targets]:
    """A family's role once more, with the same files and a life that begins anew."""
    signed = copy.deepcopy(current.signed)
    signed.version += 1
    signed.expires = repository.in_days(now_ms, days)
    return Metadata(signed)


def read_draft_root(data: bytes) -> Metadata[Root]:
    """Parse a root that may still lack signatures; raises TrustError."""
    return md.load(Root, data, role=ROOT, max_bytes=limits.MAX_ROOT_BYTES)


def check_change(
    current: Mapping[str, bytes], parts: Mapping[str, bytes], *, now_ms: int, is_signed: bool = True
) -> None:
    """Hold a change against what is published: everything must hold under the keys that it brings.

    Args:
        current: the newest signed metadata by role; empty before the first root.
        parts: the change, by role.
        is_signed: False looks at everything but the new pieces' signatures, for a draft that is still going round.

    Raises:
        TrustError: a signature, an expiry or a rule does not hold, or something published would no longer hold.
        Conflict: something else was published in the meantime, or a released file would change or vanish.
        InvalidValue: the change is empty or holds what no change of keys holds.
    """
    for role in parts:
        if role not in OFFLINE_ROLES and not role.startswith(FAMILIES):
            raise InvalidValue(f"{role[:80]!r} is not part of a change of keys", code="invalid.draft")
    if not parts or not set(OFFLINE_ROLES) <= set(current or parts):
        raise InvalidValue("the change of keys is not complete", code="invalid.draft", hint="make the draft again")
    if current:
        _check_basis(current)
    root = _check_root(current.get(ROOT), parts.get(ROOT), now_ms=now_ms, is_signed=is_signed)
    targets = _check_targets(root, current.get(TARGETS), parts.get(TARGETS), now_ms=now_ms, is_signed=is_signed)
    for role in sorted({role for role in (*current, *parts) if role.startswith(FAMILIES)}):
        _check_family(targets, role, current.get(role), parts.get(role), now_ms=now_ms, is_signed=is_signed)


def _check_basis(current: Mapping[str, bytes]) -> None:
    """What a change follows from must hold itself: else a forged one would pass for something that does not change."""
    root = repository.read_root(current[ROOT])
    targets = repository.read_targets(current[TARGETS])
    require_signed(root.signed, TARGETS, targets)
    for role, data in current.items():
        if role.startswith(FAMILIES):
            require_signed(targets.signed, role, repository.read_targets(data, role=role))


def _check_root(current: bytes | None, new: bytes | None, *, now_ms: int, is_signed: bool) -> Root:
    before = None if current is None else repository.read_root(current)
    if new is None:
        assert before is not None, "a change without a root changes what is published"
        md.check_fresh(before.signed, role=ROOT, now_ms=now_ms)
        return before.signed
    after = read_draft_root(new)
    expected = 1 if before is None else before.signed.version + 1
    if after.signed.version != expected:
        raise Conflict(
            f"the root has version {after.signed.version}, version {expected} is next",
            code="conflict.metadata_version",
            hint="another root was published in the meantime; make the change again with `outrider-hub keys rotate`",
        )
    if before is not None and is_signed:
        require_signed(before.signed, ROOT, after)
    if is_signed:
        require_signed(after.signed, ROOT, after)
    md.check_fresh(after.signed, role=ROOT, now_ms=now_ms)
    if not after.signed.consistent_snapshot:
        raise TrustError("the root gives up consistent snapshots", code="trust.malformed")
    authorised_keys(after.signed)
    lost = set(root_roles(before.signed) if before is not None else ()) - set(root_roles(after.signed))
    if lost:
        raise TrustError(f"the root lists no keys for {sorted(lost)[0]!r} any more", code="trust.malformed")
    try:
        for role in root_roles(after.signed):
            repository.check_role_keys(_required(after.signed, role), role)
        _check_sides(after.signed)
    except InvalidValue as error:
        raise TrustError(error.message, code="trust.keys", hint=error.hint) from error
    return after.signed


def _check_targets(root: Root, current: bytes | None, new: bytes | None, *, now_ms: int, is_signed: bool) -> Targets:
    before = None if current is None else repository.read_targets(current)
    if new is None:
        assert before is not None, "a first change brings targets"
        require_signed(root, TARGETS, before)
        return before.signed
    after = repository.read_targets(new)
    publication.check_next(after, before, role=TARGETS)
    if before is not None:
        publication.check_kept(after, before, role=TARGETS)
    if after.signed.targets:
        raise TrustError("the top-level targets list files", code="trust.unknown_target")
    for role in (after.signed.delegations.roles or {}) if after.signed.delegations is not None else {}:
        if not role.startswith(LEARNED):
            _require_plain(after, role)
    publication.check_learned_delegations(after, root)
    if is_signed:
        require_signed(root, TARGETS, after)
    md.check_fresh(after.signed, role=TARGETS, now_ms=now_ms)
    return after.signed


def _check_family(
    targets: Targets, role: str, current: bytes | None, new: bytes | None, *, now_ms: int, is_signed: bool
) -> None:
    if current is None:
        raise InvalidValue(
            f"{role[:80]!r} has no release yet", code="invalid.draft", hint="its first release brings its metadata"
        )
    if new is None:
        # The family's keys may be others now: then what it has released must be signed again in the same change.
        require_signed(targets, role, repository.read_targets(current, role=role))
        return
    before, after = repository.read_targets(current, role=role), repository.read_targets(new, role=role)
    publication.check_next(after, before, role=role)
    publication.check_kept(after, before, role=role)
    if set(after.signed.targets) != set(before.signed.targets) or after.signed.delegations is not None:
        raise TrustError(
            f"{role} would list other files than before",
            code="trust.unknown_target",
            hint="a change of keys changes no files; releases are published with `outrider release publish`",
        )
    if is_signed:
        require_signed(targets, role, after)
    md.check_fresh(after.signed, role=role, now_ms=now_ms)


def _require_plain(targets: Metadata[Targets], role: str) -> None:
    try:
        if not role.startswith(FAMILIES):
            raise InvalidValue("it is no family's", code="invalid.family")
        family = parse_family(role.removeprefix(FAMILIES))
    except InvalidValue as error:
        raise TrustError(f"the targets delegate {role[:80]!r}", code="trust.delegation") from error
    publication.check_delegation(targets, family)
    keys = family_keys(targets.signed, role)
    assert keys is not None
    try:
        repository.check_role_keys(keys, role)
    except InvalidValue as error:
        raise TrustError(error.message, code="trust.keys", hint=error.hint) from error


def _check_sides(root: Root) -> None:
    """An online key lies on the hub: if it could also sign a root or targets, whoever has the hub had the fleet."""
    online: dict[str, str] = {}
    for role in root_roles(root):
        if role in OFFLINE_ROLES:
            continue
        held = _required(root, role)
        if held.threshold != 1:
            raise InvalidValue(
                f"{role} would need {held.threshold} signatures, but the hub signs alone",
                code="invalid.threshold",
                hint="thresholds are for root, targets and families",
            )
        online.update({md.key_material(key): role for key in held.keys})
    for role in OFFLINE_ROLES:
        for key in _required(root, role).keys:
            other = online.get(md.key_material(key))
            if other is not None:
                raise InvalidValue(
                    f"key {key.keyid[:12]} would sign for {role} and for {other}",
                    code="invalid.keys",
                    hint="a key that lies on the hub must not sign for an offline role; make another one",
                )


def _required(root: Root, role: str) -> RoleKeys:
    held = role_keys(root, role)
    if held is None:
        raise InvalidValue(f"the root lists no keys for {role!r}", code="invalid.keys", hint="give at least one")
    return held


def required_roles() -> tuple[str, ...]:
    """The roles that every root must list keys for."""
    return (ROOT, TARGETS, SNAPSHOT, TIMESTAMP, TYPE)
