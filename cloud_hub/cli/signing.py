"""`outrider release sign`: the step that no hub can take.

Rules: what is signed was fetched (or carried here), hashed and run here first, also where others have signed before;
what is added to is vouched for by the root that lies beside the keys, or carries our own earlier signature, or the hub
could slip its own files in among the earlier ones; targets are signed only when the family is new or its delegation is
about to expire; the keys of others are never replaced by the way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub import files
from cloud_hub.cli import screen
from cloud_hub.cli.answers import parse_release
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import CommandFailed, Exit
from cloud_hub.cli.hub import Hub
from cloud_hub.cli.inspection import Inspected, Origin, Proposal, inspect
from cloud_hub.cli.origins import MAX_KNOWN, FolderOrigin, HubOrigin
from cloud_hub.cli.system import SystemClock
from cloud_hub.keyring import TRUSTED_ROOT, Keyring
from shared.errors import Conflict, InvalidValue, StorageError, TrustError
from shared.ids import FamilyName, ModelVersion
from shared.trust import ceremony, drafts, publication, repository
from shared.trust import metadata as md
from shared.trust.authority import family_keys, require_signed, role_keys, short, signed_by
from shared.trust.drafts import Draft
from shared.trust.library import CryptoSigner, Metadata, Root, Targets
from shared.trust.repository import RoleKeys
from shared.trust.roles import ROOT, TARGETS, family_role

RENEW_MS: Final = 45 * 86_400_000
MAX_LIFE_MS: Final = 400 * 86_400_000
MAX_BUNDLE_BYTES: Final = 16 * 1024 * 1024
_DO_NOT: Final = "do not sign it; ask whoever sent it, or begin a bundle of your own"


class Bundle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A signed release on its way to the hub: metadata only, no secret in it.

    Attributes:
        targets: new top-level targets, None when they stay as they are.
        role: new metadata of `models/<family>`.
    """

    family: str
    version: str
    role: str
    targets: str | None = None
    schema: int = 1


def sign(arguments: argparse.Namespace) -> Exit:
    """Check a proposal, ask, sign it, and write the bundle that `release publish` sends."""
    family, version = parse_release(arguments.name)
    keyring = Keyring(Path(arguments.keys))
    signers = keyring.signers()
    begun = Path(arguments.bundle) if arguments.bundle else None
    out = Path(arguments.out) if arguments.out else begun or Path(bundle_name(family, version))
    inspected = inspect(_origin(arguments, keyring), family, version)
    screen.note(inspected.text())
    inspected.require_fit()
    now_ms, name = SystemClock().wall_ms(), family_role(family)
    if begun is None:
        draft = _begin(inspected, keyring, signers, now_ms=now_ms, days=arguments.expires_days)
    else:
        draft = _resume(inspected, _bundle_for(begun, family, version), now_ms=now_ms)
    _require_basis(draft, _knows(keyring, inspected.proposal), signers, name=name)
    signed, added = drafts.add_signatures(draft, signers)
    _require_use(added, draft, out)
    _tell_signatures(added, draft, family)
    if not arguments.yes:
        _ask()
    missing = drafts.missing(drafts.quorums(signed))
    _rehearse(signed, family, now_ms=now_ms, is_signed=not missing)
    bundle = Bundle(family=family, version=version, role=signed.parts[name], targets=signed.parts.get(TARGETS))
    _write(out, bundle)
    if arguments.json:
        summary = {"bundle": str(out), "new_family": TARGETS in draft.parts, "missing": list(missing)}
        screen.show_json({**inspected.summary(), **summary})
        return Exit.DONE
    print(f"signed {family}/{version}: {out}")
    for line in missing:
        print(f"missing: {line}")
    if missing:
        screen.note(f"next, where such a key is: outrider release sign {family}/{version} --keys DIR --bundle {out}")
    else:
        screen.note(f"next: outrider release publish {out} --assign all")
    return Exit.DONE


def _origin(arguments: argparse.Namespace, keyring: Keyring) -> Origin:
    if arguments.origin:
        return FolderOrigin(Path(arguments.origin))
    path = keyring.directory / TRUSTED_ROOT
    hub = Hub(load_context(arguments.context))
    if path.exists():
        return HubOrigin(hub, known_root=ceremony.read_draft_root(path.read_bytes()).signed.version)
    return HubOrigin(hub, known_root=MAX_KNOWN)


def _bundle_for(path: Path, family: FamilyName, version: ModelVersion) -> Bundle:
    bundle = read_bundle(path)
    if (bundle.family, bundle.version) != (family, version):
        raise InvalidValue(
            f"{path} is for {bundle.family}/{bundle.version}, not {family}/{version}", code="invalid.bundle"
        )
    return bundle


def _require_use(added: Sequence[tuple[str, str]], draft: Draft, out: Path) -> None:
    if added:
        return
    lines = drafts.missing(drafts.quorums(draft))
    raise Conflict(
        "\n".join(("no key here can add a signature", *lines)) if lines else f"{out} has every signature that it needs",
        code="conflict.signed",
        hint="sign where one of the missing keys is" if lines else f"outrider release publish {out}",
    )


def _tell_signatures(added: Sequence[tuple[str, str]], draft: Draft, family: FamilyName) -> None:
    name = family_role(family)
    until = repository.read_targets(draft.parts[name].encode(), role=name).signed.expires
    screen.note("")
    for role, keyid in added:
        if role == name:
            screen.note(f"the key {short(keyid)} signs this until {until:%Y-%m-%d}")
        else:
            held = family_keys(repository.read_targets(draft.parts[TARGETS].encode()).signed, name)
            assert held is not None
            whom = ", ".join(short(key.keyid) for key in held.keys)
            screen.note(f"the targets key {short(keyid)} gives the family {family!r} to {held.threshold} of {whom}")


def bundle_name(family: str, version: str) -> str:
    """The name under which a bundle is written and looked for."""
    return f"{family}-{version}.release.json"


def read_bundle(path: Path) -> Bundle:
    """Read a bundle; raises InvalidValue when it is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise InvalidValue(f"{path} cannot be read: {error.strerror}", code="invalid.bundle") from error
    try:
        bundle = msgspec.json.decode(data, type=Bundle)
    except msgspec.MsgspecError as error:
        raise InvalidValue(
            f"{path} is not a signed release: {error}", code="invalid.bundle", hint="make one: outrider release sign"
        ) from error
    if bundle.schema != 1 or len(data) > MAX_BUNDLE_BYTES:
        raise InvalidValue(f"{path} is of a version that this program does not know", code="invalid.bundle")
    parse_release(f"{bundle.family}/{bundle.version}")
    return bundle


def _knows(keyring: Keyring, proposal: Proposal) -> Root | None:
    """The newest root, if it follows from the one that lies beside the keys; None when none lies there."""
    path = keyring.directory / TRUSTED_ROOT
    if not path.exists():
        return None
    chain = [text.encode() for text in (*proposal.roots, proposal.root)]
    return drafts.follow(path.read_bytes(), chain).signed


def _begin(inspected: Inspected, keyring: Keyring, signers: Sequence[CryptoSigner], *, now_ms: int, days: int) -> Draft:
    """What there is to sign, without a signature: the role, and the targets where they have to change."""
    proposal, family = inspected.proposal, inspected.manifest.family
    name = family_role(family)
    root, current = _root_of(proposal), repository.read_targets(proposal.targets.encode())
    may_sign_targets = _may(role_keys(root, TARGETS), signers)
    held = family_keys(current.signed, name)
    parts: dict[str, str] = {}
    if held is None:
        if not may_sign_targets and keyring.signer("targets"):
            raise _other_root(keyring.path("targets"))
        held = RoleKeys(keys=(keyring.signer("release").public_key,))
        parts[TARGETS] = _renewed(current, family, held, now_ms=now_ms)
    elif not _may(held, signers):
        who = ", ".join(short(key.keyid) for key in held.keys)
        raise Conflict(
            f"the family {family!r} is signed by {held.threshold} of the keys {who}, and none of them is in "
            f"{keyring.directory}",
            code="conflict.release_key",
            hint=f"sign with one of them; `outrider-hub keys rotate models/{family}` gives the family other keys",
        )
    elif may_sign_targets and md.expires_ms(current.signed) - now_ms <= RENEW_MS:
        parts[TARGETS] = _renewed(current, family, held, now_ms=now_ms)
    role = repository.add_release(_before(proposal, name), inspected.manifest, proposal.files, now_ms=now_ms, days=days)
    parts[name] = repository.sign(role).decode()
    return _draft(proposal, name, parts)


def _resume(inspected: Inspected, bundle: Bundle, *, now_ms: int) -> Draft:
    """What others have signed, if it is exactly what would be signed here; only the expiry is theirs to choose.

    Raises:
        TrustError: it is not.
    """
    proposal, family = inspected.proposal, inspected.manifest.family
    name = family_role(family)
    parts = {name: bundle.role} if bundle.targets is None else {TARGETS: bundle.targets, name: bundle.role}
    theirs = repository.read_targets(bundle.role.encode(), role=name)
    ours = repository.add_release(_before(proposal, name), inspected.manifest, proposal.files, now_ms=now_ms)
    _require_equal(theirs, ours, name, now_ms=now_ms)
    if bundle.targets is not None:
        top = repository.read_targets(bundle.targets.encode())
        held = family_keys(top.signed, name)
        if held is None:
            raise TrustError(f"the bundle's targets do not give anybody {name!r}", code="trust.bundle", hint=_DO_NOT)
        current = repository.read_targets(proposal.targets.encode())
        _require_equal(top, repository.delegate_family(current, family, held, now_ms=now_ms), TARGETS, now_ms=now_ms)
    return _draft(proposal, name, parts)


def _require_equal(theirs: Metadata[Targets], ours: Metadata[Targets], role: str, *, now_ms: int) -> None:
    if not now_ms < md.expires_ms(theirs.signed) <= now_ms + MAX_LIFE_MS:
        raise TrustError(
            f"the bundle's {role} would hold until {theirs.signed.expires:%Y-%m-%d}", code="trust.bundle", hint=_DO_NOT
        )
    ours.signed.expires = theirs.signed.expires
    if theirs.signed_bytes != ours.signed_bytes:
        raise TrustError(f"the bundle's {role} is not what this machine would sign", code="trust.bundle", hint=_DO_NOT)


def _require_basis(draft: Draft, trusted: Root | None, signers: Sequence[CryptoSigner], *, name: str) -> None:
    """Refuse to build on metadata that neither a root which is known here nor one's own signature vouches for.

    Otherwise the hub could slip files of its own in among the earlier ones.
    """
    targets = repository.read_targets(draft.basis[TARGETS].encode())
    before = draft.basis.get(name)
    role = None if before is None else repository.read_targets(before.encode(), role=name)
    if trusted is not None:
        require_signed(trusted, TARGETS, targets)
        if role is not None:
            require_signed(targets.signed, name, role)
        return
    if TARGETS in draft.parts:
        _require_own(targets, signers, what=TARGETS)
    if role is not None:
        _require_own(role, signers, what=name)


def _require_own(metadata: Metadata[Targets], signers: Sequence[CryptoSigner], *, what: str) -> None:
    own = RoleKeys(keys=tuple(signer.public_key for signer in signers))
    if not signed_by(own, metadata):
        raise TrustError(
            f"the {what} metadata that this builds on is not signed by any key here, and no {TRUSTED_ROOT} beside the "
            "keys says whose signature would do",
            code="trust.signature",
            hint=f"take {TRUSTED_ROOT} over from a colleague who has signed for this hub; else do not sign",
        )


def _rehearse(draft: Draft, family: FamilyName, *, now_ms: int, is_signed: bool) -> None:
    """Check the bundle as the hub will, so that keys of another hub are noticed here."""
    name = family_role(family)
    before = draft.basis.get(name)
    targets = draft.parts.get(TARGETS)
    publication.check_publication(
        draft.basis[ROOT].encode(),
        family=family,
        current_targets=draft.basis[TARGETS].encode(),
        current_role=None if before is None else before.encode(),
        targets=None if targets is None else targets.encode(),
        role=draft.parts[name].encode(),
        now_ms=now_ms,
        is_signed=is_signed,
    )


def _draft(proposal: Proposal, name: str, parts: dict[str, str]) -> Draft:
    basis = {ROOT: proposal.root, TARGETS: proposal.targets}
    if proposal.role is not None:
        basis[name] = proposal.role
    return Draft(parts=parts, basis=basis)


def _root_of(proposal: Proposal) -> Root:
    return repository.read_root(proposal.root.encode()).signed


def _before(proposal: Proposal, name: str) -> Metadata[Targets] | None:
    return None if proposal.role is None else repository.read_targets(proposal.role.encode(), role=name)


def _renewed(current: Metadata[Targets], family: FamilyName, held: RoleKeys, *, now_ms: int) -> str:
    return repository.sign(repository.delegate_family(current, family, held, now_ms=now_ms)).decode()


def _may(held: RoleKeys | None, signers: Sequence[CryptoSigner]) -> bool:
    listed = set() if held is None else {key.keyid for key in held.keys}
    return any(signer.public_key.keyid in listed for signer in signers)


def _other_root(path: Path) -> TrustError:
    return TrustError(
        f"the hub's root does not list {path}",
        code="trust.signature",
        hint="sign with a key of this hub's root; if yours was one, do not sign and ask who runs the hub",
    )


def _ask() -> None:
    if not screen.can_ask():
        raise CommandFailed(
            "nobody is here to confirm the signature",
            status=Exit.USAGE,
            code="usage.confirm",
            hint="look at it, or give --yes",
        )
    if not screen.confirm("sign this?"):
        raise CommandFailed("not signed", status=Exit.FAILED, code="command.declined")


def _write(path: Path, bundle: Bundle) -> None:
    try:
        files.replace(path, msgspec.json.encode(bundle))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
