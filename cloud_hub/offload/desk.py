"""The offload desk: loads models on first use, and answers each caller with exactly its own rows.

Each loaded model has a line (rules.py), an engine in a thread of its own (engine.py), and one task that feeds it. The
models that were used last stay loaded, up to a bound; one that has to go first ends what waits for it.

Not here: HTTP, identity, rates (asgi.py), names and files (registry.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cloud_hub.ground.metrics import Metrics
from cloud_hub.offload.engine import Engine, Rows, Said, Verdict
from cloud_hub.offload.registry import Files, Release
from cloud_hub.offload.rules import MAX_BATCH_ROWS, MAX_REQUEST_ROWS, Batch, Line, Refused, Ticket
from shared.errors import InputRefused, ModelError, OutriderError
from shared.inference import TensorHead, check_inputs
from shared.model import Manifest
from shared.tensors import Buffer, from_wire

logger = logging.getLogger(__name__)

GRACE_S: Final = 30.0
"""How long after its deadline a request waits for an engine that has it: late answers are worth something."""
MAX_LOADING: Final = 64
"""Requests that may wait for one model to be loaded."""
FAILURE_US: Final = 5_000_000
"""For so long a model that could not be loaded is not tried again."""
LAG_EVERY_US: Final = 10_000
TIMER_US: Final = 2_000
"""By how much a timer of the event loop may be late when nothing is the matter."""
_WAITS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SIZES: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0, 1024.0)


class Overload(OutriderError):
    """The hub is not able to answer in time, and says so at once; `retry_after_us` says when to come again."""

    code = "overload"
    retry = True

    def __init__(self, message: str, *, code: str, retry_after_us: int) -> None:
        super().__init__(message, code=code, hint="use the local answer, and come back after Retry-After")
        self.retry_after_us = retry_after_us


class Releases(Protocol):
    """Where models come from (`registry.Registry`)."""

    async def find(self, family: str, version: str) -> Release:
        """The release of this name; raises ModelError `model.unknown`."""
        ...

    def files(self, manifest: Manifest) -> Files:
        """What its engine is made of; blocks; raises OutriderError."""
        ...


@dataclass(frozen=True, slots=True)
class OffloadSettings:
    """What an operator may choose.

    Attributes:
        max_models: how many models are held loaded.
        threads: how many cores one engine may use.
    """

    max_models: int = 4
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for an answer.

    Attributes:
        model, version: a family and a version of it, empty for the one that is served.
        inputs, payload: heads and their elements, one buffer each.
        arrived_us, deadline_us: on the desk's clock.
    """

    model: str
    version: str
    inputs: tuple[TensorHead, ...]
    payload: tuple[Buffer, ...]
    arrived_us: int
    deadline_us: int


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer, and where it came from."""

    said: Said
    manifest: Manifest
    variant: str
    digest: str
    deadline_met: bool


class Desk:
    """The one face of the room.

    Args:
        releases: where models come from.
        metrics: gets the room's figures.
        now_us: a monotonic clock.
        settings: what an operator may choose.
    """

    def __init__(
        self, *, releases: Releases, metrics: Metrics, now_us: Callable[[], int], settings: OffloadSettings
    ) -> None:
        self._releases = releases
        self._now_us = now_us
        self._settings = settings
        self._figures = _Figures(metrics)
        self._places: OrderedDict[tuple[str, str], _Place] = OrderedDict()
        self._group: asyncio.TaskGroup | None = None
        self._lag_us = 0

    @property
    def lag_us(self) -> int:
        """How long what comes in now has waited unseen, because the event loop was busy with what came before."""
        return self._lag_us

    async def run(self) -> None:
        """Feed the engines until cancelled; nothing is answered without it."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await self._watch_lag()
        finally:
            self._group = None

    async def _watch_lag(self) -> None:
        while True:
            began_us = self._now_us()
            await asyncio.sleep(LAG_EVERY_US / 1e6)
            self._lag_us = max(0, self._now_us() - began_us - LAG_EVERY_US - TIMER_US)

    async def describe(self, model: str, version: str) -> Release:
        """The release behind a name; raises ModelError `model.unknown`."""
        return await self._releases.find(model, version)

    async def infer(self, ask: Ask) -> Answered:
        """Answer.

        Raises:
            InputRefused: the tensors do not fit the model.
            ModelError: there is no such model, or it cannot be loaded or run.
            Overload: the answer could not be in time, or too much waits.
        """
        release = await self._releases.find(ask.model, ask.version)
        signature = release.manifest.signature
        rows = check_inputs(signature, ask.inputs, sum(len(data) for data in ask.payload))
        if rows > MAX_REQUEST_ROWS:
            raise InputRefused(f"{rows} rows are too many, {MAX_REQUEST_ROWS} are possible", code="model.too_large")
        served = await self._open(release, deadline_us=ask.deadline_us)
        verdict = await served.ask(_rows(ask, rows, served.engine), ask)
        if isinstance(verdict, OutriderError):
            self._figures.answers.labels("failed").inc()
            raise verdict
        met = self._now_us() <= ask.deadline_us
        self._figures.answers.labels("answered" if met else "late").inc()
        variant = served.engine.variant
        return Answered(verdict, release.manifest, variant.name, variant.file.digest, met)

    async def _open(self, release: Release, *, deadline_us: int) -> _Served:
        """The model, loaded; raises ModelError when it cannot be, Overload when it is not yet."""
        place = self._places.get(release.key)
        if place is None or place.is_stale(self._now_us()):
            if self._group is None:
                raise _unavailable()
            place = self._places[release.key] = _Place()
            self._group.create_task(self._load(release, place))
        self._places.move_to_end(release.key)
        if not place.loaded.is_set():
            await self._await_loading(place, deadline_us=deadline_us)
        if isinstance(place.outcome, _Served):
            return place.outcome
        raise place.outcome

    async def _await_loading(self, place: _Place, *, deadline_us: int) -> None:
        refusal = Overload("the model is being loaded", code="model.loading", retry_after_us=1_000_000)
        if place.waiting >= MAX_LOADING:
            self._figures.rejects.labels("loading").inc()
            raise refusal
        place.waiting += 1
        try:
            async with asyncio.timeout(max(0.0, (deadline_us - self._now_us()) / 1e6)):
                await place.loaded.wait()
        except TimeoutError as error:
            self._figures.rejects.labels("loading").inc()
            raise refusal from error
        finally:
            place.waiting -= 1

    async def _load(self, release: Release, place: _Place) -> None:
        """Load, then feed the engine until it has to go."""
        family, version = release.key
        try:
            engine, timed = await asyncio.to_thread(self._build, release.manifest)
        except Exception as error:  # a runtime may raise anything, and one model must not end the hub
            known = error if isinstance(error, OutriderError) else ModelError(f"the model does not load: {error}")
            logger.error("model not loaded: %s/%s: %s: %s", family, version, known.code, known.message)
            place.fail(known, at_us=self._now_us())
            return
        served = _Served(engine, now_us=self._now_us, figures=self._figures)
        for rows, took_us in timed:
            served.line.pace.note(rows, took_us)
        place.succeed(served)
        logger.info("model loaded", extra={"family": family, "version": version, "variant": engine.variant.name})
        self._make_room()
        try:
            await served.run()
        finally:
            served.close()
            self._figures.loaded.dec()

    def _build(self, manifest: Manifest) -> tuple[Engine, list[tuple[int, int]]]:
        files = self._releases.files(manifest)
        engine = Engine(manifest=manifest, variant=files.variant, model=files.model, threads=self._settings.threads)
        try:
            timed = engine.warm_up(files.golden, rows=(1, MAX_BATCH_ROWS), now_us=self._now_us)
        except BaseException:
            engine.close()
            raise
        self._figures.loaded.inc()
        return engine, timed

    def _make_room(self) -> None:
        loaded = [key for key, place in self._places.items() if isinstance(place.outcome, _Served)]
        for key in loaded[: max(0, len(loaded) - self._settings.max_models)]:
            outcome = self._places.pop(key).outcome
            assert isinstance(outcome, _Served)
            outcome.retire()
            logger.info("model unloaded", extra={"family": key[0], "version": key[1]})


class _Figures:
    """The room's metrics."""

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


class _Place:
    """A model that is being loaded, is loaded, or could not be."""

    def __init__(self) -> None:
        self.loaded = asyncio.Event()
        self.outcome: _Served | OutriderError = ModelError("the model is being loaded", code="model.loading")
        self.waiting = 0
        self._failed_us = 0

    def succeed(self, served: _Served) -> None:
        """It is loaded."""
        self.outcome = served
        self.loaded.set()

    def fail(self, error: OutriderError, *, at_us: int) -> None:
        """It could not be loaded."""
        self.outcome, self._failed_us = error, at_us
        self.loaded.set()

    def is_stale(self, now_us: int) -> bool:
        """Whether it failed long enough ago to be tried again."""
        return (
            self.loaded.is_set() and isinstance(self.outcome, OutriderError) and now_us - self._failed_us > FAILURE_US
        )


@dataclass(frozen=True, slots=True)
class _Load:
    """What a request in line carries."""

    rows: Rows
    verdict: asyncio.Future[Verdict]


class _Served:
    """A loaded model: its line, its engine, and the one loop that brings them together."""

    def __init__(self, engine: Engine, *, now_us: Callable[[], int], figures: _Figures) -> None:
        self.engine = engine
        # A model that takes a fixed number of rows runs one request at a time.
        self.line: Line[_Load] = Line(max_batch_rows=MAX_BATCH_ROWS if engine.batch_rows == 0 else engine.batch_rows)
        self._now_us = now_us
        self._figures = figures
        self._wake = asyncio.Event()
        self._retired = self._ended = False

    async def ask(self, rows: Rows, ask: Ask) -> Verdict:
        """Wait in line for the verdict; raises Overload."""
        if self._ended:
            raise _unavailable()
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
            async with asyncio.timeout(max(0.0, (ask.deadline_us - now_us) / 1e6) + GRACE_S):
                return await verdict
        except TimeoutError as error:
            raise ModelError("the model did not come back", code="model.stuck") from error

    async def run(self) -> None:
        """Feed the engine until retired and done."""
        while True:
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
            self._tell(ticket, _unavailable())
        self.engine.close()

    async def _run_batch(self, batch: Batch[_Load]) -> None:
        began_us = self._now_us()
        for ticket in batch.tickets:
            self._figures.queue_seconds.observe((began_us - ticket.arrived_us) / 1e6)
        self._figures.batch_rows.observe(batch.rows)
        requests = [ticket.load.rows for ticket in batch.tickets]
        loop = asyncio.get_running_loop()
        verdicts: list[Verdict] = [_unavailable()] * len(requests)
        try:
            verdicts = await loop.run_in_executor(self.engine.thread, self.engine.answer, requests)
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

    def _tell(self, ticket: Ticket[_Load], verdict: Verdict) -> None:
        if not ticket.load.verdict.done():
            ticket.load.verdict.set_result(verdict)

    def _overload(self, refused: Refused) -> Overload:
        self._figures.rejects.labels(refused.reason).inc()
        message = "no answer could be in time" if refused.reason == "late" else "too many requests wait"
        return Overload(message, code=f"overload.{refused.reason}", retry_after_us=refused.retry_after_us)


def _unavailable() -> Overload:
    return Overload("the model is going away", code="model.unavailable", retry_after_us=1_000_000)


def _rows(ask: Ask, rows: int, engine: Engine) -> Rows:
    """The tensors as arrays, and how many rows they share."""
    arrays = {
        head.name: from_wire((head,), data)[head.name] for head, data in zip(ask.inputs, ask.payload, strict=True)
    }
    if engine.batch_rows == 0 and any(array.shape[0] != rows for array in arrays.values()):
        raise InputRefused("the inputs do not have the same number of rows", hint="the first axis of each is the rows")
    return Rows(arrays, rows if engine.batch_rows == 0 else engine.batch_rows)
