"""Samples as rows of features: computed once for each sample by the release's own model, kept in order.

Rules: preparation and engine are the ones that serve the model, so that what is learned fits what is served; the
samples themselves are let go at once.

Not here: sockets (child.py), the head (head.py), and models that take several rows only: they are not taught
(edge_agent/core/lessons.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.lessons import CannotLearn, fixed_rows
from edge_agent.runtimes import Engine
from shared.errors import ModelError
from shared.inference import TensorHead, tensor_bytes
from shared.model import Manifest
from shared.tensors import from_wire, prepare

Floats = NDArray[np.float32]

ROWS_AT_ONCE: Final = 32
"""A runtime keeps the memory of its largest run for ever."""


class Features:
    """Rows and labels by sample number."""

    def __init__(self, *, manifest: Manifest, engine: Engine, output: str) -> None:
        """Learn from this output of the engine; raises CannotLearn when the model has none of that name."""
        if output not in engine.outputs:
            raise CannotLearn(f"the model has no output {output[:80]!r}, it has {list(engine.outputs)[:8]}")
        if set(engine.inputs) != {spec.name for spec in manifest.signature.inputs}:
            raise ModelError("the model's inputs are not those of its manifest", code="model.signature")
        self._signature = manifest.signature
        self._specs = {spec.name: spec for spec in manifest.signature.inputs}
        self._preparations = {preparation.input: preparation for preparation in manifest.preparations}
        self._engine = engine
        self._output = output
        self._rows: dict[int, tuple[str, Floats]] = {}
        self.refusal = ""

    def feed(
        self, numbers: Sequence[int], labels: Sequence[str], heads: Sequence[TensorHead], payload: bytearray
    ) -> None:
        """Compute the features of samples that lie one after the other; what fails is said by `select`."""
        size = sum(tensor_bytes(head) for head in heads)
        view = memoryview(payload)
        samples = [from_wire(heads, view[at : at + size]) for at in range(0, len(view), size)] if size else []
        if len(samples) != len(numbers) or len(labels) != len(numbers):
            raise CannotLearn("samples, numbers and labels are not as many")
        step = 1 if fixed_rows(self._signature) is not None else ROWS_AT_ONCE
        for start in range(0, len(samples), step):
            part = samples[start : start + step]
            joined = {name: np.concatenate([sample[name] for sample in part]) for name in self._specs}
            try:
                rows = self._compute(joined, rows=len(part))
            except ModelError as error:
                self.refusal = error.message
                continue
            for number, label, row in zip(
                numbers[start : start + step], labels[start : start + step], rows, strict=True
            ):
                self._rows[number] = (label, row.copy())  # a view would keep the whole table

    def forget_before(self, number: int) -> None:
        """Let go of the rows of samples with lower numbers."""
        for old in [known for known in self._rows if known < number]:
            del self._rows[old]

    def select(self, labels: Sequence[str], *, width: int) -> tuple[Floats, NDArray[np.int64]]:
        """Features (rows, width) and classes of every sample with one of these labels, in order of their numbers.

        Raises:
            CannotLearn: there is none, or the features are not as wide as the head.
        """
        classes: Mapping[str, int] = {label: index for index, label in enumerate(labels)}
        chosen = [(row, classes[label]) for _, (label, row) in sorted(self._rows.items()) if label in classes]
        if not chosen:
            why = f"; the model refused its samples: {self.refusal}" if self.refusal else ""
            raise CannotLearn(f"the device has no sample with one of the run's labels{why}")
        if any(row.shape != (width,) for row, _ in chosen):
            raise CannotLearn(f"the features are {chosen[0][0].size} wide, the head expects {width}")
        return np.stack([row for row, _ in chosen]), np.array([label for _, label in chosen], dtype=np.int64)

    def _compute(self, inputs: dict[str, NDArray[Any]], *, rows: int) -> Floats:
        feeds = {
            name: prepare(self._preparations[name], self._specs[name], array) if name in self._preparations else array
            for name, array in inputs.items()
        }
        output = np.asarray(self._engine.run(feeds)[self._output])
        if output.dtype.kind not in "biuf" or output.ndim < 2 or output.shape[0] != rows:
            raise CannotLearn(f"the output {self._output!r} of shape {list(output.shape)} is no table of features")
        table = output.reshape(rows, -1).astype(np.float32)
        if not np.isfinite(table).all():
            raise CannotLearn(f"the output {self._output!r} holds values that are not finite numbers")
        return table
