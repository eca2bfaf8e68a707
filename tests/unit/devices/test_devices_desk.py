"""Enrolment, presence and labels on a real database."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloud_hub.devices import tables
from cloud_hub.devices.desk import Desk, Enrolled
from cloud_hub.ground import audit
from cloud_hub.ground.bus import Bus, DeviceBorn, DeviceDied, DeviceReported
from cloud_hub.ground.ca import Authority
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import NotAllowed, NotFound
from shared.errors import Conflict, InvalidValue, OutriderError
from shared.ids import DeviceId
from shared.join import JoinToken, decode_join_token, encode_join_token
from shared.wire.messages import Birth, Death, Message, Reported, RunningModel
from tests.fakes.clock import FakeClock
from tests.fakes.hub_parts import DAY_MS, der, envelope_of, hub_database, make_authority, make_desk, new_csr

HOUR_MS = 3_600_000


@dataclass
class Room:
    """A devices room and what surrounds it."""

    database: Database
    clock: FakeClock = field(default_factory=FakeClock)
    authority: Authority = field(default_factory=make_authority)
    metrics: Metrics = field(default_factory=Metrics)
    events: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        bus = Bus()

        async def hear(event: object) -> None:
            self.events.append(event)

        bus.subscribe(DeviceBorn, hear)
        bus.subscribe(DeviceDied, hear)
        bus.subscribe(DeviceReported, hear)
        self.desk: Desk = make_desk(self.database, self.clock, self.authority, bus=bus, metrics=self.metrics)

    def token(
        self, *, device: str | None = None, profile: str | None = None, uses: int = 1, ttl_ms: int = HOUR_MS
    ) -> str:
        made = self.desk.create_join_token(
            name="t", device=device, profile=profile, uses=uses, ttl_ms=ttl_ms, actor="token:op"
        )
        return asyncio.run(made)

    def enroll(self, token: str, *, name: str | None = None, profile: str = "pi", csr: str = "") -> Enrolled:
        return asyncio.run(
            self.desk.enroll(token=token, csr_pem=csr or new_csr(), profile=profile, name=name, address="10.0.0.9")
        )

    def hear(self, message: Message, *, device: str = "pi-1", boot: int = 1) -> None:
        envelope = envelope_of(message, device=device, boot=boot)
        match message:
            case Birth():
                asyncio.run(self.desk.born(DeviceId(device), envelope, message))
            case Death():
                asyncio.run(self.desk.died(DeviceId(device), envelope, message))
            case Reported():
                asyncio.run(self.desk.reported(DeviceId(device), envelope, message))

    def audit(self) -> list[tuple[str, str, str]]:
        rows = self.database.read_now(lambda conn: audit.entries(conn, after=0, limit=500))
        assert self.database.read_now(audit.verify).broken_at is None
        return [(row.actor, row.action, row.subject) for row in rows]

    def online(self) -> bool:
        return asyncio.run(self.desk.get("pi-1")).online


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    with hub_database(tmp_path) as database:
        yield Room(database)


def birth(boot: int, session: int = 1, *, epoch: str = "a" * 16, assignment: int = 0) -> Birth:
    return Birth(
        boot=boot, session=session, epoch=epoch, agent_version="0.1", profile="pi", assignment_version=assignment
    )


def report(revision: int, phase: str = "committed") -> Reported:
    return Reported(revision=revision, assignment_version=3, models=(RunningModel(family="digits", phase=phase),))


# Joining


def test_a_device_joins(room: Room) -> None:
    enrolled = room.enroll(room.token(), name="pi-1")
    assert enrolled.device == "pi-1"
    assert (enrolled.hub_url, enrolled.broker.host, enrolled.broker.port) == (
        "https://hub.example:8443",
        "hub.example",
        8883,
    )
    assert asyncio.run(room.desk.device_of(der(enrolled.certificate_pem))) == "pi-1"
    device = asyncio.run(room.desk.get("pi-1"))
    assert (device.profile, device.online, device.boot, device.reported) == ("pi", False, 0, {})
    assert room.audit() == [
        ("token:op", "join_token.created", "join-token:t"),
        ("join-token:t", "device.enrolled", "device:pi-1"),
    ]


def test_fifty_at_once_with_one_token_and_one_gets_in(room: Room) -> None:
    token = room.token()
    requests = [new_csr() for _ in range(50)]

    async def rush() -> list[Enrolled | BaseException]:
        tries = (
            room.desk.enroll(token=token, csr_pem=csr, profile="pi", name=f"pi-{number}", address="a")
            for number, csr in enumerate(requests)
        )
        return await asyncio.gather(*tries, return_exceptions=True)

    results = asyncio.run(rush())
    codes = [result.code for result in results if isinstance(result, OutriderError)]
    assert sum(isinstance(result, Enrolled) for result in results) == 1
    assert codes == ["enrol.token_spent"] * 49
    assert len(asyncio.run(room.desk.list())) == 1


def test_spending_is_one_statement_that_counts_by_itself(room: Room) -> None:
    digest = hashlib.sha256(decode_join_token(room.token(uses=2)).secret).hexdigest()
    now_ms = room.clock.wall_ms()

    def spend(at_ms: int) -> bool:
        return room.database.write_now(lambda conn: tables.spend_grant(conn, digest, now_ms=at_ms))

    assert not spend(now_ms + HOUR_MS)
    assert [spend(now_ms) for _ in range(3)] == [True, True, False]


def test_a_token_for_three_admits_three(room: Room) -> None:
    token = room.token(uses=3)
    names = {room.enroll(token).device for _ in range(3)}
    assert len(names) == 3
    with pytest.raises(Conflict):
        room.enroll(token)


def test_tokens_that_admit_nobody_are_told_apart(room: Room) -> None:
    spent, old = room.token(), room.token(ttl_ms=1000)
    room.enroll(spent)
    room.clock.advance(1000)
    forged = encode_join_token(
        JoinToken(hub_url="https://hub.example:8443", ca_fingerprint=room.authority.fingerprint, secret=b"x" * 32)
    )
    for token, code in (
        (spent, "enrol.token_spent"),
        (old, "enrol.token_expired"),
        (forged, "enrol.token_unknown"),
        ("nonsense", "enrol.token_unknown"),
    ):
        with pytest.raises(OutriderError) as caught:
            room.enroll(token)
        assert caught.value.code == code
        assert caught.value.hint
    assert [row[1:] for row in room.audit()].count(("enrol.refused", "device:")) == 4


@pytest.mark.parametrize(
    ("name", "profile", "csr", "code"),
    [
        ("Pi_1", "pi", "", "invalid.device_id"),
        ("hub", "pi", "", "invalid.device_id"),
        ("taken", "pi", "", "enrol.name_taken"),
        ("pi-1", "pi", "rubbish", "enrol.csr"),
        ("pi-1", "a b", "", "invalid.profile"),
    ],
)
def test_a_mistake_does_not_cost_the_token(room: Room, name: str, profile: str, csr: str, code: str) -> None:
    room.enroll(room.token(), name="taken")
    token = room.token()
    with pytest.raises(OutriderError) as caught:
        room.enroll(token, name=name, profile=profile, csr=csr)
    assert caught.value.code == code
    assert room.enroll(token, name="pi-1").device == "pi-1"


def test_names_are_bound_proposed_or_generated(room: Room) -> None:
    assert room.enroll(room.token(device="bound-1")).device == "bound-1"
    with pytest.raises(NotAllowed) as caught:
        room.enroll(room.token(device="bound-2"), name="other")
    assert caught.value.code == "enrol.token_bound"
    generated = room.enroll(room.token()).device
    assert generated.startswith("dev-")
    assert len(generated) == 12


def test_a_profile_in_the_token_decides(room: Room) -> None:
    room.enroll(room.token(profile="camera"), name="pi-1", profile="other")
    assert asyncio.run(room.desk.get("pi-1")).profile == "camera"


def test_a_replaced_device_begins_anew_and_its_old_certificate_is_void(room: Room) -> None:
    first = room.enroll(room.token(), name="pi-1")
    room.hear(birth(boot=40))
    room.hear(report(9), boot=40)
    with pytest.raises(Conflict):
        room.enroll(room.token(), name="pi-1")
    second = room.enroll(room.token(device="pi-1"))
    with pytest.raises(NotAllowed) as caught:
        asyncio.run(room.desk.device_of(der(first.certificate_pem)))
    assert caught.value.code == "auth.revoked_certificate"
    assert asyncio.run(room.desk.device_of(der(second.certificate_pem))) == "pi-1"
    assert not room.online()
    room.hear(birth(boot=1, epoch="b" * 16))
    assert room.online()
    assert ("join-token:t", "device.reenrolled", "device:pi-1") in room.audit()


def test_certificates_that_stand_for_nobody(room: Room) -> None:
    enrolled = room.enroll(room.token(), name="pi-1")
    never_issued = room.authority.issue_device(new_csr(), device=DeviceId("pi-1"), now_ms=room.clock.wall_ms(), days=30)
    foreign = make_authority().issue_device(new_csr(), device=DeviceId("pi-1"), now_ms=room.clock.wall_ms(), days=30)
    for pem in (never_issued.pem, foreign.pem):
        with pytest.raises(NotAllowed) as caught:
            asyncio.run(room.desk.device_of(der(pem)))
        assert caught.value.code == "auth.unknown_certificate"
    room.clock.advance(30 * DAY_MS)
    with pytest.raises(NotAllowed):
        asyncio.run(room.desk.device_of(der(enrolled.certificate_pem)))


def test_the_secret_is_nowhere_stored(room: Room, tmp_path: Path) -> None:
    secret = decode_join_token(room.token()).secret
    for path in tmp_path.glob("hub.db*"):
        assert secret not in path.read_bytes()
        assert secret.hex().encode() not in path.read_bytes()


# Presence


def test_birth_and_death(room: Room) -> None:
    room.enroll(room.token(), name="pi-1")
    room.hear(birth(1, assignment=5))
    assert room.online()
    assert room.metrics.registry.get_sample_value("outrider_hub_devices_online") == 1
    room.hear(Death(boot=1, session=1))
    assert not room.online()
    assert room.metrics.registry.get_sample_value("outrider_hub_devices_online") == 0
    assert room.events == [
        DeviceBorn(device=DeviceId("pi-1"), assignment_version=5, boot=1),
        DeviceDied(device=DeviceId("pi-1"), reason="lost"),
    ]


@pytest.mark.parametrize(
    ("news", "online"),
    [
        ([birth(1, 1), birth(1, 2), Death(boot=1, session=1)], True),
        ([birth(1, 9), birth(2, 1), Death(boot=1, session=9)], True),
        ([birth(2, 1), birth(1, 9), Death(boot=2, session=1)], False),
        ([birth(1, 1), Death(boot=1, session=1), Death(boot=1, session=1)], False),
        ([Death(boot=1, session=1), birth(1, 1)], True),
        ([birth(1, 1), birth(1, 1)], True),
        ([birth(7, 3), birth(1, 1, epoch="b" * 16)], True),
        ([birth(7, 3), birth(1, 1, epoch="b" * 16), Death(boot=1, session=1)], False),
        ([birth(1, 0), Death(boot=1, session=4)], False),
    ],
)
def test_late_and_repeated_news_of_presence(room: Room, news: list[Message], online: bool) -> None:
    room.enroll(room.token(), name="pi-1")
    for message in news:
        room.hear(message)
    assert room.online() is online


def test_only_newer_reports_count(room: Room) -> None:
    room.enroll(room.token(), name="pi-1")
    room.hear(birth(2))
    room.hear(report(5, "committed"), boot=2)
    room.hear(report(4, "late"), boot=2)
    room.hear(report(99, "late"), boot=1)
    room.hear(report(5, "repeated"), boot=2)
    device = asyncio.run(room.desk.get("pi-1"))
    assert device.reported["models"][0]["phase"] == "committed"
    assert device.assignment_version == 3
    room.hear(report(1, "after boot"), boot=3)
    assert asyncio.run(room.desk.get("pi-1")).reported["models"][0]["phase"] == "after boot"
    assert [type(event) for event in room.events] == [DeviceBorn, DeviceReported, DeviceReported]


def test_after_a_restart_nobody_is_known_to_be_online(room: Room) -> None:
    room.enroll(room.token(), name="pi-1")
    room.hear(birth(1))
    asyncio.run(room.desk.start())
    assert not room.online()
    room.hear(report(1), boot=1)
    assert room.online()


def test_strangers_and_impossible_counters_are_refused(room: Room) -> None:
    for message in (birth(1), Death(boot=1, session=1), report(1)):
        with pytest.raises(NotFound):
            room.hear(message, device="stranger")
    room.enroll(room.token(), name="pi-1")
    for message in (birth(-1), birth(2**63), report(-5)):
        with pytest.raises(OutriderError) as caught:
            room.hear(message)
        assert caught.value.code == "protocol.counter"


# Labels and lists


def test_labels_are_set_removed_and_searched(room: Room) -> None:
    for name in ("pi-1", "pi-2", "pi-3"):
        room.enroll(room.token(), name=name)
    label = room.desk.label
    asyncio.run(label("pi-1", changes={"site": "north", "floor": "1"}, actor="token:op"))
    asyncio.run(label("pi-2", changes={"site": "north"}, actor="token:op"))
    after = asyncio.run(label("pi-1", changes={"floor": None, "room": "a"}, actor="token:op"))
    assert after.labels == {"site": "north", "room": "a"}
    found = asyncio.run(room.desk.list(labels={"site": "north"}))
    assert [device.id for device in found] == ["pi-1", "pi-2"]
    assert [device.id for device in asyncio.run(room.desk.list(labels={"site": "north", "room": "a"}))] == ["pi-1"]
    assert [device.id for device in asyncio.run(room.desk.list(after="pi-1", limit=1))] == ["pi-2"]
    assert asyncio.run(room.desk.list(after="pi-3")) == ()
    assert room.audit()[-1] == ("token:op", "device.labelled", "device:pi-1")


@pytest.mark.parametrize(
    "changes",
    [
        {"": "x"},
        {"a=b": "x"},
        {"a": "x" * 64},
        {"a": "x\n"},
        {str(number): "x" for number in range(33)},
        {"k" * 64: None},
        {"a\n": None},
        {"": None},
    ],
)
def test_labels_that_are_refused(room: Room, changes: dict[str, str | None]) -> None:
    room.enroll(room.token(), name="pi-1")
    with pytest.raises(InvalidValue):
        asyncio.run(room.desk.label("pi-1", changes=changes, actor="token:op"))
    assert asyncio.run(room.desk.get("pi-1")).labels == {}


def test_a_device_that_is_not_there(room: Room) -> None:
    with pytest.raises(NotFound):
        asyncio.run(room.desk.get("pi-9"))
    with pytest.raises(NotFound):
        asyncio.run(room.desk.label("pi-9", changes={}, actor="token:op"))
