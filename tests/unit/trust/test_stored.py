"""What is installed, looked at when a device starts: refused where it does not hold, undecided where a file is gone."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest

from shared.ids import DeviceId, Digest
from shared.release import Floors, VerifiedAssignment
from shared.trust import repository as repo
from shared.trust import stored
from shared.wire.verification import Judged, StoredJob, StoredRelease
from tests.fakes.trust_repository import DAY_MS, Device, TrustRepository, make_manifest

DIGITS = ("digits", "1.0.0")


class Disk:
    """A device's trust folder after it accepted the digits, and what may be changed on it before the next start."""

    def __init__(self) -> None:
        self.hub = TrustRepository(targets_threshold=2)
        self.hub.release(make_manifest(profiles=("pi4", "x86-gateway")))
        self.device = Device(self.hub.first_root)
        self.document: bytes | None = self.hub.assign(DIGITS)
        self.verified: VerifiedAssignment = self.device.verify(self.document, self.hub.serve)
        self.floors = self.device.floors
        self.name = self.device.name
        self.profile = self.device.profile

    @property
    def digest(self) -> Digest:
        """Of the manifest."""
        return self.verified.models[0].manifest_digest

    def judge(self) -> Judged:
        """Start the device."""
        releases = tuple(
            StoredRelease(
                family=model.manifest.family,
                version=model.manifest.version,
                digest=model.manifest_digest,
                data=self.device.manifests.get(model.manifest_digest),
            )
            for model in self.verified.models
        )
        return stored.judge(
            StoredJob(
                document=self.document,
                device=self.name,
                profile=self.profile,
                root=self.device.root,
                cache=dict(self.device.cache),
                floors=self.floors,
                releases=releases,
            )
        )

    def refused(self) -> str:
        """The code with which the release is refused."""
        judged = self.judge()
        assert not judged.undecided
        assert judged.refused[self.digest].message
        return judged.refused[self.digest].code

    def undecided(self) -> str:
        """What is said to be missing."""
        judged = self.judge()
        assert not judged.refused
        assert judged.undecided[self.digest].code == "transfer.not_stored"
        return judged.undecided[self.digest].message


@pytest.fixture
def disk() -> Disk:
    return Disk()


def test_what_was_accepted_holds_for_ever_although_it_all_expired(disk: Disk) -> None:
    """Nothing here is told the time: metadata of any age serves on."""
    assert disk.judge() == Judged(refused={}, undecided={})
    later = msgspec.structs.replace(disk.floors, time_ms=disk.floors.time_ms + 4000 * DAY_MS)
    disk.floors = later
    assert disk.judge() == Judged(refused={}, undecided={})


# What is gone decides nothing


def no_timestamp(disk: Disk) -> None:
    del disk.device.cache["timestamp"]


def torn_snapshot(disk: Disk) -> None:
    disk.device.cache["snapshot"] = disk.device.cache["snapshot"][:100]


def empty_files(disk: Disk) -> None:
    disk.device.cache = dict.fromkeys(disk.device.cache, b"")


def no_cache(disk: Disk) -> None:
    disk.device.cache.clear()


def no_role(disk: Disk) -> None:
    del disk.device.cache["models/digits"]


def no_manifest(disk: Disk) -> None:
    disk.device.manifests.clear()


def no_assignment(disk: Disk) -> None:
    disk.document = None


def torn_assignment(disk: Disk) -> None:
    assert disk.document is not None
    disk.document = disk.document[:-10]


def torn_root(disk: Disk) -> None:
    disk.device.root = disk.device.root[:50]


def refresh_broke_off(disk: Disk) -> None:
    """The newest timestamp and snapshot are here, the roles that they name are not."""
    hub = disk.hub
    hub.release(make_manifest("1.1.0", counter=2))
    disk.device.cache["timestamp"] = hub.files["timestamp.json"]
    disk.device.cache["snapshot"] = hub.files["2.snapshot.json"]


def older_cache(disk: Disk) -> None:
    """The disk kept the floors and refused the metadata."""
    roles = {name: version + 1 for name, version in disk.floors.roles.items() if name.startswith("models/")}
    disk.floors = msgspec.structs.replace(disk.floors, roles={**disk.floors.roles, **roles})


def replaced_online_keys(disk: Disk) -> None:
    """The new root is here, and the refresh that was to bring what the new keys sign broke off."""
    disk.hub.rotate("assignment")
    disk.device.root = disk.hub.files["2.root.json"]


def new_targets_keys(disk: Disk) -> None:
    """A planned change: the question for the time has brought the root, and no refresh came after it."""
    disk.hub.rotate("targets")
    disk.hub.publish()
    disk.device.root = disk.hub.files["2.root.json"]


def rotten_root(disk: Disk) -> None:
    root = json.loads(disk.device.root)
    signature = root["signatures"][0]["sig"]
    root["signatures"][0]["sig"] = ("0" if signature[0] != "0" else "1") + signature[1:]
    disk.device.root = json.dumps(root).encode()


def forged_root(disk: Disk) -> None:
    disk.device.root = repo.sign(disk.hub.root, *TrustRepository().keys["root"])


LOSSES = [
    no_timestamp, torn_snapshot, empty_files, no_cache, no_role, no_manifest, no_assignment, torn_assignment,
    torn_root, refresh_broke_off, older_cache, replaced_online_keys, new_targets_keys, rotten_root, forged_root,
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_file_silences_no_model(disk: Disk, loss: Callable[[Disk], None]) -> None:
    loss(disk)
    assert disk.undecided()


# What is there and does not hold


def revoked_targets_keys(disk: Disk) -> None:
    """A refresh was accepted under the new root, so what its keys have not signed was put there since."""
    disk.hub.rotate("targets")
    disk.device.root = disk.hub.files["2.root.json"]
    disk.floors = msgspec.structs.replace(disk.floors, roles={**disk.floors.roles, "root": 2})


def revoked_family_key(disk: Disk) -> None:
    hub = disk.hub
    hub.keys["release"] = TrustRepository().keys["release"]
    hub.targets = repo.delegate_family(
        hub.targets, disk.verified.models[0].manifest.family, hub.public("release"), now_ms=hub.now_ms
    )
    disk.device.cache["targets"] = hub.store("targets", hub.targets)
    for role in ("timestamp", "snapshot"):
        del disk.device.cache[role]


def one_of_two_signatures(disk: Disk) -> None:
    hub = disk.hub
    disk.device.cache["targets"] = hub.store("targets", hub.targets, hub.keys["targets"][0])
    del disk.device.cache["snapshot"]


def damaged_manifest(disk: Disk) -> None:
    data = bytearray(disk.device.manifests[disk.digest])
    data[len(data) // 2] ^= 1
    disk.device.manifests[disk.digest] = bytes(data)


def withdrawn_release(disk: Disk) -> None:
    disk.floors = msgspec.structs.replace(disk.floors, releases={"digits": 2})


def copied_disk(disk: Disk) -> None:
    disk.name = DeviceId("dev-2")


def other_hardware(disk: Disk) -> None:
    disk.profile = "jetson"


REFUSALS: list[tuple[Callable[[Disk], None], str]] = [
    (revoked_targets_keys, "trust.signature"),
    (revoked_family_key, "trust.signature"),
    (one_of_two_signatures, "trust.signature"),
    (damaged_manifest, "trust.digest"),
    (withdrawn_release, "trust.rollback"),
    (copied_disk, "trust.wrong_device"),
    (other_hardware, "trust.wrong_hardware"),
]


@pytest.mark.parametrize(("harm", "code"), REFUSALS, ids=[harm.__name__ for harm, _ in REFUSALS])
def test_what_no_longer_holds_is_refused(disk: Disk, harm: Callable[[Disk], None], code: str) -> None:
    harm(disk)
    assert disk.refused() == code


@pytest.mark.parametrize("loss", [no_timestamp, no_assignment])
@pytest.mark.parametrize(("harm", "code"), REFUSALS, ids=[harm.__name__ for harm, _ in REFUSALS])
def test_a_refusal_is_seen_past_a_lost_file(
    disk: Disk, harm: Callable[[Disk], None], code: str, loss: Callable[[Disk], None]
) -> None:
    harm(disk)
    disk.device.cache.pop("timestamp", None)
    if loss is no_assignment and harm is not copied_disk:
        disk.document = None
    assert disk.judge().refused[disk.digest].code == code


def test_a_manifest_that_nobody_signed_is_refused_although_it_is_gone(disk: Disk) -> None:
    (model,) = disk.verified.models
    disk.verified = msgspec.structs.replace(
        disk.verified, models=(msgspec.structs.replace(model, manifest_digest=Digest("0" * 64)),)
    )
    assert disk.refused() == "trust.digest"


@pytest.mark.parametrize("harm", [damaged_manifest, withdrawn_release, copied_disk, other_hardware])
def test_a_planned_change_of_keys_hides_no_other_harm(disk: Disk, harm: Callable[[Disk], None]) -> None:
    new_targets_keys(disk)
    harm(disk)
    assert disk.refused() == dict(REFUSALS)[harm]


def test_each_release_is_judged_for_itself(disk: Disk) -> None:
    """The release that a slot went back to is no longer assigned; it is signed, and it serves."""
    hub, device = disk.hub, disk.device
    first = disk.verified.models[0]
    hub.release(make_manifest("1.1.0", counter=2))
    hub.release(make_manifest(family="letters"))
    disk.document = hub.assign(("digits", "1.1.0"), ("letters", "1.0.0"))
    accepted = device.verify(disk.document, hub.serve)
    disk.floors = device.floors
    disk.verified = msgspec.structs.replace(accepted, models=(*accepted.models, first))
    assert disk.judge() == Judged(refused={}, undecided={})
    disk.floors = msgspec.structs.replace(disk.floors, releases={"digits": 2})
    assert list(disk.judge().refused) == [first.manifest_digest]


def test_floors_of_nothing_are_no_harm(disk: Disk) -> None:
    disk.floors = Floors()
    assert disk.judge() == Judged(refused={}, undecided={})
