"""The networks of the story, trained in a process of their own while the story begins: `-m scripts.story.models DIR`.

They are trained one after the other, in the order in which they are needed; each is there when its `NAME.json` is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from . import digits
from .digits import Part, Recipe
from .telling import NeverTrue, until

if TYPE_CHECKING:
    from .cast import House

RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "digits-1": Recipe(seed=3),
        "digits-2": Recipe(seed=2),
        "digits-3": Recipe(seed=5),
        "digits-retrained": Recipe(seed=7),
        "digits-hasty": Recipe(seed=3, samples=40),
        "digits-slow": Recipe(seed=7, detours=120),
        "digits-large": Recipe(seed=3, hidden=(512, 256), passes=15, noise=(4.0, 5.0)),
    }
)
SAMPLES: Final = ("golden", "calibration", "held_back")
"""Parts of the digits that are written beside the networks, as `NAME.npz`; of the first two also `few-NAME.npz`."""
FEW: Final = 40
"""Rows of the small sets, for a model that would take long over all of them."""
PROCESS: Final = "training"
TRAINED_S: Final = 90.0


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """How a network's training went: its accuracy, 0 to 1, on the held-back part, and the time it took."""

    accuracy: float
    seconds: float


def begin(house: House) -> None:
    """Start training all networks into the operator's folder."""
    house.stage.start(PROCESS, "python", "-P", "-m", "scripts.story.models", str(house.folder.operator))


def trained(house: House, name: str) -> Training:
    """Wait until this network is there."""
    file = house.folder.operator / f"{name}.json"

    def look() -> Training | None:
        working = house.stage.alive(PROCESS)
        if file.is_file():
            return msgspec.json.decode(file.read_bytes(), type=Training)
        if not working:
            raise NeverTrue(f"the training has ended without {name}")
        return None

    return until(f"{name} is trained", look, seconds=TRAINED_S)


def write(folder: Path) -> None:
    """Write the samples, and every network as `NAME.onnx` with `NAME.json`."""
    parts = digits.split()
    for name in SAMPLES:
        part: Part = getattr(parts, name)
        np.savez(folder / f"{name}.npz", pixels=part.pixels, labels=part.labels)
        if name != "held_back":
            np.savez(folder / f"few-{name}.npz", pixels=part.pixels[:FEW], labels=part.labels[:FEW])
    for name, recipe in RECIPES.items():
        began = time.monotonic()
        network = digits.train(parts, recipe)
        (folder / f"{name}.onnx").write_bytes(network.onnx)
        unfinished = folder / f"{name}.json.new"
        unfinished.write_text(json.dumps({"accuracy": network.accuracy, "seconds": time.monotonic() - began}))
        unfinished.rename(folder / f"{name}.json")
        if name == "digits-1":
            os.nice(5)  # the story waits for this one; the others are needed much later


if __name__ == "__main__":
    write(Path(sys.argv[1]))
