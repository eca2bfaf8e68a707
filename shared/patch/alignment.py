"""Which bytes of the old file belong to which bytes of the new one, before anything is subtracted.

Two ways that add up: tensors of ONNX files are paired by name, type and size; whatever is left is aligned by content,
for any format: pieces of 16 bytes that occur once in the base are looked up in the result, pieces that agree on the
distance between both files make a run, and between two runs the border lies where fewest bytes differ. Memory: about
the size of both files, for the table of pieces, windows and borders.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidValue
from shared.limits import MIB
from shared.onnx_tensors import find_tensors

PIECE: Final = 16
FINE_STRIDE: Final = 16
COARSE_STRIDE: Final = 64
COARSE_ABOVE_BYTES: Final = 16 * MIB
WINDOW: Final = 1 * MIB
MAX_BORDER_BYTES: Final = 4 * MIB
"""How far a border between two runs is searched; beyond it, the middle does."""
MIN_TENSOR_BYTES: Final = 64
_FILTER_BITS: Final = 25
"""32 MiB of answers to "is it worth looking": one in fifty pieces that are not there is looked up all the same."""
_FACTOR: Final = 0x9E3779B97F4A7C15

Bytes = NDArray[np.uint8]
Pair = tuple[int, int]
"""Where a piece lies in the base and in the result."""


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of the result that belong to as many bytes of the base.

    Attributes:
        base, result: where it begins in each.
        length: in bytes.
        width: size of the numbers it holds (1, 2, 4) where that is known, 0 where it is to be measured.
    """

    base: int
    result: int
    length: int
    width: int = 0


def align(base: Bytes, result: Bytes) -> list[Segment]:
    """Segments in the order of the result, without overlap; what lies between two of them has nothing in the base."""
    tensors = _tensors(base, result)
    index = None
    segments: list[Segment] = []
    at = base_at = 0
    for tensor in [*tensors, Segment(base=len(base), result=len(result), length=0)]:
        gap = tensor.result - at
        if gap > 0:
            if tensor.base - base_at == gap:
                segments.append(Segment(base=base_at, result=at, length=gap))
            else:
                if index is None:
                    index = _Index(base)
                segments += _by_content(index, result, begin=at, end=tensor.result, base_at=base_at)
        if tensor.length:
            segments.append(tensor)
        at, base_at = tensor.result + tensor.length, tensor.base + tensor.length
    return segments


def _tensors(base: Bytes, result: Bytes) -> list[Segment]:
    try:
        old = {(span.name, span.dtype, span.end - span.begin): span for span in find_tensors(base.data)}
        new = find_tensors(result.data)
    except InvalidValue:
        return []  # another format: everything is aligned by content
    paired = []
    for span in sorted(new, key=lambda span: span.begin):
        length = span.end - span.begin
        found = old.get((span.name, span.dtype, length))
        if found is not None and length >= MIN_TENSOR_BYTES:
            width = span.width if length % span.width == 0 else 1
            paired.append(Segment(base=found.begin, result=span.begin, length=length, width=width))
    return paired


class _Index:
    """Where in the base the pieces are that occur only once."""

    def __init__(self, base: Bytes) -> None:
        self.base = base
        stride = FINE_STRIDE if len(base) <= COARSE_ABOVE_BYTES else COARSE_STRIDE
        found = []
        for begin in range(0, len(base), WINDOW):
            hashes = _hashes(base[begin : begin + WINDOW + PIECE - 1])[::stride]
            found.append(hashes)
        hashes = np.concatenate(found) if found else np.empty(0, np.uint64)
        # WINDOW is a multiple of the stride, so the n-th hash belongs to the n-th stride.
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        alone = np.ones(len(hashes), bool)
        alone[1:] &= hashes[1:] != hashes[:-1]
        alone[:-1] &= hashes[:-1] != hashes[1:]
        self._hashes = hashes[alone]
        self._offsets = order[alone].astype(np.int64) * stride
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[self._hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def look_up(self, result: Bytes, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions in the result between two bounds, and in the base, of pieces that are the same in both."""
        places, offsets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for at in range(begin, end, WINDOW):
            hashes = _hashes(result[at : min(at + WINDOW + PIECE - 1, end)])
            likely = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
            if not len(likely) or not len(self._hashes):
                continue
            wanted = hashes[likely]
            where = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
            same = self._hashes[where] == wanted
            places.append(likely[same] + at)
            offsets.append(self._offsets[where[same]])
        found, known = np.concatenate(places), np.concatenate(offsets)
        steps = np.arange(PIECE)
        real = np.ones(len(found), bool)
        for chunk in range(0, len(found), WINDOW):
            part = slice(chunk, chunk + WINDOW)
            real[part] = (result[found[part, None] + steps] == self.base[known[part, None] + steps]).all(axis=1)
        return found[real], known[real]


def _hashes(data: Bytes) -> NDArray[np.uint64]:
    """A hash of every piece that lies wholly in the data, by doubling: of 2 bytes, 4, 8, 16."""
    if len(data) < PIECE:
        return np.empty(0, np.uint64)
    hashes = data.astype(np.uint64) + np.uint64(1)
    factor, size = _FACTOR, 1
    while size < PIECE:
        hashes = hashes[:-size] * np.uint64(factor) + hashes[size:]
        factor = factor * factor & 0xFFFF_FFFF_FFFF_FFFF
        size *= 2
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    return hashes


def _by_content(index: _Index, result: Bytes, *, begin: int, end: int, base_at: int) -> list[Segment]:
    """Segments of the result between two bounds, wherever in the base their content lies."""
    places, offsets = index.look_up(result, begin, end)
    runs = _runs(places, offsets)
    if not runs:
        # Nothing to go by: position, as far as the base goes. What does not pay is dropped when it is measured.
        length = min(end - begin, len(index.base) - base_at)
        return [Segment(base=base_at, result=begin, length=length)] if length > 0 else []
    borders = [begin]
    borders += [_border(index.base, result, before, after) for before, after in pairwise(runs)]
    borders.append(end)
    segments = []
    for (_, _, distance), (first, last) in zip(runs, pairwise(borders), strict=True):
        start, stop = max(first, -distance), min(last, len(index.base) - distance)
        if stop > start:
            segments.append(Segment(base=start + distance, result=start, length=stop - start))
    return segments


def _runs(places: NDArray[np.int64], offsets: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """First and last position and the distance of pieces in a row that agree on it; lonely ones count for nothing."""
    runs: list[tuple[int, int, int]] = []
    for _ in range(2):  # without the lonely ones, their neighbours may agree
        if not len(places):
            return []
        distances = offsets - places
        starts = np.flatnonzero(np.concatenate([[True], distances[1:] != distances[:-1]]))
        ends = np.concatenate([starts[1:], [len(places)]]) - 1
        wide = places[ends] > places[starts]
        keep = np.repeat(wide, ends - starts + 1)
        runs = [
            (int(places[first]), int(places[last]) + PIECE, int(distances[first]))
            for first, last in zip(starts[wide], ends[wide], strict=True)
        ]
        places, offsets = places[keep], offsets[keep]
    return runs


def _border(base: Bytes, result: Bytes, before: tuple[int, int, int], after: tuple[int, int, int]) -> int:
    """Where the run before ends and the one after begins: the position with fewest bytes that differ."""
    begin, end = before[1], after[0]
    if end <= begin:
        return end
    begin, end = max(begin, -after[2]), min(end, len(base) - before[2])
    if not 0 < end - begin <= MAX_BORDER_BYTES:
        return max(before[1], min(after[0], (begin + end) // 2))
    first = _differs(base, result, begin, end, before[2])
    second = _differs(base, result, begin, end, after[2])
    cost = np.concatenate([[0], np.cumsum(first.astype(np.int32) - second)])
    return begin + int(np.argmin(cost))


def _differs(base: Bytes, result: Bytes, begin: int, end: int, distance: int) -> Any:
    """1 where a byte of the result differs from the base at this distance, or the base has none."""
    differs = np.ones(end - begin, np.int32)
    low, high = max(begin, -distance), min(end, len(base) - distance)
    if high > low:
        differs[low - begin : high - begin] = result[low:high] != base[low + distance : high + distance]
    return differs
