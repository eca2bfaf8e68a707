"""Rows from files for batch inference: .npy, .csv and .json, or a folder of them.

A file holds rows of one input (an array, lines, a list), or in JSON an object `{input: rows}` for models with
several. Rows are brought to the declared shape and element type; what would lose information is refused.
numpy is imported when the first file is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shared.errors import InputRefused, InvalidValue
from shared.limits import MIB
from shared.model import Signature, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES: Final = (".npy", ".csv", ".json")
MAX_TEXT_BYTES: Final = 256 * MIB


def files_below(path: Path) -> list[Path]:
    """The file itself, or every readable file in the folder by name; raises InvalidValue when there is none."""
    if path.is_dir():
        found = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES and item.is_file())
        if not found:
            raise InvalidValue(f"there is no {', '.join(SUFFIXES)} file in {path}", code="invalid.input_file")
        return found
    if not path.is_file():
        raise InvalidValue(f"{path} is not there", code="invalid.input_file")
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidValue(
            f"{path} is of a kind that is not read here", code="invalid.input_file", hint=f"use {', '.join(SUFFIXES)}"
        )
    return [path]


def read_rows(path: Path, *, signature: Signature, input_name: str | None) -> dict[str, NDArray[Any]]:
    """The file's rows by input, in the declared shape and element type, row count first.

    Raises:
        InvalidValue: the file does not parse.
        InputRefused: its rows do not fit the signature.
    """
    raw = _parse(path)
    specs = {spec.name: spec for spec in signature.inputs}
    columns = dict(raw) if isinstance(raw, Mapping) else {_only_input(specs, input_name): raw}
    if set(columns) != set(specs):
        raise InputRefused(f"{path} holds the inputs {sorted(columns)}, {sorted(specs)} are expected")
    fitted = {name: _fit(values, specs[name], path) for name, values in columns.items()}
    counts = {len(array) for array in fitted.values()}
    if len(counts) != 1:
        raise InputRefused(f"{path}: the inputs have different numbers of rows: {sorted(counts)}")
    return fitted


def batches(columns: Mapping[str, NDArray[Any]], size: int) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Slices of at most `size` rows with the number of their first row."""
    count = len(next(iter(columns.values())))
    for first in range(0, count, size):
        yield first, {name: array[first : first + size] for name, array in columns.items()}


def _parse(path: Path) -> Any:
    import numpy as np

    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise InvalidValue(f"{path} exceeds {MAX_TEXT_BYTES} bytes", hint="use .npy, which is read row by row")
        if path.suffix.lower() == ".json":
            return json.loads(path.read_bytes())
        return _parse_csv(path)
    except (OSError, ValueError, EOFError, RecursionError) as error:
        raise InvalidValue(f"{path} cannot be read: {error}", code="invalid.input_file") from error


def _parse_csv(path: Path) -> Any:
    import numpy as np

    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError("it is empty")
    try:
        [float(cell) for cell in lines[0].split(",")]
    except ValueError:
        lines = lines[1:]  # a line of titles
    rows = [[float(cell) for cell in line.split(",")] for line in lines]
    if len({len(row) for row in rows}) != 1:
        raise ValueError("its lines have different numbers of cells")
    return np.array(rows, dtype="float64")


def _only_input(specs: Mapping[str, TensorSpec], wanted: str | None) -> str:
    if wanted is not None:
        return wanted
    if len(specs) != 1:
        raise InputRefused(
            f"the model has the inputs {sorted(specs)}", hint="use a JSON file {input: rows}, one key per input"
        )
    return next(iter(specs))


def _fit(values: Any, spec: TensorSpec, path: Path) -> NDArray[Any]:
    import numpy as np

    from shared.tensors import numpy_dtype

    wanted = numpy_dtype(spec.dtype)
    row_shape = spec.shape[1:]
    shown = f"{spec.dtype}{list(spec.shape)}".replace("-1", "any")
    try:
        array = np.asarray(values)
        if array.ndim == len(row_shape):
            array = array[np.newaxis]  # one row, given without its axis
        known = math.prod(size for size in row_shape if size > 0)
        if -1 not in row_shape and array.shape[1:] != row_shape and math.prod(array.shape[1:]) == known:
            array = array.reshape(array.shape[0], *row_shape)
        fits = array.ndim == len(spec.shape) and all(
            want in (-1, got) for want, got in zip(row_shape, array.shape[1:], strict=False)
        )
        converted = array.astype(wanted, copy=False)
    except (ValueError, TypeError, IndexError) as error:
        raise InputRefused(f"{path}: input {spec.name!r} is not {shown}: {error}") from error
    if not fits or array.dtype.kind not in "biuf":
        raise InputRefused(f"{path}: input {spec.name!r} is {array.dtype}{list(array.shape)}, expected {shown}")
    if wanted.kind in "biu" and not np.array_equal(converted, array):
        raise InputRefused(f"{path}: input {spec.name!r} holds numbers that {spec.dtype} cannot hold")
    return converted
