"""Where the tensors of an ONNX file lie: name, element type, and the bytes of `raw_data`.

Initializers of the graph and of its subgraphs, and tensors held by attributes (constants). Not here: whether the file
may be used for anything (shared/onnx_gate.py).
"""

from __future__ import annotations

from typing import Final

import msgspec

from shared import limits
from shared.onnx_fields import BYTES, VARINT, Allowance, refusal, walk

_WIDTHS: Final = {1: 4, 6: 4, 12: 4, 4: 2, 5: 2, 10: 2, 16: 2}
"""Bytes of an element where its difference is taken as a number: float, int32, uint32; 16-bit integers and floats."""


class TensorSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor's raw data in the file.

    Attributes:
        name: by graph, so that the same name in a subgraph is another one.
        dtype: onnx.TensorProto.DataType.
        begin, end: positions in the file.
    """

    name: str
    dtype: int
    begin: int
    end: int

    @property
    def width(self) -> int:
        """How many bytes of it make a number that is worth subtracting: 1, 2 or 4."""
        return _WIDTHS.get(self.dtype, 1)


def find_tensors(data: memoryview) -> tuple[TensorSpan, ...]:
    """The tensors with raw data in the order of the file; raises InvalidValue when it does not read as ONNX."""
    finder = _Finder(data)
    for number, wire, _, begin, end in walk(data, finder.allowance):
        if number == 7 and wire == BYTES:
            finder.graph("", begin, end, depth=1)
    return tuple(finder.found)


class _Finder:
    """One pass; numbers are the field numbers of onnx.proto."""

    def __init__(self, view: memoryview) -> None:
        self.allowance = Allowance()
        self.found: list[TensorSpan] = []
        self._view = view

    def graph(self, scope: str, begin: int, end: int, *, depth: int) -> None:
        """GraphProto."""
        if depth > limits.MAX_GRAPH_DEPTH:
            raise refusal(f"subgraphs nest deeper than {limits.MAX_GRAPH_DEPTH}")
        nodes = 0
        for number, wire, _, inner, inner_end in self._walk(begin, end):
            if wire != BYTES:
                continue
            if number == 5:
                self._tensor(scope, inner, inner_end)
            elif number == 1:
                nodes += 1
                self._node(f"{scope}{nodes}/", inner, inner_end, depth=depth)

    def _walk(self, begin: int, end: int) -> list[tuple[int, int, int, int, int]]:
        return list(walk(self._view, self.allowance, begin=begin, end=end))

    def _node(self, scope: str, begin: int, end: int, *, depth: int) -> None:
        for number, wire, _, attribute, attribute_end in self._walk(begin, end):
            if number != 5 or wire != BYTES:
                continue
            for inner_number, inner_wire, _, inner, inner_end in self._walk(attribute, attribute_end):
                if inner_wire == BYTES and inner_number in (5, 10):
                    self._tensor(scope, inner, inner_end)
                elif inner_wire == BYTES and inner_number in (6, 11):
                    self.graph(scope, inner, inner_end, depth=depth + 1)

    def _tensor(self, scope: str, begin: int, end: int) -> None:
        name, dtype, raw = "", 0, (0, 0)
        for number, wire, value, inner, inner_end in self._walk(begin, end):
            if number == 8 and wire == BYTES:
                name = bytes(self._view[inner:inner_end]).decode(errors="replace")
            elif number == 2 and wire == VARINT:
                dtype = value
            elif number == 9 and wire == BYTES:
                raw = (inner, inner_end)
        if raw[1] > raw[0]:
            self.found.append(TensorSpan(name=scope + name, dtype=dtype, begin=raw[0], end=raw[1]))
