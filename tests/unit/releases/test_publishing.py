"""Publishing against a real database: what signatures open, what they do not, and what two at once come to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_hub.ground import audit
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases.desk import found
from shared.errors import Conflict, InvalidValue, OutriderError, StorageError, TrustError
from shared.ids import FamilyName
from shared.model import decode_manifest
from shared.trust import repository
from shared.trust.library import CryptoSigner
from tests.fakes.release_room import ReleaseRoom

DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ReleaseRoom]:
    room = ReleaseRoom(tmp_path)
    yield room
    room.close()


def proposal(room: ReleaseRoom, version: str = "1.0.0") -> Any:
    return asyncio.run(room.desk.publishing.proposal("digits", version))


def publish(room: ReleaseRoom, targets: str | None, role: str, *, version: str = "1.0.0") -> Any:
    return asyncio.run(room.desk.publishing.publish("digits", version, targets=targets, role=role, actor="token:test"))


def refusal(room: ReleaseRoom, targets: str | None, role: str, *, version: str = "1.0.0") -> OutriderError:
    before = state(room)
    with pytest.raises(OutriderError) as caught:
        publish(room, targets, role, version=version)
    assert state(room) == before, "a refused release leaves no trace"
    return caught.value


def state(room: ReleaseRoom) -> Any:
    from cloud_hub.releases import tables

    return room.database.read_now(tables.newest_metadata)


def metadata(room: ReleaseRoom, name: str) -> bytes:
    return asyncio.run(room.desk.publishing.metadata(name))


def test_a_founded_repository_serves_its_first_metadata(room: ReleaseRoom) -> None:
    for name in ("1.root.json", "1.targets.json", "1.snapshot.json", "timestamp.json"):
        assert metadata(room, name).startswith(b"{")
    root = repository.read_root(asyncio.run(room.desk.root()).encode())
    assert root.signed.version == 1
    for name, kind in (("2.root.json", NotFound), ("targets.json", InvalidValue), ("../hub.db", InvalidValue)):
        with pytest.raises(kind):
            metadata(room, name)


def test_a_second_founding_and_a_false_root_are_refused(room: ReleaseRoom) -> None:
    root, targets = metadata(room, "1.root.json"), metadata(room, "1.targets.json")
    keys: dict[str, Any] = {"snapshot": room.keys.snapshot, "timestamp": room.keys.timestamp, "now_ms": room.clock.wall}
    with pytest.raises(Conflict):
        found(room.database, root=root, targets=targets, **keys)
    forged = repository.sign(repository.new_targets(now_ms=room.clock.wall), CryptoSigner.generate_ed25519())
    with pytest.raises(TrustError):
        found(room.database, root=root, targets=forged, **keys)


def test_a_proposal_holds_what_the_signer_needs(room: ReleaseRoom) -> None:
    row = room.make_ready("1.0.0")
    found_one = proposal(room)
    assert found_one.release == row
    assert found_one.role is None
    assert found_one.root_version == 1
    assert decode_manifest(found_one.manifest.encode()).version == "1.0.0"
    assert found_one.targets.encode() == metadata(room, "1.targets.json")


def test_only_ready_models_have_proposals(room: ReleaseRoom) -> None:
    with pytest.raises(NotFound):
        proposal(room)


def test_a_signed_release_appears_with_all_its_metadata_at_once(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    row = asyncio.run(room.publish("1.0.0"))
    assert row.published_ms == room.clock.wall
    assert row.published_by == "token:test"
    role = repository.read_targets(metadata(room, "1.models%2Fdigits.json"), role="models/digits")
    assert sorted(role.signed.targets) == sorted(file.path for file in row.files)
    assert metadata(room, "1.models/digits.json") == metadata(room, "1.models%2Fdigits.json")
    snapshot = repository.read_snapshot(metadata(room, "2.snapshot.json"))
    assert {name: meta.version for name, meta in snapshot.signed.meta.items()} == {
        "targets.json": 2,
        "models/digits.json": 1,
    }
    timestamp = repository.read_timestamp(metadata(room, "timestamp.json"))
    assert (timestamp.signed.version, timestamp.signed.snapshot_meta.version) == (2, 2)
    actions = [entry.action for entry in room.database.read_now(lambda c: audit.entries(c, after=0, limit=50))]
    assert actions == ["repository.founded", "release.published"]


def test_a_second_release_needs_only_the_release_key(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    room.make_ready("1.1.0")
    asyncio.run(room.publish("1.0.0"))
    targets, role = room.operator.sign(proposal(room, "1.1.0"), now_ms=room.clock.wall)
    assert targets is None
    publish(room, targets, role, version="1.1.0")
    signed = repository.read_targets(role.encode(), role="models/digits").signed
    assert signed.version == 2
    assert len(signed.targets) == 6


def test_publishing_the_same_again_changes_nothing(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    targets, role = room.operator.sign(proposal(room), now_ms=room.clock.wall)
    first = publish(room, targets, role)
    before = state(room)
    assert publish(room, targets, role) == first
    assert state(room) == before
    other_targets, other_role = targets, role.replace("}", "} ", 1)
    with pytest.raises(Conflict) as again:
        publish(room, other_targets, other_role)
    assert again.value.code == "conflict.published"


def test_a_wrong_key_is_refused(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    targets, role = room.operator.sign(proposal(room), now_ms=room.clock.wall, release=CryptoSigner.generate_ed25519())
    assert refusal(room, targets, role).code == "trust.signature"
    room.operator.targets = CryptoSigner.generate_ed25519()
    targets, role = room.operator.sign(proposal(room), now_ms=room.clock.wall)
    assert refusal(room, targets, role).code == "trust.signature"


def test_an_altered_byte_is_refused(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    targets, role = room.operator.sign(proposal(room), now_ms=room.clock.wall)
    length = room.make_ready("1.0.1").files[0].length
    altered = role.replace(f'"length": {length}', f'"length": {length + 1}')
    altered = altered.replace(f'"length":{length}', f'"length":{length + 1}')
    assert altered != role
    assert refusal(room, targets, altered).code == "trust.signature"
    assert refusal(room, targets, "{").code == "trust.malformed"
    assert refusal(room, targets, "\ud800".encode("utf-8", "replace").decode()).code == "trust.malformed"


def test_a_skipped_version_is_refused(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    asyncio.run(room.publish("1.0.0"))
    room.make_ready("1.1.0")
    now = proposal(room, "1.1.0")
    manifest = decode_manifest(now.manifest.encode())
    role = repository.read_targets(now.role.encode(), role="models/digits")
    following = repository.add_release(role, manifest, now_ms=room.clock.wall)
    following.signed.version += 1
    signed = repository.sign(following, room.operator.release).decode()
    assert refusal(room, None, signed, version="1.1.0").code == "conflict.metadata_version"


def test_a_removed_or_changed_file_is_refused(room: ReleaseRoom) -> None:
    first = room.make_ready("1.0.0")
    asyncio.run(room.publish("1.0.0"))
    room.make_ready("1.1.0")
    now = proposal(room, "1.1.0")
    manifest = decode_manifest(now.manifest.encode())
    for change in ("remove", "alter"):
        role = repository.add_release(
            repository.read_targets(now.role.encode(), role="models/digits"), manifest, now_ms=room.clock.wall
        )
        if change == "remove":
            del role.signed.targets[first.files[1].path]
        else:
            role.signed.targets[first.files[1].path].length += 1
        signed = repository.sign(role, room.operator.release).decode()
        assert refusal(room, None, signed, version="1.1.0").code == "conflict.release"


def test_files_that_were_not_built_are_refused(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    now = proposal(room)
    manifest = decode_manifest(now.manifest.encode())
    variant = manifest.variants[0]
    extra = msgspec.structs.replace(
        variant, name="int8", file=msgspec.structs.replace(variant.file, path="models/digits/1.0.0/int8.onnx")
    )
    for changed, code in (
        (msgspec.structs.replace(manifest, variants=(variant, extra)), "trust."),
        (msgspec.structs.replace(manifest, labels=tuple("0123456789")[::-1]), "trust.digest"),
    ):
        targets, role = room.operator.sign(now, now_ms=room.clock.wall, manifest=changed)
        assert refusal(room, targets, role).code.startswith(code)


def test_targets_may_not_touch_other_families_in_passing(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    room.make_ready("1.0.0", family="faces")
    asyncio.run(room.publish("1.0.0", family="faces"))
    now = proposal(room)
    thief = repository.RoleKeys(keys=(CryptoSigner.generate_ed25519().public_key,))
    mine = repository.RoleKeys(keys=(room.operator.release.public_key,))
    current = repository.read_targets(now.targets.encode())
    role = room.operator.sign(now, now_ms=room.clock.wall)[1]
    for name in ("faces", "others"):
        changed = repository.delegate_family(current, FamilyName("digits"), mine, now_ms=room.clock.wall)
        changed = repository.delegate_family(changed, FamilyName(name), thief, now_ms=room.clock.wall)
        changed.signed.version -= 1
        signed = repository.sign(changed, room.operator.targets).decode()
        assert refusal(room, signed, role).code == "trust.delegation"


def test_of_two_publications_at_once_one_wins(room: ReleaseRoom) -> None:
    for version in ("1.0.0", "1.1.0", "1.2.0"):
        room.make_ready(version)
    asyncio.run(room.publish("1.0.0"))
    signed = {
        version: room.operator.sign(proposal(room, version), now_ms=room.clock.wall)[1]
        for version in ("1.1.0", "1.2.0")
    }

    async def both() -> list[Any]:
        return await asyncio.gather(
            *(
                room.desk.publishing.publish("digits", version, targets=None, role=role, actor="token:test")
                for version, role in signed.items()
            ),
            return_exceptions=True,
        )

    outcomes = asyncio.run(both())
    lost = [outcome for outcome in outcomes if isinstance(outcome, Conflict)]
    assert len(lost) == 1
    assert lost[0].code == "conflict.metadata_version"
    loser = next(v for v, outcome in zip(signed, outcomes, strict=True) if isinstance(outcome, Conflict))
    asyncio.run(room.publish(loser))
    assert repository.read_snapshot(metadata(room, "4.snapshot.json")).signed.meta["models/digits.json"].version == 3


def test_a_file_that_is_gone_from_the_store_stops_the_publication(room: ReleaseRoom) -> None:
    row = room.make_ready("1.0.0")
    targets, role = room.operator.sign(proposal(room), now_ms=room.clock.wall)
    blob = room.desk.blobs.find(row.files[2].digest)
    assert blob is not None
    blob.path.unlink()
    assert isinstance(refusal(room, targets, role), StorageError)


def test_online_metadata_is_renewed_at_half_of_its_life(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    asyncio.run(room.publish("1.0.0"))
    renew = room.desk.publishing.renew
    assert asyncio.run(renew()) is False
    room.clock.advance(DAY_MS // 2)
    assert asyncio.run(renew()) is True
    timestamp = repository.read_timestamp(metadata(room, "timestamp.json"))
    assert (timestamp.signed.version, timestamp.signed.snapshot_meta.version) == (3, 2)
    room.clock.advance(3 * DAY_MS)
    assert asyncio.run(renew()) is True
    timestamp = repository.read_timestamp(metadata(room, "timestamp.json"))
    assert (timestamp.signed.version, timestamp.signed.snapshot_meta.version) == (4, 3)
    snapshot = repository.read_snapshot(metadata(room, "3.snapshot.json"))
    assert set(snapshot.signed.meta) == {"targets.json", "models/digits.json"}


def test_old_online_metadata_is_forgotten_and_offline_metadata_is_kept(room: ReleaseRoom) -> None:
    for _ in range(40):
        room.clock.advance(DAY_MS * 4)
        asyncio.run(room.desk.publishing.renew())
    assert metadata(room, "1.root.json")
    assert metadata(room, "1.targets.json")
    assert metadata(room, "41.snapshot.json")
    assert metadata(room, "25.snapshot.json")
    with pytest.raises(NotFound):
        metadata(room, "24.snapshot.json")
