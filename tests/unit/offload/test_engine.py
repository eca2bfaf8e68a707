"""What a request gets does not depend on who shares its batch."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cloud_hub.offload.engine import Engine, Rows, Said
from shared.errors import InputRefused, ModelError
from shared.model import Preparation
from shared.tensors import from_wire
from shared.wire.golden import decode_golden
from tests.fakes.offload_room import now_us
from tests.fakes.releases import Build, build, sign_classifier


def engine(made: Build) -> Engine:
    return Engine(manifest=made.manifest, variant=made.variant, model=made.model, threads=1)


def rows(*values: tuple[float, float]) -> Rows:
    return Rows({"x": np.array(values, dtype=np.float32)}, len(values))


def scores(said: Said) -> NDArray[Any]:
    return from_wire(said.outputs, b"".join(said.payload))["scores"]


def identity(shape: list[Any], **changes: Any) -> Build:
    """What goes in comes out: so a test chooses the scores."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["scores"])],
        "identity",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape)],
    )
    golden = np.zeros((2, *(size or 2 for size in shape[1:])), dtype=np.float32)
    return build(graph, golden={"x": golden}, answers=(0, 0), labels=("low", "high"), **changes)


def test_each_gets_exactly_its_rows() -> None:
    requests = [rows((n, 0.0), (0.0, n)) for n in range(1, 9)]
    for number, verdict in enumerate(engine(sign_classifier()).answer(requests), start=1):
        assert isinstance(verdict, Said)
        assert verdict.labels == ("low", "high")
        assert scores(verdict).tolist() == [[number, -number], [-number, number]]


@pytest.mark.parametrize("odd", [(0.25, 0.75), (3.0, 1.0), (-1.0, 2.0), (float("nan"), 0.0)])
def test_together_is_as_alone_also_for_scores_of_two_kinds(odd: tuple[float, float]) -> None:
    """Probabilities are read as they are, logits through a softmax: by request, whoever is beside it."""
    made = engine(identity([None, 2]))
    requests = [rows((0.5, 0.5)), rows(odd), rows((0.9, 0.1)), rows((5.0, 0.0)), rows((0.2, 0.8), odd)]
    together = made.answer(requests)
    for request, verdict in zip(requests, together, strict=True):
        (alone,) = made.answer([request])
        if isinstance(alone, Said):
            assert isinstance(verdict, Said)
            assert verdict.labels == alone.labels
            assert list(verdict.confidences) == pytest.approx(list(alone.confidences))
        else:
            assert type(verdict) is type(alone)


def test_only_who_is_at_fault_fails() -> None:
    table = numpy_helper.from_array(np.eye(4, dtype=np.float32), "table")
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["scores"])],
        "lookup",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 4])],
        [table],
    )
    made = engine(build(graph, golden={"x": np.zeros(2, dtype=np.int64)}, answers=(0, 0)))
    requests = [Rows({"x": np.array([place])}, 1) for place in (1, 77, 3)]
    one, wrong, three = made.answer(requests)
    assert isinstance(one, Said)
    assert isinstance(three, Said)
    assert (one.labels, three.labels) == (("1",), ("3",))
    assert isinstance(wrong, ModelError)


def test_outputs_that_cannot_be_cut_are_run_one_by_one() -> None:
    graph = helper.make_graph(
        [helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0)],
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("total", TensorProto.FLOAT, [])],
    )
    made = engine(build(graph, golden={"x": np.ones((1, 2), dtype=np.float32)}))
    assert made.batch_rows == 1
    verdicts = made.answer([rows((1, 2)), rows((3, 4))])
    totals = [
        from_wire(one.outputs, b"".join(one.payload))["total"].item() for one in verdicts if isinstance(one, Said)
    ]
    assert totals == [3.0, 7.0]


def test_the_preparation_of_the_manifest_is_applied() -> None:
    plain = identity([None, 2])
    made = msgspec.structs.replace(
        plain.manifest, preparations=(Preparation(input="x", scale=2.0, mean=(1.0,), std=(0.5,)),)
    )
    (verdict,) = engine(msgspec.structs.replace(plain, manifest=made)).answer([rows((1.0, 3.0))])
    assert isinstance(verdict, Said)
    assert scores(verdict).tolist() == [[2.0, 10.0]]


def test_a_fixed_batch_is_known() -> None:
    assert engine(identity([2, 2])).batch_rows == 2
    assert engine(identity([None, 2])).batch_rows == 0


def test_a_warm_engine_tells_its_times() -> None:
    made = sign_classifier()
    golden = decode_golden(made.golden, made.manifest.signature)
    timed = engine(made).warm_up(golden, rows=(1, 32), now_us=now_us)
    assert [size for size, _ in timed] == [1, 32]
    assert [size for size, _ in engine(identity([2, 2])).warm_up(golden, rows=(1, 32), now_us=now_us)] == [2]


def test_what_is_no_model_or_another_is_refused() -> None:
    made = sign_classifier()
    with pytest.raises(ModelError) as corrupt:
        engine(msgspec.structs.replace(made, model=made.model[:40]))
    assert corrupt.value.code == "model.corrupt"
    with pytest.raises(ModelError) as other:
        engine(msgspec.structs.replace(made, model=_renamed()))
    assert other.value.code == "model.signature"


def test_a_shape_that_the_graph_refuses_is_the_callers_fault() -> None:
    (verdict,) = engine(sign_classifier()).answer([Rows({"x": np.zeros((1, 3), dtype=np.float32)}, 1)])
    assert isinstance(verdict, InputRefused)


def _renamed() -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["y"], ["scores"])],
        "other",
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 2])],
    )
    data: bytes = build(graph, golden={"y": np.zeros((1, 2), dtype=np.float32)}).model
    return data
