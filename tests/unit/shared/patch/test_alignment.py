"""Alignment: tensors by name wherever they lie, anything else by content."""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shared.errors import InvalidValue
from shared.onnx_tensors import find_tensors
from shared.patch import format as form
from shared.patch import making
from shared.patch.alignment import Segment, align

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(4)
WEIGHTS = RNG.normal(0, 1, (40, 30)).astype(np.float32)
BYTES = RNG.integers(-128, 127, 2_000).astype(np.int8)


def model(tensors: dict[str, NDArray[np.generic]], *, note: str = "", constant: bool = False) -> bytes:
    """A graph that holds these tensors, as initializers or as constants of nodes."""
    nodes = [helper.make_node("Identity", ["x"], ["y"], doc_string=note)]
    made = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    if constant:
        nodes += [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in made]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [1])],
        [helper.make_tensor_value_info("y", FLOAT, [1])],
        [] if constant else made,
    )
    data: bytes = helper.make_model(graph).SerializeToString()
    return data


def arrays(*files: bytes) -> list[NDArray[np.uint8]]:
    return [np.frombuffer(file, np.uint8) for file in files]


def covered(segments: list[Segment]) -> None:
    at = 0
    for segment in segments:
        assert segment.result >= at
        at = segment.result + segment.length


@pytest.mark.parametrize("constant", [False, True])
def test_tensors_are_found_as_onnx_finds_them(constant: bool) -> None:
    data = model({"w": WEIGHTS, "b": BYTES}, constant=constant)
    found = {span.name.rpartition("/")[2]: span for span in find_tensors(memoryview(data))}
    for name, array, width in (("w", WEIGHTS, 4), ("b", BYTES, 1)):
        assert data[found[name].begin : found[name].end] == array.tobytes()
        assert found[name].width == width


def test_what_is_no_onnx_is_refused_and_aligned_by_content() -> None:
    junk = random.Random(1).randbytes(5000)
    with pytest.raises(InvalidValue):
        find_tensors(memoryview(b"\xff" + junk))
    base, result = b"\xff" + junk, b"\xff" + junk[:2000] + b"new" + junk[2000:]
    segments = align(*arrays(base, result))
    covered(segments)
    assert sum(segment.length for segment in segments) >= len(junk) - 32
    for segment in segments:
        if segment.result > 2003:
            assert segment.result - segment.base == 3


def test_tensors_that_changed_places_are_paired_by_name_and_type() -> None:
    tuned = WEIGHTS + np.float32(1e-4)
    base = model({"w": WEIGHTS, "b": BYTES, "same": WEIGHTS[:8]})
    result = model({"same": WEIGHTS[:8].view(np.int32), "b": BYTES, "w": tuned}, note="x" * 148)
    assert onnx.load_from_string(result).graph.initializer[2].name == "w"
    segments = align(*arrays(base, result))
    covered(segments)
    spans = {span.name: span for span in find_tensors(memoryview(result))}
    old = {span.name: span for span in find_tensors(memoryview(base))}
    paired = {segment.result: segment for segment in segments if segment.width}
    assert paired[spans["w"].begin].base == old["w"].begin
    assert paired[spans["w"].begin].width == 4
    assert paired[spans["b"].begin].base == old["b"].begin
    assert spans["same"].begin not in paired, "another type is another tensor"


def test_words_are_subtracted_as_words_and_what_is_equal_is_copied() -> None:
    base = model({"w": WEIGHTS, "still": RNG.integers(0, 255, 20_000).astype(np.uint8)})
    result = base.replace(WEIGHTS.tobytes(), (WEIGHTS + np.float32(1e-5)).tobytes())
    kinds = {step.kind: step.length for step in making.plan(*arrays(base, result))}
    assert kinds[form.COPY] >= 16_384
    assert kinds[form.ADD_WORDS] <= WEIGHTS.nbytes


def test_half_floats_are_subtracted_as_shorts() -> None:
    half = WEIGHTS.astype(np.float16)
    base = model({"w": half})
    result = model({"w": (half.view(np.uint16) + np.uint16(1)).view(np.float16)})
    assert form.ADD_SHORTS in {step.kind for step in making.plan(*arrays(base, result))}
