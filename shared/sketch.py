"""Quantiles of durations in a few bytes: a histogram with buckets that grow by a constant factor.

Rules of this file:
1. A quantile is off by at most `RELATIVE_ERROR` of its value (DDSketch: Masson, Rim, Lee, VLDB 2019, section 2.1).
2. Merging loses nothing: the sketch of two sets is the sum of their sketches, in any order.
3. A sketch has at most `MAX_BUCKETS` buckets, whatever it is fed: values are held between 1 and `MAX_VALUE`.

Not here: units. Whoever makes a sketch says what its numbers are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from shared.errors import StorageError

RELATIVE_ERROR: Final = 0.05
MAX_VALUE: Final = 10**12
"""In microseconds twelve days: no answer takes longer."""

_GROWTH: Final = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GROWTH: Final = math.log(_GROWTH)

MAX_BUCKETS: Final = math.ceil(math.log(MAX_VALUE) / _LOG_GROWTH) + 1

_Buckets = tuple[tuple[int, int], ...]
_decoder = msgspec.msgpack.Decoder(_Buckets)
_encoder = msgspec.msgpack.Encoder()


@dataclass(frozen=True, slots=True)
class Sketch:
    """A set of positive numbers, of which only the approximate sizes are kept.

    Attributes:
        buckets: pairs (bucket, how many), ascending by bucket, none empty.
    """

    buckets: _Buckets = ()

    @property
    def count(self) -> int:
        """How many numbers are in."""
        return sum([count for _, count in self.buckets])

    def merge(self, other: Sketch) -> Sketch:
        """The sketch of both sets."""
        return _of_counts(Counter(dict(self.buckets)) + Counter(dict(other.buckets)))

    def without(self, part: Sketch) -> Sketch:
        """The sketch of what is left when the numbers of `part` are taken out."""
        return _of_counts(Counter(dict(self.buckets)) - Counter(dict(part.buckets)))

    def quantile(self, q: float) -> float:
        """The number below which a share `q` (0 to 1) of the set lies; 0.0 for an empty set."""
        return self.quantiles((q,))[0]

    def quantiles(self, shares: Sequence[float]) -> tuple[float, ...]:
        """As `quantile`, for several shares in ascending order, at the price of one."""
        if not all(0.0 <= q <= 1.0 for q in shares):
            raise ValueError(f"a share is between 0 and 1, not {shares}")
        last = self.count - 1
        ranks = [q * last for q in shares]
        found: list[float] = []
        passed = 0
        for bucket, count in self.buckets:
            passed += count
            while ranks and passed > ranks[0]:
                found.append(_middle(bucket))
                del ranks[0]
            if not ranks:
                break
        return (*found, *(0.0 for _ in ranks))

    def encode(self) -> bytes:
        """The sketch's bytes for a database."""
        return _encoder.encode(self.buckets)


def sketch_of(values: Iterable[float]) -> Sketch:
    """The sketch of these numbers; what lies outside 1 to `MAX_VALUE` counts as the nearer of the two."""
    return _of_counts(Counter(_bucket(value) for value in values))


def merge_all(sketches: Iterable[Sketch]) -> Sketch:
    """The sketch of all sets."""
    counts: dict[int, int] = {}
    count_of = counts.get
    for sketch in sketches:
        for bucket, count in sketch.buckets:
            counts[bucket] = count_of(bucket, 0) + count
    return _of_counts(counts)


def decode_sketch(data: bytes) -> Sketch:
    """The sketch in these bytes; raises StorageError when they are not one."""
    try:
        buckets = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise StorageError(f"not a sketch: {error}", code="storage.sketch") from error
    return Sketch(buckets)


def _of_counts(counts: Mapping[int, int]) -> Sketch:
    return Sketch(tuple(sorted(counts.items())))


def _bucket(value: float) -> int:
    return math.ceil(math.log(min(max(value, 1.0), MAX_VALUE)) / _LOG_GROWTH)


def _middle(bucket: int) -> float:
    """The value whose relative distance to both ends of the bucket is the same."""
    return float(2 * _GROWTH**bucket / (_GROWTH + 1))
