"""What a device signs with its old key to be given a certificate for a new one. Pure.

The proof binds four things, so that it is good for nothing else: that it is a renewal, which device asks, for which
certificate request, and of which authority. The request's own signature proves that the new key is at hand too.
"""

from __future__ import annotations

import hashlib
from typing import Final

from shared.ids import DeviceId

DOMAIN: Final = b"outrider renewal v1\0"
"""No other signature of a device's key begins like this: TLS begins with 64 spaces (RFC 8446, section 4.4.3)."""

REFUSED_FOR_GOOD: Final = frozenset(
    {
        "renew.disabled",
        "renew.quarantined",
        "renew.revoked",
        "renew.superseded",
        "renew.too_old",
        "renew.unknown_certificate",
    }
)
"""Codes of refusals that do not pass by themselves: somebody has to act. They are asked again, but seldom."""


def csr_digest(csr_pem: str) -> str:
    """SHA-256 of a certificate request's text, hex: what the same request sent again is known by."""
    return hashlib.sha256(csr_pem.encode()).hexdigest()


def proof_message(*, device: DeviceId, csr_sha256: str, ca_fingerprint: str) -> bytes:
    """The bytes that the old key signs.

    Args:
        device: the name in the certificate at hand.
        csr_sha256: `csr_digest` of the request.
        ca_fingerprint: SHA-256 of the DER of the CA that signed the certificate at hand, hex.
    """
    return DOMAIN + b"\0".join((device.encode(), csr_sha256.encode(), ca_fingerprint.encode()))
