"""Signing keys, between bytes and objects: private ones in PEM (PKCS #8, unencrypted), public halves in JSON.

All are ed25519. No files here.
"""

from __future__ import annotations

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from shared.errors import InvalidValue
from shared.trust.library import CryptoSigner, Key, SSlibKey


def new_private_pem() -> bytes:
    """A new key."""
    return Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def signer_from_pem(data: bytes) -> CryptoSigner:
    """The key, ready to sign; raises InvalidValue, which never quotes the key."""
    try:
        private = load_pem_private_key(data, password=None)
        if not isinstance(private, Ed25519PrivateKey):
            raise ValueError("it is of another kind")
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidValue("this is not an unencrypted ed25519 key in PEM", code="invalid.key") from error
    return CryptoSigner(private)


class PublicHalf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key's public half as a small JSON file that is carried to where a root is put together.

    Attributes:
        role: what its holder made it for; `release` may sign for any family that it is given.
        public: the ed25519 public key, hex. The key's identifier is computed from it and never written beside it.
    """

    role: str
    public: str
    schema: int = 1


def public_half(role: str, key: Key) -> bytes:
    """The file of a public half."""
    return msgspec.json.format(msgspec.json.encode(PublicHalf(role=role, public=key.keyval["public"])), indent=2)


def read_public_half(data: bytes) -> tuple[str, Key]:
    """Role and key of a public half; raises InvalidValue."""
    try:
        half = msgspec.json.decode(data, type=PublicHalf)
        if half.schema != 1:
            raise ValueError("it is of another version")
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(half.public))
    except (msgspec.MsgspecError, RecursionError, ValueError, UnsupportedAlgorithm) as error:
        raise InvalidValue(
            f"this is not the public half of a key: {str(error)[:200]}",
            code="invalid.public_key",
            hint="take the .pub.json file that `outrider-hub keys init` wrote",
        ) from error
    return half.role, SSlibKey.from_crypto(public)
