"""A device's own verification of what the releases room publishes and assigns: both ends of the trust meet here."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_hub.ground.problems import NotFound
from cloud_hub.releases.desk import Selector
from shared.errors import TrustError
from shared.ids import DeviceId, FamilyName, ModelVersion
from shared.wire.verification import Need
from tests.fakes.release_room import ReleaseRoom
from tests.fakes.trust_repository import Device

DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ReleaseRoom]:
    room = ReleaseRoom(tmp_path)
    room.fleet.add("one")
    yield room
    room.close()


def serve(room: ReleaseRoom, need: Need) -> bytes | None:
    """As a device asks over HTTPS: metadata by name, a release's files by digest."""
    if need.file is not None:
        return room.desk.blobs.read(need.file.digest, max_bytes=need.max_bytes)
    try:
        return asyncio.run(room.desk.publishing.metadata(need.name))
    except NotFound:
        return None


def assign(room: ReleaseRoom, version: str) -> bytes:
    selector = Selector(family=FamilyName("digits"), version=ModelVersion(version), all=True)
    asyncio.run(room.desk.assigning.assign(selector, actor="token:test"))
    return room.outgoing.documents()[-1][1]


def accepts(room: ReleaseRoom, device: Device, document: bytes) -> list[str]:
    verified = device.verify(document, lambda need: serve(room, need), wall_ms=room.clock.wall, time_attested=True)
    return [model.manifest.version for model in verified.models]


def test_a_device_accepts_releases_renewals_and_the_next_release(room: ReleaseRoom) -> None:
    device = Device(asyncio.run(room.desk.root()).encode(), name=DeviceId("one"))
    room.make_ready("1.0.0")
    asyncio.run(room.publish("1.0.0"))
    first = assign(room, "1.0.0")
    assert accepts(room, device, first) == ["1.0.0"]
    room.clock.advance(4 * DAY_MS)
    with pytest.raises(TrustError) as frozen:
        accepts(room, device, first)
    assert frozen.value.code == "trust.freeze"
    asyncio.run(room.desk.publishing.renew())
    assert accepts(room, device, first) == ["1.0.0"]
    room.make_ready("1.1.0")
    asyncio.run(room.publish("1.1.0"))
    second = assign(room, "1.1.0")
    assert accepts(room, device, second) == ["1.1.0"]
    with pytest.raises(TrustError) as older:
        accepts(room, device, first)
    assert older.value.code == "trust.rollback"


def test_a_device_refuses_what_was_assigned_to_another(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    asyncio.run(room.publish("1.0.0"))
    other = Device(asyncio.run(room.desk.root()).encode(), name=DeviceId("two"))
    with pytest.raises(TrustError) as refusal:
        accepts(room, other, assign(room, "1.0.0"))
    assert refusal.value.code == "trust.wrong_device"
