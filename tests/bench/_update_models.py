"""The two models of the updates benchmark: trained on digits, and the same taught two rounds more on new data.

A multilayer perceptron 64-1024-1024-512-10 (1.6 million parameters), trained by scikit-learn on the digits that come
with it; written as ONNX in fp32, in int8 with weights only (dynamic) and in int8 by channel as the hub's builder does
it (QDQ). Deterministic but for the order in which a BLAS adds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

HIDDEN: Final = (1024, 1024, 512)
EPOCHS: Final = 12
TUNING_EPOCHS: Final = 2

Layers = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


def make_pair(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Old and new file by case: `int8_dynamic`, `int8_static`, `head`, `shifted`, `fp32`."""
    before, after, pixels = _train()
    cases: dict[str, tuple[bytes, bytes]] = {}
    head = [*before[:-1], after[-1]]
    named = {"before": before, "after": after, "head": head}
    for name, layers in named.items():
        (folder / f"{name}.onnx").write_bytes(_graph(layers))
        _quantize_dynamic(folder / f"{name}.onnx", folder / f"{name}.dynamic.onnx")
    for name in ("before", "after"):
        _quantize_static(folder / f"{name}.onnx", folder / f"{name}.static.onnx", pixels)

    def read(name: str) -> bytes:
        return (folder / f"{name}.onnx").read_bytes()

    cases["int8_dynamic"] = read("before.dynamic"), read("after.dynamic")
    cases["int8_static"] = read("before.static"), read("after.static")
    cases["head"] = read("before.dynamic"), read("head.dynamic")
    cases["shifted"] = read("before.dynamic"), _shifted(read("after.dynamic"))
    cases["fp32"] = read("before"), read("after")
    return cases


def _train() -> tuple[Layers, Layers, NDArray[np.float32]]:
    from sklearn.datasets import load_digits
    from sklearn.neural_network import MLPClassifier

    data, labels = load_digits(return_X_y=True)
    pixels = (data / 16).astype(np.float32)
    old, new = slice(0, 1200), slice(1200, None)
    model = MLPClassifier(HIDDEN, random_state=0, batch_size=64, learning_rate_init=1e-3)
    for _ in range(EPOCHS):
        model.partial_fit(pixels[old], labels[old], classes=np.arange(10))
    before = _layers(model)
    model.learning_rate_init = 1.5e-5
    model._optimizer.learning_rate_init = 1.5e-5
    model._optimizer.learning_rate = 1.5e-5
    for _ in range(TUNING_EPOCHS):
        model.partial_fit(pixels[new], labels[new])
    return before, _layers(model), pixels


def _layers(model: Any) -> Layers:
    return [
        (weights.astype(np.float32), biases.astype(np.float32))
        for weights, biases in zip(model.coefs_, model.intercepts_, strict=True)
    ]


def _graph(layers: Layers, *, producer: str = "outrider bench") -> bytes:
    nodes, tensors, name = [], [], "pixels"
    for index, (weights, biases) in enumerate(layers):
        tensors += [
            numpy_helper.from_array(weights, f"w{index}"),
            numpy_helper.from_array(biases, f"b{index}"),
        ]
        nodes += [
            helper.make_node("MatMul", [name, f"w{index}"], [f"m{index}"]),
            helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"]),
        ]
        name = f"a{index}"
        if index < len(layers) - 1:
            nodes.append(helper.make_node("Relu", [name], [f"r{index}"]))
            name = f"r{index}"
    nodes.append(helper.make_node("Softmax", [name], ["scores"]))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name=producer)
    model.ir_version = 9
    data: bytes = model.SerializeToString()
    return data


def _quantize_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8)


def _quantize_static(source: Path, target: Path, pixels: NDArray[np.float32]) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Rows(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows: Iterator[NDArray[np.float32]] = iter(np.array_split(pixels[:256], 4))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            row = next(self._rows, None)
            return None if row is None else {"pixels": row}

    with _quiet():
        quantize_static(
            str(source),
            str(target),
            Rows(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


def _quiet() -> warnings.catch_warnings[None]:
    import logging

    logging.getLogger().setLevel(logging.ERROR)
    return warnings.catch_warnings(action="ignore")


def _shifted(data: bytes) -> bytes:
    """The same model with 148 bytes more before its tensors."""
    model = onnx.load_from_string(data)
    model.graph.node[0].doc_string = "x" * (148 - 2 - 1)
    return bytes(model.SerializeToString())
