"""A change of keys on its way from hand to hand: pieces of metadata, the signatures so far, and who is still missing.

A draft is one JSON file. It carries what it changes (`parts`), what is published now (`basis`) and every root so far
(`roots`), so that a signer's machine can judge it without a network and without believing whoever brought it. There is
no secret in it. Pure: files and questions are cloud_hub/commands/keys.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from shared.errors import InvalidValue, TrustError
from shared.trust import ceremony, repository
from shared.trust import metadata as md
from shared.trust.authority import family_keys, role_keys, root_roles, short, signed_by
from shared.trust.library import Metadata, Root, Signer, Targets
from shared.trust.repository import RoleKeys
from shared.trust.roles import LEARNED, ROOT, TARGETS

MAX_DRAFT_BYTES: Final = 32 * 1024 * 1024


class Draft(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of keys.

    Attributes:
        parts: the new metadata by role, signed as far as it goes.
        basis: what is published now, by role; empty for the first root.
        roots: every root from the first to the one that is published now.
    """

    parts: dict[str, str]
    basis: dict[str, str] = {}
    roots: tuple[str, ...] = ()
    kind: str = "key change"
    schema: int = 1


class Quorum(msgspec.Struct, frozen=True, kw_only=True):
    """The signatures that one authority asks of one piece.

    Attributes:
        role, version: the piece that is signed.
        authority: who asks, for people: `root 1`.
        keyids: the keys that may sign.
        signed: those that have.
        threshold: how many different keys must.
    """

    role: str
    version: int
    authority: str
    keyids: tuple[str, ...]
    signed: tuple[str, ...]
    threshold: int

    @property
    def missing(self) -> int:
        """How many signatures are still missing."""
        return max(0, self.threshold - len(self.signed))

    @property
    def waiting(self) -> tuple[str, ...]:
        """The keys that have not signed."""
        return tuple(keyid for keyid in self.keyids if keyid not in self.signed)


def encode_draft(draft: Draft) -> bytes:
    """The draft's file."""
    return msgspec.json.format(msgspec.json.encode(draft), indent=1)


def decode_draft(data: bytes) -> Draft:
    """Parse a draft; raises InvalidValue. Says nothing about who signed it."""
    try:
        draft = msgspec.json.decode(data, type=Draft)
        if draft.schema != 1 or draft.kind != "key change" or len(data) > MAX_DRAFT_BYTES:
            raise ValueError("it is of another kind or version")
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise InvalidValue(
            f"this is not the draft of a change of keys: {str(error)[:200]}",
            code="invalid.draft",
            hint="`outrider-hub keys init --draft FILE` and `keys rotate` make one",
        ) from error
    return draft


def check_draft(draft: Draft, *, now_ms: int, is_signed: bool = False) -> None:
    """Raise unless the draft follows from its own basis; with `is_signed`, unless nothing is missing any more."""
    ceremony.check_change(_bytes(draft.basis), _bytes(draft.parts), now_ms=now_ms, is_signed=is_signed)


def quorums(draft: Draft) -> tuple[Quorum, ...]:
    """What each piece needs, in the order root, targets, families; raises TrustError on metadata that is none."""
    new_root = _root(draft.parts.get(ROOT))
    old_root = _root(draft.basis.get(ROOT))
    trusted = new_root or old_root
    new_targets = _targets(draft.parts.get(TARGETS), TARGETS)
    top = new_targets or _targets(draft.basis.get(TARGETS), TARGETS)
    if trusted is None or top is None:
        raise TrustError("the draft has no root and targets", code="trust.malformed", hint="make it again")
    found = []
    if new_root is not None:
        for authority in (old_root, new_root):
            if authority is not None:
                found.append(_quorum(authority.signed, ROOT, new_root, f"root {authority.signed.version}"))
    if new_targets is not None:
        found.append(_quorum(trusted.signed, TARGETS, new_targets, f"root {trusted.signed.version}"))
    for role in sorted(draft.parts):
        if role not in (ROOT, TARGETS):
            piece = _targets(draft.parts[role], role)
            assert piece is not None
            found.append(_quorum(top.signed, role, piece, f"targets {top.signed.version}"))
    return tuple(found)


def add_signatures(draft: Draft, signers: Iterable[Signer]) -> tuple[Draft, tuple[tuple[str, str], ...]]:
    """Sign every piece with every key that it still waits for.

    Returns:
        The new draft, and (role, key identifier) of each signature that was added.
    """
    held = {signer.public_key.keyid: signer for signer in signers}
    wanted = {(quorum.role, keyid) for quorum in quorums(draft) for keyid in quorum.waiting if keyid in held}
    parts = dict(draft.parts)
    for role, text in draft.parts.items():
        mine = [held[keyid] for name, keyid in sorted(wanted) if name == role]
        if mine and role == ROOT:
            root = ceremony.read_draft_root(text.encode())
            parts[role] = sign_more(root, *mine).decode()
        elif mine:
            parts[role] = sign_more(repository.read_targets(text.encode(), role=role), *mine).decode()
    return msgspec.structs.replace(draft, parts=parts), tuple(sorted(wanted))


def sign_more(metadata: Metadata[md.S], *signers: Signer) -> bytes:
    """The signed bytes with these signatures beside those that are there; the object given is not changed."""
    added: Metadata[md.S] = Metadata(metadata.signed, dict(metadata.signatures))
    for signer in signers:
        added.sign(signer, append=True)
    return added.to_bytes()


def follow(known: bytes, roots: Sequence[bytes]) -> Metadata[Root]:
    """The newest of these roots, if they follow from one that is known; signatures of the known one do not matter.

    Args:
        known: the root that this machine has signed or followed before.
        roots: in order of version, without a gap, from the known version or an older one.

    Raises:
        TrustError: `trust.root` when they are another hub's, or somebody puts a root in between.
    """
    trusted = ceremony.read_draft_root(known)
    for data in roots:
        root = repository.read_root(data)
        if root.signed.version < trusted.signed.version:
            continue
        if root.signed.version == trusted.signed.version:
            if root.signed_bytes != trusted.signed_bytes:
                raise _strange(f"root {root.signed.version} is another one than this machine knows")
            trusted = root
        elif root.signed.version == trusted.signed.version + 1:
            try:
                md.check_signatures(trusted.signed, ROOT, root)
            except TrustError as error:
                raise _strange(f"root {root.signed.version} is not signed by the keys of the root before it") from error
            trusted = root
        else:
            raise _strange(f"there is no root {trusted.signed.version + 1} that leads to the newest one")
    if not roots or repository.read_root(roots[-1]).signed.version != trusted.signed.version:
        raise _strange(f"the newest root is older than root {trusted.signed.version}, which this machine knows")
    return trusted


def describe(draft: Draft) -> tuple[str, ...]:
    """For people, a line each: what every role's keys will be, and what is new or gone."""
    lines = []
    for role in sorted(draft.parts, key=lambda name: (name not in (ROOT,), name != TARGETS, name)):
        if role == ROOT:
            new, old = _root(draft.parts[ROOT]), _root(draft.basis.get(ROOT))
            assert new is not None
            lines.append(f"root {new.signed.version}, until {new.signed.expires:%Y-%m-%d}")
            for name in root_roles(new.signed):
                before = role_keys(old.signed, name) if old is not None else None
                lines += _role_lines(name, role_keys(new.signed, name), before, is_first=old is None)
        else:
            piece, earlier = _targets(draft.parts[role], role), _targets(draft.basis.get(role), role)
            assert piece is not None
            files = f", {len(piece.signed.targets)} files as before" if role != TARGETS else ""
            lines.append(f"{role} {piece.signed.version}, until {piece.signed.expires:%Y-%m-%d}{files}")
            roles = (piece.signed.delegations.roles or {}) if piece.signed.delegations is not None else {}
            held = earlier.signed.delegations if earlier is not None else None
            for name in sorted({*roles, *((held.roles or {}) if held is not None else ())}):
                before = family_keys(earlier.signed, name) if earlier is not None else None
                lines += _role_lines(name, family_keys(piece.signed, name), before, is_first=earlier is None)
    return tuple(lines)


def missing(found: Sequence[Quorum]) -> tuple[str, ...]:
    """For people, a line for each quorum that is not reached: how many are missing and whose keys could sign."""
    lines: dict[tuple[str, tuple[str, ...], int], str] = {}
    for quorum in found:
        if quorum.missing:
            waiting = ", ".join(short(keyid) for keyid in quorum.waiting)
            lines.setdefault(
                (quorum.role, quorum.waiting, quorum.missing),
                f"{quorum.role} {quorum.version} needs {quorum.missing} more of {waiting} "
                f"({quorum.authority} asks for {quorum.threshold})",
            )
    return tuple(lines.values())


def _role_lines(role: str, keys: RoleKeys | None, before: RoleKeys | None, *, is_first: bool) -> list[str]:
    if keys is None:
        return [] if before is None else [f"  {role}: WITHDRAWN"]
    old = {key.keyid for key in before.keys} if before is not None else set()
    new = {key.keyid for key in keys.keys}
    change = "" if before is None or before.threshold == keys.threshold else f", was {before.threshold}"
    whose = ", the hub's own, for what it learns within the bounds of its bases" if role.startswith(LEARNED) else ""
    lines = [f"  {role}: {keys.threshold} of {len(new)}{change}{whose}"]
    for key in keys.keys:
        lines.append(f"    {short(key.keyid)}{'' if is_first or key.keyid in old else '  NEW'}")
    return lines + [f"    {short(keyid)}  REMOVED" for keyid in sorted(old - new)]


def _quorum(authority: Root | Targets, role: str, piece: Metadata[md.S], name: str) -> Quorum:
    held = role_keys(authority, role) if isinstance(authority, Root) else family_keys(authority, role)
    if held is None:
        raise TrustError(f"nobody may sign {role!r}", code="trust.unknown_target", hint="make the draft again")
    return Quorum(
        role=role,
        version=piece.signed.version,
        authority=name,
        keyids=tuple(key.keyid for key in held.keys),
        signed=signed_by(held, piece),
        threshold=held.threshold,
    )


def _root(text: str | None) -> Metadata[Root] | None:
    return None if text is None else ceremony.read_draft_root(text.encode())


def _targets(text: str | None, role: str) -> Metadata[Targets] | None:
    return None if text is None else repository.read_targets(text.encode(), role=role)


def _bytes(pieces: Mapping[str, str]) -> dict[str, bytes]:
    return {role: text.encode() for role, text in pieces.items()}


def _strange(message: str) -> TrustError:
    return TrustError(
        message,
        code="trust.root",
        hint="sign nothing, and ask the others which root is theirs; if it is on purpose, remove trusted-root.json",
    )
