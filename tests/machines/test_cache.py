"""The bounded store, and what makes two requests the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.cache import MAX_KEYED_BYTES, Store, key_of
from shared.inference import TensorHead

HEAD = TensorHead(name="x", dtype="fp32", shape=(1, 4))


def test_the_least_recently_used_goes_first() -> None:
    store: Store[str] = Store(entries=2, size_bytes=1000)
    store.put("a", "A", size_bytes=1)
    store.put("b", "B", size_bytes=1)
    assert store.get("a") == "A"
    store.put("c", "C", size_bytes=1)
    assert (store.get("a"), store.get("b"), store.get("c")) == ("A", None, "C")


def test_bytes_are_bounded_and_a_giant_is_not_kept() -> None:
    store: Store[str] = Store(entries=100, size_bytes=100)
    for name in "abcde":
        store.put(name, name, size_bytes=25)
    assert (len(store), store.held_bytes) == (4, 100)
    assert store.get("a") is None
    store.put("giant", "g", size_bytes=26)
    assert store.get("giant") is None
    assert len(store) == 4
    store.put("e", "a giant in the place of a small one", size_bytes=26)
    assert store.get("e") is None


def test_no_entries_hold_nothing() -> None:
    store: Store[str] = Store(entries=0, size_bytes=100)
    store.put("a", "A", size_bytes=1)
    assert store.is_off
    assert store.get("a") is None
    assert store.held_bytes == 0


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40))))
def test_the_bounds_hold_whatever_is_put(puts: list[tuple[str, int]]) -> None:
    store: Store[int] = Store(entries=3, size_bytes=60)
    sizes: dict[str, int] = {}
    for name, size in puts:
        store.put(name, size, size_bytes=size)
        sizes[name] = size
        held = [found for found in (store.get(other) for other in list(sizes)) if found is not None]
        assert len(held) == len(store) <= 3
        assert sum(held) == store.held_bytes <= 60


def test_the_key_is_the_file_the_heads_and_the_elements() -> None:
    key = key_of("d1", (HEAD,), bytes(16))
    assert key == key_of("d1", (HEAD,), bytearray(16)) == key_of("d1", (HEAD,), memoryview(bytes(16)))
    other_shape = TensorHead(name="x", dtype="fp32", shape=(4, 1))
    other_type = TensorHead(name="x", dtype="int32", shape=(1, 4))
    others = {
        key_of("d2", (HEAD,), bytes(16)),
        key_of("d1", (HEAD,), bytes(15) + b"\1"),
        key_of("d1", (other_shape,), bytes(16)),
        key_of("d1", (other_type,), bytes(16)),
    }
    assert len(others | {key}) == 5


@pytest.mark.parametrize(("size", "keyed"), [(MAX_KEYED_BYTES, True), (MAX_KEYED_BYTES + 1, False)])
def test_what_would_hold_up_the_loop_is_not_hashed(size: int, keyed: bool) -> None:
    assert (key_of("d", (HEAD,), bytes(size)) is not None) is keyed
