"""A session answers what the manifest declares, and refuses a model that does something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.host.session import Session
from shared.errors import InputRefused, ModelError
from shared.model import Preparation, Signature, TensorSpec
from shared.wire.golden import decode_golden
from tests.fakes.releases import Build, build, sign_classifier


class Arithmetic:
    """An engine in plain numpy: scores are minus and plus the row's sum; remembers the batch sizes it saw."""

    inputs: tuple[str, ...] = ("x",)
    outputs: tuple[str, ...] = ("hidden", "scores")

    def __init__(self, *, wrong_rows: int = 0) -> None:
        self.seen: list[NDArray[Any]] = []
        self._wrong_rows = wrong_rows

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        x = feeds["x"]
        self.seen.append(x)
        total = x.reshape(len(x), -1).sum(axis=1).astype(np.float32)
        return {"hidden": x, "scores": np.stack([-total, total], axis=1)[self._wrong_rows :]}


def release(*, batch: int = -1, samples: int = 5, **changes: Any) -> Build:
    rows = np.array([[number - 2.5, 0] for number in range(samples)], dtype=np.float32)
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="fp32", shape=(batch, 2)),),
        outputs=(TensorSpec(name="scores", dtype="fp32", shape=(batch, 2)),),
    )
    changes.setdefault("labels", ("minus", "plus"))
    changes.setdefault("answers", tuple(int(row[0] > 0) for row in rows))
    return build(sign_graph(), golden={"x": rows}, signature=signature, **changes)


def sign_graph() -> Any:
    import onnx

    return onnx.load_model_from_string(sign_classifier().model).graph


def session(made: Build, engine: Arithmetic) -> Session:
    return Session(manifest=made.manifest, variant=made.variant, engine=engine)


def check(made: Build, engine: Arithmetic) -> float:
    return session(made, engine).check_golden(decode_golden(made.golden, made.manifest.signature))


def test_only_declared_outputs_leave_the_host() -> None:
    outcome = session(release(), Arithmetic()).run({"x": np.array([[1, 2]], dtype=np.float32)}, rows=1)
    assert list(outcome.outputs) == ["scores"]
    assert outcome.labels == ("plus",)
    assert outcome.confidences[0] == pytest.approx(0.9975, abs=1e-3)


def test_labels_are_numbers_where_none_are_declared() -> None:
    outcome = session(release(labels=()), Arithmetic()).run({"x": np.array([[1, 2]], dtype=np.float32)}, rows=1)
    assert outcome.labels == ("1",)


def test_inputs_are_prepared_as_the_manifest_says() -> None:
    engine = Arithmetic()
    made = release(preparations=(Preparation(input="x", scale=2.0, mean=(1.0,), std=(4.0, 8.0)),))
    session(made, engine).run({"x": np.array([[1, 2]], dtype=np.float32)}, rows=1)
    np.testing.assert_allclose(engine.seen[0], [[0.25, 0.375]])


@pytest.mark.parametrize("samples", [1, 5, 64, 65, 200])
def test_a_free_batch_is_checked_in_chunks(samples: int) -> None:
    engine = Arithmetic()
    assert check(release(samples=samples), engine) == 1.0
    assert sum(len(seen) for seen in engine.seen) == samples
    assert max(len(seen) for seen in engine.seen) <= 64


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_a_fixed_batch_is_filled_up(batch: int) -> None:
    engine = Arithmetic()
    made = release(batch=batch)
    live = session(made, engine)
    assert live.check_golden(decode_golden(made.golden, made.manifest.signature)) == 1.0
    assert live.probe() is True
    assert {len(seen) for seen in engine.seen} == {batch}


def test_agreement_is_the_share_of_recorded_answers() -> None:
    made = release(answers=(0, 0, 0, 1, 0), min_agreement=0.8)
    assert check(made, Arithmetic()) == 0.8
    with pytest.raises(ModelError, match=r"4 of 5 recorded answers \(80.0%\), 90.0% are required") as caught:
        check(release(answers=(0, 0, 0, 1, 0), min_agreement=0.9), Arithmetic())
    assert caught.value.code == "model.golden"


def test_a_model_that_never_agrees_is_refused_even_without_a_bound() -> None:
    with pytest.raises(ModelError):
        check(release(answers=(1, 1, 1, 0, 0), min_agreement=0.0), Arithmetic())


def test_probe_notices_a_change_of_heart() -> None:
    engine = Arithmetic()
    made = release()
    live = session(made, engine)
    assert live.probe() is False
    live.check_golden(decode_golden(made.golden, made.manifest.signature))
    assert live.probe() is True
    engine.run = lambda feeds: {"scores": np.array([[0.0, 9.0]], dtype=np.float32), "hidden": feeds["x"]}  # type: ignore[method-assign]
    assert live.probe() is False
    engine.run = lambda feeds: {"scores": np.array([[0.0, np.nan]]), "hidden": feeds["x"]}  # type: ignore[method-assign]
    assert live.probe() is False


def test_names_must_be_the_graphs() -> None:
    engine = Arithmetic()
    engine.inputs = ("other",)
    with pytest.raises(ModelError) as caught:
        session(release(), engine)
    assert caught.value.code == "model.signature"


def test_labels_must_be_as_many_as_classes() -> None:
    with pytest.raises(ModelError) as caught:
        check(release(labels=("a", "b", "c")), Arithmetic())
    assert caught.value.code == "model.labels"


def test_rows_that_get_lost_are_an_error() -> None:
    with pytest.raises(ModelError) as caught:
        check(release(), Arithmetic(wrong_rows=1))
    assert caught.value.code == "model.output"


def test_outputs_that_are_no_numbers_are_an_error() -> None:
    engine = Arithmetic()
    engine.run = lambda feeds: {"scores": np.array([["a", "b"]]), "hidden": feeds["x"]}  # type: ignore[method-assign]
    with pytest.raises(ModelError) as caught:
        session(release(), engine).run({"x": np.array([[1, 2]], dtype=np.float32)}, rows=1)
    assert caught.value.code == "model.output"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("preparations", [(), (Preparation(input="x", scale=2.0),)])
def test_inputs_that_are_no_numbers_are_refused(value: float, preparations: tuple[Preparation, ...]) -> None:
    engine = Arithmetic()
    live = session(release(preparations=preparations), engine)
    with pytest.raises(InputRefused, match="'x' holds values that are not finite") as caught:
        live.run({"x": np.array([[1, 2], [3, value]], dtype=np.float32)}, rows=2)
    assert caught.value.code == "model.input"
    assert caught.value.hint
    assert engine.seen == []


def test_inputs_that_preparation_makes_infinite_are_refused() -> None:
    live = session(release(preparations=(Preparation(input="x", std=(0.0, 1.0)),)), Arithmetic())
    with np.errstate(divide="ignore"), pytest.raises(InputRefused, match="when they are prepared"):
        live.run({"x": np.array([[1, 2]], dtype=np.float32)}, rows=1)
