"""What the core and a model host say to each other: headers of the frames on their socket pair.

    core                            host
    Load + manifest JSON    ->
                            <-      Loaded | LoadFailed (and ends)
    Run + inputs            ->      any number may be on the way; the host answers in order
                            <-      Ran + outputs | RunFailed
    Probe                   ->
                            <-      Probed
    Stop                    ->      answers what was sent before, then ends

The end of the stream, on either side, means that the other is gone. Nothing here knows numpy: the core imports it.
"""

from __future__ import annotations

import msgspec

from shared.errors import ProtocolViolation
from shared.inference import TensorHead


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load", tag_field="type"):
    """Load one variant; the payload is the manifest, the model and the golden set come as descriptors."""

    variant: str
    threads: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded", tag_field="type"):
    """The model is loaded, warm and has passed its golden check.

    Attributes:
        agreement: share of golden rows, 0 to 1, on which it gave the recorded answer.
        rss_bytes: resident size of the host now.
        network: whether the host could still reach the network; False where the kernel let it give that up.
    """

    agreement: float
    rss_bytes: int
    network: bool


class LoadFailed(msgspec.Struct, frozen=True, kw_only=True, tag="load_failed", tag_field="type"):
    """The model is not served; the host ends."""

    code: str
    message: str
    hint: str = ""


class Run(msgspec.Struct, frozen=True, kw_only=True, tag="run", tag_field="type"):
    """Run the model on `rows` rows; the payload holds the inputs' elements."""

    id: int
    inputs: tuple[TensorHead, ...]
    rows: int


class Ran(msgspec.Struct, frozen=True, kw_only=True, tag="ran", tag_field="type"):
    """The model's answer; the payload holds the outputs' elements."""

    id: int
    labels: tuple[str, ...]
    confidences: tuple[float, ...]
    outputs: tuple[TensorHead, ...]


class RunFailed(msgspec.Struct, frozen=True, kw_only=True, tag="run_failed", tag_field="type"):
    """This request has no answer; the next one may."""

    id: int
    code: str
    message: str
    hint: str = ""


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag="probe", tag_field="type"):
    """Answer a golden sample once more."""

    id: int


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag="probed", tag_field="type"):
    """Whether the answer was the one given when the model was loaded."""

    id: int
    agreed: bool


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop", tag_field="type"):
    """End after what was asked before."""


ToHost = Load | Run | Probe | Stop
FromHost = Loaded | LoadFailed | Ran | RunFailed | Probed

_to_host: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost)
_from_host: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(FromHost)
_encoder = msgspec.msgpack.Encoder()


def encode(header: ToHost | FromHost) -> bytes:
    """The header's bytes."""
    return _encoder.encode(header)


def decode_to_host(data: bytes) -> ToHost:
    """Parse what the core sent; raises ProtocolViolation."""
    try:
        return _to_host.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolViolation(f"the core's frame does not parse: {error}", code="protocol.host") from error


def decode_from_host(data: bytes) -> FromHost:
    """Parse what the host sent, which may be hostile: it holds the model; raises ProtocolViolation."""
    try:
        return _from_host.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ProtocolViolation(f"the model host's frame does not parse: {error}", code="protocol.host") from error
