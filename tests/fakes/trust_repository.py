"""A repository in memory, with all its keys at hand: publishes, assigns, rotates, and answers a refresh.

Tests change `files` (what the hub serves) or the metadata objects and sign again, as an attacker with the keys in
question would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from shared.errors import OutriderError
from shared.ids import DeviceId, Digest, FamilyName, ModelVersion
from shared.model import FileRef, Golden, Manifest, Signature, TensorSpec, Variant, encode_manifest, target_path
from shared.release import AssignedModel, Assignment, Floors, VerifiedAssignment
from shared.trust import refresh
from shared.trust import repository as repo
from shared.trust.assignment import sign_assignment
from shared.trust.library import CryptoSigner, Metadata, MetaFile, Root, Snapshot, Targets, Timestamp, encode_canonical
from shared.trust.roles import LEARNED, family_role, file_name, learned_role
from shared.trust.time import AttestedTime, sign_time
from shared.wire.verification import Job, Keep, KeepManifest, Need, TimeJob

NOW_MS = 1_795_000_000_000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
R = TypeVar("R")
DEVICE = DeviceId("dev-1")
DIGITS = FamilyName("digits")
RELEASE = ("digits", "1.0.0")


def make_manifest(
    version: str = "1.0.0",
    *,
    family: str = "digits",
    counter: int = 1,
    floor: int = 0,
    model: bytes = b"int8 model",
    profiles: tuple[str, ...] = (),
) -> Manifest:
    """A small valid manifest, whose golden file and one variant have the given bytes."""
    name, number = FamilyName(family), ModelVersion(version)

    def ref(file: str, data: bytes) -> FileRef:
        return FileRef(
            path=target_path(name, number, file), length=len(data), digest=Digest(hashlib.sha256(data).hexdigest())
        )

    return Manifest(
        family=name,
        version=number,
        release_counter=counter,
        min_release_counter=floor,
        task="classification",
        signature=Signature(
            inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1, 4)),),
            outputs=(TensorSpec(name="y", dtype="fp32", shape=(-1, 2)),),
        ),
        preparations=(),
        labels=("no", "yes"),
        golden=Golden(file=ref("golden.bin", b"golden"), samples=2, min_agreement=1.0),
        variants=(Variant(name="int8", runtime="onnx", file=ref("int8.onnx", model), accuracy=1.0, answers=(0, 1)),),
        profiles=profiles,
    )


class Device:
    """What a device has on disk: the trusted root, the cache, the last assignment and the floors."""

    def __init__(self, root: bytes, *, name: DeviceId = DEVICE, profile: str = "x86-gateway") -> None:
        self.name = name
        self.profile = profile
        self.accept_learned = False
        self.root = root
        self.cache: dict[str, bytes] = {}
        self.previous: bytes | None = None
        self.manifests: dict[Digest, bytes] = {}
        self.floors = Floors()
        self.asked: list[str] = []

    def verify(
        self,
        document: bytes,
        serve: Callable[[Need], bytes | None],
        *,
        wall_ms: int = NOW_MS,
        time_attested: bool = False,
    ) -> VerifiedAssignment:
        """Run a refresh to its end, keeping what it says is worth keeping, as the parent of the verifier does."""
        job = Job(
            document=document,
            device=self.name,
            profile=self.profile,
            root=self.root,
            cache=dict(self.cache),
            floors=self.floors,
            wall_ms=wall_ms,
            previous=self.previous,
            time_attested=time_attested,
            accept_learned=self.accept_learned,
        )
        verified = self._play(refresh.verify(job), serve)
        self.floors = verified.floors
        self.previous = document
        return verified

    def attest(self, answer: bytes, serve: Callable[[Need], bytes | None], *, nonce: str) -> int:
        """Hold an attested time against the newest root; returns the time."""
        job = TimeJob(answer=answer, device=self.name, nonce=nonce, root=self.root, floors=self.floors)
        return self._play(refresh.attest(job), serve)

    def _play(self, run: refresh.Steps[R], serve: Callable[[Need], bytes | None]) -> R:
        self.asked = []
        answer: bytes | None = None
        try:
            while True:
                step = run.send(answer)
                answer = None
                match step:
                    case Need():
                        self.asked.append(step.name)
                        answer = serve(step)
                    case Keep():
                        self._keep(step)
                    case KeepManifest(digest=digest, data=data):
                        self.manifests[digest] = data
        except StopIteration as end:
            result: R = end.value
            return result

    def _keep(self, step: Keep) -> None:
        for role in step.drops:
            self.cache.pop(role, None)
        if step.role == "root":
            self.root = step.data
        else:
            self.cache[step.role] = step.data


class TrustRepository:
    """The operators' machine and the hub in one: everything that signs, and everything that is served."""

    def __init__(self, *, now_ms: int = NOW_MS, targets_threshold: int = 1, attests_time: bool = False) -> None:
        self.now_ms = now_ms
        self.attests_time = attests_time
        self.keys: dict[str, list[CryptoSigner]] = {
            role: [CryptoSigner.generate_ed25519()]
            for role in ("root", "targets", "snapshot", "timestamp", "assignment", "time", "release", "learned")
        }
        while len(self.keys["targets"]) < targets_threshold:
            self.keys["targets"].append(CryptoSigner.generate_ed25519())
        self.targets_threshold = targets_threshold
        self.files: dict[str, bytes] = {}
        self.root: Metadata[Root] = repo.new_root(self.root_keys(), now_ms=now_ms)
        self.targets: Metadata[Targets] = repo.new_targets(now_ms=now_ms)
        self.roles: dict[str, Metadata[Targets]] = {}
        self.snapshot: Metadata[Snapshot] | None = None
        self.timestamp: Metadata[Timestamp] | None = None
        self.manifests: dict[tuple[str, str], Manifest] = {}
        self.assignments = 0
        self.store_root()
        self.first_root = self.files["1.root.json"]

    def public(self, role: str) -> repo.RoleKeys:
        """The role's keys and threshold, as metadata lists them."""
        threshold = self.targets_threshold if role == "targets" else 1
        return repo.RoleKeys(keys=tuple(key.public_key for key in self.keys[role]), threshold=threshold)

    def root_keys(self) -> repo.RootKeys:
        """What a root made now would authorise."""
        return repo.RootKeys(
            root=self.public("root"),
            targets=self.public("targets"),
            snapshot=self.public("snapshot"),
            timestamp=self.public("timestamp"),
            assignment=self.public("assignment"),
            time=self.public("time") if self.attests_time else None,
        )

    def store_root(self, *extra: CryptoSigner) -> None:
        """Sign the root with its keys (and extra ones) and serve it."""
        self.files[file_name("root", self.root.signed.version)] = repo.sign(self.root, *self.keys["root"], *extra)

    def rotate(self, *roles: str) -> None:
        """Replace the keys of these roles and publish the next root, signed by old and new root keys."""
        before = self.keys["root"]
        for role in roles:
            self.keys[role] = [CryptoSigner.generate_ed25519() for _ in self.keys[role]]
        self.root = repo.new_root(self.root_keys(), now_ms=self.now_ms, version=self.root.signed.version + 1)
        self.store_root(*(before if "root" in roles else ()))

    def release(self, manifest: Manifest) -> None:
        """Sign a release with the offline keys and publish it."""
        family = manifest.family
        role = family_role(family)
        if not repo.is_delegated(self.targets, family, self.public("release")):
            self.targets = repo.delegate_family(self.targets, family, self.public("release"), now_ms=self.now_ms)
        self.roles[role] = repo.add_release(self.roles.get(role), manifest, now_ms=self.now_ms)
        ref = repo.manifest_ref(manifest)
        self.files[ref.path] = encode_manifest(manifest)
        self.manifests[(family, manifest.version)] = manifest
        self.publish()

    def allow_learned(self, family: FamilyName = DIGITS, *, allowed: bool = True) -> None:
        """Let the hub's own key sign learned releases of the family, or none any more, and publish."""
        key = self.keys["learned"][0].public_key if allowed else None
        self.targets = repo.delegate_learned(self.targets, family, key, now_ms=self.now_ms)
        self.publish()

    def learn(self, manifest: Manifest, *, family: FamilyName = DIGITS, days: int = repo.LEARNED_DAYS) -> None:
        """Sign whatever is said to be learned with the hub's own key, as who stole it would, and publish."""
        role = learned_role(family)
        self.roles[role] = repo.add_release(self.roles.get(role), manifest, now_ms=self.now_ms, days=days)
        self.files[repo.manifest_ref(manifest).path] = encode_manifest(manifest)
        self.manifests[(manifest.family, manifest.version)] = manifest
        self.publish()

    def store(self, role: str, metadata: Metadata[Targets], *signers: CryptoSigner) -> bytes:
        """Sign targets or a delegated role and serve it."""
        kept = "targets" if role == "targets" else "learned" if role.startswith(LEARNED) else "release"
        keys = signers or tuple(self.keys[kept])
        data = repo.sign(metadata, *keys)
        self.files[file_name(role, metadata.signed.version)] = data
        return data

    def publish(self) -> None:
        """Sign everything below the root again and serve it."""
        signed = {"targets": self.store("targets", self.targets)}
        signed.update({role: self.store(role, metadata) for role, metadata in self.roles.items()})
        self.snapshot = repo.new_snapshot(self.snapshot, signed, now_ms=self.now_ms)
        self.store_snapshot()
        self.renew_timestamp()

    def store_snapshot(self) -> None:
        """Sign the snapshot as it is and serve it."""
        assert self.snapshot is not None
        self.files[file_name("snapshot", self.snapshot.signed.version)] = repo.sign(
            self.snapshot, *self.keys["snapshot"]
        )

    def renew_timestamp(self) -> None:
        """Sign the next timestamp for the snapshot that is served."""
        assert self.snapshot is not None
        snapshot = self.files[file_name("snapshot", self.snapshot.signed.version)]
        self.timestamp = repo.new_timestamp(self.timestamp, snapshot, now_ms=self.now_ms)
        self.store_timestamp()

    def store_timestamp(self) -> None:
        """Sign the timestamp as it is and serve it."""
        assert self.timestamp is not None
        self.files["timestamp.json"] = repo.sign(self.timestamp, *self.keys["timestamp"])

    def assignment(
        self, *releases: tuple[str, str], device: DeviceId = DEVICE, version: int | None = None
    ) -> Assignment:
        """The next assignment of these (family, version), valid for 30 days."""
        self.assignments += 1
        return Assignment(
            device=device,
            version=self.assignments if version is None else version,
            issued_ms=self.now_ms,
            expires_ms=self.now_ms + 30 * DAY_MS,
            models=tuple(
                AssignedModel(
                    family=FamilyName(family),
                    version=ModelVersion(number),
                    manifest=repo.manifest_ref(self.manifests[(family, number)]),
                )
                for family, number in releases
            ),
        )

    def assign(self, *releases: tuple[str, str], device: DeviceId = DEVICE, version: int | None = None) -> bytes:
        """The same, signed."""
        return sign_assignment(self.assignment(*releases, device=device, version=version), self.keys["assignment"][0])

    def attest(self, nonce: str, *, device: DeviceId = DEVICE, time_ms: int | None = None) -> bytes:
        """What the hub answers to a device that asks for the time."""
        told_ms = self.now_ms if time_ms is None else time_ms
        answer = sign_time(AttestedTime(device=device, nonce=nonce, time_ms=told_ms), self.keys["time"][0])
        newer = [self.files[file_name("root", number)] for number in range(2, self.root.signed.version + 1)]
        document = {**json.loads(answer), "roots": [root.decode() for root in newer]}
        return json.dumps(document, separators=(",", ":")).encode()

    def serve(self, need: Need) -> bytes | None:
        """What the hub answers, cut off where the client would stop reading plus one byte."""
        data = self.files.get(need.name)
        return None if data is None else data[: need.max_bytes + 1]


def refused(hub: TrustRepository, device: Device, document: bytes | None = None, *, wall_ms: int = NOW_MS) -> str:
    """The code with which a refresh is refused."""
    before = (device.floors, device.previous)
    with pytest.raises(OutriderError) as caught:
        device.verify(document if document is not None else hub.assign(RELEASE), hub.serve, wall_ms=wall_ms)
    assert caught.value.hint or caught.value.code == "trust.malformed"
    assert (device.floors, device.previous) == before
    return caught.value.code


def resigned(document: dict[str, Any], signers: list[CryptoSigner]) -> bytes:
    """Signed metadata from its JSON form, however odd it is."""
    text = encode_canonical(document["signed"])
    assert text is not None
    signatures = [signer.sign(text.encode()) for signer in signers]
    return json.dumps({**document, "signatures": [{"keyid": s.keyid, "sig": s.signature} for s in signatures]}).encode()


def promise_again(hub: TrustRepository) -> None:
    """Sign a snapshot and a timestamp that promise versions only, whatever the files hold."""
    assert hub.snapshot is not None
    for name, meta in hub.snapshot.signed.meta.items():
        hub.snapshot.signed.meta[name] = MetaFile(meta.version)
    hub.store_snapshot()
    hub.renew_timestamp()
