"""A release as the hub proposes it, checked on this machine: every file fetched and hashed, every variant run.

What this is for: the hub builds variants, a person signs them. The signer must not have to believe the hub, so nothing
that the hub says of a file is taken over without the file; the manifest is signed only if what it says was seen here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from cloud_hub.cli import screen
from cloud_hub.cli.measure import Measured, measure
from shared import limits
from shared.errors import InvalidValue, TrustError
from shared.ids import Digest, FamilyName, ModelVersion
from shared.model import FileRef, Manifest, decode_manifest, encode_manifest, manifest_path
from shared.wire.golden import GoldenSet, decode_golden


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """What the hub asks to have signed.

    Attributes:
        manifest: the manifest's text, byte for byte.
        files: all files of the release, the manifest first.
        root: the newest root of the hub.
        targets: the current top-level targets metadata, as signed.
        role: the current metadata of `models/<family>`, None before the family's first release.
        roots: the roots before the newest one, as far as they are at hand; what is carried by hand has all of them.
    """

    manifest: str
    files: tuple[FileRef, ...]
    root: str
    targets: str
    role: str | None = None
    roots: tuple[str, ...] = ()


class Origin(Protocol):
    """Where a proposal comes from: the hub, or a folder that was carried here (origins.py)."""

    def proposal(self, family: FamilyName, version: ModelVersion) -> Proposal:
        """What there is to sign."""
        ...

    def blob(self, digest: str, *, length: int, title: str = "") -> bytes:
        """A file; raises TransferCorrupt unless it has exactly this length and digest."""
        ...


@dataclass(frozen=True, slots=True)
class Inspected:
    """A proposal that was looked at: what it holds, and what running it here gave."""

    proposal: Proposal
    manifest: Manifest
    golden: GoldenSet
    measured: tuple[Measured, ...]

    def require_fit(self) -> None:
        """Raise TrustError unless every variant did here what the manifest records."""
        for variant, measured in zip(self.manifest.variants, self.measured, strict=True):
            if not measured.fits(variant, min_agreement=self.manifest.golden.min_agreement):
                raise TrustError(
                    f"variant {variant.name!r} has an accuracy of {measured.accuracy:.1%} here, the manifest records "
                    f"{variant.accuracy:.1%}; it answers {_share(measured.agreement)} of the golden rows as recorded",
                    code="trust.golden",
                    hint="do not sign; compare with `outrider model show`, and ask who runs the hub",
                )

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "family": self.manifest.family,
            "version": self.manifest.version,
            "release_counter": self.manifest.release_counter,
            "min_release_counter": self.manifest.min_release_counter,
            "golden_samples": self.golden.samples,
            "learning": msgspec.to_builtins(self.manifest.learning),
            "files": [msgspec.to_builtins(file) for file in self.proposal.files],
            "variants": [
                {
                    "name": variant.name,
                    "accuracy_recorded": variant.accuracy,
                    "accuracy_here": measured.accuracy,
                    "agreement_here": measured.agreement,
                }
                for variant, measured in zip(self.manifest.variants, self.measured, strict=True)
            ],
        }

    def text(self) -> str:
        """For people: what would be signed, and what was seen."""
        manifest = self.manifest
        lines = [
            screen.fields(
                [
                    ("release", f"{manifest.family}/{manifest.version}"),
                    (
                        "counter",
                        f"{manifest.release_counter}; devices then refuse below {manifest.min_release_counter}",
                    ),
                    ("labels", _some(manifest.labels)),
                    ("golden", f"{self.golden.samples} samples, {manifest.golden.min_agreement:.0%} must agree"),
                    *_learning(manifest),
                ]
            ),
            screen.table(
                ["FILE", "SIZE", "SHA-256"],
                [
                    [file.path.rpartition("/")[2], screen.size(file.length), f"{file.digest[:32]}…"]
                    for file in self.proposal.files
                ],
            ),
            screen.table(
                ["VARIANT", "ACCURACY", "SEEN HERE", "AGREES"],
                [
                    [variant.name, f"{variant.accuracy:.1%}", f"{seen.accuracy:.1%}", _share(seen.agreement)]
                    for variant, seen in zip(manifest.variants, self.measured, strict=True)
                ],
            ),
        ]
        return "\n\n".join(lines)


def inspect(origin: Origin, family: FamilyName, version: ModelVersion) -> Inspected:
    """Take a proposal with all its files, hash them and run the golden samples on every variant.

    Raises:
        TransferCorrupt: a file is not the one that the proposal names.
        TrustError: the proposal does not hold together, or a file is not what the manifest says.
        ModelError: a variant does not load or run.
    """
    proposal = origin.proposal(family, version)
    manifest = _manifest(proposal, family, version)
    _check_files(proposal, manifest)
    try:
        golden = decode_golden(_fetch(origin, manifest.golden.file, limits.MAX_GOLDEN_BYTES), manifest.signature)
    except InvalidValue as error:
        raise _odd(f"the golden samples do not fit the manifest: {error.message}") from error
    if golden.samples != manifest.golden.samples:
        raise _odd(f"the golden file holds {golden.samples} samples, the manifest says {manifest.golden.samples}")
    models: dict[str, bytes] = {}
    for variant in manifest.variants:
        if variant.runtime != "onnx":
            raise _odd(f"variant {variant.name!r} needs the runtime {variant.runtime!r}, which is not checked here")
        models[variant.name] = _fetch(origin, variant.file, limits.MAX_MODEL_BYTES)
    measured = measure(manifest, models, golden)
    return Inspected(proposal=proposal, manifest=manifest, golden=golden, measured=measured)


def _learning(manifest: Manifest) -> list[tuple[str, str]]:
    """What a signature lets the hub do by itself afterwards, where people allow it for the family."""
    bounds = manifest.learning
    if bounds is None:
        return []
    tensors = ", ".join(bounds.tensors)
    return [("learning", f"the hub may move {tensors} of {bounds.variant} by {bounds.max_shift:g} without a signature")]


def _manifest(proposal: Proposal, family: FamilyName, version: ModelVersion) -> Manifest:
    text = proposal.manifest.encode()
    try:
        manifest = decode_manifest(text)
    except InvalidValue as error:
        raise _odd(f"its manifest cannot be used: {error.message}") from error
    if (manifest.family, manifest.version) != (family, version):
        raise _odd(f"its manifest is for {manifest.family}/{manifest.version}, not {family}/{version}")
    if encode_manifest(manifest) != text:
        raise _odd("its manifest is not in the one form that is signed, or holds fields that are not known here")
    return manifest


def _check_files(proposal: Proposal, manifest: Manifest) -> None:
    text = proposal.manifest.encode()
    own = FileRef(
        path=manifest_path(manifest.family, manifest.version),
        length=len(text),
        digest=Digest(hashlib.sha256(text).hexdigest()),
    )
    wanted = (own, manifest.golden.file, *(variant.file for variant in manifest.variants))
    if sorted(proposal.files, key=_path) != sorted(wanted, key=_path):
        raise _odd("it lists other files than its manifest")


def _fetch(origin: Origin, file: FileRef, max_bytes: int) -> bytes:
    if file.length > max_bytes:
        raise _odd(f"{file.path} is {file.length} bytes long, at most {max_bytes} are taken")
    return origin.blob(file.digest, length=file.length, title=file.path.rpartition("/")[2])


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _path(file: FileRef) -> str:
    return file.path


def _some(labels: tuple[str, ...], *, shown: int = 12) -> str:
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return (", ".join(labels[:shown]) or "-") + more


def _odd(message: str) -> TrustError:
    return TrustError(f"the hub's proposal cannot be signed: {message}", code="trust.proposal", hint="do not sign it")
