"""LiteRT (TensorFlow Lite) on the CPU. The only importer of `ai_edge_litert` and `tflite_runtime` in the agent.

The graph's own batch size is fixed when the model is loaded; a request of another size has the tensors allocated anew
and costs more once. Fully quantized models take and give integers: this engine applies scale and zero point, so that
callers see real numbers; only an array that has the graph's own integer type already is taken as quantized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shared.errors import InputRefused, ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def require() -> None:
    """Import the library; raises ModelError with what to install."""
    _interpreter_class()


def load(model: bytes, *, threads: int) -> LiteRtEngine:
    """The loaded model; raises ModelError with the code `model.corrupt` when the interpreter refuses the bytes."""
    interpreter_class = _interpreter_class()
    try:
        interpreter = interpreter_class(model_content=model, num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError, SystemError) as error:
        raise ModelError(
            f"LiteRT cannot load the model: {str(error)[:400]}",
            code="model.corrupt",
            hint="check that the file is a .tflite model, or whether it needs a newer LiteRT",
        ) from error
    return LiteRtEngine(interpreter)


def _interpreter_class() -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        try:
            from tflite_runtime.interpreter import Interpreter
        except ImportError as error:
            raise ModelError(
                f"neither ai_edge_litert nor tflite_runtime can be imported: {error}",
                code="model.runtime_missing",
                hint="install the agent with LiteRT: pip install 'outrider[litert]'",
            ) from error
    return Interpreter


class LiteRtEngine:
    """An interpreter with its tensors allocated."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._inputs: dict[str, Any] = {str(detail["name"]): detail for detail in interpreter.get_input_details()}
        self._outputs: dict[str, Any] = {str(detail["name"]): detail for detail in interpreter.get_output_details()}
        self._shapes = {name: tuple(int(size) for size in detail["shape"]) for name, detail in self._inputs.items()}
        self.inputs = tuple(self._inputs)
        self.outputs = tuple(self._outputs)

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output for these inputs; raises InputRefused for shapes and types that the graph refuses."""
        try:
            self._resize(feeds)
            for name, array in feeds.items():
                self._interpreter.set_tensor(self._inputs[name]["index"], _quantized(array, self._inputs[name]))
        except (KeyError, ValueError, RuntimeError) as error:
            raise InputRefused(f"the model's graph refuses the input: {str(error)[:400]}") from error
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"the model failed: {str(error)[:400]}", code="model.run") from error
        return {
            name: _real(self._interpreter.get_tensor(detail["index"]), detail) for name, detail in self._outputs.items()
        }

    def _resize(self, feeds: dict[str, NDArray[Any]]) -> None:
        changed = {name: array.shape for name, array in feeds.items() if self._shapes[name] != array.shape}
        if not changed:
            return
        for name, shape in changed.items():
            self._interpreter.resize_tensor_input(self._inputs[name]["index"], shape, strict=False)
        # Kept before allocating: after a refusal the next request has to allocate again in any case.
        self._shapes.update(changed)
        try:
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError):
            self._shapes.update(dict.fromkeys(changed, ()))
            raise


def _quantized(array: NDArray[Any], detail: Any) -> NDArray[Any]:
    """The array in the graph's element type: `round(x / scale) + zero_point`, saturated, where that is an integer."""
    import numpy as np

    scale, zero_point = detail["quantization"]
    if not scale or array.dtype == detail["dtype"]:
        return array
    bounds = np.iinfo(detail["dtype"])
    quantized: NDArray[Any] = np.clip(np.rint(array / scale) + zero_point, bounds.min, bounds.max)
    return quantized.astype(detail["dtype"])


def _real(array: NDArray[Any], detail: Any) -> NDArray[Any]:
    """The array as real numbers: `(q - zero_point) * scale`, where the graph gives quantized integers."""
    import numpy as np

    scale, zero_point = detail["quantization"]
    if not scale:
        return array
    return (array.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
