"""What the clients make of requests and replies: arrays packed, answers unpacked, refusals raised. No sockets here."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from shared.errors import (
    ConfigError,
    Conflict,
    HostLost,
    InputRefused,
    InvalidValue,
    ModelError,
    OutriderError,
    ProtocolViolation,
    StorageError,
    StorageFull,
    TransferError,
    Unreachable,
)
from shared.inference import AgentState, Answer, Description, Done, Refusal, Reply, Rung, TensorHead
from shared.model import Signature

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_R = TypeVar("_R", Answer, Done, Description, AgentState)

_LEAVES: Final[Mapping[str, type[OutriderError]]] = {
    "config": ConfigError,
    "conflict": Conflict,
    "invalid": InvalidValue,
    "model": ModelError,
    "model.host_lost": HostLost,
    "model.input": InputRefused,
    "model.reply": InputRefused,
    "model.request": InputRefused,
    "protocol": ProtocolViolation,
    "storage": StorageError,
    "storage.full": StorageFull,
    "transfer": TransferError,
    "transfer.unreachable": Unreachable,
}


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, and where it came from.

    Attributes:
        id: what feedback refers to.
        label, confidence: of the first row; None and 0.0 for models that do not classify.
        labels, confidences: one per row.
        outputs: the model's declared outputs by name, as numpy arrays.
        model, version, variant, digest: what answered; `digest` is the served file's SHA-256.
        rung: step of the degradation ladder.
        degraded: whether a better rung was wanted and could not be had.
        escalated: whether the hub's larger model was wanted, empty for no, and what became of it: `answered`, or why
            not: `late`, `refused`, `offline`, `budget`, `breaker`, `no_time`.
        reason: why it is this rung, in words; empty where there is nothing to tell.
        deadline_met: whether the answer left the agent in time.
        took_us: from the request being read to the answer being ready, in the agent.
    """

    id: str
    label: str | None
    confidence: float
    labels: tuple[str, ...]
    confidences: tuple[float, ...]
    outputs: Mapping[str, NDArray[Any]]
    model: str
    version: str
    variant: str
    digest: str
    rung: Rung
    degraded: bool
    deadline_met: bool
    took_us: int
    escalated: str = ""
    reason: str = ""


def error_of(refusal: Refusal) -> OutriderError:
    """The exception for a refusal: the leaf of the error tree with the longest matching code."""
    code = refusal.code
    while code and code not in _LEAVES:
        code = code.rpartition(".")[0]
    error = _LEAVES.get(code, OutriderError)(refusal.message, code=refusal.code, hint=refusal.hint)
    error.retry = refusal.retry
    return error


class RequestNames:
    """Request ids that no other client of this device uses."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(6)
        self._last = 0

    def next(self) -> str:
        """A new one."""
        self._last += 1
        return f"{self._prefix}-{self._last}"


def needs_signature(inputs: Mapping[str, ArrayLike]) -> bool:
    """Whether one of the inputs is no numpy array, so that its element type must be looked up."""
    return not all(hasattr(value, "__array_interface__") for value in inputs.values())


def pack(
    inputs: Mapping[str, ArrayLike], signature: Signature | None
) -> tuple[tuple[TensorHead, ...], list[memoryview]]:
    """Heads and bytes of the inputs; what is no numpy array becomes what the signature declares."""
    import numpy as np

    from shared.tensors import convert, to_wire

    specs = {spec.name: spec for spec in signature.inputs} if signature is not None else {}
    arrays = {
        name: np.asarray(value)
        if hasattr(value, "__array_interface__") or name not in specs
        else convert(value, specs[name])
        for name, value in inputs.items()
    }
    return to_wire(arrays)


def signature_of(description: Description, model: str) -> Signature:
    """The signature of a model that is being served; raises ModelError when it is not."""
    for state in description.models:
        if state.family == model and state.signature is not None:
            return state.signature
    raise ModelError(
        f"model {model!r} is not being served", code="model.unknown", hint="`outrider-agent status` lists the models"
    )


def prediction(answer: Answer, payload: bytearray) -> Prediction:
    """The answer with its outputs as arrays, which are views of the payload."""
    from shared.tensors import from_wire

    return Prediction(
        id=answer.id,
        label=answer.labels[0] if answer.labels else None,
        confidence=answer.confidences[0] if answer.confidences else 0.0,
        labels=answer.labels,
        confidences=answer.confidences,
        outputs=from_wire(answer.outputs, payload),
        model=answer.model,
        version=answer.version,
        variant=answer.variant,
        digest=answer.digest,
        rung=answer.rung,
        degraded=answer.degraded,
        deadline_met=answer.deadline_met,
        took_us=answer.took_us,
        escalated=answer.escalated,
        reason=answer.reason,
    )


def late_prediction(reply: Reply, payload: bytearray, *, request: str) -> Prediction | None:
    """The late answer to that request under its id; None where none has come."""
    if isinstance(reply, Done):
        return None
    return msgspec.structs.replace(prediction(expect(reply, Answer), payload), id=request)


def expect(reply: Reply, kind: type[_R]) -> _R:
    """The reply as the expected kind; a refusal is raised."""
    if isinstance(reply, kind):
        return reply
    if isinstance(reply, Refusal):
        raise error_of(reply)
    raise ProtocolViolation(f"{type(reply).__name__} came where {kind.__name__} was due", code="protocol.reply")
