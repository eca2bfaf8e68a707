"""The last layer is found and replaced in the graphs that exporters write; what is no such graph is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from cloud_hub.rounds import head
from shared.errors import InvalidValue, ModelError
from shared.learned import check_learned_file
from shared.model import Signature, TensorSpec

WIDTH, CLASSES = 4, 3
SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="fp32", shape=(-1, WIDTH)),),
    outputs=(
        TensorSpec(name="scores", dtype="fp32", shape=(-1, CLASSES)),
        TensorSpec(name="f", dtype="fp32", shape=(-1, WIDTH)),
    ),
)


def graph(nodes: list[Any], *, outputs: tuple[str, ...] = ("scores", "f"), turned: bool = False) -> Any:
    """A graph of x -> Relu -> f -> nodes -> scores, with weights w and bias b."""
    random = np.random.default_rng(0)
    weight = random.normal(size=(CLASSES, WIDTH) if turned else (WIDTH, CLASSES)).astype(np.float32)
    sizes = {"scores": CLASSES, "f": WIDTH, "g": WIDTH}
    made = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["f"]), *nodes],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", sizes[name]]) for name in outputs],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(random.normal(size=CLASSES).astype(np.float32), "b"),
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


GEMM = helper.make_node("Gemm", ["f", "w", "b"], ["scores"])
GRAPHS = {
    "gemm": ([GEMM], False),
    "gemm turned": ([helper.make_node("Gemm", ["f", "w", "b"], ["scores"], transB=1)], True),
    "gemm scaled": ([helper.make_node("Gemm", ["f", "w", "b"], ["scores"], alpha=0.5, beta=2.0)], False),
    "gemm without bias": ([helper.make_node("Gemm", ["f", "w"], ["scores"])], False),
    "matmul": ([helper.make_node("MatMul", ["f", "w"], ["scores"])], False),
    "matmul and add": (
        [helper.make_node("MatMul", ["f", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["scores"])],
        False,
    ),
    "bias first": (
        [helper.make_node("MatMul", ["f", "w"], ["p"]), helper.make_node("Add", ["b", "p"], ["scores"])],
        False,
    ),
    "softmax": (
        [helper.make_node("Gemm", ["f", "w", "b"], ["s"]), helper.make_node("Softmax", ["s"], ["scores"], axis=1)],
        False,
    ),
    "log of softmax": (
        [
            helper.make_node("Gemm", ["f", "w", "b"], ["s"]),
            helper.make_node("LogSoftmax", ["s"], ["t"], axis=1),
            helper.make_node("Identity", ["t"], ["scores"]),
        ],
        False,
    ),
}


def saved(model: Any, folder: Path) -> Path:
    file = folder / "model.onnx"
    file.write_bytes(model.SerializeToString())
    return file


def scores_of(data: bytes, rows: Any) -> tuple[Any, Any]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    scores, features = session.run(["scores", "f"], {"x": rows})
    return scores, features


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_head_is_found_and_replaced(kind: str, tmp_path: Path) -> None:
    nodes, turned = GRAPHS[kind]
    file = saved(graph(nodes, turned=turned), tmp_path)
    found = head.inspect(file, SIGNATURE, features=None)
    assert (found.features, found.width, found.classes) == ("f", WIDTH, CLASSES)
    random = np.random.default_rng(1)
    weight = random.normal(size=(WIDTH, CLASSES)).astype(np.float32)
    bias = random.normal(size=CLASSES).astype(np.float32)
    data = head.replace(file, scores="scores", weight=weight, bias=bias)
    assert data == head.replace(file, scores="scores", weight=weight, bias=bias)
    rows = random.normal(size=(5, WIDTH)).astype(np.float32)
    scores, features = scores_of(data, rows)
    expected = features @ weight + bias
    if "softmax" in kind:
        e = np.exp(expected)
        expected = e / e.sum(axis=1, keepdims=True)
        expected = np.log(expected) if "log" in kind else expected
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    names = {tensor.name for tensor in onnx.load_from_string(data).graph.initializer}
    assert names == {"head.weight", "head.bias"}, "the old head travels on"


@pytest.mark.parametrize("kind", ["gemm", "gemm turned", "matmul and add", "bias first", "softmax", "log of softmax"])
def test_new_numbers_are_put_in_place_of_the_old_and_every_other_byte_stays(kind: str, tmp_path: Path) -> None:
    nodes, turned = GRAPHS[kind]
    file = saved(graph(nodes, turned=turned), tmp_path)
    weight, bias = head.numbers(file, scores="scores")
    assert head.renumber(file, scores="scores", weight=weight, bias=bias) == file.read_bytes()
    data = head.renumber(file, scores="scores", weight=weight + 1, bias=bias - 1)
    bounds = (WIDTH * CLASSES + CLASSES) ** 0.5
    base = memoryview(file.read_bytes())
    shift = check_learned_file(memoryview(data), base, tensors=("w", "b"), max_shift=bounds + 1e-3)
    assert shift == pytest.approx(bounds, rel=1e-4)
    rows = np.random.default_rng(2).normal(size=(5, WIDTH)).astype(np.float32)
    replaced = head.replace(file, scores="scores", weight=weight + 1, bias=bias - 1)
    np.testing.assert_allclose(scores_of(data, rows)[0], scores_of(replaced, rows)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemm without bias", "matmul"])
def test_a_head_without_a_bias_learns_none(kind: str, tmp_path: Path) -> None:
    nodes, turned = GRAPHS[kind]
    file = saved(graph(nodes, turned=turned), tmp_path)
    weight, bias = head.numbers(file, scores="scores")
    assert not bias.any()
    assert head.renumber(file, scores="scores", weight=weight, bias=bias) == file.read_bytes()
    with pytest.raises(ModelError, match="no bias"):
        head.renumber(file, scores="scores", weight=weight, bias=bias + 1)


def test_a_head_whose_numbers_are_scaled_or_used_twice_is_not_exchanged_in_place(tmp_path: Path) -> None:
    scaled = saved(graph(GRAPHS["gemm scaled"][0]), tmp_path)
    twice = tmp_path / "twice.onnx"
    other = helper.make_node("Add", ["b", "b"], ["unused"])
    twice.write_bytes(graph([GEMM, other]).SerializeToString())
    for file in (scaled, twice):
        with pytest.raises(ModelError, match="exchanged in place"):
            head.numbers(file, scores="scores")


def test_the_result_can_be_a_base_again(tmp_path: Path) -> None:
    file = saved(graph([GEMM]), tmp_path)
    zeros = np.zeros((WIDTH, CLASSES), np.float32)
    again = tmp_path / "again.onnx"
    again.write_bytes(head.replace(file, scores="scores", weight=zeros, bias=zeros[0]))
    ones = zeros + 1
    data = head.replace(again, scores="scores", weight=ones, bias=ones[0])
    scores, features = scores_of(data, np.ones((1, WIDTH), np.float32))
    np.testing.assert_allclose(scores, features @ ones + 1)
    assert len(onnx.load_from_string(data).graph.initializer) == 2


def test_features_that_are_no_output_are_refused_with_the_way_out(tmp_path: Path) -> None:
    file = saved(graph([GEMM], outputs=("scores",)), tmp_path)
    signature = Signature(inputs=SIGNATURE.inputs, outputs=SIGNATURE.outputs[:1])
    with pytest.raises(ModelError, match="'f', which is not an output") as refused:
        head.inspect(file, signature, features=None)
    assert refused.value.code == "rounds.features"
    assert "graph.output.append" in refused.value.hint
    assert "'f'" in refused.value.hint


def test_an_output_that_the_release_does_not_declare_does_not_count(tmp_path: Path) -> None:
    signature = Signature(inputs=SIGNATURE.inputs, outputs=SIGNATURE.outputs[:1])
    with pytest.raises(ModelError):
        head.inspect(saved(graph([GEMM]), tmp_path), signature, features=None)


def test_an_identity_may_give_the_features_their_name(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["f"], ["g"]), GEMM]
    file = saved(graph(nodes, outputs=("scores", "g")), tmp_path)
    outputs = (SIGNATURE.outputs[0], TensorSpec(name="g", dtype="fp32", shape=(-1, WIDTH)))
    signature = Signature(inputs=SIGNATURE.inputs, outputs=outputs)
    assert head.inspect(file, signature, features=None).features == "g"
    assert head.inspect(file, signature, features="g").features == "g"
    with pytest.raises(InvalidValue, match="not what feeds"):
        head.inspect(file, signature, features="scores")


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Gemm", ["f", "x", "b"], ["scores"])],
        [helper.make_node("Relu", ["f"], ["scores"])],
        [helper.make_node("Gemm", ["f", "w", "b"], ["s"]), helper.make_node("Relu", ["s"], ["scores"])],
        [helper.make_node("Gemm", ["f", "w", "b"], ["scores"], transA=1)],
        [helper.make_node("Add", ["f", "b"], ["scores"])],
    ],
    ids=["weights from outside", "no layer", "something behind it", "turned input", "no product"],
)
def test_what_is_no_linear_layer_is_refused(nodes: list[Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError) as refused:
        head.inspect(saved(graph(nodes), tmp_path), SIGNATURE, features=None)
    assert refused.value.code == "rounds.head"


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError):
        head.inspect(file, SIGNATURE, features=None)
