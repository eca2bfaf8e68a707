"""A loaded model on the hub: ONNX Runtime on the CPU, in a thread of its own. Batches in, each caller's rows out.

Rules:
1. What a request gets does not depend on who shares its batch: rows are cut out by position, class scores are read as
   they would be alone, and a batch that fails is run again one by one, so that only who is at fault fails.
2. Preparation and the reading of scores are those of the device (shared/tensors.py).
3. A model is run before it is offered, on rows of its golden set: it is warm, and its times are known.

Not here: who waits for whom (rules.py), which model (registry.py), protocols. The runtime is imported in the thread
that loads the first model; a hub without it refuses clearly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from cloud_hub import onnx_library
from shared.errors import InputRefused, ModelError, OutriderError
from shared.inference import TensorHead
from shared.model import Manifest, Variant
from shared.tensors import Array, Buffer, numpy_dtype, prepare, probabilities, to_wire
from shared.wire.golden import GoldenSet

WARM_UP_RUNS: Final = 3
_LOG_FATAL_ONLY: Final = 4
_SLACK: Final = 1e-3
"""As in `shared.tensors.probabilities`, whose rule is by request."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A request's tensors: the first axis of each is the request's rows."""

    inputs: Mapping[str, Array]
    rows: int


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says to one request: a label and a confidence per row for a classifier, and the outputs."""

    labels: tuple[str, ...]
    confidences: tuple[float, ...]
    outputs: tuple[TensorHead, ...]
    payload: tuple[Buffer, ...]


Verdict = Said | OutriderError
"""An answer, or why this request has none."""


class Engine:
    """One variant of one release. `answer` and `warm_up` are called in the engine's own thread.

    Args:
        manifest, variant: what is loaded.
        model: the variant's bytes.
        threads: how many cores a run may use.

    Raises:
        ModelError: the runtime is missing, refuses the bytes, or has other inputs and outputs than are declared.

    Attributes:
        batch_rows: 0 where callers choose how many rows they send and requests can share a run; else every request
            has exactly so many (1 where the model has no axis for rows).
        thread: where the engine runs.
    """

    def __init__(self, *, manifest: Manifest, variant: Variant, model: bytes, threads: int) -> None:
        self.manifest = manifest
        self.variant = variant
        self.batch_rows = _batch_rows(manifest)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"engine-{manifest.family}")
        self._specs = {spec.name: spec for spec in manifest.signature.inputs}
        self._preparations = {preparation.input: preparation for preparation in manifest.preparations}
        self._outputs = [spec.name for spec in manifest.signature.outputs]
        self._session = _load(model, threads=threads)
        inputs = {str(value.name) for value in self._session.get_inputs()}
        outputs = {str(value.name) for value in self._session.get_outputs()}
        if set(self._specs) != inputs or not set(self._outputs) <= outputs:
            raise ModelError(
                f"the manifest declares {sorted(self._specs)} -> {self._outputs}, "
                f"the model has {sorted(inputs)} -> {sorted(outputs)}",
                code="model.signature",
                hint="push the model again with the names of its graph",
            )

    def answer(self, requests: Sequence[Rows]) -> list[Verdict]:
        """One verdict for each request, in order."""
        if len(requests) == 1:
            return [self._alone(requests[0])]
        try:
            together = self._together(requests)
        except ModelError:
            together = None
        return together if together is not None else [self._alone(request) for request in requests]

    def warm_up(self, golden: GoldenSet, *, rows: Sequence[int], now_us: Callable[[], int]) -> list[tuple[int, int]]:
        """Run golden rows, and tell (rows, microseconds) of the last run of each size; raises ModelError."""
        arrays = {
            tensor.name: np.frombuffer(tensor.data, dtype=numpy_dtype(tensor.dtype)).reshape(tensor.shape)
            for tensor in golden.inputs
        }
        timed: list[tuple[int, int]] = []
        for size in rows if self.batch_rows == 0 else [self.batch_rows]:
            places = np.arange(size) % golden.samples
            request = Rows({name: array[places] for name, array in arrays.items()}, size)
            for _ in range(WARM_UP_RUNS):
                began_us = now_us()
                verdict = self._alone(request)
                took_us = now_us() - began_us
                if isinstance(verdict, OutriderError):
                    raise verdict
            timed.append((size, took_us))
        return timed

    def close(self) -> None:
        """Let the thread go once it has ended what it does; does not wait."""
        self.thread.shutdown(wait=False, cancel_futures=True)

    def _alone(self, request: Rows) -> Verdict:
        try:
            outputs = self._run(request.inputs)
            table = self._table(outputs, rows=request.rows)
            return self._say(outputs, table)
        except ModelError as error:
            return error

    def _together(self, requests: Sequence[Rows]) -> list[Verdict] | None:
        """All in one run; None when the outputs cannot be told apart by rows or by class."""
        names = list(requests[0].inputs)
        joined = {name: np.concatenate([request.inputs[name] for request in requests]) for name in names}
        total = sum(request.rows for request in requests)
        outputs = self._run(joined)
        if any(array.ndim == 0 or array.shape[0] != total for array in outputs.values()):
            return None
        table = None
        if self.manifest.task == "classification":
            if not _is_of_one_kind(outputs[self._outputs[0]]):
                return None
            table = self._table(outputs, rows=total)
        verdicts: list[Verdict] = []
        start = 0
        for request in requests:
            end = start + request.rows
            part = {name: array[start:end] for name, array in outputs.items()}
            verdicts.append(self._say(part, None if table is None else table[start:end]))
            start = end
        return verdicts

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {
            name: prepare(self._preparations[name], self._specs[name], array) if name in self._preparations else array
            for name, array in inputs.items()
        }
        try:
            results = self._session.run(self._outputs, feeds)
        except Exception as error:  # the runtime's exceptions have no common class of their own
            if type(error).__name__ == "InvalidArgument":
                raise InputRefused(f"the model's graph refuses the input: {_first_line(error)}") from error
            raise ModelError(f"the model failed: {_first_line(error)}", code="model.run") from error
        outputs = {name: np.asarray(result) for name, result in zip(self._outputs, results, strict=True)}
        for name, array in outputs.items():
            if array.dtype.kind not in "biuf":
                raise ModelError(f"output {name!r} holds {array.dtype}, which is no number", code="model.output")
        return outputs

    def _table(self, outputs: Mapping[str, Array], *, rows: int) -> Array | None:
        """Class probabilities; None for a raw model."""
        if self.manifest.task == "raw":
            return None
        table = probabilities(outputs[self._outputs[0]], rows=rows)
        labels = self.manifest.labels
        if labels and table.shape[1] != len(labels):
            raise ModelError(
                f"the model tells {table.shape[1]} classes apart, the manifest names {len(labels)}", code="model.labels"
            )
        return table

    def _say(self, outputs: Mapping[str, Array], table: Array | None) -> Said:
        heads, payload = to_wire(outputs)
        if table is None:
            return Said(labels=(), confidences=(), outputs=heads, payload=tuple(payload))
        labels = self.manifest.labels
        winners = table.argmax(axis=1).tolist()
        return Said(
            labels=tuple(labels[winner] if labels else str(winner) for winner in winners),
            confidences=tuple(table.max(axis=1).tolist()),
            outputs=heads,
            payload=tuple(payload),
        )


def _batch_rows(manifest: Manifest) -> int:
    """See `Engine.batch_rows`."""
    specs = (*manifest.signature.inputs, *manifest.signature.outputs)
    firsts = {spec.shape[0] if spec.shape else 1 for spec in specs}
    if firsts == {-1}:
        return 0
    first = manifest.signature.inputs[0].shape[:1]
    return first[0] if first and first[0] > 0 else 1


def _is_of_one_kind(scores: Array) -> bool:
    """Whether all rows are probabilities or none is, and all are finite: then together is as alone."""
    if scores.dtype.kind not in "fiu" or not np.isfinite(scores).all():
        return False
    rows = scores.reshape(scores.shape[0], -1)
    likely = (rows.min(axis=1) >= 0) & (np.abs(rows.sum(axis=1, dtype=np.float32) - 1.0) <= _SLACK)
    return bool(likely.all() or not likely.any())


def _load(model: bytes, *, threads: int) -> Any:
    try:
        onnxruntime = onnx_library.onnxruntime()
    except ImportError as error:
        raise ModelError(
            f"onnxruntime cannot be imported: {error}",
            code="model.runtime_missing",
            hint="install the hub with its runtime: pip install 'outrider[hub]'",
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _LOG_FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        # Only the CPU: the default wheel ships a provider that calls a cloud. From bytes, so that weights in other
        # files cannot be pulled in by path.
        return onnxruntime.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as in `_run`
        raise ModelError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the model: {_first_line(error)}", code="model.corrupt"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:400]
