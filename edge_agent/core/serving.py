"""Admission: which release answers a request, or why none does; and what is remembered for the feedback on answers.

Rules of this file:
1. A request is admitted before its tensors are looked at; the model host checks those.
2. A "no" is a Refusal with a reason, never an exception, and says whether the same request can succeed later.

Not here: connections, hosts, time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import msgspec

from edge_agent.core.slot_values import Installed
from shared import limits
from shared.inference import Answer, Feedback, Infer, Refusal
from shared.telemetry import Outcome

RECENT_ANSWERS: Final = 4096
PATIENT_MS: Final = 1_000
"""A model that has not answered by then, with nothing else to do, is slow by any measure."""
MAX_LABEL_BYTES: Final = limits.MAX_RECORD_BYTES - 2 * limits.KIB
"""Of a feedback's label; the rest of the record is for the names of what had answered."""


class Route(msgspec.Struct, frozen=True):
    """Where a family's requests go: the release last switched to (SwitchTo), and whether its host is up."""

    release: Installed | None = None
    up: bool = False


def admit(
    request: Infer, *, routes: Mapping[str, Route], waiting: int, waited_ms: int = 0, limit: int | None = None
) -> Installed | Refusal:
    """The release that answers this request, or the refusal to send back.

    Args:
        routes: by family, one for each slot, also where nothing serves.
        waiting: requests admitted and not yet answered, of all connections together.
        waited_ms: since the request was read.
        limit: how many may wait; MAX_WAITING_REQUESTS unless given.
    """
    route = routes.get(request.model)
    if route is None:
        known = ", ".join(sorted(routes)) or "none yet"
        return Refusal(
            id=request.id,
            code="model.unknown",
            message=f"there is no model {request.model[:80]!r} on this device",
            hint=f"models assigned to this device: {known}",
        )
    if request.deadline_ms <= 0 or waited_ms >= request.deadline_ms:
        return Refusal(
            id=request.id,
            code="deadline",
            message=f"the deadline of {request.deadline_ms} ms had passed before the model could run",
            hint="allow more time or send fewer requests at once",
            retry=True,
        )
    if request.version and route.release is not None and route.release.manifest.version != request.version:
        return Refusal(
            id=request.id,
            code="model.unknown",
            message=f"version {request.version[:80]!r} of {request.model!r} is not served here",
            hint=f"the version {route.release.manifest.version!r} is",
        )
    if route.release is None or not route.up:
        return Refusal(
            id=request.id,
            code="model.not_loaded",
            message=f"no release of {request.model!r} is loaded",
            hint="see 'outrider-agent model ls' for what it waits for",
            retry=True,
        )
    most = limits.MAX_WAITING_REQUESTS if limit is None else limit
    if waiting >= most:
        return Refusal(
            id=request.id,
            code="overload",
            message=f"{most} requests are waiting already",
            hint="slow down, or spread the load over more devices",
            retry=True,
        )
    return route.release


def is_models_fault(*, had_ms: float, ahead: int, usual_ms: float) -> bool:
    """Whether a missed deadline speaks against the model: it had nothing else to do, and time enough.

    Args:
        had_ms: how long the model had the request.
        ahead: requests that were with a model when this one came.
        usual_ms: what the family's model takes otherwise; negative where that is not known.
    """
    return ahead == 0 and (had_ms >= PATIENT_MS or 0 <= 2 * usual_ms < had_ms)


class Answered(msgspec.Struct, frozen=True):
    """What is remembered of an answer."""

    model: str
    version: str
    variant: str
    label: str
    took_us: int


class Recent:
    """The last answers by request id, so that feedback can say what it is about. Bounded; the oldest is forgotten."""

    def __init__(self, *, capacity: int = RECENT_ANSWERS) -> None:
        self._capacity = capacity
        self._answers: OrderedDict[str, Answered] = OrderedDict()

    def __len__(self) -> int:
        return len(self._answers)

    def remember(self, answer: Answer) -> None:
        """Keep what feedback will need; a repeated id names the newer answer from now on."""
        label = answer.labels[0] if len(answer.labels) == 1 else ""
        self._answers.pop(answer.id, None)
        self._answers[answer.id] = Answered(
            model=answer.model, version=answer.version, variant=answer.variant, label=label, took_us=answer.took_us
        )
        while len(self._answers) > self._capacity:
            self._answers.popitem(last=False)

    def outcome(self, feedback: Feedback) -> Outcome | Refusal:
        """The outcome to keep, completed with what had answered where that is still known."""
        if feedback.label is None and feedback.correct is None and feedback.value is None:
            return Refusal(
                id=feedback.id,
                code="invalid.feedback",
                message="the feedback says nothing",
                hint="give a label, correct, or a value",
            )
        if feedback.value is not None and not math.isfinite(feedback.value):
            return Refusal(
                id=feedback.id,
                code="invalid.feedback",
                message=f"the feedback's value is {feedback.value}, which is no number to keep",
                hint="give a finite number, or leave the value out",
            )
        label_bytes = len(feedback.label.encode()) if feedback.label is not None else 0
        if label_bytes > MAX_LABEL_BYTES:
            return Refusal(
                id=feedback.id,
                code="invalid.feedback",
                message=f"the feedback's label has {label_bytes} bytes, at most {MAX_LABEL_BYTES} fit into a record",
                hint="give the label's name; large data does not belong into records",
            )
        answered = self._answers.get(feedback.request)
        if answered is None:
            return Outcome(
                request=feedback.request, label=feedback.label, correct=feedback.correct, value=feedback.value
            )
        correct = feedback.correct
        if correct is None and feedback.label is not None and answered.label:
            correct = feedback.label == answered.label
        return Outcome(
            request=feedback.request,
            model=answered.model,
            version=answered.version,
            variant=answered.variant,
            label=feedback.label,
            correct=correct,
            value=feedback.value,
            latency_us=answered.took_us,
        )
