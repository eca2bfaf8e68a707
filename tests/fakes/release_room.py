"""The releases room on a real database and a real disk, with a fake clock, a fleet that tests write down, and the
offline keys of an operator at hand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cloud_hub.devices.desk import Device
from cloud_hub.ground import migrate
from cloud_hub.ground.bus import Bus
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.post import Post
from cloud_hub.releases import tables
from cloud_hub.releases.desk import Desk, OnlineKeys, Push, ReleaseSettings, found
from cloud_hub.releases.rules import BuildReport, Gate
from cloud_hub.releases.tables import ModelRow
from shared.errors import ConfigError, Unreachable
from shared.ids import DeviceId, FamilyName, ModelVersion
from shared.model import (
    FileRef,
    Golden,
    Manifest,
    Preparation,
    Signature,
    TensorSpec,
    Variant,
    decode_manifest,
    encode_manifest,
    manifest_path,
    target_path,
)
from shared.trust import repository
from shared.trust.authority import role_keys
from shared.trust.library import CryptoSigner
from shared.trust.roles import family_role
from shared.wire.envelope import decode_envelope
from shared.wire.messages import Assign, expect
from tests.fakes.classifier import MEAN, SCALE, STD
from tests.fakes.clock import FakeClock

LABELS = tuple(str(number) for number in range(10))
PREPARATION = Preparation(input="pixels", scale=SCALE, mean=(MEAN,), std=(STD,))


@dataclass(slots=True)
class FakeFleet:
    """The devices room, as far as assignments ask: devices by name."""

    devices: dict[str, Device]

    async def list(
        self, *, after: str = "", limit: int = 500, labels: Mapping[str, str] | None = None
    ) -> tuple[Device, ...]:
        """As the devices' desk."""
        assert labels is None
        return tuple(self.devices[name] for name in sorted(self.devices) if name > after)[:limit]

    def add(self, name: str, **changes: Any) -> None:
        """Enrol a device; `changes` set its other fields."""
        device = Device(
            id=DeviceId(name),
            profile="generic",
            labels={},
            enrolled_ms=0,
            online=True,
            last_seen_ms=None,
            boot=1,
            agent_version="",
            assignment_version=0,
            reported_ms=None,
            reported={},
        )
        self.devices[name] = replace(device, **changes)


@dataclass(slots=True)
class Outgoing:
    """The link to the broker: what went out, or nothing while it is down."""

    sent: list[tuple[str, bytes]]
    up: bool = True

    async def publish(self, topic: str, payload: bytes, *, qos: int = 1) -> None:
        """As the hub's courier."""
        if not self.up:
            raise Unreachable("down", code="transfer.broker")
        self.sent.append((topic, payload))

    def documents(self) -> list[tuple[str, bytes]]:
        """Topic and signed document of each assignment that went out."""
        return [(topic, expect(decode_envelope(payload), Assign).document) for topic, payload in self.sent]


class Operator:
    """The offline keys and what is done with them."""

    def __init__(self) -> None:
        self.root, self.targets, self.release = (CryptoSigner.generate_ed25519() for _ in range(3))

    def sign(
        self, desk_proposal: Any, *, now_ms: int, manifest: Manifest | None = None, release: CryptoSigner | None = None
    ) -> tuple[str | None, str]:
        """Targets (None when the family is delegated already) and role, signed over a proposal."""
        signer = release or self.release
        manifest = manifest or decode_manifest(desk_proposal.manifest.encode())
        keys = repository.RoleKeys(keys=(self.release.public_key,))
        current = repository.read_targets(desk_proposal.targets.encode())
        targets = None
        if not repository.is_delegated(current, manifest.family, keys):
            delegated = repository.delegate_family(current, manifest.family, keys, now_ms=now_ms)
            targets = repository.sign(delegated, self.targets).decode()
        role = None
        if desk_proposal.role is not None:
            role = repository.read_targets(desk_proposal.role.encode(), role=family_role(manifest.family))
        signed = repository.sign(repository.add_release(role, manifest, now_ms=now_ms), signer)
        return targets, signed.decode()


class ReleaseRoom:
    """Everything together; `close` when done."""

    def __init__(self, root: Path, *, settings: ReleaseSettings | None = None) -> None:
        self.root = root
        self.clock = FakeClock()
        self.database = Database(f"sqlite:///{root / 'hub.db'}")
        migrate.upgrade(self.database)
        self.operator = Operator()
        online = {name: CryptoSigner.generate_ed25519() for name in ("snapshot", "timestamp", "assignment", "time")}
        self.keys = OnlineKeys(
            snapshot=online["snapshot"],
            timestamp=online["timestamp"],
            assignment=online["assignment"],
            time=online["time"],
        )
        self.ring = {name: [signer] for name, signer in online.items()}
        self.learned: CryptoSigner | None = None
        self.fleet = FakeFleet({})
        self.outgoing = Outgoing([])
        self.bus = Bus()
        self.metrics = Metrics()
        self.settings = settings or ReleaseSettings()
        self.desk = self.open_desk()
        self._found()

    def open_desk(self) -> Desk:
        """Another start of the hub over the same data."""
        desk = Desk(
            data=self.root,
            database=self.database,
            clock=self.clock,
            metrics=Metrics(),
            keys=self.online_keys,
            fleet=self.fleet,
            post=Post(publish=self.outgoing.publish, clock=self.clock),
            bus=self.bus,
            settings=self.settings,
        )
        desk.open()
        return desk

    def online_keys(self, root: bytes) -> OnlineKeys:
        """Those of the hub's keys that this root lists."""
        trusted = repository.read_root(root).signed
        chosen: dict[str, Any] = {}
        for name, signers in self.ring.items():
            held = role_keys(trusted, name)
            listed = {key.keyid for key in held.keys} if held is not None else set()
            for signer in signers:
                if signer.public_key.keyid in listed:
                    chosen[name] = signer
            if name not in chosen:
                raise ConfigError(f"no {name} key here", code="config.key_missing")
        chosen["learned"] = self._learned
        return OnlineKeys(**chosen)

    def _learned(self, family: FamilyName, keyids: Collection[str]) -> CryptoSigner:
        if self.learned is None or self.learned.public_key.keyid not in keyids:
            raise ConfigError(f"no learned-{family} key here", code="config.key_missing")
        return self.learned

    def close(self) -> None:
        """End the database's threads."""
        self.database.close()

    def push(self, *, model: bytes, golden: bytes, calibration: bytes | None = None, **changes: Any) -> Push:
        """Upload the files and say what to push."""
        fields: dict[str, Any] = {
            "family": FamilyName("digits"),
            "version": ModelVersion("1.0.0"),
            "model": self.desk.blobs.put(model).digest,
            "golden": self.desk.blobs.put(golden).digest,
            "calibration": None if calibration is None else self.desk.blobs.put(calibration).digest,
            "labels": LABELS,
            "preparations": (PREPARATION,),
            "gate": Gate(),
        }
        return Push(**{**fields, **changes})

    def make_ready(
        self, version: str, *, family: str = "digits", min_release_counter: int | None = None, model: bytes = b""
    ) -> ModelRow:
        """A version that was built, without building: one variant of these bytes, or of a few."""
        name, number = FamilyName(family), ModelVersion(version)
        model, golden = model or f"model {family} {version}".encode(), b"golden"
        push = self.push(model=model, golden=golden, family=name, version=number)

        def file(title: str, data: bytes) -> FileRef:
            return FileRef(
                path=target_path(name, number, title), length=len(data), digest=self.desk.blobs.put(data).digest
            )

        def work(conn: Any) -> ModelRow:
            tables.begin_build(conn, push, build=1, at_ms=1, actor="test")
            row = tables.find_model(conn, family, version)
            assert row is not None
            counters, floor = tables.family_counters(conn, family)
            counter = max(counters, default=0) + 1
            floor = floor if min_release_counter is None else min_release_counter
            spec = TensorSpec(name="pixels", dtype="fp32", shape=(-1, 64))
            manifest = Manifest(
                family=name,
                version=number,
                release_counter=counter,
                min_release_counter=floor,
                task="classification",
                signature=Signature(inputs=(spec,), outputs=(TensorSpec(name="s", dtype="fp32", shape=(-1, 10)),)),
                preparations=(),
                labels=LABELS,
                golden=Golden(file=file("golden.bin", golden), samples=1, min_agreement=0.98),
                variants=(
                    Variant(name="fp32", runtime="onnx", file=file("fp32.onnx", model), accuracy=1.0, answers=(0,)),
                ),
            )
            blob = self.desk.blobs.put(encode_manifest(manifest))
            files = (
                FileRef(path=manifest_path(name, number), length=blob.length, digest=blob.digest),
                manifest.golden.file,
                manifest.variants[0].file,
            )
            tables.finish_build(
                conn, row, state="ready", report=BuildReport(), at_ms=2, counters=(counter, floor), files=files
            )
            ready = tables.find_model(conn, family, version)
            assert ready is not None
            return ready

        return self.database.write_now(work)

    async def publish(self, version: str, *, family: str = "digits") -> ModelRow:
        """Sign and publish a version that is ready."""
        proposal = await self.desk.publishing.proposal(family, version)
        targets, role = self.operator.sign(proposal, now_ms=self.clock.wall)
        return await self.desk.publishing.publish(family, version, targets=targets, role=role, actor="token:test")

    def _found(self) -> None:
        def one(signer: Any) -> repository.RoleKeys:
            return repository.RoleKeys(keys=(signer.public_key,))

        root = repository.new_root(
            repository.RootKeys(
                root=one(self.operator.root),
                targets=one(self.operator.targets),
                snapshot=one(self.keys.snapshot),
                timestamp=one(self.keys.timestamp),
                assignment=one(self.keys.assignment),
                time=one(self.keys.time),
            ),
            now_ms=self.clock.wall,
        )
        found(
            self.database,
            root=repository.sign(root, self.operator.root),
            targets=repository.sign(repository.new_targets(now_ms=self.clock.wall), self.operator.targets),
            snapshot=self.keys.snapshot,
            timestamp=self.keys.timestamp,
            now_ms=self.clock.wall,
        )
