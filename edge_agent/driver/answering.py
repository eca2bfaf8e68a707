"""Inference requests: admitted, run by a model host, answered by their deadline, and recorded right after.

Rules of this file:
1. A request is answered by its deadline or refused by it; a refusal says why and whether to try again. An answer of
   which the hub was to say something waits for it until a margin before the deadline, and then leaves as it is.
2. A result is what a release did for one request: the time is the model's own, none where it did not run, and a request
   that a release was asked for in vain leaves a result too (rung `refused`). An answer does not wait for the disk: its
   result is buffered and on the disk within the flush interval; a crash takes the results of that interval with it.
   Where results pile up faster than the disk takes them, answers wait, but never beyond their own time: then the result
   is lost, and counted.
3. Identical requests that are in the air together are run once, where the cache is on.

Which rung answers is decided in edge_agent/core/ladder.py, what is kept in cache.py; the hub's larger model is asked
by escalation.py, results are brought to the disk by records.py.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Final, TypeAlias

import msgspec

from edge_agent.core import ladder, serving
from edge_agent.core.cache import Store, key_of
from edge_agent.core.cascade import Pace
from edge_agent.core.ladder import LADDER, Choice, Ladder
from edge_agent.core.slot_values import Installed
from edge_agent.driver.escalation import Doubt, Escalation
from edge_agent.driver.models import Models
from edge_agent.driver.records import Records
from edge_agent.ports import CloudAnswer, HostAnswer, ModelHost
from shared.clock import Clock
from shared.errors import HostLost, InputRefused, ModelError, OutriderError
from shared.ids import FamilyName
from shared.inference import Answer, Done, Feedback, Infer, Late, Refusal, Reply, TensorHead, check_heads, check_inputs
from shared.telemetry import Outcome, Result

logger = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview
Response: TypeAlias = tuple[Reply, list[Buffer]]

_FINAL: Final = frozenset({"model.unknown", "deadline"})
"""Refusals that no lower rung can mend."""
_ENTRY_OVERHEAD_BYTES: Final = 512
_ROW_OVERHEAD_BYTES: Final = 100
"""What a row's label and confidence take in a kept answer."""


class _Asked(msgspec.Struct, frozen=True):
    """A request with its name and the moment when it had been read, on the event loop's clock."""

    request: Infer
    payload: Buffer
    id: str
    arrived: float

    @property
    def deadline(self) -> float:
        return self.arrived + self.request.deadline_ms / 1000


class _Told(msgspec.Struct, frozen=True):
    """What the model says, and the microseconds that it took for this request: 0 where it did not run for it."""

    answer: HostAnswer
    model_us: int = 0


class Answering:
    """Answers inference requests and remembers enough of each answer for the feedback on it.

    Attributes:
        records: where results go.
        answered, refused: requests since the start.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        models: Models,
        records: Records,
        escalation: Escalation,
        cache_entries: int = 0,
        cache_bytes: int = 0,
    ) -> None:
        self._clock = clock
        self._models = models
        self._records = records
        self._escalation = escalation
        self._cache: Store[HostAnswer] = Store(entries=cache_entries, size_bytes=cache_bytes)
        self._flights: dict[str, asyncio.Future[_Told]] = {}
        self._ladders: dict[str, Ladder] = {}
        self._paces: dict[str, Pace] = {}
        self._recent = serving.Recent()
        self._waiting = 0
        self.answered = 0
        self.refused = 0

    def close(self) -> None:
        """Give up every question to the hub; for the end."""
        self._escalation.close()

    @property
    def escalations(self) -> dict[str, int]:
        """How often the hub's larger model was wanted, by what became of it."""
        return dict(self._escalation.told)

    def outcome(self, feedback: Feedback) -> Outcome | Refusal:
        """What the feedback says, completed with what had answered."""
        return self._recent.outcome(feedback)

    def late(self, request: Late) -> Response:
        """The hub's answer that came too late for its request, if it has come."""
        late = self._escalation.late(request.request)
        if late is None:
            pending = self._escalation.is_pending(request.request)
            return Done(id=request.id, detail="pending" if pending else "none"), []
        reason = "the hub answered after the deadline"
        answer = _from_cloud(late.said, id=request.id, took_us=late.took_us, deadline_met=False, reason=reason)
        return answer, list(late.said.payload)

    async def infer(self, request: Infer, payload: Buffer, *, arrived: float) -> Response:
        """The answer, or the refusal with its reason; raises OutriderError for what the door shall refuse.

        `arrived` is when the request had been read, on the event loop's clock.
        """
        asked = _Asked(request, payload, request.id or secrets.token_hex(8), arrived)
        state = self._step(request.model)
        admitted = serving.admit(
            request,
            routes=self._models.routes(),
            waiting=self._waiting,
            waited_ms=_took_us(asked) // 1000,
            limit=state.most_waiting,
        )
        if isinstance(admitted, Refusal):
            return await self._below_full(asked, state, admitted)
        host = self._models.hosting.get(admitted.key)
        if host is None:
            return await self._below_full(asked, _HOSTLESS, _host_ended(request))
        check_inputs(admitted.manifest.signature, request.inputs, len(payload))
        key = None if self._cache.is_off else key_of(admitted.served.file.digest, request.inputs, payload)
        kept = self._cache.get(key) if key is not None else None
        choice = ladder.choose(
            state,
            hit=kept is not None,
            cloud=False,
            left_ms=_left_ms(asked),
            expected_ms=self._pace(request.model).expected_ms(self._clock.mono_ms()),
        )
        try:
            told = _Told(kept) if kept is not None else await self._run_once(asked, key, admitted, host)
        except TimeoutError:
            await self._note_in_vain(asked, admitted)
            return _too_late(request), []
        except HostLost as error:
            return await self._below_full(asked, _HOSTLESS, _refusal(request, error), tried=admitted)
        except InputRefused:
            raise
        except ModelError as error:
            await self._note_in_vain(asked, None if error.retry else admitted)  # an overload says nothing of the model
            raise
        return await self._answer(asked, admitted, told, choice)

    async def _answer(self, asked: _Asked, release: Installed, ran: _Told, choice: Choice) -> Response:
        """Give the local answer, unless the hub gives a better one in time."""
        told = ran.answer
        answer = _from_host(asked, release, told, choice, took_us=_took_us(asked))
        if not self._escalation.wanted(asked.request, told.confidences):
            return await self._finish(asked, answer, [told.payload], model_us=ran.model_us)
        said = await self._escalation.ask(self._doubt(asked, answer))
        took_us = _took_us(asked)
        met = _is_met(asked, took_us)
        if isinstance(said, CloudAnswer):
            better = _from_cloud(
                said, id=answer.id, took_us=took_us, deadline_met=met, reason=f"{_unsure(told)}; the hub answered"
            )
            return await self._finish(asked, better, list(said.payload), model_us=took_us)
        reasons = (choice.reason, f"{_unsure(told)}; {said.why}")
        local = msgspec.structs.replace(
            answer,
            took_us=took_us,
            deadline_met=met,
            degraded=True,
            escalated=said.escalated,
            reason="; ".join(filter(None, reasons)),
        )
        return await self._finish(asked, local, [told.payload], model_us=ran.model_us)

    async def _below_full(
        self, asked: _Asked, state: Ladder, refusal: Refusal, *, tried: Installed | None = None
    ) -> Response:
        """What can be had without the model, or the refusal; `tried` is the release that was asked in vain."""
        request = asked.request
        if refusal.code in _FINAL:
            await self._note_in_vain(asked, tried)
            return refusal, []
        route = self._models.routes().get(request.model, _NOWHERE)  # none is left when the agent stops
        kept = None
        if route.release is not None:
            check_inputs(route.release.manifest.signature, request.inputs, len(asked.payload))
            if not self._cache.is_off:
                key = key_of(route.release.served.file.digest, request.inputs, asked.payload)
                kept = self._cache.get(key) if key is not None else None
        cloud = self._escalation.wanted(request, None) and _rows(request.inputs) == 1
        choice = ladder.choose(state, hit=kept is not None, cloud=cloud, why=refusal.message)
        if kept is not None and route.release is not None and choice.kept:
            return await self._answer(asked, route.release, _Told(kept), choice)
        why = choice.reason
        if choice.rung == "cloud":
            if route.release is None:
                check_heads(request.inputs, len(asked.payload))
            said = await self._escalation.ask(self._doubt(asked, None))
            if isinstance(said, CloudAnswer):
                took_us = _took_us(asked)
                met = _is_met(asked, took_us)
                reason = f"{why}; the hub answered"
                answer = _from_cloud(said, id=asked.id, took_us=took_us, deadline_met=met, reason=reason)
                return await self._finish(asked, answer, list(said.payload), model_us=took_us)
            why = f"{why}; {said.why}"
        await self._note_in_vain(asked, tried)
        return msgspec.structs.replace(refusal, message=why), []

    async def _finish(self, asked: _Asked, answer: Answer, parts: list[Buffer], *, model_us: int) -> Response:
        """Record the answer's result and give it, as late as it is by then."""
        self.answered += 1
        if await self._records.keep_soon(_result(answer, model_us=model_us), until=self._latest(asked)):
            took_us = _took_us(asked)
            answer = msgspec.structs.replace(answer, took_us=took_us, deadline_met=_is_met(asked, took_us))
        self._recent.remember(answer)
        return answer, parts

    async def _note_in_vain(self, asked: _Asked, release: Installed | None) -> None:
        """Count a refusal; where a release had been asked in vain, its figures shall show that."""
        self.refused += 1
        if release is not None:
            result = Result(
                request=asked.id,
                model=asked.request.model,
                version=release.manifest.version,
                variant=release.variant,
                rung="refused",
            )
            await self._records.keep_soon(result, until=self._latest(asked))

    def _latest(self, asked: _Asked) -> float:
        """Until when, on the event loop's clock, an answer may wait for something and still leave in time."""
        return asked.deadline - self._escalation.policy.margin_ms / 1000

    def _doubt(self, asked: _Asked, local: Answer | None) -> Doubt:
        return Doubt(
            id=asked.id,
            family=asked.request.model,
            inputs=asked.request.inputs,
            payload=asked.payload,
            outputs=asked.request.outputs,
            local=local,
            until=asked.deadline,
        )

    # The model

    def _step(self, family: str) -> Ladder:
        route = self._models.routes().get(family)
        if route is None:
            return Ladder()
        now = ladder.situation(loaded=route.release is not None, up=route.up, waiting=self._waiting)
        state = self._ladders[family] = LADDER.decide(self._ladders.get(family, Ladder()), now).state
        return state

    def _pace(self, family: str) -> Pace:
        return self._paces.get(family, Pace())

    async def _run_once(self, asked: _Asked, key: str | None, release: Installed, host: ModelHost) -> _Told:
        """Run the model, or wait for the identical request that is running."""
        loop = asyncio.get_running_loop()
        while key is not None and (flight := self._flights.get(key)) is not None:
            async with asyncio.timeout_at(asked.deadline):
                await asyncio.wait((flight,))
            if not flight.cancelled() and not isinstance(flight.exception(), TimeoutError):
                return _Told(flight.result().answer)
            # It had less time than this one has: run again, if nobody has begun yet.
        if key is None:
            return await self._run(asked, release, host)
        flight = self._flights[key] = loop.create_future()
        try:
            told = await self._run(asked, release, host)
            flight.set_result(told)
            self._cache.put(key, told.answer, size_bytes=_held_bytes(told.answer))
            return told
        except (OutriderError, TimeoutError) as error:
            flight.set_exception(error)
            flight.exception()  # nobody else may be waiting
            raise
        finally:
            flight.cancel()
            del self._flights[key]

    async def _run(self, asked: _Asked, release: Installed, host: ModelHost) -> _Told:
        """Run the model within what is left of the request's time."""
        request, family = asked.request, FamilyName(asked.request.model)
        left_ms = int(_left_ms(asked))
        if left_ms <= 0:
            raise TimeoutError("no time was left")
        loop = asyncio.get_running_loop()
        ahead, began = self._waiting, loop.time()
        self._waiting += 1
        try:
            told = await host.infer(request.inputs, asked.payload, deadline_ms=left_ms)
        except (InputRefused, HostLost):
            raise  # the caller's fault, or told to the slot by the host's own end
        except ModelError as error:
            if not error.retry:  # an overload says nothing of the model
                self._models.answer_bad(family, release.key, error)
            raise
        except TimeoutError:
            had_ms, usual_ms = (loop.time() - began) * 1000, self._pace(family).mean_ms
            if serving.is_models_fault(had_ms=had_ms, ahead=ahead, usual_ms=usual_ms):
                slow = ModelError(f"the model gave no answer within {had_ms:.0f} ms", code="model.slow")
                self._models.answer_bad(family, release.key, slow)
            raise
        finally:
            self._waiting -= 1
        took_s = loop.time() - began
        self._paces[family] = self._pace(family).measured(took_s * 1000, at_ms=self._clock.mono_ms())
        self._models.answer_good(family, release.key)
        return _Told(told, max(int(took_s * 1_000_000), 1))


_HOSTLESS: Final = Ladder(ladder.Step.CACHED)
_NOWHERE: Final = serving.Route()


def _took_us(asked: _Asked) -> int:
    return int((asyncio.get_running_loop().time() - asked.arrived) * 1_000_000)


def _left_ms(asked: _Asked) -> float:
    return (asked.deadline - asyncio.get_running_loop().time()) * 1000


def _is_met(asked: _Asked, took_us: int) -> bool:
    return took_us <= asked.request.deadline_ms * 1000


def _rows(inputs: tuple[TensorHead, ...]) -> int:
    return inputs[0].shape[0] if inputs and inputs[0].shape else 1


def _held_bytes(told: HostAnswer) -> int:
    return len(told.payload) + _ENTRY_OVERHEAD_BYTES + _ROW_OVERHEAD_BYTES * len(told.labels)


def _unsure(told: HostAnswer) -> str:
    return f"local confidence {told.confidences[0]:.2f}"


def _from_host(asked: _Asked, release: Installed, told: HostAnswer, choice: Choice, *, took_us: int) -> Answer:
    return Answer(
        id=asked.id,
        model=asked.request.model,
        version=release.manifest.version,
        variant=release.variant,
        digest=release.served.file.digest,
        rung=choice.rung,
        labels=told.labels,
        confidences=told.confidences,
        outputs=told.outputs,
        took_us=took_us,
        degraded=choice.rung == "cached",
        deadline_met=_is_met(asked, took_us),
        reason=choice.reason,
    )


def _from_cloud(said: CloudAnswer, *, id: str, took_us: int, deadline_met: bool, reason: str) -> Answer:
    return Answer(
        id=id,
        model=said.model,
        version=said.version,
        variant=said.variant,
        digest=said.digest,
        rung="cloud",
        labels=(said.label,),
        confidences=(said.confidence,),
        outputs=said.outputs,
        took_us=took_us,
        deadline_met=deadline_met,
        escalated="answered",
        reason=reason,
    )


def _result(answer: Answer, *, model_us: int) -> Result:
    return Result(
        request=answer.id,
        model=answer.model,
        version=answer.version,
        variant=answer.variant,
        rung=answer.rung,
        label=answer.labels[0] if len(answer.labels) == 1 else "",
        confidence=answer.confidences[0] if len(answer.confidences) == 1 else -1.0,
        took_us=model_us,
    )


def _host_ended(request: Infer) -> Refusal:
    message = f"the model host of {request.model!r} has just ended"
    return Refusal(id=request.id, code="model.host_lost", message=message, hint="try again", retry=True)


def _refusal(request: Infer, error: OutriderError) -> Refusal:
    return Refusal(id=request.id, code=error.code, message=error.message, hint=error.hint, retry=error.retry)


def _too_late(request: Infer) -> Refusal:
    return Refusal(
        id=request.id,
        code="deadline",
        message=f"no answer within {request.deadline_ms} ms",
        hint="allow more time or send fewer requests at once",
        retry=True,
    )
