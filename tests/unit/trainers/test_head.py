"""The head's arithmetic, and arrays from bytes that come from outside."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.lessons import CannotLearn
from edge_agent.trainers import head, npy
from tests.fakes import classifier

DESCENT = head.Descent(learning_rate=0.5, epochs=3, batch_size=16, seed=1)


def fresh(features: int = 64, classes: int = 10) -> head.Head:
    return head.Head(np.zeros((features, classes), np.float32), np.zeros(classes, np.float32))


def data(rows: int = 300, *, seed: int = 3) -> tuple[head.Floats, head.Classes]:
    pixels, labels = classifier.samples(rows, seed=seed)
    return (pixels / 16).astype(np.float32), labels


def test_a_head_learns_and_the_same_seed_learns_the_same() -> None:
    features, classes = data()
    before = fresh()
    after = head.learn(before, features, classes, DESCENT)
    unseen = data(seed=4)
    assert head.measure(before, *unseen)["accuracy"] < 0.3
    assert head.measure(after, *unseen)["accuracy"] > 0.9
    assert head.measure(after, *unseen)["loss"] < head.measure(before, *unseen)["loss"]
    assert head.measure(after, *unseen)["num-examples"] == 300
    assert not before.weight.any()  # what came in is left alone
    again = head.learn(before, features, classes, DESCENT)
    other = head.learn(before, features, classes, head.Descent(0.5, 3, 16, seed=2))
    assert np.array_equal(after.weight, again.weight)
    assert np.array_equal(after.bias, again.bias)
    assert not np.array_equal(after.weight, other.weight)


def test_the_step_is_the_gradient_of_the_loss() -> None:
    features, classes = data(20)
    start = head.learn(fresh(), features, classes, DESCENT)
    rate = 1e-3
    step = head.Descent(learning_rate=rate, epochs=1, batch_size=20, seed=0)
    moved = (start.weight - head.learn(start, features, classes, step).weight) / rate

    def loss(weight: head.Floats) -> float:
        return head.measure(head.Head(weight, start.bias), features, classes)["loss"]

    for row, column in ((3, 1), (10, 7), (40, 9)):
        nudge = np.zeros_like(start.weight)
        nudge[row, column] = 0.05
        slope = (loss(start.weight + nudge) - loss(start.weight - nudge)) / 0.1
        assert moved[row, column] == pytest.approx(slope, abs=2e-3)


def test_a_descent_that_runs_away_is_said() -> None:
    features, classes = data(50)
    with pytest.raises(CannotLearn, match="ran away"):
        head.learn(fresh(), features * 1e20, classes, head.Descent(1e20, 3, 8, 0))
    huge = head.Head(np.full((64, 10), 1e38, np.float32), np.zeros(10, np.float32))
    with pytest.raises(CannotLearn, match="not finite"):
        head.measure(huge, features * 100, classes)


def saved(array: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_float32_in_either_order(dtype: str, order: str) -> None:
    array = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)  # type: ignore[call-overload]
    got = npy.read(saved(array), shape=(3, 4), what="w")
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    assert np.array_equal(got, array)
    assert npy.write(got) == saved(got)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04",
        saved(np.zeros((3, 5), np.float32)),
        saved(np.zeros((4, 3), np.float32)),
        saved(np.zeros(12, np.float32)),
        saved(np.zeros((3, 4), np.int64)),
        saved(np.zeros((3, 4), ">f4")),
        saved(np.array([[object()] * 4] * 3)),
        saved(np.zeros((3, 4), np.float32))[:-1],
        saved(np.zeros((3, 4), np.float32)) + b"x",
        saved(np.full((3, 4), np.nan, np.float32)),
        saved(np.full((3, 4), 1e300)),
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CannotLearn):
        npy.read(data, shape=(3, 4), what="w")


def test_a_shape_that_is_not_there_is_refused_before_it_is_made() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
    padded = header + b" " * (118 - len(header) - 1) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded
    with pytest.raises(CannotLearn, match="elements"):
        npy.read(data, shape=(1_000_000_000_000,), what="w")


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for junk in (data, b"\x93NUMPY\x01\x00" + data, saved(np.zeros(2, np.float32))[:10] + data):
        with pytest.raises(CannotLearn):
            npy.read(junk, shape=(2, 2), what="w")
