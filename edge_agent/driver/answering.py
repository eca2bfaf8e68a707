"""Inference requests: admitted, run by a model host, answered by their deadline, and recorded right after.

Rules of this file:
1. A request is answered by its deadline or refused by it; a refusal says why and whether to try again.
2. An answer does not wait for the disk: its result is recorded right after. When results pile up faster than the disk
   takes them, answers wait rather than results being lost.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Final, TypeAlias

from edge_agent.core import serving
from edge_agent.core.slot_values import Installed
from edge_agent.driver.models import Models
from edge_agent.driver.uplink import Uplink
from edge_agent.ports import HostAnswer, ModelHost
from shared.clock import Clock
from shared.errors import HostLost, InputRefused, ModelError, OutriderError
from shared.ids import FamilyName
from shared.inference import Answer, Feedback, Infer, Refusal, Reply, check_inputs
from shared.telemetry import Outcome, Result

logger = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview
Response: TypeAlias = tuple[Reply, list[Buffer]]

MAX_UNRECORDED: Final = 2_000
"""Results that may wait for the disk before answers wait too."""
MAX_RECORDED_AT_ONCE: Final = 500


class Answering:
    """Answers inference requests and remembers enough of each answer for the feedback on it."""

    def __init__(self, *, clock: Clock, models: Models, uplink: Uplink) -> None:
        self._clock = clock
        self._models = models
        self._uplink = uplink
        self._recent = serving.Recent()
        self._unrecorded: asyncio.Queue[tuple[int, Result]] = asyncio.Queue(MAX_UNRECORDED)
        self._recording = asyncio.Lock()
        self._waiting = 0
        self._disk_refuses = False
        self.answered = 0
        self.refused = 0

    def outcome(self, feedback: Feedback) -> Outcome | Refusal:
        """What the feedback says, completed with what had answered."""
        return self._recent.outcome(feedback)

    async def infer(self, request: Infer, payload: Buffer) -> Response:
        """The answer, or the refusal with its reason; raises OutriderError for what the door shall refuse."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        admitted = serving.admit(request, routes=self._models.routes(), waiting=self._waiting)
        host = self._models.hosting.get(admitted.key) if isinstance(admitted, Installed) else None
        if isinstance(admitted, Refusal) or host is None:
            self.refused += 1
            return (admitted, []) if isinstance(admitted, Refusal) else (_just_ended(request), [])
        check_inputs(admitted.manifest.signature, request.inputs, len(payload))
        try:
            told = await self._run(request, payload, admitted, host)
        except TimeoutError:
            self.refused += 1
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
        self.answered += 1
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
