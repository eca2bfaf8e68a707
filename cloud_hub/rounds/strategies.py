"""Flower's strategies by name, unmodified, with their default parameters; and what they remember between rounds.

A strategy's memory is its attributes that are dictionaries of arrays (moments of FedAdam and FedYogi); they travel in
the checkpoint, so that a resumed run computes what an undisturbed one would have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cloud_hub.rounds.rules import Spec

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from shared.tensors import Array

_CLASSES: Final = {
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedmedian": "FedMedian",
    "fedtrimmedavg": "FedTrimmedAvg",
    "krum": "Krum",
    "multikrum": "MultiKrum",
}


def make(spec: Spec) -> Strategy:
    """The strategy of this run; every device that is there takes part."""
    from flwr.serverapp import strategy

    made: Strategy = getattr(strategy, _CLASSES[spec.strategy])(
        fraction_train=1.0,
        fraction_evaluate=1.0 if spec.evaluate else 0.0,
        min_train_nodes=1,
        min_evaluate_nodes=1 if spec.evaluate else 0,
        min_available_nodes=1,
    )
    return made


def memory_of(strategy: Strategy) -> dict[str, dict[str, Array]]:
    """What the strategy remembers: arrays by attribute and name."""
    import numpy as np

    return {
        name: value
        for name, value in vars(strategy).items()
        if isinstance(value, dict) and value and all(isinstance(array, np.ndarray) for array in value.values())
    }


def remind(strategy: Strategy, memory: dict[str, dict[str, Array]]) -> None:
    """Give the strategy what it remembered; attributes that it does not have are passed over."""
    for name, arrays in memory.items():
        if name in vars(strategy):
            setattr(strategy, name, dict(arrays))
