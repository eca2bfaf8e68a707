"""Renewal at the desk: what proves a device, whose certificate is renewed, and what a thief of what gets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from cloud_hub.devices import certificate_tables, renewing, rules, tables
from cloud_hub.devices.desk import Desk, Enrolled, RenewalRequest, Renewed, readiness
from cloud_hub.devices.standing import listed
from cloud_hub.ground import audit
from cloud_hub.ground.authorities import Authorities, TrustedPair
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import NotAllowed, Throttled
from cloud_hub.ground.walltime import WallTime
from shared.errors import ConfigError, InvalidValue, OutriderError
from shared.ids import DeviceId
from shared.renewal import REFUSED_FOR_GOOD, csr_digest, proof_message
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import DAY_MS, csr_for, der, hub_database, make_authority, make_desk, new_csr

Key = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
DEVICE = DeviceId("pi-1")


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def prove(key: Key, message: bytes) -> str:
    signature = (
        key.sign(message, ec.ECDSA(hashes.SHA256()))
        if isinstance(key, ec.EllipticCurvePrivateKey)
        else key.sign(message)
    )
    return base64.b64encode(signature).decode()


class Room:
    """A devices room with one device, whose key we hold."""

    def __init__(self, database: Database) -> None:
        self.database, self.clock = database, FakeClock()
        self.authority = make_authority()
        self.authorities = Authorities(self.authority)
        self.desk: Desk = make_desk(database, self.clock, self.authorities)
        self.key: Key = new_key()
        self.pem = self.enroll("pi-1", self.key).certificate_pem

    def enroll(self, name: str, key: Key, *, device: str | None = None) -> Enrolled:
        token = asyncio.run(
            self.desk.create_join_token(name="t", device=device, profile=None, uses=1, ttl_ms=DAY_MS, actor="t")
        )
        return asyncio.run(
            self.desk.enroll(token=token, csr_pem=csr_for(key), profile="pi", name=name, address="10.0.0.9")
        )

    def request(
        self,
        csr: str,
        *,
        key: Key | None = None,
        pem: str | None = None,
        device: str = "pi-1",
        proven_csr: str | None = None,
        ca: str | None = None,
    ) -> RenewalRequest:
        message = proof_message(
            device=DeviceId(device),
            csr_sha256=csr_digest(proven_csr or csr),
            ca_fingerprint=ca or self.authority.fingerprint,
        )
        return RenewalRequest(certificate_pem=pem or self.pem, csr_pem=csr, proof=prove(key or self.key, message))

    def renew(self, request: RenewalRequest) -> Renewed:
        return asyncio.run(self.desk.renew(request, address="10.0.0.9"))

    def refused(self, request: RenewalRequest) -> OutriderError:
        before = self.certificates()
        with pytest.raises(OutriderError) as caught:
            self.renew(request)
        assert self.certificates() == before
        return caught.value

    def certificates(self) -> int:
        return len(self.database.read_now(lambda conn: conn.execute(tables.device_certificates.select()).all()))

    def audit(self) -> list[str]:
        rows = self.database.read_now(lambda conn: audit.entries(conn, after=0, limit=500))
        return [row.action for row in rows if row.action.startswith("certificate.")]


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    with hub_database(tmp_path) as database:
        yield Room(database)


def test_a_certificate_is_traded_for_one_with_a_new_key(room: Room) -> None:
    key = new_key()
    renewed = room.renew(room.request(csr_for(key, "somebody-else")))
    certificate = x509.load_pem_x509_certificate(renewed.certificate_pem.encode())
    assert renewed.device == "pi-1"
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.rfc4514_string() == "CN=pi-1"
    assert (renewed.ca_pem, renewed.hub_url) == (room.authority.pem, "https://hub.example:8443")
    for pem in (room.pem, renewed.certificate_pem):
        assert asyncio.run(room.desk.device_of(der(pem))) == "pi-1"
    room.pem, room.key = renewed.certificate_pem, key
    again = room.renew(room.request(new_csr()))
    assert again.certificate_pem != renewed.certificate_pem
    assert room.audit() == ["certificate.renewed", "certificate.renewed"]


def test_ed25519_keys_prove_too(room: Room) -> None:
    room.key = ed25519.Ed25519PrivateKey.generate()
    room.pem = room.enroll("pi-2", room.key).certificate_pem
    assert room.renew(room.request(new_csr(), device="pi-2")).device == "pi-2"


def test_a_lost_answer_is_given_again_and_makes_no_second_certificate(room: Room) -> None:
    request = room.request(new_csr())
    first = room.renew(request)
    again = room.renew(room.request(request.csr_pem))
    assert again == first
    assert room.certificates() == 2
    assert room.audit() == ["certificate.renewed", "certificate.renewal_repeated"]


def test_an_expired_certificate_may_renew_and_nothing_else(room: Room) -> None:
    room.clock.advance(200 * DAY_MS)
    with pytest.raises(NotAllowed) as caught:
        asyncio.run(room.desk.device_of(der(room.pem)))
    assert caught.value.code == "auth.unknown_certificate"
    renewed = room.renew(room.request(new_csr()))
    assert asyncio.run(room.desk.device_of(der(renewed.certificate_pem))) == "pi-1"


def test_a_certificate_that_expired_too_long_ago_is_refused(room: Room) -> None:
    room.clock.advance((30 + 365) * DAY_MS)
    assert room.refused(room.request(new_csr())).code == "renew.too_old"
    assert room.audit() == ["certificate.renewal_refused"]


def test_renewal_of_what_has_expired_can_be_switched_off() -> None:
    standing = rules.CertificateStanding(device=DEVICE, is_revoked=False)
    rules.check_renewal(standing, name="pi-1", ends_ms=10, expired_ms=0, now_ms=9)
    with pytest.raises(NotAllowed) as caught:
        rules.check_renewal(standing, name="pi-1", ends_ms=10, expired_ms=0, now_ms=10)
    assert caught.value.code == "renew.disabled"


def test_a_device_in_quarantine_is_refused() -> None:
    standing = rules.CertificateStanding(device=DEVICE, is_revoked=False, is_quarantined=True)
    with pytest.raises(NotAllowed) as caught:
        rules.check_renewal(standing, name="pi-1", ends_ms=10, expired_ms=5, now_ms=9)
    assert caught.value.code == "renew.quarantined"


def test_a_revoked_certificate_is_refused(room: Room) -> None:
    room.enroll("pi-1", new_key(), device="pi-1")
    assert room.refused(room.request(new_csr())).code == "renew.revoked"


def test_a_stolen_certificate_without_its_key_is_refused(room: Room) -> None:
    assert room.refused(room.request(new_csr(), key=new_key())).code == "renew.proof"
    assert room.audit() == []


def test_a_proof_for_another_request_name_or_ca_is_refused(room: Room) -> None:
    other = make_authority()
    for request in (
        room.request(new_csr(), proven_csr=new_csr()),
        room.request(new_csr(), device="pi-2"),
        room.request(new_csr(), ca=other.fingerprint),
    ):
        assert room.refused(request).code == "renew.proof"


def test_a_signature_over_something_else_is_no_proof(room: Room) -> None:
    csr = new_csr()
    request = RenewalRequest(certificate_pem=room.pem, csr_pem=csr, proof=prove(room.key, csr.encode()))
    assert room.refused(request).code == "renew.proof"


def test_the_old_key_again_is_refused(room: Room) -> None:
    error = room.refused(room.request(csr_for(room.key)))
    assert isinstance(error, InvalidValue)
    assert error.code == "renew.same_key"


def test_a_foreign_ca_is_refused(room: Room) -> None:
    foreign = make_authority().issue_device(csr_for(room.key), device=DEVICE, now_ms=room.clock.wall_ms(), days=30)
    assert room.refused(room.request(new_csr(), pem=foreign.pem)).code == "renew.unknown_certificate"


def test_a_server_certificate_and_the_hubs_own_are_refused(room: Room) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    now_ms = room.clock.wall_ms()
    server = room.authority.issue_server(["pi-1"], now_ms=now_ms, days=30)
    hub = room.authority.issue_client("hub", now_ms=now_ms, days=30)
    for pair, name in ((server, "pi-1"), (hub, "hub")):
        key = load_pem_private_key(pair.key_pem, password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        request = room.request(new_csr(), key=key, pem=pair.certificate_pem.decode(), device=name)
        assert room.refused(request).code == "renew.unknown_certificate"


def test_nonsense_is_refused(room: Room) -> None:
    good = room.request(new_csr())
    for spoiled, code in (
        (RenewalRequest(certificate_pem="x", csr_pem=good.csr_pem, proof=good.proof), "renew.unknown_certificate"),
        (RenewalRequest(certificate_pem=good.certificate_pem, csr_pem="x", proof=good.proof), "enrol.csr"),
        (RenewalRequest(certificate_pem=good.certificate_pem, csr_pem=good.csr_pem, proof="!"), "renew.proof"),
    ):
        assert room.refused(spoiled).code == code


def test_certificates_do_not_grow_without_bound(room: Room) -> None:
    for _ in range(renewing.MAX_LIVE - 1):
        room.renew(room.request(new_csr()))
        room.clock.advance(60_000)
    assert isinstance(room.refused(room.request(new_csr())), Throttled)
    room.clock.advance(31 * DAY_MS)
    room.renew(room.request(new_csr()))


@pytest.mark.parametrize("use", ["shown at the HTTPS port", "renewed"])
def test_once_a_certificate_is_used_the_one_before_it_gets_only_its_answer_again(room: Room, use: str) -> None:
    key = new_key()
    first = room.request(csr_for(key))
    renewed = room.renew(first)
    assert room.renew(room.request(new_csr())).device == "pi-1"
    if use == "renewed":
        room.renew(room.request(new_csr(), key=key, pem=renewed.certificate_pem))
    else:
        assert asyncio.run(room.desk.device_of(der(renewed.certificate_pem))) == "pi-1"
    for _ in range(2):
        assert room.refused(room.request(new_csr())).code == "renew.superseded"
    assert room.renew(room.request(first.csr_pem)) == renewed
    room.clock.advance(25 * DAY_MS)
    assert room.renew(room.request(new_csr(), key=key, pem=renewed.certificate_pem)).device == "pi-1"
    assert room.audit().count("certificate.renewal_refused") == 2


def test_what_expired_beyond_use_is_forgotten(room: Room) -> None:
    for _ in range(15):
        key = new_key()
        renewed = room.renew(room.request(csr_for(key)))
        room.key, room.pem = key, renewed.certificate_pem
        room.clock.advance(100 * DAY_MS)
    assert room.certificates() < 8
    issues = room.database.read_now(lambda conn: conn.execute(certificate_tables.certificate_issues.select()).all())
    assert len(issues) == room.certificates()


def test_one_device_cannot_flood(room: Room) -> None:
    request = room.request(new_csr())
    for _ in range(renewing._BURST):
        room.renew(request)
    with pytest.raises(Throttled):
        room.renew(request)


@pytest.mark.parametrize("ahead_days", [25, 800])
def test_a_hub_whose_clock_is_ahead_neither_renews_nor_enrols_nor_refuses_for_good(room: Room, ahead_days: int) -> None:
    time = WallTime(room.clock, newest_ms=None, metrics=Metrics())
    room.authorities.require_time = time.require
    request = room.request(new_csr())
    room.clock.wall += ahead_days * DAY_MS
    error = room.refused(request)
    assert error.code == "config.clock"
    assert error.code not in REFUSED_FOR_GOOD
    with pytest.raises(ConfigError):
        room.enroll("pi-2", new_key())
    room.clock.wall -= ahead_days * DAY_MS
    assert room.renew(request).device == "pi-1"
    assert room.audit() == ["certificate.renewed"]


def test_the_fleet_is_counted_during_a_change_of_the_ca(room: Room) -> None:
    new = make_authority(now_ms=room.clock.wall_ms())
    room.enroll("pi-2", new_key())
    room.authorities.adopt(TrustedPair(phase="begun", issuing=room.authority, other=new))
    now_ms = room.clock.wall_ms()

    def look() -> tuple[list[str], list[str]]:
        ready = room.database.read_now(lambda conn: readiness(conn, ca_fingerprint=new.fingerprint, now_ms=now_ms))
        return list(ready.untold), list(ready.unsigned)

    assert look() == (["pi-1", "pi-2"], ["pi-1", "pi-2"])
    key = new_key()
    renewed = room.renew(room.request(csr_for(key)))
    assert renewed.ca_pem == room.authority.pem + new.pem
    assert look() == (["pi-2"], ["pi-1", "pi-2"])
    room.authorities.adopt(TrustedPair(phase="switched", issuing=new, other=room.authority))
    room.key, room.pem = key, renewed.certificate_pem
    by_new = room.renew(room.request(new_csr()))
    assert look() == (["pi-2"], ["pi-2"])
    room.authorities.adopt(TrustedPair(phase="steady", issuing=new))
    assert asyncio.run(room.desk.device_of(der(by_new.certificate_pem))) == "pi-1"
    with pytest.raises(NotAllowed):
        asyncio.run(room.desk.device_of(der(renewed.certificate_pem)))
    assert hashlib.sha256(der(by_new.ca_pem[: len(new.pem)])).hexdigest() == new.fingerprint


def test_a_device_that_may_not_renew_holds_up_no_change_of_the_ca(room: Room) -> None:
    new, now_ms = make_authority(now_ms=room.clock.wall_ms()), room.clock.wall_ms()
    room.enroll("pi-2", new_key())

    def untold() -> tuple[list[str], int]:
        ready = room.database.read_now(lambda conn: readiness(conn, ca_fingerprint=new.fingerprint, now_ms=now_ms))
        assert ready.untold == ready.unsigned
        return list(ready.untold), ready.live

    asyncio.run(room.desk.standings.quarantine("pi-1", reason="odd", actor="op"))
    assert untold() == (["pi-2"], 1)
    asyncio.run(room.desk.standings.lift("pi-1", actor="op"))
    assert untold() == (["pi-1", "pi-2"], 2)
    asyncio.run(room.desk.standings.revoke("pi-2", reason="stolen", actor="op"))
    assert untold() == (["pi-1"], 1)


@pytest.mark.parametrize("kind", ["revoked", "quarantined"])
def test_a_device_that_is_not_welcome_gets_no_new_certificate(room: Room, kind: str) -> None:
    standings = room.desk.standings
    act = standings.revoke if kind == "revoked" else standings.quarantine
    asyncio.run(act("pi-1", reason="stolen", actor="op"))
    error = room.refused(room.request(csr_for(new_key())))
    assert error.code == f"renew.{kind}"
    assert (kind == "quarantined") is ("device quarantine pi-1 --lift" in error.hint)
    assert room.audit() == ["certificate.renewal_refused"]
    if kind == "quarantined":
        asyncio.run(standings.lift("pi-1", actor="op"))
        assert room.renew(room.request(csr_for(new_key()))).device == "pi-1"


def test_a_repeated_request_of_a_device_that_is_not_welcome_is_refused_too(room: Room) -> None:
    request = room.request(csr_for(new_key()))
    room.renew(request)
    asyncio.run(room.desk.standings.quarantine("pi-1", reason="odd", actor="op"))
    assert room.refused(request).code == "renew.quarantined"


def test_renewed_certificates_are_revoked_with_the_first_by_their_own_ca(room: Room) -> None:
    old, new = room.authority, make_authority()
    room.authorities.adopt(TrustedPair(phase="switched", issuing=new, other=old))
    renewed = room.renew(room.request(csr_for(new_key())))
    serials = [
        x509.load_pem_x509_certificate(pem.encode()).serial_number for pem in (room.pem, renewed.certificate_pem)
    ]
    now_ms = room.clock.wall_ms()
    live = room.database.read_now(lambda conn: tables.live_serials(conn, DEVICE, now_ms=now_ms))
    assert sorted(live) == sorted(serials)
    assert not room.database.read_now(lambda conn: tables.has_unlistable(conn, DEVICE, now_ms=now_ms))
    asyncio.run(room.desk.standings.revoke("pi-1", reason="stolen", actor="op"))
    lines, denied = room.database.read_now(lambda conn: listed(conn, now_ms=now_ms))
    assert {(line.authority, line.serial) for line in lines} == {
        (old.fingerprint, serials[0]),
        (new.fingerprint, serials[1]),
    }
    assert denied == (DEVICE,)
