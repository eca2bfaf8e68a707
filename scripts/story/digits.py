"""Trains a small network on scikit-learn's handwritten digits and writes what `outrider model push` takes.

The 1797 images are split once, by a fixed seed, into four parts that share no image: training, golden samples (they
travel with the release), calibration (they set the int8 ranges) and held-back ones (only the story sees them, to
measure what the devices answer). Pixels are 0 to 16; the scale to 0 to 1 is the release's preparation, not the graph's.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

GOLDEN: Final = 200
CALIBRATION: Final = 200
HELD_BACK: Final = 300
SPLIT_SEED: Final = 20240117
INPUT: Final = "pixels"
OUTPUT: Final = "scores"
SCALE: Final = 1.0 / 16.0
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


def train(parts: Split, *, seed: int, hidden: tuple[int, ...] = (256, 128)) -> Trained:
    """Train a multi-layer perceptron and export it; the seed decides start values and the order of samples."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    network = MLPClassifier(hidden_layer_sizes=hidden, max_iter=60, alpha=1e-3, random_state=seed)
    with warnings.catch_warnings():
        # The number of passes is bounded on purpose; the held-back accuracy says whether it was enough.
        warnings.simplefilter("ignore", ConvergenceWarning)
        seen = shifted(parts.train)
        # Matrices this small gain nothing from threads, and lose much where other processes want the cores.
        with threadpool_limits(limits=1):
            network.fit(seen.pixels * SCALE, seen.labels)
    accuracy = float(network.score(parts.held_back.pixels * SCALE, parts.held_back.labels))
    return Trained(onnx=export(network), accuracy=accuracy)


def export(network: Any) -> bytes:
    """The network as an ONNX file: Gemm and Relu by layer, `pixels` [N, 64] in, class scores [N, 10] out."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, weights, value = [], [], INPUT
    layers = list(zip(network.coefs_, network.intercepts_, strict=True))
    for number, (kernel, bias) in enumerate(layers):
        last = number == len(layers) - 1
        out = OUTPUT if last else f"hidden_{number}"
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"kernel_{number}"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"bias_{number}"))
        gemm = out if last else f"sum_{number}"
        nodes.append(helper.make_node("Gemm", [value, f"kernel_{number}", f"bias_{number}"], [gemm]))
        if not last:
            nodes.append(helper.make_node("Relu", [gemm], [out]))
        value = out
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["N", 10])],
        weights,
    )
    model = helper.make_model(graph, producer_name="outrider-demo", opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9  # the newest that every supported runtime reads
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


def write(folder: Path, *, seeds: dict[str, int]) -> dict[str, float]:
    """Write `NAME.onnx` for each seed and golden.npz, calibration.npz and held_back.npz; returns accuracy by name."""
    parts = split()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("golden", "calibration", "held_back"):
        part: Part = getattr(parts, name)
        np.savez(folder / f"{name}.npz", pixels=part.pixels, labels=part.labels)
    accuracy = {}
    for name, seed in seeds.items():
        trained = train(parts, seed=seed)
        (folder / f"{name}.onnx").write_bytes(trained.onnx)
        accuracy[name] = trained.accuracy
    return accuracy


def main() -> None:
    """Write the demo's models and samples into a folder: `digits.py DIR`, for trying the commands by hand."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    for name, accuracy in write(parser.parse_args().folder, seeds={"digits-1": 3, "digits-2": 2}).items():
        print(f"{name}.onnx: {accuracy:.1%} of the held-back digits right")


if __name__ == "__main__":
    main()
