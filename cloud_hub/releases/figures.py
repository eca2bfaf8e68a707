"""Does what was pushed fit the graph, and how much worse is a variant: arithmetic for the build child.

Runs no model and opens no file. It needs numpy, so only the build child imports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from cloud_hub.releases.rules import Push
from shared.errors import ModelError
from shared.model import Preparation, Signature, TensorSpec, check_preparations, check_signature
from shared.tensors import Array, probabilities
from shared.wire.golden import GoldenSet

BOOTSTRAP_DRAWS: Final = 4000


def fit_signature(
    given: Signature | None,
    *,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    preparations: Sequence[Preparation],
) -> Signature:
    """The signature that was given, if a graph with these inputs and outputs can keep it, else the graph's own.

    Raises:
        ModelError: names, shapes or element types do not fit; says which.
    """
    signature = given or Signature(inputs=inputs, outputs=outputs)
    check_signature(signature)
    check_preparations(signature, tuple(preparations))
    prepared = {preparation.input for preparation in preparations}
    if {spec.name for spec in signature.inputs} != {spec.name for spec in inputs}:
        raise _unfit(f"the graph's inputs are {sorted(spec.name for spec in inputs)}")
    for specs, nodes in ((signature.inputs, inputs), (signature.outputs, outputs)):
        by_name = {node.name: node for node in nodes}
        for spec in specs:
            node = by_name.get(spec.name)
            if node is None:
                raise _unfit(f"the graph has no output {spec.name!r}, only {sorted(by_name)}")
            if len(spec.shape) != len(node.shape) or any(
                have not in (-1, want) for want, have in zip(spec.shape, node.shape, strict=True)
            ):
                raise _unfit(f"{spec.name!r} is declared as {list(spec.shape)}, the graph has {list(node.shape)}")
            wanted = "fp32" if spec.name in prepared and specs is signature.inputs else spec.dtype
            if node.dtype != wanted:
                raise _unfit(f"{spec.name!r} would reach the graph as {wanted}, which wants {node.dtype}")
    return signature


def count_labelled(push: Push, golden: GoldenSet) -> int:
    """How many golden rows have a true class; raises ModelError when classes are unknown or there is none."""
    labelled = sum(label >= 0 for label in golden.labels)
    if push.task == "raw":
        return labelled
    classes = len(push.labels)
    odd = next((label for label in golden.labels if not -1 <= label < classes), None)
    if odd is not None:
        raise ModelError(
            f"the golden set names class {odd}, there are {classes} labels (0 to {classes - 1})", code="model.labels"
        )
    if not labelled:
        raise ModelError(
            "no row of the golden set has a true class, so nothing can be measured",
            code="model.labels",
            hint="give golden samples with their labels",
        )
    return labelled


def check_scores(push: Push, scores: Array) -> None:
    """Raise ModelError unless a classifier's first output has one score per label and row; shape (rows, scores)."""
    if push.task == "classification" and scores.shape[1] != len(push.labels):
        raise ModelError(
            f"the first output gives {scores.shape[1]} scores per row, there are {len(push.labels)} labels",
            code="model.labels",
            hint="the first output must hold one score per label; name that output first in the signature",
        )


def classes_of(scores: Array) -> Array:
    """The predicted class of each row, read as devices read it (shared/tensors.py)."""
    classes: Array = probabilities(scores, rows=len(scores)).argmax(axis=1)
    return classes


def drop_bound_pt(right: Array, fp32_right: Array) -> float:
    """One-sided 95 % upper bound of the drop, in points: paired bootstrap over rows, with a fixed seed.

    Resampling rows of which none was lost can only say "none": then it is 3/n, the rule of three.
    """
    rows = len(right)
    lost, won = int((fp32_right & ~right).sum()), int((right & ~fp32_right).sum())
    shares = [lost / rows, won / rows, (rows - lost - won) / rows]
    draws = np.random.default_rng(0).multinomial(rows, shares, size=BOOTSTRAP_DRAWS)
    bound = float(np.quantile((draws[:, 0] - draws[:, 1]) / rows, 0.95))
    return 100.0 * (bound if lost else max(bound, min(1.0, 3.0 / rows)))


def _unfit(message: str) -> ModelError:
    return ModelError(f"signature: {message}", code="model.signature", hint="leave it out to take it from the graph")
