"""The admission gate for LiteRT files: what must be known of a file before any interpreter may open it.

A reader of the TensorFlow Lite schema (version 3, schema.fbs) in standard Python. It looks at every offset that an
interpreter would follow, so that a file which passes cannot make it read outside; and at what the graph is made of.

Refused: operators that are not built in (custom, delegates, Flex, StableHLO), data outside the flatbuffer, subgraphs
that call themselves, indices out of range, constants of another size than their tensor, more of anything than the
limits allow, fields that this schema does not have. Not here: whether the graph computes anything sensible, and how
long that takes (the host is watched from outside).
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from shared import limits
from shared.errors import InvalidValue
from shared.flatbuffer import Buffer, Damaged, Table

IDENTIFIER: Final = b"TFL3"
"""At byte 4 of the file (schema.fbs, `file_identifier`)."""

_SPARE_VISITS: Final = 1024
_BYTES_PER_VISIT: Final = 4
"""No part of a file takes less room, so a reader that needs more visits than that meets the same part again."""

MAX_TENSOR_BYTES: Final = limits.GIB
"""Of one tensor with a shape that is fully known: an interpreter sets this aside when it loads."""

_CALL, _CUSTOM, _DELEGATE, _IF, _WHILE, _PLACEHOLDER, _CALL_ONCE, _LAST = 31, 32, 51, 118, 119, 127, 129, 161
_FORBIDDEN: Final = frozenset({_CALL, _CUSTOM, _DELEGATE, _PLACEHOLDER})

_OPTIONAL_INPUTS: Final = frozenset({3, 4, 9, 16, 24, 27, 35, 44, 46, 52, 67, 132, 141})
"""Convolutions, dense layers and recurrences: their bias and some weights may be left out (-1). Others crash on it."""

_CALLS: Final = {_IF: (92, (0, 1)), _WHILE: (93, (0, 1)), _CALL_ONCE: (103, (0,))}
"""Operators that run other subgraphs: the kind of their options, and which fields of those name a subgraph."""

_FIELDS: Final = {
    "model": 8, "operator code": 4, "subgraph": 6, "tensor": 11, "operator": 14, "buffer": 3, "metadata": 2,
    "signature": 5, "name of a tensor": 2, "quantization": 7, "sparsity": 3, "dimension": 6,
}  # fmt: skip
"""How many fields the schema gives each table. A reader that knows more of them must not meet one that is unchecked."""

_OPTION_VECTORS: Final = {
    3: ((1, 4), (2, 4)),
    8: ((5, 1),),
    17: ((0, 4),),
    30: ((0, 4),),
    111: ((0, 1), (1, 1)),
    115: ((0, 4),),
}
"""Kinds of operator options that hold vectors: which fields, and how many bytes an item takes."""
_LAST_OPTIONS: Final = 126
_BLOCKWISE: Final = 2
_SEGMENTS: Final = {1: 4, 2: 2, 3: 1}

_ITEM_BYTES: Final = {
    0: 4, 1: 2, 2: 4, 3: 1, 4: 8, 6: 1, 7: 2, 8: 8, 9: 1, 10: 8, 11: 16, 12: 8, 15: 4, 16: 2, 18: 2,
}  # fmt: skip
"""Bytes of an element by TensorType; strings, handles and types of less than a byte are left out."""
_LAST_TYPE: Final = 22
_INFINITE: Final = 0x7F80_0000
"""The bits of a float32 from which on it is no finite positive number (IEEE 754)."""


class LitertSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds, as far as admission asks: counts, and the operators' numbers (BuiltinOperator)."""

    subgraphs: int
    operators: int
    tensors: int
    builtins: tuple[int, ...]


def check_litert(data: bytes | bytearray | memoryview) -> LitertSummary:
    """What the file holds, if it is admitted; raises InvalidValue `model.admission` if it is not."""
    view = memoryview(data).cast("B")
    if not 0 < len(view) <= limits.MAX_MODEL_BYTES:
        raise _refusal(f"a model of {len(view)} bytes cannot be admitted, 1 to {limits.MAX_MODEL_BYTES} are possible")
    if len(view) < 8 or bytes(view[4:8]) != IDENTIFIER:
        raise _refusal("the file is no LiteRT model of schema version 3")
    visits = _SPARE_VISITS + len(view) // _BYTES_PER_VISIT
    try:
        return _Reading(Buffer(view, visits=visits)).summary()
    except Damaged as error:
        raise _refusal(f"the file is damaged: {error}") from error


def _refusal(message: str, *, hint: str = "check that the file is a complete .tflite model") -> InvalidValue:
    return InvalidValue(message, code="model.admission", hint=hint)


class _Reading:
    """One pass over a file; each method reads one kind of table. Numbers are the schema's field numbers."""

    def __init__(self, buffer: Buffer) -> None:
        self._model = buffer.root()
        if self._model.number(0, 4) != 3:
            raise Damaged(f"its schema version is {self._model.number(0, 4)}, not 3")
        if self._model.fields > _FIELDS["model"] and (self._model.length(8, 4) or self._model.length(9, 4)):
            raise _refusal("the model keeps data in another file", hint="convert it to one file")
        _known(self._model, "model")
        self._codes = [self._code(table) for table in self._model.tables(1)]
        self._graphs = self._model.tables(2)
        self._buffers = [self._buffer(table) for table in self._model.tables(4)]
        self._calls: dict[int, set[int]] = {}
        self._operators = 0
        self._tensors = 0

    def summary(self) -> LitertSummary:
        """Read all of it."""
        if not self._graphs:
            raise _refusal("the model has no graph")
        for index, graph in enumerate(self._graphs):
            self._graph(index, graph)
        self._check_calls()
        self._extras()
        return LitertSummary(
            subgraphs=len(self._graphs), operators=self._operators, tensors=self._tensors, builtins=tuple(self._codes)
        )

    def _code(self, table: Table) -> int:
        _known(table, "operator code")
        code = max(table.number(0, 1, signed=True), table.number(3, 4, signed=True))
        custom = table.text(1)
        if custom or code in _FORBIDDEN or not 0 <= code <= _LAST:
            name = repr(custom[:80]) if custom else f"number {code}"
            raise _refusal(
                f"operator {name} is not admitted: it is not one that every LiteRT has built in",
                hint="convert with TFLITE_BUILTINS only (no SELECT_TF_OPS, no custom operators)",
            )
        return code

    def _buffer(self, table: Table) -> int:
        """The length of a constant's data."""
        _known(table, "buffer")
        if table.number(1, 8) or table.number(2, 8):
            raise _refusal("a constant lies outside the flatbuffer", hint="convert it to one file below 2 GB")
        return table.length(0, 1)

    def _graph(self, index: int, graph: Table) -> None:
        _known(graph, "subgraph")
        tensors = graph.tables(0)
        self._tensors += len(tensors)
        for tensor in tensors:
            self._tensor(tensor)
        for field, name in ((1, "input"), (2, "output")):
            _within(graph.numbers(field, most=limits.MAX_TENSORS), len(tensors), least=0, what=f"an {name} of a graph")
        graph.text(4)
        self._calls[index] = set()
        for operator in graph.tables(3):
            self._operator(index, operator, len(tensors))
        if index == 0 and not (graph.length(1, 4) and graph.length(2, 4)):
            raise _refusal("the model has no inputs or no outputs")

    def _tensor(self, tensor: Table) -> None:
        _known(tensor, "tensor")
        shape = tensor.numbers(0, most=limits.MAX_TENSOR_RANK)
        signature = tensor.numbers(7, most=limits.MAX_TENSOR_RANK)
        kind, buffer = tensor.number(1, 1, signed=True), tensor.number(2, 4)
        tensor.text(3)
        if not 0 <= kind <= _LAST_TYPE or any(size < 0 for size in shape) or any(size < -1 for size in signature):
            raise Damaged("a tensor has an element type or a shape that cannot be")
        if tensor.number(10, 4):
            raise _refusal("a tensor keeps its data in another file", hint="convert it to one file")
        _within([buffer], len(self._buffers), least=0, what="a tensor's constant")
        sparsity, held = tensor.table(6), self._buffers[buffer]
        size = math.prod(shape) * _ITEM_BYTES.get(kind, 1)
        if size > MAX_TENSOR_BYTES:
            raise _refusal(f"a tensor of {size} bytes is not admitted, {MAX_TENSOR_BYTES} are possible")
        if held and sparsity is None and kind in _ITEM_BYTES and held != size:
            raise Damaged(f"a constant has {held} bytes where its tensor takes {size}")
        for variant in tensor.tables(9):
            variant.numbers(0, most=limits.MAX_TENSOR_RANK)
        quantization = tensor.table(4)
        if quantization is not None:
            _quantization(quantization, shape)
        if sparsity is not None:
            _sparsity(sparsity)

    def _operator(self, graph: int, operator: Table, tensors: int) -> None:
        _known(operator, "operator")
        self._operators += 1
        if self._operators > limits.MAX_GRAPH_NODES:
            raise _refusal(f"the model has more than {limits.MAX_GRAPH_NODES} operators")
        number = operator.number(0, 4)
        _within([number], len(self._codes), least=0, what="an operator's code")
        may_lack = -1 if self._codes[number] in _OPTIONAL_INPUTS else 0
        for field, least, name in ((1, may_lack, "input"), (2, 0, "output"), (8, -1, "intermediate")):
            listed = operator.numbers(field, most=limits.MAX_GRAPH_NODES)
            _within(listed, tensors, least=least, what=f"an {name} of an operator")
        operator.length(7, 1)
        large = operator.number(9, 8) or operator.number(10, 8)
        if operator.length(5, 1) or large or operator.number(11, 1):
            raise _refusal("an operator has options that only custom operators and StableHLO have")
        kind, options = operator.number(3, 1), operator.table(4) if operator.number(3, 1) else None
        if kind > _LAST_OPTIONS or (kind and options is None):
            raise Damaged("an operator's options are missing or of a kind that does not exist")
        if options is not None:
            _options(options, kind)
        self._note_calls(graph, self._codes[number], kind, options)

    def _note_calls(self, graph: int, code: int, kind: int, options: Table | None) -> None:
        called = _CALLS.get(code)
        if called is None:
            return
        if options is None or kind != called[0]:
            raise Damaged("an operator that runs a subgraph does not say which")
        named = [options.number(field, 4, signed=True) for field in called[1]]
        _within(named, len(self._graphs), least=0, what="a subgraph that an operator runs")
        self._calls[graph].update(named)

    def _check_calls(self) -> None:
        """No subgraph runs itself, however far around, and none nests too deep."""
        depths: dict[int, int] = {}
        for graph in self._calls:
            if self._depth(graph, 1, depths) > limits.MAX_GRAPH_DEPTH:
                raise _refusal(f"subgraphs nest deeper than {limits.MAX_GRAPH_DEPTH}")

    def _depth(self, graph: int, level: int, depths: dict[int, int]) -> int:
        # A circle ends here as well: it is deeper than any bound.
        if level > limits.MAX_GRAPH_DEPTH:
            raise _refusal(f"subgraphs nest deeper than {limits.MAX_GRAPH_DEPTH}, or one runs itself")
        if graph not in depths:
            deepest = max((self._depth(called, level + 1, depths) for called in self._calls[graph]), default=0)
            depths[graph] = 1 + deepest
        return depths[graph]

    def _extras(self) -> None:
        self._model.text(3, most=limits.MAX_MANIFEST_BYTES)
        _within(self._model.numbers(5, most=limits.MAX_TENSORS), len(self._buffers), least=0, what="a note's constant")
        for note in self._model.tables(6):
            _known(note, "metadata")
            note.text(0)
            _within([note.number(1, 4)], len(self._buffers), least=0, what="a note's constant")
        for signature in self._model.tables(7):
            _known(signature, "signature")
            signature.text(2)
            index = signature.number(4, 4)
            _within([index], len(self._graphs), least=0, what="a signature's graph")
            tensors = len(self._graphs[index].tables(0))
            for entry in (*signature.tables(0), *signature.tables(1)):
                _known(entry, "name of a tensor")
                entry.text(0)
                _within([entry.number(1, 4)], tensors, least=0, what="a signature's tensor")


def _known(table: Table, kind: str) -> None:
    if table.fields > _FIELDS[kind]:
        unknown = [field for field in range(_FIELDS[kind], table.fields) if table.place(field, 1) is not None]
        if unknown:
            raise _refusal(
                f"a {kind} has a field of a newer schema than this gate can check", hint="update Outrider, or convert "
                "the model with an older converter"
            )  # fmt: skip


def _within(numbers: list[int], count: int, *, least: int, what: str) -> None:
    if any(not least <= number < count for number in numbers):
        raise Damaged(f"{what} does not exist")


def _quantization(table: Table, shape: list[int]) -> None:
    _known(table, "quantization")
    bits = table.numbers(2, signed=False, most=limits.MAX_GRAPH_NODES)
    if not all(0 < scale < _INFINITE for scale in bits):
        raise Damaged("a tensor's scale is no positive number")
    scales, zeros = len(bits), table.length(3, 8)
    table.length(0, 4)
    table.length(1, 4)
    axis, kind = table.number(6, 4, signed=True), table.number(4, 1)
    if scales > 1 and (not 0 <= axis < len(shape) or scales != shape[axis]):
        raise Damaged("a tensor has not one scale for each part of its axis")
    if zeros not in (0, 1, scales):
        raise Damaged("a tensor has not one zero point for each scale")
    if kind not in (0, _BLOCKWISE):
        raise _refusal("a tensor is quantized in a way that not every LiteRT knows")
    details = table.table(5) if kind else None
    if details is not None:
        details.length(3, 4)


def _sparsity(table: Table) -> None:
    _known(table, "sparsity")
    table.length(0, 4)
    table.length(1, 4)
    for dimension in table.tables(2):
        _known(dimension, "dimension")
        for kind_field, field in ((2, 3), (4, 5)):
            kind = dimension.number(kind_field, 1)
            if kind and kind not in _SEGMENTS:
                raise Damaged("a sparse tensor is laid out in a way that does not exist")
            vector = dimension.table(field) if kind else None
            if vector is not None:
                vector.length(0, _SEGMENTS[kind])


def _options(options: Table, kind: int) -> None:
    vectors = dict(_OPTION_VECTORS.get(kind, ()))
    for field in range(options.fields):
        if field in vectors:
            options.length(field, vectors[field])
        else:
            options.place(field, 1)
