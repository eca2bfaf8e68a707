"""Whose signatures count: keys and thresholds that a root or targets list for a role, and which of them have signed.

Questions only; what changes an answer is ceremony.py.
"""

from __future__ import annotations

from typing import Final

from shared.errors import TrustError
from shared.trust import metadata as md
from shared.trust.assignment import EXTENSION
from shared.trust.library import Key, Metadata, Root, Targets, UnverifiedSignatureError
from shared.trust.repository import RoleKeys
from shared.trust.roles import ROOT, SNAPSHOT, TARGETS, TIMESTAMP, TOP_LEVEL

SHORT: Final = 12
"""Digits of a key's identifier that people compare."""


def role_keys(root: Root, role: str) -> RoleKeys | None:
    """The keys that a root lists for a role, online roles of the extension included; None when it does not know it."""
    with md.translated(f"keys of {role}"):
        if role in TOP_LEVEL:
            named = root.roles[role]
            return RoleKeys(keys=tuple(root.keys[keyid] for keyid in named.keyids), threshold=named.threshold)
        entry = root.unrecognized_fields.get(EXTENSION, {}).get(role)
        if entry is None:
            return None
        return RoleKeys(keys=tuple(root.keys[keyid] for keyid in entry["keyids"]), threshold=entry["threshold"])


def root_roles(root: Root) -> tuple[str, ...]:
    """Every role that a root lists keys for: the four of TUF, then those of the extension."""
    return (ROOT, TARGETS, SNAPSHOT, TIMESTAMP, *sorted(root.unrecognized_fields.get(EXTENSION, {})))


def family_keys(targets: Targets, role: str) -> RoleKeys | None:
    """The keys of a family's role; None when the targets do not delegate it."""
    delegations = targets.delegations
    found = (delegations.roles or {}).get(role) if delegations is not None else None
    if delegations is None or found is None:
        return None
    return RoleKeys(keys=tuple(delegations.keys[keyid] for keyid in found.keyids), threshold=found.threshold)


def signed_by(keys: RoleKeys, metadata: Metadata[md.S]) -> tuple[str, ...]:
    """Which of these keys have signed, each key once whatever its names are."""
    found: dict[str, str] = {}
    payload = metadata.signed_bytes
    for key in keys.keys:
        if _has_signed(key, metadata, payload):
            found.setdefault(md.key_material(key), key.keyid)
    return tuple(found.values())


def require_signed(authority: Root | Targets, role: str, metadata: Metadata[md.S]) -> None:
    """Raise TrustError `trust.signature` below the threshold, and say which keys could make up for it."""
    try:
        md.check_signatures(authority, role, metadata)
    except TrustError as error:
        held = role_keys(authority, role) if isinstance(authority, Root) else family_keys(authority, role)
        if error.code != "trust.signature" or held is None:
            raise
        signed = signed_by(held, metadata)
        waiting = [short(key.keyid) for key in held.keys if key.keyid not in signed]
        raise TrustError(
            f"{role} {metadata.signed.version} is signed by {len(signed)} of the {held.threshold} keys that it needs; "
            f"missing: {held.threshold - len(signed)} of {', '.join(waiting)}",
            code=error.code,
            hint="let the holder of a missing key sign the same file too; if all have, it was changed after signing",
        ) from error


def short(keyid: str) -> str:
    """The part of a key's identifier that people compare."""
    return keyid[:SHORT]


def _has_signed(key: Key, metadata: Metadata[md.S], payload: bytes) -> bool:
    if key.keyid not in metadata.signatures:
        return False
    with md.translated("a signature"):
        try:
            key.verify_signature(metadata.signatures[key.keyid], payload)
        except UnverifiedSignatureError:
            return False
    return True
