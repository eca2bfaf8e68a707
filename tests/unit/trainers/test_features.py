"""Samples become rows of features, once each, with the preparation and the engine that serve."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.core.lessons import CannotLearn
from edge_agent.trainers.features import ROWS_AT_ONCE, Features
from shared.errors import InputRefused, ModelError
from shared.inference import TensorHead
from shared.model import Manifest, Preparation, Signature, TensorSpec
from tests.fakes.releases import sign_classifier

HEAD = (TensorHead(name="x", dtype="fp32", shape=(1, 2)),)


class Engine:
    """Doubles what it gets; counts its runs; `batch` fixes its rows; refuses rows with a negative first element."""

    inputs: tuple[str, ...] = ("x",)
    outputs: tuple[str, ...] = ("scores", "hidden", "flat", "odd")

    def __init__(self, batch: int = -1) -> None:
        self.batch = batch
        self.rows: list[int] = []

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        rows = feeds["x"]
        self.rows.append(len(rows))
        assert self.batch in (-1, len(rows))
        if (rows[:, 0] < 0).any():
            raise InputRefused("negative")
        hidden = np.stack([rows, rows * 2], axis=1)
        odd = np.full((len(rows), 2), np.inf)
        return {"scores": rows, "hidden": hidden, "flat": rows.sum(axis=1), "odd": odd}


def manifest(*, batch: int = -1, scale: float = 0.5) -> Manifest:
    made = sign_classifier().manifest
    spec = TensorSpec(name="x", dtype="fp32", shape=(batch, 2))
    return msgspec.structs.replace(
        made,
        signature=Signature(inputs=(spec,), outputs=made.signature.outputs),
        preparations=(Preparation(input="x", scale=scale),),
    )


def payload(*rows: tuple[float, float]) -> bytearray:
    return bytearray(np.array(rows, dtype=np.float32).tobytes())


def feed(features: Features, *rows: tuple[float, float], first: int = 1, label: str = "a") -> None:
    numbers = range(first, first + len(rows))
    features.feed(list(numbers), [label] * len(rows), HEAD, payload(*rows))


def test_samples_are_prepared_computed_and_chosen_by_label() -> None:
    features = Features(manifest=manifest(), engine=Engine(), output="hidden")
    feed(features, (1, 2), (3, 4))
    feed(features, (5, 6), first=3, label="b")
    feed(features, (7, 8), first=4, label="elsewhere")
    rows, classes = features.select(("b", "a"), width=4)
    assert rows.tolist() == [[0.5, 1, 1, 2], [1.5, 2, 3, 4], [2.5, 3, 5, 6]]
    assert classes.tolist() == [1, 1, 0]


def test_the_oldest_are_forgotten() -> None:
    features = Features(manifest=manifest(), engine=Engine(), output="scores")
    feed(features, (1, 2), (3, 4), (5, 6))
    features.forget_before(3)
    assert features.select(("a",), width=2)[0].tolist() == [[2.5, 3]]
    features.forget_before(9)
    with pytest.raises(CannotLearn, match="no sample"):
        features.select(("a",), width=2)


def test_a_model_of_one_row_runs_row_by_row_and_a_free_batch_is_kept_small() -> None:
    single = Engine(batch=1)
    features = Features(manifest=manifest(batch=1), engine=single, output="scores")
    feed(features, *[(float(number), 0.0) for number in range(3)])
    assert single.rows == [1, 1, 1]
    assert features.select(("a",), width=2)[0][:, 0].tolist() == [0, 0.5, 1]
    free = Engine()
    features = Features(manifest=manifest(), engine=free, output="scores")
    feed(features, *[(1.0, 1.0)] * (ROWS_AT_ONCE + 5))
    assert free.rows == [ROWS_AT_ONCE, 5]


def test_what_the_model_refuses_is_left_out_and_said_when_nothing_is_left() -> None:
    features = Features(manifest=manifest(), engine=Engine(), output="scores")
    feed(features, (-1, 2))
    with pytest.raises(CannotLearn, match="negative"):
        features.select(("a",), width=2)
    feed(features, (1, 2), first=2)
    assert len(features.select(("a",), width=2)[0]) == 1


def test_a_head_of_another_width_is_refused() -> None:
    features = Features(manifest=manifest(), engine=Engine(), output="hidden")
    feed(features, (1, 2))
    with pytest.raises(CannotLearn, match="4 wide, the head expects 5"):
        features.select(("a",), width=5)


@pytest.mark.parametrize(("output", "why"), [("flat", "no table"), ("odd", "not finite")])
def test_an_output_that_holds_no_features_is_said(output: str, why: str) -> None:
    features = Features(manifest=manifest(), engine=Engine(), output=output)
    feed(features, (1, 2))
    with pytest.raises(CannotLearn, match=why):
        features.select(("a",), width=2)


def test_an_output_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(CannotLearn, match="no output 'absent'"):
        Features(manifest=manifest(), engine=Engine(), output="absent")
    other = msgspec.structs.replace(
        manifest(), signature=Signature(inputs=(TensorSpec(name="y", dtype="fp32", shape=(1,)),), outputs=())
    )
    with pytest.raises(ModelError, match="not those of its manifest"):
        Features(manifest=other, engine=Engine(), output="scores")


def test_samples_numbers_and_labels_must_be_as_many() -> None:
    features = Features(manifest=manifest(), engine=Engine(), output="scores")
    with pytest.raises(CannotLearn, match="not as many"):
        features.feed([1], ["a"], HEAD, payload((1, 2), (3, 4)))
