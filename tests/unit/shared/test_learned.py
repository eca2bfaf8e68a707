"""Learned releases: each thing that a thief of the online key cannot do, and the one that the base allows."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from msgspec.structs import replace

from shared.errors import InvalidValue, TrustError
from shared.ids import Digest, ModelVersion
from shared.learned import check_learned_file, check_learned_manifest, with_tensors
from shared.model import FileRef, Learning, Manifest, Preparation, check_manifest, decode_manifest, encode_manifest

onnx: Any = pytest.importorskip("onnx")

from tests.fakes.releases import sign_classifier  # noqa: E402 - after the skip, because it needs onnx

MADE = sign_classifier()
BASE = replace(MADE.manifest, learning=Learning(variant="fp32", tensors=("w",), max_shift=1.0))
BASE_REF = FileRef(path="models/sample/1.0.0/manifest.json", length=2000, digest=Digest("b" * 64))


def learned(**changes: Any) -> Manifest:
    version = ModelVersion("1.1.0-learned.1")
    prefix = f"models/sample/{version}/"
    variant = BASE.variants[0]
    file = replace(variant.file, path=prefix + "fp32.onnx", digest=Digest("c" * 64))
    made = replace(
        BASE,
        version=version,
        variants=(replace(variant, file=file, accuracy=0.9, answers=(1,) * len(variant.answers)),),
        golden=replace(BASE.golden, file=replace(BASE.golden.file, path=prefix + "golden.bin")),
        learning=None,
        base=BASE_REF,
    )
    return replace(made, **changes)


def refusal(manifest: Manifest, base: Manifest = BASE) -> str:
    with pytest.raises(TrustError) as caught:
        check_learned_manifest(manifest, base)
    assert caught.value.code == "trust.learned"
    return caught.value.message


def moved(*deltas: float) -> bytearray:
    """The model's bytes with its first weights moved by these."""
    data = bytearray(MADE.model)
    weights = struct.pack("<4f", 1, -1, -1, 1)
    at = data.index(weights)
    values = [value + delta for value, delta in zip((1, -1, -1, 1), (*deltas, 0, 0, 0, 0), strict=False)]
    data[at : at + 16] = struct.pack("<4f", *values)
    return data


def check(data: bytes | bytearray, *, tensors: tuple[str, ...] = ("w",), max_shift: float = 1.0) -> float:
    return check_learned_file(memoryview(data), memoryview(MADE.model), tensors=tensors, max_shift=max_shift)


def test_other_numbers_in_the_head_are_what_is_allowed() -> None:
    check_learned_manifest(learned(), BASE)
    check_manifest(learned())
    check_manifest(BASE)
    assert decode_manifest(encode_manifest(learned())) == learned()
    assert check(moved(0.5, 0.5)) == pytest.approx(0.5**0.5)
    assert check(MADE.model) == 0


@pytest.mark.parametrize("deltas", [(0.7, 0.8), (float("nan"),), (float("inf"),), (-1e30, 1e30)])
def test_a_head_that_moved_too_far_is_refused(deltas: tuple[float, ...]) -> None:
    with pytest.raises(TrustError, match="moved by"):
        check(moved(*deltas))


def test_another_graph_is_refused() -> None:
    for place in range(len(MADE.model)):
        data = bytearray(MADE.model)
        data[place] ^= 1
        if struct.pack("<4f", 1, -1, -1, 1) in data:
            with pytest.raises(TrustError, match="graph is another"):
                check(data)
    for other in (MADE.model[:-1], MADE.model + b"\0"):
        with pytest.raises(TrustError, match="length"):
            check(other)


def test_numbers_are_put_into_the_base_and_nothing_else_is_touched() -> None:
    assert with_tensors(MADE.model, {"w": struct.pack("<4f", 1.5, -0.5, -1, 1)}) == bytes(moved(0.5, 0.5))
    with pytest.raises(TrustError, match="another size"):
        with_tensors(MADE.model, {"w": struct.pack("<3f", 1, 1, 1)})
    with pytest.raises(TrustError, match="does not hold"):
        with_tensors(MADE.model, {"v": b""})


def test_tensors_that_the_base_does_not_have_are_refused() -> None:
    for tensors in (("w", "v"), ("v",), ("w", "w")):
        with pytest.raises(TrustError, match="does not hold"):
            check(MADE.model, tensors=tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ("high", "low")},
        {"min_release_counter": 2},
        {"profiles": ("jetson",)},
        {"preparations": (Preparation(input="x", scale=2.0),)},
        {"task": "raw"},
        {"golden": replace(BASE.golden, min_agreement=0.0)},
        {"golden": replace(BASE.golden, file=replace(BASE.golden.file, digest=Digest("d" * 64)))},
        {"learning": BASE.learning},
    ],
)
def test_a_manifest_that_says_something_else_is_refused(changes: dict[str, Any]) -> None:
    assert "says something else" in refusal(learned(**changes))


def test_other_variants_other_lengths_and_other_counters_are_refused() -> None:
    variant = learned().variants[0]
    assert "other variants" in refusal(learned(variants=(variant, replace(variant, name="int8"))))
    assert "other variants" in refusal(learned(variants=(replace(variant, name="int8"),)))
    longer = replace(variant, file=replace(variant.file, length=variant.file.length + 1))
    assert "another length" in refusal(learned(variants=(longer,)))
    for counter in (0, 2):
        assert "counter" in refusal(learned(release_counter=counter), replace(BASE, release_counter=1))
    assert "only ONNX" in refusal(learned(variants=(replace(variant, runtime="litert"),)))


def test_nothing_is_learned_on_what_nobody_opened_or_what_was_learned() -> None:
    assert "nothing may be learned" in refusal(learned(), replace(BASE, learning=None))
    assert "nothing may be learned" in refusal(learned(), replace(BASE, base=BASE_REF))


@pytest.mark.parametrize(
    "made",
    [
        learned(version=ModelVersion("1.1.0")),
        replace(BASE, version=ModelVersion("1.0.0-learned.1")),
        learned(base=replace(BASE_REF, path="models/other/1.0.0/manifest.json")),
        learned(learning=BASE.learning),
        replace(BASE, learning=Learning(variant="int8", tensors=("w",), max_shift=1.0)),
        replace(BASE, learning=Learning(variant="fp32", tensors=(), max_shift=1.0)),
        replace(BASE, learning=Learning(variant="fp32", tensors=("w",), max_shift=float("inf"))),
    ],
)
def test_a_manifest_must_say_plainly_what_it_is(made: Manifest) -> None:
    with pytest.raises(InvalidValue):
        check_manifest(made)
