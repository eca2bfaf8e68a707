"""A loaded model: its line, its engine, and the one loop that brings them together.

Not here: which models are loaded (desk.py), who is let in and who runs with whom (rules.py), the runtime (engine.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cloud_hub.ground.metrics import Metrics
from cloud_hub.offload.engine import Engine, Rows, Verdict
from cloud_hub.offload.rules import MAX_BATCH_ROWS, Batch, Line, Refused, Ticket
from shared.errors import InputRefused, ModelError, OutriderError
from shared.inference import TensorHead
from shared.tensors import Buffer, from_wire

logger = logging.getLogger(__name__)

GRACE_S: Final = 30.0
"""How long after its deadline a request waits for an engine that has it: late answers are worth something."""
STUCK_S: Final = 90.0
"""A batch that takes longer is given up, and its engine with it: by then nobody can be waiting for it any more."""
_WAITS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SIZES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0)


class Overload(OutriderError):
    """The hub is not able to answer in time, and says so at once; `retry_after_us` says when to come again."""

    code = "overload"
    retry = True

    def __init__(self, message: str, *, code: str, retry_after_us: int) -> None:
        super().__init__(message, code=code, hint="use the local answer, and come back after Retry-After")
        self.retry_after_us = retry_after_us


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for an answer.

    Attributes:
        model, version: a family and a version of it, empty for the one that is served.
        inputs, payload: heads and their elements, one buffer each.
        arrived_us, deadline_us: on the desk's clock.
        candidates: whether a release that is built and not published may answer.
    """

    model: str
    version: str
    inputs: tuple[TensorHead, ...]
    payload: tuple[Buffer, ...]
    arrived_us: int
    deadline_us: int
    candidates: bool = False


class Figures:
    """The room's figures."""

    def __init__(self, metrics: Metrics) -> None:
        self.queue_seconds = metrics.histogram(
            "outrider_hub_offload_queue_seconds", "Time from arrival to the start of the batch.", buckets=_WAITS
        )
        self.service_seconds = metrics.histogram(
            "outrider_hub_offload_service_seconds", "Time that a batch took.", buckets=_WAITS
        )
        self.batch_rows = metrics.histogram("outrider_hub_offload_batch_rows", "Rows of a batch.", buckets=_SIZES)
        self.answers = metrics.counter("outrider_hub_offload_answers_total", "Answers by outcome.", ("outcome",))
        self.rejects = metrics.counter("outrider_hub_offload_rejects_total", "Requests refused.", ("reason",))
        self.loaded = metrics.gauge("outrider_hub_offload_models_loaded", "Models that are loaded.")


@dataclass(frozen=True, slots=True)
class _Load:
    """What a request in line carries."""

    rows: Rows
    verdict: asyncio.Future[Verdict]


class Served:
    """A loaded model: its line, its engine, and the one loop that brings them together.

    Attributes:
        gone: set once nobody is answered any more.
        stuck: the batch that was given up, None as long as all came back.
    """

    def __init__(self, engine: Engine, *, now_us: Callable[[], int], figures: Figures) -> None:
        self.engine = engine
        # A model that takes a fixed number of rows runs one request at a time.
        self.line: Line[_Load] = Line(max_batch_rows=MAX_BATCH_ROWS if engine.batch_rows == 0 else engine.batch_rows)
        self._now_us = now_us
        self._figures = figures
        self.gone = asyncio.Event()
        self.stuck: asyncio.Future[list[Verdict]] | None = None
        self._wake = asyncio.Event()
        self._retired = self._ended = False

    async def ask(self, rows: Rows, ask: Ask) -> Verdict:
        """Wait in line for the verdict; raises Overload."""
        if self._ended:
            raise unavailable()
        loop = asyncio.get_running_loop()
        verdict: asyncio.Future[Verdict] = loop.create_future()
        ticket = Ticket(
            rows=rows.rows,
            shape=tuple((name, array.shape[1:]) for name, array in rows.inputs.items()),
            arrived_us=ask.arrived_us,
            deadline_us=ask.deadline_us,
            load=_Load(rows, verdict),
        )
        now_us = self._now_us()
        refused = self.line.offer(ticket, now_us=now_us)
        if refused is not None:
            raise self._overload(refused)
        self._wake.set()
        try:
            await asyncio.wait((verdict,), timeout=max(0.0, (ask.deadline_us - now_us) / 1e6))
            if not verdict.done():
                if self.line.withdraw(ticket):
                    raise self._overload(Refused("late", retry_after_us=int(self.line.wait_us(now_us=self._now_us()))))
                # The engine has it. It is late, but worth something.
                await asyncio.wait((verdict,), timeout=GRACE_S)
            if not verdict.done():
                raise _stuck()
            return verdict.result()
        finally:
            # Whoever goes away, goes away from the line as well.
            if not verdict.done():
                self.line.withdraw(ticket)
                verdict.cancel()

    async def run(self) -> None:
        """Feed the engine until retired and done, or until it does not come back."""
        while self.stuck is None:
            batch = self.line.form(now_us=self._now_us())
            for ticket in batch.dropped:
                late = Refused("late", retry_after_us=int(self.line.wait_us(now_us=self._now_us())))
                self._tell(ticket, self._overload(late))
            if batch.tickets:
                await self._run_batch(batch)
            elif self.line.waiting_rows == 0:
                if self._retired:
                    self._ended = True
                    return
                self._wake.clear()
                await self._wake.wait()

    def retire(self) -> None:
        """End once nobody waits."""
        self._retired = True
        self._wake.set()

    def close(self) -> None:
        """Let everybody who still waits go."""
        self._ended = True
        for ticket in self.line.clear():
            self._tell(ticket, unavailable())
        self.engine.close()
        self.gone.set()

    async def _run_batch(self, batch: Batch[_Load]) -> None:
        began_us = self._now_us()
        for ticket in batch.tickets:
            self._figures.queue_seconds.observe((began_us - ticket.arrived_us) / 1e6)
        self._figures.batch_rows.observe(batch.rows)
        requests = [ticket.load.rows for ticket in batch.tickets]
        loop = asyncio.get_running_loop()
        verdicts: list[Verdict] = [unavailable()] * len(requests)
        answering = loop.run_in_executor(self.engine.thread, self.engine.answer, requests)
        try:
            await asyncio.wait((answering,), timeout=STUCK_S)
            if answering.done():
                verdicts = answering.result()
            else:
                self.stuck, verdicts = answering, [_stuck()] * len(requests)
        except Exception:  # a defect in one engine must not end the hub; the log has it, callers get a 500
            logger.exception("an engine failed")
            verdicts = [ModelError("the engine failed", code="internal")] * len(requests)
        finally:
            # Measured here and not in the thread: what the loop itself needs is part of what callers wait for.
            took_us = self._now_us() - began_us
            self.line.finish(batch.rows, took_us=took_us)
            self._figures.service_seconds.observe(took_us / 1e6)
            for ticket, verdict in zip(batch.tickets, verdicts, strict=True):
                self._tell(ticket, verdict)
            if self.stuck is None and not answering.done():
                answering.cancel()  # the hub is stopping

    def _tell(self, ticket: Ticket[_Load], verdict: Verdict) -> None:
        if not ticket.load.verdict.done():
            ticket.load.verdict.set_result(verdict)

    def _overload(self, refused: Refused) -> Overload:
        self._figures.rejects.labels(refused.reason).inc()
        message = "no answer could be in time" if refused.reason == "late" else "too many requests wait"
        return Overload(message, code=f"overload.{refused.reason}", retry_after_us=refused.retry_after_us)


def _stuck() -> ModelError:
    return ModelError("the model did not come back", code="model.stuck")


def unavailable() -> Overload:
    """The model is there no longer, or not yet."""
    return Overload("the model is going away", code="model.unavailable", retry_after_us=1_000_000)


def rows_of(ask: Ask, rows: int, engine: Engine) -> Rows:
    """The tensors as arrays, and how many rows they share."""
    arrays = {
        head.name: from_wire((head,), data)[head.name] for head, data in zip(ask.inputs, ask.payload, strict=True)
    }
    if engine.batch_rows == 0 and any(array.shape[0] != rows for array in arrays.values()):
        raise InputRefused("the inputs do not have the same number of rows", hint="the first axis of each is the rows")
    return Rows(arrays, rows if engine.batch_rows == 0 else engine.batch_rows)
