"""What applications and the command line ask of the door.

Rules of this file:
1. Feedback and readings are confirmed only once they are durable, because the application may forget them then.
2. Whatever cannot be done is refused with a reason and what to do about it.

Not here: inference (edge_agent/driver/answering.py).
"""

from __future__ import annotations

import logging
import os
from typing import assert_never

from edge_agent import __version__
from edge_agent.core import link
from edge_agent.core.slot_values import OperatorRollback
from edge_agent.driver.answering import Answering, Buffer, Response
from edge_agent.driver.events import ForLink, ForSlot
from edge_agent.driver.loop import Loop
from edge_agent.driver.metering import Meter
from edge_agent.driver.models import Models
from edge_agent.driver.records import Records
from edge_agent.driver.renewals import Renewals
from edge_agent.driver.rounds import Rounds
from edge_agent.driver.timekeeping import Timekeeping
from edge_agent.driver.uplink import RunningDevice, Uplink
from shared.clock import Clock
from shared.errors import InvalidValue
from shared.inference import (
    AgentState,
    Control,
    Describe,
    Description,
    Done,
    Feedback,
    Infer,
    Late,
    Measure,
    Refusal,
    Reply,
    Request,
    Status,
    Teach,
)
from shared.telemetry import Reading, RecordClass

logger = logging.getLogger(__name__)


class Service:
    """Answers the door."""

    def __init__(
        self,
        *,
        running: RunningDevice,
        clock: Clock,
        loop: Loop,
        models: Models,
        uplink: Uplink,
        records: Records,
        answering: Answering,
        rounds: Rounds,
        timekeeping: Timekeeping,
        meter: Meter,
        renewals: Renewals,
    ) -> None:
        self._running = running
        self._clock = clock
        self._inbox = loop.inbox
        self._models = models
        self._uplink = uplink
        self._records = records
        self._answering = answering
        self._rounds = rounds
        self._timekeeping = timekeeping
        self._meter = meter
        self._renewals = renewals
        self._started_ms = clock.mono_ms()

    async def handle(self, request: Request, payload: Buffer, arrived: float) -> Response:
        """The reply to one request and the payload to send after it; raises OutriderError for the door to refuse.

        Its deadline counts from `arrived`, a moment on the event loop's clock.
        """
        match request:
            case Infer():
                return await self._answering.infer(request, payload, arrived=arrived)
            case Late():
                return self._answering.late(request)
            case Teach():
                return await self._rounds.teach(request, payload), []
            case Feedback():
                return await self._feedback(request), []
            case Measure():
                return await self._measure(request), []
            case Describe():
                return self._describe(request), []
            case Status():
                return self._status(request), []
            case Control():
                return await self._control(request), []
            case _:
                assert_never(request)

    # Records

    async def _feedback(self, request: Feedback) -> Reply:
        outcome = self._answering.outcome(request)
        if isinstance(outcome, Refusal):
            return outcome
        number = await self._records.keep(outcome)
        return Done(id=request.id, detail=f"outcome {number}")

    async def _measure(self, request: Measure) -> Reply:
        if not 0 < len(request.name) <= 128:
            raise InvalidValue("a reading's name has 1 to 128 characters", code="invalid.reading")
        number = await self._records.keep(Reading(name=request.name, value=request.value))
        return Done(id=request.id, detail=f"reading {number}")

    # State and commands

    def _describe(self, request: Describe) -> Reply:
        states = self._models.states()
        if request.model:
            states = tuple(state for state in states if state.family == request.model)
        if request.model and not states:
            return _unknown_model(request.id, request.model)
        return Description(id=request.id, models=states)

    def _status(self, request: Status) -> Reply:
        depth = self._records.depth()
        trouble, todo = self._renewals.trouble
        return AgentState(
            id=request.id,
            device=self._running.device,
            agent_version=__version__,
            profile=self._running.profile,
            boot=self._running.boot,
            pid=os.getpid(),
            uptime_ms=self._clock.mono_ms() - self._started_ms,
            link=self._uplink.state,
            link_detail=self._uplink.detail,
            models=self._models.states(),
            queue={klass.name.lower(): depth.records.get(klass, 0) for klass in RecordClass},
            queue_bytes=depth.bytes,
            queue_oldest_ms={klass.name.lower(): age for klass, age in depth.oldest_ms.items()},
            queue_lost=dict(depth.lost),
            queue_buried=depth.buried,
            queue_buried_given_up=depth.buried_given_up,
            queue_unkept={klass.name.lower(): count for klass, count in sorted(self._records.lost.items())},
            queue_written_bytes=depth.wear.written_bytes,
            queue_syncs=depth.wear.syncs,
            assignment_version=self._uplink.assignment_version,
            answered=self._answering.answered,
            refused=self._answering.refused,
            hosts=self._models.hosting.pids(),
            escalations=self._answering.escalations,
            time_ms=self._timekeeping.now_ms(),
            time_basis=self._timekeeping.basis,
            time_detail=self._timekeeping.detail,
            clock_error_ms=self._timekeeping.clock_error_ms(),
            assignment_waits=self._timekeeping.waits,
            updates=self._meter.figures(),
            certificate_expires_ms=self._renewals.expires_ms,
            certificate_due_ms=self._renewals.due_ms,
            certificate_trouble=trouble,
            certificate_todo=todo,
            results_lost=self._records.lost.get(RecordClass.RESULT, 0),
        )

    async def _control(self, request: Control) -> Reply:
        match request.command:
            case "queue.flush":
                await self._records.flush()
                self._records.hurry()
                self._inbox.post(ForLink(link.StartLink()))
                return Done(id=request.id, detail=f"link {self._uplink.state}")
            case "queue.drop":
                dropped = await self._records.drop(_klass(request.argument))
                return Done(id=request.id, detail=f"{dropped} records dropped")
            case "samples.drop":
                dropped = await self._rounds.forget(request.argument)
                return Done(id=request.id, detail=f"{dropped} samples dropped")
            case "model.rollback":
                return self._roll_back(request)
            case _:
                raise InvalidValue(f"unknown command {request.command[:80]!r}", code="invalid.command")

    def _roll_back(self, request: Control) -> Reply:
        slot = self._models.slot(request.argument)
        if slot is None:
            return _unknown_model(request.id, request.argument)
        if not self._models.can_roll_back(slot.family):
            return Refusal(
                id=request.id,
                code="release.no_previous",
                message=f"there is no earlier release of {request.argument[:80]!r} to go back to",
                hint="see 'outrider-agent model ls'",
            )
        self._inbox.post(ForSlot(slot.family, OperatorRollback()))
        return Done(id=request.id, detail="rolling back")


def _klass(name: str) -> RecordClass:
    try:
        return RecordClass[name.upper()]
    except KeyError:
        names = ", ".join(klass.name.lower() for klass in RecordClass)
        raise InvalidValue(
            f"unknown record class {name[:40]!r}", code="invalid.class", hint=f"one of {names}"
        ) from None


def _unknown_model(request_id: str, model: str) -> Refusal:
    message = f"there is no model {model[:80]!r} here"
    return Refusal(id=request_id, code="model.unknown", message=message, hint="see 'outrider-agent model ls'")
