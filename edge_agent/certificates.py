"""Keys, certificate requests, and the checks on a certificate that the hub gave. Commands and children only.

A certificate is believed only as far as it can be checked: it must be for the key that was asked for, under the name
that the hub says, and signed by a CA that is trusted. The only module of the agent, beside the doctor's, that loads
`cryptography` for certificates.
"""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from edge_agent import keeping
from edge_agent.core.renewal import WRONG_LIFE
from edge_agent.identity import check_hub_url
from shared.errors import InvalidValue, ProtocolViolation, StorageError, TrustError
from shared.ids import DeviceId, parse_device_id
from shared.renewal import csr_digest, proof_message

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

MAX_CAS: Final = 2
"""One, and two during a change of the hub's CA."""

MAX_AHEAD_MS: Final = 24 * 3_600_000
"""How far ahead of an attested time a new certificate may begin: clocks differ, but not by a day."""

_MALFORMED_HINT: Final = "report this to the hub's operator; nothing was changed on this device"


class Life(NamedTuple):
    """From when to when a certificate is good, milliseconds since 1970."""

    not_before_ms: int
    not_after_ms: int


def new_key(path: Path) -> None:
    """Make a P-256 key in this new file, which nobody else can read."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    keeping.write_new(path, pem)


def new_request(key_path: Path) -> str:
    """A certificate request for the key in this file, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    key = _private_key(key_path)
    assert isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey)
    # The subject is the hub's to decide; whatever stood here would be ignored.
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(key, hashes.SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None)
    return request.public_bytes(serialization.Encoding.PEM).decode()


def fits(csr_pem: str, key_path: Path) -> bool:
    """Whether this is a request for the key in this file."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_csr(csr_pem.encode()).public_key() == _private_key(key_path).public_key()
    except ValueError:
        return False


def prove(csr_pem: str, *, key_path: Path, certificate_pem: str, ca_pem: str, device: DeviceId) -> bytes:
    """The signature of the key in this file over what `shared.renewal` says; raises TrustError.

    The CA is the one of `ca_pem` that has signed the certificate at hand.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    issuer = _issuer(x509.load_pem_x509_certificate(certificate_pem.encode()), _certificates(ca_pem))
    message = proof_message(device=device, csr_sha256=csr_digest(csr_pem), ca_fingerprint=_fingerprint(issuer))
    key = _private_key(key_path)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(message, ec.ECDSA(hashes.SHA256()))
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    return key.sign(message)


def check_certificate(
    certificate_pem: str, *, device: str, hub_url: str, csr_pem: str, ca_pem: str, now_ms: int, attested: bool
) -> Life:
    """Hold what the hub gave against what was asked; returns how long it is good.

    Args:
        certificate_pem, device, hub_url: the hub's word.
        csr_pem: what was asked.
        ca_pem: the CAs that are trusted.
        now_ms: the time; `attested` says whether the hub has told it. One that nobody told may be years behind.

    Raises:
        TrustError: `trust.malformed`, `trust.wrong_device` when it is for another key or name, and
            `trust.certificate_life` when it has ended or is of a time to come.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    try:
        parse_device_id(device)
        check_hub_url(hub_url)
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        _issuer(certificate, _certificates(ca_pem))
        names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except (ValueError, TypeError, InvalidSignature, InvalidValue) as error:
        raise TrustError(
            f"the hub's answer does not hold: {error or 'the certificate is not signed by its CA'}",
            code="trust.malformed",
            hint=_MALFORMED_HINT,
        ) from error
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    asked = x509.load_pem_x509_csr(csr_pem.encode()).public_key().public_bytes(*form)
    if [name.value for name in names] != [device] or certificate.public_key().public_bytes(*form) != asked:
        raise TrustError(
            "the hub's certificate is for another key or another name",
            code="trust.wrong_device",
            hint=_MALFORMED_HINT,
        )
    life = _life(certificate)
    check_life(life, now_ms=now_ms, attested=attested)
    return life


def check_life(life: Life, *, now_ms: int, attested: bool) -> None:
    """Raise TrustError unless a certificate that was made just now may have this life.

    The first day of a certificate that counts is proof that this day has come: the hub's clock, wrong for a moment,
    must not move a device years ahead.
    """
    if life.not_after_ms <= now_ms or (attested and life.not_before_ms > now_ms + MAX_AHEAD_MS):
        raise TrustError(
            f"the hub's certificate is good from {_day(life.not_before_ms)} to {_day(life.not_after_ms)}, "
            f"and this is {_day(now_ms)}",
            code=WRONG_LIFE,
            hint="check the hub's clock; the certificate at hand stays, and the hub is asked again",
        )


def _day(at_ms: int) -> str:
    return datetime.datetime.fromtimestamp(at_ms / 1000, datetime.UTC).strftime("%Y-%m-%d")


def life_of(certificate_path: Path) -> Life:
    """From when to when the certificate in this file is good; raises StorageError when there is none."""
    from cryptography import x509

    try:
        return _life(x509.load_pem_x509_certificate(certificate_path.read_bytes()))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{certificate_path}: {error}", code="storage.identity", hint="run `outrider-agent doctor`"
        ) from error


def check_bundle(ca_pem: str) -> str:
    """The CAs of the hub's answer, as PEM of nothing else; raises ProtocolViolation unless they are one or two."""
    from cryptography.hazmat.primitives import serialization

    try:
        found = _certificates(ca_pem)
        if not all(_is_own_authority(certificate) for certificate in found):
            raise ValueError("one of them is no certificate authority")
    except ValueError as error:
        raise ProtocolViolation(f"the hub's answer has no CA: {error}", code="protocol.ca") from error
    return "".join(certificate.public_bytes(serialization.Encoding.PEM).decode() for certificate in found)


def _life(certificate: x509.Certificate) -> Life:
    return Life(
        not_before_ms=int(certificate.not_valid_before_utc.timestamp()) * 1000,
        not_after_ms=int(certificate.not_valid_after_utc.timestamp()) * 1000,
    )


def _issuer(certificate: x509.Certificate, authorities: list[x509.Certificate]) -> x509.Certificate:
    """The one of these that has signed this; raises ValueError when none has."""
    from cryptography.exceptions import InvalidSignature

    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return authority
    raise ValueError("the certificate is not signed by its CA")


def _certificates(pem: str) -> list[x509.Certificate]:
    from cryptography import x509

    found = x509.load_pem_x509_certificates(pem.encode())
    if len(found) > MAX_CAS:
        raise ValueError(f"more than {MAX_CAS} certificates")
    return found


def _is_own_authority(certificate: x509.Certificate) -> bool:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(certificate)
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False


def _fingerprint(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives import serialization

    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def _private_key(path: Path) -> PrivateKeyTypes:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    return load_pem_private_key(path.read_bytes(), password=None)
