"""The admission gate for ONNX files: what must be known of a file before any runtime may open it.

A scanner for the messages of onnx.proto, in standard Python only (shared/onnx_fields.py walks the wire format): it
counts, follows every subgraph, function and attribute, and copies nothing.
The hub asks at upload, the device before it starts a model host; neither loads onnx for it.

Why not leave it to the runtime: from bytes, ONNX Runtime resolves external data against the process's working
directory, and follows hard links inside a model's directory.

Rules: malformed bytes raise InvalidValue and nothing else; a field that appears where its type does not belong is
malformed, as is a repeated singular name (parsers take the last one, a reader might take the first); work is bounded
by a number of fields, not only by the file's length. Not here: whether the graph computes anything sensible.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from shared import limits
from shared.onnx_fields import BYTES as _BYTES
from shared.onnx_fields import VARINT as _VARINT
from shared.onnx_fields import Allowance, walk
from shared.onnx_fields import refusal as _refusal

STANDARD_DOMAINS: Final = frozenset({"", "ai.onnx"})

MICROSOFT_DOMAIN: Final = "com.microsoft"

MICROSOFT_OPERATORS: Final = frozenset(
    {
        "DequantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "Gelu",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "NhwcMaxPool",
        "QAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearAveragePool",
        "QLinearConcat",
        "QLinearConv",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearMul",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
        "QuantizeLinear",
        "SkipLayerNormalization",
    }
)
"""What ONNX Runtime's quantizer and its graph optimizer write in their own domain; nothing with access to a system."""

Field = tuple[int, int, int, memoryview]
"""Number, wire type, value of a varint (0 otherwise), content of a length-delimited field (empty otherwise)."""


class OnnxValue(msgspec.Struct, frozen=True, kw_only=True):
    """A graph's input or output.

    Attributes:
        elem_type: onnx.TensorProto.DataType; 0 when it is no tensor.
        shape: sizes, -1 where open.
    """

    name: str
    elem_type: int
    shape: tuple[int, ...]


class OnnxSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds, as far as admission asks.

    Attributes:
        opsets: imported operator sets, version by domain.
        operators: how many nodes of each type, by domain, subgraphs and functions included.
        nodes: in all.
        depth: 1 for a graph without subgraphs.
        inputs, outputs: of the outer graph; inputs that have an initializer are left out.
        external: names of tensors whose data lies in other files.
        functions: how many model-local functions there are.
        training: whether the file carries training graphs.
        initializer_bytes: what the initializers of all graphs take in the file.
    """

    ir_version: int
    opsets: dict[str, int]
    operators: dict[str, dict[str, int]]
    nodes: int
    depth: int
    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    external: tuple[str, ...]
    functions: int
    training: bool
    initializer_bytes: int


def inspect_onnx(data: bytes | bytearray | memoryview) -> OnnxSummary:
    """Read what admission needs to know; raises InvalidValue `model.admission` when it is not a readable ONNX file."""
    view = memoryview(data).cast("B")
    if not 0 < len(view) <= limits.MAX_MODEL_BYTES:
        raise _refusal(f"a model of {len(view)} bytes cannot be admitted, 1 to {limits.MAX_MODEL_BYTES} are possible")
    scan = _Scan()
    scan.model(view)
    return scan.summary()


def admit(summary: OnnxSummary) -> None:
    """Raise InvalidValue `model.admission`, saying what is in the way and how to mend it, unless the file may run."""
    if summary.external:
        raise _refusal(
            f"tensor {summary.external[0][:80]!r} keeps its data in another file",
            hint="save the model as one file: onnx.save(onnx.load(PATH), OUT, save_as_external_data=False)",
        )
    if summary.functions:
        raise _refusal(
            "the model defines functions of its own", hint="inline them: onnx.inliner.inline_local_functions(model)"
        )
    if summary.training:
        raise _refusal("the model carries training graphs", hint="export it for inference")
    for domain, operators in summary.operators.items():
        allowed = operators.keys() if domain in STANDARD_DOMAINS else frozenset[str]()
        if domain == MICROSOFT_DOMAIN:
            allowed = MICROSOFT_OPERATORS
        strange = sorted(set(operators) - set(allowed))
        if strange:
            raise _refusal(
                f"operator {strange[0][:80]!r} of the domain {domain[:80]!r} is not admitted",
                hint="export with standard ONNX operators only",
            )
    if not STANDARD_DOMAINS & set(summary.opsets):
        raise _refusal("the model imports no standard operator set", hint="export it again with an opset version")
    if not 0 < summary.nodes <= limits.MAX_GRAPH_NODES:
        raise _refusal(f"{summary.nodes} nodes are not admitted, 1 to {limits.MAX_GRAPH_NODES} are possible")
    if summary.depth > limits.MAX_GRAPH_DEPTH:
        raise _refusal(f"subgraphs nest {summary.depth} deep, {limits.MAX_GRAPH_DEPTH} are possible")
    if not summary.inputs or not summary.outputs:
        raise _refusal("the model has no inputs or no outputs", hint="export it with named inputs and outputs")


def check_onnx(data: bytes | bytearray | memoryview) -> OnnxSummary:
    """What the file holds, if it is admitted; raises InvalidValue `model.admission` if it is not."""
    summary = inspect_onnx(data)
    admit(summary)
    return summary


def _text(content: memoryview) -> str:
    try:
        return str(content, "utf-8")
    except UnicodeDecodeError as error:
        raise _refusal("a name is not UTF-8 text") from error


class _Scan:
    """One pass over a file. Each method reads one kind of message of onnx.proto; numbers are its field numbers."""

    def __init__(self) -> None:
        self._allowance = Allowance()
        self._ir_version = 0
        self._graphs = 0
        self._opsets: dict[str, int] = {}
        self._operators: dict[str, dict[str, int]] = {}
        self._nodes = 0
        self._depth = 0
        self._inputs: list[OnnxValue] = []
        self._outputs: list[OnnxValue] = []
        self._initialized: set[str] = set()
        self._external: list[str] = []
        self._functions = 0
        self._training = False
        self._initializer_bytes = 0

    def summary(self) -> OnnxSummary:
        """What was counted; raises InvalidValue when no graph was met."""
        if self._graphs != 1:
            raise _refusal(f"the file holds {self._graphs} graphs where one belongs")
        return OnnxSummary(
            ir_version=self._ir_version,
            opsets=self._opsets,
            operators=self._operators,
            nodes=self._nodes,
            depth=self._depth,
            inputs=tuple(value for value in self._inputs if value.name not in self._initialized),
            outputs=tuple(self._outputs),
            external=tuple(self._external),
            functions=self._functions,
            training=self._training,
            initializer_bytes=self._initializer_bytes,
        )

    def model(self, view: memoryview) -> None:
        """ModelProto."""
        for number, wire, value, content in self._fields(view):
            match number:
                case 1:
                    _expect(wire, _VARINT)
                    self._ir_version = value
                case 7:
                    _expect(wire, _BYTES)
                    self._graphs += 1
                    self._graph(content, depth=1)
                case 8:
                    _expect(wire, _BYTES)
                    self._opset(content)
                case 20:
                    _expect(wire, _BYTES)
                    self._training = True
                    for inner, inner_wire, _, graph in self._fields(content):
                        if inner in (1, 2):
                            _expect(inner_wire, _BYTES)
                            self._graph(graph, depth=1)
                case 25:
                    _expect(wire, _BYTES)
                    self._functions += 1
                    self._function(content)

    def _fields(self, view: memoryview) -> Iterator[Field]:
        nothing = view[:0]
        for number, wire, value, begin, end in walk(view, self._allowance):
            yield number, wire, value, view[begin:end] if wire == _BYTES else nothing

    def _opset(self, view: memoryview) -> None:
        domain, version = "", 0
        for number, wire, value, content in self._fields(view):
            if number == 1:
                _expect(wire, _BYTES)
                domain = _text(content)
            elif number == 2:
                _expect(wire, _VARINT)
                version = value
        self._opsets[domain] = version

    def _function(self, view: memoryview) -> None:
        for number, wire, _, content in self._fields(view):
            if number in (7, 9, 11):
                _expect(wire, _BYTES)
                if number == 7:
                    self._node(content, depth=1)
                elif number == 9:
                    self._opset(content)
                else:
                    self._attribute(content, depth=1)

    def _graph(self, view: memoryview, *, depth: int) -> None:
        # Bounded here as well as in `admit`, because this reader recurses.
        if depth > limits.MAX_GRAPH_DEPTH:
            raise _refusal(f"subgraphs nest deeper than {limits.MAX_GRAPH_DEPTH}")
        self._depth = max(self._depth, depth)
        for number, wire, _, content in self._fields(view):
            if number not in (1, 5, 11, 12, 15):
                continue
            _expect(wire, _BYTES)
            match number:
                case 1:
                    self._node(content, depth=depth)
                case 5:
                    self._initializer_bytes += len(content)
                    name = self._tensor(content)
                    if depth == 1:
                        self._initialized.add(name)
                case 15:
                    self._initializer_bytes += len(content)
                    name = self._sparse_tensor(content)
                    if depth == 1:
                        self._initialized.add(name)
                case 11 if depth == 1:
                    self._inputs.append(self._value(content))
                case 12 if depth == 1:
                    self._outputs.append(self._value(content))

    def _node(self, view: memoryview, *, depth: int) -> None:
        self._nodes += 1
        if self._nodes > limits.MAX_GRAPH_NODES:
            raise _refusal(f"the graph has more than {limits.MAX_GRAPH_NODES} nodes")
        names: dict[int, str] = {}
        for number, wire, _, content in self._fields(view):
            if number in (4, 7):
                _expect(wire, _BYTES)
                if number in names:
                    raise _refusal("a node names its operator twice")
                names[number] = _text(content)
            elif number == 5:
                _expect(wire, _BYTES)
                self._attribute(content, depth=depth)
        by_type = self._operators.setdefault(names.get(7, ""), {})
        operator = names.get(4, "")
        by_type[operator] = by_type.get(operator, 0) + 1

    def _attribute(self, view: memoryview, *, depth: int) -> None:
        for number, wire, _, content in self._fields(view):
            if number not in (5, 6, 10, 11, 22, 23):
                continue
            _expect(wire, _BYTES)
            if number in (5, 10):
                self._tensor(content)
            elif number in (6, 11):
                self._graph(content, depth=depth + 1)
            else:
                self._sparse_tensor(content)

    def _tensor(self, view: memoryview) -> str:
        name, external = "", False
        for number, wire, value, content in self._fields(view):
            if number == 8:
                _expect(wire, _BYTES)
                name = _text(content)
            elif number == 13:
                _expect(wire, _BYTES)
                external = True
            elif number == 14:
                _expect(wire, _VARINT)
                # Not only 1 is EXTERNAL: parsers cut the number to 32 bits before they compare it.
                external = external or value != 0
        if external:
            self._external.append(name)
        return name

    def _sparse_tensor(self, view: memoryview) -> str:
        name = ""
        for number, wire, _, content in self._fields(view):
            if number in (1, 2):
                _expect(wire, _BYTES)
                found = self._tensor(content)
                name = found if number == 1 else name
        return name

    def _value(self, view: memoryview) -> OnnxValue:
        """ValueInfoProto: its name, and of its type the tensor's element type and shape."""
        name, elem_type = "", 0
        shape: list[int] = []
        for number, wire, _, content in self._fields(view):
            if number == 1:
                _expect(wire, _BYTES)
                name = _text(content)
            elif number == 2:
                _expect(wire, _BYTES)
                for inner, inner_wire, _, tensor in self._fields(content):
                    if inner == 1:
                        _expect(inner_wire, _BYTES)
                        elem_type, shape = self._tensor_type(tensor)
        return OnnxValue(name=name, elem_type=elem_type, shape=tuple(shape))

    def _tensor_type(self, view: memoryview) -> tuple[int, list[int]]:
        elem_type = 0
        shape: list[int] = []
        for number, wire, value, content in self._fields(view):
            if number == 1:
                _expect(wire, _VARINT)
                elem_type = value
            elif number == 2:
                _expect(wire, _BYTES)
                for inner, inner_wire, _, dimension in self._fields(content):
                    if inner == 1:
                        _expect(inner_wire, _BYTES)
                        shape.append(self._dimension(dimension))
        return elem_type, shape

    def _dimension(self, view: memoryview) -> int:
        size = -1
        for number, wire, value, _ in self._fields(view):
            if number == 1:
                _expect(wire, _VARINT)
                size = value if 0 < value < 2**63 else -1
        return size


def _expect(wire: int, wanted: int) -> None:
    if wire != wanted:
        raise _refusal("a field has another type than ONNX gives it")
