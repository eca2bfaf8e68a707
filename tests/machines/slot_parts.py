"""Releases and offers for the tests of the slot machine: small, valid, and different in every digest."""

from __future__ import annotations

import hashlib

from edge_agent.core.slot_values import Installed, Offered, Slot
from edge_agent.core.slots import new_slot
from shared.ids import Digest, FamilyName, ModelVersion
from shared.model import FileRef, Golden, Manifest, Signature, TensorSpec, Variant, encode_manifest, target_path
from shared.profile import Probation
from shared.release import VerifiedModel

FAMILY = FamilyName("digits")
PROBATION = Probation(duration_ms=5_000, good_answers=2, max_failures=3)


def empty_slot() -> Slot:
    """A slot in which nothing was ever installed."""
    return new_slot(FAMILY, probation=PROBATION)


def file(version: str, name: str) -> FileRef:
    """A file of a release; its digest follows from its path."""
    path = target_path(FAMILY, ModelVersion(version), name)
    return FileRef(path=path, length=1000, digest=Digest(hashlib.sha256(path.encode()).hexdigest()))


def model(version: str, *, counter: int | None = None, floor: int = 0) -> VerifiedModel:
    """A verified release of `digits`; its counter is the major number unless given."""
    manifest = Manifest(
        family=FAMILY,
        version=ModelVersion(version),
        release_counter=int(version.split(".", maxsplit=1)[0]) if counter is None else counter,
        min_release_counter=floor,
        task="classification",
        signature=Signature(
            inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1, 4)),),
            outputs=(TensorSpec(name="y", dtype="fp32", shape=(-1, 2)),),
        ),
        preparations=(),
        labels=("0", "1"),
        golden=Golden(file=file(version, "golden.bin"), samples=2, min_agreement=1.0),
        variants=tuple(
            Variant(name=name, runtime="onnx", file=file(version, f"{name}.onnx"), accuracy=1.0, answers=(0, 1))
            for name in ("int8", "fp32")
        ),
    )
    return VerifiedModel(
        manifest=manifest, manifest_digest=Digest(hashlib.sha256(encode_manifest(manifest)).hexdigest())
    )


def offer(version: str, *, at: int, force: bool = False, floor: int = 0) -> Offered:
    """The offer of a release by the assignment `at`."""
    return Offered(model=model(version, floor=floor), variant="int8", assignment_version=at, force=force)


def key(version: str, *, floor: int = 0) -> str:
    """The key of a release."""
    return model(version, floor=floor).manifest_digest


def installed(version: str, *, at: int, floor: int = 0) -> Installed:
    """The release as the slot keeps it."""
    made = model(version, floor=floor)
    return Installed(
        manifest=made.manifest, manifest_digest=made.manifest_digest, variant="int8", assignment_version=at
    )
