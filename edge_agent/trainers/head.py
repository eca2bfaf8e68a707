"""A linear head with a softmax on frozen features, learned by mini-batch stochastic gradient descent.

The gradient of the mean cross-entropy with respect to the scores is (probabilities - truth) / rows. Same data, same
head, same seed: same result, bit for bit on the same machine.

Not here: where features and labels come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.lessons import CannotLearn

Floats = NDArray[np.float32]
Classes = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Head:
    """`weight` (features, classes) and `bias` (classes,)."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Descent:
    """How to go down: see core/lessons.py."""

    learning_rate: float
    epochs: int
    batch_size: int
    seed: int


def learn(head: Head, features: Floats, classes: Classes, descent: Descent) -> Head:
    """The head after the descent; raises CannotLearn when it has run away."""
    random = np.random.default_rng(descent.seed)
    weight, bias = head.weight.copy(), head.bias.copy()
    rate = np.float32(descent.learning_rate)
    rows = len(features)
    # A rate that is too high shows as numbers that are none; that is told below, once.
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(descent.epochs):
            order = random.permutation(rows)
            for start in range(0, rows, descent.batch_size):
                chosen = order[start : start + descent.batch_size]
                part = features[chosen]
                error = probabilities(part @ weight + bias)
                error[np.arange(len(chosen)), classes[chosen]] -= 1
                error /= np.float32(len(chosen))
                weight -= rate * (part.T @ error)
                bias -= rate * error.sum(axis=0)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise CannotLearn("the descent ran away", hint="lower the learning rate")
    return Head(weight, bias)


def measure(head: Head, features: Floats, classes: Classes) -> dict[str, float]:
    """`num-examples`, mean cross-entropy `loss` and `accuracy`, 0 to 1; raises CannotLearn when they are no numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        table = probabilities(features @ head.weight + head.bias)
    if not np.isfinite(table).all():
        raise CannotLearn("the head's scores are not finite numbers")
    likely = table[np.arange(len(classes)), classes]
    return {
        "num-examples": float(len(classes)),
        "loss": float(-np.log(np.maximum(likely, np.finfo(np.float32).tiny)).mean()),
        "accuracy": float((table.argmax(axis=1) == classes).mean()),
    }


def probabilities(scores: Floats) -> Floats:
    """Softmax by row, shifted by the row's maximum so that nothing overflows."""
    table: Floats = scores - scores.max(axis=1, keepdims=True)
    np.exp(table, out=table)
    table /= table.sum(axis=1, keepdims=True)
    return table
