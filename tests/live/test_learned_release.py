"""A release that the hub learns, measures, signs and publishes by itself, and what a device makes of it.

Real builds, a real database and blob store, the signer's and the hub's keys, and the device's whole refresh with the
comparison of the files; the head's numbers are chosen here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

onnx: Any = pytest.importorskip("onnx")

from cloud_hub.ground import audit  # noqa: E402 - after the skip
from cloud_hub.ground.problems import NotFound  # noqa: E402
from cloud_hub.releases import tables  # noqa: E402
from cloud_hub.releases.desk import ModelRow, Selector  # noqa: E402
from cloud_hub.rounds import head  # noqa: E402
from shared.errors import ConfigError, Conflict, InvalidValue, TrustError  # noqa: E402
from shared.ids import DeviceId, FamilyName, ModelVersion  # noqa: E402
from shared.learned import check_learned_file  # noqa: E402
from shared.model import Learning, Lineage  # noqa: E402
from shared.trust import ceremony, repository  # noqa: E402
from shared.trust.library import CryptoSigner  # noqa: E402
from shared.wire.verification import Need  # noqa: E402
from tests.fakes import classifier  # noqa: E402
from tests.fakes.release_room import ReleaseRoom  # noqa: E402
from tests.fakes.trust_repository import Device  # noqa: E402

pytestmark = pytest.mark.live

DIGITS = FamilyName("digits")
LEARNED = ModelVersion("1.0.0-learned.1")
WEIGHTS = classifier.train()
MODEL = classifier.export(WEIGHTS)
BOUNDS = Learning(variant="fp32", tensors=("w2", "b2"), max_shift=30.0)


def moved(shift: float) -> bytes:
    """The model with its head moved so far, all in one number of the bias."""
    bias = WEIGHTS.b2.copy()
    bias[0] += shift
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(MODEL)
        file.flush()
        return head.renumber(Path(file.name), scores="scores", weight=WEIGHTS.w2, bias=bias)


class Hub:
    """A room with a base that is open to learning, built and published, and a device that opted in."""

    def __init__(self, folder: Path) -> None:
        self.room = ReleaseRoom(folder)
        self.room.fleet.add("one")
        self.key = CryptoSigner.generate_ed25519()
        self.room.learned = self.key
        self.device = Device(asyncio.run(self.room.desk.root()).encode(), name=DeviceId("one"))
        self.device.accept_learned = True
        self.push = self.room.push(model=MODEL, golden=classifier.golden(400, seed=5), learning=BOUNDS)

    @asynccontextmanager
    async def building(self) -> AsyncIterator[None]:
        self.room.desk = self.room.open_desk()  # each run of the loop is another start of the hub
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self.room.desk.catalogue.run())
            try:
                yield
            finally:
                task.cancel()

    async def built(self, version: str) -> ModelRow:
        async with asyncio.timeout(60):
            while True:
                row = await self.room.desk.catalogue.get(DIGITS, version)
                if row.state != "building":
                    return row
                await asyncio.sleep(0.05)

    async def release_base(self) -> None:
        async with self.building():
            await self.room.desk.catalogue.push(self.push, actor="token:test")
            assert (await self.built("1.0.0")).state == "ready"
        await self.room.publish("1.0.0")

    async def allow(self, *, allowed: bool = True) -> None:
        current = self.room.database.read_now(tables.newest_metadata)
        targets = ceremony.next_targets(
            repository.read_targets(current["targets"].document),
            {},
            now_ms=self.room.clock.wall,
            learned={DIGITS: self.key.public_key if allowed else None},
        )
        signed = repository.sign(targets, self.room.operator.targets).decode()
        await self.room.desk.publishing.change_keys({"targets": signed}, actor="token:admin")

    async def learn(self, model: bytes, version: ModelVersion = LEARNED) -> ModelRow:
        blob = self.room.desk.blobs.put(model)
        await self.room.desk.catalogue.learn(
            DIGITS, "1.0.0", version=version, model=blob.digest, lineage=Lineage(), actor="token:test"
        )
        async with self.building():
            return await self.built(version)

    async def assigned(self, version: ModelVersion = LEARNED) -> bytes:
        await self.room.desk.assigning.assign(Selector(family=DIGITS, version=version, all=True), actor="token:test")
        return self.room.outgoing.documents()[-1][1]

    def serve(self, need: Need) -> bytes | None:
        if need.file is not None:
            assert asyncio.run(self.room.desk.assigning.may_read(DeviceId("one"), need.file.digest))
            return self.room.desk.blobs.read(need.file.digest, max_bytes=need.max_bytes)
        try:
            return asyncio.run(self.room.desk.publishing.metadata(need.name))
        except NotFound:
            return None

    def verify(self, document: bytes) -> Any:
        return self.device.verify(document, self.serve, wall_ms=self.room.clock.wall, time_attested=True)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One hub for the tests of this file, in their order: builds take seconds."""
    made = Hub(tmp_path_factory.mktemp("hub"))
    asyncio.run(made.release_base())
    yield made
    made.room.close()


def test_nothing_is_learned_before_people_allow_it(hub: Hub) -> None:
    with pytest.raises(Conflict, match="nobody allowed"):
        asyncio.run(hub.learn(moved(0.1)))


def test_what_is_learned_is_measured_signed_and_published_and_a_device_takes_it(hub: Hub) -> None:
    async def story() -> ModelRow:
        await hub.allow()
        row = await hub.learn(moved(0.5))
        assert row.state == "ready", row.report
        assert await hub.room.desk.publishing.publish_learned()
        assert not await hub.room.desk.publishing.publish_learned()
        return await hub.room.desk.catalogue.get(DIGITS, LEARNED)

    row = asyncio.run(story())
    base = asyncio.run(hub.room.desk.catalogue.get(DIGITS, "1.0.0"))
    assert row.published_by == "hub"
    assert row.release_counter == base.release_counter
    (model,) = hub.verify(asyncio.run(hub.assigned())).models
    assert model.manifest.lineage.metrics["head.shift"] == pytest.approx(0.5)
    assert model.ground is not None
    blobs = hub.room.desk.blobs
    ours, theirs = (
        memoryview(blobs.read(file.digest, max_bytes=file.length))
        for file in (model.ground.file, model.manifest.variants[0].file)
    )
    bounds = model.ground.bounds
    assert check_learned_file(theirs, ours, tensors=bounds.tensors, max_shift=bounds.max_shift) <= 30.0
    assert asyncio.run(hub.room.desk.assigning.may_read(DeviceId("one"), model.ground.file.digest))
    actions = [row.action for row in hub.room.database.read_now(lambda conn: audit.entries(conn, after=0, limit=99))]
    assert actions.count("release.learned") == 1


def test_a_device_that_did_not_opt_in_refuses_it(hub: Hub) -> None:
    other = Device(asyncio.run(hub.room.desk.root()).encode(), name=DeviceId("one"))
    with pytest.raises(TrustError) as caught:
        other.verify(asyncio.run(hub.assigned()), hub.serve, wall_ms=hub.room.clock.wall, time_attested=True)
    assert caught.value.code == "trust.learned_refused"


def test_a_head_that_moved_too_far_or_another_graph_is_refused_with_words(hub: Hub) -> None:
    with pytest.raises(InvalidValue, match=r"its head moved by 35, its base allows 30"):
        asyncio.run(hub.learn(moved(35), ModelVersion("1.0.0-learned.2")))
    other = classifier.export(dataclasses.replace(WEIGHTS, w1=WEIGHTS.w1 * np.float32(1.01)))
    with pytest.raises(InvalidValue, match="graph is another"):
        asyncio.run(hub.learn(other, ModelVersion("1.0.0-learned.2")))


def test_versions_say_what_they_are(hub: Hub) -> None:
    with pytest.raises(InvalidValue, match="learned release has a version"):
        asyncio.run(hub.learn(moved(0.1), ModelVersion("1.0.1")))
    with pytest.raises(InvalidValue, match="/v1/learned"):
        asyncio.run(hub.room.desk.catalogue.push(replace(hub.push, version=LEARNED, learning=None), actor="x"))


def test_nothing_is_learned_on_what_was_learned(hub: Hub) -> None:
    async def story() -> None:
        blob = hub.room.desk.blobs.put(moved(0.2))
        await hub.room.desk.catalogue.learn(
            DIGITS,
            LEARNED,
            version=ModelVersion("1.0.0-learned.3"),
            model=blob.digest,
            lineage=Lineage(),
            actor="token:test",
        )

    with pytest.raises(Conflict, match="nothing may be learned"):
        asyncio.run(story())


def test_what_answers_worse_than_its_base_is_rejected(hub: Hub) -> None:
    row = asyncio.run(hub.learn(moved(25), ModelVersion("1.0.0-learned.4")))
    assert row.state == "rejected"
    assert row.report is not None
    assert (row.report.code, row.report.reason[:16]) == ("model.gate", "beside its base:")


def test_the_hubs_own_role_is_renewed_at_half_of_its_life(hub: Hub) -> None:
    before = hub.room.database.read_now(lambda conn: tables.find_metadata(conn, "learned/digits"))
    hub.room.clock.advance(4 * 86_400_000)
    assert asyncio.run(hub.room.desk.publishing.renew())
    after = hub.room.database.read_now(lambda conn: tables.find_metadata(conn, "learned/digits"))
    assert before is not None
    assert after is not None
    assert after.version == before.version + 1
    hub.verify(asyncio.run(hub.assigned()))


def test_after_the_withdrawal_nothing_more_is_published_and_devices_take_nothing(hub: Hub) -> None:
    async def story() -> None:
        row = await hub.learn(moved(0.3), ModelVersion("1.0.0-learned.5"))
        assert row.state == "ready"
        await hub.allow(allowed=False)
        assert not await hub.room.desk.publishing.publish_learned()

    asyncio.run(story())
    assert asyncio.run(hub.room.desk.catalogue.get(DIGITS, "1.0.0-learned.5")).published_ms is None
    with pytest.raises(TrustError) as caught:
        hub.verify(asyncio.run(hub.assigned()))
    assert caught.value.code == "trust.unknown_target"


def test_a_hub_that_lost_its_key_says_so(hub: Hub) -> None:
    asyncio.run(hub.allow())
    hub.room.learned = None
    with pytest.raises(ConfigError):
        asyncio.run(hub.learn(moved(0.1), ModelVersion("1.0.0-learned.6")))
    hub.room.clock.advance(4 * 86_400_000)
    before = hub.room.database.read_now(tables.newest_metadata)
    assert asyncio.run(hub.room.desk.publishing.renew()), "what all devices wait for is signed all the same"
    after = hub.room.database.read_now(tables.newest_metadata)
    assert after["snapshot"].version == before["snapshot"].version + 1
    assert after["learned/digits"] == before["learned/digits"]
