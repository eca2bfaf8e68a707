"""`.npy` bytes and arrays, for bytes from outside.

Rules: what the bytes claim is held against what is expected before anything of that size is made; only real numbers
in 16, 32 or 64 bits, never objects, which would run code.

Reference: numpy.lib.format, "Format Version 1.0" and 2.0. Not here: what the arrays mean.
"""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_agent.core.lessons import CannotLearn

Buffer = bytes | bytearray | memoryview

FLOATS: Final = frozenset({"<f2", "<f4", "<f8"})
MAX_HEADER_BYTES: Final = 1024


def read(data: Buffer, *, shape: tuple[int, ...], what: str) -> NDArray[np.float32]:
    """The array as float32, a copy; raises CannotLearn unless it holds finite numbers in this shape."""
    stream = io.BytesIO(bytes(memoryview(data)[: MAX_HEADER_BYTES + 16]))
    try:
        version = np.lib.format.read_magic(stream)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        found, is_fortran, dtype = reader(stream, max_header_size=MAX_HEADER_BYTES)
    # Blanket on purpose: numpy reads the header as Python's literals and raises whatever its tokenizer does.
    except Exception as error:
        raise CannotLearn(f"{what} is no .npy array: {str(error)[:200]}") from error
    if dtype.str not in FLOATS or tuple(found) != shape:
        raise CannotLearn(f"{what} holds {dtype.str[:16]}{list(found)[:8]}, expected is <f4{list(shape)}")
    body = memoryview(data)[stream.tell() :]
    if len(body) != dtype.itemsize * int(np.prod(shape, dtype=np.int64)):
        raise CannotLearn(f"{what} has {len(body)} bytes of elements, its shape {list(shape)} needs another number")
    array = np.frombuffer(body, dtype=dtype).reshape(shape, order="F" if is_fortran else "C")
    with np.errstate(over="ignore"):
        plain = np.array(array, dtype=np.float32, order="C")
    if not np.isfinite(plain).all():
        raise CannotLearn(f"{what} holds values that are not finite numbers")
    return plain


def write(array: NDArray[Any]) -> bytes:
    """The array's `.npy` bytes."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()
