"""A model and all that is needed to answer with it: preparation, engine, labels, golden check.

Rules: what the manifest declares is what callers see; the graph's outputs that it does not declare stay inside. A
release whose model does not give the recorded answers is refused here, on the device, whatever its signature says.

Not here: sockets and processes (child.py), and the engines themselves (edge_agent/runtimes).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from edge_agent.runtimes import Engine
from shared import limits
from shared.errors import InputRefused, ModelError
from shared.model import Manifest, Variant
from shared.tensors import Array, numpy_dtype, prepare, probabilities
from shared.wire.golden import GoldenSet

_GOLDEN_CHUNK_ROWS = 64
_GOLDEN_CHUNK_BYTES = 16 * limits.KIB
"""How much of the golden set is run at once. A runtime keeps the memory of its largest run for ever, so a check with
larger batches than applications send would cost the device memory that it never needs again."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Labels and confidences by row for a classifier, and the declared outputs."""

    labels: tuple[str, ...]
    confidences: tuple[float, ...]
    outputs: dict[str, Array]


class Session:
    """One loaded variant. Answers one request at a time."""

    def __init__(self, *, manifest: Manifest, variant: Variant, engine: Engine) -> None:
        """Hold the engine against the manifest; raises ModelError with the code `model.signature`."""
        self._manifest = manifest
        self._variant = variant
        self._engine = engine
        self._specs = {spec.name: spec for spec in manifest.signature.inputs}
        self._preparations = {preparation.input: preparation for preparation in manifest.preparations}
        self._outputs = [spec.name for spec in manifest.signature.outputs]
        self._probe: tuple[dict[str, Array], int] | None = None
        if set(self._specs) != set(engine.inputs) or not set(self._outputs) <= set(engine.outputs):
            raise ModelError(
                f"the manifest declares {sorted(self._specs)} -> {self._outputs}, "
                f"the model has {sorted(engine.inputs)} -> {list(engine.outputs)}",
                code="model.signature",
                hint="push the model again with the names of its graph",
            )

    def run(self, inputs: dict[str, Array], *, rows: int) -> Outcome:
        """Answer; raises InputRefused when an input is not finite or the graph refuses it, else ModelError."""
        feeds = self._prepared(inputs)
        _check_finite(feeds)
        outputs = self._infer(feeds)
        if self._manifest.task == "raw":
            return Outcome(labels=(), confidences=(), outputs=outputs)
        table = self._table(outputs, rows=rows)
        winners = table.argmax(axis=1)
        labels = self._manifest.labels
        return Outcome(
            labels=tuple(labels[winner] if labels else str(winner) for winner in winners.tolist()),
            confidences=tuple(table[np.arange(rows), winners].tolist()),
            outputs=outputs,
        )

    def check_golden(self, golden: GoldenSet) -> float:
        """Run every golden row, warm-up included, and keep one for `probe`.

        Returns:
            The share of rows with the variant's recorded answer; for raw models 1.0, when every output is finite.

        Raises:
            ModelError: `model.golden` when that share is too small; others when the model does not run.
        """
        agreed = 0
        first = 0
        for inputs, rows, size in self._chunks(golden):
            answers = self._answers(inputs, rows=size)[:rows]
            expected = self._variant.answers[first : first + rows] if answers else ()
            hits = [got == want for got, want in zip(answers, expected, strict=True)]
            agreed += sum(hits) if answers else rows
            if self._probe is None and (not answers or any(hits)):
                row = hits.index(True) if answers else 0
                self._probe = self._sample(inputs, row=row, size=size, answer=answers[row] if answers else 0)
            first += rows
        agreement = agreed / golden.samples
        wanted = self._manifest.golden.min_agreement
        if agreement < wanted or self._probe is None:
            raise ModelError(
                f"the model gave {agreed} of {golden.samples} recorded answers ({agreement:.1%}), "
                f"{wanted:.1%} are required",
                code="model.golden",
                hint="this device computes something else than the builder did: try another variant",
            )
        return agreement

    def probe(self) -> bool:
        """Whether a golden sample still gets the answer that it got when the model was loaded."""
        if self._probe is None:
            return False
        inputs, answer = self._probe
        size = next(iter(inputs.values())).shape[0]
        try:
            answers = self._answers(inputs, rows=size)
        except ModelError:
            return False
        return not answers or answers[0] == answer

    def _prepared(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return {
            name: prepare(self._preparations[name], self._specs[name], array) if name in self._preparations else array
            for name, array in inputs.items()
        }

    def _infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        results = self._engine.run(feeds)
        outputs = {name: np.asarray(results[name]) for name in self._outputs}
        for name, array in outputs.items():
            if array.dtype.kind not in "biuf":
                raise ModelError(f"output {name!r} holds {array.dtype}, which is no number", code="model.output")
        return outputs

    def _table(self, outputs: dict[str, Array], *, rows: int) -> Array:
        table = probabilities(outputs[self._outputs[0]], rows=rows)
        labels = self._manifest.labels
        if labels and table.shape[1] != len(labels):
            raise ModelError(
                f"the model tells {table.shape[1]} classes apart, the manifest names {len(labels)}", code="model.labels"
            )
        return table

    def _answers(self, inputs: dict[str, Array], *, rows: int) -> list[int]:
        """The class of each row; empty for a raw model, whose outputs must be finite."""
        outputs = self._infer(self._prepared(inputs))
        if self._manifest.task == "classification":
            return [int(winner) for winner in self._table(outputs, rows=rows).argmax(axis=1)]
        for name, array in outputs.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ModelError(f"output {name!r} holds values that are not finite numbers", code="model.golden")
        return []

    def _chunks(self, golden: GoldenSet) -> Iterator[tuple[dict[str, Array], int, int]]:
        """Inputs, how many of their rows are samples, and how many rows they have: a fixed batch is filled up."""
        arrays = {
            tensor.name: np.frombuffer(tensor.data, dtype=numpy_dtype(tensor.dtype)).reshape(tensor.shape)
            for tensor in golden.inputs
        }
        sizes = {spec.shape[0] for spec in self._specs.values()}
        fixed = max(sizes)
        row_bytes = sum(len(tensor.data) for tensor in golden.inputs) // golden.samples
        step = fixed if fixed > 0 else max(1, min(_GOLDEN_CHUNK_ROWS, _GOLDEN_CHUNK_BYTES // max(row_bytes, 1)))
        for start in range(0, golden.samples, step):
            rows = min(step, golden.samples - start)
            chunk = {name: array[start : start + rows] for name, array in arrays.items()}
            if fixed > 0 and rows < fixed:
                chunk = {
                    name: np.concatenate([part, np.repeat(part[-1:], fixed - rows, axis=0)])
                    for name, part in chunk.items()
                }
            yield chunk, rows, step if fixed > 0 else rows

    def _sample(self, inputs: dict[str, Array], *, row: int, size: int, answer: int) -> tuple[dict[str, Array], int]:
        """A copy of one golden row in the shape that the graph takes, so that the golden set can be let go."""
        fixed = max(spec.shape[0] for spec in self._specs.values()) > 0
        copies = size if fixed else 1
        return {name: np.repeat(array[row : row + 1], copies, axis=0) for name, array in inputs.items()}, answer


def _check_finite(feeds: dict[str, Array]) -> None:
    """Refuse what a graph would answer with a confident guess: comparisons with NaN are false, whatever they mean."""
    for name, array in feeds.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputRefused(
                f"input {name!r} holds values that are not finite numbers, or become none when they are prepared",
                hint="replace NaN and infinite values before asking, as was done for training",
            )
