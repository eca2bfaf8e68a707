"""numpy on one side, heads and bytes on the other; and the three pieces of arithmetic that both ends must share.

Rules: elements are little-endian and row-major; `from_wire` copies nothing that is aligned; the preparation of inputs,
the reading of class scores and the comparison of raw outputs are here, so that building a release, serving it and
checking it cannot differ.

Not here: what a model accepts (shared/inference.py), and anything that runs one. With shared/patch the only place
of `shared` that imports numpy; the agent's core never imports this one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shared.errors import InputRefused, ModelError
from shared.inference import TensorHead, tensor_bytes
from shared.model import DType, Preparation, TensorSpec

Array: TypeAlias = NDArray[Any]
Buffer: TypeAlias = bytes | bytearray | memoryview

_DTYPES: Final[dict[DType, np.dtype[Any]]] = {
    "bool": np.dtype(np.bool_),
    "uint8": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "uint16": np.dtype("<u2"),
    "int16": np.dtype("<i2"),
    "uint32": np.dtype("<u4"),
    "int32": np.dtype("<i4"),
    "uint64": np.dtype("<u8"),
    "int64": np.dtype("<i8"),
    "fp16": np.dtype("<f2"),
    "fp32": np.dtype("<f4"),
    "fp64": np.dtype("<f8"),
}
_NAMES: Final[dict[np.dtype[Any], DType]] = {dtype: name for name, dtype in _DTYPES.items()}
_PROBABILITY_SLACK: Final = 1e-3
"""How far from 1 a row may sum and still be read as probabilities: quantized outputs round each element."""

RAW_TOLERANCE: Final = 0.05
"""A row of a `raw` model agrees with fp32 when the relative L2 distance of its first output is at most this."""


def numpy_dtype(name: DType) -> np.dtype[Any]:
    """The little-endian numpy type of an element type."""
    return _DTYPES[name]


def dtype_name(dtype: np.dtype[Any]) -> DType:
    """The wire name of a numpy type; raises InputRefused for one that has none (text, objects, complex numbers)."""
    name = _NAMES.get(dtype.newbyteorder("<") if dtype.byteorder == ">" else dtype)
    if name is None:
        raise InputRefused(f"element type {dtype} cannot be sent", hint=f"convert it to one of {', '.join(_DTYPES)}")
    return name


def to_wire(arrays: Mapping[str, Array]) -> tuple[tuple[TensorHead, ...], list[memoryview]]:
    """Heads in the mapping's order and one byte view per array; copies only what is strided or big-endian.

    The views keep their arrays alive; whoever changes an array before the bytes were sent changes what is sent.
    """
    heads: list[TensorHead] = []
    views: list[memoryview] = []
    for name, array in arrays.items():
        dtype = dtype_name(array.dtype)
        # ascontiguousarray makes a scalar one-dimensional, so the head takes the caller's shape.
        plain = np.ascontiguousarray(array, dtype=_DTYPES[dtype])
        heads.append(TensorHead(name=name, dtype=dtype, shape=array.shape))
        views.append(plain.reshape(-1).view(np.uint8).data)
    return tuple(heads), views


def from_wire(heads: Sequence[TensorHead], payload: Buffer) -> dict[str, Array]:
    """Arrays by name, views of the payload where alignment allows; raises InputRefused when the sizes do not agree."""
    total = sum(tensor_bytes(head) for head in heads)
    if total != len(payload) or any(size < 0 for head in heads for size in head.shape):
        raise InputRefused(f"the tensors' shapes need {total} bytes, {len(payload)} were sent")
    arrays: dict[str, Array] = {}
    offset = 0
    for head in heads:
        size = tensor_bytes(head)
        dtype = _DTYPES[head.dtype]
        array = np.frombuffer(payload, dtype=dtype, count=size // dtype.itemsize, offset=offset).reshape(head.shape)
        if not array.flags.aligned:
            array = array.copy()
        if sys.byteorder == "big":
            array = array.astype(dtype.newbyteorder("="))
        arrays[head.name] = array
        offset += size
    return arrays


def convert(value: ArrayLike, spec: TensorSpec) -> Array:
    """A list, number or array as the declared element type; raises InputRefused when it is no regular array."""
    try:
        return np.asarray(value, dtype=_DTYPES[spec.dtype])
    except (ValueError, TypeError, OverflowError) as error:
        raise InputRefused(f"input {spec.name!r} cannot be made {spec.dtype}: {error}") from error


def prepare(preparation: Preparation, spec: TensorSpec, array: Array) -> NDArray[np.float32]:
    """`(x * scale - mean) / std` in float32, broadcast over the trailing axes; the caller's array is left alone."""
    prepared: NDArray[np.float32] = array.astype(np.float32)
    if preparation.scale != 1.0:
        prepared *= np.float32(preparation.scale)
    if any(preparation.mean):
        prepared -= _trailing(preparation.mean, spec)
    if any(value != 1.0 for value in preparation.std):
        prepared /= _trailing(preparation.std, spec)
    return prepared


def probabilities(scores: Array, *, rows: int) -> NDArray[np.float32]:
    """Class probabilities, shape (rows, classes), from a classifier's first output.

    The rule: rows that are nowhere negative and sum to 1 within 0.001 are probabilities already and are taken as they
    are; if one row is not, all are logits and go through a softmax (shifted by the row's maximum, so that nothing
    overflows).

    Raises:
        ModelError: the output is not numeric, has not at least two classes per row, or holds a value that is no number.
    """
    if scores.dtype.kind not in "fiu":
        raise ModelError(f"class scores of type {scores.dtype} cannot be compared", code="model.output")
    if rows < 1 or scores.size % rows or scores.size // rows < 2 or (rows > 1 and scores.shape[0] != rows):
        raise ModelError(
            f"a classifier needs two or more scores for each of {rows} rows; the output has shape {list(scores.shape)}",
            code="model.output",
        )
    table = scores.reshape(rows, -1).astype(np.float32)
    if not np.isfinite(table).all():
        raise ModelError("the model gave a score that is not a finite number", code="model.output")
    if (table >= 0).all() and (np.abs(table.sum(axis=1) - 1.0) <= _PROBABILITY_SLACK).all():
        return table
    table -= table.max(axis=1, keepdims=True)
    np.exp(table, out=table)
    table /= table.sum(axis=1, keepdims=True)
    return table


def rows_close(scores: Array, reference: Array) -> Array:
    """For each row, whether the output is within RAW_TOLERANCE of the reference's; both of shape (rows, values)."""
    wanted = reference.astype(np.float64)
    distance = np.linalg.norm(scores.astype(np.float64) - wanted, axis=1)
    close: Array = distance <= RAW_TOLERANCE * np.maximum(np.linalg.norm(wanted, axis=1), 1e-12)
    return close


def _trailing(values: tuple[float, ...], spec: TensorSpec) -> NDArray[np.float32]:
    """One value, or one per element of the axes after the first; axes that callers choose broadcast."""
    flat = np.asarray(values, dtype=np.float32)
    return flat if flat.size == 1 else flat.reshape(tuple(max(size, 1) for size in spec.shape[1:]))
