"""Golden files: they come back as written, fit the signature exactly, and anything else is an InvalidValue."""

from __future__ import annotations

import math
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import limits
from shared.errors import InvalidValue
from shared.model import ITEM_BYTES, DType, Signature, TensorSpec
from shared.wire.golden import GoldenSet, GoldenTensor, decode_golden, encode_golden

OUTPUT = (TensorSpec(name="y", dtype="fp32", shape=(-1, 2)),)


def signature(*shapes: tuple[int, ...], dtype: DType = "uint8") -> Signature:
    inputs = tuple(TensorSpec(name=f"x{n}", dtype=dtype, shape=shape) for n, shape in enumerate(shapes))
    return Signature(inputs=inputs, outputs=OUTPUT)


@given(
    samples=st.integers(1, 5),
    dtype=st.sampled_from(get_args(DType)),
    trailing=st.lists(st.integers(1, 3), max_size=3),
    free=st.booleans(),
)
def test_a_golden_set_survives(samples: int, dtype: DType, trailing: list[int], free: bool) -> None:
    shape = (samples, *trailing)
    data = bytes(math.prod(shape) * ITEM_BYTES[dtype])
    golden = GoldenSet(
        samples=samples, labels=(0,) * samples, inputs=(GoldenTensor(name="x0", dtype=dtype, shape=shape, data=data),)
    )
    declared = (-1, *((-1,) * len(trailing) if free else trailing))
    assert decode_golden(encode_golden(golden), signature(declared, dtype=dtype)) == golden


def a_golden(**changes: Any) -> bytes:
    tensor: dict[str, Any] = {"name": "x0", "dtype": "uint8", "shape": [2, 3], "data": bytes(6)}
    document: dict[str, Any] = {"v": 1, "samples": 2, "labels": [0, 1]}
    document |= {key: changes.pop(key) for key in list(changes) if key in {"v", "samples", "labels"}}
    document["inputs"] = changes.pop("inputs", [tensor | changes])
    return msgspec.msgpack.encode(document)


@pytest.mark.parametrize(
    "changes",
    [
        {"v": 2},
        {"samples": 0},
        {"samples": 3},
        {"labels": [0]},
        {"samples": limits.MAX_GOLDEN_SAMPLES + 1, "labels": [0] * (limits.MAX_GOLDEN_SAMPLES + 1)},
        {"name": "z"},
        {"dtype": "int8"},
        {"dtype": "text"},
        {"shape": [2, 4], "data": bytes(8)},
        {"shape": [3, 2]},
        {"shape": [2]},
        {"shape": [], "data": bytes(1)},
        {"data": bytes(5)},
        {"data": bytes(7)},
        {"inputs": []},
        {"inputs": [{"name": "x0", "dtype": "uint8", "shape": [2, 3], "data": bytes(6)}] * 2},
    ],
    ids=str,
)
def test_golden_files_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    decode_golden(a_golden(), signature((-1, 3)))
    with pytest.raises(InvalidValue):
        decode_golden(a_golden(**changes), signature((-1, 3)))


def test_negative_sizes_that_multiply_to_the_right_length_are_refused() -> None:
    with pytest.raises(InvalidValue):
        decode_golden(a_golden(shape=[2, -1, -3]), signature((-1, -1, -1)))


def test_a_scalar_input_has_no_rows_and_is_refused() -> None:
    with pytest.raises(InvalidValue):
        decode_golden(a_golden(shape=[], data=bytes(1)), signature(()))


@given(st.binary(max_size=100))
def test_bytes_that_are_no_golden_file_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidValue):
        decode_golden(data, signature((-1, 3)))


def test_text_that_is_not_utf8_and_files_too_large_are_refused() -> None:
    with pytest.raises(InvalidValue):
        decode_golden(a_golden().replace(b"uint8", b"\xff\xff\xff\xff\xff"), signature((-1, 3)))
    with pytest.raises(InvalidValue):
        decode_golden(bytes(limits.MAX_GOLDEN_BYTES + 1), signature((-1, 3)))
