"""Assignments: for one device, from an authorised key, never older, never empty."""

from __future__ import annotations

import json

import msgspec
import pytest

from shared import limits
from shared.errors import InvalidValue
from shared.ids import DeviceId, Digest
from shared.model import encode_manifest
from shared.release import Assignment, Patch
from shared.trust.assignment import fit_assignment, sign_assignment
from tests.fakes.trust_repository import (
    DAY_MS,
    NOW_MS,
    Device,
    TrustRepository,
    make_manifest,
    refused,
)

DIGITS = ("digits", "1.0.0")
PATCH: dict[str, object] = {"base": "a" * 64, "result": "b" * 64, "digest": "c" * 64, "length": 1000}


def make_patch(number: int) -> Patch:
    return Patch(
        base=Digest(f"{number:x}" * 64), result=Digest(f"{number + 1:x}" * 64), digest=Digest("f" * 64), length=120_000
    )


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


def unsafely_signed(hub: TrustRepository, *releases: tuple[str, str], **changes: object) -> bytes:
    """An assignment that our own signing would refuse, signed as a hub in an attacker's hands can."""
    document = json.loads(hub.assign(*(releases or (DIGITS,))))
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
        {"spec_version": "1"},
        {"issued_ms": -1},
        {"together": [["digits", "letters"], ["letters", "signs"]]},
        {"together": [["digits", "cats"]]},
        {"patches": [PATCH, PATCH]},
        {"patches": [{**PATCH, "base": "A" * 64}]},
        {"patches": [{**PATCH, "digest": "../x"}]},
        {"patches": [{**PATCH, "base": PATCH["result"]}]},
        {"patches": [{**PATCH, "length": 0}]},
        {"patches": [{**PATCH, "length": 2**40}]},
        {"patches": [{**PATCH, "length": True}]},
        {"patches": [{**PATCH, "length": None}]},
    ],
    ids=str,
)
def test_an_assignment_that_breaks_its_own_rules_is_refused(hub: TrustRepository, changes: dict[str, object]) -> None:
    hub.release(make_manifest(family="letters"))
    hub.release(make_manifest(family="signs"))
    document = unsafely_signed(hub, DIGITS, ("letters", "1.0.0"), ("signs", "1.0.0"), **changes)
    code = refused(hub, Device(hub.first_root), document)
    assert code == ("trust.wrong_device" if "device" in changes else "trust.malformed")


def test_an_assignment_of_the_same_family_twice_is_refused(hub: TrustRepository) -> None:
    models = json.loads(hub.assign(DIGITS))["signed"]["models"]
    assert refused(hub, Device(hub.first_root), unsafely_signed(hub, models=models * 2)) == "trust.malformed"
    models[0]["version"] = "../../cats/1.0.0"
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


def test_sets_and_patches_arrive_as_they_were_signed(hub: TrustRepository) -> None:
    hub.release(make_manifest(family="letters"))
    wanted = msgspec.structs.replace(
        hub.assignment(DIGITS, ("letters", "1.0.0")), together=(("digits", "letters"),), patches=(make_patch(1),)
    )
    document = sign_assignment(wanted, hub.keys["assignment"][0])
    assert Device(hub.first_root).verify(document, hub.serve).assignment == wanted


# Size


def with_models(hub: TrustRepository, count: int, *, version: str = "10.20.30") -> Assignment:
    """An assignment of this many families."""
    releases = []
    for number in range(count):
        family = f"long-family-{number}"
        hub.manifests[(family, version)] = make_manifest(version, family=family)
        releases.append((family, version))
    return hub.assignment(*releases, device=DeviceId("gateway-in-hall-7-line-3"))


def test_as_many_models_as_a_device_may_have_fit_into_an_assignment(hub: TrustRepository) -> None:
    wanted = with_models(hub, limits.MAX_MODELS_PER_DEVICE)
    together = msgspec.structs.replace(wanted, together=(tuple(model.family for model in wanted.models[:4]),))
    assert len(sign_assignment(together, hub.keys["assignment"][0])) <= limits.MAX_ASSIGNMENT_BYTES == 2048


def test_patches_are_left_out_first_and_the_first_of_them_last(hub: TrustRepository) -> None:
    patches = tuple(make_patch(number) for number in range(8))
    few = fit_assignment(msgspec.structs.replace(hub.assignment(DIGITS), patches=patches))
    many = fit_assignment(msgspec.structs.replace(with_models(hub, 6), patches=patches))
    assert 8 > len(few.patches) > len(many.patches) > 0
    for fitting in (few, many):
        assert fitting.patches == patches[: len(fitting.patches)]
        assert len(sign_assignment(fitting, hub.keys["assignment"][0])) <= limits.MAX_ASSIGNMENT_BYTES
    one_more = msgspec.structs.replace(few, patches=patches[: len(few.patches) + 1])
    with pytest.raises(InvalidValue, match="too large"):
        sign_assignment(one_more, hub.keys["assignment"][0])


def test_what_does_not_fit_without_patches_is_refused_with_advice(hub: TrustRepository) -> None:
    large = with_models(hub, 8, version="1.0.0-" + "x" * 58)
    families = tuple(model.family for model in large.models)
    wanted = msgspec.structs.replace(large, force=families, together=(families,), patches=(make_patch(1),))
    with pytest.raises(InvalidValue) as caught:
        fit_assignment(wanted)
    assert caught.value.code == "invalid.assignment_size"
    assert "fewer families" in caught.value.hint


def test_endless_data_in_an_assignment_is_refused_before_it_is_read(hub: TrustRepository) -> None:
    document = hub.assign(DIGITS)[:-1] + b" " * 2048 + b"}"
    assert refused(hub, Device(hub.first_root), document) == "trust.endless_data"
