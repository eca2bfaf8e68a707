"""Manifests: the same release has the same bytes, and one that disagrees with itself is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits
from shared.errors import InvalidValue
from shared.ids import Digest, FamilyName, ModelVersion
from shared.model import (
    FileRef,
    Golden,
    Lineage,
    Manifest,
    Preparation,
    Signature,
    TensorSpec,
    Variant,
    check_manifest,
    check_preparations,
    check_signature,
    decode_manifest,
    encode_manifest,
    manifest_path,
    target_path,
)

FAMILY, VERSION = FamilyName("digits"), ModelVersion("1.0.0")
texts = st.text(st.characters(codec="utf-8"), max_size=20)


def a_file(name: str, *, length: int = 10) -> FileRef:
    return FileRef(path=target_path(FAMILY, VERSION, name), length=length, digest=Digest("ab" * 32))


def a_manifest(**changes: Any) -> Manifest:
    spec = TensorSpec(name="x", dtype="fp32", shape=(-1, 64))
    manifest = Manifest(
        family=FAMILY,
        version=VERSION,
        release_counter=3,
        min_release_counter=1,
        task="classification",
        signature=Signature(inputs=(spec,), outputs=(TensorSpec(name="y", dtype="fp32", shape=(-1, 10)),)),
        preparations=(Preparation(input="x", scale=1 / 16),),
        labels=tuple("0123456789"),
        golden=Golden(file=a_file("golden.bin"), samples=2, min_agreement=0.99),
        variants=(Variant(name="int8", runtime="onnx", file=a_file("int8.onnx"), accuracy=0.97, answers=(1, 2)),),
    )
    return msgspec.structs.replace(manifest, **changes)


@given(
    counter=st.integers(1, 2**53 - 1),
    labels=st.lists(texts, max_size=5).map(tuple),
    lineage=st.builds(Lineage, training_data=texts, parameters=st.dictionaries(texts, texts, max_size=3)),
    scale=st.floats(allow_nan=False, allow_infinity=False),
)
def test_a_manifest_survives_and_the_same_release_has_the_same_bytes(
    counter: int, labels: tuple[str, ...], lineage: Lineage, scale: float
) -> None:
    preparations = (Preparation(input="x", scale=scale),)
    manifest = a_manifest(release_counter=counter, labels=labels, lineage=lineage, preparations=preparations)
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert encode_manifest(decode_manifest(data)) == data
    shuffled = dict(reversed(list(json.loads(data).items())))
    assert encode_manifest(decode_manifest(json.dumps(shuffled).encode())) == data


def test_paths_of_a_release() -> None:
    assert manifest_path(FAMILY, VERSION) == "models/digits/1.0.0/manifest.json"


@given(st.binary(max_size=100))
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidValue):
        decode_manifest(data)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 50_000,
        b'{"family": "\xff\xfe"}',
        b" " * (limits.MAX_MANIFEST_BYTES + 1),
        b'{"lineage":' * 20_000,
    ],
    ids=["nested", "not-utf8", "too-long", "nested-objects"],
)
def test_hostile_manifests_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidValue):
        decode_manifest(data)


def a_variant(**changes: Any) -> dict[str, Any]:
    return {"variants": (msgspec.structs.replace(a_manifest().variants[0], **changes),)}


def a_golden(**changes: Any) -> dict[str, Any]:
    return {"golden": msgspec.structs.replace(a_manifest().golden, **changes)}


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"family": FamilyName("Digits")},
        {"version": ModelVersion("1")},
        {"release_counter": 0},
        {"release_counter": 2**53},
        {"min_release_counter": 4},
        {"min_release_counter": -1},
        {"variants": ()},
        {"variants": a_manifest().variants * 2},
        {"labels": ("l",) * (limits.MAX_LABELS + 1)},
        a_variant(answers=(1,)),
        a_variant(file=a_file("a/b.onnx")),
        a_variant(file=a_file("")),
        a_variant(file=a_file("..")),
        a_variant(file=a_file(".hidden")),
        a_variant(file=a_file("int8.onnx", length=0)),
        a_variant(file=a_file("int8.onnx", length=limits.MAX_MODEL_BYTES + 1)),
        a_variant(file=FileRef(path="models/other/1.0.0/int8.onnx", length=1, digest=Digest("ab" * 32))),
        a_variant(file=msgspec.structs.replace(a_file("int8.onnx"), digest=Digest("AB" * 32))),
        a_variant(name="../int8"),
        a_variant(accuracy=1.5),
        a_golden(samples=0),
        a_golden(samples=limits.MAX_GOLDEN_SAMPLES + 1),
        a_golden(min_agreement=1.01),
        a_golden(min_agreement=math.nan),
        a_golden(file=a_file("golden.bin", length=limits.MAX_GOLDEN_BYTES + 1)),
        {"preparations": (Preparation(input="x"), Preparation(input="x"))},
    ],
    ids=str,
)
def test_a_manifest_that_disagrees_with_itself_is_refused(changes: dict[str, Any]) -> None:
    check_manifest(a_manifest())
    with pytest.raises(InvalidValue):
        check_manifest(a_manifest(**changes))


@pytest.mark.parametrize("shape", [(0,), (-2,), (1,) * (limits.MAX_TENSOR_RANK + 1)], ids=str)
def test_unusable_shapes_are_refused(shape: tuple[int, ...]) -> None:
    good = TensorSpec(name="y", dtype="fp32", shape=(1,))
    with pytest.raises(InvalidValue):
        check_signature(Signature(inputs=(TensorSpec(name="x", dtype="fp32", shape=shape),), outputs=(good,)))


@pytest.mark.parametrize("count", [0, 2, limits.MAX_TENSORS + 1])
def test_a_signature_needs_inputs_with_distinct_names(count: int) -> None:
    spec = TensorSpec(name="x", dtype="fp32", shape=(1,))
    with pytest.raises(InvalidValue):
        check_signature(Signature(inputs=(spec,) * count, outputs=(spec,)))


@pytest.mark.parametrize(
    "preparation",
    [
        Preparation(input="z"),
        Preparation(input="x", std=(0.0,)),
        Preparation(input="x", mean=(math.inf,)),
        Preparation(input="x", scale=math.nan),
        Preparation(input="x", mean=(0.0, 1.0)),
        Preparation(input="x", std=()),
    ],
    ids=str,
)
def test_preparations_that_do_not_fit_are_refused(preparation: Preparation) -> None:
    with pytest.raises(InvalidValue):
        check_preparations(a_manifest().signature, (preparation,))


def test_a_preparation_may_hold_one_value_per_element() -> None:
    check_preparations(a_manifest().signature, (Preparation(input="x", mean=(0.5,) * 64, std=(2.0,) * 64),))
