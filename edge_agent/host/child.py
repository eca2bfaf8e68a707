"""The model host's life: bind to the core, import, give up rights, load, check, answer, end.

Single-threaded and blocking: it reads a frame, runs the model, writes a frame. It ends when the core closes the
socket, asks it to stop, or dies. Whatever a model does in here, the core only sees a frame, a failure, or the end of
the stream.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from edge_agent.framing import Buffer, FrameReader, build_frame
from edge_agent.host import confine, protocol
from edge_agent.host.session import Session
from edge_agent.runtimes import find_loader
from shared import limits
from shared.errors import ModelError, OutriderError, ProtocolViolation
from shared.model import Manifest, Variant, decode_manifest
from shared.onnx_gate import check_onnx
from shared.tensors import from_wire, to_wire
from shared.wire.golden import decode_golden


def serve(*, link: socket.socket, model_fd: int, golden_fd: int, parent: int, niceness: int) -> None:
    """Do all of it; returns when the core has no more use for this process."""
    stream = _Stream(link)
    frame = stream.receive()
    if frame is None:
        return
    request, manifest_json = frame
    if not isinstance(request, protocol.Load):
        raise ProtocolViolation("the first frame must be Load", code="protocol.host")
    try:
        session, loaded = _load(
            request, bytes(manifest_json), model_fd=model_fd, golden_fd=golden_fd, parent=parent, niceness=niceness
        )
    except OutriderError as error:
        stream.send(protocol.LoadFailed(code=error.code, message=error.message, hint=error.hint))
        return
    stream.send(loaded)
    while (frame := stream.receive()) is not None:
        request, payload = frame
        match request:
            case protocol.Run():
                _answer(stream, session, request, payload)
            case protocol.Probe():
                stream.send(protocol.Probed(id=request.id, agreed=session.probe()))
            case protocol.Stop():
                return
            case protocol.Load():
                raise ProtocolViolation("a host loads one model", code="protocol.host")


def _load(
    request: protocol.Load, manifest_json: bytes, *, model_fd: int, golden_fd: int, parent: int, niceness: int
) -> tuple[Session, protocol.Loaded]:
    manifest = decode_manifest(manifest_json)
    variant = _variant(manifest, request.variant)
    loader = find_loader(variant.runtime)
    network = confine.give_up_rights(parent=parent, niceness=niceness)
    model = _read(model_fd, length=variant.file.length, at_most=limits.MAX_MODEL_BYTES)
    golden = _read(golden_fd, length=manifest.golden.file.length, at_most=limits.MAX_GOLDEN_BYTES)
    if variant.runtime == "onnx":
        check_onnx(model)
    session = Session(manifest=manifest, variant=variant, engine=loader(model, threads=request.threads))
    agreement = session.check_golden(decode_golden(golden, manifest.signature))
    del model, golden
    confine.return_free_memory()
    return session, protocol.Loaded(agreement=agreement, rss_bytes=confine.rss_bytes(), network=network)


def _answer(stream: _Stream, session: Session, request: protocol.Run, payload: bytearray) -> None:
    try:
        outcome = session.run(from_wire(request.inputs, payload), rows=request.rows)
        heads, views = to_wire(outcome.outputs)
    except ModelError as error:
        stream.send(protocol.RunFailed(id=request.id, code=error.code, message=error.message, hint=error.hint))
        return
    answer = protocol.Ran(id=request.id, labels=outcome.labels, confidences=outcome.confidences, outputs=heads)
    try:
        stream.send(answer, views)
    except ProtocolViolation as error:
        stream.send(protocol.RunFailed(id=request.id, code="model.output", message=error.message))


def _variant(manifest: Manifest, name: str) -> Variant:
    for variant in manifest.variants:
        if variant.name == name:
            return variant
    raise ModelError(f"the release has no variant {name!r}", code="model.variant")


def _read(descriptor: int, *, length: int, at_most: int) -> bytes:
    """The whole file behind a descriptor, which is closed; never a path, so that nobody can swap the file."""
    if length > at_most:
        raise ModelError(f"a file of {length} bytes exceeds {at_most}", code="model.too_large")
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        file.seek(0)
        data = file.read(length + 1)
    if data is None or len(data) != length:
        raise ModelError(f"a file of {length} bytes was promised, another length was found", code="model.corrupt")
    return data


class _Stream:
    """Blocking frames on the socket pair."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._reader = FrameReader()

    def receive(self) -> tuple[protocol.ToHost, bytearray] | None:
        """The next frame; None when the core is gone."""
        while (frame := self._reader.next_frame()) is None:
            count = self._link.recv_into(self._reader.buffer())
            if count == 0:
                return None
            self._reader.received(count)
        header, payload = frame
        return protocol.decode_to_host(header), payload

    def send(self, header: protocol.FromHost, payload: Sequence[Buffer] = ()) -> None:
        """Send a frame; raises ProtocolViolation, with nothing sent, when it is too large."""
        for part in build_frame(protocol.encode(header), payload):
            self._link.sendall(part)
