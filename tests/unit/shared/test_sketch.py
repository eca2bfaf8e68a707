"""A quantile is near the true one, and merging is adding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import sketch
from shared.errors import StorageError
from shared.sketch import Sketch, decode_sketch, merge_all, sketch_of

VALUES = st.lists(st.integers(1, 10**9), min_size=1, max_size=200)
SHARES = st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 1.0])


@given(VALUES, SHARES)
def test_a_quantile_is_off_by_at_most_the_promised_error(values: list[int], share: float) -> None:
    true = sorted(values)[int(share * (len(values) - 1))]
    found = sketch_of(values).quantile(share)
    assert abs(found - true) <= sketch.RELATIVE_ERROR * true * (1 + 1e-9)


@given(VALUES, VALUES, VALUES)
def test_merging_is_the_sketch_of_all_in_any_order(one: list[int], two: list[int], three: list[int]) -> None:
    parts = [sketch_of(one), sketch_of(two), sketch_of(three)]
    whole = sketch_of([*one, *two, *three])
    assert parts[0].merge(parts[1]).merge(parts[2]) == whole
    assert parts[2].merge(parts[0].merge(parts[1])) == whole
    assert merge_all(reversed(parts)) == whole
    assert whole.count == len(one) + len(two) + len(three)


@given(VALUES)
def test_the_bytes_are_the_sketch(values: list[int]) -> None:
    assert decode_sketch(sketch_of(values).encode()) == sketch_of(values)


def test_nothing_has_no_quantiles() -> None:
    assert Sketch().quantile(0.95) == 0.0
    assert Sketch().merge(sketch_of([5])) == sketch_of([5])
    assert merge_all([]) == Sketch()


def test_whatever_is_fed_the_sketch_stays_small() -> None:
    fed = sketch_of([-5, 0, 0.2, *(1.01**power for power in range(5000)), float("inf")])
    assert len(fed.buckets) <= sketch.MAX_BUCKETS
    assert len(fed.encode()) < 4 * sketch.MAX_BUCKETS
    assert fed.quantile(1.0) <= sketch.MAX_VALUE * (1 + sketch.RELATIVE_ERROR)


def test_bytes_that_are_no_sketch_and_shares_that_are_none_are_refused() -> None:
    with pytest.raises(StorageError) as refused:
        decode_sketch(b"\x00")
    assert refused.value.code == "storage.sketch"
    with pytest.raises(ValueError, match="between 0 and 1"):
        sketch_of([1]).quantile(1.5)


def test_taking_numbers_out() -> None:
    whole, part = sketch_of([1000.0] * 5 + [9000.0] * 3), sketch_of([9000.0] * 2)
    assert whole.without(part) == sketch_of([1000.0] * 5 + [9000.0])
    assert part.without(whole) == Sketch()


def test_several_quantiles_are_those_of_one_at_a_time() -> None:
    sketch = sketch_of([float(number) for number in range(1, 400)])
    shares = (0.0, 0.5, 0.5, 0.95, 1.0)
    assert sketch.quantiles(shares) == tuple(sketch.quantile(q) for q in shares)
    assert Sketch().quantiles(shares) == (0.0,) * 5
