"""Attested time: what a device believes, what it refuses, and what waits for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from shared.errors import InvalidValue, TrustError
from shared.ids import DeviceId
from shared.limits import MAX_TIME_ANSWER_BYTES
from shared.release import Floors
from shared.trust import repository as repo
from shared.trust.assignment import sign_assignment
from shared.trust.library import CryptoSigner
from shared.trust.time import MAX_PAST_ROOT_MS, AttestedTime, sign_time
from shared.wire.verification import Need
from tests.fakes.trust_repository import (
    DAY_MS,
    DEVICE,
    HOUR_MS,
    NOW_MS,
    RELEASE,
    Device,
    TrustRepository,
    make_manifest,
    resigned,
)

NONCE = "n" * 43
OLDER = "o" * 43
YEAR_1970, YEAR_2099 = 1_000, 4_083_000_000_000
ROOT_MS = repo.ROOT_DAYS * DAY_MS


@pytest.fixture
def hub() -> TrustRepository:
    made = TrustRepository(attests_time=True)
    made.release(make_manifest())
    return made


@pytest.fixture
def device(hub: TrustRepository) -> Device:
    return Device(hub.first_root)


def refusal(hub: TrustRepository, device: Device, answer: bytes, *, nonce: str = NONCE) -> str:
    with pytest.raises(TrustError) as caught:
        device.attest(answer, hub.serve, nonce=nonce)
    assert caught.value.hint
    return caught.value.code


def test_an_answer_to_our_nonce_is_the_time(hub: TrustRepository, device: Device) -> None:
    assert device.attest(hub.attest(NONCE), hub.serve, nonce=NONCE) == NOW_MS


def test_a_device_that_missed_a_change_of_the_time_key_and_the_roots_end_is_told_the_time(
    hub: TrustRepository, device: Device
) -> None:
    hub.now_ms += ROOT_MS + MAX_PAST_ROOT_MS  # off for years
    hub.rotate("time", "root")
    hub.rotate("time")
    assert device.attest(hub.attest(NONCE), hub.serve, nonce=NONCE) == hub.now_ms
    assert device.asked == []  # the roots came along
    assert device.root == hub.files["3.root.json"]


def test_roots_that_the_device_has_already_may_come_along(hub: TrustRepository, device: Device) -> None:
    hub.rotate("time")
    for _ in range(2):
        assert device.attest(hub.attest(NONCE), hub.serve, nonce=NONCE) == NOW_MS


def test_roots_that_come_along_vouch_for_themselves(hub: TrustRepository, device: Device) -> None:
    stranger = TrustRepository(attests_time=True)
    stranger.rotate("time")
    answer = stranger.attest(NONCE)
    assert refusal(hub, device, answer) == "trust.signature"
    assert device.root == hub.first_root


def test_a_root_that_nobody_renewed_does_not_hide_the_time(hub: TrustRepository, device: Device) -> None:
    hub.now_ms += ROOT_MS + DAY_MS
    assert device.attest(hub.attest(NONCE), hub.serve, nonce=NONCE) == hub.now_ms


def test_time_attestation_replayed(hub: TrustRepository, device: Device) -> None:
    assert refusal(hub, device, hub.attest(OLDER)) == "trust.time.replayed"


def test_time_attestation_of_another_device(hub: TrustRepository, device: Device) -> None:
    answer = hub.attest(NONCE, device=DeviceId("dev-2"))
    assert refusal(hub, device, answer) == "trust.time.wrong_device"


@pytest.mark.parametrize("role", ["assignment", "timestamp", "root"])
def test_time_attestation_by_a_key_that_is_for_something_else(hub: TrustRepository, device: Device, role: str) -> None:
    answer = sign_time(AttestedTime(device=DEVICE, nonce=NONCE, time_ms=NOW_MS), hub.keys[role][0])
    assert refusal(hub, device, answer) == "trust.time.signature"


def test_time_attestation_by_a_stranger_under_the_right_key_identifier(hub: TrustRepository, device: Device) -> None:
    stranger = CryptoSigner.generate_ed25519()
    document = json.loads(sign_time(AttestedTime(device=DEVICE, nonce=NONCE, time_ms=NOW_MS), stranger))
    document["signatures"][0]["keyid"] = hub.keys["time"][0].public_key.keyid
    assert refusal(hub, device, json.dumps(document).encode()) == "trust.time.signature"


def test_time_attestation_altered_after_signing(hub: TrustRepository, device: Device) -> None:
    answer = hub.attest(NONCE).replace(str(NOW_MS).encode(), str(NOW_MS + 1).encode())
    assert refusal(hub, device, answer) == "trust.time.signature"


def test_time_key_that_the_root_has_replaced(hub: TrustRepository, device: Device) -> None:
    stolen = hub.keys["time"][0]
    hub.rotate("time")
    device.attest(hub.attest(NONCE), hub.serve, nonce=NONCE)
    answer = sign_time(AttestedTime(device=DEVICE, nonce=NONCE, time_ms=NOW_MS), stolen)
    assert refusal(hub, device, answer) == "trust.time.signature"


@pytest.mark.parametrize(
    ("time_ms", "code"),
    [
        (2**63, "trust.time.malformed"),
        (2**63 - 1, "trust.time.malformed"),
        (2**53, "trust.time.too_far"),
        (NOW_MS + ROOT_MS + MAX_PAST_ROOT_MS, "trust.time.too_far"),
        (-(2**63), "trust.time.malformed"),
        (-1, "trust.time.rollback"),
        (True, "trust.time.malformed"),
        (1.5, "trust.time.malformed"),
        ("now", "trust.time.malformed"),
        (None, "trust.time.malformed"),
    ],
)
def test_time_attestation_of_an_impossible_time(
    hub: TrustRepository, device: Device, time_ms: object, code: str
) -> None:
    document = json.loads(hub.attest(NONCE))
    document["signed"]["time_ms"] = time_ms
    # Canonical JSON has no fractions, so nobody can sign one.
    answer = json.dumps(document).encode() if time_ms == 1.5 else resigned(document, hub.keys["time"])
    assert refusal(hub, device, answer) == code


def test_time_attestation_below_what_signed_documents_prove(hub: TrustRepository, device: Device) -> None:
    device.floors = Floors(time_ms=NOW_MS + 1)
    assert refusal(hub, device, hub.attest(NONCE)) == "trust.time.rollback"
    device.floors = Floors(time_ms=NOW_MS)
    assert device.attest(hub.attest(NONCE), hub.serve, nonce=NONCE) == NOW_MS


def _assignment(hub: TrustRepository) -> bytes:
    return hub.assign(RELEASE)


def _twice(hub: TrustRepository) -> bytes:
    document = json.loads(hub.attest(NONCE))
    return json.dumps({**document, "signatures": document["signatures"] * 2}).encode()


def _of_another_kind(hub: TrustRepository) -> bytes:
    document = json.loads(hub.attest(NONCE))
    document["signed"]["_type"] = "assignment"
    return resigned(document, hub.keys["time"])


def _of_the_future(hub: TrustRepository) -> bytes:
    document = json.loads(hub.attest(NONCE))
    document["signed"]["spec_version"] = "2"
    return resigned(document, hub.keys["time"])


def _bare(_: TrustRepository) -> bytes:
    return str(NOW_MS).encode()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda _: b"", "trust.time.malformed"),
        (_bare, "trust.time.malformed"),
        (lambda _: b"[" * (MAX_TIME_ANSWER_BYTES + 1), "trust.time.endless_data"),
        (lambda _: b"[" * 4_000, "trust.time.malformed"),
        (lambda _: b'{"signed":{},"signatures":[]}', "trust.time.signature"),
        (_twice, "trust.time.malformed"),
        (_of_another_kind, "trust.time.malformed"),
        (_of_the_future, "trust.time.malformed"),
        (lambda hub: hub.attest(NONCE).replace(b'"roots":[]', b'"roots":7'), "trust.time.malformed"),
        (lambda hub: hub.attest(NONCE).replace(b'"roots":[]', b'"roots":[7]'), "trust.time.malformed"),
        (lambda hub: hub.attest(NONCE).replace(b'"roots":[]', b'"roots":["{}"]'), "trust.time.malformed"),
        (_assignment, "trust.time.signature"),
    ],
)
def test_time_attestation_that_is_none(
    hub: TrustRepository, device: Device, make: Callable[[TrustRepository], bytes], code: str
) -> None:
    assert refusal(hub, device, make(hub)) == code


def test_a_root_without_a_time_key_attests_nothing(hub: TrustRepository) -> None:
    older = TrustRepository()
    answer = older.attest(NONCE)  # by a key that no root names
    assert refusal(older, Device(older.first_root), answer) == "trust.time.no_key"


@pytest.mark.parametrize("entry", [{}, None, "time", {"keyids": [], "threshold": 1}, {"keyids": ["x"], "threshold": 1}])
def test_a_root_whose_list_of_time_keys_is_broken_lets_nobody_attest_and_nothing_be_installed(entry: Any) -> None:
    hub = TrustRepository(attests_time=True)
    hub.release(make_manifest())
    hub.root.signed.unrecognized_fields["x-outrider"]["time"] = entry
    hub.store_root()
    device = Device(hub.files["1.root.json"])
    assert refusal(hub, device, hub.attest(NONCE)) == "trust.time.malformed"
    with pytest.raises(TrustError, match="attested") as caught:
        device.verify(hub.assign(RELEASE), hub.serve)
    assert caught.value.code == "trust.time.unattested"


# Installing

FRESH, STALE = NOW_MS + HOUR_MS, NOW_MS + 2 * DAY_MS
"""The true time: while the timestamp of the repository is good, and after it has expired (24 hours)."""


@pytest.mark.parametrize("attested", [False, True])
@pytest.mark.parametrize("true_ms", [FRESH, STALE])
@pytest.mark.parametrize("clock", ["1970", "right", "2099"])
def test_indefinite_freeze_whatever_the_clock_says(
    hub: TrustRepository, device: Device, clock: str, true_ms: int, attested: bool
) -> None:
    """Only an attested device installs; it refuses what has expired, and takes what is fresh, whatever its clock."""
    wall_ms = {"1970": YEAR_1970, "right": true_ms, "2099": YEAR_2099}[clock]
    now_ms = true_ms if attested else wall_ms
    document = hub.assign(RELEASE)
    if attested and true_ms == FRESH:
        assert device.verify(document, hub.serve, wall_ms=now_ms, time_attested=True).assignment.version == 1
        return
    with pytest.raises(TrustError) as caught:
        device.verify(document, hub.serve, wall_ms=now_ms, time_attested=attested)
    assert caught.value.code == ("trust.freeze" if attested else "trust.time.unattested")
    assert device.floors == Floors()


@pytest.mark.parametrize(
    ("clock", "true_ms", "code"),
    [
        (YEAR_1970, FRESH, None),
        (YEAR_1970, STALE, "trust.freeze"),  # the floor says so
        (YEAR_2099, FRESH, "trust.freeze"),
        (YEAR_2099, STALE, "trust.freeze"),
    ],
)
def test_expired_metadata_and_a_clock_of_1970_where_no_time_is_attested(
    clock: int, true_ms: int, code: str | None
) -> None:
    """Hubs made before: the floor, which a newer assignment has raised, stands in for the clock."""
    hub = TrustRepository()
    hub.release(make_manifest())
    device = Device(hub.first_root)
    device.floors = Floors(time_ms=true_ms)
    document = hub.assign(RELEASE)
    if code is None:
        device.verify(document, hub.serve, wall_ms=clock)
        return
    with pytest.raises(TrustError) as caught:
        device.verify(document, hub.serve, wall_ms=clock)
    assert caught.value.code == code


def test_a_hub_that_begins_to_attest_is_noticed_in_the_same_run(hub: TrustRepository) -> None:
    older = TrustRepository()
    older.release(make_manifest())
    device = Device(older.first_root)
    device.verify(older.assign(RELEASE), older.serve)
    older.attests_time = True
    older.rotate()
    with pytest.raises(TrustError) as caught:
        device.verify(older.assign(RELEASE), older.serve)
    assert caught.value.code == "trust.time.unattested"
    time_ms = device.attest(older.attest(NONCE), older.serve, nonce=NONCE)
    device.verify(older.assign(RELEASE), older.serve, wall_ms=time_ms, time_attested=True)


def test_time_attestation_dropped_is_no_leave_to_go_on(hub: TrustRepository, device: Device) -> None:
    """Uptane issue 267: however often it is tried, nothing but the next root is asked for, and nothing is taken."""

    def serve(need: Need) -> bytes | None:
        assert "root" in need.name
        return hub.serve(need)

    for _ in range(3):
        with pytest.raises(TrustError, match="attested"):
            device.verify(hub.assign(RELEASE), serve)


def test_a_thief_of_the_assignment_key_cannot_push_the_floor_past_what_is_fresh(
    hub: TrustRepository, device: Device
) -> None:
    far = msgspec.structs.replace(
        hub.assignment(RELEASE), issued_ms=NOW_MS + ROOT_MS - 1, expires_ms=NOW_MS + 9 * ROOT_MS
    )
    document = sign_assignment(far, hub.keys["assignment"][0])
    with pytest.raises(TrustError) as caught:
        device.verify(document, hub.serve, wall_ms=NOW_MS, time_attested=True)
    assert caught.value.code == "trust.issued_ahead"
    assert device.floors == Floors()


def test_a_thief_of_the_assignment_key_cannot_do_so_where_no_time_is_attested_either() -> None:
    hub = TrustRepository()
    hub.release(make_manifest())
    device = Device(hub.first_root)
    far = msgspec.structs.replace(
        hub.assignment(RELEASE), issued_ms=NOW_MS + ROOT_MS - 1, expires_ms=NOW_MS + 9 * ROOT_MS
    )
    document = sign_assignment(far, hub.keys["assignment"][0])
    with pytest.raises(TrustError) as caught:  # it drags the reference time along, and all else has expired then
        device.verify(document, hub.serve, wall_ms=NOW_MS)
    assert caught.value.code == "trust.freeze"
    assert device.floors == Floors()


@pytest.mark.parametrize("nonce", ["", "n" * 42, "n" * 44, "+" * 43, "n" * 42 + "="])
def test_only_a_nonce_of_32_bytes_is_signed(hub: TrustRepository, nonce: str) -> None:
    with pytest.raises(InvalidValue):
        hub.attest(nonce)
