"""One metadata file: from bytes to a checked object, and the three questions asked of it.

Who signed it (threshold counted over distinct keys, not over names of keys), whether it has expired at a moment that
the caller gives, and whether it is the file that another file promised. tuf.api answers hostile input with a dozen
kinds of exception; here they all become one TrustError.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from shared.errors import OutriderError, TrustError
from shared.trust import strict
from shared.trust.library import (
    Key,
    LengthOrHashMismatchError,
    Metadata,
    MetaFile,
    Root,
    Signature,
    Signed,
    Snapshot,
    Targets,
    Timestamp,
    UnverifiedSignatureError,
)

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)

RESEND = "the hub's files may be half written; try again, then compare the hub's metadata with its backup"


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn whatever tuf, securesystemslib or cryptography raise inside into a TrustError; ours pass through."""
    try:
        yield
    except OutriderError:
        raise
    # Blanket on purpose: on hostile input the libraries raise KeyError, TypeError, AttributeError, OverflowError,
    # UnsupportedAlgorithm and more. A refusal must come out of all of them, and of those of their next version.
    except Exception as error:
        raise strict.malformed(what, f"{type(error).__name__}: {str(error)[:200]}") from error


def load(kind: type[S], data: bytes, *, role: str, max_bytes: int) -> Metadata[S]:
    """Parse metadata of this kind, strictly; says nothing about who signed it.

    Raises:
        TrustError: `trust.malformed` or `trust.endless_data`.
    """
    document = strict.parse_json(data, what=f"{role} metadata", max_bytes=max_bytes)
    strict.check_metadata(document, what=f"{role} metadata")
    with translated(f"{role} metadata"):
        metadata = Metadata.from_dict(document)
        if not isinstance(metadata.signed, kind):
            raise strict.malformed(f"{role} metadata", f"it is of the type {metadata.signed.type!r}")
        if not metadata.signed_bytes:
            raise strict.malformed(f"{role} metadata", "it has nothing to sign")
        return metadata


def check_signatures(delegator: Root | Targets, role: str, metadata: Metadata[S]) -> None:
    """Raise TrustError `trust.signature` unless enough distinct keys that the delegator names have signed."""
    with translated(f"{role} metadata"):
        delegated = delegator.get_delegated_role(role)
        known = _keys(delegator)
        keys = {keyid: known[keyid] for keyid in delegated.keyids if keyid in known}
        check_threshold(
            keys,
            threshold=delegated.threshold,
            payload=metadata.signed_bytes,
            signatures=metadata.signatures,
            what=role,
        )


def check_threshold(
    keys: Mapping[str, Key], *, threshold: int, payload: bytes, signatures: Mapping[str, Signature], what: str
) -> None:
    """Raise TrustError `trust.signature` unless `threshold` distinct keys have signed the payload.

    A key that is listed under two names counts once; a signature that does not hold is not counted and does no harm.
    """
    signed: set[str] = set()
    with translated(f"{what} metadata"):
        for keyid, key in keys.items():
            if keyid not in signatures:
                continue
            with contextlib.suppress(UnverifiedSignatureError):
                key.verify_signature(signatures[keyid], payload)
                signed.add(key_material(key))
    if threshold < 1 or len(signed) < threshold:
        raise TrustError(
            f"{what} is signed by {len(signed)} of the {threshold} keys that it needs",
            code="trust.signature",
            hint="sign it with the keys that the trusted root names; if you did, it was changed after signing",
        )


def key_material(key: Key) -> str:
    """What makes a key that key, whatever it is called: type and public part in one canonical form."""
    public = str(key.keyval["public"])
    if key.keytype == "ed25519":
        return f"ed25519:{bytes.fromhex(public).hex()}"
    der = load_pem_public_key(public.encode()).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return f"der:{der.hex()}"


def key_set(delegator: Root | Targets, role: str) -> frozenset[str]:
    """The keys, by material, that may sign this role."""
    with translated(f"keys of {role}"):
        known = _keys(delegator)
        return materials({k: known[k] for k in delegator.get_delegated_role(role).keyids if k in known})


def floor_name(delegator: Root | Targets, role: str) -> str:
    """Under which name a role's floor is kept: role and fingerprint of its key set.

    When the root replaces the keys, the floor that the old keys had pushed up does not bind the new ones (TUF
    specification 5.3.11, recovery from fast-forward attacks), and a crash between the two cannot mix them up.
    """
    return named(role, key_set(delegator, role))


def named(what: str, materials: frozenset[str]) -> str:
    """The name of a floor that hangs on these keys, given by material."""
    fingerprint = hashlib.sha256("\n".join(sorted(materials)).encode()).hexdigest()
    return f"{what}@{fingerprint[:16]}"


def materials(keys: Mapping[str, Key]) -> frozenset[str]:
    """The keys by material, those that no library here reads by their text."""
    return frozenset(_any_material(key) for key in keys.values())


def check_fresh(signed: Signed, *, role: str, now_ms: int) -> None:
    """Raise TrustError `trust.freeze` when it has expired at this moment."""
    if now_ms >= expires_ms(signed):
        raise TrustError(
            f"{role} metadata expired on {signed.expires:%Y-%m-%d %H:%M} UTC",
            code="trust.freeze",
            hint="check the device's clock; if it is right, let the role be signed again and look for a stuck mirror",
        )


def expires_ms(signed: Signed) -> int:
    """When it expires, in milliseconds since 1970."""
    return int((signed.expires - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * 1000


def check_promise(meta: MetaFile, data: bytes, *, role: str) -> None:
    """Raise TrustError `trust.mix_and_match` unless these bytes have the promised length and digests."""
    try:
        meta.verify_length_and_hashes(data)
    except LengthOrHashMismatchError as error:
        raise TrustError(
            f"{role} metadata is not the file that the newer metadata names: {error}",
            code="trust.mix_and_match",
            hint=RESEND,
        ) from error


def check_version(found: int, *, floor: int, role: str) -> None:
    """Raise TrustError `trust.rollback` when the version is below what was accepted before."""
    if found < floor:
        raise TrustError(
            f"{role} version {found} is older than version {floor}, which this device accepted before",
            code="trust.rollback",
            hint="if the hub was restored from a backup, publish again so that its versions pass the older ones",
        )


def _any_material(key: Key) -> str:
    """The key's material, or its text where no library here reads it: such a key signs nothing, but it is listed."""
    try:
        return key_material(key)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return f"unread:{key.keytype}:{key.keyval.get('public')!r}"


def _keys(delegator: Root | Targets) -> dict[str, Key]:
    if isinstance(delegator, Root):
        return delegator.keys
    return delegator.delegations.keys if delegator.delegations is not None else {}
