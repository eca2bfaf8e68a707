"""Small real models and the manifests, golden sets and descriptors that go with them, for tests and benchmarks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from shared.ids import Digest, FamilyName, ModelVersion
from shared.model import FileRef, Golden, Manifest, Preparation, Signature, TensorSpec, Variant
from shared.wire.golden import GoldenSet, GoldenTensor, encode_golden

OPSET = 17


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """A release in memory: its manifest, its one model file and its golden file."""

    manifest: Manifest
    model: bytes
    golden: bytes

    @property
    def variant(self) -> Variant:
        """The only variant."""
        return self.manifest.variants[0]

    def open(self, directory: Path) -> tuple[int, int]:
        """Descriptors of both files, as the shelf would give them."""
        descriptors = []
        for name, data in (("model", self.model), ("golden", self.golden)):
            path = directory / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
            if not path.exists():
                path.write_bytes(data)
            descriptors.append(os.open(path, os.O_RDONLY))
        return descriptors[0], descriptors[1]


def sign_classifier(*, altered: tuple[int, ...] = (), **changes: Any) -> Build:
    """Two numbers in, `low` or `high` out: `high` when the second is greater; scores are their difference, twice.

    `altered` replaces the first of the recorded answers, so that the golden check fails.
    """
    weights = np.array([[1, -1], [-1, 1]], dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["scores"])],
        "sign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, 2])],
        [numpy_helper.from_array(weights, "w")],
    )
    rows = np.array([[1, 0], [0, 1], [3, -2], [-5, 5], [0.5, 0.25], [0.25, 0.5]], dtype=np.float32)
    answers = (*altered, *(0, 1, 0, 1, 0, 1)[len(altered) :])
    return build(graph, golden={"x": rows}, answers=answers, labels=("low", "high"), **changes)


def build(
    graph: onnx.GraphProto,
    *,
    golden: dict[str, NDArray[Any]],
    answers: tuple[int, ...] = (),
    labels: tuple[str, ...] = (),
    preparations: tuple[Preparation, ...] = (),
    min_agreement: float = 0.99,
    runtime: str = "onnx",
    signature: Signature | None = None,
    model: bytes | None = None,
) -> Build:
    """A release around a graph; without labels and answers it is a raw model."""
    onnx_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    data = model if model is not None else onnx_model.SerializeToString()
    samples = len(next(iter(golden.values())))
    golden_file = encode_golden(
        GoldenSet(
            samples=samples,
            labels=answers or (-1,) * samples,
            inputs=tuple(_golden_tensor(name, array) for name, array in golden.items()),
        )
    )
    prefix = "models/sample/1.0.0/"
    manifest = Manifest(
        family=FamilyName("sample"),
        version=ModelVersion("1.0.0"),
        release_counter=1,
        min_release_counter=0,
        task="classification" if answers else "raw",
        signature=signature or _signature(graph),
        preparations=preparations,
        labels=labels,
        golden=Golden(file=_ref(prefix + "golden.bin", golden_file), samples=samples, min_agreement=min_agreement),
        variants=(
            Variant(
                name="fp32",
                runtime=runtime,  # type: ignore[arg-type]
                file=_ref(prefix + "fp32.onnx", data),
                accuracy=1.0,
                answers=answers,
            ),
        ),
    )
    return Build(manifest=manifest, model=data, golden=golden_file)


def _ref(path: str, data: bytes) -> FileRef:
    return FileRef(path=path, length=len(data), digest=Digest(hashlib.sha256(data).hexdigest()))


_NAMES: dict[int, Any] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.DOUBLE: "fp64",
    TensorProto.INT64: "int64",
    TensorProto.UINT8: "uint8",
}


def _signature(graph: onnx.GraphProto) -> Signature:
    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        shape = tuple(axis.dim_value or -1 for axis in kind.shape.dim)
        return TensorSpec(name=value.name, dtype=_NAMES[kind.elem_type], shape=shape)

    return Signature(inputs=tuple(map(spec, graph.input)), outputs=tuple(map(spec, graph.output)))


def _golden_tensor(name: str, array: NDArray[Any]) -> GoldenTensor:
    from shared.tensors import dtype_name

    return GoldenTensor(name=name, dtype=dtype_name(array.dtype), shape=array.shape, data=array.tobytes())
