"""The golden file: the samples that decide whether a model still answers as it did where it was released.

MessagePack: `{"v": 1, "samples": n, "labels": [true class per row], "inputs": [{name, dtype, shape, data}, …]}`.
Inputs are what callers would send (before preparation), elements little-endian and row-major, row count first.
"""

from __future__ import annotations

import math

import msgspec

from shared import limits
from shared.errors import InvalidValue
from shared.model import ITEM_BYTES, DType, Signature


class GoldenTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One input for all samples: `shape[0]` is the number of samples."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    data: bytes


class GoldenSet(msgspec.Struct, frozen=True, kw_only=True):
    """Samples with their true classes; `labels` holds indices into the manifest's labels, -1 where unknown."""

    samples: int
    labels: tuple[int, ...]
    inputs: tuple[GoldenTensor, ...]
    v: int = 1


def encode_golden(golden: GoldenSet) -> bytes:
    """The golden file's bytes."""
    return msgspec.msgpack.encode(golden)


def decode_golden(data: bytes, signature: Signature) -> GoldenSet:
    """Parse a golden file and check it against the signature; raises InvalidValue saying what does not fit."""
    if len(data) > limits.MAX_GOLDEN_BYTES:
        raise _unusable(f"golden file of {len(data)} bytes exceeds {limits.MAX_GOLDEN_BYTES}", hint="give fewer rows")
    try:
        golden = msgspec.msgpack.decode(data, type=GoldenSet)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _unusable(f"golden file does not parse: {error}") from error
    if golden.v != 1 or not 0 < golden.samples <= limits.MAX_GOLDEN_SAMPLES or len(golden.labels) != golden.samples:
        raise _unusable(
            f"golden file has {golden.samples} samples and {len(golden.labels)} labels",
            hint=f"give 1 to {limits.MAX_GOLDEN_SAMPLES} rows and one label for each, -1 where it is unknown",
        )
    specs = {spec.name: spec for spec in signature.inputs}
    if {tensor.name for tensor in golden.inputs} != set(specs) or len(golden.inputs) != len(specs):
        raise _unusable(
            f"golden file must hold exactly the inputs {sorted(specs)}",
            hint="name the arrays of the golden file like the model's inputs",
        )
    for tensor in golden.inputs:
        spec = specs[tensor.name]
        fits = (
            tensor.dtype == spec.dtype
            and 0 < len(tensor.shape) == len(spec.shape)
            and tensor.shape[0] == golden.samples
            and all(got > 0 and want in (-1, got) for want, got in zip(spec.shape[1:], tensor.shape[1:], strict=True))
            and len(tensor.data) == math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        )
        if not fits:
            raise _unusable(
                f"golden input {tensor.name!r} is {tensor.dtype}{list(tensor.shape)} in {len(tensor.data)} bytes, "
                f"the signature says {spec.dtype}{list(spec.shape)}",
                hint="save the rows in the signature's element type and shape",
            )
    return golden


def _unusable(message: str, *, hint: str = "make it again from arrays: `outrider model push --golden`") -> InvalidValue:
    return InvalidValue(message, code="invalid.golden", hint=hint)
