"""Changes of keys against a real database, and what a real device makes of them: the thief's side and the owner's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_hub.ground import audit
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases import tables
from cloud_hub.releases.desk import Selector
from shared.errors import ConfigError, Conflict, InvalidValue, OutriderError, TrustError
from shared.ids import DeviceId, FamilyName, ModelVersion
from shared.release import AssignedModel
from shared.trust import ceremony, repository
from shared.trust.assignment import sign_assignment
from shared.trust.library import CryptoSigner, Metadata, Targets
from shared.trust.repository import RoleKeys
from shared.trust.roles import file_name
from shared.wire.verification import Need
from tests.fakes.release_room import ReleaseRoom
from tests.fakes.trust_repository import Device, make_manifest

DIGITS, FIRST = FamilyName("digits"), ModelVersion("1.0.0")
ROLE = "models/digits"


def new_key() -> CryptoSigner:
    return CryptoSigner.generate_ed25519()


def public(*signers: CryptoSigner, threshold: int = 1) -> RoleKeys:
    return RoleKeys(keys=tuple(signer.public_key for signer in signers), threshold=threshold)


class Owners:
    """A room with one published release, its device, and everybody's keys."""

    def __init__(self, folder: Path) -> None:
        self.room = ReleaseRoom(folder)
        self.room.fleet.add("one")
        self.root_keys: list[CryptoSigner] = [self.room.operator.root]
        self.served: dict[str, bytes] = {}
        self.room.make_ready(FIRST)
        asyncio.run(self.room.publish(FIRST))
        self.device = Device(asyncio.run(self.room.desk.root()).encode(), name=DeviceId("one"))

    @property
    def now_ms(self) -> int:
        return self.room.clock.wall

    def current(self) -> dict[str, bytes]:
        rows = self.room.database.read_now(tables.newest_metadata)
        return {role: row.document for role, row in rows.items()}

    def next_root(self, changes: Mapping[str, RoleKeys]) -> Metadata[Any]:
        return ceremony.next_root(repository.read_root(self.current()["root"]), changes, now_ms=self.now_ms)

    def next_targets(self, changes: Mapping[str, RoleKeys]) -> Metadata[Targets]:
        return ceremony.next_targets(repository.read_targets(self.current()["targets"]), changes, now_ms=self.now_ms)

    def next_role(self) -> Metadata[Targets]:
        return ceremony.next_role(repository.read_targets(self.current()[ROLE], role=ROLE), now_ms=self.now_ms)

    def change(self, **parts: bytes) -> Any:
        """Send a change in, as an admin."""
        pieces = {role.replace("models_", "models/"): data.decode() for role, data in parts.items()}
        return asyncio.run(self.room.desk.publishing.change_keys(pieces, actor="token:admin"))

    def refused(self, **parts: bytes) -> OutriderError:
        before = self.room.database.read_now(tables.newest_metadata)
        with pytest.raises(OutriderError) as caught:
            self.change(**parts)
        assert self.room.database.read_now(tables.newest_metadata) == before, "a refused change leaves no trace"
        return caught.value

    def rotate(self, *roles: str, root: list[CryptoSigner] | None = None) -> None:
        """Give the hub new keys for these online roles, or the root other keys, and publish that."""
        changes = {}
        for role in roles:
            self.room.ring[role] = [new_key()]
            changes[role] = public(*self.room.ring[role])
        signers = self.root_keys
        if root is not None:
            changes["root"] = public(*root, threshold=len(root))
            signers, self.root_keys = [*self.root_keys, *root], root
        self.change(root=repository.sign(self.next_root(changes), *signers))

    def serve(self, need: Need) -> bytes | None:
        if need.file is not None:
            return self.room.desk.blobs.read(need.file.digest, max_bytes=need.max_bytes)
        if need.name in self.served:
            return self.served[need.name]
        try:
            return asyncio.run(self.room.desk.publishing.metadata(need.name))
        except NotFound:
            return None

    def assign(self) -> bytes:
        selector = Selector(family=DIGITS, version=FIRST, all=True)
        asyncio.run(self.room.desk.assigning.assign(selector, actor="token:test"))
        return self.room.outgoing.documents()[-1][1]

    def look(self) -> bytes:
        """What the hub sends after its next look."""
        asyncio.run(self.room.desk.assigning.look())
        return self.room.outgoing.documents()[-1][1]

    def verify(self, document: bytes) -> Any:
        return self.device.verify(document, self.serve, wall_ms=self.now_ms, time_attested=True)

    def device_refuses(self, document: bytes) -> str:
        with pytest.raises(OutriderError) as caught:
            self.verify(document)
        return caught.value.code


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[Owners]:
    owners = Owners(tmp_path)
    yield owners
    owners.room.close()


def test_a_change_appears_at_once_with_everything_under_it_and_only_once(owners: Owners) -> None:
    owners.room.ring["timestamp"].append(new_key())
    root = repository.sign(owners.next_root({"timestamp": public(owners.room.ring["timestamp"][1])}), *owners.root_keys)
    assert owners.change(root=root).is_new
    assert not owners.change(root=root).is_new
    stamped = repository.read_timestamp(owners.current()["timestamp"])
    assert set(stamped.signatures) == {owners.room.ring["timestamp"][1].public_key.keyid}
    actions = [row.action for row in owners.room.database.read_now(lambda conn: audit.entries(conn, after=0, limit=50))]
    assert actions.count("keys.changed") == 1
    assert asyncio.run(owners.room.desk.root()).encode() == root


def test_a_root_whose_online_keys_are_not_here_is_not_published(owners: Owners) -> None:
    root = repository.sign(owners.next_root({"snapshot": public(new_key())}), *owners.root_keys)
    assert isinstance(owners.refused(root=root), ConfigError)


def test_assignments_are_signed_again_by_themselves_after_a_change(owners: Owners) -> None:
    before = owners.assign()
    owners.verify(before)
    owners.rotate("assignment")
    assert owners.device_refuses(before) == "trust.signature"
    document = owners.look()
    assert document != before
    owners.verify(document)
    sent = len(owners.room.outgoing.sent)
    owners.room.fleet.add("one", assignment_version=2)
    asyncio.run(owners.room.desk.assigning.look())
    assert len(owners.room.outgoing.sent) == sent, "once is enough"


def test_a_restarted_hub_signs_what_an_earlier_one_could_not(owners: Owners) -> None:
    """The root was published while no hub ran, by the command line."""
    before = owners.assign()
    owners.rotate("assignment")
    owners.room.desk = owners.room.open_desk()
    document = owners.look()
    assert document != before
    owners.verify(document)


def test_a_device_that_slept_through_three_roots_follows_them(owners: Owners) -> None:
    owners.verify(owners.assign())
    owners.rotate("assignment", root=[new_key(), new_key()])
    owners.rotate("timestamp", "snapshot")
    owners.rotate(root=[new_key(), new_key(), new_key()])
    verified = owners.verify(owners.look())
    assert owners.device.asked[:4] == ["2.root.json", "3.root.json", "4.root.json", "5.root.json"]
    assert verified.floors.roles["root"] == 4


def test_attack_4_fast_forward_by_a_stolen_timestamp_key_is_undone_by_a_new_one(owners: Owners) -> None:
    document = owners.assign()
    owners.verify(document)
    stolen = owners.room.ring["timestamp"][0]
    stamped = repository.read_timestamp(owners.current()["timestamp"])
    stamped.signed.version = 10**9
    owners.served["timestamp.json"] = repository.sign(stamped, stolen)
    owners.verify(document)
    owners.served.clear()
    assert owners.device_refuses(document) == "trust.rollback"
    owners.rotate("timestamp", "snapshot")
    floors = owners.verify(document).floors.roles
    assert max(floor for name, floor in floors.items() if not name.startswith("x-outrider/issued@")) < 100
    owners.served["timestamp.json"] = repository.sign(stamped, stolen)
    assert owners.device_refuses(document) == "trust.signature"


def test_attack_10_each_single_key_fails_to_change_a_key(owners: Owners) -> None:
    """Root is two of three from here on; nobody's key alone, and no hub's, makes a root that hub or device takes."""
    three = [new_key() for _ in range(3)]
    root = owners.next_root({"root": public(*three, threshold=2)})
    owners.change(root=repository.sign(root, *owners.root_keys, three[0], three[1]))
    first = owners.room.operator
    document = owners.assign()
    owners.verify(document)
    evil = owners.next_root({"assignment": public(new_key())})
    singles = [*three, first.root, first.targets, first.release, *(ring[0] for ring in owners.room.ring.values())]
    online = [ring[0] for ring in owners.room.ring.values()]
    for signers in ([], *([one] for one in singles), online, [three[0], *online, first.root, first.targets]):
        signed = repository.sign(evil, *signers)
        error = owners.refused(root=signed)
        assert error.code == "trust.signature", error
        owners.served = {file_name("root", 3): signed}
        assert owners.device_refuses(document) == "trust.signature"


def test_attack_10_the_old_threshold_and_the_new_one_must_both_have_signed(owners: Owners) -> None:
    new = [new_key(), new_key()]
    root = owners.next_root({"root": public(*new, threshold=2)})
    document = owners.assign()
    for signers in (owners.root_keys, new, [*owners.root_keys, new[0]]):
        signed = repository.sign(root, *signers)
        assert owners.refused(root=signed).code == "trust.signature"
        owners.served = {file_name("root", 2): signed}
        assert owners.device_refuses(document) == "trust.signature"
    owners.served = {}
    owners.change(root=repository.sign(root, *owners.root_keys, *new))
    owners.verify(document)


def test_attack_10_a_release_below_its_familys_threshold_is_refused(owners: Owners) -> None:
    ann, bob = new_key(), new_key()
    targets = repository.sign(owners.next_targets({ROLE: public(ann, bob, threshold=2)}), owners.room.operator.targets)
    role = owners.next_role()
    assert owners.refused(targets=targets).code == "trust.signature", "what is released must be signed again"
    assert owners.refused(targets=targets, models_digits=repository.sign(role, ann)).code == "trust.signature"
    owners.change(targets=targets, models_digits=repository.sign(role, ann, bob))
    owners.verify(owners.assign())
    owners.room.make_ready("1.1.0")
    proposal = asyncio.run(owners.room.desk.publishing.proposal("digits", "1.1.0"))
    for signers in ([ann], [bob], [owners.room.operator.release], [ann, owners.room.operator.release]):
        _, signed = owners.room.operator.sign(proposal, now_ms=owners.now_ms, release=signers[0])
        following = repository.sign(repository.read_targets(signed.encode(), role=ROLE), *signers)
        with pytest.raises(TrustError) as caught:
            asyncio.run(
                owners.room.desk.publishing.publish(
                    "digits", "1.1.0", targets=None, role=following.decode(), actor="token:test"
                )
            )
        assert caught.value.code == "trust.signature"
        waiting = ann if bob in signers else bob
        assert waiting.public_key.keyid[:12] in caught.value.message


def test_attack_10_a_family_changes_hands_only_by_the_targets_keys(owners: Owners) -> None:
    thief = new_key()
    targets, role = owners.next_targets({ROLE: public(thief)}), repository.sign(owners.next_role(), thief)
    operator = owners.room.operator
    for signer in (thief, operator.root, operator.release, *(ring[0] for ring in owners.room.ring.values())):
        error = owners.refused(targets=repository.sign(targets, signer), models_digits=role)
        assert error.code == "trust.signature"


def test_attack_19_the_hubs_own_keys_make_no_release(owners: Owners) -> None:
    """Whoever has every online key assigns a file that nobody signed offline, and lists it in a role of the family."""
    manifest = make_manifest("6.6.6", counter=9)
    ring = {name: signers[0] for name, signers in owners.room.ring.items()}
    owners.verify(owners.assign())
    row = owners.room.database.read_now(lambda conn: tables.current_assignment(conn, DeviceId("one")))
    assert row is not None
    forged = msgspec.structs.replace(
        row.assignment,
        version=row.assignment.version + 1,
        models=(AssignedModel(family=DIGITS, version=manifest.version, manifest=repository.manifest_ref(manifest)),),
    )
    evil = sign_assignment(forged, ring["assignment"])
    assert owners.device_refuses(evil) == "trust.unknown_target"
    role = repository.add_release(
        repository.read_targets(owners.current()[ROLE], role=ROLE), manifest, now_ms=owners.now_ms
    )
    signed = repository.sign(role, *ring.values())
    targets = owners.current()["targets"]
    snapshot = repository.new_snapshot(
        repository.read_snapshot(owners.current()["snapshot"]), {"targets": targets, ROLE: signed}, now_ms=owners.now_ms
    )
    listed = repository.sign(snapshot, ring["snapshot"])
    stamped = repository.new_timestamp(
        repository.read_timestamp(owners.current()["timestamp"]), listed, now_ms=owners.now_ms
    )
    owners.served = {
        file_name(ROLE, role.signed.version): signed,
        file_name("snapshot", snapshot.signed.version): listed,
        "timestamp.json": repository.sign(stamped, ring["timestamp"]),
    }
    assert owners.device_refuses(evil) == "trust.signature"
    owners.served = {}
    assert owners.refused(models_digits=signed).code == "trust.unknown_target"
    # What is left of the thief's work are high versions; new keys wash them away.
    owners.rotate("timestamp", "snapshot", "assignment")
    owners.verify(owners.look())


def test_an_online_key_never_becomes_an_offline_one(owners: Owners) -> None:
    root = owners.next_root({})
    key = owners.room.ring["snapshot"][0].public_key
    root.signed.roles["root"].keyids.append(key.keyid)
    assert owners.refused(root=repository.sign(root, *owners.root_keys)).code == "trust.keys"


def test_what_no_change_of_keys_does_is_refused(owners: Owners) -> None:
    operator = owners.room.operator
    root = owners.next_root({})
    del root.signed.unrecognized_fields["x-outrider"]["assignment"]
    assert isinstance(owners.refused(root=repository.sign(root, operator.root)), TrustError)
    root = owners.next_root({})
    root.signed.version += 1
    assert isinstance(owners.refused(root=repository.sign(root, operator.root)), Conflict)
    role = owners.next_role()
    del role.signed.targets[f"{ROLE}/1.0.0/fp32.onnx"]
    assert isinstance(owners.refused(models_digits=repository.sign(role, operator.release)), Conflict)
    assert isinstance(owners.refused(), InvalidValue)
    assert isinstance(owners.refused(snapshot=owners.current()["snapshot"]), InvalidValue)
    assert isinstance(owners.refused(models_cats=repository.sign(owners.next_role(), operator.release)), OutriderError)


def test_a_life_that_begins_anew_needs_no_other_keys(owners: Owners) -> None:
    owners.room.clock.advance(80 * 24 * 3600 * 1000)
    operator = owners.room.operator
    owners.change(root=repository.sign(owners.next_root({}), operator.root))
    owners.change(targets=repository.sign(owners.next_targets({}), operator.targets))
    owners.change(models_digits=repository.sign(owners.next_role(), operator.release))
    owners.room.clock.advance(80 * 24 * 3600 * 1000)
    asyncio.run(owners.room.desk.publishing.renew())
    owners.verify(owners.assign())
