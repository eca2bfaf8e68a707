"""What a learned release may be: its base with other numbers in the head, and nothing else.

A learned release is signed by a key that lies on the hub, so its signature says little. What it says is held against
a base that a person signed: first the manifests (`check_learned_manifest`), then the files (`check_learned_file`).
Whoever steals the key can move the named tensors within the base's bound on devices that opted in, and nothing else.

Pure, and in standard Python only: `math.dist` runs over a million numbers in a few milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec.structs import replace

from shared.errors import TrustError
from shared.model import Manifest
from shared.onnx_tensors import TensorSpan, find_tensors
from shared.release import LEARNED_CODE

_FLOAT: Final = 1
_HINT: Final = "let a person sign this release, or learn it again from its base"


def check_learned_manifest(learned: Manifest, base: Manifest) -> None:
    """Raise TrustError `trust.learned` unless only version, lineage and one variant's file are other.

    Args:
        learned: names `base` by digest, which the caller has checked.
        base: signed by a person.
    """
    bounds = base.learning
    if bounds is None or base.base is not None:
        raise _refusal(f"nothing may be learned on top of {base.family} {base.version}")
    if [variant.name for variant in learned.variants] != [bounds.variant]:
        raise _refusal(f"it has other variants than {bounds.variant!r}")
    ours = next(variant for variant in base.variants if variant.name == bounds.variant)
    theirs = learned.variants[0]
    if theirs.runtime != "onnx" or ours.runtime != "onnx":
        raise _refusal("only ONNX files can be compared")
    if theirs.file.length != ours.file.length:
        raise _refusal("its file has another length than its base's")
    if learned.release_counter != base.release_counter:
        # What withdraws the base withdraws what was learned on it: a security floor must not be outrun.
        raise _refusal("its release counter is not its base's")
    # Everything else, what is added to manifests later included, is the base's.
    expected = replace(
        base,
        version=learned.version,
        variants=learned.variants,
        lineage=learned.lineage,
        golden=replace(base.golden, file=replace(base.golden.file, path=learned.golden.file.path)),
        learning=None,
        base=learned.base,
    )
    if learned != expected:
        raise _refusal("its manifest says something else than its base's")
    if theirs.ram_bytes > 2 * max(ours.ram_bytes, 1) and ours.ram_bytes:
        raise _refusal("it claims to need other memory than its base")


def check_learned_file(learned: memoryview, base: memoryview, *, tensors: Sequence[str], max_shift: float) -> float:
    """How far the head moved; raises TrustError `trust.learned` when anything else differs, or it moved too far.

    Args:
        learned, base: the bytes of two ONNX files.
        tensors: names of the initializers that may differ, float32.
        max_shift: the most that the Euclidean norm of their differences may be.
    """
    if len(learned) != len(base):
        raise _refusal("its file has another length than its base's")
    spans = _named(base, tensors)
    place, squares = 0, 0.0
    for span in spans:
        if learned[place : span.begin] != base[place : span.begin]:
            raise _refusal("its graph is another one than its base's")
        before, after = (view[span.begin : span.end].cast("B").tobytes() for view in (base, learned))
        distance = math.dist(memoryview(after).cast("f"), memoryview(before).cast("f"))
        squares += distance * distance
        place = span.end
    if learned[place:] != base[place:]:
        raise _refusal("its graph is another one than its base's")
    shift = math.sqrt(squares)
    # Written so that a shift that is no number is refused as well.
    if not shift <= max_shift:
        raise _refusal(f"its head moved by {shift:.4g}, its base allows {max_shift:.4g}")
    return shift


def with_tensors(base: bytes, numbers: Mapping[str, bytes]) -> bytes:
    """The base's file with these raw numbers in its tensors, every other byte as it was.

    Args:
        base: the bytes of an ONNX file.
        numbers: float32 in the order of the graph, little-endian, by the name of the initializer.

    Raises:
        TrustError: `trust.learned` when the base does not hold a tensor once as raw float32 data, or it is of another
            size.
    """
    made = bytearray(base)
    for span in _named(memoryview(base), tuple(numbers)):
        new = numbers[span.name]
        if len(new) != span.end - span.begin:
            raise _refusal(f"the numbers for {span.name[:80]!r} have another size than the base's")
        made[span.begin : span.end] = new
    return bytes(made)


def _named(base: memoryview, tensors: Sequence[str]) -> list[TensorSpan]:
    """The base's own places decide; the learned file is only compared there."""
    found = [span for span in find_tensors(base) if span.name in tensors]
    if sorted(span.name for span in found) != sorted(tensors):
        raise _refusal("the base does not hold each of the tensors that may be learned once, as raw data")
    if any(span.dtype != _FLOAT or (span.end - span.begin) % 4 for span in found):
        raise _refusal("the tensors that may be learned are not float32")
    return sorted(found, key=lambda span: span.begin)


def _refusal(why: str) -> TrustError:
    return TrustError(f"this learned release is not to be trusted: {why}", code=LEARNED_CODE, hint=_HINT)
