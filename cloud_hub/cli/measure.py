"""Runs a model's file on the golden samples, here and now: what a signer's own eyes see.

numpy and onnxruntime are imported inside the functions; only commands that check a release need them. The arithmetic
before and after the graph is shared/tensors.py, the same that devices use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from shared.errors import ConfigError, ModelError
from shared.model import Manifest, Variant
from shared.wire.golden import GoldenSet

BATCH_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of running one variant on all golden rows.

    Attributes:
        accuracy: share of the rows with a known label that were answered right, 0 to 1.
        agreement: share of all rows with the answer that the manifest records, 0 to 1.
    """

    variant: str
    accuracy: float
    agreement: float

    def fits(self, recorded: Variant, *, min_agreement: float) -> bool:
        """Whether it confirms what the manifest says: enough equal answers, and no other accuracy than they explain."""
        slack = 1.0 - self.agreement + 1e-9
        return self.agreement >= min_agreement and abs(self.accuracy - recorded.accuracy) <= slack


def measure(manifest: Manifest, variant: Variant, model: bytes, golden: GoldenSet) -> Measured:
    """Load the variant and run every golden row; raises ModelError when it does not load, run or give scores."""
    answers = _answers(manifest, model, golden)
    if manifest.task == "raw":
        return Measured(variant=variant.name, accuracy=variant.accuracy, agreement=1.0)
    known = [(got, true) for got, true in zip(answers, golden.labels, strict=True) if true >= 0]
    right = sum(got == true for got, true in known)
    same = sum(got == recorded for got, recorded in zip(answers, variant.answers, strict=True))
    return Measured(
        variant=variant.name,
        accuracy=right / len(known) if known else 0.0,
        agreement=same / golden.samples,
    )


def _answers(manifest: Manifest, model: bytes, golden: GoldenSet) -> list[int]:
    import numpy as np

    from shared.inference import TensorHead
    from shared.tensors import from_wire, prepare, probabilities

    session = _session(model)
    preparations = {preparation.input: preparation for preparation in manifest.preparations}
    feeds: dict[str, Any] = {}
    fixed = False
    specs = {spec.name: spec for spec in manifest.signature.inputs}
    for tensor in golden.inputs:
        spec = specs[tensor.name]
        head = TensorHead(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)
        array = from_wire((head,), tensor.data)[tensor.name]
        preparation = preparations.get(tensor.name)
        feeds[tensor.name] = array if preparation is None else prepare(preparation, spec, array)
        fixed = fixed or spec.shape[0] != -1
    step = 1 if fixed else BATCH_ROWS
    answers: list[int] = []
    for start in range(0, golden.samples, step):
        rows = min(step, golden.samples - start)
        scores = _run(session, {name: array[start : start + rows] for name, array in feeds.items()})
        if manifest.task == "classification":
            answers += np.argmax(probabilities(scores, rows=rows), axis=1).tolist()
    return answers


def _session(model: bytes) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise ConfigError(
            "checking a release needs onnxruntime", code="config.onnxruntime", hint="pip install 'outrider[hub]'"
        ) from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    # onnxruntime raises RuntimeError, its own Fail, InvalidGraph and others without a common base but Exception
    except Exception as error:
        raise ModelError(f"the model does not load: {str(error)[:300]}", code="model.load") from error


def _run(session: Any, feeds: dict[str, Any]) -> Any:
    try:
        return session.run(None, feeds)[0]
    # as above: no common base class
    except Exception as error:
        raise ModelError(f"the model does not run: {str(error)[:300]}", code="model.run") from error
