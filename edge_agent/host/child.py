"""The model host's life: bind to the core, import, give up rights, load, check, answer, end.

Single-threaded and blocking: it reads a frame, runs the model, writes a frame. It ends when the core closes the
socket, asks it to stop, or dies. Whatever a model does in here, the core only sees a frame, a failure, or the end of
the stream.
"""

from __future__ import annotations

import socket

from edge_agent.host import confine, protocol
from edge_agent.host.pipe import Pipe, read_file
from edge_agent.host.session import Session
from edge_agent.runtimes import find_loader
from shared import limits
from shared.errors import ModelError, OutriderError, ProtocolViolation
from shared.model import Manifest, Variant, decode_manifest
from shared.model_gate import check_model
from shared.tensors import from_wire, to_wire
from shared.wire.golden import decode_golden


def serve(*, link: socket.socket, model_fd: int, golden_fd: int, parent: int, niceness: int) -> None:
    """Do all of it; returns when the core has no more use for this process."""
    pipe = Pipe(link)
    frame = pipe.receive()
    if frame is None:
        return
    request, manifest_json = protocol.decode_to_host(frame[0]), frame[1]
    if not isinstance(request, protocol.Load):
        raise ProtocolViolation("the first frame must be Load", code="protocol.host")
    try:
        session, loaded = _load(
            request, bytes(manifest_json), model_fd=model_fd, golden_fd=golden_fd, parent=parent, niceness=niceness
        )
    except OutriderError as error:
        pipe.send(protocol.encode(protocol.LoadFailed(code=error.code, message=error.message, hint=error.hint)))
        return
    pipe.send(protocol.encode(loaded))
    while (frame := pipe.receive()) is not None:
        request, payload = protocol.decode_to_host(frame[0]), frame[1]
        match request:
            case protocol.Run():
                _answer(pipe, session, request, payload)
            case protocol.Probe():
                pipe.send(protocol.encode(protocol.Probed(id=request.id, agreed=session.probe())))
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
    model = read_file(model_fd, length=variant.file.length, at_most=limits.MAX_MODEL_BYTES)
    golden = read_file(golden_fd, length=manifest.golden.file.length, at_most=limits.MAX_GOLDEN_BYTES)
    check_model(model, runtime=variant.runtime)
    session = Session(manifest=manifest, variant=variant, engine=loader(model, threads=request.threads))
    agreement = session.check_golden(decode_golden(golden, manifest.signature))
    del model, golden
    confine.return_free_memory()
    return session, protocol.Loaded(agreement=agreement, rss_bytes=confine.rss_bytes(), network=network)


def _answer(pipe: Pipe, session: Session, request: protocol.Run, payload: bytearray) -> None:
    try:
        outcome = session.run(from_wire(request.inputs, payload), rows=request.rows)
        heads, views = to_wire(outcome.outputs)
    except ModelError as error:
        failed = protocol.RunFailed(id=request.id, code=error.code, message=error.message, hint=error.hint)
        pipe.send(protocol.encode(failed))
        return
    answer = protocol.Ran(id=request.id, labels=outcome.labels, confidences=outcome.confidences, outputs=heads)
    try:
        pipe.send(protocol.encode(answer), views)
    except ProtocolViolation as error:
        pipe.send(protocol.encode(protocol.RunFailed(id=request.id, code="model.output", message=error.message)))


def _variant(manifest: Manifest, name: str) -> Variant:
    for variant in manifest.variants:
        if variant.name == name:
            return variant
    raise ModelError(f"the release has no variant {name!r}", code="model.variant")
