"""numpy to wire and back, preparation, and the reading of class scores."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.errors import InputRefused, ModelError
from shared.inference import TensorHead
from shared.model import ITEM_BYTES, DType, Preparation, TensorSpec
from shared.tensors import convert, dtype_name, from_wire, numpy_dtype, prepare, probabilities, to_wire

DTYPES: tuple[DType, ...] = get_args(DType)
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda name: hnp.arrays(numpy_dtype(name), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@given(st.dictionaries(st.text(max_size=5), ARRAYS, max_size=4))
def test_arrays_come_back_as_they_were(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    heads, views = to_wire(arrays)
    back = from_wire(heads, b"".join(bytes(view) for view in views))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].flags.aligned
        np.testing.assert_array_equal(back[name], array)


def test_every_wire_type_has_a_numpy_type_of_its_size() -> None:
    for name in DTYPES:
        assert numpy_dtype(name).itemsize == ITEM_BYTES[name]
        assert dtype_name(numpy_dtype(name)) == name


def test_strided_and_big_endian_arrays_are_put_in_order() -> None:
    array = np.arange(12, dtype=">i4").reshape(3, 4).T[::2]
    heads, views = to_wire({"x": array})
    assert heads[0].shape == (2, 3)
    np.testing.assert_array_equal(from_wire(heads, bytes(views[0]))["x"], array)


def test_contiguous_arrays_are_not_copied() -> None:
    array = np.zeros((4, 4), dtype=np.float32)
    heads, views = to_wire({"x": array})
    array[0, 0] = 1
    payload = bytearray(views[0])
    back = from_wire(heads, payload)["x"]
    assert back[0, 0] == 1
    payload[0:4] = b"\0\0\0\0"
    assert back[0, 0] == 0


@pytest.mark.parametrize(
    "value", [np.array(["text"]), np.array([1j]), np.array([object()]), np.array(["2020"], "M8[s]")]
)
def test_what_cannot_be_sent_is_refused(value: np.ndarray[Any, Any]) -> None:
    with pytest.raises(InputRefused, match="cannot be sent"):
        to_wire({"x": value})


@pytest.mark.parametrize(("shape", "size"), [((2,), 7), ((2,), 9), ((-1, -2), 8), ((-2,), 0), ((0, -1), 0)])
def test_sizes_that_do_not_agree_are_refused(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(InputRefused):
        from_wire((TensorHead(name="x", dtype="fp32", shape=shape),), bytes(size))


def test_lists_become_the_declared_type() -> None:
    spec = TensorSpec(name="x", dtype="uint8", shape=(-1, 2))
    assert convert([[1, 2]], spec).dtype == np.uint8
    for bad in ([[1, 2], [3]], [["a"]], [[300]]):
        with pytest.raises(InputRefused, match="'x' cannot be made uint8"):
            convert(bad, spec)


def test_preparation_is_the_formula_and_leaves_the_input_alone() -> None:
    spec = TensorSpec(name="x", dtype="uint8", shape=(-1, 3, 2))
    mean, std = tuple(float(n) for n in range(6)), (2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    array = np.arange(12, dtype=np.uint8).reshape(2, 3, 2)
    prepared = prepare(Preparation(input="x", scale=0.5, mean=mean, std=std), spec, array)
    expected = (array.astype(np.float32) * 0.5 - np.reshape(mean, (3, 2))) / np.reshape(std, (3, 2))
    assert prepared.dtype == np.float32
    np.testing.assert_allclose(prepared, expected, rtol=1e-6)
    assert array.dtype == np.uint8


def test_preparation_by_channel_broadcasts_over_free_axes() -> None:
    spec = TensorSpec(name="x", dtype="fp32", shape=(-1, 3, -1, -1))
    array = np.ones((2, 3, 4, 5), dtype=np.float32)
    prepared = prepare(Preparation(input="x", mean=(1.0, 2.0, 3.0)), spec, array)
    assert prepared[:, 0].max() == 0
    assert prepared[:, 2].min() == -2
    assert array.min() == 1


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_logits_become_probabilities_in_the_same_order(scores: np.ndarray[Any, Any]) -> None:
    table = probabilities(scores, rows=3)
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table.sum(axis=1), 1.0, rtol=1e-3)
    assert (np.take_along_axis(table, scores.argmax(axis=1)[:, None], 1)[:, 0] == table.max(axis=1)).all()


def test_probabilities_stay_as_they_are() -> None:
    rows = np.array([[0.25, 0.75], [1.0, 0.0], [0.4995, 0.5]], dtype=np.float32)
    np.testing.assert_array_equal(probabilities(rows, rows=3), rows)
    mixed = np.array([[0.25, 0.75], [0.5, 0.6]], dtype=np.float32)
    assert not np.array_equal(probabilities(mixed, rows=2), mixed)


@pytest.mark.parametrize(
    ("scores", "rows"),
    [
        (np.array([[1.0, np.nan]]), 1),
        (np.array([[1.0, np.inf]]), 1),
        (np.array([[1.0]]), 1),
        (np.zeros((3, 2)), 2),
        (np.zeros((4, 3)), 2),
        (np.array(["a", "b"]), 1),
        (np.zeros((0, 2)), 0),
    ],
)
def test_scores_that_mean_nothing_are_an_error(scores: np.ndarray[Any, Any], rows: int) -> None:
    with pytest.raises(ModelError) as caught:
        probabilities(scores, rows=rows)
    assert caught.value.code == "model.output"
