"""The Open Inference Protocol's other words: paths, metadata, errors, and what our answers say in `parameters`.

Rules: parameters are scalars (the specification's `$parameters_object`), so one row's label and confidence stand
there as they are, and those of several rows as a list in JSON text, under the plural. An error's body has the
protocol's `error` and, for those who know us, `code`, `hint` and `retry`.

Not here: tensors (shared/wire/oip.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Literal

import msgspec

from shared.inference import Rung
from shared.model import Signature, TensorSpec
from shared.wire.oip import Parameters

Ask = Literal["server", "live", "ready", "model", "model_ready", "infer"]
EXTENSIONS: Final = ("binary_tensor_data", "schedule_policy")
PREFIX: Final = "/v2"
RETRY_AFTER_S: Final = 1
_NAME: Final = r"[A-Za-z0-9._-]{1,128}"
_MODEL_PATH: Final = re.compile(rf"/v2/models/({_NAME})(?:/versions/({_NAME}))?(/ready|/infer)?/?")
_CALLERS_FAULT: Final = ("model.input", "model.request", "invalid", "protocol", "http.")
_PLAIN: Final[dict[str, Ask]] = {"/v2": "server", "/v2/health/live": "live", "/v2/health/ready": "ready"}
_MODEL_ASKS: Final[dict[str | None, Ask]] = {None: "model", "/ready": "model_ready", "/infer": "infer"}


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What a path asks for; `version` is empty where the served one is meant."""

    ask: Ask
    model: str = ""
    version: str = ""

    @property
    def method(self) -> str:
        """The HTTP method that belongs to it."""
        return "POST" if self.ask == "infer" else "GET"


class OipError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error's body, with `error` as the protocol has it."""

    error: str
    code: str = ""
    hint: str = ""
    retry: bool = False


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where an answer came from and what it says, as its `parameters` carry it."""

    rung: Rung
    digest: str
    variant: str
    labels: tuple[str, ...] = ()
    confidences: tuple[float, ...] = ()
    degraded: bool = False
    deadline_met: bool = True
    reason: str = ""
    escalated: str = ""


class _Parsed(msgspec.Struct, frozen=True):
    """The parameters that we read."""

    rung: Rung = "full"
    digest: str = ""
    variant: str = ""
    label: str | None = None
    confidence: float | None = None
    labels: str = "[]"
    confidences: str = "[]"
    degraded: bool = False
    deadline_met: bool = True
    reason: str = ""
    escalated: str = ""


def parse_path(path: str) -> Target | None:
    """What a request's path (without its query) asks for; None when there is nothing there."""
    plain = _PLAIN.get(path.rstrip("/"))
    if plain is not None:
        return Target(ask=plain)
    match = _MODEL_PATH.fullmatch(path)
    if match is None:
        return None
    return Target(ask=_MODEL_ASKS[match[3]], model=match[1], version=match[2] or "")


def status_of(code: str, *, retry: bool) -> int:
    """The HTTP status that belongs to an error's code."""
    if code in ("model.unknown", "http.not_found"):
        return 404
    if code == "http.method":
        return 405
    if code.endswith(".too_large"):
        return 413
    if code == "deadline":
        return 504
    if code.startswith("overload"):
        return 429
    if retry:
        return 503
    return 400 if code.startswith(_CALLERS_FAULT) else 500


def encode_error(error: OipError) -> bytes:
    """An error's body."""
    return msgspec.json.encode(error)


def decode_error(body: bytes | bytearray | memoryview) -> OipError:
    """An error from any server of the protocol; one that does not parse gives its first words."""
    try:
        return msgspec.json.decode(body, type=OipError)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return OipError(error=bytes(body[:200]).decode("utf-8", "replace") or "no reason given")


def encode_server(*, name: str, version: str) -> bytes:
    """The server's metadata."""
    return msgspec.json.encode({"name": name, "version": version, "extensions": EXTENSIONS})


def encode_metadata(*, name: str, versions: Sequence[str], platform: str, signature: Signature) -> bytes:
    """A model's metadata."""
    inputs, outputs = ([_spec(one) for one in specs] for specs in (signature.inputs, signature.outputs))
    document = {"name": name, "versions": versions, "platform": platform, "inputs": inputs, "outputs": outputs}
    return msgspec.json.encode(document)


def write_provenance(said: Provenance) -> Parameters:
    """As parameters of a response."""
    parameters: Parameters = {
        "rung": said.rung,
        "digest": said.digest,
        "variant": said.variant,
        "degraded": said.degraded,
        "deadline_met": said.deadline_met,
    }
    parameters |= {name: text for name, text in (("reason", said.reason), ("escalated", said.escalated)) if text}
    for name, values in (("label", said.labels), ("confidence", said.confidences)):
        if len(values) == 1:
            parameters[name] = values[0]
        elif values:
            parameters[f"{name}s"] = msgspec.json.encode(values).decode()
    return parameters


def read_provenance(parameters: Parameters) -> Provenance | None:
    """From a response's parameters; None when they are not ours."""
    try:
        said = msgspec.convert(parameters, type=_Parsed)
        labels = msgspec.json.decode(said.labels, type=tuple[str, ...])
        confidences = msgspec.json.decode(said.confidences, type=tuple[float, ...])
    except (msgspec.MsgspecError, RecursionError):
        return None
    return Provenance(
        rung=said.rung,
        digest=said.digest,
        variant=said.variant,
        labels=labels if said.label is None else (said.label,),
        confidences=confidences if said.confidence is None else (said.confidence,),
        degraded=said.degraded,
        deadline_met=said.deadline_met,
        reason=said.reason,
        escalated=said.escalated,
    )


def _spec(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.dtype.upper(), "shape": spec.shape}
