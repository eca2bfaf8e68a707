"""Asks the hub's larger model for the request at hand, and joins the answer that comes too late to it.

Rules of this file:
1. `ask` returns by the time it was given, whatever the hub does; the question may go on after that.
2. An answer that came late is joined to its request: kept as an outcome for the hub (source `hub`), which is durable,
   and held for the application, bounded, until newer ones need the room.

Whether to ask is decided in edge_agent/core/cascade.py. Not here: the local answer (answering.py) and HTTPS
(edge_agent/adapters/cloud.py).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from typing import Final, TypeAlias

import msgspec

from edge_agent.core import cascade
from edge_agent.core.cache import Store
from edge_agent.core.cascade import Cascade, Policy, Stay
from edge_agent.driver.loop import Loop
from edge_agent.driver.records import Records
from edge_agent.driver.uplink import Uplink
from edge_agent.ports import Cloud, CloudAnswer, CloudRefusal
from shared.clock import Clock
from shared.errors import InputRefused, OutriderError, StorageError, Unreachable
from shared.inference import Answer, Infer, TensorHead
from shared.limits import MIB
from shared.telemetry import Outcome

logger = logging.getLogger(__name__)

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_LATE_ANSWERS: Final = 1_024
MAX_LATE_BYTES: Final = 8 * MIB
_LATE_OVERHEAD_BYTES: Final = 1_024
"""What an answer takes beside its outputs."""
_NOT_THE_QUESTIONS: Final = frozenset({408, 429})
"""Statuses from 400 to 499 that speak of the hub's time and load."""


class Doubt(msgspec.Struct, frozen=True, kw_only=True):
    """A request that the hub should say something to.

    Attributes:
        id: the request's.
        family: the model that was asked.
        inputs, payload: the tensors.
        outputs: names of those without which an answer is of no use.
        local: what the local model said; None where none could answer.
        until: on the event loop's clock, when the answer must leave.
    """

    id: str
    family: str
    inputs: tuple[TensorHead, ...]
    payload: Buffer
    outputs: tuple[str, ...]
    local: Answer | None
    until: float


class LateAnswer(msgspec.Struct, frozen=True):
    """An answer that came after its request had been answered without it, and how long it took."""

    said: CloudAnswer
    took_us: int


class Escalation:
    """The questions to the hub, and what is remembered of them."""

    def __init__(
        self, *, cloud: Cloud, policy: Policy, clock: Clock, loop: Loop, uplink: Uplink, records: Records
    ) -> None:
        self._cloud = cloud
        self.policy = policy
        self._clock = clock
        self._works = loop.works
        self._uplink = uplink
        self._records = records
        self._state = Cascade()
        self._asked = 0
        self._pending: Counter[str] = Counter()
        self._late: Store[LateAnswer] = Store(entries=MAX_LATE_ANSWERS, size_bytes=MAX_LATE_BYTES)
        self.told: Counter[str] = Counter()

    def wanted(self, request: Infer, confidences: tuple[float, ...] | None) -> bool:
        """Whether the hub should be asked about a local answer, None for none; never where a version must answer."""
        return not request.version and cascade.wanted(self.policy, family=request.model, confidences=confidences)

    def late(self, request: str) -> LateAnswer | None:
        """The answer that came late to this request."""
        return self._late.get(request)

    def is_pending(self, request: str) -> bool:
        """Whether an answer to this request may still come."""
        return self._pending[request] > 0

    def close(self) -> None:
        """Give up every question."""
        self._cloud.close()

    async def ask(self, doubt: Doubt) -> CloudAnswer | Stay:
        """What the hub says, or why its word is not to be had now."""
        verdict = await self._ask(doubt)
        self.told[verdict.escalated if isinstance(verdict, Stay) else "answered"] += 1
        return verdict

    async def _ask(self, doubt: Doubt) -> CloudAnswer | Stay:
        loop = asyncio.get_running_loop()
        question = cascade.Question(
            size_bytes=len(doubt.payload),
            left_ms=(doubt.until - loop.time()) * 1000,
            online=self._uplink.online,
            at_ms=self._clock.mono_ms(),
        )
        self._state, verdict = cascade.judge(self._state, self.policy, question)
        if isinstance(verdict, Stay):
            return verdict
        reply: asyncio.Future[CloudAnswer | Stay] = loop.create_future()
        self._asked += 1
        self._pending[doubt.id] += 1
        self._works.start(("escalate", self._asked), self._carry(doubt, reply, verdict.within_ms))
        await asyncio.wait((reply,), timeout=verdict.within_ms / 1000)
        if reply.done():
            return reply.result()
        reply.cancel()  # tells the question, which goes on, that its answer is late
        self._settle(cascade.Missed(at_ms=self._clock.mono_ms(), jitter=random.random()))
        return Stay("late", f"the hub did not answer within {verdict.within_ms} ms")

    async def _carry(self, doubt: Doubt, reply: asyncio.Future[CloudAnswer | Stay], within_ms: int) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        said: CloudAnswer | CloudRefusal | OutriderError
        try:
            said = await self._cloud.ask(
                self.policy.model,
                doubt.inputs,
                doubt.payload,
                deadline_ms=within_ms,
                within_ms=within_ms + self.policy.late_ms,
            )
        except OutriderError as error:
            said = error
        except Exception:  # a defect in one question must not take the agent from the others
            logger.exception("asking the hub failed")
            said = OutriderError("asking the hub failed; the log says why", code="internal")
        finally:
            self._pending -= Counter((doubt.id,))
        if isinstance(said, CloudAnswer):
            came = cascade.Came(
                took_ms=said.took_ms, size_bytes=said.size_bytes, late=reply.cancelled(), at_ms=self._clock.mono_ms()
            )
            self._settle(came)
            if reply.cancelled():
                await self._join(doubt, LateAnswer(said, int((loop.time() - began) * 1_000_000)))
            else:
                reply.set_result(_with(doubt.outputs, said))
        elif reply.cancelled():
            self._settle(cascade.GaveUp())
        else:
            self._settle(_no(said, at_ms=self._clock.mono_ms()))
            reply.set_result(_stay(said))

    def _settle(self, event: cascade.Settled) -> None:
        before = self._state.breaker.phase
        self._state = cascade.settle(self._state, self.policy, event)
        after = self._state.breaker.phase
        if after is not before and after is cascade.BreakerPhase.OPEN:
            logger.warning("the hub's model is left alone", extra={"model": self.policy.model})
        elif after is not before and after is cascade.BreakerPhase.CLOSED:
            logger.info("the hub's model answers again", extra={"model": self.policy.model})

    async def _join(self, doubt: Doubt, late: LateAnswer) -> None:
        size_bytes = late.said.size_bytes + _LATE_OVERHEAD_BYTES
        self._late.put(doubt.id, late, size_bytes=size_bytes)
        local = doubt.local
        outcome = Outcome(
            request=doubt.id,
            model=doubt.family,
            version=local.version if local is not None else "",
            variant=local.variant if local is not None else "",
            label=late.said.label,
            latency_us=late.took_us,
            source="hub",
        )
        try:
            await self._records.keep(outcome)
        except StorageError as error:
            logger.error("a late answer is not recorded", extra={"why": error.message})


def _with(outputs: tuple[str, ...], said: CloudAnswer) -> CloudAnswer | Stay:
    """The answer, unless it lacks an output that it must have."""
    lacking = set(outputs) - {head.name for head in said.outputs}
    return Stay("refused", f"the hub's model has no output {min(lacking)[:80]!r}") if lacking else said


def _no(said: CloudRefusal | OutriderError, *, at_ms: int) -> cascade.Settled:
    """What a no in time says of the hub: nothing, where it is the question's own fault."""
    if isinstance(said, InputRefused):
        return cascade.GaveUp()
    if isinstance(said, CloudRefusal) and 400 <= said.status < 500 and said.status not in _NOT_THE_QUESTIONS:
        return cascade.Declined()
    retry_after_ms = said.retry_after_ms if isinstance(said, CloudRefusal) else None
    return cascade.Refused(at_ms=at_ms, jitter=random.random(), retry_after_ms=retry_after_ms)


def _stay(said: CloudRefusal | OutriderError) -> Stay:
    if isinstance(said, CloudRefusal):
        return Stay("refused", f"the hub said no ({said.status}): {said.message}")
    return Stay("offline" if isinstance(said, Unreachable) else "refused", said.message)
