"""Which certificate authorities follow from the ones that are pinned, while a hub changes its own.

A hub that changes its CA publishes the old one, the new one and a link: the new CA's key in a certificate that the old
CA has signed. Who pinned the old one believes the new one by that link and by nothing else.

Rules: a link must itself be a CA's certificate, so that nobody who merely has a certificate of the hub can make one;
what is published is not trusted in anything else; at most `MAX_PUBLISHED` certificates are looked at.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

MAX_PUBLISHED: Final = 8


def fingerprints(pem: str) -> tuple[str, ...]:
    """SHA-256 of the DER of each certificate, hex; raises ValueError for a text that holds none or too many."""
    return tuple(_fingerprint(certificate) for certificate in _parse(pem))


def vouched(published: str, *, pins: frozenset[str]) -> str:
    """The CAs to trust, PEM: those of the published ones that are pinned, and those that a pinned one links to.

    Args:
        published: what a hub says at `/v1/ca`, unchecked.
        pins: fingerprints of the CAs that are trusted already.

    Returns:
        One PEM text, the newest first; empty when none of the published is pinned.

    Raises:
        ValueError: the text holds no certificates, or too many.
    """
    found = _parse(published)
    pinned = [certificate for certificate in found if _fingerprint(certificate) in pins]
    linked = [
        certificate
        for certificate in found
        if certificate not in pinned
        and _is_signed_by(certificate, certificate)
        and any(_links(link, certificate, root) for link in found for root in pinned)
    ]
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in (*linked, *pinned))


def _links(link: x509.Certificate, new: x509.Certificate, old: x509.Certificate) -> bool:
    """Whether this is the old CA's word that the new one follows it."""
    return (
        link.public_key() == new.public_key()
        and link.subject == new.subject
        and _may_sign(link)
        and _may_sign(new)
        and _is_signed_by(link, old)
    )


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    return basic.ca and usage.key_cert_sign


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _fingerprint(certificate: x509.Certificate) -> str:
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def _parse(pem: str) -> list[x509.Certificate]:
    found = x509.load_pem_x509_certificates(pem.encode())
    if len(found) > MAX_PUBLISHED:
        raise ValueError(f"more than {MAX_PUBLISHED} certificates")
    return found
