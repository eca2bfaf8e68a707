"""The engines, one file each, imported lazily inside a model host: a device needs only the one its models use.

An engine takes a model's bytes and answers arrays with arrays; it knows nothing of labels, preparation or sockets.
Quantized inputs and outputs are the engine's affair: callers give and get real numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from shared.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENGINES: Final[Mapping[str, str]] = {
    "onnx": "edge_agent.runtimes.onnx:load",
    "litert": "edge_agent.runtimes.litert:load",
}


_LIBRARIES: Final[Mapping[str, tuple[str, ...]]] = {
    "onnx": ("onnxruntime",),
    "litert": ("ai_edge_litert", "tflite_runtime"),
}


class Engine(Protocol):
    """A loaded model.

    Attributes:
        inputs, outputs: names as in the model's graph.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output for these inputs; raises InputRefused when the arrays do not fit, else ModelError."""
        ...


class Loader(Protocol):
    """Makes an engine of a model file's bytes."""

    def __call__(self, model: bytes, *, threads: int) -> Engine:
        """The loaded model; raises ModelError when the bytes are no model that this engine runs."""
        ...


def installed() -> frozenset[str]:
    """Engines whose library is there, found without importing any: the core asks this, and stays light."""
    return frozenset(
        name for name, libraries in _LIBRARIES.items() if any(importlib.util.find_spec(lib) for lib in libraries)
    )


def find_loader(runtime: str) -> Loader:
    """Import the engine of that name; raises ModelError when it is unknown or its library is not installed."""
    target = ENGINES.get(runtime)
    if target is None:
        raise ModelError(f"runtime {runtime!r} is not known", code="model.runtime_missing", hint="update the agent")
    module_name, _, function = target.partition(":")
    module = importlib.import_module(module_name)
    module.require()
    return cast(Loader, getattr(module, function))
