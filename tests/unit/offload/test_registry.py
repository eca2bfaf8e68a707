"""A family is a model, a release a version; without one, the newest published is meant."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_hub.offload.registry import FRESH_US, Registry, Release
from shared.errors import ModelError, StorageError
from tests.fakes.classifier import export, golden, train
from tests.fakes.release_room import ReleaseRoom


class Hands:
    """A clock in microseconds that a test moves."""

    def __init__(self) -> None:
        self.us = 1

    def __call__(self) -> int:
        return self.us


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ReleaseRoom]:
    room = ReleaseRoom(tmp_path)
    yield room
    room.close()


def find(
    room: ReleaseRoom,
    family: str = "digits",
    version: str = "",
    *,
    registry: Registry | None = None,
    candidates: bool = True,
) -> Release:
    registry = registry or Registry(releases=room.desk, now_us=Hands())
    return asyncio.run(registry.find(family, version, candidates=candidates))


def unknown(room: ReleaseRoom, family: str = "digits", version: str = "", *, candidates: bool = True) -> None:
    with pytest.raises(ModelError) as refused:
        find(room, family, version, candidates=candidates)
    assert refused.value.code == "model.unknown"


def test_the_newest_published_version_is_served_else_the_newest_that_is_ready(room: ReleaseRoom) -> None:
    unknown(room)
    for version in ("1.10.0", "1.9.0"):
        room.make_ready(version)
    assert find(room).manifest.version == "1.9.0"
    asyncio.run(room.publish("1.10.0"))
    assert find(room).manifest.version == "1.10.0"
    assert find(room).versions == ("1.10.0", "1.9.0")
    assert find(room, version="1.9.0").manifest.version == "1.9.0"


def test_without_candidates_there_is_only_what_somebody_signed(room: ReleaseRoom) -> None:
    for version in ("1.0.0", "1.1.0"):
        room.make_ready(version)
    registry = Registry(releases=room.desk, now_us=Hands())
    assert find(room, registry=registry).manifest.version == "1.1.0"
    for version in ("", "1.0.0"):
        with pytest.raises(ModelError):
            find(room, version=version, registry=registry, candidates=False)
    asyncio.run(room.publish("1.0.0"))
    published = find(room, candidates=False)
    assert (published.manifest.version, published.versions) == ("1.0.0", ("1.0.0",))
    unknown(room, version="1.1.0", candidates=False)
    assert find(room, version="1.1.0").manifest.version == "1.1.0"


def test_what_is_not_there_or_no_name_is_unknown(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    for family, version in (("other", ""), ("digits", "9.0.0"), ("digits", "latest"), ("Digits", ""), ("..", "1.0.0")):
        unknown(room, family, version)


def test_what_is_being_built_is_not_there_yet(room: ReleaseRoom) -> None:
    push = room.push(model=export(train(rounds=1)), golden=golden(10, seed=1))
    asyncio.run(room.desk.catalogue.push(push, actor="test"))
    unknown(room)
    unknown(room, version="1.0.0")


def test_a_name_is_looked_up_once_in_a_while(room: ReleaseRoom) -> None:
    hands = Hands()
    registry = Registry(releases=room.desk, now_us=hands)
    room.make_ready("1.0.0")
    assert find(room, registry=registry).manifest.version == "1.0.0"
    room.make_ready("1.1.0")
    assert find(room, registry=registry).manifest.version == "1.0.0"
    hands.us += FRESH_US
    assert find(room, registry=registry).manifest.version == "1.1.0"


def test_files_are_hashed_again_before_they_are_loaded(room: ReleaseRoom) -> None:
    room.make_ready("1.0.0")
    manifest = find(room).manifest
    blob = room.desk.blobs.find(manifest.variants[0].file.digest)
    assert blob is not None
    blob.path.write_bytes(b"other bytes")
    with pytest.raises(StorageError) as refused:
        Registry(releases=room.desk, now_us=Hands()).files(manifest)
    assert refused.value.code == "storage.corrupt"
