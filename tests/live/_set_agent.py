"""The part of an agent that runs models, as a process of its own that ends itself where it is told to.

    python -m tests.live._set_agent STATE VERSION SAVES

Real slots, ledger, shelf and model hosts on the state directory. The files of both models lie on the shelf; version
VERSION of both is assigned as a set. SAVES is after how many writes of slots the process kills itself, `-SAVES` right
before that write; 0 lets it run until it rests. Each line that it prints is which versions answer, of both models.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from edge_agent.adapters.database import DATABASE_NAME, Database
from edge_agent.adapters.fetcher import HubFetcher
from edge_agent.adapters.hosts import HostOptions, LiveHosts
from edge_agent.adapters.ledger import SqliteLedger
from edge_agent.adapters.shelf import FileShelf
from edge_agent.adapters.system import SystemClock, SystemMoments
from edge_agent.core.slot_values import Phase
from edge_agent.driver.bringing import Supplies
from edge_agent.driver.events import ForSlot, ForSlots
from edge_agent.driver.loop import Loop
from edge_agent.driver.metering import Meter
from edge_agent.driver.models import Models
from shared.ids import DeviceId, Digest, FamilyName, ModelVersion
from shared.limits import MIB
from shared.model import FileRef, encode_manifest, target_path
from shared.profile import DeviceProfile, DiskBudget, Inference, MemoryBudget, Probation
from shared.release import AssignedModel, Assignment, Floors, VerifiedAssignment, VerifiedModel
from tests.fakes.releases import sign_classifier

FAMILIES = (FamilyName("a"), FamilyName("b"))
PROFILE = DeviceProfile(
    name="test",
    title="test",
    architectures=("x86_64",),
    memory=MemoryBudget(host_bytes=512 * MIB, total_bytes=4096 * MIB),
    disk=DiskBudget(models_bytes=256 * MIB, queue_bytes=16 * MIB),
    inference=Inference(runtimes=("onnx",), threads=1, variants=("fp32",)),
    probation=Probation(duration_ms=50, good_answers=1, max_failures=3),
)


class MortalLedger(SqliteLedger):
    """Kills its process before or after a write."""

    saves = 0

    async def save_slots(self, states: Mapping[str, bytes]) -> None:
        """Save, unless the end comes first."""
        self.saves += 1
        if -self.saves == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        await super().save_slots(states)
        if self.saves == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)


def release(family: FamilyName, version: str, shelf: FileShelf) -> VerifiedModel:
    """A release whose files lie on the shelf."""
    build = sign_classifier()
    for file, data in ((build.variant.file, build.model), (build.manifest.golden.file, build.golden)):
        if not shelf.has(file.digest):
            shelf.append(file.digest, data, offset=0)
            shelf.publish(file)
    named = ModelVersion(version)

    def at_home(file: FileRef) -> FileRef:
        return replace(file, path=target_path(family, named, file.path.rpartition("/")[2]))

    manifest = replace(
        build.manifest,
        family=family,
        version=named,
        release_counter=int(version.split(".", maxsplit=1)[0]),
        golden=replace(build.manifest.golden, file=at_home(build.manifest.golden.file)),
        variants=(replace(build.variant, file=at_home(build.variant.file)),),
    )
    digest = Digest(hashlib.sha256(encode_manifest(manifest)).hexdigest())
    return VerifiedModel(manifest=manifest, manifest_digest=digest)


def assigned(version: str, shelf: FileShelf) -> VerifiedAssignment:
    """Both models at this version, as a set."""
    models = tuple(release(family, version, shelf) for family in FAMILIES)
    number = int(version.split(".", maxsplit=1)[0])
    named = tuple(
        AssignedModel(
            family=one.manifest.family,
            version=one.manifest.version,
            manifest=FileRef(path="m", length=1, digest=one.manifest_digest),
        )
        for one in models
    )
    return VerifiedAssignment(
        assignment=Assignment(
            device=DeviceId("dev"), version=number, issued_ms=0, expires_ms=1, models=named, together=(FAMILIES,)
        ),
        models=models,
        floors=Floors(assignment_version=number),
    )


async def run(state: Path, version: str) -> None:
    """One life."""
    clock, shelf = SystemClock(), FileShelf(state)
    database = await Database.open(state / DATABASE_NAME, clock=clock)
    (state / "hosts").mkdir(exist_ok=True)
    try:
        async with asyncio.TaskGroup() as group:
            loop = Loop(group)
            models = Models(
                profile=PROFILE,
                runtimes=frozenset({"onnx"}),
                loop=loop,
                ledger=MortalLedger(database),
                shelf=shelf,
                supplies=Supplies(
                    fetcher=HubFetcher.__new__(HubFetcher),  # never asked: everything lies on the shelf
                    meter=Meter(
                        ledger=MortalLedger(database),
                        moments=SystemMoments(),
                        daily_bytes=0,
                        note=lambda _name, _detail: None,
                    ),
                ),
                hosts=LiveHosts(
                    directory=state / "hosts", clock=clock, options=HostOptions(threads=1, memory_bytes=512 * MIB)
                ),
                note=lambda _name, _detail: None,
                report=lambda: None,
            )
            await models.restore()
            await models.handle_all((await take(loop)).events) if models.families() else None
            say(models)
            await models.offer(assigned(version, shelf))
            while not rests(models, version):
                event = await loop.inbox.next()
                assert isinstance(event, ForSlot)
                await models.handle(event.family, event.event)
                say(models)
                probe(models)
            await models.stop()
            loop.end()
    finally:
        await database.close()


async def take(loop: Loop) -> ForSlots:
    """What `restore` has posted."""
    event = await loop.inbox.next()
    assert isinstance(event, ForSlots)
    return event


def probe(models: Models) -> None:
    """Have whoever is on trial answer."""
    for family in FAMILIES:
        slot = models.slot(family)
        if slot is not None and slot.phase is Phase.PROBATION and slot.candidate is not None:
            models.answer_good(family, slot.candidate.key)


def rests(models: Models, version: str) -> bool:
    """Whether both run this version, and their hosts are up."""
    slots = [models.slot(family) for family in FAMILIES]
    are_there = all(
        slot is not None and slot.phase is Phase.COMMITTED and slot.active and slot.active.manifest.version == version
        for slot in slots
    )
    return are_there and all(models.routes()[family].up for family in FAMILIES)


def say(models: Models) -> None:
    """Print which versions answer now."""
    found = []
    for family in FAMILIES:
        route = models.routes().get(family)
        is_up = route is not None and route.up and route.release is not None
        found.append(f"{family}={route.release.manifest.version if is_up and route and route.release else '-'}")
    print(*found, flush=True)


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(run(Path(sys.argv[1]), sys.argv[2]), timeout=30))
