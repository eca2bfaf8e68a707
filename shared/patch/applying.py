"""Applies a patch: reads it and the base by position and writes the result from front to back.

Safe against any patch whatever: each step is held against the base's length and against what is left of the result
before a byte of it is made; nothing is unpacked that no step asks for; the decoders' memory is bounded; the result's
SHA-256 is compared at the end. Whatever happens, the outcome is the promised result or PatchFailed, and never more
bytes than promised were written. Memory: the dictionaries, at most 8 MiB, and a few windows of 256 KiB.

The caller has checked the patch's own digest and the base's before.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.errors import PatchFailed
from shared.limits import KIB
from shared.patch import format as form
from shared.patch.format import FETCH_WHOLE, Head, StreamHead, Terms, malformed

WINDOW_BYTES: Final = 256 * KIB
PIECE_BYTES: Final = 16 * KIB
"""What is read of a packed stream at a time."""

ReadAt = Callable[[int, int], bytes]
"""Reads up to so many bytes (second) at an offset (first); fewer only where the file ends."""

Bytes = NDArray[np.uint8]


def apply(*, patch: ReadAt, patch_length: int, base: ReadAt, write: Callable[[Any], None], terms: Terms) -> None:
    """Write the result.

    Args:
        patch: reads the patch, of which `patch_length` bytes were promised.
        base: reads the file that it starts from.
        write: takes the result's next bytes, any buffer of at most 256 KiB.
        terms: which files these are to be.

    Raises:
        PatchFailed: `transfer.patch.malformed`, `.terms` (it is for other files), `.base` (the base is shorter than
            it was), `.result` (what came out is not what was promised). What was written is then worth nothing.
    """
    head = form.decode_head(patch(0, min(form.HEADER_BYTES, patch_length)), patch_length=patch_length)
    check_terms(head, terms)
    streams = _open_streams(patch, head)
    digest = hashlib.sha256()
    written = 0
    for kind, offset, length in _steps(streams[form.STEPS_STREAM], terms):
        for at in range(0, length, WINDOW_BYTES):
            count = min(WINDOW_BYTES, length - at)
            window = _make(streams, base, kind=kind, offset=offset + at, count=count)
            digest.update(window)
            write(window)
            written += count
    for stream in streams:
        stream.finish()
    if written != terms.result_length or digest.hexdigest() != terms.result:
        raise PatchFailed(
            "the patch made another file than it promised", code="transfer.patch.result", hint=FETCH_WHOLE
        )


def _open_streams(patch: ReadAt, head: Head) -> list[_Stream]:
    streams, at, dictionaries = [], head.size, 0
    for stream in head.streams:
        if stream.method == form.LZMA:
            dictionaries += form.dictionary_bytes(patch(at, min(stream.packed, form.LZMA_HEADER_BYTES)))
        streams.append(_Stream(patch, stream, at=at))
        at += stream.packed
    check_memory(dictionaries)
    return streams


def check_terms(head: Head, terms: Terms) -> None:
    """Raise PatchFailed unless the patch is for these files."""
    if head.terms != terms:
        raise PatchFailed("the patch is for other files", code="transfer.patch.terms", hint=FETCH_WHOLE)


def check_made(kind: int, length: int, *, left: int) -> None:
    """Raise PatchFailed unless a step makes whole numbers, at least one byte, and no more than is left."""
    if not 0 < length <= left or kind > form.ADD_WORDS or length % form.WIDTHS.get(kind, 1):
        raise malformed("a step makes what does not fit")


def check_read(offset: int, length: int, *, base_length: int) -> None:
    """Raise PatchFailed unless a step reads inside the base."""
    if not 0 <= offset <= base_length - length:
        raise malformed("a step reads outside the base")


def check_memory(dictionaries: int) -> None:
    """Raise PatchFailed unless the decoders' dictionaries together are within their bound."""
    if dictionaries > form.MAX_DICTIONARY_BYTES:
        raise malformed(f"its streams ask for {dictionaries} bytes of memory")


def _steps(stream: _Stream, terms: Terms) -> Iterator[tuple[int, int, int]]:
    """Kind, offset in the base and length of each step, held against both lengths."""
    left, base_at = terms.result_length, 0
    while left:
        number = stream.varint()
        kind, length = number & 7, number >> 3
        check_made(kind, length, left=left)
        if kind != form.LITERAL:
            number = stream.varint()
            base_at += number >> 1 ^ -(number & 1)
            check_read(base_at, length, base_length=terms.base_length)
        yield kind, base_at, length
        if kind != form.LITERAL:
            base_at += length
        left -= length


def _make(streams: list[_Stream], base: ReadAt, *, kind: int, offset: int, count: int) -> Any:
    if kind == form.LITERAL:
        return streams[form.LITERAL_STREAM].take(count)
    old = base(offset, count)
    if len(old) != count:
        raise PatchFailed("the base is shorter than it was", code="transfer.patch.base", hint=FETCH_WHOLE)
    if kind == form.COPY:
        return old
    numbers = streams_of(kind)
    if kind == form.ADD_BYTES:
        return np.frombuffer(old, np.uint8) + np.frombuffer(streams[numbers[0]].take(count), np.uint8)
    width = form.WIDTHS[kind]
    planes = np.empty((count // width, width), np.uint8)
    for plane, number in enumerate(numbers):
        planes[:, plane] = np.frombuffer(streams[number].take(count // width), np.uint8)
    dtype = np.dtype(f"<u{width}")
    zigzag = planes.reshape(-1).view(dtype)
    one = dtype.type(1)
    # Unsigned on purpose: 0 - 1 is all ones, and sums wrap around as they did when the difference was taken.
    difference = (zigzag >> one) ^ (dtype.type(0) - (zigzag & one))
    return (np.frombuffer(old, dtype) + difference).view(np.uint8)


def streams_of(kind: int) -> tuple[int, ...]:
    """The streams that hold a kind's differences."""
    return form.DIFFERENCE_STREAMS[kind]


class _Stream:
    """One stream of a patch, unpacked as far as it is asked for."""

    def __init__(self, patch: ReadAt, head: StreamHead, *, at: int) -> None:
        self._patch = patch
        self._at, self._end = at, at + head.packed
        self._left = head.length
        self._unpacker = (
            lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=form.STREAM_MEMORY_BYTES)
            if head.method == form.LZMA
            else None
        )
        self._ready = b""
        self._ready_at = 0

    def take(self, count: int) -> bytearray:
        """The next bytes; raises PatchFailed when the stream has fewer or does not unpack."""
        if count > self._left:
            raise malformed("a stream is shorter than its steps")
        self._left -= count
        out = bytearray(self._ready[self._ready_at : self._ready_at + count])
        self._ready_at += len(out)
        while len(out) < count:
            out += self._more(count - len(out))
        return out

    def varint(self) -> int:
        """The next number, of up to 63 bits."""
        number = 0
        for shift in range(0, 63, 7):
            byte = self._byte()
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
        raise malformed("a number is too long")

    def finish(self) -> None:
        """Raise PatchFailed unless the stream was used to its last byte."""
        if self._left or self._ready_at < len(self._ready):
            raise malformed("a stream is longer than its steps")
        unpacker = self._unpacker
        if unpacker is not None and self._end - self._at + len(unpacker.unused_data) and unpacker.eof:
            raise malformed("something follows the end of a stream")
        # The mark of the end may still have to be read; nothing else may come before it.
        while unpacker is not None and not unpacker.eof:
            if self._unpack(1):
                raise malformed("a stream holds more than it says")

    def _byte(self) -> int:
        if self._ready_at == len(self._ready):
            if not self._left:
                raise malformed("the steps end too early")
            self._ready, self._ready_at = self._more(min(self._left, PIECE_BYTES)), 0
        self._left -= 1
        byte = self._ready[self._ready_at]
        self._ready_at += 1
        return byte

    def _more(self, most: int) -> bytes:
        """At least one byte."""
        if self._unpacker is None:
            data = self._read(most)
        else:
            while not (data := self._unpack(most)):
                if self._unpacker.eof:
                    raise malformed("a stream holds less than it says")
        return data

    def _unpack(self, most: int) -> bytes:
        """Up to so many bytes; may be none, but the packed side then moved on."""
        unpacker = self._unpacker
        assert unpacker is not None
        if unpacker.eof:
            return b""
        packed = self._read(PIECE_BYTES) if unpacker.needs_input else b""
        try:
            return unpacker.decompress(packed, most)
        except lzma.LZMAError as error:
            raise malformed(f"a stream does not unpack: {error}") from error

    def _read(self, most: int) -> bytes:
        data = self._patch(self._at, min(most, self._end - self._at))
        if not data:
            raise malformed("a stream is cut off")
        self._at += len(data)
        return data
