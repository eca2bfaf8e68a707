"""What a model is: its signature, its preparation, its variants, and the signed manifest that ties them together.

The manifest is one file of a release (a TUF target). It is JSON, so that a person can read what was signed. The
preparation of inputs (scale, mean, standard deviation) and the labels travel in it, so that training and serving
cannot differ.
"""

from __future__ import annotations

import math
import re
from typing import Final, Literal

import msgspec

from shared import limits
from shared.errors import InvalidValue
from shared.ids import Digest, FamilyName, ModelVersion, parse_digest, parse_family, parse_version

DType = Literal[
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "fp16", "fp32", "fp64"
]
"""Element types, in lower-case Open Inference Protocol names (v2 specification, "Tensor Data Types")."""

ITEM_BYTES: Final[dict[str, int]] = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "fp16": 2,
    "uint32": 4, "int32": 4, "fp32": 4, "uint64": 8, "int64": 8, "fp64": 8,
}  # fmt: skip

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")

Task = Literal["classification", "raw"]
"""`classification`: the first output holds class scores, answers carry label and confidence. `raw`: outputs only."""


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A declared input or output.

    Attributes:
        name: as in the model's graph.
        dtype: element type of what callers send.
        shape: sizes by axis, outermost first; -1 marks an axis that callers choose (usually the batch).
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]


class Preparation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an input becomes what the graph eats: `(x * scale - mean) / std`, in float32, broadcast over the last axes.

    Attributes:
        input: name of the input that it belongs to.
        mean, std: one value, or one per element of the trailing axes, row-major.
    """

    input: str
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class FileRef(msgspec.Struct, frozen=True, kw_only=True):
    """A file of a release: its TUF target path, its length in bytes and its SHA-256."""

    path: str
    length: int
    digest: Digest


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """The golden set: inputs with true labels and the fp32 reference's outputs (file format: shared/wire/golden.py).

    Attributes:
        file: where it is.
        samples: how many rows it holds.
        min_agreement: share of rows, 0 to 1, on which a loaded variant must give the variant's recorded label.
    """

    file: FileRef
    samples: int
    min_agreement: float


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One file that can serve the model.

    Attributes:
        name: `int8`, `fp32`.
        runtime: which engine loads it.
        accuracy: share of golden rows answered right, 0 to 1, measured where it was built.
        answers: predicted class per golden row, what a device must reproduce (see Golden.min_agreement).
        ram_bytes: resident size of a process that holds it, measured where it was built; 0 when unknown.
    """

    name: str
    runtime: Literal["onnx", "litert"]
    file: FileRef
    accuracy: float
    answers: tuple[int, ...]
    ram_bytes: int = 0


class Lineage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a model comes from; free text, for people and audits."""

    training_data: str = ""
    parameters: dict[str, str] = {}
    metrics: dict[str, float] = {}
    parent: str = ""
    license: str = ""
    owner: str = ""


class Learning(msgspec.Struct, frozen=True, kw_only=True):
    """What may be learned on top of a release without a person's signature (docs/adr/0010-updates.md).

    Attributes:
        variant: the only variant that a learned release may have.
        tensors: names of the initializers whose numbers may differ, as in the graph.
        max_shift: the most that they may differ by: the Euclidean norm of all their differences together.
    """

    variant: str
    tensors: tuple[str, ...]
    max_shift: float


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """What callers send and get."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A release: one version of one family, as signed.

    Attributes:
        release_counter: grows by at least one with each release of the family; orders releases where versions cannot.
        min_release_counter: the security floor; a device that accepted this release refuses anything below it.
        variants: in the publisher's order of preference.
        profiles: device profiles that may run it; empty means any. Signed, so that no hub can send it elsewhere.
        learning: what may be learned on top of it; None: nothing.
        base: of a learned release, its base's manifest; None: a person signed this one.
    """

    family: FamilyName
    version: ModelVersion
    release_counter: int
    min_release_counter: int
    task: Task
    signature: Signature
    preparations: tuple[Preparation, ...]
    labels: tuple[str, ...]
    golden: Golden
    variants: tuple[Variant, ...]
    lineage: Lineage = Lineage()
    profiles: tuple[str, ...] = ()
    learning: Learning | None = None
    base: FileRef | None = None
    schema: int = 1


def target_path(family: FamilyName, version: ModelVersion, file: str) -> str:
    """The TUF target path of a release's file: `models/digits/1.0.0/int8.onnx`."""
    return f"models/{family}/{version}/{file}"


def manifest_path(family: FamilyName, version: ModelVersion) -> str:
    """The TUF target path of a release's manifest."""
    return target_path(family, version, "manifest.json")


def parse_manifest_path(path: str) -> tuple[FamilyName, ModelVersion]:
    """Whose manifest lies at this target path; raises InvalidValue when none does."""
    parts = path.split("/")
    if len(parts) == 4:
        family, version = parse_family(parts[1]), parse_version(parts[2])
        if path == manifest_path(family, version):
            return family, version
    _refuse(f"{path[:120]!r} is no manifest's path")
    raise AssertionError


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON with sorted keys, so that the same release has the same digest wherever it is written."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)


def decode_manifest(data: bytes) -> Manifest:
    """Parse and check a manifest; raises InvalidValue naming the field."""
    if len(data) > limits.MAX_MANIFEST_BYTES:
        raise InvalidValue(
            f"manifest of {len(data)} bytes exceeds {limits.MAX_MANIFEST_BYTES}", code="invalid.manifest"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidValue(f"manifest does not parse: {error}", code="invalid.manifest") from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise InvalidValue unless names, shapes, paths and counts are in bounds and agree with each other."""
    parse_family(manifest.family)
    parse_version(manifest.version)
    if manifest.schema != 1:
        _refuse(f"schema {manifest.schema} is not known", hint="update the agent")
    if not 1 <= manifest.release_counter < 2**53 or not 0 <= manifest.min_release_counter <= manifest.release_counter:
        _refuse("release counters are out of order: 0 <= min_release_counter <= release_counter is required")
    check_signature(manifest.signature)
    if len(manifest.labels) > limits.MAX_LABELS:
        _refuse(f"{len(manifest.labels)} labels exceed {limits.MAX_LABELS}")
    check_preparations(manifest.signature, manifest.preparations)
    prefix = target_path(manifest.family, manifest.version, "")
    names = [variant.name for variant in manifest.variants]
    if not names or len(set(names)) != len(names):
        _refuse("variants must be present and have distinct names")
    for file in (manifest.golden.file, *(variant.file for variant in manifest.variants)):
        parse_digest(file.digest)
        check_place(file.path, prefix)
        if not 0 < file.length <= limits.MAX_MODEL_BYTES:
            _refuse(f"file {file.path[:120]!r} has a length of {file.length} bytes")
    if manifest.golden.file.length > limits.MAX_GOLDEN_BYTES:
        _refuse(f"golden file of {manifest.golden.file.length} bytes exceeds {limits.MAX_GOLDEN_BYTES}")
    if not 0 < manifest.golden.samples <= limits.MAX_GOLDEN_SAMPLES or not 0 <= manifest.golden.min_agreement <= 1:
        _refuse("golden set is out of bounds")
    check_learning(manifest)
    for variant in manifest.variants:
        if not _FILE_NAME.fullmatch(variant.name) or not 0 <= variant.accuracy <= 1:
            _refuse(f"variant {variant.name[:80]!r} has an unusable name or an accuracy outside 0 to 1")
        if manifest.task == "classification" and len(variant.answers) != manifest.golden.samples:
            _refuse(
                f"variant {variant.name!r} records {len(variant.answers)} answers for {manifest.golden.samples} samples"
            )


def check_place(path: str, prefix: str) -> None:
    """Raise InvalidValue unless this is a plain file name below the release's own prefix."""
    if not path.startswith(prefix) or not _FILE_NAME.fullmatch(path[len(prefix) :]):
        _refuse(f"file {path[:120]!r} does not lie in {prefix!r}")


def check_signature(signature: Signature) -> None:
    """Raise InvalidValue unless inputs and outputs have distinct names and usable shapes."""
    for title, specs in (("input", signature.inputs), ("output", signature.outputs)):
        if not 1 <= len(specs) <= limits.MAX_TENSORS or len({spec.name for spec in specs}) != len(specs):
            _refuse(f"the signature needs 1 to {limits.MAX_TENSORS} {title}s with distinct names")
        for spec in specs:
            if len(spec.shape) > limits.MAX_TENSOR_RANK or any(size == 0 or size < -1 for size in spec.shape):
                _refuse(f"{title} {spec.name!r} has an unusable shape {list(spec.shape)}")


def check_preparations(signature: Signature, preparations: tuple[Preparation, ...]) -> None:
    """Raise InvalidValue unless each preparation names an input, is finite, and fits the input's trailing axes."""
    by_name = {spec.name: spec for spec in signature.inputs}
    if len({preparation.input for preparation in preparations}) != len(preparations):
        _refuse("an input has two preparations")
    for preparation in preparations:
        spec = by_name.get(preparation.input)
        if spec is None:
            _refuse(f"preparation for unknown input {preparation.input!r}")
            raise AssertionError
        row = math.prod(size for size in spec.shape[1:] if size > 0)
        numbers = (preparation.scale, *preparation.mean, *preparation.std)
        if not all(math.isfinite(number) for number in numbers) or 0.0 in preparation.std:
            _refuse(f"preparation of {preparation.input!r} holds a number that is not finite, or a zero in std")
        for values in (preparation.mean, preparation.std):
            if len(values) != 1 and len(values) != row:
                _refuse(f"preparation of {preparation.input!r} has {len(values)} values; 1 or {row} are possible")


def check_learning(manifest: Manifest) -> None:
    """Raise InvalidValue unless what may be learned names a variant and tensors, and what was learned names a base."""
    learning, base = manifest.learning, manifest.base
    if learning is not None:
        if learning.variant not in {variant.name for variant in manifest.variants}:
            _refuse(f"learning names the variant {learning.variant[:80]!r}, which is not there")
        names = learning.tensors
        if not 1 <= len(names) <= limits.MAX_TENSORS or len(set(names)) != len(names) or not all(names):
            _refuse(f"learning needs 1 to {limits.MAX_TENSORS} tensors with distinct names")
        if not math.isfinite(learning.max_shift) or learning.max_shift <= 0:
            _refuse("learning needs a shift that is a positive number")
    if base is not None:
        parse_digest(base.digest)
        if parse_manifest_path(base.path)[0] != manifest.family:
            _refuse(f"the base {base.path[:120]!r} is no manifest of this family")
        if not 0 < base.length <= limits.MAX_MANIFEST_BYTES:
            _refuse(f"the base's manifest has a length of {base.length} bytes")
    if (base is not None) != is_learned(manifest.version):
        _refuse("a release with a base, and no other, has a version like '1.2.0-learned.1'")
    if base is not None and learning is not None:
        _refuse("nothing is learned on top of a learned release")


def is_learned(version: ModelVersion) -> bool:
    """Whether a version is one of a learned release: `1.2.0-learned.1`. Its path is what the online role may sign."""
    return version.partition("-")[2].startswith("learned.")


def _refuse(message: str, *, hint: str = "") -> None:
    raise InvalidValue(message, code="invalid.manifest", hint=hint)
