"""`outrider-hub keys rotate | publish`: the part of a key ceremony that happens on the hub's machine.

`rotate` only makes a draft: nothing changes until enough holders have signed it and it is published. The hub makes its
own online keys anew and keeps the old ones, which sign on until then.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from cloud_hub.cli import screen
from cloud_hub.commands import settings
from cloud_hub.commands.keys import (
    parse_thresholds,
    read_draft,
    read_publics,
    require_complete,
    require_new,
    write_new_draft,
)
from cloud_hub.commands.tokens import actor
from cloud_hub.composition.signing import online_keys
from cloud_hub.ground import migrate
from cloud_hub.ground.database import Database
from cloud_hub.ground.system import SystemClock
from cloud_hub.keyring import ONLINE, Keyring, learned_name
from cloud_hub.releases.desk import change_keys, read_published
from shared.errors import InvalidValue
from shared.ids import FamilyName, parse_family
from shared.trust import ceremony, drafts, repository
from shared.trust.authority import family_keys, role_keys, short
from shared.trust.drafts import Draft
from shared.trust.library import Key, Metadata, Root, Targets
from shared.trust.repository import RoleKeys
from shared.trust.roles import LEARNED, ROOT, TARGETS, family_role, learned_role


def rotate(arguments: argparse.Namespace) -> int:
    """Make the draft of a change of keys."""
    config = settings.load(arguments).config
    config.require()
    require_new(Path(arguments.draft))
    roles = tuple(dict.fromkeys(arguments.roles))
    for role in roles:
        _check_role(role)
    learned = [FamilyName(role.removeprefix(LEARNED)) for role in roles if role.startswith(LEARNED)]
    roles = tuple(role for role in roles if not role.startswith(LEARNED))
    if arguments.withdraw and (roles or not learned):
        raise InvalidValue("--withdraw is for learned/FAMILY alone", code="invalid.usage")
    thresholds = parse_thresholds(arguments.threshold)
    stray = sorted(set(thresholds) - set(roles))
    if stray:
        raise InvalidValue(f"--threshold {stray[0]}: name that role as well", code="invalid.usage")
    with closing(Database(config.database_url)) as database:
        migrate.require_current(database)
        published = read_published(database)
    now_ms = SystemClock().wall_ms()
    root, targets = repository.read_root(published.current[ROOT]), repository.read_targets(published.current[TARGETS])
    added = read_publics(arguments.add)
    _require_wanted(added, roles)
    changes = {
        role: _changed(
            role, _held(root, targets, role), added=_for_role(role, added), removed=arguments.remove,
            threshold=thresholds.get(role),
        )
        for role in roles
    }  # fmt: skip
    _require_removed(arguments.remove, root, targets, roles)
    renewed = [role for role in roles if role in ONLINE and changes[role] is None]
    for role in renewed:
        signer = Keyring(config.folder.keys).add_next(role)
        changes[role] = RoleKeys(keys=(signer.public_key,))
        screen.note(f"made {role} key {short(signer.public_key.keyid)}; the old one signs until the draft is published")
    keyring = None if arguments.withdraw else Keyring(config.folder.keys)
    hub_keys = _learned_keys(targets, learned, keyring)
    parts = _parts(root, targets, published.current, roles, changes, learned=hub_keys, now_ms=now_ms)
    draft = Draft(
        parts=parts,
        basis={role: data.decode() for role, data in published.current.items()},
        roots=tuple(data.decode() for data in published.roots),
    )
    drafts.check_draft(draft, now_ms=now_ms)
    write_new_draft(Path(arguments.draft), draft, as_json=arguments.json)
    return 0


def publish(arguments: argparse.Namespace) -> int:
    """Make a signed draft take effect on this machine's hub, whether it runs or not."""
    config = settings.load(arguments).config
    config.require()
    path = Path(arguments.draft)
    draft = read_draft(path)
    require_complete(draft, path)
    now_ms = SystemClock().wall_ms()
    with closing(Database(config.database_url)) as database:
        migrate.require_current(database)
        keys = online_keys(config.folder.keys)
        parts = {role: text.encode() for role, text in draft.parts.items()}
        changed = database.write_now(lambda conn: change_keys(conn, parts, keys=keys, actor=actor(), now_ms=now_ms))
    if arguments.json:
        screen.show_json({"versions": changed.versions, "new": changed.is_new})
        return 0
    done = "published" if changed.is_new else "was published before:"
    print(f"{done} {', '.join(f'{role} {version}' for role, version in changed.versions.items())}")
    screen.note(
        "A running hub signs with the keys of the new root from now on, and assignments again within a minute; "
        "devices follow when they next refresh. Nothing has to be restarted."
    )
    return 0


def _check_role(role: str) -> None:
    if role in (ROOT, TARGETS, *ONLINE):
        return
    if role.startswith(LEARNED):
        parse_family(role.removeprefix(LEARNED))
        return
    if not role.startswith(ceremony.FAMILIES):
        raise InvalidValue(
            f"{role[:80]!r} is no role",
            code="invalid.role",
            hint=f"one of {', '.join((ROOT, TARGETS, *ONLINE))}, models/FAMILY, or learned/FAMILY",
        )
    parse_family(role.removeprefix(ceremony.FAMILIES))


def _held(root: Metadata[Root], targets: Metadata[Targets], role: str) -> RoleKeys | None:
    if role.startswith(ceremony.FAMILIES):
        return family_keys(targets.signed, role)
    return role_keys(root.signed, role)


def _for_role(role: str, added: Sequence[tuple[str, Key]]) -> list[Key]:
    """The keys that were made for this role; a release key was made for any family."""
    kind = "release" if role.startswith(ceremony.FAMILIES) else role
    return [key for made_for, key in added if made_for == kind]


def _require_wanted(added: Sequence[tuple[str, Key]], roles: Sequence[str]) -> None:
    for made_for, key in added:
        if not any(_for_role(role, [(made_for, key)]) for role in roles):
            raise InvalidValue(
                f"key {short(key.keyid)} was made for {made_for}, which is not changed here",
                code="invalid.keys",
                hint="name its role too, or take another key; release keys are for models/FAMILY",
            )


def _changed(
    role: str, before: RoleKeys | None, *, added: Sequence[Key], removed: Sequence[str], threshold: int | None
) -> RoleKeys | None:
    """The role's keys from now on; None when nothing about them changes."""
    old = before.keys if before is not None else ()
    kept = [key for key in old if not any(key.keyid.startswith(prefix) for prefix in removed)]
    keys = {key.keyid: key for key in (*kept, *added)}
    if before is None and not keys:
        return None
    wanted = threshold or (before.threshold if before is not None else 1)
    if before is not None and set(keys) == {key.keyid for key in old} and wanted == before.threshold:
        return None
    changed = RoleKeys(keys=tuple(keys.values()), threshold=wanted)
    repository.check_role_keys(changed, role)
    return changed


def _learned_keys(
    targets: Metadata[Targets], families: Sequence[FamilyName], keyring: Keyring | None
) -> dict[FamilyName, Key | None]:
    """A new key of the hub for what it learns for each family; without a keyring, what ends that."""
    keys: dict[FamilyName, Key | None] = {}
    for family in families:
        needed = learned_role(family) if keyring is None else family_role(family)
        if family_keys(targets.signed, needed) is None:
            raise InvalidValue(
                f"the targets list no {needed}",
                code="invalid.family",
                hint="there is nothing to withdraw" if keyring is None else "release a base of the family first",
            )
        keys[family] = None
        if keyring is not None:
            keys[family] = key = keyring.add_next(learned_name(family)).public_key
            screen.note(f"made the hub's key {short(key.keyid)} for what it learns for {family!r}")
    return keys


def _require_removed(
    removed: Sequence[str], root: Metadata[Root], targets: Metadata[Targets], roles: Sequence[str]
) -> None:
    """Raise InvalidValue unless each prefix names exactly one key: a mistyped one must not go by unnoticed."""
    keyids = {key.keyid for role in roles for key in (_held(root, targets, role) or RoleKeys(keys=())).keys}
    for prefix in removed:
        found = [keyid for keyid in keyids if keyid.startswith(prefix)]
        if len(found) != 1 or len(prefix) < 8:
            raise InvalidValue(
                f"--remove {prefix[:80]} fits {len(found)} keys of {', '.join(roles)}",
                code="invalid.keys",
                hint="give the first 8 or more digits of a key that has one of these roles",
            )


def _parts(
    root: Metadata[Root],
    targets: Metadata[Targets],
    current: Mapping[str, bytes],
    roles: Sequence[str],
    changes: Mapping[str, RoleKeys | None],
    *,
    learned: Mapping[FamilyName, Key | None],
    now_ms: int,
) -> dict[str, str]:
    """The next version of whatever lists changed keys, and of whatever would not hold under them any more."""
    families = [role for role in roles if role.startswith(ceremony.FAMILIES)]
    in_root = {role: keys for role, keys in changes.items() if keys is not None and role not in families}
    in_targets = {role: keys for role, keys in changes.items() if keys is not None and role in families}
    parts: dict[str, str] = {}
    if in_root or ROOT in roles:
        root = ceremony.next_root(root, in_root, now_ms=now_ms)
        parts[ROOT] = repository.sign(root).decode()
    if in_targets or learned or TARGETS in roles:
        targets = ceremony.next_targets(targets, in_targets, now_ms=now_ms, learned=learned)
        parts[TARGETS] = repository.sign(targets).decode()
    for role in families:
        if role in current:
            following = ceremony.next_role(repository.read_targets(current[role], role=role), now_ms=now_ms)
            parts[role] = repository.sign(following).decode()
        elif changes[role] is None:
            raise InvalidValue(f"{role} has no release yet, and nothing about its keys changes", code="invalid.usage")
    return parts
