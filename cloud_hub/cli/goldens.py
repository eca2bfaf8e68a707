"""From `.npz` to the golden format: what `model push` uploads as golden samples and for calibration.

The file holds one array per input, named like it, and `labels` with the true class of each row as an index (-1 where
unknown) or as a label's text. It is read with `allow_pickle=False`: an archive of objects could run code.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from shared import limits
from shared.errors import InputRefused, InvalidValue
from shared.wire.golden import GoldenSet, GoldenTensor, encode_golden

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.generic]

LABELS: Final = "labels"


def golden_from_npz(path: Path, *, labels: tuple[str, ...]) -> bytes:
    """The golden file's bytes; raises InvalidValue that names the array and what is wrong with it.

    Args:
        path: the archive.
        labels: class names by index, to read `labels` given as text.
    """
    arrays = _load(path)
    truth = arrays.pop(LABELS, None)
    if not arrays:
        raise _unusable(path, "it holds no input", hint="save an array per input, named like it, and `labels`")
    samples = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    rows = next(iter(samples.values()))
    if rows == 0 or len(set(samples.values())) != 1:
        raise _unusable(path, f"its arrays differ in rows, or have none: {samples}")
    if rows > limits.MAX_GOLDEN_SAMPLES:
        raise _unusable(path, f"{rows} rows exceed {limits.MAX_GOLDEN_SAMPLES}")
    tensors = tuple(_tensor(path, name, array) for name, array in sorted(arrays.items()))
    data = encode_golden(GoldenSet(samples=rows, labels=_truth(path, truth, rows=rows, labels=labels), inputs=tensors))
    if len(data) > limits.MAX_GOLDEN_BYTES:
        raise _unusable(path, f"{len(data)} bytes exceed {limits.MAX_GOLDEN_BYTES}", hint="give fewer rows")
    return data


def _load(path: Path) -> dict[str, Array]:
    try:
        import numpy as np
    except ImportError as error:
        raise InvalidValue(
            "reading .npz files needs numpy", code="invalid.golden", hint="pip install 'outrider[hub]'"
        ) from error
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > limits.MAX_GOLDEN_BYTES * 2:
            raise _unusable(path, f"it unpacks to {unpacked} bytes, at most {limits.MAX_GOLDEN_BYTES * 2} are read")
        with np.load(path, allow_pickle=False) as loaded:
            return {name: cast("Array", loaded[name]) for name in loaded.files}
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise _unusable(path, f"it is not an .npz archive of plain arrays ({error})") from error


def _tensor(path: Path, name: str, array: Array) -> GoldenTensor:
    from shared.tensors import to_wire

    try:
        (head,), (view,) = to_wire({name: array})
    except InputRefused as error:
        raise _unusable(path, f"array {name!r}: {error.message}", hint=error.hint) from error
    return GoldenTensor(name=name, dtype=head.dtype, shape=tuple(map(int, head.shape)), data=bytes(view))


def _truth(path: Path, truth: Array | None, *, rows: int, labels: tuple[str, ...]) -> tuple[int, ...]:
    if truth is None:
        return (-1,) * rows
    if truth.shape != (rows,):
        raise _unusable(path, f"`labels` has shape {list(truth.shape)}, expected [{rows}]")
    values: list[Any] = truth.tolist()
    if truth.dtype.kind == "U":
        index = {label: number for number, label in enumerate(labels)}
        unknown = sorted({value for value in values if value not in index})
        if unknown:
            raise _unusable(path, f"`labels` holds {unknown[0]!r}, which is not one of the model's labels")
        return tuple(index[value] for value in values)
    if truth.dtype.kind not in "iu":
        raise _unusable(path, f"`labels` has the unusable type {truth.dtype.name}", hint="give integers or text")
    most = len(labels) if labels else limits.MAX_LABELS
    if any(not -1 <= value < most for value in values):
        raise _unusable(path, f"`labels` holds an index outside -1 to {most - 1}")
    return tuple(values)


def _unusable(path: Path, message: str, *, hint: str = "") -> InvalidValue:
    hint = hint or "give an .npz with one array per input, named like it, and `labels`, all with as many rows"
    return InvalidValue(f"{path}: {message}", code="invalid.golden", hint=hint)
