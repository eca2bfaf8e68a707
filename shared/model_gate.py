"""Admission by what a file is: the gate of the runtime that would load it, and a clear word on what is none of ours.

A pickle runs code when it is opened, and an archive can hold one; so what is not a plain graph is named and refused
before any library that could open it is near.
"""

from __future__ import annotations

from typing import Final, Literal

from shared.errors import InvalidValue
from shared.litert_gate import IDENTIFIER, check_litert
from shared.onnx_gate import check_onnx

Runtime = Literal["onnx", "litert"]

_EXPORT: Final = "export it as ONNX, or convert it to a .tflite file"

_FOREIGN: Final = (
    (b"PK\x03\x04", "an archive, as PyTorch (.pt), Keras (.keras) and NumPy (.npz) write them"),
    (b"PK\x05\x06", "an empty archive"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as older Keras versions write them"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a compressed file"),
    (b"BZh", "a compressed file"),
    (b"\xfd7zXZ\x00", "a compressed file"),
    (b"\x28\xb5\x2f\xfd", "a compressed file"),
    (b"GGUF", "a GGUF file"),
    (b"\x7fELF", "a program or a library"),
    (b"MZ", "a program or a library"),
    (b"#!", "a script"),
)
_PICKLES: Final = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_MAX_SAFETENSORS_HEADER: Final = 100_000_000


def check_model(data: bytes | bytearray | memoryview, *, runtime: Runtime) -> None:
    """Admit a file for a runtime; raises InvalidValue `model.admission` with what it is or holds, and what to do."""
    view = memoryview(data).cast("B")
    foreign = foreign_format(view, runtime=runtime)
    if foreign:
        raise InvalidValue(f"the file is {foreign}, not a graph for {runtime}", code="model.admission", hint=_EXPORT)
    if runtime == "onnx":
        check_onnx(view)
    else:
        check_litert(view)


def foreign_format(view: memoryview, *, runtime: Runtime) -> str:
    """What the file is, when it is plainly something else than a model of this runtime; empty otherwise."""
    head = bytes(view[:16])
    if head[4:8] == b"ORTM":
        return "a model in ONNX Runtime's own format"
    if head[4:8] == IDENTIFIER:
        return "" if runtime == "litert" else "a LiteRT model"
    # An ONNX file begins with a field of ModelProto, in practice its first one; none of these beginnings is one.
    for magic, name in _FOREIGN:
        if head.startswith(magic):
            return name
    if head.startswith(_PICKLES) or head[:1] == b"c" or head[:3] in (b"(lp", b"(dp", b"(ip"):
        return "a pickle, which runs code when it is opened"
    header = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and 0 < header <= _MAX_SAFETENSORS_HEADER:
        return "a SafeTensors file, which holds numbers without a graph"
    return ""
