"""What the core and a trainer say to each other: headers of the frames on their socket pair.

    core                            trainer
    Load + manifest JSON    ->
                            <-      Loaded | LoadFailed (and ends)
    Feed + samples          ->      features are computed at once; not answered
    Learn + labels, head    ->      one at a time
                            <-      Learned + head | LearnFailed
    Stop                    ->      ends

The end of the stream, on either side, means that the other is gone. Nothing here knows numpy: the core imports it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from shared.errors import ProtocolViolation
from shared.inference import TensorHead


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load", tag_field="type"):
    """Load one variant; the payload is the manifest, the model comes as a descriptor.

    Attributes:
        features: the model's output that is learned from.
    """

    variant: str
    features: str
    threads: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded", tag_field="type"):
    """The model is loaded. `network`: whether the trainer could still reach the network."""

    rss_bytes: int
    network: bool


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag="load_failed", tag_field="type"):
    """Nothing is learned from this; the trainer ends."""

    code: str
    message: str
    hint: str = ""


class Feed(msgspec.Struct, frozen=True, kw_only=True, tag="feed", tag_field="type"):
    """Samples of the same shapes; the payload holds one after the other, each with all its inputs.

    Attributes:
        numbers, labels: of each sample.
        inputs: heads of each sample's tensors.
        forget_before: samples with lower numbers are kept no longer.
    """

    numbers: tuple[int, ...]
    labels: tuple[str, ...]
    inputs: tuple[TensorHead, ...]
    forget_before: int


class ArrayHead(msgspec.Struct, frozen=True, kw_only=True):
    """An array in a payload: what it says it is, and how many bytes of `.npy` belong to it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    length: int


class Learn(msgspec.Struct, frozen=True, kw_only=True, tag="learn", tag_field="type"):
    """A lesson; the payload holds the labels as JSON, then the arrays.

    Attributes:
        labels_bytes: length of the labels' JSON.
        arrays: the head: weight, then bias.
    """

    id: int
    kind: Literal["train", "evaluate"]
    labels_bytes: int
    arrays: tuple[ArrayHead, ...]
    learning_rate: float
    epochs: int
    batch_size: int
    seed: int


class Learned(msgspec.Struct, frozen=True, kw_only=True, tag="learned", tag_field="type"):
    """What the lesson came to; the payload holds the arrays, none when it was only measured."""

    id: int
    arrays: tuple[ArrayHead, ...]
    metrics: dict[str, float]


class LearnFailed(msgspec.Struct, frozen=True, kw_only=True, tag="learn_failed", tag_field="type"):
    """This lesson came to nothing; the next one may."""

    id: int
    code: str
    message: str
    hint: str = ""


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop", tag_field="type"):
    """End."""


ToTrainer = Load | Feed | Learn | Stop
FromTrainer = Loaded | LoadFailed | Learned | LearnFailed

_to_trainer: msgspec.msgpack.Decoder[ToTrainer] = msgspec.msgpack.Decoder(ToTrainer)
_from_trainer: msgspec.msgpack.Decoder[FromTrainer] = msgspec.msgpack.Decoder(FromTrainer)
_encoder = msgspec.msgpack.Encoder()


def encode(header: ToTrainer | FromTrainer) -> bytes:
    """The header's bytes."""
    return _encoder.encode(header)


def decode_to_trainer(data: bytes) -> ToTrainer:
    """Parse what the core sent; raises ProtocolViolation."""
    try:
        return _to_trainer.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"the core's frame does not parse: {error}", code="protocol.trainer") from error


def decode_from_trainer(data: bytes) -> FromTrainer:
    """Parse what the trainer sent, which may be hostile: it holds somebody's model; raises ProtocolViolation."""
    try:
        return _from_trainer.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"the trainer's frame does not parse: {error}", code="protocol.trainer") from error
