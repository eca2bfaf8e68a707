"""Assignments: for one device, from an authorised key, never older, never empty."""

from __future__ import annotations

import json

import msgspec
import pytest

from shared.ids import DeviceId
from shared.model import encode_manifest
from shared.trust.assignment import sign_assignment
from tests.fakes.trust_repository import (
    DAY_MS,
    NOW_MS,
    Device,
    TrustRepository,
    make_manifest,
    refused,
)

DIGITS = ("digits", "1.0.0")


@pytest.fixture
def hub() -> TrustRepository:
    hub = TrustRepository()
    hub.release(make_manifest())
    return hub


# Assignments


def test_an_assignment_for_another_device_is_refused(hub: TrustRepository) -> None:
    assert refused(hub, Device(hub.first_root), hub.assign(DIGITS, device=DeviceId("dev-2"))) == "trust.wrong_device"


def test_an_older_assignment_is_refused(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    older = hub.assign(DIGITS)
    device.verify(hub.assign(DIGITS), hub.serve)
    assert refused(hub, device, older) == "trust.rollback"
    device.previous = None
    assert refused(hub, device, older) == "trust.rollback"


def test_another_assignment_of_the_same_version_is_refused(hub: TrustRepository) -> None:
    hub.release(make_manifest("1.1.0", counter=2))
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS, version=7), hub.serve)
    assert refused(hub, device, hub.assign(("digits", "1.1.0"), version=7)) == "trust.rollback"


def test_an_expired_assignment_is_refused(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    assert refused(hub, device, hub.assign(DIGITS), wall_ms=NOW_MS + 30 * DAY_MS) == "trust.freeze"


def test_an_assignment_must_be_signed_by_a_key_that_the_root_authorises(hub: TrustRepository) -> None:
    for role in ("timestamp", "release", "targets", "root"):
        document = sign_assignment(hub.assignment(DIGITS), hub.keys[role][0])
        assert refused(hub, Device(hub.first_root), document) == "trust.signature"


def unsafely_signed(hub: TrustRepository, **changes: object) -> bytes:
    """An assignment that our own signing would refuse, signed as a hub in an attacker's hands can."""
    document = json.loads(hub.assign(DIGITS))
    document["signed"].update(changes)
    from shared.trust.library import encode_canonical

    text = encode_canonical(document["signed"])
    assert text is not None
    document["signatures"] = [
        {"keyid": (s := signer.sign(text.encode())).keyid, "sig": s.signature} for signer in hub.keys["assignment"]
    ]
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"models": []},
        {"models": [{"family": "digits", "version": "1.0.0"}]},
        {"version": True},
        {"version": 0},
        {"version": 2**53},
        {"device": "../etc"},
        {"force": ["other"]},
        {"together": [["digits"]]},
        {"together": [["digits", "other"]]},
        {"together": [["digits", "digits"]]},
        {"together": [[]]},
        {"expires_ms": 1},
        {"_type": "snapshot"},
        {"spec_version": "2"},
        {"issued_ms": -1},
    ],
    ids=str,
)
def test_an_assignment_that_breaks_its_own_rules_is_refused(hub: TrustRepository, changes: dict[str, object]) -> None:
    code = refused(hub, Device(hub.first_root), unsafely_signed(hub, **changes))
    assert code == ("trust.wrong_device" if "device" in changes else "trust.malformed")


def test_an_assignment_of_the_same_family_twice_is_refused(hub: TrustRepository) -> None:
    models = json.loads(hub.assign(DIGITS))["signed"]["models"]
    assert refused(hub, Device(hub.first_root), unsafely_signed(hub, models=models * 2)) == "trust.malformed"
    models[0]["manifest"]["path"] = "models/digits/1.0.0/int8.onnx"
    assert refused(hub, Device(hub.first_root), unsafely_signed(hub, models=models)) == "trust.malformed"


def test_an_assignment_of_what_was_never_released_is_refused(hub: TrustRepository) -> None:
    hub.manifests[("digits", "9.9.9")] = make_manifest("9.9.9", counter=9)
    assert refused(hub, Device(hub.first_root), hub.assign(("digits", "9.9.9"))) == "trust.unknown_target"
    hub.manifests[("cats", "1.0.0")] = make_manifest(family="cats")
    assert refused(hub, Device(hub.first_root), hub.assign(("cats", "1.0.0"))) == "trust.unknown_target"


def test_an_assignment_of_another_manifest_under_a_released_name_is_refused(hub: TrustRepository) -> None:
    other = msgspec.structs.replace(make_manifest(), labels=("yes", "no"))
    hub.manifests[DIGITS] = other
    assert refused(hub, Device(hub.first_root)) == "trust.digest"
    hub.files["models/digits/1.0.0/manifest.json"] = encode_manifest(other)
    assert refused(hub, Device(hub.first_root)) == "trust.digest"
