"""Private signing keys, between bytes and signer: ed25519 in PEM (PKCS #8, unencrypted). No files here."""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from shared.errors import InvalidValue
from shared.trust.library import CryptoSigner


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
