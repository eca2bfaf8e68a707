"""A small classifier that is really trained, its data, and its files: what a user would push.

Ten noisy 8x8 patterns with values 0 to 16 as on the pages of handwritten digits; one hidden layer of 32, trained here
with plain gradient descent in numpy, exported with onnx. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shared.wire.golden import GoldenSet, GoldenTensor, encode_golden

CLASSES = 10
PIXELS = 64
MEAN, STD, SCALE = 0.5, 0.25, 1 / 16


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the two layers."""

    w1: NDArray[np.float32]
    b1: NDArray[np.float32]
    w2: NDArray[np.float32]
    b2: NDArray[np.float32]


def samples(rows: int, *, seed: int, noise: float = 3.0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels (rows, 64) from 0 to 16 and classes (rows,)."""
    patterns = np.random.default_rng(7).uniform(0, 16, (CLASSES, PIXELS))
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, rows)
    pixels = np.clip(patterns[labels] + random.normal(0, noise, (rows, PIXELS)), 0, 16)
    return pixels.astype(np.float32), labels


def train(*, rounds: int = 150, hidden: int = 32) -> Weights:
    """Full-batch gradient descent on prepared pixels; about 99 % right on new samples."""
    pixels, labels = samples(1000, seed=1)
    x = (pixels * SCALE - MEAN) / STD
    random = np.random.default_rng(0)
    w1, b1 = random.normal(0, 0.1, (PIXELS, hidden)), np.zeros(hidden)
    w2, b2 = random.normal(0, 0.1, (hidden, CLASSES)), np.zeros(CLASSES)
    truth = np.eye(CLASSES)[labels]
    for _ in range(rounds):
        h = np.maximum(x @ w1 + b1, 0)
        scores = h @ w2 + b2
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        error = (p / p.sum(axis=1, keepdims=True) - truth) / len(x)
        back = (error @ w2.T) * (h > 0)
        w2, b2 = w2 - h.T @ error, b2 - error.sum(axis=0)
        w1, b1 = w1 - x.T @ back, b1 - back.sum(axis=0)
    return Weights(*(part.astype(np.float32) for part in (w1, b1, w2, b2)))


def export(weights: Weights, *, opset: int = 17, batch: Any = "rows", softmax: bool = True) -> bytes:
    """The ONNX file: input `pixels` (prepared), output `scores`."""
    nodes = [
        helper.make_node("Gemm", ["pixels", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["s" if softmax else "scores"]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["s"], ["scores"], axis=1))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, PIXELS])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(getattr(weights, name), name) for name in ("w1", "b1", "w2", "b2")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def with_external_data(data: bytes) -> bytes:
    """The same file with its first weights declared to lie in another file."""
    model = onnx.load_from_string(data)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../secret"), ("offset", "0"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    stripped: bytes = model.SerializeToString()
    return stripped


def golden(rows: int, *, seed: int, noise: float = 3.0, labelled: bool = True, name: str = "pixels") -> bytes:
    """A golden file of fresh samples, pixels as callers send them."""
    pixels, labels = samples(rows, seed=seed, noise=noise)
    return encode_golden(
        GoldenSet(
            samples=rows,
            labels=tuple(int(label) if labelled else -1 for label in labels),
            inputs=(GoldenTensor(name=name, dtype="fp32", shape=pixels.shape, data=pixels.tobytes()),),
        )
    )
