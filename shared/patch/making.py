"""Makes a patch: aligns both files, measures what is worth subtracting as which kind of number, packs the streams.

Both files are only read, so they may be memory maps. Memory beside them: about as much as both together for the
alignment of unknown formats, 64 MiB for the packing; time: some seconds for 10 MB. The same files give the same patch
wherever the same liblzma is.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.limits import KIB, MIB
from shared.patch import format as form
from shared.patch.alignment import Bytes, Segment, align
from shared.patch.format import Head, StreamHead, Terms

WINDOW: Final = 1 * MIB
MEASURED_BYTES: Final = 64 * KIB
"""Where the kind of numbers is not known, it is measured once for each piece of this length."""
EQUAL_BLOCK: Final = 4 * KIB
"""Equal bytes are copied and not subtracted where there are as many, from here on."""
EQUAL_ENDS: Final = 64
"""The same before and behind what differs."""
SAMPLE_BYTES: Final = 128 * KIB
WORTH: Final = 0.98
"""A guess about numbers must promise this share of the bytes to be taken."""

_MOST_DICTIONARY: Final = {form.LITERAL_STREAM: 4 * MIB, form.ADD_BYTES: 1 * MIB}
_PLANE_DICTIONARY: Final = 256 * KIB
_LEAST_DICTIONARY: Final = 4 * KIB


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the patch: `base` counts for all kinds but literals."""

    kind: int
    base: int
    result: int
    length: int


def make(base: Any, result: Any) -> bytes:
    """The patch from one file's bytes to another's; both are buffers of at least one byte."""
    old, new = np.frombuffer(base, np.uint8), np.frombuffer(result, np.uint8)
    steps = plan(old, new)
    terms = Terms(
        base=hashlib.sha256(old.data).hexdigest(),
        base_length=len(old),
        result=hashlib.sha256(new.data).hexdigest(),
        result_length=len(new),
    )
    contents: list[Callable[[], Iterator[bytes]]] = [
        lambda: iter([_encode_steps(steps)]),
        lambda: _literals(steps, new),
    ]
    contents += [
        lambda kind=kind, plane=plane: _differences(steps, old, new, kind=kind, plane=plane)  # type: ignore[misc]
        for kind, numbers in form.DIFFERENCE_STREAMS.items()
        for plane in range(len(numbers))
    ]
    heads, packed = [], []
    for number, content in enumerate(contents):
        head, data = _pack(number, content)
        heads.append(head)
        packed.append(data)
    return b"".join([form.encode_head(Head(terms=terms, streams=tuple(heads))), *packed])


def plan(base: Bytes, result: Bytes) -> list[Step]:
    """The steps that make the result, merged where they continue each other."""
    steps: list[Step] = []
    at = 0
    for segment in align(base, result):
        if segment.result > at:
            steps.append(Step(kind=form.LITERAL, base=0, result=at, length=segment.result - at))
        steps += _segment(base, result, segment)
        at = segment.result + segment.length
    if at < len(result):
        steps.append(Step(kind=form.LITERAL, base=0, result=at, length=len(result) - at))
    return _merged(steps)


def _segment(base: Bytes, result: Bytes, segment: Segment) -> Iterator[Step]:
    """Copies where long stretches are equal, differences between them."""
    at = 0
    for begin, end in _equal(base, result, segment):
        yield from _different(base, result, segment, at, begin)
        yield _step(form.COPY, segment, begin, end)
        at = end
    yield from _different(base, result, segment, at, segment.length)


def _equal(base: Bytes, result: Bytes, segment: Segment) -> Iterator[tuple[int, int]]:
    """Stretches of whole equal blocks, relative to the segment; blocks are multiples of any width."""
    begin = end = 0
    for at in range(0, segment.length - segment.length % EQUAL_BLOCK, WINDOW):
        length = min(WINDOW, segment.length - at)
        length -= length % EQUAL_BLOCK
        same = base[segment.base + at :][:length] == result[segment.result + at :][:length]
        for block in np.flatnonzero(same.reshape(-1, EQUAL_BLOCK).all(axis=1)):
            start = at + int(block) * EQUAL_BLOCK
            if start > end:
                if end > begin:
                    yield begin, end
                begin = start
            end = start + EQUAL_BLOCK
    if end > begin:
        yield begin, end


def _different(base: Bytes, result: Bytes, segment: Segment, begin: int, end: int) -> Iterator[Step]:
    """Differences, but for equal bytes at both ends, which are less than a block."""
    head = _equal_bytes(base, result, segment, begin, min(begin + EQUAL_BLOCK, end))
    if head >= EQUAL_ENDS:
        yield _step(form.COPY, segment, begin, begin + head)
        begin += head
    tail = _equal_bytes(base, result, segment, max(begin, end - EQUAL_BLOCK), end, from_end=True)
    if tail >= EQUAL_ENDS:
        end -= tail
    yield from _numbers(base, result, segment, begin, end)
    if tail >= EQUAL_ENDS:
        yield _step(form.COPY, segment, end, end + tail)


def _equal_bytes(base: Bytes, result: Bytes, segment: Segment, begin: int, end: int, *, from_end: bool = False) -> int:
    """How many bytes are the same at one end of a stretch, in whole numbers of the widest kind."""
    differs = base[segment.base + begin : segment.base + end] != result[segment.result + begin : segment.result + end]
    if from_end:
        differs = differs[::-1]
    count = int(differs.argmax()) if differs.any() else len(differs)
    return count if count == len(differs) else count - count % 4


def _numbers(base: Bytes, result: Bytes, segment: Segment, begin: int, end: int) -> Iterator[Step]:
    if segment.width:
        kind = next(kind for kind, width in form.WIDTHS.items() if width == segment.width)
        if end > begin:
            yield _step(kind, segment, begin, end)
        return
    while begin < end:
        stop = min(begin + MEASURED_BYTES, end)
        kind, lead = _measure(
            base[segment.base + begin : segment.base + stop], result[segment.result + begin : segment.result + stop]
        )
        # Numbers begin at a multiple of their width in the file: what is before and behind is bytes.
        whole = (stop - begin - lead) // form.WIDTHS.get(kind, 1) * form.WIDTHS.get(kind, 1)
        for step_kind, first, last in (
            (form.ADD_BYTES, begin, begin + lead),
            (kind, begin + lead, begin + lead + whole),
            (form.ADD_BYTES, begin + lead + whole, stop),
        ):
            if last > first:
                yield _step(step_kind, segment, first, last)
        begin = stop


def _measure(old: Bytes, new: Bytes) -> tuple[int, int]:
    """The kind of step that promises the fewest bytes, and how many bytes lie before its first number."""
    best, cost, lead = form.ADD_BYTES, _entropy(new - old), 0
    literal = _entropy(new)
    if literal < cost * WORTH:
        best, cost = form.LITERAL, literal
    if len(new) < EQUAL_BLOCK:
        return best, 0
    for kind, width in ((form.ADD_SHORTS, 2), (form.ADD_WORDS, 4)):
        for phase in range(width):
            count = (len(new) - phase) // width * width
            planes = _planes(old[phase : phase + count], new[phase : phase + count], width)
            found = sum(_entropy(planes[:, plane]) for plane in range(width))
            if found < cost * WORTH:
                best, cost, lead = kind, found, phase
    return best, lead


def _entropy(data: NDArray[np.uint8]) -> float:
    """Bytes that the values alone need, without what their order tells (Shannon)."""
    if not len(data):
        return 0.0
    counts = np.bincount(data, minlength=256)
    shares = counts[counts > 0] / len(data)
    return float(-(shares * np.log2(shares)).sum() * len(data) / 8)


def _planes(old: Bytes, new: Bytes, width: int) -> NDArray[np.uint8]:
    """The zigzag differences of numbers, a row each."""
    unsigned, signed = np.dtype(f"<u{width}"), np.dtype(f"<i{width}")
    difference = np.frombuffer(new.tobytes(), unsigned) - np.frombuffer(old.tobytes(), unsigned)
    number = difference.view(signed)
    zigzag = (difference << unsigned.type(1)) ^ (number >> signed.type(width * 8 - 1)).view(unsigned)
    planes: NDArray[np.uint8] = zigzag.view(np.uint8).reshape(-1, width)
    return planes


def _step(kind: int, segment: Segment, begin: int, end: int) -> Step:
    return Step(kind=kind, base=segment.base + begin, result=segment.result + begin, length=end - begin)


def _merged(steps: Sequence[Step]) -> list[Step]:
    merged: list[Step] = []
    for step in steps:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.kind == step.kind
            and (step.kind == form.LITERAL or last.base + last.length == step.base)
        ):
            merged[-1] = msgspec.structs.replace(last, length=last.length + step.length)
            continue
        merged.append(step)
    return merged


def _encode_steps(steps: Sequence[Step]) -> bytes:
    out = bytearray()
    base_at = 0
    for step in steps:
        out += form.encode_varint(step.length << 3 | step.kind)
        if step.kind != form.LITERAL:
            distance = step.base - base_at
            out += form.encode_varint(distance * 2 if distance >= 0 else -distance * 2 - 1)
            base_at = step.base + step.length
    return bytes(out)


def _literals(steps: Sequence[Step], result: Bytes) -> Iterator[bytes]:
    for step in steps:
        if step.kind == form.LITERAL:
            for at in range(step.result, step.result + step.length, WINDOW):
                yield result[at : min(at + WINDOW, step.result + step.length)].tobytes()


def _differences(steps: Sequence[Step], base: Bytes, result: Bytes, *, kind: int, plane: int) -> Iterator[bytes]:
    width = form.WIDTHS[kind]
    for step in steps:
        if step.kind != kind:
            continue
        for at in range(0, step.length, WINDOW):
            count = min(WINDOW, step.length - at)
            old = base[step.base + at : step.base + at + count]
            new = result[step.result + at : step.result + at + count]
            yield (new - old if width == 1 else _planes(old, new, width)[:, plane]).tobytes()


def _pack(number: int, content: Callable[[], Iterator[bytes]]) -> tuple[StreamHead, bytes]:
    """One stream, as it is shortest: the ways are tried on a sample of it."""
    length, sample = _sample(content())
    if not length:
        return StreamHead(method=form.RAW, length=0, packed=0), b""
    filters = _choose(number, length, sample)
    if filters is None:
        data = b"".join(content())
        return StreamHead(method=form.RAW, length=length, packed=length), data
    packer = lzma.LZMACompressor(lzma.FORMAT_ALONE, filters=[filters])
    data = b"".join([*(packer.compress(piece) for piece in content()), packer.flush()])
    if len(data) >= length:
        return StreamHead(method=form.RAW, length=length, packed=length), b"".join(content())
    return StreamHead(method=form.LZMA, length=length, packed=len(data)), data


def _sample(pieces: Iterator[bytes]) -> tuple[int, bytes]:
    """How long a stream is, and its beginning, middle and end in small, as far as they are met."""
    length, taken, step = 0, bytearray(), 16 * KIB
    for piece in pieces:
        length += len(piece)
        taken += piece[:SAMPLE_BYTES] if len(taken) < SAMPLE_BYTES // 2 else piece[:step]
        if len(taken) > 4 * SAMPLE_BYTES:
            taken = taken[: 2 * SAMPLE_BYTES]
    return length, bytes(taken[:SAMPLE_BYTES])


def _choose(number: int, length: int, sample: bytes) -> dict[str, int] | None:
    """The filter for a stream, or None where packing saves less than a hundredth."""
    most = _MOST_DICTIONARY.get(number, _PLANE_DICTIONARY)
    size = max(_LEAST_DICTIONARY, min(most, 1 << (length - 1).bit_length()))
    # Differences have no context worth knowing; literals are files, of which the low bits of a position tell a little.
    contexts = (0,) if number > form.LITERAL_STREAM else (0, 3)
    best: tuple[float, dict[str, int] | None] = (len(sample) * 0.99 if length > KIB else float("inf"), None)
    # The slower search has to give something for its time, but not in what is packed at once anyway.
    toll = len(sample) * 0.005 if length > len(sample) else 0.0
    for context in contexts:
        for finder, nice in ((lzma.MF_HC4, 32), (lzma.MF_BT4, 273)):
            filters = {
                "id": lzma.FILTER_LZMA1, "dict_size": size, "lc": context, "lp": 0, "pb": 0,
                "mode": lzma.MODE_NORMAL, "mf": finder, "nice_len": nice,
            }  # fmt: skip
            found = len(lzma.compress(sample, lzma.FORMAT_ALONE, filters=[filters]))
            cost = found + (toll if finder == lzma.MF_BT4 else 0)
            if cost < best[0]:
                best = (cost, filters)
    return best[1]
