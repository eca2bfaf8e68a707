"""How good a head is on the base's golden set: features once by the runtime, then a product of matrices per round.

Only the worker loads onnxruntime through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cloud_hub.rounds.rules import Head
from shared.errors import ModelError
from shared.inference import TensorHead
from shared.model import Preparation, Signature
from shared.wire.golden import decode_golden

if TYPE_CHECKING:
    from shared.tensors import Array

BATCH_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The labelled golden rows: their features (rows, width) in float32 and their true classes."""

    features: Array
    labels: Array

    def measure(self, weight: Array, bias: Array) -> dict[str, float]:
        """Share of rows answered right, and the mean cross-entropy in nats."""
        import numpy as np

        scores = self.features.astype(np.float64) @ weight.astype(np.float64) + bias.astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        right = float((scores.argmax(axis=1) == self.labels).mean())
        chosen = scores[np.arange(len(scores)), self.labels]
        loss = float((np.log(np.exp(scores).sum(axis=1)) - chosen).mean())
        return {"accuracy": right, "loss": loss}


def yardstick(
    model: Path, golden: Path, *, signature: Signature, preparations: Sequence[Preparation], head: Head
) -> Yardstick:
    """Run the base once over its golden set; raises ModelError when it does not give the features that it declares."""
    import numpy as np

    from cloud_hub import onnx_library
    from shared.tensors import from_wire, prepare

    content = decode_golden(golden.read_bytes(), signature)
    by_input = {preparation.input: preparation for preparation in preparations}
    specs = {spec.name: spec for spec in signature.inputs}
    rows: dict[str, Array] = {}
    for tensor in content.inputs:
        plain = from_wire([TensorHead(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)], tensor.data)
        preparation = by_input.get(tensor.name)
        array = plain[tensor.name]
        rows[tensor.name] = array if preparation is None else prepare(preparation, specs[tensor.name], array)
    features = _run(onnx_library.onnxruntime(), model, rows, head)
    labels = np.array(content.labels, dtype=np.int64)
    known = (labels >= 0) & (labels < head.classes)
    if not known.any():
        raise ModelError("no golden row of the base has a true class", code="rounds.golden")
    return Yardstick(features=features[known], labels=labels[known])


def _run(runtime: Any, model: Path, rows: dict[str, Array], head: Head) -> Array:
    import numpy as np

    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        step = 1 if session.get_inputs()[0].shape[0] == 1 else BATCH_ROWS
        total = len(next(iter(rows.values())))
        parts = [
            session.run([head.features], {name: array[start : start + step] for name, array in rows.items()})[0]
            for start in range(0, total, step)
        ]
        return np.concatenate(parts).reshape(total, head.width).astype(np.float32)
    # Blanket on purpose: the runtime raises classes without a common base, and each means that the base is not usable.
    except Exception as error:
        raise ModelError(f"the base gives no features: {str(error)[:300]}", code="rounds.base") from error
