"""The engines: what they load, what they refuse, and what they say when their library is missing."""

from __future__ import annotations

import base64
import sys

import numpy as np
import pytest

from edge_agent.runtimes import ENGINES, find_loader
from shared.errors import InputRefused, ModelError
from tests.fakes.releases import sign_classifier

# y = x + x over rows of two, written with the schema that ai_edge_litert ships; the second one takes int8 with scale
# 0.5 and zero point 3 and gives int8 with scale 1 and zero point -5.
DOUBLER_FP32 = base64.b64decode(
    "CAAAAFRGTDPG////FAAAABwAAAAkAAAAMAEAAAMAAAABAAAABAAAANj+//8HAAAAZG91YmxlcgABAAAAFAAAAAAADgAYABQAEAAMAAgABAAOAAAA"
    "FAAAABwAAABcAAAAYAAAAGQAAAAEAAAAbWFpbgAAAAABAAAAFAAAAAAADgAUAAAAEAAMAAsABAAOAAAAEAAAAAAAAAsMAAAAEAAAAFD///8BAAAA"
    "AQAAAAIAAAAAAAAAAAAAAAEAAAABAAAAAQAAAAAAAAACAAAATAAAAAQAAADQ////DAAAABQAAAAYAAAAAgAAAP////8CAAAAAQAAAHkAAAACAAAA"
    "AQAAAAIAAAAUABAADAAAAAAACAAAAAAAAAAEABQAAAAMAAAAFAAAABgAAAACAAAA/////wIAAAABAAAAeAAAAAIAAAABAAAAAgAAAAEAAAAIAAAA"
    "BAAEAAQAAAA="
)
DOUBLER_INT8 = base64.b64decode(
    "DAAAAFRGTDMAAAAAxv///xQAAAAcAAAAJAAAAJABAAADAAAAAQAAAAQAAACI////BwAAAGRvdWJsZXIAAQAAABQAAAAAAA4AGAAUABAADAAIAAQA"
    "DgAAABQAAAAcAAAAYAAAAGQAAABoAAAABAAAAG1haW4AAAAAAQAAABQAAAAAAA4AFAAAABAADAALAAQADgAAABQAAAAAAAALEAAAABQAAAAEAAQA"
    "BAAAAAEAAAABAAAAAgAAAAAAAAAAAAAAAQAAAAEAAAABAAAAAAAAAAIAAAB0AAAABAAAAKj///8UAAAAHAAAADgAAAAAAAAJOAAAAAIAAAD/////"
    "AgAAAJT///8IAAAAEAAAAAEAAAD7/////////wEAAAAAAIA/AQAAAHkAAAACAAAAAQAAAAIAAAAUABgAFAATAAAADAAIAAAAAAAEABQAAAAUAAAA"
    "KAAAAEQAAAAAAAAJRAAAAAIAAAD/////AgAAAAwADAAAAAAACAAEAAwAAAAIAAAAEAAAAAEAAAADAAAAAAAAAAEAAAAAAAA/AQAAAHgAAAACAAAA"
    "AQAAAAIAAAABAAAAEAAAAAAACgAIAAAAAAAEAAoAAAACAAAA"
)


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


@pytest.mark.parametrize("model", [DOUBLER_FP32, DOUBLER_INT8], ids=["fp32", "int8"])
def test_litert_runs_float_and_quantized_models_alike(model: bytes) -> None:
    pytest.importorskip("ai_edge_litert", reason="pip install 'outrider[litert]'")
    engine = find_loader("litert")(model, threads=1)
    assert (engine.inputs, engine.outputs) == (("x",), ("y",))
    for rows in ([[1, 2]], [[1, 2], [3, 4], [5, 6]], [[7.5, -8]]):
        array = np.array(rows, dtype=np.float32)
        result = engine.run({"x": array})["y"]
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, array * 2)


def test_litert_saturates_and_goes_on_after_a_refusal() -> None:
    pytest.importorskip("ai_edge_litert", reason="pip install 'outrider[litert]'")
    engine = find_loader("litert")(DOUBLER_INT8, threads=1)
    assert engine.run({"x": np.array([[1000, -1000]], dtype=np.float32)})["y"].tolist() == [[124, -123]]
    with pytest.raises(InputRefused):
        find_loader("litert")(DOUBLER_FP32, threads=1).run({"x": np.zeros((1, 2), np.float64)})
    with pytest.raises(InputRefused):
        engine.run({"nothing": np.zeros((1, 2), np.float32)})
    assert engine.run({"x": np.array([[1, 2]], dtype=np.float32)})["y"].tolist() == [[2, 4]]


@pytest.mark.parametrize("data", [b"", b"nonsense" * 10])
def test_litert_refuses_bytes_that_are_no_model(data: bytes) -> None:
    pytest.importorskip("ai_edge_litert", reason="pip install 'outrider[litert]'")
    with pytest.raises(ModelError) as caught:
        find_loader("litert")(data, threads=1)
    assert caught.value.code == "model.corrupt"
