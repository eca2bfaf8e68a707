"""The engines: what they load, what they refuse, and what they say when their library is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.runtimes import ENGINES, find_loader
from shared.errors import InputRefused, ModelError
from tests.fakes.releases import sign_classifier

TFLITE_DOUBLER = Path(__file__).parent / "doubler.tflite"


def test_onnx_runs_a_model() -> None:
    engine = find_loader("onnx")(sign_classifier().model, threads=1)
    assert (engine.inputs, engine.outputs) == (("x",), ("scores",))
    results = engine.run({"x": np.array([[1, 2]], dtype=np.float32)})
    assert results["scores"].tolist() == [[-1, 1]]


@pytest.mark.parametrize(
    "array", [np.zeros((1, 3), np.float32), np.zeros((1, 2), np.float64), np.zeros((2,), np.float32)]
)
def test_onnx_refuses_what_the_graph_does(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    engine = find_loader("onnx")(sign_classifier().model, threads=1)
    with pytest.raises((InputRefused, ModelError)):
        engine.run({"x": array})
    assert engine.run({"x": np.zeros((1, 2), np.float32)})["scores"].shape == (1, 2)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x08\x09garbage"])
def test_onnx_refuses_bytes_that_are_no_model(data: bytes) -> None:
    with pytest.raises(ModelError) as caught:
        find_loader("onnx")(data, threads=1)
    assert caught.value.code == "model.corrupt"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("runtime", "modules", "package"),
    [
        ("onnx", ["onnxruntime"], "outrider[agent]"),
        ("litert", ["ai_edge_litert.interpreter", "tflite_runtime.interpreter"], "outrider[litert]"),
    ],
)
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, runtime: str, modules: list[str], package: str
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModelError) as caught:
        find_loader(runtime)
    assert caught.value.code == "model.runtime_missing"
    assert package in caught.value.hint


def test_an_unknown_runtime_is_refused() -> None:
    assert set(ENGINES) == {"onnx", "litert"}
    with pytest.raises(ModelError) as caught:
        find_loader("abacus")
    assert caught.value.code == "model.runtime_missing"
