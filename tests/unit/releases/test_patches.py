"""Patches of the releases room: which are made, with the real child, what is kept, offered, signed and collected."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud_hub.releases import patches as patches_room
from cloud_hub.releases import rules, tables
from cloud_hub.releases.desk import ReleaseSettings, Selector
from cloud_hub.releases.rules import BuiltVersion, PatchPair
from shared import limits
from shared.ids import DeviceId, Digest, FamilyName, ModelVersion
from shared.model import FileRef
from shared.patch.applying import apply
from shared.patch.format import Terms
from shared.release import Assignment, Patch
from shared.trust import repository
from shared.trust.assignment import verify_assignment
from tests.fakes.release_room import ReleaseRoom


def digest(data: bytes) -> Digest:
    return Digest(hashlib.sha256(data).hexdigest())


def serving(model: bytes, family: str = "digits") -> dict[str, Any]:
    """What a device reports that serves this file."""
    return {"models": [{"family": family, "phase": "committed", "digest": digest(model)}]}


def tuned(model: bytes, seed: int = 1) -> bytes:
    """A fine-tuned version: one byte in twenty one higher."""
    numbers = np.frombuffer(model, np.uint8)
    return bytes((numbers + (np.random.default_rng(seed).random(len(numbers)) < 0.05)).astype(np.uint8))


OLD = random.Random(1).randbytes(60_000)
NEW = tuned(OLD)


@pytest.fixture
def room(tmp_path: Path) -> Iterator[ReleaseRoom]:
    room = ReleaseRoom(tmp_path)
    room.make_ready("1.0.0", model=OLD)
    room.fleet.add("one", reported=serving(OLD))
    room.fleet.add("two")
    yield room
    room.close()


def look(room: ReleaseRoom) -> list[tables.PatchRow]:
    asyncio.run(room.desk.patches.look())
    return asyncio.run(room.database.read(tables.list_patches))


def test_a_patch_from_what_the_fleet_runs_to_the_new_version_is_made(room: ReleaseRoom) -> None:
    assert look(room) == []
    row = room.make_ready("1.1.0", model=NEW)
    (made,) = look(room)
    assert made.base == digest(OLD)
    assert made.result == digest(NEW)
    assert made.digest is not None
    patch = room.desk.blobs.read(made.digest, max_bytes=made.length)
    out = bytearray()
    apply(
        patch=lambda at, count: patch[at : at + count],
        patch_length=len(patch),
        base=lambda at, count: OLD[at : at + count],
        write=out.extend,
        terms=Terms(base=made.base, base_length=len(OLD), result=made.result, result_length=len(NEW)),
    )
    assert out == NEW
    (offered,) = asyncio.run(room.desk.patches.offered(row))
    assert (offered.path, offered.base_version) == ("models/digits/1.1.0/fp32.onnx", "1.0.0")
    assert offered.share == made.length / len(NEW) < 0.3
    assert not list((room.root / "patches").iterdir())


def test_what_does_not_pay_is_tried_once(room: ReleaseRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    room.make_ready("1.1.0", model=random.Random(2).randbytes(60_000))
    (row,) = look(room)
    assert row.digest is None
    assert row.reason == "it saves too little"
    monkeypatch.setattr(patches_room, "MODULE", "no.such.module")
    assert look(room) == [row]


def test_a_child_that_fails_costs_a_row_and_nothing_else(room: ReleaseRoom, monkeypatch: pytest.MonkeyPatch) -> None:
    room.make_ready("1.1.0", model=NEW)
    monkeypatch.setattr(patches_room, "MODULE", "no.such.module")
    (row,) = look(room)
    assert row.digest is None
    assert "ended with status 1" in row.reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (ReleaseSettings(build_deadline_ms=5), "longer than 5 ms"),
        (ReleaseSettings(build_max_rss_bytes=2**22), "ended with status"),
    ],
)
def test_a_child_is_bounded_in_time_and_memory(tmp_path: Path, settings: ReleaseSettings, reason: str) -> None:
    room = ReleaseRoom(tmp_path, settings=settings)
    room.make_ready("1.0.0", model=OLD)
    room.make_ready("1.1.0", model=NEW)
    room.fleet.add("one", reported=serving(OLD))
    (row,) = look(room)
    assert row.digest is None
    assert reason in row.reason
    room.close()


def test_a_patch_goes_when_its_version_or_its_file_goes(room: ReleaseRoom) -> None:
    room.make_ready("1.1.0", model=NEW)
    (row,) = look(room)
    assert row.digest is not None
    room.desk.blobs.forget(row.digest)
    (again,) = look(room)
    assert again.digest == row.digest, "a patch whose file is gone is made again"
    room.database.write_now(
        lambda conn: conn.execute(tables.release_files.delete().where(tables.release_files.c.digest == digest(OLD)))
    )
    assert look(room) == []
    assert room.desk.blobs.find(row.digest) is None
    assert room.desk.blobs.find(digest(NEW)) is not None


def assigned(room: ReleaseRoom, version: str) -> dict[str, Assignment]:
    selector = Selector(family=FamilyName("digits"), version=ModelVersion(version), all=True)
    asyncio.run(room.desk.assigning.assign(selector, actor="token:test"))
    rows = asyncio.run(room.desk.assigning.page(after="", limit=10))
    assert all(len(row.document) <= limits.MAX_ASSIGNMENT_BYTES for row in rows)
    root = repository.read_root(asyncio.run(room.desk.root()).encode()).signed
    return {
        row.assignment.device: verify_assignment(
            row.document, root=root, device=row.assignment.device, now_ms=room.clock.wall, floor=0
        )
        for row in rows
    }


def test_an_assignment_carries_the_patch_for_what_its_device_serves(room: ReleaseRoom) -> None:
    room.make_ready("1.1.0", model=NEW)
    (made,) = look(room)
    asyncio.run(room.publish("1.0.0"))
    asyncio.run(room.publish("1.1.0"))
    found = assigned(room, "1.1.0")
    assert found["one"].patches == (Patch(base=made.base, result=made.result, digest=made.digest, length=made.length),)  # type: ignore[arg-type]
    assert found["two"].patches == (), "a device that serves nothing has nothing to start from"
    for device, may_read in (("one", True), ("two", False)):
        assert asyncio.run(room.desk.assigning.may_read(DeviceId(device), str(made.digest))) is may_read
    assert assigned(room, "1.0.0")["one"].patches == (), "no patch leads there"


def test_what_a_device_says_of_itself_is_only_looked_up(room: ReleaseRoom) -> None:
    for odd in ({"models": [{"family": "digits", "digest": "'; drop"}]}, {"models": [3]}, {}, {"models": None}):
        room.fleet.add("odd", reported=odd)
        assert look(room) == []


def test_run_looks_when_something_was_published(room: ReleaseRoom) -> None:
    async def scenario() -> list[tables.PatchRow]:
        async with asyncio.timeout(30):
            task = asyncio.ensure_future(room.desk.patches.run())
            await asyncio.sleep(0)
            room.make_ready("1.1.0", model=NEW)
            await room.publish("1.1.0")
            while not (rows := await room.database.read(tables.list_patches)):
                await asyncio.sleep(0.02)
            task.cancel()
        return rows

    assert len(asyncio.run(scenario())) == 1


# --- the rules


def ref(version: str, name: str, content: str) -> FileRef:
    return FileRef(path=f"models/digits/{version}/{name}", length=100, digest=digest(content.encode()))


def built(version: str, counter: int, *files: FileRef) -> BuiltVersion:
    return BuiltVersion(FamilyName("digits"), ModelVersion(version), counter, files)


def test_pairs_lead_from_common_files_to_newer_versions_of_the_same_variant() -> None:
    a8, a32 = ref("1.0.0", "int8.onnx", "a8"), ref("1.0.0", "fp32.onnx", "a32")
    b8, b32 = ref("1.1.0", "int8.onnx", "b8"), ref("1.1.0", "fp32.onnx", "a32")
    versions = [built("1.0.0", 1, a8, a32), built("1.1.0", 2, b8, b32)]
    running = {("digits", a8.digest): 5, ("digits", a32.digest): 9, ("digits", b8.digest): 2, ("other", a8.digest): 9}
    assert rules.patch_pairs(versions, running) == (PatchPair(a8, b8),)


def test_pairs_are_few_and_the_most_common_come_first() -> None:
    versions = [
        built(f"{number}.0.0", number, ref(f"{number}.0.0", "int8.onnx", str(number))) for number in range(1, 9)
    ]
    running = {("digits", version.files[0].digest): 10 - version.release_counter for version in versions}
    pairs = rules.patch_pairs(versions, running)
    assert len(pairs) == rules.PATCH_BASES * rules.PATCH_TARGETS
    assert pairs[0].base == versions[0].files[0]
    assert {pair.result for pair in pairs} == {version.files[0] for version in versions[-rules.PATCH_TARGETS :]}


def test_a_patch_pays_below_a_share_of_the_packed_file() -> None:
    assert rules.patch_pays(length=59, full_packed=100)
    assert not rules.patch_pays(length=60, full_packed=100)
