"""Patches: any two files make the round, and whatever is done to a patch ends in its result or in PatchFailed."""

from __future__ import annotations

import hashlib
import lzma
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import PatchFailed
from shared.limits import KIB, MIB
from shared.patch import applying, making
from shared.patch import format as form
from shared.patch.format import Head, StreamHead, Terms


def terms_of(base: bytes, result: bytes) -> Terms:
    return Terms(
        base=hashlib.sha256(base).hexdigest(),
        base_length=len(base),
        result=hashlib.sha256(result).hexdigest(),
        result_length=len(result),
    )


def applied(patch: bytes, base: bytes, terms: Terms, *, written: bytearray | None = None) -> bytes:
    """What the patch makes of the base."""
    out = bytearray() if written is None else written
    applying.apply(
        patch=lambda at, count: patch[at : at + count],
        patch_length=len(patch),
        base=lambda at, count: base[at : at + count],
        write=out.extend,
        terms=terms,
    )
    return bytes(out)


def patch_of(
    base: bytes, result: bytes, streams: dict[int, bytes], /, *, packed: dict[int, bytes] | None = None, **terms: Any
) -> bytes:
    """A patch written by hand: streams as they are, or packed already."""
    bodies = [(form.RAW, streams.get(number, b""), len(streams.get(number, b""))) for number in range(form.STREAMS)]
    for number, body in (packed or {}).items():
        bodies[number] = (form.LZMA, body, len(streams.get(number, b"")))
    heads = tuple(StreamHead(method=method, length=length, packed=len(body)) for method, body, length in bodies)
    made = Terms(**{**{name: getattr(terms_of(base, result), name) for name in Terms.__struct_fields__}, **terms})
    return form.encode_head(Head(terms=made, streams=heads)) + b"".join(body for _, body, _ in bodies)


def step(kind: int, length: int, distance: int | None = None) -> bytes:
    data = form.encode_varint(length << 3 | kind)
    if distance is not None:
        data += form.encode_varint(distance * 2 if distance >= 0 else -distance * 2 - 1)
    return data


def noise(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count)


def refused(patch: bytes, base: bytes, result: bytes) -> PatchFailed:
    """The refusal; before it nothing is read outside the base, and nothing more than promised is written."""
    written = bytearray()
    reads: list[tuple[int, int]] = []

    def read(at: int, count: int) -> bytes:
        reads.append((at, count))
        return base[at : at + count]

    with pytest.raises(PatchFailed) as caught:
        applying.apply(
            patch=lambda at, count: patch[at : at + count],
            patch_length=len(patch),
            base=read,
            write=written.extend,
            terms=terms_of(base, result),
        )
    assert len(written) <= len(result)
    assert all(at >= 0 and at + count <= len(base) for at, count in reads)
    return caught.value


EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "move", "add", "words"]), st.integers(0, 2**32)), max_size=6
)


def edited(data: bytes, edits: list[tuple[str, int]]) -> bytes:
    out = bytearray(data)
    for kind, number in edits:
        rng = random.Random(number)
        at, count = rng.randrange(len(out) + 1), rng.randrange(1, 6000)
        part = np.frombuffer(bytes(out[at : at + count]), np.uint8)
        match kind:
            case "flip":
                for _ in range(40):
                    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8) if out else 0
            case "insert":
                out[at:at] = rng.randbytes(count)
            case "delete" if len(out) > count + 1:
                del out[at : at + count]
            case "move":
                piece = bytes(out[at : at + count])
                out[at : at + count] = b""
                where = rng.randrange(len(out) + 1)
                out[where:where] = piece
            case "add":
                out[at : at + count] = (part + np.uint8(rng.randrange(256))).tobytes()
            case "words":
                whole = len(part) // 4 * 4
                words = part[:whole].copy().view("<u4") + np.uint32(rng.randrange(3000))
                out[at : at + whole] = words.tobytes()
    return bytes(out) or b"\0"


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 60_000), plain=st.booleans(), edits=EDITS)
def test_any_edit_makes_the_round(seed: int, size: int, plain: bool, edits: list[tuple[str, int]]) -> None:
    rng = random.Random(seed)
    base = bytes(rng.choices(range(3), k=size)) if plain else rng.randbytes(size)
    result = edited(base, edits)
    patch = making.make(base, result)
    assert applied(patch, base, terms_of(base, result)) == result


@settings(deadline=None, max_examples=40)
@given(base=st.binary(min_size=1, max_size=300), result=st.binary(min_size=1, max_size=300))
def test_any_two_files_make_the_round(base: bytes, result: bytes) -> None:
    assert applied(making.make(base, result), base, terms_of(base, result)) == result


def test_files_without_anything_in_common_cost_little_more_than_the_file() -> None:
    base, result = noise(200_000, 1), noise(250_000, 2)
    assert len(making.make(base, result)) < len(result) + 1000


def test_what_only_moved_costs_nearly_nothing() -> None:
    base = noise(300_000)
    result = b"x" * 148 + base[200_000:] + base[:200_000]
    patch = making.make(base, result)
    assert len(patch) < 800
    assert applied(patch, base, terms_of(base, result)) == result


def test_small_numbers_in_an_unknown_format_are_found() -> None:
    rng = np.random.default_rng(3)
    old = rng.normal(0, 1, 40_000).astype("<f4")
    new = (old.view("<u4") + rng.integers(0, 200, old.size, dtype=np.uint32)).astype("<u4")
    base, result = b"abc" + old.tobytes(), b"abc" + new.tobytes()
    patch = making.make(base, result)
    assert len(patch) < 0.3 * len(result)
    assert applied(patch, base, terms_of(base, result)) == result


@pytest.fixture(scope="module")
def sample() -> tuple[bytes, bytes, bytes]:
    """A patch that uses every kind of step and of packing, with its two files."""
    rng = np.random.default_rng(5)
    small = rng.integers(0, 256, 140_000, dtype=np.uint8)
    words = rng.normal(0, 1, 12_000).astype("<f4").view("<u4")
    shorts = rng.integers(0, 65536, 80_000).astype("<u2")
    base = small.tobytes() + words.tobytes() + shorts.tobytes() + noise(9_000)
    tail = b"text " * 900 + noise(700, 9)
    result = (
        (small + (rng.random(small.size) < 0.1)).astype(np.uint8).tobytes()
        + (words + rng.integers(0, 900, words.size).astype("<u4")).astype("<u4").tobytes()
        + (shorts + rng.integers(0, 5, shorts.size).astype("<u2")).astype("<u2").tobytes()
        + base[-9_000:]
        + tail
    )
    patch = making.make(base, result)
    kinds = {step.kind for step in making.plan(np.frombuffer(base, np.uint8), np.frombuffer(result, np.uint8))}
    assert kinds == {form.LITERAL, form.COPY, form.ADD_BYTES, form.ADD_SHORTS, form.ADD_WORDS}
    return base, result, patch


def test_a_patch_of_every_kind_makes_its_result(sample: tuple[bytes, bytes, bytes]) -> None:
    base, result, patch = sample
    assert applied(patch, base, terms_of(base, result)) == result


def test_a_patch_cut_anywhere_is_refused(sample: tuple[bytes, bytes, bytes]) -> None:
    base, result, patch = sample
    for length in [*range(form.HEADER_BYTES + 40), *range(form.HEADER_BYTES + 40, len(patch), 997)]:
        refused(patch[:length], base, result)


def test_a_patch_that_promises_more_than_it_has_is_refused(sample: tuple[bytes, bytes, bytes]) -> None:
    base, result, patch = sample
    # The header's sums hold, and the file ends earlier: reads come back short.
    for length in range(form.HEADER_BYTES, len(patch), 2503):
        written = bytearray()
        with pytest.raises(PatchFailed):
            applying.apply(
                patch=lambda at, count, end=length: patch[at : min(at + count, end)],  # type: ignore[misc]
                patch_length=len(patch),
                base=lambda at, count: base[at : at + count],
                write=written.extend,
                terms=terms_of(base, result),
            )


def test_a_patch_with_flipped_bits_makes_its_result_or_nothing(sample: tuple[bytes, bytes, bytes]) -> None:
    base, result, patch = sample
    rng = random.Random(8)
    terms = terms_of(base, result)
    for number in range(600):
        spoilt = bytearray(patch)
        # Headers and steps are where damage would hurt, so they get most of it.
        limit = form.HEADER_BYTES + 80 if number % 3 else len(patch)
        for _ in range(rng.randrange(1, 4)):
            spoilt[rng.randrange(limit)] ^= 1 << rng.randrange(8)
        written = bytearray()
        try:
            assert applied(bytes(spoilt), base, terms, written=written) == result
        except PatchFailed as error:
            assert error.code.startswith("transfer.patch.")
        assert len(written) <= len(result)


@settings(deadline=None, max_examples=200)
@given(steps=st.binary(max_size=60), streams=st.dictionaries(st.integers(1, 8), st.binary(max_size=80)))
def test_any_steps_stay_inside(steps: bytes, streams: dict[int, bytes]) -> None:
    base, result = noise(64), noise(80)
    refused(patch_of(base, result, {0: steps, **streams}), base, result)


def test_delta_out_of_bounds_seek_is_refused() -> None:
    base, result = noise(1000), noise(1000)
    for steps in (
        step(form.COPY, 1000, 1),
        step(form.COPY, 500, 501),
        step(form.COPY, 500, -1) + step(form.COPY, 500, 0),
        step(form.COPY, 500, 0) + step(form.COPY, 500, 2**62),
        step(form.ADD_BYTES, 1000, -(2**61)),
    ):
        error = refused(patch_of(base, result, {0: steps, 2: bytes(1000)}), base, result)
        assert error.code == "transfer.patch.malformed"
        assert "outside the base" in error.message or "too long" in error.message


def test_delta_that_makes_more_than_promised_is_refused() -> None:
    base, result = noise(1000), noise(1000)
    for steps in (step(form.COPY, 999, 0) + step(form.LITERAL, 2), step(form.COPY, 1001, 0), step(form.LITERAL, 2**59)):
        assert "does not fit" in refused(patch_of(base, result, {0: steps, 1: bytes(2)}), base, result).message


def packer(dictionary: int) -> Callable[[bytes], bytes]:
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": dictionary}]
    return lambda data: lzma.compress(data, lzma.FORMAT_ALONE, filters=filters)


def test_delta_bomb_unpacks_no_further_than_it_is_asked() -> None:
    base, result = noise(1000), bytes(1000)
    bomb = packer(64 * KIB)(bytes(64 * MIB))
    patch = patch_of(base, result, {0: step(form.LITERAL, 1000), 1: bytes(1000)}, packed={1: bomb})
    assert "more than it says" in refused(patch, base, result).message


def test_delta_bomb_of_declared_lengths_is_refused_before_anything_is_unpacked() -> None:
    base, result = noise(1000), bytes(1000)
    for streams in ({0: bytes(form.MAX_STEP_BYTES + 1)}, {1: bytes(1001)}):
        assert "out of bounds" in refused(patch_of(base, result, streams), base, result).message
    patch = patch_of(base, result, {0: step(form.LITERAL, 1000)}, result_length=2**60)
    assert "no models" in refused(patch, base, result).message


def test_delta_bomb_of_dictionaries_is_refused() -> None:
    base, result = noise(1000), bytes(1000)
    one = packer(16 * MIB)(bytes(1000))
    patch = patch_of(base, result, {0: step(form.LITERAL, 1000), 1: bytes(1000)}, packed={1: one})
    assert "of memory" in refused(patch, base, result).message
    three = packer(3 * MIB)(bytes(1000))
    streams = {0: step(form.LITERAL, 1000), 1: bytes(1000), 2: bytes(1000), 3: bytes(1000)}
    patch = patch_of(base, result, streams, packed={1: three, 2: three, 3: three})
    assert "of memory" in refused(patch, base, result).message


def test_the_unpacker_itself_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    base, result = noise(1000), bytes(1000)
    monkeypatch.setattr(form, "dictionary_bytes", lambda header: 0)
    one = packer(16 * MIB)(bytes(1000))
    patch = patch_of(base, result, {0: step(form.LITERAL, 1000), 1: bytes(1000)}, packed={1: one})
    assert "emory" in refused(patch, base, result).message


def test_steps_of_no_length_do_not_go_on_for_ever() -> None:
    base, result = noise(100), bytes(100)
    assert "does not fit" in refused(patch_of(base, result, {0: step(form.LITERAL, 0) * 50}), base, result).message


def test_a_patch_for_another_base_or_result_is_refused() -> None:
    base, result = noise(1000), noise(1000, 2)
    for other in ({"base": "ab" * 32}, {"base_length": 999}, {"result": "ab" * 32}, {"result_length": 1001}):
        patch = patch_of(base, result, {0: step(form.LITERAL, 1000), 1: result}, **other)
        assert refused(patch, base, result).code == "transfer.patch.terms"


def test_a_base_that_was_swapped_does_not_make_the_result() -> None:
    base, result = noise(50_000), noise(50_000)[:-3] + b"abc"
    patch, terms = making.make(base, result), terms_of(base, result)
    for swapped, code in ((noise(50_000, 7), "result"), (base[:100], "base")):
        with pytest.raises(PatchFailed) as caught:
            applied(patch, swapped, terms)
        assert caught.value.code == f"transfer.patch.{code}"


def test_what_is_left_over_is_refused() -> None:
    base, result = noise(1000), noise(1000, 2)
    steps = step(form.LITERAL, 1000)
    assert "longer than" in refused(patch_of(base, result, {0: steps, 1: result, 2: b"x"}), base, result).message
    assert "longer than" in refused(patch_of(base, result, {0: steps + steps, 1: result}), base, result).message
    trailing = packer(64 * KIB)(result) + b"more"
    patch = patch_of(base, result, {0: steps, 1: result}, packed={1: trailing})
    assert "follows the end" in refused(patch, base, result).message


def test_a_stream_that_holds_less_than_it_says_is_refused() -> None:
    base, result = noise(1000), noise(1000, 2)
    patch = patch_of(base, result, {0: step(form.LITERAL, 1000), 1: result}, packed={1: packer(64 * KIB)(result[:-1])})
    assert "less than it says" in refused(patch, base, result).message


def test_differences_wrap_around() -> None:
    base = struct.pack("<4I", 0, 2**32 - 1, 5, 2**31)
    result = struct.pack("<4I", 2**32 - 1, 0, 5, 2**31 - 1)
    zigzag = np.array([1, 2, 0, 1], "<u4").view(np.uint8).reshape(-1, 4)
    streams = {0: step(form.ADD_WORDS, 16, 0), **{5 + plane: zigzag[:, plane].tobytes() for plane in range(4)}}
    assert applied(patch_of(base, result, streams), base, terms_of(base, result)) == result
