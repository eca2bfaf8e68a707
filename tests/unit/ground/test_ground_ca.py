"""What the CA signs, and which client certificates it knows again."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud_hub.ground import ca
from cloud_hub.ground.ca import Authority, check_csr, needs_renewal
from shared.errors import ConfigError, InvalidValue
from shared.ids import DeviceId
from shared.limits import MAX_CSR_BYTES
from tests.fakes.hub_parts import DAY_MS, NOW_MS, csr_for, der, make_authority, new_csr

DEVICE = DeviceId("pi-1")


def test_the_name_is_the_hubs_choice() -> None:
    authority = make_authority()
    csr = csr_for(ec.generate_private_key(ec.SECP256R1()), name="hub")
    issued = authority.issue_device(csr, device=DEVICE, now_ms=NOW_MS, days=30)
    certificate = x509.load_pem_x509_certificate(issued.pem.encode())
    assert [name.value for name in certificate.subject] == ["pi-1"]
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert issued.expires_ms == NOW_MS + 30 * DAY_MS
    assert issued.fingerprint == hashlib.sha256(der(issued.pem)).hexdigest()


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["p256", "p384", "ed25519"],
)
def test_keys_that_are_taken(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> None:
    assert check_csr(csr_for(key)) == key.public_key()


@pytest.mark.parametrize(
    "key",
    [rsa.generate_private_key(public_exponent=65537, key_size=2048), ec.generate_private_key(ec.SECP256K1())],
    ids=["rsa", "secp256k1"],
)
def test_keys_that_are_not_taken(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    with pytest.raises(InvalidValue) as caught:
        check_csr(csr_for(key))
    assert caught.value.code == "enrol.csr"
    assert "P-256" in caught.value.hint


def test_requests_that_are_no_requests() -> None:
    good = new_csr()
    lines = good.splitlines()
    lines[-2] = lines[-2][::-1]
    for bad in (
        "",
        "nonsense",
        good * (MAX_CSR_BYTES // len(good) + 1),
        good.replace("REQUEST", "RUBBISH"),
        "\n".join(lines),
    ):
        with pytest.raises(InvalidValue):
            check_csr(bad)


def test_a_request_must_prove_its_key() -> None:
    # The signature of one request under the contents of another.
    one, two = der(new_csr()), der(new_csr())
    forged = one[:-32] + two[-32:]
    pem = "-----BEGIN CERTIFICATE REQUEST-----\n"
    pem += "\n".join(base64.encodebytes(forged).decode().split())
    pem += "\n-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(InvalidValue):
        check_csr(pem)


def test_client_certificates_are_known_again() -> None:
    authority = make_authority()
    issued = authority.issue_device(new_csr(), device=DEVICE, now_ms=NOW_MS, days=30)
    peer = authority.check_client(der(issued.pem), now_ms=NOW_MS)
    assert peer is not None
    assert (peer.name, peer.fingerprint) == ("pi-1", issued.fingerprint)


def test_certificates_of_others_are_not() -> None:
    authority, other = make_authority(), make_authority()
    mine = authority.issue_device(new_csr(), device=DEVICE, now_ms=NOW_MS, days=30)
    foreign = other.issue_device(new_csr(), device=DEVICE, now_ms=NOW_MS, days=30)
    server = authority.issue_server(["localhost"], now_ms=NOW_MS, days=30)
    assert authority.check_client(der(foreign.pem), now_ms=NOW_MS) is None
    assert authority.check_client(der(server.certificate_pem.decode()), now_ms=NOW_MS) is None
    assert authority.check_client(der(authority.pem), now_ms=NOW_MS) is None
    assert authority.check_client(b"nonsense", now_ms=NOW_MS) is None
    assert authority.check_client(der(mine.pem), now_ms=NOW_MS + 30 * DAY_MS) is None
    assert authority.check_client(der(mine.pem), now_ms=NOW_MS - DAY_MS) is None


def test_no_certificate_outlives_its_ca() -> None:
    authority = make_authority()
    late_ms = NOW_MS + (ca.CA_DAYS - 5) * DAY_MS
    issued = authority.issue_device(new_csr(), device=DEVICE, now_ms=late_ms, days=30)
    assert issued.expires_ms == authority.expires_ms


def test_renewal_is_due_by_life_and_by_names() -> None:
    authority = make_authority()
    pem = authority.issue_server(["hub.example", "10.0.0.1"], now_ms=NOW_MS, days=90).certificate_pem
    names = ["10.0.0.1", "hub.example"]
    assert not needs_renewal(pem, names=names, now_ms=NOW_MS + 55 * DAY_MS)
    assert needs_renewal(pem, names=names, now_ms=NOW_MS + 61 * DAY_MS)
    assert needs_renewal(pem, names=[*names, "new.example"], now_ms=NOW_MS)
    assert needs_renewal(pem, names=names[:1], now_ms=NOW_MS)
    assert needs_renewal(b"nonsense", names=(), now_ms=NOW_MS)


def test_a_ca_needs_its_own_key() -> None:
    one, two = ca.make_ca(now_ms=NOW_MS, label="a"), ca.make_ca(now_ms=NOW_MS, label="b")
    with pytest.raises(ConfigError, match="does not belong"):
        Authority(one.certificate_pem, two.key_pem)
    with pytest.raises(ConfigError, match="do not parse"):
        Authority(b"", one.key_pem)
    certificate = x509.load_pem_x509_certificate(one.certificate_pem)
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == "Outrider CA a"
