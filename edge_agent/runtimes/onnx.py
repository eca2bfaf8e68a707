"""ONNX Runtime on the CPU. The only importer of `onnxruntime` in the agent.

One thread per session unless the profile says otherwise, no spinning (with it, two threads at 20 Hz burn 40 % of a
core; without, 5 %), nothing but the CPU provider (the default wheel ships one that calls a cloud), no telemetry.
The model comes as bytes, so that weights in other files cannot be pulled in by path.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from shared.errors import InputRefused, ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LOG_FATAL_ONLY = 4


def require() -> None:
    """Import the library; raises ModelError with what to install."""
    try:
        _library()
    except ImportError as error:
        raise ModelError(
            f"onnxruntime cannot be imported: {error}",
            code="model.runtime_missing",
            hint="install the agent with its runtime: pip install 'outrider[agent]'",
        ) from error


def load(model: bytes, *, threads: int) -> OnnxEngine:
    """The loaded model; raises ModelError with the code `model.corrupt` when ONNX Runtime refuses the bytes."""
    onnxruntime = _library()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _LOG_FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(model, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions have no common class of their own
        raise ModelError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the model: {_first_line(error)}",
            code="model.corrupt",
            hint="check the file with `python -m onnx.checker`, or whether it needs a newer ONNX Runtime",
        ) from error
    return OnnxEngine(session)


class OnnxEngine:
    """A session and the names of its inputs and outputs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = tuple(str(value.name) for value in session.get_inputs())
        self.outputs = tuple(str(value.name) for value in session.get_outputs())

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output for these inputs; raises InputRefused for shapes and types that the graph refuses."""
        try:
            results = self._session.run(None, feeds)
        except Exception as error:  # as in `load`
            if type(error).__name__ == "InvalidArgument":
                raise InputRefused(f"the model's graph refuses the input: {_first_line(error)}") from error
            raise ModelError(f"the model failed: {_first_line(error)}", code="model.run") from error
        return dict(zip(self.outputs, results, strict=True))


def _library() -> Any:
    # Before the import, or it is too late: the wheels send usage data home, and keep a device id below the home
    # directory. The library reads this from the environment and from nowhere else.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # noqa: TID251
    import onnxruntime

    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:400]
