"""What a thief of the online keys has pushed up is forgotten with the thief's keys, and nothing else is."""

from __future__ import annotations

import json

import msgspec
import pytest

from shared.errors import TrustError
from shared.release import Floors
from shared.trust import floors, strict
from shared.trust.assignment import sign_assignment
from shared.trust.metadata import expires_ms
from tests.fakes.trust_repository import DAY_MS, HOUR_MS, NOW_MS, RELEASE, Device, TrustRepository, make_manifest

NONCE = "n" * 43
ONLINE = ("assignment", "timestamp", "snapshot", "time")
NEWER = ("digits", "1.1.0")


@pytest.fixture
def hub() -> TrustRepository:
    hub = TrustRepository(attests_time=True)
    hub.release(make_manifest())
    return hub


@pytest.fixture
def device(hub: TrustRepository) -> Device:
    device = Device(hub.first_root)
    verify(hub, device)
    return device


def verify(hub: TrustRepository, device: Device, document: bytes | None = None, *, attested: bool = True) -> None:
    document = hub.assign(RELEASE) if document is None else document
    device.verify(document, hub.serve, wall_ms=hub.now_ms, time_attested=attested)


def refusal(hub: TrustRepository, device: Device, document: bytes) -> str:
    with pytest.raises(TrustError) as caught:
        verify(hub, device, document)
    return caught.value.code


def issued(hub: TrustRepository, issued_ms: int) -> bytes:
    """An assignment that claims to be issued then."""
    assignment = hub.assignment(RELEASE)
    moved = msgspec.structs.replace(assignment, issued_ms=issued_ms, expires_ms=issued_ms + 30 * DAY_MS)
    return sign_assignment(moved, hub.keys["assignment"][0])


def replace_online_keys(hub: TrustRepository) -> None:
    hub.rotate(*ONLINE)
    hub.publish()


def test_attack_4_an_assignment_that_was_pushed_up_as_far_as_numbers_go_binds_no_new_key(
    hub: TrustRepository, device: Device
) -> None:
    verify(hub, device, hub.assign(RELEASE, version=strict.MAX_INTEGER - 1))
    hub.release(make_manifest("1.1.0", counter=2))
    assert refusal(hub, device, hub.assign(NEWER, version=2)) == "trust.rollback"
    replace_online_keys(hub)
    verify(hub, device, hub.assign(NEWER, version=2))
    older = hub.assign(RELEASE, version=2)
    verify(hub, device, hub.assign(NEWER, version=3))
    assert refusal(hub, device, older) == "trust.rollback", "the new keys have a floor of their own"


@pytest.mark.parametrize("roles", [("timestamp", "snapshot"), ("targets",), ("root",), ("time",)])
def test_new_keys_of_another_role_leave_the_floor_of_assignments(
    hub: TrustRepository, device: Device, roles: tuple[str, ...]
) -> None:
    older = hub.assignment(RELEASE)
    verify(hub, device)
    hub.rotate(*roles)
    hub.publish()
    assert refusal(hub, device, sign_assignment(older, hub.keys["assignment"][0])) == "trust.rollback"


def test_a_floor_from_before_floors_had_names_counts_for_the_keys_there_are(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    device.floors = Floors(assignment_version=5, time_ms=NOW_MS)
    assert refusal(hub, device, hub.assign(RELEASE, version=4)) == "trust.rollback"
    verify(hub, device, hub.assign(RELEASE, version=6))
    replace_online_keys(hub)
    verify(hub, device, hub.assign(RELEASE, version=1))


def test_only_the_floors_of_the_newest_keys_are_kept(hub: TrustRepository, device: Device) -> None:
    for _ in range(3):
        replace_online_keys(hub)
        verify(hub, device)
    assert len([name for name in device.floors.roles if name.startswith("x-outrider/")]) == 2


def test_attack_4_an_assignment_from_the_future_is_refused_where_the_time_is_attested(
    hub: TrustRepository, device: Device
) -> None:
    assert refusal(hub, device, issued(hub, NOW_MS + DAY_MS + 1)) == "trust.issued_ahead"
    verify(hub, device, issued(hub, NOW_MS + HOUR_MS))


@pytest.mark.parametrize("attested", [True, False])
def test_attack_4_a_time_that_a_thief_has_pushed_ahead_binds_no_new_key(attested: bool) -> None:
    """With the time key too, an attested time agrees with what the thief signs."""
    hub = TrustRepository(attests_time=attested)
    hub.release(make_manifest())
    device = Device(hub.first_root)
    verify(hub, device, attested=attested)
    roles = [hub.root.signed, hub.targets.signed, *(role.signed for role in hub.roles.values())]
    hub.now_ms = min(expires_ms(role) for role in roles) - HOUR_MS
    hub.publish()
    wall_ms = hub.now_ms if attested else 0
    device.verify(hub.assign(RELEASE), hub.serve, wall_ms=wall_ms, time_attested=attested)
    hub.now_ms = NOW_MS + HOUR_MS
    hub.rotate(*ONLINE)
    hub.publish()
    if attested:
        assert device.attest(hub.attest(NONCE), hub.serve, nonce=NONCE) == hub.now_ms
    device.verify(hub.assign(RELEASE), hub.serve, wall_ms=hub.now_ms if attested else 0, time_attested=attested)


def test_attack_4_an_attested_time_lies_never_before_what_the_same_keys_have_issued(
    hub: TrustRepository, device: Device
) -> None:
    hub.now_ms = NOW_MS - HOUR_MS
    with pytest.raises(TrustError) as caught:
        device.attest(hub.attest(NONCE), hub.serve, nonce=NONCE)
    assert caught.value.code == "trust.time.rollback"


def test_a_root_that_lists_nobody_who_may_assign_leaves_the_floor_that_has_no_name(hub: TrustRepository) -> None:
    root = json.loads(hub.first_root)
    del root["signed"]["x-outrider"]["assignment"]
    hub.root.signed.unrecognized_fields["x-outrider"] = root["signed"]["x-outrider"]
    assert floors.time_floor(Floors(time_ms=7, roles={"x-outrider/issued@0": 9}), hub.root.signed) == 7
