"""The trainer's life: bind to the core, import, give up rights, load, take samples, learn, end.

Single-threaded and blocking, as a model host is, and nicer than anything that serves. It ends when the core closes
the socket, asks it to stop, or dies. Its deadline and its memory are watched by the core.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import msgspec

from edge_agent.core.lessons import BIAS, WEIGHT, CannotLearn
from edge_agent.host import confine
from edge_agent.host.pipe import Pipe, read_file
from edge_agent.runtimes import find_loader
from edge_agent.trainers import head, npy, protocol
from edge_agent.trainers.features import Features
from shared import limits
from shared.errors import ModelError, OutriderError, ProtocolViolation
from shared.model import decode_manifest
from shared.model_gate import check_model


def serve(*, link: socket.socket, model_fd: int, parent: int, niceness: int) -> None:
    """Do all of it; returns when the core has no more use for this process."""
    pipe = Pipe(link)
    frame = pipe.receive()
    if frame is None:
        return
    request = protocol.decode_to_trainer(frame[0])
    if not isinstance(request, protocol.Load):
        raise ProtocolViolation("the first frame must be Load", code="protocol.trainer")
    try:
        features, network = _load(request, bytes(frame[1]), model_fd=model_fd, parent=parent, niceness=niceness)
    except OutriderError as error:
        failed = protocol.LoadFailed(code=error.code, message=error.message, hint=error.hint)
        pipe.send(protocol.encode(failed))
        return
    pipe.send(protocol.encode(protocol.Loaded(rss_bytes=confine.rss_bytes(), network=network)))
    while (frame := pipe.receive()) is not None:
        request = protocol.decode_to_trainer(frame[0])
        match request:
            case protocol.Feed():
                features.forget_before(request.forget_before)
                features.feed(request.numbers, request.labels, request.inputs, frame[1])
            case protocol.Learn():
                _answer(pipe, features, request, frame[1])
            case protocol.Stop():
                return
            case protocol.Load():
                raise ProtocolViolation("a trainer loads one model", code="protocol.trainer")


def _load(
    request: protocol.Load, manifest_json: bytes, *, model_fd: int, parent: int, niceness: int
) -> tuple[Features, bool]:
    manifest = decode_manifest(manifest_json)
    variant = next((one for one in manifest.variants if one.name == request.variant), None)
    if variant is None:
        raise ModelError(f"the release has no variant {request.variant!r}", code="model.variant")
    loader = find_loader(variant.runtime)
    network = confine.give_up_rights(parent=parent, niceness=niceness)
    model = read_file(model_fd, length=variant.file.length, at_most=limits.MAX_MODEL_BYTES)
    check_model(model, runtime=variant.runtime)
    engine = loader(model, threads=request.threads)
    features = Features(manifest=manifest, engine=engine, output=request.features)
    del model
    confine.return_free_memory()
    return features, network


def _answer(pipe: Pipe, features: Features, request: protocol.Learn, payload: bytearray) -> None:
    try:
        heads, parts, metrics = _learn(features, request, payload)
    except ModelError as error:
        failed = protocol.LearnFailed(id=request.id, code=error.code, message=error.message, hint=error.hint)
        pipe.send(protocol.encode(failed))
        return
    pipe.send(protocol.encode(protocol.Learned(id=request.id, arrays=heads, metrics=metrics)), parts)


def _learn(
    features: Features, request: protocol.Learn, payload: bytearray
) -> tuple[tuple[protocol.ArrayHead, ...], Sequence[bytes], dict[str, float]]:
    view = memoryview(payload)
    labels = msgspec.json.decode(view[: request.labels_bytes], type=list[str])
    arrays, offset = {}, request.labels_bytes
    for array in request.arrays:
        part = view[offset : offset + array.length]
        arrays[array.name] = npy.read(part, shape=array.shape, what=array.name)
        offset += array.length
    if set(arrays) != {WEIGHT, BIAS}:
        raise CannotLearn(f"the head needs {WEIGHT!r} and {BIAS!r}")
    before = head.Head(arrays[WEIGHT], arrays[BIAS])
    rows, classes = features.select(labels, width=before.weight.shape[0])
    if request.kind == "evaluate":
        return (), (), head.measure(before, rows, classes)
    descent = head.Descent(
        learning_rate=request.learning_rate,
        epochs=request.epochs,
        batch_size=request.batch_size,
        seed=request.seed,
    )
    after = head.learn(before, rows, classes, descent)
    parts = [npy.write(after.weight), npy.write(after.bias)]
    heads = tuple(
        protocol.ArrayHead(name=name, dtype="float32", shape=array.shape, length=len(part))
        for (name, array), part in zip(((WEIGHT, after.weight), (BIAS, after.bias)), parts, strict=True)
    )
    return heads, parts, head.measure(after, rows, classes)
