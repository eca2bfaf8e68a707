"""The last layer of a classifier's graph: finds it, and puts another in its place.

The layer is the Gemm, or the MatMul with an Add behind it, whose result is the first output (through a Softmax,
LogSoftmax or Identity where the graph has one). What feeds it must be an output of the released graph, because that is
where devices get their features from.

Only the worker imports onnx through here: the hub itself reads no graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cloud_hub.rounds.rules import BIAS, WEIGHT, Head
from shared.errors import InvalidValue, ModelError
from shared.learned import with_tensors
from shared.model import Signature

if TYPE_CHECKING:
    from shared.tensors import Array

PASSED_OVER: Final = frozenset({"Softmax", "LogSoftmax", "Identity"})
MAX_STEPS: Final = 16


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer's place in a graph.

    Attributes:
        product: the Gemm or MatMul.
        addition: the Add behind a MatMul, None without one.
        features: name of the tensor that feeds it.
        width, classes: its size.
    """

    product: Any
    addition: Any | None
    features: str
    width: int
    classes: int


def inspect(file: Path, signature: Signature, *, features: str | None) -> Head:
    """The head that a run on this graph would learn.

    Args:
        signature: of the release; its first output holds the scores.
        features: the output that holds the features, None to find it.

    Raises:
        ModelError: there is no such layer, or its features are not an output of the release.
        InvalidValue: the given output is not what feeds the layer.
    """
    graph = _load(file).graph
    layer = _find(graph, signature.outputs[0].name)
    names = _same_tensors(graph, layer.features)
    offered = [spec.name for spec in signature.outputs if spec.name in names]
    if not offered:
        raise ModelError(
            f"the last layer is fed by {layer.features!r}, which is not an output of the release",
            code="rounds.features",
            hint=(
                f"export the model with {layer.features!r} as a second output (in onnx: graph.output.append("
                f"helper.make_tensor_value_info({layer.features!r}, TensorProto.FLOAT, ['N', {layer.width}]))), "
                "push it as a new version, release it, and start from that"
            ),
        )
    if features is not None and features not in offered:
        raise InvalidValue(
            f"output {features[:80]!r} is not what feeds the last layer",
            code="invalid.features",
            hint=f"leave it out, or give {offered[0]!r}",
        )
    return Head(features=features or offered[0], width=layer.width, classes=layer.classes)


def replace(file: Path, *, scores: str, weight: Array, bias: Array) -> bytes:
    """The graph's bytes with this head: weight [features, classes], bias [classes], float32.

    The same weights give the same bytes.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = _load(file)
    graph = model.graph
    layer = _find(graph, scores)
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in graph.initializer}
    weight_name, bias_name = _free(WEIGHT, taken), _free(BIAS, taken)
    product = layer.product
    oriented = weight
    if product.op_type == "Gemm":
        oriented = weight.T if _attribute(product, "transB", 0) else weight
        for name in ("alpha", "beta"):
            _drop_attribute(product, name)
        inputs = [product.input[0], weight_name, bias_name]
        del product.input[:]
        product.input.extend(inputs)
    else:
        product.input[1] = weight_name
        if layer.addition is None:
            _add_behind(graph, product, bias_name, name=_free("head.product", taken))
        else:
            del layer.addition.input[:]
            layer.addition.input.extend([product.output[0], bias_name])
    for name, array in ((weight_name, oriented), (bias_name, bias)):
        tensor = numpy_helper.from_array(np.ascontiguousarray(array, dtype=np.float32), name)
        graph.initializer.append(tensor)
    _drop_unused(graph)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def numbers(file: Path, *, scores: str) -> tuple[Array, Array]:
    """The head that the graph has: weight [features, classes], bias [classes], float32."""
    import numpy as np
    from onnx import numpy_helper

    graph = _load(file).graph
    layer = _find(graph, scores)
    weight_name, bias_name = _plain_names(graph, layer)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weight = arrays[weight_name].T if _attribute(layer.product, "transB", 0) else arrays[weight_name]
    bias = arrays[bias_name].reshape(-1) if bias_name else np.zeros(layer.classes)
    return np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32)


def renumber(file: Path, *, scores: str, weight: Array, bias: Array) -> bytes:
    """The file's own bytes with other numbers in its head: what a learned release may be.

    Raises:
        ModelError: the head is scaled, shared, or has no tensor for a bias that is not zero.
        TrustError: `trust.learned` when its numbers do not lie in the file as raw float32.
    """
    import numpy as np

    graph = _load(file).graph
    layer = _find(graph, scores)
    weight_name, bias_name = _plain_names(graph, layer)
    oriented = weight.T if _attribute(layer.product, "transB", 0) else weight
    new = {weight_name: np.ascontiguousarray(oriented, "<f4").tobytes()}
    if bias_name:
        new[bias_name] = np.ascontiguousarray(bias, "<f4").tobytes()
    elif np.any(bias):
        raise ModelError(
            "the head has no bias, and a bias was learned",
            code="rounds.head",
            hint="export the model with a bias in its last layer",
        )
    return with_tensors(file.read_bytes(), new)


def _plain_names(graph: Any, layer: Layer) -> tuple[str, str]:
    """The initializers of the weight and of the bias (empty without one), each used once and not scaled."""
    product, addition = layer.product, layer.addition
    initializers = {tensor.name for tensor in graph.initializer}
    if addition is not None:
        bias = next((name for name in addition.input if name in initializers), "")
    else:
        bias = product.input[2] if len(product.input) > 2 else ""
    names = [product.input[1], *([bias] if bias else [])]
    used = [name for node in graph.node for name in node.input]
    scaled = any(attribute.name in ("alpha", "beta") and attribute.f != 1 for attribute in product.attribute)
    if scaled or any(name not in initializers or used.count(name) != 1 for name in names):
        raise ModelError(
            "the head's numbers are scaled, computed, or used elsewhere too, so they cannot be exchanged in place",
            code="rounds.head",
            hint="export the model with a plain last layer, or learn without --learned and have the result signed",
        )
    return product.input[1], bias


def _load(file: Path) -> Any:
    import onnx

    try:
        return onnx.load(str(file), load_external_data=False)
    # Blanket on purpose: the parser's errors have no base that could be named without importing protobuf.
    except Exception as error:
        raise ModelError(f"the base cannot be read: {error}", code="rounds.base") from error


def _find(graph: Any, scores: str) -> Layer:
    producers = {name: node for node in graph.node for name in node.output}
    constants = _constants(graph)
    value = scores
    for _ in range(MAX_STEPS):
        node = producers.get(value)
        if node is None or node.op_type not in PASSED_OVER:
            break
        value = node.input[0]
    addition = None
    if node is not None and node.op_type == "Add":
        addition = node
        node = next((producers[name] for name in node.input if name in producers and name not in constants), None)
    wanted = "MatMul" if addition is not None else ("MatMul", "Gemm")
    if node is None or node.op_type not in wanted or node.input[1] not in constants:
        kind = "nothing" if node is None else node.op_type
        raise ModelError(
            f"{scores!r} is not the result of a linear layer with weights of its own, but of {kind}",
            code="rounds.head",
            hint="a run learns the last Gemm, or MatMul with Add, of a classifier",
        )
    shape = constants[node.input[1]]
    if len(shape) != 2 or (node.op_type == "Gemm" and _attribute(node, "transA", 0)):
        raise ModelError(f"the last layer's weights have the shape {list(shape)}", code="rounds.head")
    width, classes = shape[::-1] if node.op_type == "Gemm" and _attribute(node, "transB", 0) else shape
    return Layer(node, addition, node.input[0], width, classes)


def _constants(graph: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by the names of what is constant."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = tuple(attribute.t.dims)
    return found


def _same_tensors(graph: Any, name: str) -> set[str]:
    """The name and those that Identity nodes give to the same values."""
    names = {name}
    for _ in range(MAX_STEPS):
        for node in graph.node:
            if node.op_type == "Identity" and names & {node.input[0], node.output[0]}:
                names |= {node.input[0], node.output[0]}
    return names


def _add_behind(graph: Any, product: Any, bias: str, *, name: str) -> None:
    from onnx import helper

    result = product.output[0]
    product.output[0] = name
    place = list(graph.node).index(product)
    graph.node.insert(place + 1, helper.make_node("Add", [name, bias], [result]))


def _drop_unused(graph: Any) -> None:
    """Take out constants that nothing reads any more: the old head."""
    used = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for nodes in (graph.initializer, graph.node):
        for item in list(nodes):
            name = item.output[0] if nodes is graph.node else item.name
            if name not in used and (nodes is graph.initializer or item.op_type == "Constant"):
                nodes.remove(item)


def _attribute(node: Any, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


def _drop_attribute(node: Any, name: str) -> None:
    for attribute in list(node.attribute):
        if attribute.name == name:
            node.attribute.remove(attribute)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
