"""The two files that keep devices out of the broker: what they hold, and when they begin and end."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_hub.ground.authorities import Authorities, TrustedPair
from cloud_hub.ground.ca import Authority
from cloud_hub.ground.revocation import AccessLists, RevokedCertificate, access_list, make_list, read_state
from shared.errors import StorageError
from shared.ids import DeviceId
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import DAY_MS, NOW_MS, make_authority

HOUR_MS = 3600 * 1000


@pytest.fixture(scope="module")
def authority() -> Authority:
    return make_authority()


def moment(ms: int) -> datetime:
    return datetime.fromtimestamp(ms // 1000, UTC)


def lists(folder: Path, clock: FakeClock, issuing: Authority, other: Authority | None = None) -> AccessLists:
    authorities = Authorities(issuing)
    authorities.adopt(TrustedPair(phase="steady" if other is None else "begun", issuing=issuing, other=other))
    return AccessLists(folder, authorities=authorities, hub_name="hub", clock=clock)


def parsed(folder: Path) -> list[x509.CertificateRevocationList]:
    parts = (folder / "crl.pem").read_bytes().split(b"-----BEGIN")[1:]
    return [x509.load_pem_x509_crl(b"-----BEGIN" + part) for part in parts]


def test_a_list_holds_what_its_ca_signed_and_lives_thirty_days(authority: Authority) -> None:
    lines = [
        RevokedCertificate(authority=authority.fingerprint, serial=17, revoked_ms=NOW_MS - 5000),
        RevokedCertificate(authority="another", serial=18, revoked_ms=NOW_MS),
    ]
    made = x509.load_pem_x509_crl(make_list(authority, lines, now_ms=NOW_MS, after_ms=None))
    signer = x509.load_pem_x509_certificate(authority.pem.encode())
    public = signer.public_key()
    assert made.is_signature_valid(public)  # type: ignore[arg-type]
    assert made.issuer == signer.subject
    assert [line.serial_number for line in made] == [17]
    assert made.next_update_utc == moment(NOW_MS + 30 * DAY_MS)
    assert made.last_update_utc == moment(NOW_MS - HOUR_MS)


def test_each_ca_has_its_list_in_the_file(tmp_path: Path, authority: Authority) -> None:
    other, clock = make_authority(), FakeClock(wall_ms=NOW_MS)
    revoked = [
        RevokedCertificate(authority=authority.fingerprint, serial=1, revoked_ms=NOW_MS),
        RevokedCertificate(authority=other.fingerprint, serial=2, revoked_ms=NOW_MS),
    ]
    lists(tmp_path, clock, authority, other).write(revoked=revoked, denied=())
    assert [[line.serial_number for line in one] for one in parsed(tmp_path)] == [[1], [2]]
    state = read_state(tmp_path / "crl.pem")
    assert state is not None
    assert (state.certificates, state.expires_ms, state.made_ms) == (2, NOW_MS + 30 * DAY_MS, NOW_MS)


@settings(max_examples=20, deadline=None)
@given(steps=st.lists(st.integers(min_value=-40 * DAY_MS, max_value=40 * DAY_MS) | st.just(0), max_size=8))
def test_every_list_begins_later_than_the_one_before_and_never_in_the_future(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority, steps: list[int]
) -> None:
    clock = FakeClock(wall_ms=NOW_MS)
    folder = tmp_path_factory.mktemp("lists")
    ours = lists(folder, clock, authority)
    before, marks = None, set()
    for step in [0, *steps]:
        clock.wall += step
        marks.add(ours.write(revoked=(), denied=()))
        state = ours.state()
        assert state is not None
        assert state.began_ms <= clock.wall < state.expires_ms
        if before is not None and before <= clock.wall - 1000:
            assert state.began_ms > before
        before = state.began_ms
    if all(step >= 0 for step in steps):
        assert len(marks) == len(steps) + 1


@pytest.mark.parametrize(
    ("days", "due"), [(0.0, False), (0.9, False), (1.0, True), (8.0, True), (40.0, True), (-3.0, True)]
)
def test_a_list_is_made_anew_every_day(tmp_path: Path, authority: Authority, days: float, due: bool) -> None:
    clock = FakeClock(wall_ms=NOW_MS)
    ours = lists(tmp_path, clock, authority)
    assert ours.is_due()
    ours.write(revoked=(), denied=())
    clock.wall += int(days * DAY_MS)
    assert ours.is_due() is due
    ours.write(revoked=(), denied=())
    assert not ours.is_due()


@pytest.mark.parametrize("text", [b"", b"rubbish", b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n"])
def test_a_file_that_is_no_list_is_due(tmp_path: Path, authority: Authority, text: bytes) -> None:
    (tmp_path / "crl.pem").write_bytes(text)
    ours = lists(tmp_path, FakeClock(), authority)
    assert ours.state() is None
    assert ours.is_due()
    ours.write(revoked=(), denied=())
    assert ours.state() is not None


def test_the_access_list_denies_by_name_and_carries_the_mark(tmp_path: Path, authority: Authority) -> None:
    text = access_list("hub.b", denied=[DeviceId("pi-2"), DeviceId("pi-1")], mark="list-7")
    assert text.split("\n\n")[:3] == [
        "user hub.b\ntopic readwrite outrider/#",
        "user pi-1\ntopic deny #",
        "user pi-2\ntopic deny #",
    ]
    assert "pattern deny outrider/1/%u/up/list-7\n" in text
    mark = lists(tmp_path, FakeClock(), authority).write(revoked=(), denied=())
    assert f"up/{mark}\n" in (tmp_path / "acl").read_text()
    assert (tmp_path / "crl.pem").stat().st_mode & 0o777 == 0o600


def test_a_disk_that_refuses_is_told(tmp_path: Path, authority: Authority) -> None:
    with pytest.raises(StorageError):
        lists(tmp_path / "nowhere", FakeClock(), authority).write(revoked=(), denied=())
