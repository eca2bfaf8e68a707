"""What may become a release and who may be told to run it: decisions only, over plain values.

The rule of the gate: a variant is released when the *measured* drop of accuracy on the golden set, against the
uploaded fp32 model on the same rows, is at most `max_drop_pt` points, and its accuracy at least `min_accuracy` where
that is given. The upper bound of the drop (paired bootstrap, one-sided 95 %) is reported beside it and decides
nothing: a few hundred samples cannot prove half a point, and a gate that asked for proof would refuse every model.
A variant that fails is left out and the report says why; a model of which no variant passes is rejected.

Not here: signatures and thresholds of metadata (shared/trust/repository.py), measuring (builder.py), storage.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace

from shared import limits
from shared.errors import Conflict, InvalidValue, TrustError
from shared.ids import DeviceId, Digest, FamilyName, ModelVersion, parse_digest, parse_family, parse_version
from shared.model import (
    FileRef,
    Learning,
    Lineage,
    Preparation,
    Signature,
    Task,
    check_preparations,
    check_signature,
    is_learned,
)
from shared.release import AssignedModel, Assignment

State = Literal["building", "ready", "rejected"]
"""`building` until the child has reported; `ready` has a manifest, `rejected` a reason. Published is its own fact."""

MAX_LABEL_CHARS: Final = 200
MAX_COUNTER: Final = 2**53 - 1
MAX_LEAD: Final = 1_000_000
"""By how many assignments a device may be ahead of a hub that was restored from a backup. A word of more is not
believed: it would use up the device's versions, and what cannot be signed for one stops all that are signed with it."""
PATCH_BASES: Final = 4
"""From so many files, those that most devices of the fleet run, patches to a new release's file are made."""
PATCH_TARGETS: Final = 2
"""To the files of so many releases of a family, the newest."""
PATCH_WORTH: Final = 0.6
"""A patch is kept only below this share of what the whole file takes when it is compressed."""
LEARNED_VARIANT: Final = "fp32"
"""The variant whose numbers runs learn; the one that is uploaded."""
DROP_SLACK_PT: Final = 1e-9
"""Below any difference that two counts of samples can make; absorbs rounding only."""


class Gate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a variant must reach.

    Attributes:
        max_drop_pt: how many points (percent) of accuracy it may lose against fp32 on the golden set.
        min_accuracy: share of labelled golden rows, 0 to 1, that it must get right; None asks nothing.
        min_agreement: goes into the manifest: share of rows on which a device must get the recorded answer.
    """

    max_drop_pt: float = 1.0
    min_accuracy: float | None = None
    min_agreement: float = 0.98


class Push(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request to make a release of an uploaded model.

    Attributes:
        model: digest of the uploaded fp32 ONNX file.
        golden: digest of the uploaded golden file.
        calibration: digest of an uploaded file in the golden format that calibrates int8; None takes the golden
            set, and the report warns that the gate then measures on rows the quantizer has seen.
        signature: what callers send and get; None takes it from the graph.
        min_release_counter: the security floor that the release carries; None keeps the family's present one.
        learning: what the hub may learn on top of it by itself; None: nothing.
        learned_on: of a release that the hub learned, its base; everything but the model is that one's then.
    """

    family: FamilyName
    version: ModelVersion
    model: Digest
    golden: Digest
    calibration: Digest | None = None
    labels: tuple[str, ...] = ()
    task: Task = "classification"
    signature: Signature | None = None
    preparations: tuple[Preparation, ...] = ()
    lineage: Lineage = Lineage()
    gate: Gate = Gate()
    min_release_counter: int | None = None
    learning: Learning | None = None
    learned_on: ModelVersion | None = None


class VariantReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a variant.

    Attributes:
        released: whether it passed its gate; `reason` says why not.
        accuracy: share of labelled golden rows answered right (`raw` models: rows within tolerance of fp32).
        drop_pt, drop_bound_pt: points lost against fp32, and the bootstrap's upper bound of that.
        agreement: share of all golden rows with the same answer as fp32.
        p50_us: median time of one row, one thread, on the hub.
        ram_bytes: resident size of a process that holds it.
        file: its name in the build's folder; empty when there is none.
    """

    name: str
    released: bool
    reason: str = ""
    accuracy: float = 0.0
    drop_pt: float = 0.0
    drop_bound_pt: float = 0.0
    agreement: float = 0.0
    p50_us: int = 0
    ram_bytes: int = 0
    file: str = ""
    length: int = 0
    answers: tuple[int, ...] = ()


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a build ended. `code` and `reason` are empty when at least one variant passed."""

    code: str = ""
    reason: str = ""
    hint: str = ""
    signature: Signature | None = None
    samples: int = 0
    labelled: int = 0
    variants: tuple[VariantReport, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that an assignment could be for, as the devices room knows it.

    Attributes:
        assignment_version: the newest assignment that the device says it has.
        running: digests of the model files that it says it serves, by family.
        standing: `quarantined` or `revoked` where it shall have none; empty else.
    """

    device: DeviceId
    labels: Mapping[str, str]
    online: bool
    assignment_version: int
    running: Mapping[str, Digest] = field(default_factory=dict)
    standing: str = ""


@dataclass(frozen=True, slots=True)
class BuiltVersion:
    """A version whose build is done: its place in the family and its files, the manifest and golden set included."""

    family: FamilyName
    version: ModelVersion
    release_counter: int
    files: tuple[FileRef, ...]


@dataclass(frozen=True, slots=True)
class PatchPair:
    """A patch worth trying: from a file that devices run to the same file of a newer version."""

    base: FileRef
    result: FileRef


@dataclass(frozen=True, slots=True)
class Skipped:
    """A device that an assignment is not for, and why."""

    device: str
    reason: str


class Named(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A release by its name."""

    family: FamilyName
    version: ModelVersion


class Selector(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which release goes to which devices: exactly one of `devices`, `labels` and `all` is given.

    Attributes:
        together: further releases that devices change to in one step with this one, or not at all; their families are
            a set from then on. None leaves the family in the set that it is in, an empty list takes it out of it.
        force: also where the device has quarantined one of these releases.
    """

    family: FamilyName
    version: ModelVersion
    together: tuple[Named, ...] | None = None
    devices: tuple[str, ...] | None = None
    labels: dict[str, str] | None = None
    all: bool = False
    force: bool = False


def check_push(push: Push) -> None:
    """Raise InvalidValue naming the field unless the request could become a release."""
    parse_family(push.family)
    parse_version(push.version)
    for digest in (push.model, push.golden, push.calibration):
        if digest is not None:
            parse_digest(digest)
    if len(push.labels) > limits.MAX_LABELS or len(set(push.labels)) != len(push.labels):
        _refuse("labels", f"give at most {limits.MAX_LABELS} distinct labels")
    if any(not 0 < len(label) <= MAX_LABEL_CHARS for label in push.labels):
        _refuse("labels", f"a label has 1 to {MAX_LABEL_CHARS} characters")
    # Before the build: afterwards there would be a release that its manifest cannot hold.
    if sum(len(label.encode()) for label in push.labels) > limits.MAX_MANIFEST_BYTES:
        _refuse("labels", f"all labels together go into a manifest of at most {limits.MAX_MANIFEST_BYTES} bytes")
    if push.task == "classification" and len(push.labels) < 2:
        _refuse("labels", "a classification model needs at least two labels, in the order of its output")
    if push.signature is not None:
        check_signature(push.signature)
        check_preparations(push.signature, push.preparations)
    if push.learning is not None and push.learning.variant != LEARNED_VARIANT:
        _refuse("learning.variant", f"only {LEARNED_VARIANT!r} holds the numbers that runs learn")
    if push.learned_on is not None or is_learned(push.version):
        _refuse("version", "what is learned on a release is sent to /v1/learned, by the name of its base")
    gate = push.gate
    if not (math.isfinite(gate.max_drop_pt) and 0 <= gate.max_drop_pt <= 100):
        _refuse("gate.max_drop_pt", "give points between 0 and 100")
    for name, share in (("min_accuracy", gate.min_accuracy), ("min_agreement", gate.min_agreement)):
        if share is not None and not 0 <= share <= 1:
            _refuse(f"gate.{name}", "give a share between 0 and 1")
    if push.min_release_counter is not None and not 0 <= push.min_release_counter <= MAX_COUNTER:
        _refuse("min_release_counter", "give a whole number that is not negative")


def learned_push(base: Push, *, version: ModelVersion, model: Digest, lineage: Lineage) -> Push:
    """The push of a learned release: its base's with another model; raises InvalidValue for a version of another kind.

    Args:
        base: what was pushed of the base.
        version: `1.2.0-learned.1`.
        model: digest of the base's file with other numbers in its head.
    """
    parse_version(version)
    if not is_learned(version):
        _refuse("version", "a learned release has a version like 1.2.0-learned.1")
    return replace(
        base, version=version, model=model, lineage=lineage, learning=None, learned_on=base.version,
        min_release_counter=None,
    )  # fmt: skip


def learned_verdict(gate: Gate, *, accuracy: float, base: float) -> str:
    """Why a learned release is not good enough beside its base, in words; empty when it is."""
    return gate_verdict(gate, accuracy=accuracy, drop_pt=100.0 * (base - accuracy))


def next_counter(counters: Iterable[int]) -> int:
    """The release counter after those of the family so far; raises Conflict when none is left."""
    following = max(counters, default=0) + 1
    if following > MAX_COUNTER:
        raise Conflict("the family's release counter is used up", code="conflict.counter")
    return following


def release_floor(*, wanted: int | None, present: int, counter: int) -> int:
    """The `min_release_counter` of a new release: what was asked for, else the family's present floor.

    Raises:
        InvalidValue: the floor would lie above the release itself.
    """
    floor = present if wanted is None else wanted
    if floor > counter:
        raise InvalidValue(
            f"min_release_counter {floor} lies above the release's own counter {counter}",
            code="invalid.min_release_counter",
            hint=f"give at most {counter}",
        )
    return floor


def gate_verdict(gate: Gate, *, accuracy: float, drop_pt: float) -> str:
    """Why a variant fails its gate, in words; empty when it passes."""
    if drop_pt > gate.max_drop_pt + DROP_SLACK_PT:
        return f"accuracy drops by {drop_pt:.2f} points, the gate allows {gate.max_drop_pt:.2f}"
    if gate.min_accuracy is not None and accuracy < gate.min_accuracy:
        return f"accuracy is {accuracy:.4f}, the gate asks for {gate.min_accuracy:.4f}"
    return ""


def check_listed(listed: Sequence[FileRef], *, release: Sequence[FileRef]) -> None:
    """Raise TrustError unless what new metadata adds is exactly the release's files, as they were built."""
    wanted = {file.path: file for file in release}
    for file in listed:
        built = wanted.get(file.path)
        if built is None:
            raise _distrust(f"{file.path!r} is not part of the release", code="trust.unknown_target")
        if built != file:
            raise _distrust(f"{file.path!r} was built with another length or digest", code="trust.digest")
    missing = sorted(set(wanted) - {file.path for file in listed})
    if missing:
        raise _distrust(f"{missing[0]!r} of the release is not listed", code="trust.unknown_target")


def select(candidates: Sequence[Candidate], selector: Selector) -> tuple[tuple[DeviceId, ...], tuple[Skipped, ...]]:
    """The devices that a selector means, and those it names but cannot have, with the reason."""
    given = (selector.devices is not None) + (selector.labels is not None) + selector.all
    if given != 1 or selector.devices == () or selector.labels == {}:
        raise InvalidValue(
            "give exactly one of devices, labels and all",
            code="invalid.selector",
            hint="name devices, or labels that they carry, or all; an empty list or object selects nothing",
        )
    by_name = {candidate.device: candidate for candidate in candidates}
    skipped: list[Skipped] = []
    if selector.devices is not None:
        names = dict.fromkeys(selector.devices)
        skipped += [Skipped(name, "unknown") for name in names if name not in by_name]
        meant = [by_name[DeviceId(name)] for name in names if name in by_name]
    else:
        wanted = (selector.labels or {}).items()
        meant = [candidate for candidate in candidates if wanted <= candidate.labels.items()]
    skipped += [Skipped(candidate.device, candidate.standing) for candidate in meant if candidate.standing]
    return tuple(candidate.device for candidate in meant if not candidate.standing), tuple(skipped)


def named(selector: Selector) -> tuple[Named, ...]:
    """Every release that a selector names; raises InvalidValue when it names a family twice or too many."""
    releases = (Named(family=selector.family, version=selector.version), *(selector.together or ()))
    if not len({one.family for one in releases}) == len(releases) <= limits.MAX_MODELS_PER_DEVICE:
        raise InvalidValue(
            f"together with {selector.family} name other families, each once, at most "
            f"{limits.MAX_MODELS_PER_DEVICE} in all",
            code="invalid.together",
        )
    return releases


def sets_after(
    sets: Sequence[Sequence[FamilyName]], families: Collection[FamilyName], *, together: bool | None
) -> tuple[tuple[FamilyName, ...], ...]:
    """The sets of families that change together, once these were assigned.

    Args:
        sets: as they were.
        together: whether these families are a set from now on, or each in none; None leaves all as they were.
    """
    if together is None:
        return tuple(tuple(families) for families in sets)
    left = [tuple(family for family in members if family not in families) for members in sets]
    if together:
        left.append(tuple(sorted(families)))
    return tuple(sorted(members for members in left if len(members) > 1))


def next_assignment(
    current: Assignment | None, wanted: Sequence[AssignedModel], *, device: DeviceId, seen: int, force: bool,
    now_ms: int, ttl_ms: int, together: bool | None = None,
) -> Assignment | None:  # fmt: skip
    """The device's next assignment: its full desired state with some families set; or the same again, renewed.

    Its version follows both the last one signed and the newest that the device says it has, so that a hub restored
    from a backup catches up. A renewal drops what was forced once the device has seen it, because forcing again would
    lift a quarantine that came later.

    Args:
        current: the newest one signed, None for a new device.
        wanted: the releases to set; none renews what is there.
        together: whether they change as one from now on; None leaves the sets as they are.
        seen: the newest version that the device says it has; one that no hub can have signed (`is_ahead`) is ignored.

    Returns:
        None when the device would hold more models than a device may.
    """
    models = {model.family: model for model in current.models} if current else {}
    forced = set(current.force) if current and seen < current.version else set()
    for model in wanted:
        models[model.family] = model
        forced.discard(model.family)
        if force:
            forced.add(model.family)
    if not 1 <= len(models) <= limits.MAX_MODELS_PER_DEVICE:
        return None
    last = current.version if current else 0
    if is_ahead(last, seen=seen):
        last = seen
    return Assignment(
        device=device,
        version=last + 1,
        issued_ms=now_ms,
        expires_ms=now_ms + ttl_ms,
        models=tuple(models[family] for family in sorted(models)),
        force=tuple(sorted(forced)),
        together=sets_after(current.together if current else (), [model.family for model in wanted], together=together),
    )


def patch_pairs(versions: Sequence[BuiltVersion], running: Mapping[tuple[str, Digest], int]) -> tuple[PatchPair, ...]:
    """The patches that the fleet would use, most devices first.

    Args:
        versions: what was built.
        running: how many devices serve a file, by family and digest.
    """
    pairs: list[tuple[int, PatchPair]] = []
    for family in sorted({version.family for version in versions}):
        built = sorted((v for v in versions if v.family == family), key=lambda v: v.release_counter)
        counts = {digest: count for (name, digest), count in running.items() if name == family}
        common = sorted(counts, key=lambda digest: (-counts[digest], digest))[:PATCH_BASES]
        known = {file.digest: (version, file) for version in reversed(built) for file in version.files}
        for digest in common:
            if digest not in known:
                continue
            origin, base = known[digest]
            for version in built[-PATCH_TARGETS:]:
                # What was learned has its base's counter, and is the nearest to it of all.
                is_later = version.release_counter > origin.release_counter
                if not is_later and not (is_learned(version.version) and not is_learned(origin.version)):
                    continue
                # The same name is the same variant for the same runtime: int8.onnx, fp32.onnx.
                pairs += [
                    (counts[digest], PatchPair(base, file))
                    for file in version.files
                    if _name(file) == _name(base) and file.digest != digest
                ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1].base.digest, pair[1].result.digest))
    return tuple(pair for _, pair in pairs)


def running_files(reported: Mapping[str, Any]) -> dict[str, Digest]:
    """The digests of the files that a device says it serves, by family.

    A device's own word: it decides which help the device is offered and nothing else.
    """
    models = reported.get("models")
    return {
        str(model["family"]): Digest(str(model["digest"]))
        for model in (models if isinstance(models, list) else ())
        if isinstance(model, dict) and model.get("digest") and model.get("family")
    }


def patch_pays(*, length: int, full_packed: int) -> bool:
    """Whether a patch is worth keeping beside the whole file."""
    return length < PATCH_WORTH * full_packed


def _name(file: FileRef) -> str:
    return file.path.rpartition("/")[2]


def is_ahead(version: int, *, seen: int) -> bool:
    """Whether a device has seen newer assignments than the newest one here, as far as it can be believed."""
    return version < seen <= version + MAX_LEAD


def is_due(*, issued_ms: int, expires_ms: int, now_ms: int) -> bool:
    """Whether a signed document has lived half its life, so that it is time for the next one.

    A clock that stands before the issue (it was set back) also makes it due: what it says of expiry is worth nothing.
    """
    return now_ms < issued_ms or now_ms - issued_ms >= (expires_ms - issued_ms) // 2


def _refuse(field: str, message: str) -> None:
    raise InvalidValue(f"{field}: {message}", code="invalid.push")


def _distrust(message: str, *, code: str) -> TrustError:
    return TrustError(message, code=code, hint="fetch the proposal again and sign that")
