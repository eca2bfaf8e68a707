"""`outrider release sign`: the step that no hub can take.

Rules: what is signed was fetched, hashed and run here first; what is added to must carry our own earlier signature, or
the hub could slip its own files in among the earlier ones; the targets key is read only when the family is new or its
delegation is about to expire; a key of others is never replaced by the way.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import msgspec

from cloud_hub import files
from cloud_hub.cli import screen
from cloud_hub.cli.answers import parse_release
from cloud_hub.cli.config import load_context
from cloud_hub.cli.exits import CommandFailed, Exit
from cloud_hub.cli.hub import Hub
from cloud_hub.cli.inspection import Inspected, inspect
from cloud_hub.cli.system import SystemClock
from cloud_hub.keyring import Keyring
from shared.errors import Conflict, InvalidValue, StorageError
from shared.ids import FamilyName
from shared.trust import metadata as md
from shared.trust import publication, repository
from shared.trust.library import CryptoSigner, Key, Metadata, Targets
from shared.trust.repository import RoleKeys
from shared.trust.roles import TARGETS, family_role

RENEW_MS: Final = 45 * 86_400_000
MAX_BUNDLE_BYTES: Final = 16 * 1024 * 1024


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
    release_key = keyring.signer("release")
    out = Path(arguments.out or bundle_name(family, version))
    inspected = inspect(Hub(load_context(arguments.context)), family, version)
    screen.note(inspected.text())
    inspected.require_fit()
    now_ms = SystemClock().wall_ms()
    targets = _targets(inspected, family, keyring=keyring, release_key=release_key, now_ms=now_ms)
    screen.note(f"\nthe release key {release_key.public_key.keyid[:16]}… signs this for {arguments.expires_days} days")
    if targets is not None:
        screen.note(f"the targets key gives the family {family!r} to that release key")
    if not arguments.yes:
        _ask()
    role = _role(inspected, family, release_key=release_key, now_ms=now_ms, days=arguments.expires_days)
    bundle = Bundle(family=family, version=version, role=role, targets=targets)
    _rehearse(inspected, family, bundle, now_ms=now_ms)
    _write(out, bundle)
    if arguments.json:
        screen.show_json({**inspected.summary(), "bundle": str(out), "new_family": targets is not None})
    else:
        print(f"signed {family}/{version}: {out}")
        screen.note(f"next: outrider release publish {out} --assign all")
    return Exit.DONE


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


def _targets(
    inspected: Inspected, family: FamilyName, *, keyring: Keyring, release_key: CryptoSigner, now_ms: int
) -> str | None:
    """New top-level targets where the family is new or its delegation about to expire, else None."""
    current = repository.read_targets(inspected.proposal.targets.encode())
    keys = RoleKeys(keys=(release_key.public_key,))
    mine = repository.is_delegated(current, family, keys)
    known = current.signed.delegations is not None and family_role(family) in (current.signed.delegations.roles or {})
    if known and not mine:
        raise Conflict(
            f"the family {family!r} is signed by other keys than {keyring.path('release')}",
            code="conflict.release_key",
            hint="sign with the keys that the family was given to",
        )
    fresh = md.expires_ms(current.signed) - now_ms > RENEW_MS
    if mine and (fresh or not keyring.path("targets").exists()):
        return None
    targets_key = keyring.signer("targets")
    _require_own(current, targets_key.public_key, what=TARGETS)
    renewed = repository.delegate_family(current, family, keys, now_ms=now_ms)
    return repository.sign(renewed, targets_key).decode()


def _role(inspected: Inspected, family: FamilyName, *, release_key: CryptoSigner, now_ms: int, days: int) -> str:
    before: Metadata[Targets] | None = None
    if inspected.proposal.role is not None:
        name = family_role(family)
        before = repository.read_targets(inspected.proposal.role.encode(), role=name)
        _require_own(before, release_key.public_key, what=name)
    role = repository.add_release(before, inspected.manifest, inspected.proposal.files, now_ms=now_ms, days=days)
    return repository.sign(role, release_key).decode()


def _rehearse(inspected: Inspected, family: FamilyName, bundle: Bundle, *, now_ms: int) -> None:
    """Check the bundle as the hub will, so that keys of another hub are noticed here."""
    proposal = inspected.proposal
    publication.check_publication(
        proposal.root.encode(),
        family=family,
        current_targets=proposal.targets.encode(),
        current_role=None if proposal.role is None else proposal.role.encode(),
        targets=None if bundle.targets is None else bundle.targets.encode(),
        role=bundle.role.encode(),
        now_ms=now_ms,
    )


def _require_own(metadata: Metadata[Targets], key: Key, *, what: str) -> None:
    """Refuse to build on metadata that this key has not signed."""
    md.check_threshold(
        {key.keyid: key}, threshold=1, payload=metadata.signed_bytes, signatures=metadata.signatures, what=what
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
