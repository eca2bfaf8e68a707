"""Which authorities follow from a pinned one, and which do not whatever is published."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from cloud_hub.ground.ca import Authority
from shared.ids import DeviceId
from shared.trust.ca_links import MAX_PUBLISHED, fingerprints, vouched
from tests.fakes.hub_parts import NOW_MS, csr_for, make_authority

OLD, NEW, OTHER = make_authority(), make_authority(), make_authority()
LINK = OLD.link_to(NEW, now_ms=NOW_MS)


def pins(*authorities: Authority) -> frozenset[str]:
    return frozenset(authority.fingerprint for authority in authorities)


def test_the_pinned_one_is_trusted_and_what_it_links_to() -> None:
    assert vouched(OLD.pem, pins=pins(OLD)) == OLD.pem
    assert vouched(NEW.pem + OLD.pem + LINK, pins=pins(OLD)) == NEW.pem + OLD.pem
    assert vouched(NEW.pem + OLD.pem + LINK, pins=pins(NEW)) == NEW.pem
    assert vouched(NEW.pem + OLD.pem + LINK, pins=pins(OLD, NEW)) == NEW.pem + OLD.pem


def test_without_a_link_of_the_pinned_one_nothing_follows() -> None:
    assert vouched(NEW.pem + OLD.pem, pins=pins(OLD)) == OLD.pem
    assert vouched(NEW.pem + LINK, pins=pins(OLD)) == ""
    assert vouched(OTHER.pem + OLD.pem + LINK, pins=pins(OLD)) == OLD.pem
    forged = OTHER.link_to(NEW, now_ms=NOW_MS)
    assert vouched(NEW.pem + OLD.pem + OTHER.pem + forged, pins=pins(OLD)) == OLD.pem
    assert vouched(NEW.pem, pins=pins(OLD)) == ""


def test_a_link_works_one_way() -> None:
    assert vouched(NEW.pem + OLD.pem + LINK, pins=pins(NEW)) == NEW.pem


def test_a_device_certificate_is_no_link() -> None:
    """A thief of a device's key makes a CA with it; the certificate of that key is signed by the pinned CA."""
    pair = _own_authority()
    key = load_pem_private_key(pair[1], password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    device = OLD.issue_device(csr_for(key), device=DeviceId("dev-a"), now_ms=NOW_MS, days=30)
    evil = Authority(*pair)
    assert vouched(evil.pem + OLD.pem + device.pem, pins=pins(OLD)) == OLD.pem


def _own_authority() -> tuple[bytes, bytes]:
    """A CA by the name of a device, with a key of one's own."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "dev-a")])
    now = datetime.fromtimestamp(NOW_MS // 1000, UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), pem


def test_too_much_and_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        vouched(OLD.pem * (MAX_PUBLISHED + 1), pins=pins(OLD))
    with pytest.raises(ValueError, match=r".+"):
        vouched("nothing", pins=pins(OLD))
    assert fingerprints(OLD.pem + NEW.pem) == (OLD.fingerprint, NEW.fingerprint)
