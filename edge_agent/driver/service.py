"""What applications and the command line ask of the door.

Rules of this file:
1. A request is answered by its deadline or refused by it; a refusal says why and whether to try again.
2. An answer does not wait for the disk: its result is recorded right after. When results pile up faster than the disk
   takes them, answers wait rather than results being lost.
3. Feedback and readings are confirmed only once they are durable, because the application may forget them then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from typing import Final, TypeAlias, assert_never

from edge_agent import __version__
from edge_agent.core import link, serving
from edge_agent.core.slot_values import Installed, OperatorRollback
from edge_agent.core.slots import can_roll_back
from edge_agent.driver.events import ForLink, ForSlot
from edge_agent.driver.loop import Loop
from edge_agent.driver.models import Models
from edge_agent.driver.uplink import RunningDevice, Uplink
from edge_agent.ports import HostAnswer, ModelHost, Outbox
from shared.clock import Clock
from shared.errors import HostLost, InputRefused, InvalidValue, ModelError, OutriderError
from shared.ids import FamilyName
from shared.inference import (
    AgentState,
    Answer,
    Control,
    Describe,
    Description,
    Done,
    Feedback,
    Infer,
    Measure,
    Refusal,
    Reply,
    Request,
    Status,
    check_inputs,
)
from shared.telemetry import Reading, RecordClass, Result

logger = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview
Response: TypeAlias = tuple[Reply, list[Buffer]]

MAX_UNRECORDED: Final = 2_000
"""Results that may wait for the disk before answers wait too."""
MAX_RECORDED_AT_ONCE: Final = 500


class Service:
    """Answers the door."""

    def __init__(
        self, *, running: RunningDevice, clock: Clock, loop: Loop, models: Models, uplink: Uplink, outbox: Outbox
    ) -> None:
        self._running = running
        self._clock = clock
        self._inbox = loop.inbox
        self._models = models
        self._uplink = uplink
        self._outbox = outbox
        self._recent = serving.Recent()
        self._unrecorded: asyncio.Queue[tuple[int, Result]] = asyncio.Queue(MAX_UNRECORDED)
        self._started_ms = clock.mono_ms()
        self._waiting = 0
        self._answered = 0
        self._refused = 0
        self._disk_refuses = False
        self._recording = asyncio.Lock()

    async def handle(self, request: Request, payload: Buffer) -> Response:
        """The reply to one request and the payload to send after it; raises OutriderError for the door to refuse."""
        match request:
            case Infer():
                return await self._infer(request, payload)
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

    # Inference

    async def _infer(self, request: Infer, payload: Buffer) -> Response:
        loop = asyncio.get_running_loop()
        began = loop.time()
        admitted = serving.admit(request, routes=self._models.routes(), waiting=self._waiting)
        host = self._models.hosting.get(admitted.key) if isinstance(admitted, Installed) else None
        if isinstance(admitted, Refusal) or host is None:
            self._refused += 1
            return (admitted, []) if isinstance(admitted, Refusal) else (_just_ended(request), [])
        check_inputs(admitted.manifest.signature, request.inputs, len(payload))
        try:
            told = await self._run(request, payload, admitted, host)
        except TimeoutError:
            self._refused += 1
            return _too_late(request), []
        took_us = int((loop.time() - began) * 1_000_000)
        answer = Answer(
            id=request.id or secrets.token_hex(8),
            model=request.model,
            version=admitted.manifest.version,
            variant=admitted.variant,
            digest=admitted.served.file.digest,
            rung="full",
            labels=told.labels,
            confidences=told.confidences,
            outputs=told.outputs,
            took_us=took_us,
            deadline_met=took_us <= request.deadline_ms * 1000,
        )
        self._answered += 1
        self._recent.remember(answer)
        await self._unrecorded.put((self._clock.wall_ms(), _result(answer)))
        return answer, [told.payload]

    async def _run(self, request: Infer, payload: Buffer, release: Installed, host: ModelHost) -> HostAnswer:
        family = FamilyName(request.model)
        self._waiting += 1
        try:
            told = await host.infer(request.inputs, payload, deadline_ms=request.deadline_ms)
        except (InputRefused, HostLost):
            raise  # the caller's fault, or told to the slot by the host's own end
        except ModelError as error:
            if not error.retry:  # an overload says nothing of the model
                self._models.answer_bad(family, release.key, error)
            raise
        finally:
            self._waiting -= 1
        self._models.answer_good(family, release.key)
        return told

    async def record(self) -> None:
        """Bring results into the outbox, many with one commit; runs until cancelled."""
        while True:
            batch = [await self._unrecorded.get()]
            while len(batch) < MAX_RECORDED_AT_ONCE and not self._unrecorded.empty():
                batch.append(self._unrecorded.get_nowait())
            async with self._recording:
                await self._record(batch)

    async def record_rest(self) -> None:
        """Bring what is left into the outbox, and wait for what `record` has in hand; before its end."""
        rest = []
        while not self._unrecorded.empty():
            rest.append(self._unrecorded.get_nowait())
        async with self._recording:
            await self._record(rest)

    async def _record(self, batch: list[tuple[int, Result]]) -> None:
        puts = (self._uplink.keep(result, at_ms=at_ms) for at_ms, result in batch)
        told = await asyncio.gather(*puts, return_exceptions=True)
        # A result that no outbox takes (a label without end, from a model's own process) must not end the recording.
        refusals = [error for error in told if isinstance(error, OutriderError)]
        for error in told:
            if isinstance(error, BaseException) and not isinstance(error, OutriderError):
                raise error
        if bool(refusals) != self._disk_refuses:
            self._disk_refuses = bool(refusals)
            if refusals:
                logger.error("results are not recorded", extra={"why": refusals[0].message})
            else:
                logger.info("results are recorded again")

    # Records

    async def _feedback(self, request: Feedback) -> Reply:
        outcome = self._recent.outcome(request)
        if isinstance(outcome, Refusal):
            return outcome
        number = await self._uplink.keep(outcome)
        return Done(id=request.id, detail=f"outcome {number}")

    async def _measure(self, request: Measure) -> Reply:
        if not 0 < len(request.name) <= 128:
            raise InvalidValue("a reading's name has 1 to 128 characters", code="invalid.reading")
        number = await self._uplink.keep(Reading(name=request.name, value=request.value))
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
        depth = self._outbox.depth()
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
            assignment_version=self._uplink.assignment_version,
            answered=self._answered,
            refused=self._refused,
            hosts=self._models.hosting.pids(),
        )

    async def _control(self, request: Control) -> Reply:
        match request.command:
            case "queue.flush":
                self._inbox.post(ForLink(link.StartLink()))
                return Done(id=request.id, detail=f"link {self._uplink.state}")
            case "queue.drop":
                dropped = await self._outbox.drop(_klass(request.argument), at_ms=self._clock.wall_ms())
                return Done(id=request.id, detail=f"{dropped} records dropped")
            case "model.rollback":
                return self._roll_back(request)
            case _:
                raise InvalidValue(f"unknown command {request.command[:80]!r}", code="invalid.command")

    def _roll_back(self, request: Control) -> Reply:
        slot = self._models.slot(request.argument)
        if slot is None:
            return _unknown_model(request.id, request.argument)
        if not can_roll_back(slot):
            return Refusal(
                id=request.id,
                code="release.no_previous",
                message=f"there is no earlier release of {request.argument[:80]!r} to go back to",
                hint="see 'outrider-agent model ls'",
            )
        self._inbox.post(ForSlot(slot.family, OperatorRollback()))
        return Done(id=request.id, detail="rolling back")


def _result(answer: Answer) -> Result:
    return Result(
        request=answer.id,
        model=answer.model,
        version=answer.version,
        variant=answer.variant,
        rung=answer.rung,
        label=answer.labels[0] if len(answer.labels) == 1 else "",
        confidence=answer.confidences[0] if len(answer.confidences) == 1 else -1.0,
        took_us=answer.took_us,
    )


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


def _just_ended(request: Infer) -> Refusal:
    message = f"the model host of {request.model!r} has just ended"
    return Refusal(id=request.id, code="model.host_lost", message=message, hint="try again", retry=True)


def _too_late(request: Infer) -> Refusal:
    return Refusal(
        id=request.id,
        code="deadline",
        message=f"no answer within {request.deadline_ms} ms",
        hint="allow more time or send fewer requests at once",
        retry=True,
    )
