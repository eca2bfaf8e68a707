"""What applications ask of the door and what they get: the headers of frames.

A request's tensors are in the frame's payload; the header describes them. Every answer says where it came from.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from shared import limits
from shared.errors import InputRefused
from shared.model import ITEM_BYTES, DType, Signature

Rung = Literal["full", "smaller", "cached", "cloud", "refused"]
"""The step of the degradation ladder that an answer came from."""

RequestId = Annotated[str, msgspec.Meta(max_length=limits.MAX_REQUEST_ID_CHARS)]
"""The caller's name for a request; checked where requests are decoded."""


class TensorHead(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor in a frame: the payload holds `prod(shape) * item size` bytes of it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


class Infer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="infer", tag_field="type"):
    """Ask a model.

    Attributes:
        id: the caller's name for this request; answers and feedback refer to it. Unique per connection's lifetime
            is enough for answers, unique per device for feedback; empty lets the agent choose.
        model: family.
        inputs: heads of the payload's tensors, in order.
        deadline_ms: the answer is wanted this many milliseconds after the request was read; an hour at most.
        version: of the release that must answer; empty for whichever serves, or the hub's larger model.
        outputs: names of outputs without which an answer is of no use; empty for none in particular.
    """

    model: str
    inputs: tuple[TensorHead, ...]
    id: RequestId = ""
    deadline_ms: int = 1000
    version: str = ""
    outputs: tuple[str, ...] = ()


class Feedback(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="feedback", tag_field="type"):
    """Tell what was true of an answer: a label, or whether it was correct, or a business figure."""

    request: RequestId
    id: RequestId = ""
    label: str | None = None
    correct: bool | None = None
    value: float | None = None


class Teach(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="teach", tag_field="type"):
    """Hand over a labelled sample to learn from; it stays on the device. `inputs` are one row of what `model` takes."""

    model: str
    inputs: tuple[TensorHead, ...]
    label: str
    id: RequestId = ""


class Measure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="reading", tag_field="type"):
    """Hand over a reading for the hub."""

    name: str
    value: float
    id: RequestId = ""


class Describe(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="describe", tag_field="type"):
    """Ask what a model takes and gives; empty `model` lists all."""

    id: RequestId = ""
    model: str = ""


class Late(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="late", tag_field="type"):
    """Fetch the hub's answer to an earlier request, which came after that request had to be answered without it.

    Answered by an Answer with this request's id, or by Done, whose detail is `pending` or `none`.
    """

    request: RequestId
    id: RequestId = ""


class Status(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="status", tag_field="type"):
    """Ask how the agent is."""

    id: RequestId = ""


class Control(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="control", tag_field="type"):
    """A command of `outrider-agent` to the daemon: `queue.flush`, `queue.drop`, `samples.drop`, `model.rollback`."""

    command: str
    id: RequestId = ""
    argument: str = ""


Request = Infer | Late | Feedback | Teach | Measure | Describe | Status | Control


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="answer", tag_field="type"):
    """What a model said, and where it came from.

    Attributes:
        id: the request's.
        model, version, variant, digest: what answered; `digest` is the served file's SHA-256.
        rung: step of the ladder.
        labels, confidences: one per row for classification; empty for raw models. Confidence is the greatest softmax
            probability, 0 to 1.
        degraded: whether a better rung was wanted and could not be had.
        escalated: whether the hub's larger model was wanted, empty for no, and what became of it: `answered`, or why
            not: `late`, `refused`, `offline`, `budget`, `breaker`, `no_time`.
        reason: why it is this rung, in words; empty where there is nothing to tell.
        deadline_met: whether the answer left the agent in time.
        took_us: from the request being read to the answer being ready.
        outputs: heads of the payload's tensors, in order.
    """

    id: str
    model: str
    version: str
    variant: str
    digest: str
    rung: Rung
    labels: tuple[str, ...]
    confidences: tuple[float, ...]
    outputs: tuple[TensorHead, ...]
    took_us: int
    degraded: bool = False
    deadline_met: bool = True
    reason: str = ""
    escalated: str = ""


class Done(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="done", tag_field="type"):
    """A feedback, reading or command was accepted (and is durable, where it is a record)."""

    id: str
    detail: str = ""


class Refusal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="refusal", tag_field="type"):
    """The request was not answered: whose fault, why, and what to do.

    Attributes:
        code: stable (`model.input`, `model.unknown`, `overload`, `deadline`).
        retry: whether the same request can succeed later.
    """

    id: str
    code: str
    message: str
    hint: str = ""
    retry: bool = False


class ModelState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model as the door describes it.

    Attributes:
        together: the other families that its candidate changes with, or that its release came with; empty when alone.
        signature: None while nothing serves.
    """

    family: str
    phase: str
    version: str = ""
    variant: str = ""
    digest: str = ""
    candidate: str = ""
    error_code: str = ""
    error: str = ""
    signature: Signature | None = None
    labels: tuple[str, ...] = ()
    together: tuple[str, ...] = ()


class Description(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="description", tag_field="type"):
    """Answer to Describe."""

    id: str
    models: tuple[ModelState, ...]


class AgentState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="agent", tag_field="type"):
    """Answer to Status.

    Attributes:
        link: `online`, `connecting`, `offline`.
        link_detail: why the link is not online.
        queue: waiting records by class name.
        queue_bytes: what the outbox takes on the disk.
        queue_oldest_ms: how long the oldest has waited, by class name; absent where none waits.
        queue_lost: records that will not reach the hub, by reason, since the store was made.
        queue_buried: batches that were put aside because nobody takes them.
        queue_buried_given_up: of those, how many went to make room since the start.
        queue_unkept: records by class that nobody waited for and that the disk did not take, since the start.
        queue_written_bytes, queue_syncs: what the outbox has cost the disk since the start.
        assignment_version: newest assignment accepted, 0 for none.
        escalations: how often the hub's larger model was wanted since the start, by what became of it.
        time_ms: the trusted time, by which expiry and certificates are judged; 0 from an agent that keeps none.
        time_basis: `attested` by the hub since the start; `floor`, later than the system clock; `clock`, unproven.
        time_detail: why the hub's last answer brought no time.
        clock_error_ms: how far the system clock is ahead of the trusted time (behind, when negative).
        assignment_waits: why an assignment waits for the time; empty when none does.
        updates: bytes fetched for releases in the last 24 hours (`day_bytes`) and ever, what is left of a budget
            (`daily_bytes`, `left_bytes`, only where there is one), and what became of patches.
        results_lost: results since the start that were never recorded, because the disk was too slow or refused.
        certificate_expires_ms, certificate_due_ms: when the device's certificate ends, and when it is to be renewed,
            milliseconds since 1970; 0 while nobody has looked into it.
        certificate_trouble, certificate_todo: why it was not renewed and what to do; empty when nothing is wrong.
    """

    id: str
    device: str
    agent_version: str
    profile: str
    boot: int
    pid: int
    uptime_ms: int
    link: str
    models: tuple[ModelState, ...]
    queue: dict[str, int]
    queue_bytes: int
    assignment_version: int
    link_detail: str = ""
    answered: int = 0
    refused: int = 0
    hosts: dict[str, int] = {}
    escalations: dict[str, int] = {}
    queue_oldest_ms: dict[str, int] = {}
    queue_lost: dict[str, int] = {}
    queue_buried: int = 0
    queue_buried_given_up: int = 0
    queue_unkept: dict[str, int] = {}
    queue_written_bytes: int = 0
    queue_syncs: int = 0
    results_lost: int = 0
    time_ms: int = 0
    time_basis: str = ""
    time_detail: str = ""
    clock_error_ms: int = 0
    assignment_waits: str = ""
    updates: dict[str, int] = {}
    certificate_expires_ms: int = 0
    certificate_due_ms: int = 0
    certificate_trouble: str = ""
    certificate_todo: str = ""


Reply = Answer | Done | Refusal | Description | AgentState

_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_encoder = msgspec.msgpack.Encoder()


def encode_header(header: Request | Reply) -> bytes:
    """The frame header's bytes."""
    return _encoder.encode(header)


def decode_request(data: bytes | bytearray | memoryview) -> Request:
    """Parse a request's header; raises InputRefused, which goes back to the caller."""
    try:
        request = _request_decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InputRefused(f"the request's header does not parse: {error}", code="model.request") from error
    if isinstance(request, Measure) and not math.isfinite(request.value):
        raise InputRefused(
            f"the reading's value is {request.value}, which is no number to keep",
            code="invalid.reading",
            hint="give a finite number; leave out a reading that could not be taken",
        )
    if isinstance(request, Infer) and request.deadline_ms > limits.MAX_REQUEST_DEADLINE_MS:
        return msgspec.structs.replace(request, deadline_ms=limits.MAX_REQUEST_DEADLINE_MS)
    return request


def decode_reply(data: bytes | bytearray | memoryview) -> Reply:
    """Parse a reply's header; raises InputRefused when the agent is of a version that this client cannot read."""
    try:
        return _reply_decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise InputRefused(
            f"the reply does not parse: {error}", code="model.reply", hint="update the client to the agent's version"
        ) from error


def tensor_bytes(head: TensorHead) -> int:
    """How many bytes of the payload belong to this tensor."""
    return math.prod(head.shape) * ITEM_BYTES[head.dtype]


def check_heads(inputs: tuple[TensorHead, ...], payload_bytes: int) -> None:
    """Raise InputRefused unless these are tensors that fill the payload; for a model whose signature is not known."""
    if not 0 < len(inputs) <= limits.MAX_TENSORS:
        raise InputRefused(f"{len(inputs)} inputs were sent, 1 to {limits.MAX_TENSORS} are possible")
    for head in inputs:
        if len(head.shape) > limits.MAX_TENSOR_RANK or any(size <= 0 for size in head.shape):
            raise InputRefused(
                f"input {head.name[:80]!r} has shape {list(head.shape)[: limits.MAX_TENSOR_RANK + 1]}",
                hint=f"send up to {limits.MAX_TENSOR_RANK} axes, each with at least one element",
            )
    total = sum(tensor_bytes(head) for head in inputs)
    if total != payload_bytes:
        raise InputRefused(
            f"the inputs' shapes need {total} bytes, {payload_bytes} were sent",
            hint="send the elements of every input, row-major, in the header's order and nothing else",
        )


def check_inputs(signature: Signature, inputs: tuple[TensorHead, ...], payload_bytes: int) -> int:
    """Hold a request against the declared signature, without looking at the elements.

    Returns:
        The number of rows: the size of the first input's first axis, 1 for a scalar.

    Raises:
        InputRefused: naming the input, what came and what was expected. Nothing is broken by it.
    """
    if len(inputs) > limits.MAX_TENSORS:
        raise InputRefused(
            f"{len(inputs)} inputs exceed {limits.MAX_TENSORS}", hint=f"the model takes {len(signature.inputs)}"
        )
    specs = {spec.name: spec for spec in signature.inputs}
    names = [head.name for head in inputs]
    if sorted(names) != sorted(specs):
        raise InputRefused(
            f"inputs {sorted(names)} were sent, {sorted(specs)} are expected",
            hint=f"name the inputs exactly {sorted(specs)}",
        )
    total = 0
    for head in inputs:
        spec = specs[head.name]
        expected = f"{spec.dtype}{list(spec.shape)}".replace("-1", "any")
        if head.dtype != spec.dtype:
            raise InputRefused(
                f"input {head.name!r} is {head.dtype}, expected {expected}", hint=f"convert it to {spec.dtype}"
            )
        fits = len(head.shape) == len(spec.shape) and all(
            got > 0 and want in (-1, got) for want, got in zip(spec.shape, head.shape, strict=True)
        )
        if not fits:
            raise InputRefused(
                f"input {head.name!r} has shape {list(head.shape)}, expected {expected}",
                hint=f"send as many axes as {expected} has, each of its size; every axis needs at least one element",
            )
        total += tensor_bytes(head)
    if total != payload_bytes:
        raise InputRefused(
            f"the inputs' shapes need {total} bytes, {payload_bytes} were sent",
            hint="send the elements of every input, row-major, in the header's order and nothing else",
        )
    first = inputs[0].shape
    return first[0] if first else 1
