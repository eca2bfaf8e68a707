"""The client workflow against wrong keys, replaced keys and delegations that lead elsewhere."""

from __future__ import annotations

import json

import pytest

from shared.ids import FamilyName
from shared.trust import repository as repo
from shared.trust.assignment import sign_assignment
from shared.trust.library import CryptoSigner, TargetFile
from shared.trust.roles import file_name
from tests.fakes.trust_repository import (
    NOW_MS,
    Device,
    TrustRepository,
    make_manifest,
    promise_again,
    refused,
    resigned,
)

DIGITS = ("digits", "1.0.0")


@pytest.fixture
def hub() -> TrustRepository:
    hub = TrustRepository()
    hub.release(make_manifest())
    return hub


# Keys


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "models/digits"])
def test_metadata_signed_by_another_key_is_refused(hub: TrustRepository, role: str) -> None:
    held = "release" if role == "models/digits" else role
    for other in ("root", "targets", "snapshot", "timestamp", "assignment", "release"):
        if other == held:
            continue
        hub = TrustRepository()
        hub.release(make_manifest())
        right, hub.keys[held] = hub.keys[held], hub.keys[other]
        hub.publish()
        hub.keys[held] = right
        for name in ("snapshot", "timestamp"):
            if role not in ("snapshot", "timestamp"):
                getattr(hub, f"store_{name}")()
        assert refused(hub, Device(hub.first_root)) == "trust.signature"


def test_a_key_that_signs_twice_under_two_names_counts_once() -> None:
    hub = TrustRepository(targets_threshold=2)
    one, two = hub.keys["targets"]
    hub.release(make_manifest())
    Device(hub.first_root).verify(hub.assign(DIGITS), hub.serve)
    hub.keys["targets"] = [one]
    hub.publish()
    assert refused(hub, Device(hub.first_root)) == "trust.signature"
    public = one.public_key
    same = {"public": public.keyval["public"].upper()}
    public_again = type(public)("another-name", public.keytype, public.scheme, same)
    again = CryptoSigner(one._private_key, public_again)
    hub.root.signed.keys["another-name"] = public_again
    hub.root.signed.roles["targets"].keyids = [public.keyid, "another-name"]
    hub.store_root()
    hub.keys["targets"] = [one, again]
    hub.publish()
    assert refused(hub, Device(hub.files["1.root.json"])) == "trust.signature"
    assert two.public_key.keyid != public.keyid


def test_an_extra_signature_that_does_not_hold_does_no_harm(hub: TrustRepository) -> None:
    document = json.loads(hub.files["timestamp.json"])
    document["signatures"].append({"keyid": "00" * 32, "sig": "00" * 64})
    hub.files["timestamp.json"] = json.dumps(document).encode()
    Device(hub.first_root).verify(hub.assign(DIGITS), hub.serve)


def test_root_rotation_is_followed_and_kept(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS), hub.serve)
    hub.rotate("root", "assignment")
    hub.rotate("root", "timestamp", "snapshot")
    hub.publish()
    verified = device.verify(hub.assign(DIGITS), hub.serve)
    assert device.asked[:3] == ["2.root.json", "3.root.json", "4.root.json"]
    assert verified.floors.roles["root"] == 3
    assert device.root == hub.files["3.root.json"]
    device.verify(hub.assign(DIGITS), hub.serve)
    assert device.asked[0] == "4.root.json"


def test_the_root_chain_is_kept_even_if_the_rest_is_refused(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    hub.rotate("assignment")
    del hub.files["timestamp.json"]
    assert refused(hub, device) == "transfer.missing"
    assert device.root == hub.files["2.root.json"]


@pytest.mark.parametrize("missing", ["old", "new"])
def test_a_root_must_be_signed_by_the_old_keys_and_the_new_ones(hub: TrustRepository, missing: str) -> None:
    old = hub.keys["root"]
    hub.rotate("root")
    new = hub.keys["root"]
    hub.files["2.root.json"] = repo.sign(hub.root, *(new if missing == "old" else old))
    assert refused(hub, Device(hub.first_root)) == "trust.signature"


def test_a_root_that_skips_or_repeats_a_version_is_refused(hub: TrustRepository) -> None:
    hub.files["2.root.json"] = hub.first_root
    assert refused(hub, Device(hub.first_root)) == "trust.rollback"
    hub.root.signed.version = 3
    hub.files["2.root.json"] = repo.sign(hub.root, *hub.keys["root"])
    assert refused(hub, Device(hub.first_root)) == "trust.rollback"


def test_a_replaced_assignment_key_is_no_longer_believed(hub: TrustRepository) -> None:
    stolen = hub.keys["assignment"][0]
    hub.rotate("assignment")
    document = sign_assignment(hub.assignment(DIGITS), stolen)
    assert refused(hub, Device(hub.first_root), document) == "trust.signature"


def set_version(hub: TrustRepository, role: str, version: int) -> None:
    """Give timestamp or snapshot this version and sign what hangs on it."""
    assert hub.timestamp is not None
    assert hub.snapshot is not None
    if role == "timestamp":
        hub.timestamp.signed.version = version
        hub.store_timestamp()
    else:
        hub.snapshot.signed.version = version
        hub.store_snapshot()
        hub.renew_timestamp()


@pytest.mark.parametrize("role", ["timestamp", "snapshot"])
def test_a_fast_forwarded_fleet_is_freed_by_new_keys(hub: TrustRepository, role: str) -> None:
    device = Device(hub.first_root)
    set_version(hub, role, 10**9)
    device.verify(hub.assign(DIGITS), hub.serve)
    set_version(hub, role, 5)
    assert refused(hub, device) == "trust.rollback"
    hub.rotate(role)
    set_version(hub, role, 5)
    roles = device.verify(hub.assign(DIGITS), hub.serve).floors.roles
    floors = {name: floor for name, floor in roles.items() if not name.startswith("x-outrider/")}
    assert max(floors.values()) < 10, "the floor under the old keys is forgotten"
    assert len(floors) == 5
    device.verify(hub.assign(DIGITS), hub.serve)


def test_a_crash_between_root_and_floors_does_not_brick_a_freed_device(hub: TrustRepository) -> None:
    assert hub.timestamp is not None
    device = Device(hub.first_root)
    hub.timestamp.signed.version = 10**9
    hub.store_timestamp()
    device.verify(hub.assign(DIGITS), hub.serve)
    hub.rotate("timestamp", "snapshot")
    hub.timestamp.signed.version = 1
    hub.store_snapshot()
    hub.renew_timestamp()
    hub.files.pop("models/digits/1.0.0/manifest.json")
    floors = device.floors
    assert refused(hub, device) == "transfer.missing"
    device.floors = floors
    hub.release(hub.manifests[DIGITS])
    device.verify(hub.assign(DIGITS), hub.serve)


# Delegations


def test_a_role_cannot_sign_for_another_family(hub: TrustRepository) -> None:
    """The letters' key signs a role that lists a digits path: nobody asks it about digits."""
    hub.release(make_manifest(family="letters"))
    other = make_manifest("2.0.0", counter=9)
    letters = hub.roles["models/letters"].signed
    for file in repo.release_files(other):
        letters.targets[file.path] = TargetFile(file.length, {"sha256": file.digest}, file.path)
    letters.version += 1
    hub.publish()
    hub.manifests[("digits", "2.0.0")] = other
    assert refused(hub, Device(hub.first_root), hub.assign(("digits", "2.0.0"))) == "trust.unknown_target"


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "a/b", "x%2fy", "1.root", "é"])
def test_a_role_name_never_becomes_a_path(hub: TrustRepository, name: str) -> None:
    hub.targets = repo.new_targets(now_ms=NOW_MS)
    hub.targets.signed.version = 3
    delegated = repo.delegate_family(hub.targets, FamilyName("digits"), hub.public("release"), now_ms=NOW_MS)
    delegations = delegated.signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    role = delegations.roles.pop("models/digits")
    role.name = name
    delegations.roles[name] = role
    hub.targets = delegated
    hub.roles = {name: hub.roles.pop("models/digits")}
    hub.snapshot = None
    hub.publish()
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS), hub.serve)
    asked = device.asked[-2]
    assert asked == file_name(name, 1)
    assert "/" not in asked


@pytest.mark.parametrize("name", [-1, True, None, "", "root", "targets", "x" * 300, "a\nb", ["x"]])
def test_a_role_name_that_is_no_plain_text_is_malformed(hub: TrustRepository, name: object) -> None:
    document = hub.targets.to_dict()
    document["signed"]["delegations"]["roles"][0]["name"] = name
    hub.files["2.targets.json"] = resigned(document, hub.keys["targets"])
    promise_again(hub)
    assert refused(hub, Device(hub.first_root)) == "trust.malformed"


def test_delegations_that_run_in_a_circle_end(hub: TrustRepository) -> None:
    role = hub.roles["models/digits"]
    assert role.signed.delegations is None
    role.signed.targets.clear()
    role.signed.delegations = hub.targets.signed.delegations
    delegations = hub.targets.signed.delegations
    assert delegations is not None
    assert delegations.roles is not None
    delegations.roles["models/digits"].terminating = False
    role.signed.version += 1
    hub.targets.signed.version += 1
    hub.publish()
    assert refused(hub, Device(hub.first_root)) == "trust.unknown_target"
