"""Who is welcome: what is stored, told to the broker, tried again, and kept from rooms."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud_hub.devices import desk as devices_room
from cloud_hub.devices import standing, tables
from cloud_hub.devices.desk import Desk, Enrolled
from cloud_hub.devices.rules import Standing
from cloud_hub.ground import audit
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.bus import Bus, DeviceBorn, DeviceReported, DeviceStandingChanged
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import NotAllowed, NotFound
from cloud_hub.ground.revocation import AccessLists
from shared.errors import Conflict, InvalidValue, StorageError
from shared.ids import DeviceId
from shared.wire.envelope import Envelope
from shared.wire.messages import Birth, Reported
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import (
    DAY_MS,
    NOW_MS,
    FakeAccess,
    der,
    envelope_of,
    hub_database,
    make_authority,
    make_desk,
    new_csr,
)

PI = DeviceId("pi-1")


class Room:
    """A devices room with one device, and what it told."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.clock, self.authority = FakeClock(wall_ms=NOW_MS), make_authority()
        self.access, self.metrics, bus = FakeAccess(), Metrics(), Bus()
        self.events: list[object] = []

        async def hear(event: object) -> None:
            self.events.append(event)

        bus.subscribe(DeviceBorn, hear)
        bus.subscribe(DeviceReported, hear)
        bus.subscribe(DeviceStandingChanged, hear)
        self.desk: Desk = make_desk(
            database, self.clock, self.authority, bus=bus, metrics=self.metrics, access=self.access
        )
        self.standings = self.desk.standings
        self.first = self.enroll(name="pi-1")

    def enroll(self, *, name: str = "", device: str | None = None) -> Enrolled:
        async def go() -> Enrolled:
            token = await self.desk.create_join_token(
                name="t", device=device, profile=None, uses=1, ttl_ms=1000, actor="op"
            )
            return await self.desk.enroll(
                token=token, csr_pem=new_csr(), profile="pi", name=name or None, address="10.0.0.9"
            )

        return asyncio.run(go())

    def revoke(self, device: str = PI, reason: str = "stolen") -> devices_room.Changed:
        return asyncio.run(self.standings.revoke(device, reason=reason, actor="token:op"))

    def quarantine(self, reason: str = "odd") -> devices_room.Changed:
        return asyncio.run(self.standings.quarantine(PI, reason=reason, actor="token:op"))

    def look(self) -> None:
        asyncio.run(self.standings.look())

    def born(self, boot: int, session: int = 1, *, message: str) -> None:
        birth = Birth(boot=boot, session=session, epoch="e" * 16, agent_version="1", profile="pi")
        envelope: Envelope = envelope_of(birth, device=PI, boot=boot, envelope_id=message)
        asyncio.run(self.desk.born(PI, envelope, birth))

    def serials(self) -> tuple[int, ...]:
        return self.database.read_now(lambda conn: tables.live_serials(conn, PI, now_ms=self.clock.wall_ms()))

    def audit(self) -> list[tuple[str, str, str]]:
        rows = self.database.read_now(lambda conn: audit.entries(conn, after=0, limit=500))
        return [(row.actor, row.action, row.subject) for row in rows if row.action.startswith("device.")]

    def refusal(self, enrolled: Enrolled) -> str:
        try:
            asyncio.run(self.desk.device_of(der(enrolled.certificate_pem)))
        except NotAllowed as error:
            return error.code
        return ""

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    with hub_database(tmp_path) as database:
        yield Room(database)


def test_a_revoked_device_is_listed_denied_and_refused(room: Room) -> None:
    serials = room.serials()
    room.born(1, message="m")
    changed = room.revoke()
    assert changed == devices_room.Changed(Standing.REVOKED, "stolen", True)
    assert room.access.told == [(set(serials), {PI}, {PI})]
    assert len(serials) == 1
    assert room.refusal(room.first) == "auth.revoked_certificate"
    known = asyncio.run(room.desk.get(PI))
    assert (known.standing, known.standing_reason, known.online) == (Standing.REVOKED, "stolen", False)
    assert not room.standings.is_welcome(PI)
    assert not any(room.standings.takes(PI, leaf) for leaf in ("birth", "death", "reported", "event", "round", "other"))
    assert room.standings.takes("pi-2", "event")
    assert room.events[-1] == DeviceStandingChanged(device=PI, standing="revoked")
    assert room.metric("outrider_hub_devices_barred", standing="revoked") == 1


def test_revoking_again_tells_the_broker_again_and_audits_nothing(room: Room) -> None:
    room.revoke()
    room.revoke(reason="again")
    assert len(room.access.told) == 2
    assert [row for row in room.audit() if row[1] == "device.revoked"] == [
        ("token:op", "device.revoked", "device:pi-1")
    ]
    assert asyncio.run(room.desk.get(PI)).standing_reason == "stolen"


def test_a_new_token_lifts_the_denial_for_the_new_certificate_only(room: Room) -> None:
    (old,) = room.serials()
    room.revoke()
    second = room.enroll(device=PI)
    assert room.access.told[-1] == ({old}, set(), {PI})
    assert room.standings.is_welcome(PI)
    assert room.refusal(room.first) == "auth.revoked_certificate"
    assert room.refusal(second) == ""
    (new,) = room.serials()
    assert new != old


def test_every_certificate_of_the_name_goes_onto_the_list_until_it_ends(room: Room) -> None:
    first = room.serials()
    room.clock.advance(10 * DAY_MS)
    room.enroll(device=PI)
    second = room.serials()
    room.revoke()
    assert room.access.told[-1][0] == {*first, *second}
    room.clock.advance(21 * DAY_MS)
    asyncio.run(room.standings.enforce())
    assert room.access.told[-1][:2] == (set(second), {PI})


def test_a_certificate_without_a_serial_keeps_a_revoked_name_from_coming_back(room: Room) -> None:
    room.database.write_now(lambda conn: conn.execute(tables.device_certificates.update().values(serial="")) and None)
    assert room.enroll(device=PI).is_again
    room.revoke()
    with pytest.raises(Conflict) as caught:
        room.enroll(device=PI)
    assert caught.value.code == "enrol.old_certificate"
    room.clock.advance(31 * DAY_MS)
    assert room.enroll(device=PI).is_again


def test_what_the_broker_has_not_shown_is_tried_again(room: Room) -> None:
    room.access.stuck = frozenset({PI})
    assert not room.revoke().is_enforced
    assert room.metric("outrider_hub_revocations_waiting") == 1
    room.look()
    assert len(room.access.told) == 1
    room.clock.advance(standing.KICK_AGAIN_MS)
    room.access.stuck = frozenset()
    room.look()
    assert room.access.told[-1][2] == {PI}
    assert room.metric("outrider_hub_revocations_waiting") == 0
    room.clock.advance(standing.KICK_AGAIN_MS)
    room.look()
    assert len(room.access.told) == 2


def test_a_device_that_is_welcome_again_is_not_pushed_out_again_and_again(room: Room) -> None:
    """A broker of another owner may read the list a day later; until then the new certificate must be of use."""
    room.access.stuck = room.access.unreachable = frozenset({PI})
    room.revoke()
    room.enroll(device=PI)
    room.clock.advance(standing.KICK_AGAIN_MS)
    room.look()
    assert room.access.told[-1][2] == {PI}, "its old session has not ended yet"
    room.access.unreachable = frozenset()
    room.clock.advance(standing.KICK_AGAIN_MS)
    room.look()
    told = len(room.access.told)
    for _ in range(10):
        room.clock.advance(standing.KICK_AGAIN_MS)
        room.look()
    assert len(room.access.told) == told
    assert room.metric("outrider_hub_revocations_waiting") == 1
    # With the next list once more: who has come in with the old certificate meanwhile does not stay for good.
    room.access.due, room.access.stuck = True, frozenset()
    room.look()
    assert room.access.told[-1][2] == {PI}
    assert room.metric("outrider_hub_revocations_waiting") == 0


def test_a_revoked_device_is_pushed_out_again_and_again(room: Room) -> None:
    room.access.stuck = frozenset({PI})
    room.revoke()
    for times in range(2, 5):
        room.clock.advance(standing.KICK_AGAIN_MS)
        room.look()
        assert len(room.access.told) == times
        assert room.access.told[-1][2] == {PI}


def test_a_list_that_cannot_be_made_is_an_alarm_and_the_device_is_refused_all_the_same(
    room: Room, caplog: pytest.LogCaptureFixture
) -> None:
    room.access.broken = StorageError("full")
    assert not room.revoke().is_enforced
    assert room.refusal(room.first) == "auth.revoked_certificate"
    assert not room.standings.is_welcome(PI)
    room.look()
    assert room.metric("outrider_hub_revocation_list_failures_total") == 2
    assert [record.message for record in caplog.records].count("revocation list cannot be made: storage: full") == 1
    room.access.broken = None
    room.look()
    assert room.access.told[-1][1:] == ({PI}, {PI})


@pytest.mark.parametrize("days", [8, 40])
def test_the_list_is_made_anew_long_before_it_ends(tmp_path: Path, days: int) -> None:
    with hub_database(tmp_path) as database:
        clock = FakeClock(wall_ms=NOW_MS)
        lists = AccessLists(tmp_path, authorities=Authorities(make_authority()), hub_name="hub", clock=clock)
        standing.write_lists(database, lists, clock=clock)
        access, metrics = FakeAccess(), Metrics()

        class Door(FakeAccess):
            async def enforce(self, *, revoked, denied, kick):  # type: ignore[no-untyped-def]
                lists.write(revoked=revoked, denied=denied)
                return await access.enforce(revoked=revoked, denied=denied, kick=kick)

        standings = devices_room.Standings(
            database=database, clock=clock, access=Door(), lists=lists, bus=Bus(), metrics=metrics, kicks_at_start=False
        )
        asyncio.run(standings.look())
        assert access.told == []
        clock.advance(days * DAY_MS)
        asyncio.run(standings.look())
        assert len(access.told) == 1
        state = lists.state()
        assert state is not None
        assert state.made_ms == clock.wall_ms()
        assert state.expires_ms == clock.wall_ms() + 30 * DAY_MS
        expires = metrics.registry.get_sample_value("outrider_hub_revocation_list_expires_timestamp_seconds")
        assert expires == state.expires_ms / 1000


def test_a_full_disk_keeps_nobody_out_as_long_as_the_list_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_database(tmp_path) as database:
        clock = FakeClock(wall_ms=NOW_MS)
        lists = AccessLists(tmp_path, authorities=Authorities(make_authority()), hub_name="hub", clock=clock)
        standing.write_lists(database, lists, clock=clock)

        def refuse(**_: object) -> str:
            raise StorageError("full")

        monkeypatch.setattr(lists, "write", refuse)
        standing.write_lists(database, lists, clock=clock)
        clock.advance(31 * DAY_MS)
        with pytest.raises(StorageError):
            standing.write_lists(database, lists, clock=clock)


def test_who_is_not_welcome_is_known_after_a_restart(room: Room) -> None:
    room.revoke()
    again = make_desk(room.database, room.clock, room.authority, access=room.access)
    assert again.standings.is_welcome(PI)
    asyncio.run(again.start())
    assert not again.standings.is_welcome(PI)
    revoked, denied = room.database.read_now(lambda conn: standing.listed(conn, now_ms=NOW_MS))
    assert (len(revoked), denied) == (1, (PI,))


def test_a_broker_that_is_not_ours_is_told_at_the_start(room: Room) -> None:
    room.revoke()
    standings = devices_room.Standings(
        database=room.database,
        clock=room.clock,
        access=room.access,
        lists=room.access,
        bus=Bus(),
        metrics=Metrics(),
        kicks_at_start=True,
    )
    asyncio.run(standings.start())
    asyncio.run(standings.look())
    assert room.access.told[-1][2] == {PI}


def test_quarantine_keeps_the_certificate_and_gives_nothing(room: Room) -> None:
    serials = room.serials()
    assert room.quarantine().standing is Standing.QUARANTINED
    assert room.serials() == serials
    assert room.access.told == []
    assert room.refusal(room.first) == "auth.quarantined"
    assert not room.standings.is_welcome(PI)
    taken = {leaf: room.standings.takes(PI, leaf) for leaf in ("birth", "death", "reported", "telemetry", "round")}
    assert taken == {"birth": True, "death": True, "reported": True, "telemetry": False, "round": False}
    room.events.clear()
    room.born(1, message="m")
    report = Reported(revision=1, assignment_version=0, models=())
    asyncio.run(room.desk.reported(PI, envelope_of(report, device=PI), report))
    assert room.events == []
    assert asyncio.run(room.desk.get(PI)).online
    asyncio.run(room.standings.lift(PI, actor="token:op"))
    assert room.refusal(room.first) == ""
    assert room.standings.is_welcome(PI)
    assert [action for _, action, _ in room.audit()] == [
        "device.enrolled",
        "device.quarantined",
        "device.quarantine_lifted",
    ]


def test_what_a_revocation_forbids(room: Room) -> None:
    calls: list[Callable[[], object]] = [
        room.quarantine,
        lambda: asyncio.run(room.standings.lift(PI, actor="token:op")),
    ]
    room.revoke()
    for call in calls:
        with pytest.raises(Conflict) as caught:
            call()
        assert caught.value.code == "conflict.revoked"


def test_nobody_and_nonsense(room: Room) -> None:
    with pytest.raises(NotFound):
        room.revoke("nobody")
    for reason in ("x" * 201, "two\nlines"):
        with pytest.raises(InvalidValue):
            room.revoke(reason=reason)
    assert asyncio.run(room.desk.get(PI)).standing is Standing.GOOD


def test_a_name_in_quarantine_is_not_enrolled_and_the_token_keeps_its_use(room: Room) -> None:
    async def token() -> str:
        return await room.desk.create_join_token(
            name="t", device="pi-1", profile=None, uses=1, ttl_ms=DAY_MS, actor="op"
        )

    def enroll() -> Enrolled:
        return asyncio.run(room.desk.enroll(token=held, csr_pem=new_csr(), profile="pi", name=None, address="10.0.0.9"))

    held = asyncio.run(token())
    room.quarantine()
    serials = room.serials()
    with pytest.raises(Conflict) as caught:
        enroll()
    assert caught.value.code == "enrol.quarantined"
    assert "device quarantine pi-1 --lift" in caught.value.hint
    assert room.serials() == serials
    room.revoke()
    assert room.refusal(enroll()) == ""


def test_one_name_in_two_places_is_quarantined_with_the_reason(room: Room) -> None:
    room.born(3, message="one")
    room.born(3, message="one")
    assert room.standings.is_welcome(PI)
    room.born(3, message="two")
    known = asyncio.run(room.desk.get(PI))
    assert known.standing is Standing.QUARANTINED
    assert known.standing_reason == "one name in two places: two births of boot 3, session 1"
    assert ("hub", "device.quarantined", "device:pi-1") in room.audit()
    assert room.events[-1] == DeviceStandingChanged(device=PI, standing="quarantined")
    # Lifted, it begins anew: what was seen before says nothing any more.
    asyncio.run(room.standings.lift(PI, actor="token:op"))
    room.born(3, message="one")
    assert room.standings.is_welcome(PI)
