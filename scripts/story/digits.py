"""Scikit-learn's handwritten digits, small networks that read them, and their ONNX files for `outrider model push`.

The 1797 images are split once, by a fixed seed, into four parts that share no image: training, golden samples (they
travel with the release), calibration (they set the int8 ranges) and held-back ones (only the story sees them, to
measure what the devices answer). Pixels are 0 to 16; the scale to 0 to 1 is the release's preparation, not the graph's.

Every file has two outputs: `scores`, and `features`, what the last layer makes them of. A device that is taught digits
of its own trains a last layer on its features.

Not here: which networks the story needs, and training them while it begins (models.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

GOLDEN: Final = 200
CALIBRATION: Final = 200
HELD_BACK: Final = 300
SPLIT_SEED: Final = 20240117
INPUT: Final = "pixels"
OUTPUT: Final = "scores"
FEATURES: Final = "features"
BRIGHTEST: Final = 16.0
SCALE: Final = 1.0 / BRIGHTEST
DETOUR_WIDTH: Final = 8192
LABELS: Final = tuple(str(digit) for digit in range(10))

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the images: `pixels` is [n, 64] of 0 to 16, `labels` the digit that a person wrote."""

    pixels: Floats
    labels: Labels


@dataclass(frozen=True, slots=True)
class Split:
    """The four disjoint parts."""

    train: Part
    golden: Part
    calibration: Part
    held_back: Part


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a network is trained.

    Attributes:
        seed: decides the start values and the order of samples.
        hidden: widths of the layers between pixels and scores.
        passes: how often it sees every sample, at most.
        samples: so many of the training part are used; 0 for all of them, each also moved by one pixel.
        noise: with this, it also sees noisy copies of every image.
        detours: so many pairs of layers are put behind the first, which cost time and change no answer.
    """

    seed: int
    hidden: tuple[int, ...] = (256, 128)
    passes: int = 60
    samples: int = 0
    noise: tuple[float, ...] = ()
    detours: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained network: its ONNX file's bytes and its accuracy, 0 to 1, on the held-back part in float32."""

    onnx: bytes
    accuracy: float


def split() -> Split:
    """The bundled digits in their four parts; the same on every machine."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = bunch.data.astype(np.float32)
    labels = bunch.target.astype(np.int64)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    edges = np.cumsum([GOLDEN, CALIBRATION, HELD_BACK])
    golden, calibration, held_back, train = np.split(order, edges)
    return Split(*(Part(pixels[rows], labels[rows]) for rows in (train, golden, calibration, held_back)))


def shifted(part: Part) -> Part:
    """The images and four copies of each, moved by one pixel: nobody writes a digit in the exact middle."""
    images = part.pixels.reshape(-1, 8, 8)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    moves = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    copies = [padded[:, y : y + 8, x : x + 8] for y, x in moves]
    return Part(np.concatenate(copies).reshape(-1, 64), np.tile(part.labels, len(moves)))


def noisy(part: Part, *, noise: float, seed: int) -> Part:
    """The same images, badly seen: each pixel off by this much (a standard deviation)."""
    error = np.random.default_rng(seed).normal(0.0, noise, part.pixels.shape)
    return Part(np.clip(part.pixels + error, 0.0, BRIGHTEST).astype(np.float32), part.labels)


def train(parts: Split, recipe: Recipe) -> Trained:
    """Train a multi-layer perceptron and export it."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    network = MLPClassifier(
        hidden_layer_sizes=recipe.hidden, max_iter=recipe.passes, alpha=1e-3, random_state=recipe.seed
    )
    with warnings.catch_warnings():
        # The number of passes is bounded on purpose; the held-back accuracy says whether it was enough.
        warnings.simplefilter("ignore", ConvergenceWarning)
        seen = _seen(parts.train, recipe)
        # Matrices this small gain nothing from threads, and lose much where other processes want the cores.
        with threadpool_limits(limits=1):
            network.fit(seen.pixels * SCALE, seen.labels)
    accuracy = float(network.score(parts.held_back.pixels * SCALE, parts.held_back.labels))
    return Trained(onnx=export(network, detours=recipe.detours), accuracy=accuracy)


def export(network: Any, *, detours: int = 0) -> bytes:
    """The network as an ONNX file: Gemm and Relu by layer, `pixels` [N, 64] in, scores [N, 10] and features out."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, value = [], [], INPUT
    layers = list(zip(network.coefs_, network.intercepts_, strict=True))
    for number, (kernel, bias) in enumerate(layers):
        last = number == len(layers) - 1
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"kernel_{number}"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"bias_{number}"))
        gemm = OUTPUT if last else f"sum_{number}"
        nodes.append(helper.make_node("Gemm", [value, f"kernel_{number}", f"bias_{number}"], [gemm]))
        if not last:
            value = FEATURES if number == len(layers) - 2 else f"hidden_{number}"
            nodes.append(helper.make_node("Relu", [gemm], [value]))
        if detours and number == 0:
            value = _wander(nodes, weights, value, width=kernel.shape[1], pairs=detours)
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", 64])],
        [
            helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", 10]),
            helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, ["N", layers[-1][0].shape[0]]),
        ],
        weights,
    )
    model = helper.make_model(graph, producer_name="outrider-demo", opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9  # the newest that every supported runtime reads
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def _seen(part: Part, recipe: Recipe) -> Part:
    """What a network is shown of the training part."""
    if recipe.samples:
        return Part(part.pixels[: recipe.samples], part.labels[: recipe.samples])
    clear = shifted(part)
    copies = [clear, *(noisy(clear, noise=noise, seed=recipe.seed + n) for n, noise in enumerate(recipe.noise))]
    return Part(np.concatenate([copy.pixels for copy in copies]), np.concatenate([copy.labels for copy in copies]))


def _wander(nodes: list[Any], weights: list[Any], value: str, *, width: int, pairs: int) -> str:
    """Into a much wider space and straight back, again and again: orthonormal columns, so that nothing is lost."""
    from onnx import helper, numpy_helper

    columns, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(DETOUR_WIDTH, width)))
    there, back = np.ascontiguousarray(columns.T), np.ascontiguousarray(columns)
    weights.append(numpy_helper.from_array(there.astype(np.float32), "there"))
    weights.append(numpy_helper.from_array(back.astype(np.float32), "back"))
    for number in range(pairs):
        nodes.append(helper.make_node("MatMul", [value, "there"], [f"wide_{number}"]))
        value = f"returned_{number}"
        nodes.append(helper.make_node("MatMul", [f"wide_{number}", "back"], [value]))
    return value
