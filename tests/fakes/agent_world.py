"""A whole agent on fakes: real driver and core, disk and network in memory, and a hub that stores and acknowledges."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from edge_agent.core.cascade import Policy
from edge_agent.core.intake import Arrived
from edge_agent.core.ways import PatchPolicy
from edge_agent.driver.agent import Agent
from edge_agent.driver.answering import Answering
from edge_agent.driver.bringing import Supplies
from edge_agent.driver.escalation import Escalation
from edge_agent.driver.events import ForIntake, MessageArrived, Noted, Stop
from edge_agent.driver.loop import Inbox, Loop
from edge_agent.driver.metering import Meter
from edge_agent.driver.models import Models
from edge_agent.driver.records import Records
from edge_agent.driver.renewals import Renewals
from edge_agent.driver.rounds import Rounds, TrainingRoom
from edge_agent.driver.service import Service
from edge_agent.driver.timekeeping import Timekeeping
from edge_agent.driver.uplink import RunningDevice, Uplink
from edge_agent.ports import CertificateLife, HostAnswer
from shared.errors import OutriderError, TransferError, TransferRefused, TrustError
from shared.ids import DeviceId
from shared.inference import Infer, Reply, Request, TensorHead
from shared.model import FileRef, Manifest, Variant
from shared.profile import DeviceProfile, DiskBudget, Inference, MemoryBudget, Probation
from shared.release import AssignedModel, Assignment, Floors, Patch, VerifiedAssignment, VerifiedModel
from shared.telemetry import BatchId, DeviceEvent, Gap, Reading, Record, RecordClass
from shared.wire import topics
from shared.wire.columns import decode_columns
from shared.wire.envelope import WIRE_VERSION, Envelope, decode_envelope, encode_envelope
from shared.wire.messages import Ack, Batch, Message, Reported, RoundReply, Verdict, decode_body, encode_body
from shared.wire.verification import Judged, StoredRelease
from tests.fakes.clock import FakeClock, FakeMoments
from tests.fakes.cloud import FakeCloud
from tests.fakes.courier import FakeBroker, FakeCourier
from tests.fakes.fetcher import FakeFetcher
from tests.fakes.hosts import FakeHosts
from tests.fakes.ledger import FakeLedger
from tests.fakes.outbox import FakeOutbox
from tests.fakes.patcher import FakePatcher
from tests.fakes.renewer import FakeRenewer
from tests.fakes.rounds import FakeReplies, FakeSamples, FakeTrainers
from tests.fakes.shelf import FakeShelf

DEVICE = DeviceId("dev-test")


def profile(*, duration_ms: int = 20, good_answers: int = 2) -> DeviceProfile:
    """A small device with a short probation."""
    return DeviceProfile(
        name="test",
        title="test",
        architectures=("x86_64",),
        memory=MemoryBudget(host_bytes=2**28, total_bytes=2**29),
        disk=DiskBudget(models_bytes=2**28, queue_bytes=2**24),
        inference=Inference(runtimes=("onnx",), threads=1, variants=("fp32",)),
        probation=Probation(duration_ms=duration_ms, good_answers=good_answers, max_failures=3),
    )


class NoVitals:
    """A machine that offers no readings."""

    def read(self) -> tuple[Reading, ...]:
        """Nothing."""
        return ()


class FakeVerifier:
    """Takes the document's bytes for a name: `ok:` documents were prepared, everything else is refused."""

    def __init__(self) -> None:
        self.known: dict[bytes, VerifiedAssignment] = {}
        self.error: OutriderError | None = None
        self.judged = Judged(refused={}, undecided={})
        self.lost: OutriderError | None = None
        self.asked: tuple[StoredRelease, ...] = ()
        self.names_time_key = False
        self.times: list[int] = []

    async def verify(
        self, document: bytes, *, floors: Floors, wall_ms: int, time_attested: bool = False
    ) -> VerifiedAssignment:
        """What was prepared for this document."""
        self.times.append(wall_ms)
        if self.names_time_key and not time_attested:
            raise TrustError("nobody has attested the time", code="trust.time.unattested")
        if self.error is not None:
            raise self.error
        if document not in self.known:
            raise TrustError("the signature does not fit", code="trust.signature")
        verified = self.known[document]
        if verified.assignment.version < floors.assignment_version:
            raise TrustError("an older assignment", code="trust.rollback")
        return verified

    async def judge(self, releases: tuple[StoredRelease, ...], *, floors: Floors) -> Judged:
        """What was prepared."""
        self.asked = releases
        if self.lost is not None:
            raise self.lost
        return self.judged


class FakeTimeSource:
    """Answers what `says` holds: a time, or the error that is raised; by default a hub that attests none."""

    def __init__(self) -> None:
        self.says: int | OutriderError = TransferRefused("no such question", code="transfer.not_found")
        self.asked: list[Floors] = []

    async def ask(self, *, floors: Floors) -> int:
        """The time, or the error."""
        self.asked.append(floors)
        if isinstance(self.says, OutriderError):
            raise self.says
        return self.says


class HubOnFakes:
    """Stores each record once and acknowledges after that, unless told to be silent."""

    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self._inner = broker.route
        broker.route = self.route  # type: ignore[method-assign]
        self.records: dict[tuple[int, int], Record] = {}
        self.gaps: list[tuple[BatchId, Gap]] = []
        self.duplicates = 0
        self.reports: list[Reported] = []
        self.births = 0
        self.answers: list[RoundReply] = []
        self.silent = False

    def route(self, topic: str, payload: bytes) -> None:
        """Everything that is published goes through here first."""
        self._inner(topic, payload)
        if "/up/" not in topic:
            return
        message = decode_body(decode_envelope(payload))
        match message:
            case Batch():
                self._store(message)
            case Reported():
                self.reports.append(message)
            case RoundReply():
                self.answers.append(message)
        self.births += topic.endswith("/birth")

    def _store(self, message: Batch) -> None:
        if self.silent:
            return
        if message.gap is not None:
            self.gaps.append((message.batch, message.gap))
        status: Any = "stored"
        for record in decode_columns(message.columns) if message.gap is None else ():
            key = (message.batch.klass, record.seq)
            if key in self.records:
                self.duplicates += 1
                status = "duplicate"
            self.records[key] = record
        self.send("ack", Ack(verdicts=(Verdict(batch=message.batch, status=status),)))

    def send(self, leaf: topics.DownLeaf, message: Message, *, kind: str = "ack") -> None:
        """Publish a message to the device."""
        envelope = Envelope(
            v=WIRE_VERSION, id="hub", kind=kind, device=DEVICE, boot=0, wall_ms=0, mono_ms=0, body=encode_body(message)
        )
        self._inner(topics.down(DEVICE, leaf), encode_envelope(envelope))

    def events(self) -> list[str]:
        """Names of the device's events, in order."""
        records = [record for (klass, _), record in sorted(self.records.items()) if klass == RecordClass.EVENT]
        return [record.body.name for record in records if isinstance(record.body, DeviceEvent)]

    def results(self) -> int:
        """How many results arrived."""
        return sum(1 for klass, _ in self.records if klass == RecordClass.RESULT)

    def readings(self) -> list[str]:
        """Names of the readings that arrived, without those that the outbox gives of itself."""
        records = [record for (klass, _), record in sorted(self.records.items()) if klass == RecordClass.READING]
        names = [record.body.name for record in records if isinstance(record.body, Reading)]
        return [name for name in names if not name.startswith("queue_")]


def answer(manifest: Manifest, _: Variant, inputs: tuple[TensorHead, ...], payload: bytes) -> HostAnswer:
    """A model that says its own version."""
    rows = inputs[0].shape[0]
    head = TensorHead(name="y", dtype="fp32", shape=(rows, 2))
    return HostAnswer(
        labels=(manifest.version,) * rows, confidences=(0.9,) * rows, outputs=(head,), payload=bytes(8 * rows)
    )


class AgentWorld:
    """Everything that outlives a process, and the process on top of it.

    Each `run` is one life: `async with`-less on purpose, so that a life can be ended by cancelling it.
    """

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.ledger = FakeLedger()
        self.outbox = FakeOutbox()
        self.shelf = FakeShelf()
        self.broker = FakeBroker()
        self.hub = HubOnFakes(self.broker)
        self.moments = FakeMoments()
        self.daily_bytes = 0
        self.patch_policy: PatchPolicy = "prefer_patch"
        self.fetcher = FakeFetcher()
        self.patcher = FakePatcher(self.shelf)
        self.verifier = FakeVerifier()
        self.time_source = FakeTimeSource()
        self.hosts = FakeHosts(answer)
        self.samples = FakeSamples()
        self.replies = FakeReplies()
        self.trainers = FakeTrainers()
        self.tasks = FakeShelf()
        self.learns = True
        self.renewer = FakeRenewer()
        self.certificate = CertificateLife(not_before_ms=1, not_after_ms=10**15)
        self.adopted: list[int] = []
        self.cloud = FakeCloud()
        self.policy = Policy()
        self.cache_entries = 0
        self.profile = profile()
        self.version = 0
        self.inbox = Inbox()
        self.meter: Meter
        self.models: Models
        self.records: Records
        self.uplink: Uplink
        self.answering: Answering
        self.rounds: Rounds
        self.service: Service
        self.timekeeping: Timekeeping
        self.agent: Agent

    def waiting(self) -> int:
        """How many records the outbox holds."""
        return sum(self.outbox.depth().records.values())

    def publish(self, *models: VerifiedModel, force: bool = False, patches: tuple[Patch, ...] = ()) -> bytes:
        """Prepare an assignment of these releases, with their files at the hub; returns its document."""
        self.version += 1
        for model in models:
            for file in (model.manifest.golden.file, *(variant.file for variant in model.manifest.variants)):
                made = {patch.result for patch in patches}
                assert file.digest in self.fetcher.files or file.digest in made, file.path
        manifest = FileRef(path="m", length=1, digest=models[0].manifest_digest)
        assigned = tuple(
            AssignedModel(family=model.manifest.family, version=model.manifest.version, manifest=manifest)
            for model in models
        )
        assignment = Assignment(
            device=DEVICE,
            version=self.version,
            issued_ms=0,
            expires_ms=1,
            models=assigned,
            force=tuple(model.manifest.family for model in models) if force else (),
            patches=patches,
        )
        verified = VerifiedAssignment(
            assignment=assignment, models=models, floors=Floors(assignment_version=self.version)
        )
        document = f"ok:{self.version}".encode()
        self.verifier.known[document] = verified
        return document

    def arrive(self, document: bytes) -> None:
        """An assignment comes in."""
        self.inbox.post(ForIntake(Arrived(document)))

    def life(self, story: Callable[[], Coroutine[Any, Any, None]], *, clean: bool = True) -> None:
        """Start the agent, play the story, then stop it cleanly or kill it."""
        asyncio.run(self._life(story, clean=clean))

    async def _life(self, story: Callable[[], Coroutine[Any, Any, None]], *, clean: bool) -> None:
        async with asyncio.TaskGroup() as group:
            loop = Loop(group)
            self.inbox = loop.inbox
            await self._compose(loop)
            await self.agent.start()
            running = group.create_task(self._run())
            async with asyncio.timeout(20):
                await story()
            if clean:
                self.inbox.post(Stop("test"))
                await running
            else:
                running.cancel()
                loop.end()
                self.broker.clients.clear()

    async def _run(self) -> None:
        await self.agent.run()
        await self.agent.stop()

    async def _compose(self, loop: Loop) -> None:
        running = RunningDevice(device=DEVICE, profile="test", boot=await self.ledger.next_boot())
        inbox = self.inbox
        courier = FakeCourier(
            self.broker,
            device=DEVICE,
            on_message=lambda topic, payload: inbox.post(MessageArrived(topic, payload)),
            on_lost=lambda reason: self.uplink.lost(reason),
            on_refused=lambda topic, ref, code, reason: self.uplink.refused(topic, ref, code, reason),
            on_taken=lambda ref: self.uplink.taken(ref),
        )
        self.records = Records(clock=self.clock, loop=loop, outbox=self.outbox)
        self.meter = Meter(
            ledger=self.ledger,
            moments=self.moments,
            daily_bytes=self.daily_bytes,
            note=lambda name, detail: inbox.post(Noted(name, detail)),
        )
        self.models = Models(
            profile=self.profile,
            runtimes=frozenset({"onnx"}),
            loop=loop,
            ledger=self.ledger,
            shelf=self.shelf,
            supplies=Supplies(fetcher=self.fetcher, meter=self.meter, patcher=self.patcher, policy=self.patch_policy),
            hosts=self.hosts,
            note=lambda name, detail: inbox.post(Noted(name, detail)),
            report=lambda: self.uplink.report_soon(),
        )
        self.uplink = Uplink(
            running=running,
            clock=self.clock,
            loop=loop,
            courier=courier,
            outbox=self.outbox,
            models=self.models.running,
        )
        self.answering = Answering(
            clock=self.clock,
            models=self.models,
            records=self.records,
            escalation=Escalation(
                cloud=self.cloud,
                policy=self.policy,
                clock=self.clock,
                loop=loop,
                uplink=self.uplink,
                records=self.records,
            ),
            cache_entries=self.cache_entries,
            cache_bytes=2**20,
        )
        self.rounds = Rounds(
            device=DEVICE,
            clock=self.clock,
            loop=loop,
            room=TrainingRoom(
                samples=self.samples,
                replies=self.replies,
                trainers=self.trainers,
                shelf=self.shelf,
                tasks=self.tasks,
                fetcher=self.fetcher,
                enabled=self.learns,
            ),
            routes=self.models.routes,
            send=partial(self.uplink.send, "round"),
        )
        self.timekeeping = Timekeeping(
            clock=self.clock,
            loop=loop,
            ledger=self.ledger,
            source=self.time_source,
            note=lambda name, detail: inbox.post(Noted(name, detail)),
        )
        self.renewals = Renewals(
            now_ms=self.timekeeping.now_ms,
            loop=loop,
            renewer=self.renewer,
            life=self.certificate,
            adopt=lambda: self.adopted.append(self.clock.wall_ms()),
        )
        self.service = Service(
            running=running,
            clock=self.clock,
            loop=loop,
            models=self.models,
            uplink=self.uplink,
            records=self.records,
            answering=self.answering,
            rounds=self.rounds,
            timekeeping=self.timekeeping,
            meter=self.meter,
            renewals=self.renewals,
        )
        self.agent = Agent(
            loop=loop,
            ledger=self.ledger,
            verifier=self.verifier,
            models=self.models,
            uplink=self.uplink,
            records=self.records,
            answering=self.answering,
            rounds=self.rounds,
            timekeeping=self.timekeeping,
            renewals=self.renewals,
            vitals=NoVitals(),
            heartbeat_ms=30_000,
            vitals_ms=60_000,
        )

    async def ask(self, request: Request, payload: bytes = b"") -> Reply:
        """One request through the door's handler."""
        reply, _ = await self.service.handle(request, payload, asyncio.get_running_loop().time())
        return reply

    async def infer(self, request_id: str = "", *, rows: int = 1) -> Reply:
        """Ask `digits` about zeros."""
        head = TensorHead(name="x", dtype="fp32", shape=(rows, 4))
        return await self.ask(Infer(model="digits", inputs=(head,), id=request_id), bytes(16 * rows))


async def until(condition: Callable[[], bool], what: str, *, within_s: float = 10) -> None:
    """Wait until the condition holds; fails saying what was waited for."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"did not happen: {what}"
        await asyncio.sleep(0.002)


def release(world: AgentWorld, version: str) -> VerifiedModel:
    """A release of `digits` whose files lie at the hub."""
    from tests.machines.slot_parts import model

    made = model(version)

    def put(path: str) -> FileRef:
        data = path.encode() * 20
        file = FileRef(path=path, length=len(data), digest=_digest(data))
        world.fetcher.files[file.digest] = data
        return file

    manifest = msgspec.structs.replace(
        made.manifest,
        golden=msgspec.structs.replace(made.manifest.golden, file=put(made.manifest.golden.file.path)),
        variants=tuple(
            msgspec.structs.replace(variant, file=put(variant.file.path)) for variant in made.manifest.variants
        ),
    )
    return VerifiedModel(manifest=manifest, manifest_digest=made.manifest_digest)


def _digest(data: bytes) -> Any:
    return hashlib.sha256(data).hexdigest()


__all__ = ["AgentWorld", "TransferError", "release", "until"]
