"""Assignments against a real database, with a link that can be down and a fleet that is written down here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud_hub.ground import audit
from cloud_hub.ground.bus import DeviceBorn, DeviceReported
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases.assigning import READABLE_ASSIGNMENTS
from cloud_hub.releases.desk import Outcome, Selector
from cloud_hub.releases.rules import Named, Skipped
from shared.errors import Conflict, InvalidValue
from shared.ids import DeviceId, FamilyName, ModelVersion
from shared.release import Assignment
from shared.trust import repository
from shared.trust.assignment import verify_assignment
from tests.fakes.release_room import ReleaseRoom

DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ReleaseRoom]:
    room = ReleaseRoom(tmp_path)
    for name in ("one", "two"):
        room.fleet.add(name)
    room.make_ready("1.0.0")
    asyncio.run(room.publish("1.0.0"))
    yield room
    room.close()


def assign(room: ReleaseRoom, *, family: str = "digits", version: str = "1.0.0", **fields: Any) -> Outcome:
    selector = Selector(family=FamilyName(family), version=ModelVersion(version), **(fields or {"all": True}))
    return asyncio.run(room.desk.assigning.assign(selector, actor="token:test"))


def verified(room: ReleaseRoom, index: int = -1, *, device: str | None = None) -> Assignment:
    """What went out, as the device would read it."""
    topic, document = room.outgoing.documents()[index]
    root = repository.read_root(asyncio.run(room.desk.root()).encode()).signed
    name = device or topic.split("/")[2]
    assert topic == f"outrider/1/{name}/down/assignment"
    return verify_assignment(document, root=root, device=DeviceId(name), now_ms=room.clock.wall, floor=0, previous=None)


def test_several_releases_are_assigned_as_one_set(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0", family="faces")
    asyncio.run(room.publish("1.0.0", family="faces"))
    faces = Named(family=FamilyName("faces"), version=ModelVersion("1.0.0"))
    assign(room, together=(faces,), devices=("one",))
    document = verified(room)
    assert [model.family for model in document.models] == ["digits", "faces"]
    assert document.together == (("digits", "faces"),)
    # The same again is the same document; taken out of the set it is another one.
    assert assign(room, together=(faces,), devices=("one",)).assigned[0].version == 1
    assert assign(room, devices=("one",)).assigned[0].version == 1
    assert assign(room, together=(), devices=("one",)).assigned[0].version == 2
    assert verified(room).together == ()


def test_a_set_with_a_release_that_is_not_published_is_refused_as_a_whole(room: ReleaseRoom) -> None:
    faces = Named(family=FamilyName("faces"), version=ModelVersion("1.0.0"))
    with pytest.raises(NotFound):
        assign(room, together=(faces,), all=True)
    assert room.outgoing.documents() == []


def look(room: ReleaseRoom) -> None:
    asyncio.run(room.desk.assigning.look())


def test_every_device_gets_its_own_signed_document(room: ReleaseRoom) -> None:
    outcome = assign(room)
    assert [(a.device, a.version) for a in outcome.assigned] == [("one", 1), ("two", 1)]
    assert len(room.outgoing.sent) == 2
    first = verified(room, 0, device="one")
    assert [model.version for model in first.models] == ["1.0.0"]
    row = asyncio.run(room.desk.catalogue.get("digits", "1.0.0"))
    assert first.models[0].manifest == row.files[0]
    assert first.expires_ms - first.issued_ms == 30 * DAY_MS
    actions = [
        (entry.action, entry.subject)
        for entry in room.database.read_now(lambda conn: audit.entries(conn, after=0, limit=50))
    ]
    assert actions[-2:] == [("assignment.assigned", "device:one"), ("assignment.assigned", "device:two")]


def test_the_same_assignment_again_makes_no_new_document(room: ReleaseRoom) -> None:
    assign(room)
    outcome = assign(room)
    assert [a.version for a in outcome.assigned] == [1, 1]
    forced = assign(room, devices=("one",), force=True)
    assert [a.version for a in forced.assigned] == [2]
    assert verified(room).force == ("digits",)


def test_other_families_stay_assigned_and_versions_grow(room: ReleaseRoom) -> None:
    assign(room)
    room.make_ready("2.0.0", family="faces")
    asyncio.run(room.publish("2.0.0", family="faces"))
    assign(room, family="faces", version="2.0.0", devices=("two",))
    both = verified(room, device="two")
    assert both.version == 2
    assert [(model.family, model.version) for model in both.models] == [("digits", "1.0.0"), ("faces", "2.0.0")]


def test_unknown_devices_are_skipped_with_the_reason(room: ReleaseRoom) -> None:
    outcome = assign(room, devices=("one", "nobody"))
    assert [a.device for a in outcome.assigned] == ["one"]
    assert outcome.skipped == (Skipped("nobody", "unknown"),)
    room.fleet.add("three", labels={"site": "roof"})
    assert [a.device for a in assign(room, labels={"site": "roof"}).assigned] == ["three"]


def test_only_published_releases_above_the_floor_can_be_assigned(room: ReleaseRoom) -> None:
    with pytest.raises(NotFound):
        assign(room, version="9.9.9")
    room.make_ready("1.1.0", min_release_counter=2)
    with pytest.raises(Conflict) as early:
        assign(room, version="1.1.0")
    assert early.value.code == "conflict.not_published"
    asyncio.run(room.publish("1.1.0"))
    with pytest.raises(Conflict) as low:
        assign(room, version="1.0.0")
    assert low.value.code == "conflict.floor"
    assert assign(room, version="1.1.0").assigned
    with pytest.raises(InvalidValue):
        assign(room, version="1.1.0", devices=("one",), all=True)


def test_offline_devices_get_it_when_they_are_born(room: ReleaseRoom) -> None:
    room.fleet.add("one", online=False)
    assign(room, devices=("one",))
    assert room.outgoing.sent == []
    asyncio.run(room.bus.publish(DeviceBorn(device=DeviceId("one"), assignment_version=0, boot=1)))
    assert verified(room, device="one").version == 1


def test_a_lagging_device_is_sent_its_assignment_at_a_bounded_rate(room: ReleaseRoom) -> None:
    assign(room, devices=("one",))
    behind = DeviceReported(device=DeviceId("one"), assignment_version=0, models=())
    asyncio.run(room.bus.publish(behind))
    assert len(room.outgoing.sent) == 1
    room.clock.advance(5_000)
    asyncio.run(room.bus.publish(behind))
    asyncio.run(room.bus.publish(behind))
    assert len(room.outgoing.sent) == 2
    room.clock.advance(5_000)
    asyncio.run(room.bus.publish(DeviceReported(device=DeviceId("one"), assignment_version=1, models=())))
    asyncio.run(room.bus.publish(DeviceBorn(device=DeviceId("two"), assignment_version=0, boot=1)))
    assert len(room.outgoing.sent) == 2


def test_without_a_link_nothing_is_lost(room: ReleaseRoom) -> None:
    room.outgoing.up = False
    assert len(assign(room).assigned) == 2
    room.outgoing.up = True
    look(room)
    assert len(room.outgoing.sent) == 2
    room.clock.advance(60_000)
    room.fleet.add("one", assignment_version=1)
    look(room)
    assert len(room.outgoing.sent) == 3
    assert verified(room, device="two").version == 1


def test_assignments_are_renewed_at_half_of_their_life(room: ReleaseRoom) -> None:
    assign(room, force=True, devices=("one",))
    room.fleet.add("one", assignment_version=1)
    room.clock.advance(15 * DAY_MS - 1)
    look(room)
    assert len(room.outgoing.sent) == 1
    room.clock.advance(1)
    look(room)
    renewed = verified(room, device="one")
    assert (renewed.version, renewed.force) == (2, ())
    assert renewed.expires_ms == room.clock.wall + 30 * DAY_MS


def test_a_hub_from_a_backup_passes_what_its_devices_have_seen(room: ReleaseRoom) -> None:
    assign(room)
    room.fleet.add("one", assignment_version=7)
    room.clock.advance(60_000)
    look(room)
    assert {
        row.assignment.device: row.assignment.version
        for row in asyncio.run(room.desk.assigning.page(after="", limit=10))
    } == {"one": 8, "two": 1}


def test_a_device_that_claims_the_last_version_stops_nobody(room: ReleaseRoom) -> None:
    room.fleet.add("one", assignment_version=2**53 - 2)
    assign(room)
    room.fleet.add("one", assignment_version=2**53 - 1)
    outcome = assign(room, all=True, force=True)
    assert {assigned.device for assigned in outcome.assigned} == {"one", "two"}
    room.clock.advance(20 * DAY_MS)
    look(room)
    assert all(
        row.assignment.issued_ms == room.clock.wall for row in asyncio.run(room.desk.assigning.page(after="", limit=10))
    )


def test_assignments_are_listed_by_device(room: ReleaseRoom) -> None:
    assign(room)
    assign(room, all=True, force=True)
    page = asyncio.run(room.desk.assigning.page(after="one", limit=10))
    assert [(row.assignment.device, row.assignment.version) for row in page] == [("two", 2)]


def may_read(room: ReleaseRoom, device: str, digest: str) -> bool:
    return asyncio.run(room.desk.assigning.may_read(DeviceId(device), digest))


def test_a_device_reads_files_of_what_is_assigned_to_it_and_of_nothing_else(room: ReleaseRoom) -> None:
    row = asyncio.run(room.desk.catalogue.get("digits", "1.0.0"))
    files = [file.digest for file in row.files]
    assert len(files) > 2  # manifest, golden set, variants
    assert not any(may_read(room, "one", digest) for digest in files)
    assign(room, devices=("one",))
    assert all(may_read(room, "one", digest) for digest in files)
    assert not any(may_read(room, "two", digest) for digest in files)
    assert not may_read(room, "one", row.push.model) or row.push.model in files
    assert may_read(room, "two", "0" * 64)  # belongs to no release: a task of a federated run, for instance


def test_a_device_that_is_still_at_the_assignment_before_may_finish_it(room: ReleaseRoom) -> None:
    room.make_ready("2.0.0")
    asyncio.run(room.publish("2.0.0"))
    only_old = {file.digest for file in asyncio.run(room.desk.catalogue.get("digits", "1.0.0")).files}
    only_old -= {file.digest for file in asyncio.run(room.desk.catalogue.get("digits", "2.0.0")).files}
    assert only_old
    assign(room, devices=("one",))
    assign(room, version="2.0.0", devices=("one",))
    assert all(may_read(room, "one", digest) for digest in only_old)
    for _ in range(READABLE_ASSIGNMENTS):
        assign(room, version="2.0.0", devices=("one",), force=True)
    assert not any(may_read(room, "one", digest) for digest in only_old)
