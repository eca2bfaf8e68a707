"""The client workflow against a hub that is honest, stale, or shows what was true once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shared.release import Floors
from shared.trust import repository as repo
from shared.trust.floors import time_floor
from shared.trust.library import MetaFile, Root, Targets
from tests.fakes.trust_repository import (
    DAY_MS,
    HOUR_MS,
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


def test_a_release_that_both_signatures_agree_on_is_accepted(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    verified = device.verify(hub.assign(DIGITS), hub.serve)
    assert verified.models[0].manifest == make_manifest()
    assert verified.assignment.version == verified.floors.assignment_version == 1
    assert verified.floors.time_ms == NOW_MS
    assert verified.floors.roles["root"] == 1
    assert device.asked == [
        "2.root.json", "timestamp.json", "1.snapshot.json", "2.targets.json", "1.models%2Fdigits.json",
        "models/digits/1.0.0/manifest.json",
    ]  # fmt: skip


def test_unchanged_metadata_is_not_fetched_again(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS), hub.serve)
    device.verify(hub.assign(DIGITS), hub.serve)
    assert device.asked == ["2.root.json", "timestamp.json", "models/digits/1.0.0/manifest.json"]
    hub.renew_timestamp()
    device.verify(hub.assign(DIGITS), hub.serve)
    assert device.asked == ["2.root.json", "timestamp.json", "models/digits/1.0.0/manifest.json"]
    hub.release(make_manifest("1.1.0", counter=2))
    device.verify(hub.assign(("digits", "1.1.0")), hub.serve)
    assert device.asked[2:] == ["2.snapshot.json", "2.models%2Fdigits.json", "models/digits/1.1.0/manifest.json"]


def test_several_families_and_the_same_document_again(hub: TrustRepository) -> None:
    hub.release(make_manifest(family="letters"))
    device = Device(hub.first_root)
    document = hub.assign(DIGITS, ("letters", "1.0.0"))
    first = device.verify(document, hub.serve)
    assert [model.manifest.family for model in first.models] == ["digits", "letters"]
    assert device.verify(document, hub.serve) == first


def test_losing_the_cache_costs_downloads_only(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    document = hub.assign(DIGITS)
    device.verify(document, hub.serve)
    device.cache.clear()
    device.previous = None
    device.verify(document, hub.serve)
    device.cache = dict.fromkeys(device.cache, b"")
    device.verify(document, hub.serve)


def test_an_older_release_may_be_assigned_above_the_security_floor(hub: TrustRepository) -> None:
    hub.release(make_manifest("1.1.0", counter=2, floor=1))
    hub.release(make_manifest("1.2.0", counter=3, floor=3))
    device = Device(hub.first_root)
    device.verify(hub.assign(("digits", "1.1.0")), hub.serve)
    device.verify(hub.assign(DIGITS), hub.serve)
    assert device.verify(hub.assign(("digits", "1.2.0")), hub.serve).floors.releases == {"digits": 3}
    assert refused(hub, device, hub.assign(("digits", "1.1.0"))) == "trust.rollback"


def test_unknown_fields_survive_and_stay_signed(hub: TrustRepository) -> None:
    hub.roles["models/digits"].signed.unrecognized_fields["x-later"] = {"a": [1, "two"]}
    hub.roles["models/digits"].signed.targets["models/digits/1.0.0/int8.onnx"].unrecognized_fields["custom"] = {"n": 1}
    hub.roles["models/digits"].signed.version += 1
    hub.publish()
    Device(hub.first_root).verify(hub.assign(DIGITS), hub.serve)


# Old, frozen and mixed metadata


def rolled_back_timestamp(hub: TrustRepository) -> None:
    assert hub.timestamp is not None
    hub.timestamp.signed.version -= 1
    hub.store_timestamp()


def rolled_back_snapshot(hub: TrustRepository) -> None:
    assert hub.snapshot is not None
    hub.snapshot.signed.version -= 1
    hub.store_snapshot()
    hub.renew_timestamp()


def rolled_back_targets(hub: TrustRepository) -> None:
    roll_back_role(hub, "targets.json")


def rolled_back_role(hub: TrustRepository) -> None:
    roll_back_role(hub, "models/digits.json")


def roll_back_role(hub: TrustRepository, name: str) -> None:
    assert hub.snapshot is not None
    hub.snapshot.signed.meta[name] = MetaFile(hub.snapshot.signed.meta[name].version - 1)
    hub.snapshot.signed.version += 1
    hub.store_snapshot()
    hub.renew_timestamp()


def dropped_role(hub: TrustRepository) -> None:
    assert hub.snapshot is not None
    del hub.snapshot.signed.meta["models/digits.json"]
    hub.snapshot.signed.version += 1
    hub.store_snapshot()
    hub.renew_timestamp()


@pytest.mark.parametrize("lost", ["nothing", "cache", "floors"])
@pytest.mark.parametrize(
    "attack", [rolled_back_timestamp, rolled_back_snapshot, rolled_back_targets, rolled_back_role, dropped_role]
)
def test_rollback_is_refused(hub: TrustRepository, attack: Callable[[TrustRepository], None], lost: str) -> None:
    hub.release(make_manifest("1.1.0", counter=2))
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS), hub.serve)
    if lost == "cache":
        device.cache.clear()
    if lost == "floors":
        device.floors = Floors()
    attack(hub)
    expected = "trust.mix_and_match" if attack is dropped_role and lost == "cache" else "trust.rollback"
    assert refused(hub, device) == expected


def test_an_older_root_is_refused_when_the_root_file_was_lost(hub: TrustRepository) -> None:
    hub.rotate("timestamp")
    hub.renew_timestamp()
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS), hub.serve)
    device.root = hub.first_root
    del hub.files["2.root.json"]
    assert refused(hub, device) == "trust.rollback"


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "models/digits", "root"])
def test_expired_metadata_is_refused(hub: TrustRepository, role: str) -> None:
    """Of each role in turn, while everything else has been signed anew."""
    lives = {"timestamp": 1, "snapshot": 7, "targets": 90, "models/digits": 90, "root": 365}
    hub.now_ms = NOW_MS + lives[role] * DAY_MS
    renewed: dict[str, Root | Targets] = {"root": hub.root.signed, "targets": hub.targets.signed}
    renewed["models/digits"] = hub.roles["models/digits"].signed
    for name, signed in renewed.items():
        if name != role:
            signed.expires = repo.in_days(hub.now_ms, 400)
            signed.version += name != "root"
    if role not in ("timestamp", "snapshot"):
        hub.store_root()
        hub.publish()
    elif role == "snapshot":
        hub.renew_timestamp()
    root = hub.files["1.root.json"]
    assert refused(hub, Device(root), wall_ms=hub.now_ms) == "trust.freeze"
    hub.publish()
    if role in ("timestamp", "snapshot"):
        Device(root).verify(hub.assign(DIGITS), hub.serve, wall_ms=hub.now_ms)


def test_an_expired_snapshot_at_hand_is_refused_too(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS), hub.serve)
    hub.now_ms += 7 * DAY_MS
    hub.renew_timestamp()
    assert refused(hub, device, wall_ms=hub.now_ms) == "trust.freeze"


def test_a_device_without_a_clock_cannot_be_frozen(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    device.verify(hub.assign(DIGITS), hub.serve, wall_ms=0)
    stale = dict(hub.files)
    hub.now_ms += 2 * DAY_MS
    hub.publish()
    newer = hub.assign(DIGITS)
    honest, hub.files = hub.files, stale
    assert refused(hub, device, newer, wall_ms=0) == "trust.freeze", "the assignment proves that two days have passed"
    hub.files = honest
    device.verify(newer, hub.serve, wall_ms=0)
    assert time_floor(device.floors, hub.root.signed) == NOW_MS + 2 * DAY_MS
    assert device.floors.time_ms == 0, "only where its clock says so too, whoever has signed"


def test_the_time_floor_outranks_the_clock(hub: TrustRepository) -> None:
    device = Device(hub.first_root)
    device.floors = Floors(time_ms=NOW_MS + 25 * HOUR_MS)
    assert refused(hub, device, wall_ms=0) == "trust.freeze"
    device.floors = Floors(time_ms=NOW_MS + 23 * HOUR_MS)
    device.verify(hub.assign(DIGITS), hub.serve, wall_ms=0)


def test_mixed_versions_are_refused(hub: TrustRepository) -> None:
    old_role, old_snapshot = hub.files["1.models%2Fdigits.json"], hub.files["1.snapshot.json"]
    hub.release(make_manifest("1.1.0", counter=2))
    good = dict(hub.files)
    for name, data in (("2.models%2Fdigits.json", old_role), ("2.snapshot.json", old_snapshot)):
        hub.files = {**good, name: data}
        assert refused(hub, Device(hub.first_root)) == "trust.mix_and_match"


def test_a_second_file_of_the_same_version_is_refused(hub: TrustRepository) -> None:
    """Signed with the right key, but not the file whose digest was promised."""
    good = dict(hub.files)
    hub.roles["models/digits"].signed.expires = repo.in_days(NOW_MS, 89)
    hub.store("models/digits", hub.roles["models/digits"])
    assert refused(hub, Device(hub.first_root)) == "trust.mix_and_match"
    hub.files = good
    assert hub.snapshot is not None
    hub.snapshot.signed.expires = repo.in_days(NOW_MS, 6)
    hub.store_snapshot()
    assert refused(hub, Device(hub.first_root)) == "trust.mix_and_match"


def test_a_snapshot_that_is_not_the_promised_one_is_refused_without_hashes_too(hub: TrustRepository) -> None:
    assert hub.timestamp is not None
    hub.timestamp.signed.snapshot_meta = MetaFile(2)
    hub.store_timestamp()
    hub.files["2.snapshot.json"] = hub.files["1.snapshot.json"]
    assert refused(hub, Device(hub.first_root)) == "trust.mix_and_match"


def test_a_version_that_is_not_the_promised_one_is_refused_without_hashes_too(hub: TrustRepository) -> None:
    assert hub.snapshot is not None
    hub.snapshot.signed.meta["models/digits.json"] = MetaFile(2)
    hub.files["2.models%2Fdigits.json"] = hub.files["1.models%2Fdigits.json"]
    hub.store_snapshot()
    hub.renew_timestamp()
    assert refused(hub, Device(hub.first_root)) == "trust.mix_and_match"
