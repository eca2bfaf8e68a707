"""A certificate authority for tests: a CA, server certificates for loopback and client certificates by common name."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key as files."""

    certificate: Path
    key: Path


class TestCa:
    """Issues certificates into a directory; keys are world readable on purpose, brokers drop their rights."""

    __test__ = False

    def __init__(self, folder: Path, *, name: str = "test-ca", days: int = 10) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (
            self._builder(self._name, self._key.public_key(), days=days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self.pem)

    @property
    def pem(self) -> bytes:
        """The CA's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate's DER, hex."""
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def link(self, after: TestCa) -> bytes:
        """This CA's word that the other one follows it: the other's name and key, signed by this one."""
        certificate = (
            self._builder(after.certificate.subject, after._key.public_key(), days=9)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def server(
        self, file: str = "server", *, host: str = "localhost", since: int = -20, days: int = 5, is_client: bool = False
    ) -> Pair:
        """A certificate for this host, and for 127.0.0.1 where that is it; valid from and to so many days from now.

        `is_client` makes one that a device would have.
        """
        names: list[x509.GeneralName] = [x509.DNSName(host)]
        if host == "localhost":
            names.append(x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")))
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if is_client else ExtendedKeyUsageOID.SERVER_AUTH
        return self._issue(file, common_name=host, usage=usage, names=names, since=since, days=days)

    def client(self, common_name: str, *, days: int = 5) -> Pair:
        """A client certificate; negative days make an expired one."""
        return self._issue(common_name, common_name=common_name, usage=ExtendedKeyUsageOID.CLIENT_AUTH, days=days)

    def sign_request(self, csr_pem: str, common_name: str, *, since: int = -20, days: int = 5) -> str:
        """A client certificate for the key in the request, valid from and to so many days from now."""
        request = x509.load_pem_x509_csr(csr_pem.encode())
        public_key = request.public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        certificate = self._builder(name, public_key, since=since, days=days).sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM).decode()

    def _issue(
        self,
        file: str,
        *,
        common_name: str,
        usage: x509.ObjectIdentifier,
        names: list[x509.GeneralName] | None = None,
        since: int = -20,
        days: int = 5,
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        builder = self._builder(name, key.public_key(), since=since, days=days).add_extension(
            x509.ExtendedKeyUsage([usage]), critical=False
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pair = Pair(certificate=self._folder / f"{file}.pem", key=self._folder / f"{file}.key")
        pair.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def _builder(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, *, since: int = -20, days: int
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=since))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
