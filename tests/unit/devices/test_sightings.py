"""What the desk notes of a certificate that is shown: its use, its serial, and one that a database has lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from sqlalchemy.engine import Connection

from cloud_hub.devices import certificate_tables, tables
from cloud_hub.devices.standing import listed
from cloud_hub.ground import audit
from cloud_hub.ground.refusals import NotAllowed
from shared.errors import Conflict, StorageError
from shared.ids import DeviceId
from tests.fakes.hub_parts import DAY_MS, csr_for, der, hub_database, new_csr
from tests.unit.devices.test_renewal_desk import DEVICE, Room, new_key


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    with hub_database(tmp_path) as database:
        yield Room(database)


def test_the_use_of_a_certificate_is_noted_once(room: Room) -> None:
    for _ in range(3):
        asyncio.run(room.desk.device_of(der(room.pem)))
        room.clock.advance(1000)
    (row,) = room.database.read_now(lambda conn: conn.execute(tables.device_certificates.select()).all())
    assert row.used_ms == room.clock.wall_ms() - 3000


def test_who_is_known_is_let_in_when_nothing_can_be_noted(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object) -> None:
        raise StorageError("the disk is full", code="storage.full")

    with monkeypatch.context() as patched:
        patched.setattr(room.database, "write", full)
        assert asyncio.run(room.desk.device_of(der(room.pem))) == "pi-1"


def restored(room: Room) -> None:
    """The device renews, and the database is set back to before; the device holds what the hub has forgotten."""
    kept = (tables.device_certificates, certificate_tables.certificate_issues)
    saved = room.database.read_now(
        lambda conn: [[dict(row._mapping) for row in conn.execute(table.select())] for table in kept]
    )
    room.clock.advance(20 * DAY_MS)
    key = new_key()
    room.pem, room.key = room.renew(room.request(csr_for(key))).certificate_pem, key

    def set_back(conn: Connection) -> None:
        for table in reversed(kept):
            conn.execute(table.delete())
        for table, rows in zip(kept, saved, strict=True):
            conn.execute(table.insert(), rows)
        conn.execute(audit.audit.delete())

    room.database.write_now(set_back)


def live_serials(room: Room) -> tuple[int, ...]:
    return room.database.read_now(lambda conn: tables.live_serials(conn, DEVICE, now_ms=room.clock.wall_ms()))


def test_a_certificate_that_a_restored_database_has_forgotten_is_taken_up_at_the_door(room: Room) -> None:
    restored(room)
    for _ in range(2):
        assert asyncio.run(room.desk.device_of(der(room.pem))) == "pi-1"
    assert room.audit() == ["certificate.adopted"]
    assert x509.load_pem_x509_certificate(room.pem.encode()).serial_number in live_serials(room)
    asyncio.run(room.desk.standings.revoke("pi-1", reason="stolen", actor="op"))
    with pytest.raises(NotAllowed) as caught:
        asyncio.run(room.desk.device_of(der(room.pem)))
    assert caught.value.code == "auth.revoked_certificate"


def test_a_certificate_that_a_restored_database_has_forgotten_is_renewed(room: Room) -> None:
    restored(room)
    room.clock.advance(100 * DAY_MS)
    assert room.renew(room.request(new_csr())).device == "pi-1"
    assert room.audit() == ["certificate.adopted", "certificate.renewed"]


@pytest.mark.parametrize("kind", ["revoked", "quarantined"])
def test_nothing_is_taken_up_for_a_device_that_is_not_welcome(room: Room, kind: str) -> None:
    restored(room)
    standings = room.desk.standings
    act = standings.revoke if kind == "revoked" else standings.quarantine
    asyncio.run(act("pi-1", reason="stolen", actor="op"))
    assert room.refused(room.request(new_csr())).code == "renew.unknown_certificate"
    with pytest.raises(NotAllowed) as caught:
        asyncio.run(room.desk.device_of(der(room.pem)))
    assert caught.value.code == "auth.unknown_certificate"
    assert "certificate.adopted" not in room.audit()


def test_an_unknown_certificate_of_before_the_newest_known_one_is_not_taken_up(room: Room) -> None:
    restored(room)
    room.enroll("pi-1", new_key(), device="pi-1")
    assert room.refused(room.request(new_csr())).code == "renew.unknown_certificate"
    assert room.audit() == ["certificate.renewal_refused"]


def test_what_the_hub_signs_for_a_takeover_is_not_taken_up(room: Room) -> None:
    room.clock.advance(DAY_MS)
    now_ms = room.clock.wall_ms()
    takeover = room.authority.issue_client("pi-1", now_ms=now_ms, days=1).certificate_pem.decode()
    with pytest.raises(NotAllowed):
        asyncio.run(room.desk.device_of(der(takeover)))
    device = room.authority.issue_device(new_csr(), device=DeviceId("pi-2"), now_ms=now_ms, days=1)
    with pytest.raises(NotAllowed):
        asyncio.run(room.desk.device_of(der(device.pem)))
    assert room.certificates() == 1


@pytest.mark.parametrize("shown", ["welcome", "at the door", "at renewal"])
def test_the_serial_of_an_old_certificate_is_noted_when_it_is_shown(room: Room, shown: str) -> None:
    """Made by a hub that kept none: welcome or refused, from then on it can be put onto the list."""

    def forget(conn: Connection) -> None:
        conn.execute(tables.device_certificates.update().values(serial="", authority=""))

    room.database.write_now(forget)
    if shown == "welcome":
        asyncio.run(room.desk.device_of(der(room.pem)))
    asyncio.run(room.desk.standings.revoke("pi-1", reason="stolen", actor="op"))
    if shown != "welcome":
        with pytest.raises(Conflict) as caught:
            room.enroll("pi-1", new_key(), device="pi-1")
        assert caught.value.code == "enrol.old_certificate"
    if shown == "at the door":
        with pytest.raises(NotAllowed):
            asyncio.run(room.desk.device_of(der(room.pem)))
    if shown == "at renewal":
        assert room.refused(room.request(new_csr())).code == "renew.revoked"
    room.enroll("pi-1", new_key(), device="pi-1")
    ((line,), _) = room.database.read_now(lambda conn: listed(conn, now_ms=room.clock.wall_ms()))
    serial = x509.load_pem_x509_certificate(room.pem.encode()).serial_number
    assert (line.authority, line.serial) == (room.authority.fingerprint, serial)
