"""Runs a model's file on the golden samples, here and now: what a signer's own eyes see.

numpy and onnxruntime are imported inside the functions; only commands that check a release need them. The arithmetic
before and after the graph is shared/tensors.py, the same that devices use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cloud_hub import onnx_library
from shared.errors import ConfigError, ModelError
from shared.model import Manifest, Variant
from shared.wire.golden import GoldenSet

BATCH_ROWS: Final = 64
REFERENCE: Final = "fp32"
"""The variant that is the uploaded model itself."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of running one variant on all golden rows.

    Attributes:
        accuracy: share of the rows with a known label that were answered right, 0 to 1; of a raw model, share of the
            rows whose output is as near to the fp32 variant's as `shared.tensors.RAW_TOLERANCE` asks.
        agreement: share of all rows with the answer that the manifest records, 0 to 1; None for raw models, for which
            no answers are recorded.
    """

    variant: str
    accuracy: float
    agreement: float | None

    def fits(self, recorded: Variant, *, min_agreement: float) -> bool:
        """Whether it confirms what the manifest says: enough equal answers, and no other accuracy than they explain."""
        if self.agreement is None:
            return abs(self.accuracy - recorded.accuracy) <= 1.0 - min_agreement + 1e-9
        slack = 1.0 - self.agreement + 1e-9
        return self.agreement >= min_agreement and abs(self.accuracy - recorded.accuracy) <= slack


def measure(manifest: Manifest, models: Mapping[str, bytes], golden: GoldenSet) -> tuple[Measured, ...]:
    """Load every variant of the manifest (`models` by name) and run every golden row.

    Raises:
        ModelError: a variant does not load, run or give scores; or a raw model comes without the fp32 variant that
            the others are compared with.
    """
    if manifest.task == "raw":
        return _measure_raw(manifest, models, golden)
    return tuple(_measure_classes(manifest, variant, models[variant.name], golden) for variant in manifest.variants)


def _measure_classes(manifest: Manifest, variant: Variant, model: bytes, golden: GoldenSet) -> Measured:
    import numpy as np

    from shared.tensors import probabilities

    scores = _outputs(manifest, model, golden)
    answers = np.argmax(probabilities(scores, rows=golden.samples), axis=1).tolist()
    known = [(got, true) for got, true in zip(answers, golden.labels, strict=True) if true >= 0]
    right = sum(got == true for got, true in known)
    same = sum(got == recorded for got, recorded in zip(answers, variant.answers, strict=True))
    return Measured(
        variant=variant.name,
        accuracy=right / len(known) if known else 0.0,
        agreement=same / golden.samples,
    )


def _measure_raw(manifest: Manifest, models: Mapping[str, bytes], golden: GoldenSet) -> tuple[Measured, ...]:
    from shared.tensors import rows_close

    if REFERENCE not in models:
        raise ModelError(f"the release holds no {REFERENCE} variant to compare the others with", code="model.reference")
    outputs = {name: _outputs(manifest, model, golden) for name, model in models.items()}
    reference = outputs[REFERENCE]
    if any(output.shape != reference.shape for output in outputs.values()):
        raise ModelError("the variants' first outputs differ in size", code="model.output")
    return tuple(
        Measured(
            variant=variant.name, accuracy=float(rows_close(outputs[variant.name], reference).mean()), agreement=None
        )
        for variant in manifest.variants
    )


def _outputs(manifest: Manifest, model: bytes, golden: GoldenSet) -> Any:
    """The first declared output for all golden rows, shape (rows, values)."""
    import numpy as np

    from shared.inference import TensorHead
    from shared.tensors import from_wire, prepare

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
    # By name: what the signature declares first need not be what the graph lists first.
    output = manifest.signature.outputs[0].name
    parts = []
    for start in range(0, golden.samples, step):
        rows = min(step, golden.samples - start)
        part = np.asarray(_run(session, output, {name: array[start : start + rows] for name, array in feeds.items()}))
        if part.size % rows:
            raise ModelError(f"the first output has the shape {list(part.shape)} for {rows} rows", code="model.output")
        parts.append(part.reshape(rows, -1))
    if len({part.shape[1] for part in parts}) != 1:
        raise ModelError("the first output has not the same size for every row", code="model.output")
    return np.concatenate(parts)


def _session(model: bytes) -> Any:
    try:
        ort = onnx_library.onnxruntime()
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


def _run(session: Any, output: str, feeds: dict[str, Any]) -> Any:
    try:
        return session.run([output], feeds)[0]
    # as above: no common base class
    except Exception as error:
        raise ModelError(f"the model does not run: {str(error)[:300]}", code="model.run") from error
