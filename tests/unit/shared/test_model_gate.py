"""Admission: a corpus of hostile files is refused with reasons, honest models pass, and no bytes crash the gates."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits
from shared.errors import InvalidValue
from shared.litert_gate import check_litert
from shared.model_gate import check_model
from tests.fakes import flatbuffers as fb
from tests.fakes import hostile_models as hostile
from tests.fakes.hostile_models import Hostile
from tests.unit.host.test_runtimes import DOUBLER_FP32, DOUBLER_INT8


def refusal(case: Hostile) -> InvalidValue:
    with pytest.raises(InvalidValue) as caught:
        check_model(case.make(), runtime=case.runtime)
    assert caught.value.code == "model.admission"
    assert caught.value.hint
    assert case.says in caught.value.message
    return caught.value


@pytest.mark.parametrize("name", sorted(hostile.LITERT))
def test_hostile_litert_is_refused(name: str) -> None:
    if name == "an ONNX file":
        pytest.importorskip("onnx")
    refusal(hostile.LITERT[name])


@pytest.mark.parametrize("name", sorted(hostile.FOREIGN))
def test_what_is_no_graph_is_named(name: str) -> None:
    refusal(hostile.FOREIGN[name])


@pytest.mark.parametrize("name", sorted(hostile.ONNX))
def test_hostile_onnx_is_refused(name: str) -> None:
    pytest.importorskip("onnx")
    refusal(hostile.ONNX[name])


@pytest.mark.parametrize("model", [DOUBLER_FP32, DOUBLER_INT8, hostile.litert()])
def test_honest_litert_passes(model: bytes) -> None:
    check_model(model, runtime="litert")
    summary = check_litert(bytearray(model))
    assert (summary.subgraphs, summary.operators, summary.tensors, summary.builtins) == (1, 1, 2, (0,))


def test_honest_onnx_passes() -> None:
    pytest.importorskip("onnx")
    check_model(hostile.onnx_file(), runtime="onnx")


def test_nested_loops_pass_up_to_the_limit() -> None:
    def nested(depth: int) -> bytes:
        graphs = [hostile.graph(hostile.calling(index + 1)) for index in range(depth - 1)]
        codes = [{0: fb.i8(119), 3: fb.i32(119)}, {0: fb.i8(0), 3: fb.i32(0)}]
        return hostile.litert(*graphs, hostile.graph(hostile.operator(f0=fb.i32(1))), f1=codes)

    assert check_litert(nested(limits.MAX_GRAPH_DEPTH)).subgraphs == limits.MAX_GRAPH_DEPTH
    with pytest.raises(InvalidValue, match="nest deeper"):
        check_litert(nested(limits.MAX_GRAPH_DEPTH + 1))


def test_a_dense_layer_may_lack_its_bias() -> None:
    layer = hostile.operator(f1=fb.vector(0, 0, -1), f3=fb.i8(8), f4={0: fb.i8(0)})
    assert check_litert(hostile.litert(hostile.graph(layer), code=9)).builtins == (9,)


def test_the_runtime_takes_what_the_writer_of_these_tests_made() -> None:
    """So that the hostile files are refused for their hostility and not because nobody could read them."""
    interpreter: Any = pytest.importorskip("ai_edge_litert.interpreter", reason="pip install 'outrider[litert]'")
    made = interpreter.Interpreter(model_content=hostile.litert())
    made.allocate_tensors()
    assert [detail["name"] for detail in made.get_input_details()] == ["x"]


@given(st.binary(max_size=300))
def test_any_bytes_end_in_a_refusal(data: bytes) -> None:
    for head in (b"", b"\x10\0\0\0TFL3"):
        with pytest.raises(InvalidValue):
            check_litert(head + data)


def test_changed_bytes_end_in_a_refusal_or_a_summary() -> None:
    draw = random.Random(7)
    refused = 0
    for _ in range(4000):
        data = bytearray(draw.choice((DOUBLER_FP32, DOUBLER_INT8)))
        for _ in range(draw.choice((1, 2, 4))):
            place = draw.randrange(8, len(data)) // 4 * 4
            word = draw.choice((0, 1, 4, 2**31 - 1, 2**32 - 1, draw.randrange(2**32)))
            data[place : place + 4] = word.to_bytes(4, "little")
        try:
            check_litert(bytes(data[: draw.choice((len(data), draw.randrange(len(data))))]))
        except InvalidValue:
            refused += 1
    assert 3000 < refused < 4000
