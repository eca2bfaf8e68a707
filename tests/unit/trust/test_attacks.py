"""Attacks on updates, each under its name, as a hub, a mirror or a thief of some keys can carry them out."""

from __future__ import annotations

import hashlib
import json

import msgspec
import pytest

from shared.ids import DeviceId, Digest
from shared.model import encode_manifest
from shared.release import AssignedModel, Floors
from shared.trust import client as workflow
from shared.trust import refresh
from shared.trust import repository as repo
from shared.trust.assignment import sign_assignment
from shared.trust.library import CryptoSigner, DelegatedRole, Delegations, Metadata, TargetFile, Targets
from tests.fakes.trust_repository import (
    DAY_MS,
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
    hub = TrustRepository(targets_threshold=2)
    hub.release(make_manifest())
    return hub


# 1, 19: arbitrary software, a hub in other hands


def test_a_hub_in_other_hands_cannot_bring_a_model_of_its_own(hub: TrustRepository) -> None:
    """It holds the keys of assignments, snapshot and timestamp, and serves what it likes."""
    mine = make_manifest(model=b"something else")
    hub.manifests[DIGITS] = mine
    hub.files["models/digits/1.0.0/manifest.json"] = encode_manifest(mine)
    assert refused(hub, Device(hub.first_root)) == "trust.digest"
    hub.manifests[("digits", "6.6.6")] = make_manifest("6.6.6", counter=66)
    assert refused(hub, Device(hub.first_root), hub.assign(("digits", "6.6.6"))) == "trust.unknown_target"
    role = hub.roles["models/digits"]
    for file in repo.release_files(mine):
        role.signed.targets[file.path] = TargetFile(file.length, {"sha256": file.digest}, file.path)
    role.signed.version += 1
    hub.keys["release"] = hub.keys["snapshot"]
    hub.publish()
    assert refused(hub, Device(hub.first_root)) == "trust.signature"


# 3: extraneous dependencies


def test_files_that_only_the_manifest_names_are_not_taken(hub: TrustRepository) -> None:
    """A release whose golden set or variant no role lists: the manifest alone brings no file in."""
    extra = make_manifest("1.1.0", counter=2)
    for left_out in (extra.golden.file, extra.variants[0].file):
        hub = TrustRepository()
        hub.release(make_manifest())
        hub.release(extra)
        role = hub.roles["models/digits"]
        del role.signed.targets[left_out.path]
        role.signed.version += 1
        hub.publish()
        assert refused(hub, Device(hub.first_root), hub.assign(("digits", "1.1.0"))) == "trust.unknown_target"


# 8: rollback


@pytest.mark.parametrize("lost", ["all files", "torn files", "assignment", "nothing"])
def test_floors_outlive_the_cache(hub: TrustRepository, lost: str) -> None:
    """A power cut tears the cache, and the hub shows the repository of last week with its signatures."""
    device = Device(hub.first_root)
    last_week, first = dict(hub.files), hub.assign(DIGITS)
    for number in range(1, 5):
        hub.release(make_manifest(f"1.{number}.0", counter=number + 1))
    device.verify(hub.assign(("digits", "1.4.0")), hub.serve)
    floors = device.floors
    if lost == "all files":
        device.cache, device.previous = {}, None
    elif lost == "torn files":
        device.cache, device.previous = dict.fromkeys(device.cache, b""), b""
    elif lost == "assignment":
        device.previous = None
    today, hub.files = hub.files, last_week
    assert refused(hub, device) == "trust.rollback"
    assert refused(hub, device, first) == "trust.rollback"
    assert device.floors == floors
    hub.files = today
    device.verify(hub.assign(("digits", "1.4.0")), hub.serve)


def test_floors_only_rise(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    hub.release(make_manifest("1.1.0", counter=5, floor=4))
    hub.release(make_manifest("1.2.0", counter=6, floor=2))
    seen = [Floors()]
    for version in ("1.1.0", "1.2.0", "1.1.0"):
        seen.append(device.verify(hub.assign(("digits", version)), hub.serve, wall_ms=0).floors)
        before, after = seen[-2:]
        assert after.assignment_version > before.assignment_version
        assert after.time_ms >= before.time_ms
        assert after.releases["digits"] == 4
        assert {name.partition("@")[0] for name in after.roles} == {
            "root", "timestamp", "snapshot", "targets", "models/digits", "x-outrider/assignment", "x-outrider/issued",
        }  # fmt: skip
        assert all(after.roles[name] >= version for name, version in before.roles.items())
        hub.renew_timestamp()


def test_a_targets_floor_is_kept_through_new_snapshot_keys(hub: TrustRepository) -> None:
    """Only who replaces a role's own keys lets go of its floor; all others stay."""
    older = hub.files["1.models%2Fdigits.json"]
    device = Device(hub.first_root)
    hub.release(make_manifest("1.1.0", counter=2))
    device.verify(hub.assign(DIGITS), hub.serve)
    hub.rotate("snapshot", "timestamp")
    signed = {"targets": hub.store("targets", hub.targets), "models/digits": older}
    hub.snapshot = repo.new_snapshot(None, signed, now_ms=hub.now_ms)
    hub.timestamp = None
    hub.store_snapshot()
    hub.renew_timestamp()
    assert refused(hub, device) == "trust.rollback"


# 10: keys stolen below the threshold


def test_one_root_key_of_three_makes_no_root(hub: TrustRepository) -> None:
    roots = [CryptoSigner.generate_ed25519() for _ in range(3)]
    strict = msgspec.structs.replace(
        hub.root_keys(), root=repo.RoleKeys(keys=tuple(key.public_key for key in roots), threshold=2)
    )
    first = repo.sign(repo.new_root(strict, now_ms=NOW_MS), *roots[:2])
    for thief in roots:
        mine = msgspec.structs.replace(strict, assignment=hub.public("timestamp"))
        hub.files["2.root.json"] = repo.sign(repo.new_root(mine, now_ms=NOW_MS, version=2), thief)
        theirs = sign_assignment(hub.assignment(DIGITS), hub.keys["timestamp"][0])
        assert refused(hub, Device(first), theirs) == "trust.signature"
    hub.files["2.root.json"] = repo.sign(repo.new_root(strict, now_ms=NOW_MS, version=2), *roots[1:])
    Device(first).verify(hub.assign(DIGITS), hub.serve)


@pytest.mark.parametrize("stolen", ["root", "targets", "snapshot", "timestamp", "assignment"])
def test_a_single_key_of_another_role_signs_no_targets(hub: TrustRepository, stolen: str) -> None:
    hub.targets.signed.version += 1
    hub.publish()
    hub.store("targets", hub.targets, hub.keys[stolen][0])
    promised = hub.files[f"{hub.targets.signed.version}.targets.json"]
    hub.snapshot = repo.new_snapshot(
        hub.snapshot, {"targets": promised, "models/digits": hub.files["1.models%2Fdigits.json"]}, now_ms=NOW_MS
    )
    hub.store_snapshot()
    hub.renew_timestamp()
    assert refused(hub, Device(hub.first_root)) == "trust.signature"


# 11: the right file under another name


def test_a_signed_manifest_under_another_name_is_refused(hub: TrustRepository) -> None:
    hub.release(make_manifest(family="letters"))
    digits, letters = (hub.assignment(release).models[0] for release in (DIGITS, ("letters", "1.0.0")))
    swapped = AssignedModel(
        family=letters.family,
        version=letters.version,
        manifest=msgspec.structs.replace(
            letters.manifest, length=digits.manifest.length, digest=digits.manifest.digest
        ),
    )
    document = sign_assignment(
        msgspec.structs.replace(hub.assignment(DIGITS), models=(swapped,)), hub.keys["assignment"][0]
    )
    hub.files[letters.manifest.path] = hub.files[digits.manifest.path]
    assert refused(hub, Device(hub.first_root), document) == "trust.digest"


# 12: delegations without an end


def chain(hub: TrustRepository, length: int) -> None:
    """Each role delegates to the next; the last one lists a digits path."""
    keys = hub.public("release")
    names = [f"link-{number}" for number in range(length)]

    def onwards(name: str) -> Delegations:
        role = DelegatedRole(name, [keys.keys[0].keyid], 1, False, paths=["models/digits/*/*"])
        return Delegations({keys.keys[0].keyid: keys.keys[0]}, roles={name: role})

    (listed,) = (role.signed.targets for role in hub.roles.values() if role.signed.targets)
    hub.roles = {}
    for name, following in zip(names, [*names[1:], None], strict=True):
        link = Targets(version=1, expires=repo.in_days(NOW_MS, 90))
        if following is None:
            link.targets = dict(listed)
        else:
            link.delegations = onwards(following)
        hub.roles[name] = Metadata(link)
    hub.targets.signed.delegations = onwards(names[0])
    hub.targets.signed.version += 1
    hub.snapshot = None
    hub.publish()


def test_a_chain_of_delegations_is_followed_so_far_and_no_further(hub: TrustRepository) -> None:
    chain(hub, workflow.MAX_ROLES_PER_SEARCH)
    Device(hub.first_root).verify(hub.assign(DIGITS), hub.serve)
    chain(hub, workflow.MAX_ROLES_PER_SEARCH + 1)
    device = Device(hub.first_root)
    assert refused(hub, device) == "trust.endless_data"
    assert len([name for name in device.asked if "link" in name]) == workflow.MAX_ROLES_PER_SEARCH


def test_in_a_diamond_each_side_must_stand_behind_the_shared_role(hub: TrustRepository) -> None:
    """The first side names another key for the role that both share; what the second side allows is no help to it."""
    keys = hub.public("release").keys[0]
    other = TrustRepository().public("release").keys[0]

    def to(name: str, key: object, paths: list[str]) -> Delegations:
        assert isinstance(key, type(keys))
        return Delegations({key.keyid: key}, roles={name: DelegatedRole(name, [key.keyid], 1, False, paths=paths)})

    shared = hub.roles.pop("models/digits")
    hub.roles = {"shared": shared}
    for name, key in (("left", other), ("right", keys)):
        side = Targets(version=1, expires=repo.in_days(NOW_MS, 90), delegations=to("shared", key, ["models/*/*/*"]))
        hub.roles[name] = Metadata(side)
    hub.targets.signed.delegations = Delegations(
        {keys.keyid: keys},
        roles={
            name: DelegatedRole(name, [keys.keyid], 1, False, paths=["models/digits/*/*"]) for name in ("left", "right")
        },
    )
    hub.targets.signed.version += 1
    hub.snapshot = None
    hub.publish()
    assert refused(hub, Device(hub.first_root)) == "trust.signature"


# 14: what two readers read in two ways


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"version":1', b'"version":true'),
        (b'"version":1', b'"version":1.0'),
        (b'"version":1', b'"version":1,"version":9'),
        (b'"version":1', b'"version":NaN'),
        (b'"version":1', b'"version":90071992547409930'),
        (b'"version":1', b'"version":1,"deep":' + b"[" * 64 + b"]" * 64),
    ],
)
def test_json_that_can_be_read_in_two_ways_is_refused_before_any_signature(
    hub: TrustRepository, before: bytes, after: bytes
) -> None:
    compact = json.dumps(json.loads(hub.files["timestamp.json"]), separators=(",", ":")).encode()
    assert before in compact
    hub.files["timestamp.json"] = compact.replace(before, after)
    assert refused(hub, Device(hub.first_root)) == "trust.malformed"


# 18, 21: what was signed for others


def test_an_assignment_replayed_to_another_device_is_refused(hub: TrustRepository) -> None:
    document = hub.assign(DIGITS, device=DeviceId("dev-1"))
    Device(hub.first_root, name=DeviceId("dev-1")).verify(document, hub.serve)
    assert refused(hub, Device(hub.first_root, name=DeviceId("dev-2")), document) == "trust.wrong_device"


def test_a_release_for_other_hardware_is_refused_whatever_the_hub_says(hub: TrustRepository) -> None:
    hub.release(make_manifest("1.1.0", counter=2, profiles=("pi4", "pi5")))
    document = hub.assign(("digits", "1.1.0"))
    assert refused(hub, Device(hub.first_root, profile="jetson"), document) == "trust.wrong_hardware"
    assert refused(hub, Device(hub.first_root, profile=""), document) == "trust.wrong_hardware"
    Device(hub.first_root, profile="pi5").verify(document, hub.serve)
    refresh.check_fit(make_manifest(profiles=()), profile="any", floors=Floors())


# 13: names that would be paths


@pytest.mark.parametrize("path", ["../../etc/x", "/etc/x", "models/digits/1.0.0/..", "models/digits/1.0.0/%2e%2e%2fx"])
def test_a_manifest_cannot_name_a_file_outside_its_release(hub: TrustRepository, path: str) -> None:
    document = json.loads(encode_manifest(make_manifest("1.1.0", counter=2)))
    document["variants"][0]["file"]["path"] = path
    data = json.dumps(document).encode()
    role = hub.roles["models/digits"]
    name = "models/digits/1.1.0/manifest.json"
    digest = Digest(hashlib.sha256(data).hexdigest())
    role.signed.targets[name] = TargetFile(len(data), {"sha256": digest}, name)
    role.signed.targets[path] = TargetFile(10, {"sha256": "0" * 64}, path)
    role.signed.version += 1
    hub.publish()
    hub.files[name] = data
    hub.manifests[("digits", "1.1.0")] = make_manifest("1.1.0", counter=2)
    wanted = hub.assignment(("digits", "1.1.0"))
    (model,) = wanted.models
    ref = msgspec.structs.replace(model.manifest, length=len(data), digest=digest)
    document_bytes = sign_assignment(
        msgspec.structs.replace(wanted, models=(msgspec.structs.replace(model, manifest=ref),)),
        hub.keys["assignment"][0],
    )
    assert refused(hub, Device(hub.first_root), document_bytes) == "trust.malformed"


# 5: freeze


@pytest.mark.parametrize("wall_ms", [0, NOW_MS - 365 * DAY_MS, NOW_MS + 2 * DAY_MS])
def test_a_frozen_hub_is_noticed_whatever_the_clock_says(hub: TrustRepository, wall_ms: int) -> None:
    """It shows yesterday's metadata for ever; a signed document proves that the day is over."""
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS), hub.serve, wall_ms=0)
    frozen = dict(hub.files)
    hub.now_ms += 2 * DAY_MS
    newer = hub.assign(DIGITS)
    hub.files = frozen
    assert refused(hub, device, newer, wall_ms=wall_ms) == "trust.freeze"


def test_an_old_assignment_is_refused_beside_fresh_metadata(hub: TrustRepository) -> None:
    """The hub's metadata is of today; only what this device is to run has been held back for a month."""
    held_back = hub.assign(DIGITS)
    hub.now_ms += 30 * DAY_MS
    hub.publish()
    device = Device(hub.first_root)
    assert refused(hub, device, held_back, wall_ms=hub.now_ms) == "trust.freeze"
    device.verify(hub.assign(DIGITS), hub.serve, wall_ms=hub.now_ms)


def test_signed_oddities_do_not_pass_for_their_signature(hub: TrustRepository) -> None:
    """A role key in a thief's hands signs a length that is no number."""
    document = json.loads(hub.files["1.models%2Fdigits.json"])
    next(iter(document["signed"]["targets"].values()))["length"] = True
    hub.files["1.models%2Fdigits.json"] = resigned(document, hub.keys["release"])
    promise_again(hub)
    assert refused(hub, Device(hub.first_root)) == "trust.malformed"
