"""Models that nobody may load, by name: what each is, for which runtime it claims to be, and what its refusal says.

The ONNX ones are made with onnx, so they need it installed; the LiteRT ones with tests/fakes/flatbuffers.py.
"""

from __future__ import annotations

import functools
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from tests.fakes import flatbuffers as fb

FLOAT: Final = 1


@dataclass(frozen=True)
class Hostile:
    """One file and the words that its refusal must hold."""

    runtime: Literal["onnx", "litert"]
    make: Callable[[], bytes]
    says: str


# LiteRT

ADD: Final = 0
CUSTOM: Final = 32
DELEGATE: Final = 51
WHILE: Final = 119
STABLEHLO_CUSTOM_CALL: Final = 173


def tensor(**changes: Any) -> dict[int, Any]:
    """A float32 tensor of one row of two."""
    fields: dict[int, Any] = {0: fb.vector(1, 2), 1: fb.i8(0), 2: fb.i32(0), 3: "x"}
    return fields | {int(key.removeprefix("f")): value for key, value in changes.items()}


def operator(**changes: Any) -> dict[int, Any]:
    """x + x, with options of the kind 11 (AddOptions)."""
    fields: dict[int, Any] = {0: fb.i32(0), 1: fb.vector(0, 0), 2: fb.vector(1), 3: fb.i8(11), 4: {0: fb.i8(0)}}
    return fields | {int(key.removeprefix("f")): value for key, value in changes.items()}


def graph(*operators: dict[int, Any], tensors: tuple[dict[int, Any], ...] = ()) -> dict[int, Any]:
    """A graph from its first tensor to its second one."""
    return {
        0: list(tensors or (tensor(), tensor(f3="y"))),
        1: fb.vector(0),
        2: fb.vector(1),
        3: list(operators or (operator(),)),
        4: "main",
    }


def litert(*graphs: dict[int, Any], code: int = ADD, **changes: Any) -> bytes:
    """A whole file with one operator code."""
    fields: dict[int, Any] = {
        0: fb.i32(3),
        1: [{0: fb.i8(min(code, 127)), 3: fb.i32(code)}],
        2: list(graphs or (graph(),)),
        3: "made by a test",
        4: [{}],
    }
    return fb.write(fields | {int(key.removeprefix("f")): value for key, value in changes.items()})


def calling(body: int) -> dict[int, Any]:
    """WhileOptions: condition and body are this graph."""
    return operator(f3=fb.i8(93), f4={0: fb.i32(body), 1: fb.i32(body)})


def _shared_bomb() -> bytes:
    """One graph of many operators, named a hundred thousand times by a vector of offsets to the same place."""
    file = bytearray(litert(graph(*[operator()] * 200)))
    # The graph's table is what the only entry of field 2 points to; append a long vector that names it again and again.
    whole = memoryview(file)
    root = int.from_bytes(whole[:4], "little")
    vtable = root - int.from_bytes(whole[root : root + 4], "little", signed=True)
    field = root + int.from_bytes(whole[vtable + 8 : vtable + 10], "little")
    entry = field + int.from_bytes(whole[field : field + 4], "little") + 4
    target = entry + int.from_bytes(whole[entry : entry + 4], "little")
    del whole
    # Offsets only point forwards, so the graph is copied behind the vector: everything it names lies behind it as well.
    tail = bytes(file[target - 64 :])
    file.extend(bytes(-len(file) % 8))
    count = 100_000
    at = len(file)
    file[field : field + 4] = (at - field).to_bytes(4, "little")
    begin = at + 4 + 4 * count
    begin += (target - 64 - begin) % 8
    file.extend(count.to_bytes(4, "little"))
    for index in range(count):
        place = at + 4 + 4 * index
        file.extend((begin + 64 - place).to_bytes(4, "little"))
    file.extend(bytes(begin - len(file)) + tail)
    return bytes(file)


LITERT: Final[Mapping[str, Hostile]] = {
    "a custom operator": Hostile(
        "litert", lambda: litert(f1=[{0: fb.i8(CUSTOM), 1: "FlexSave", 3: fb.i32(CUSTOM)}]), "FlexSave"
    ),
    "a custom operator without a name": Hostile("litert", lambda: litert(code=CUSTOM), "not admitted"),
    "a delegate": Hostile("litert", lambda: litert(code=DELEGATE), "not admitted"),
    "a call into another library": Hostile("litert", lambda: litert(code=STABLEHLO_CUSTOM_CALL), "not admitted"),
    "an operator of the future": Hostile("litert", lambda: litert(code=100_000), "not admitted"),
    "custom options": Hostile(
        "litert", lambda: litert(graph(operator(f5=fb.Vector("<B", (1, 2))))), "only custom operators"
    ),
    "options far behind the file": Hostile("litert", lambda: litert(graph(operator(f9=fb.u64(10**6)))), "custom"),
    "a constant outside": Hostile(
        "litert", lambda: litert(f4=[{}, {1: fb.u64(4096), 2: fb.u64(64)}]), "outside the flatbuffer"
    ),
    "an external buffer": Hostile(
        "litert", lambda: litert(graph(tensors=(tensor(f10=fb.i32(1)), tensor(f3="y")))), "another file"
    ),
    "external buffers": Hostile("litert", lambda: litert(f9=[{0: fb.i32(1)}]), "another file"),
    "a constant that is too short": Hostile(
        "litert",
        lambda: litert(graph(tensors=(tensor(f2=fb.i32(1)), tensor(f3="y"))), f4=[{}, {0: fb.Vector("<B", (1, 2, 3))}]),
        "3 bytes where its tensor takes 8",
    ),
    "a constant that does not exist": Hostile(
        "litert", lambda: litert(graph(tensors=(tensor(f2=fb.i32(7)), tensor(f3="y")))), "does not exist"
    ),
    "a tensor of a terabyte": Hostile(
        "litert", lambda: litert(graph(tensors=(tensor(f0=fb.vector(2**20, 2**18)), tensor(f3="y")))), "bytes is not"
    ),
    "a tensor with a negative size": Hostile(
        "litert", lambda: litert(graph(tensors=(tensor(f0=fb.vector(1, -5)), tensor(f3="y")))), "shape"
    ),
    "an input that is missing": Hostile("litert", lambda: litert(graph(operator(f1=fb.vector(0, -1)))), "exist"),
    "an output elsewhere": Hostile("litert", lambda: litert(graph(operator(f2=fb.vector(2**30)))), "does not exist"),
    "an operator code elsewhere": Hostile("litert", lambda: litert(graph(operator(f0=fb.i32(9)))), "does not exist"),
    "a loop that runs itself": Hostile("litert", lambda: litert(graph(calling(0)), code=WHILE), "runs itself"),
    "two loops that run each other": Hostile(
        "litert", lambda: litert(graph(calling(1)), graph(calling(0)), code=WHILE), "runs itself"
    ),
    "a loop over nothing": Hostile("litert", lambda: litert(graph(calling(5)), code=WHILE), "does not exist"),
    "a scale of zero": Hostile(
        "litert",
        lambda: litert(graph(tensors=(tensor(f4={2: fb.Vector("<f", (0.0,))}), tensor(f3="y")))),
        "no positive number",
    ),
    "scales for another axis": Hostile(
        "litert",
        lambda: litert(graph(tensors=(tensor(f4={2: fb.Vector("<f", (1.0, 1.0, 1.0))}), tensor(f3="y")))),
        "one scale",
    ),
    "an offset behind the end": Hostile("litert", lambda: litert(f2=fb.Raw(2**31)), "outside the file"),
    "an offset to itself": Hostile("litert", lambda: litert(f2=fb.Raw(0)), "outside the file"),
    "a field of the future": Hostile("litert", lambda: litert(graph({**operator(), 20: fb.i32(1)})), "newer schema"),
    "a graph named a hundred thousand times": Hostile("litert", _shared_bomb, "more parts"),
    "half a file": Hostile("litert", lambda: litert()[:100], "damaged"),
    "an older schema": Hostile("litert", lambda: litert(f0=fb.i32(2)), "schema version"),
    "no graph": Hostile("litert", lambda: litert(f2=[]), "no graph"),
    "an ONNX file": Hostile("litert", lambda: onnx_file(), "no LiteRT model"),
}


# Files that are no graphs


class _Payload:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (exec, ("raise SystemExit('a pickle was opened')",))


def _archive(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, pickle.dumps(_Payload()))
    return out.getvalue()


FOREIGN: Final[Mapping[str, Hostile]] = {
    **{
        f"a pickle of protocol {protocol}": Hostile(
            "onnx", functools.partial(pickle.dumps, _Payload(), protocol), "pickle"
        )
        for protocol in (0, 2, 3, 4, 5)
    },
    "a PyTorch archive": Hostile("onnx", lambda: _archive("archive/data.pkl"), "an archive"),
    "a Keras archive with a Lambda": Hostile("litert", lambda: _archive("config.json"), "an archive"),
    "an HDF5 file": Hostile("onnx", lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "SafeTensors": Hostile("onnx", lambda: (64).to_bytes(8, "little") + b'{"w":{}}' + bytes(64), "SafeTensors"),
    "a program": Hostile("onnx", lambda: b"\x7fELF" + bytes(64), "a program"),
    "a script": Hostile("onnx", lambda: b"#!/bin/sh\nexit 1\n", "a script"),
    "a compressed model": Hostile("onnx", lambda: b"\x1f\x8b\x08" + bytes(32), "compressed"),
    "ONNX Runtime's own format": Hostile("onnx", lambda: bytes(4) + b"ORTM" + bytes(32), "own format"),
    "a LiteRT file": Hostile("onnx", lambda: litert(), "a LiteRT model"),
    "nothing": Hostile("onnx", lambda: b"", "0 bytes"),
}


# ONNX


def onnx_file(*nodes: Any, initializers: tuple[Any, ...] = (), domain: str = "", **fields: Any) -> bytes:
    """A model from x to y, both rows of two; x + w if no nodes are given."""
    from onnx import helper

    made = helper.make_graph(
        list(nodes) or [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 2])],
        list(initializers) or [helper.make_tensor("w", FLOAT, [2], [1.0, 2.0])],
    )
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    data: bytes = helper.make_model(made, opset_imports=opsets, **fields).SerializeToString()
    return data


def external(location: str, *, flagged: bool = True) -> bytes:
    """A model whose weights lie in another file."""
    import onnx
    from onnx import helper

    made = helper.make_tensor("w", FLOAT, [2], [1.0, 2.0])
    made.ClearField("float_data")
    entry = made.external_data.add()
    entry.key, entry.value = "location", location
    if flagged:
        made.data_location = onnx.TensorProto.EXTERNAL
    return onnx_file(initializers=(made,))


def _custom(domain: str, name: str) -> bytes:
    from onnx import helper

    return onnx_file(helper.make_node(name, ["x"], ["y"], domain=domain), domain=domain)


def _deep(depth: int) -> bytes:
    from onnx import helper

    made = helper.make_graph([], "g", [], [helper.make_tensor_value_info("y", FLOAT, [2])])
    for _ in range(depth):
        node = helper.make_node("If", ["c"], ["y"], then_branch=made, else_branch=made)
        made = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("y", FLOAT, [2])])
    return onnx_file(helper.make_node("If", ["c"], ["y"], then_branch=made, else_branch=made))


def _function() -> bytes:
    from onnx import helper

    node = helper.make_node("Add", ["x", "x"], ["y"])
    made = helper.make_function("", "F", ["x"], ["y"], [node], [helper.make_opsetid("", 18)])
    return onnx_file(functions=[made])


ONNX: Final[Mapping[str, Hostile]] = {
    **{
        f"external data at {location}": Hostile("onnx", functools.partial(external, location), "another file")
        for location in ("/etc/passwd", "../../secret", "weights.bin", "hardlink.bin", "/proc/self/mem", "/dev/zero")
    },
    "external data without its flag": Hostile("onnx", lambda: external("w.bin", flagged=False), "another file"),
    "an operator of a foreign domain": Hostile("onnx", lambda: _custom("evil.example", "Run"), "not admitted"),
    "an extension that loads Python": Hostile("onnx", lambda: _custom("ai.onnx.contrib", "PyOp"), "not admitted"),
    "a Microsoft operator off the list": Hostile("onnx", lambda: _custom("com.microsoft", "EPContext"), "not admitted"),
    "subgraphs without end": Hostile("onnx", lambda: _deep(12), "nest"),
    "functions": Hostile("onnx", _function, "functions of its own"),
    "half a file": Hostile("onnx", lambda: onnx_file()[:40], "ends in the middle"),
    "a length past the end": Hostile("onnx", lambda: b"\x08\x08" + b"\x3a\xff\xff\xff\xff\x0f", "ends in the middle"),
    "two graphs": Hostile("onnx", lambda: onnx_file() + onnx_file(), "graphs where one belongs"),
}
