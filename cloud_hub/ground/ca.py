"""The hub's own certificate authority: one P-256 key that signs the hub's servers, the hub's client and the devices.

Rules:
1. A device's common name is the one that the hub assigned; nothing of the request but the public key is used.
2. A device's certificate can only be a client's (EKU clientAuth, no CA); a server's can only be a server's.
3. Certificates begin up to an hour before they are made, because clocks differ.

Values and bytes only: `transport.py` keeps them in files.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared import limits
from shared.errors import ConfigError, InvalidValue
from shared.ids import DeviceId

CA_DAYS: Final = 3650
BACKDATE: Final = timedelta(hours=1)
HUB_NAME: Final = "hub"
"""Common name of the hub's own MQTT client, and its user name on the broker, unless it is given another one."""

_HUB_NAME: Final = re.compile(rf"{HUB_NAME}(\.[a-z0-9]([a-z0-9-]{{0,30}}[a-z0-9])?)?")
DeviceKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey

_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)


@dataclass(frozen=True, slots=True)
class IssuedPair:
    """A new certificate with its key, both PEM; the key is PKCS8 without a password."""

    certificate_pem: bytes
    key_pem: bytes


@dataclass(frozen=True, slots=True)
class DeviceCertificate:
    """A certificate for a device's key; `fingerprint` is SHA-256 of its DER, hex; `authority` that of its issuer."""

    pem: str
    fingerprint: str
    expires_ms: int
    serial: int
    authority: str


@dataclass(frozen=True, slots=True)
class ShownCertificate:
    """A client certificate that this CA signed, whatever its dates.

    Attributes:
        issuer: the CA's fingerprint.
        is_of_device: made by `issue_device` under this name; the hub's own and a takeover's are not.
    """

    name: str
    fingerprint: str
    serial: int
    begins_ms: int
    ends_ms: int
    key: DeviceKey
    issuer: str
    is_of_device: bool


class Authority:
    """The CA's certificate and key.

    Args:
        certificate_pem: as made by `make_ca`.
        key_pem: its key.

    Raises:
        ConfigError: they do not parse or do not belong together.
    """

    def __init__(self, certificate_pem: bytes, key_pem: bytes) -> None:
        try:
            self._certificate = x509.load_pem_x509_certificate(certificate_pem)
            key = serialization.load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(
                f"the CA's files do not parse: {error}", code="config.ca", hint="restore ca/ from the backup"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._certificate.public_key():
            raise ConfigError(
                "ca/ca.key does not belong to ca/ca.pem", code="config.ca", hint="restore ca/ from the backup"
            )
        self._key = key
        self.pem = certificate_pem.decode()
        self.fingerprint = fingerprint(self._certificate)

    @property
    def expires_ms(self) -> int:
        """When the CA's own certificate ends."""
        return _to_ms(self._certificate.not_valid_after_utc)

    @property
    def key_identifier(self) -> bytes:
        """What its revocation lists name it by (RFC 5280, section 4.2.1.2, the first method)."""
        return x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()).digest

    def issue_server(self, names: Sequence[str], *, now_ms: int, days: float) -> IssuedPair:
        """A server certificate for these host names and addresses, the first of them as common name."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(
            key.public_key(),
            name=names[0],
            now_ms=now_ms,
            days=days,
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            alternatives=[_general_name(name) for name in names],
        )
        return IssuedPair(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))

    def issue_client(self, name: str, *, now_ms: int, days: float) -> IssuedPair:
        """A client certificate with a key of our making: the hub's own link to the broker, or a short takeover."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(
            key.public_key(), name=name, now_ms=now_ms, days=days, usage=ExtendedKeyUsageOID.CLIENT_AUTH
        )
        return IssuedPair(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))

    def issue_device(self, csr_pem: str, *, device: DeviceId, now_ms: int, days: float) -> DeviceCertificate:
        """A client certificate for the key in a checked request; raises InvalidValue as `check_csr` does."""
        certificate = self._sign(
            check_csr(csr_pem),
            name=device,
            now_ms=now_ms,
            days=days,
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            alternatives=[x509.UniformResourceIdentifier(_device_uri(device))],
        )
        return DeviceCertificate(
            pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            fingerprint=fingerprint(certificate),
            expires_ms=_to_ms(certificate.not_valid_after_utc),
            serial=certificate.serial_number,
            authority=self.fingerprint,
        )

    def sign_list(self, builder: x509.CertificateRevocationListBuilder) -> bytes:
        """A revocation list of this CA's (revocation.py makes it), PEM."""
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        named = builder.issuer_name(self._certificate.subject).add_extension(identifier, critical=False)
        return named.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def check_client(self, der: bytes, *, now_ms: int) -> ShownCertificate | None:
        """What a client certificate says, or None when this CA did not sign it, or not for a client, or not for now."""
        shown = self.examine(der)
        if shown is None or not shown.begins_ms <= now_ms < shown.ends_ms:
            return None
        return shown

    def examine(self, der: bytes) -> ShownCertificate | None:
        """The same without a look at the clock: with what has expired one may ask for a new one, and do no more."""
        try:
            certificate = x509.load_der_x509_certificate(der)
            certificate.verify_directly_issued_by(self._certificate)
            usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            key = certificate.public_key()
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound):
            return None
        if list(usage) != [ExtendedKeyUsageOID.CLIENT_AUTH] or len(names) != 1:
            return None
        if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey):
            return None
        name = str(names[0].value)
        return ShownCertificate(
            name=name,
            fingerprint=fingerprint(certificate),
            serial=certificate.serial_number,
            begins_ms=_to_ms(certificate.not_valid_before_utc),
            ends_ms=_to_ms(certificate.not_valid_after_utc),
            key=key,
            issuer=self.fingerprint,
            is_of_device=_uris(certificate) == [_device_uri(name)],
        )

    def has_signed(self, certificate_pem: bytes) -> bool:
        """Whether a certificate, in its time or not, is of this CA."""
        try:
            x509.load_pem_x509_certificate(certificate_pem).verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def link_to(self, other: Authority, *, now_ms: int) -> str:
        """This CA's word that the other one follows it, PEM: the other's name and key in a certificate of ours.

        Nothing is verified along it by TLS: this CA may have no other below it. Who pinned this CA and is shown the
        link believes the other one (`shared/trust/ca_links.py`).
        """
        now = _to_time(now_ms)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(other._certificate.subject)
            .issuer_name(self._certificate.subject)
            .public_key(other._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATE)
            .not_valid_after(self._certificate.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def _sign(
        self,
        key: DeviceKey,
        *,
        name: str,
        now_ms: int,
        days: float,
        usage: x509.ObjectIdentifier,
        alternatives: Sequence[x509.GeneralName] = (),
    ) -> x509.Certificate:
        now = _to_time(now_ms)
        ends = min(now + timedelta(days=days), self._certificate.not_valid_after_utc)
        # Two thirds of a life are counted from its beginning: what lives for a minute must not begin an hour ago.
        begins = now - min(BACKDATE, timedelta(days=days) / 24)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_common_name(name))
            .issuer_name(self._certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(alternatives)), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def make_ca(*, now_ms: int, label: str, days: int = CA_DAYS) -> IssuedPair:
    """A new self-signed CA; `label` tells hubs apart for people who look at certificates."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _common_name(f"Outrider CA {label}"[:64])
    now = _to_time(now_ms)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return IssuedPair(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


def check_csr(csr_pem: str) -> DeviceKey:
    """The public key of a certificate request; raises InvalidValue when it is too large, unproven or of a wrong kind.

    The request's signature proves that whoever sends it holds the private key.
    """
    code = "enrol.csr"
    if len(csr_pem) > limits.MAX_CSR_BYTES:
        raise InvalidValue(f"the certificate request exceeds {limits.MAX_CSR_BYTES} bytes", code=code)
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode())
        proven = csr.is_signature_valid
        key = csr.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidValue(
            "the certificate request does not parse", code=code, hint="send a PKCS#10 request in PEM"
        ) from error
    if not proven:
        raise InvalidValue("the certificate request is not signed by its own key", code=code)
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise InvalidValue(
        "keys of this kind are not taken", code=code, hint="make a P-256, P-384 or Ed25519 key (RSA is not accepted)"
    )


def is_proof(key: DeviceKey, *, signature: bytes, message: bytes) -> bool:
    """Whether the holder of this key has signed this message: ECDSA over SHA-256, or Ed25519."""
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        else:
            key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def read_certificate(certificate_pem: str) -> bytes | None:
    """The DER of the one certificate in this text; None when it is none."""
    try:
        return x509.load_pem_x509_certificate(certificate_pem.encode()).public_bytes(serialization.Encoding.DER)
    except ValueError:
        return None


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER form, hex: how a CA is pinned and a certificate is looked up."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def subject_hash(certificate_pem: str) -> str:
    """What OpenSSL looks a CA up by in a directory (X509_NAME_hash(3)): SHA-1 of the name in its canonical form."""
    subject = x509.load_pem_x509_certificate(certificate_pem.encode()).subject
    canonical = x509.Name([x509.NameAttribute(each.oid, _folded(str(each.value))) for each in subject])
    der = canonical.public_bytes()
    content = der[2:] if der[1] < 0x80 else der[2 + (der[1] & 0x7F) :]
    digest = hashlib.sha1(content, usedforsecurity=False).digest()
    return f"{int.from_bytes(digest[:4], 'little'):08x}"


def check_hub_name(name: str) -> bool:
    """Whether a hub may have this name: `hub`, or `hub.` and a word. No device has one: its name is without a point."""
    return _HUB_NAME.fullmatch(name) is not None


def common_name(certificate_pem: bytes) -> str:
    """The one common name that a certificate carries; empty when it has none, has several or does not parse."""
    try:
        names = x509.load_pem_x509_certificate(certificate_pem).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        return ""
    return str(names[0].value) if len(names) == 1 else ""


def needs_renewal(certificate_pem: bytes, *, names: Sequence[str], now_ms: int) -> bool:
    """Whether less than a third of a certificate's life is left, or its names are not exactly these (none: any)."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
    except ValueError:
        return True
    begin, end = _to_ms(certificate.not_valid_before_utc), _to_ms(certificate.not_valid_after_utc)
    if end - now_ms < (end - begin) / 3 or now_ms < begin:
        return True
    if not names:
        return False
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return True
    return {str(name.value) for name in found} != set(names)


def _device_uri(device: str) -> str:
    return f"spiffe://outrider/{device}"


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return []
    return found.get_values_for_type(x509.UniformResourceIdentifier)


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _folded(text: str) -> str:
    """One blank between words, and ASCII in lower case (asn1_string_canon in OpenSSL's x_name.c)."""
    return "".join(letter.lower() if letter.isascii() else letter for letter in " ".join(text.split()))


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _to_time(ms: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000, UTC)


def _to_ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000
