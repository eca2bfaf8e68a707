"""The offload desk: loads models on first use, and answers each caller with exactly its own rows.

Rules of this file:
1. Never more than `max_models` engines are in memory, those that are being loaded, that end what waits for them, and
   that are stuck among them. One is loaded at a time, after the one that was used longest ago has gone.
2. An engine that does not come back keeps its place until it does, and its model is not tried again before.

Not here: a loaded model's line and loop (served.py), HTTP, identity, rates (asgi.py), names and files (registry.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from cloud_hub.ground.metrics import Metrics
from cloud_hub.offload.engine import Engine, Said, Verdict
from cloud_hub.offload.registry import Files, Release
from cloud_hub.offload.rules import MAX_BATCH_ROWS, MAX_REQUEST_ROWS
from cloud_hub.offload.served import Ask, Figures, Overload, Served, rows_of, unavailable
from shared.errors import InputRefused, ModelError, OutriderError
from shared.inference import check_inputs
from shared.model import Manifest

__all__ = ["Answered", "Ask", "Desk", "OffloadSettings", "Overload", "Releases"]

logger = logging.getLogger(__name__)

MAX_LOADING: Final = 64
"""Requests that may wait for one model to be loaded."""
MAX_LOADS: Final = 16
"""Models that may wait for their turn to be loaded."""
LOAD_S: Final = 120.0
"""A model that takes longer to load is given up."""
FAILURE_US: Final = 5_000_000
"""For so long a model that could not be loaded is not tried again."""
LAG_EVERY_US: Final = 10_000
TIMER_US: Final = 2_000
"""By how much a timer of the event loop may be late when nothing is the matter."""


class Releases(Protocol):
    """Where models come from (`registry.Registry`)."""

    async def find(self, family: str, version: str, *, candidates: bool) -> Release:
        """The release of this name, published unless candidates may be meant; raises ModelError `model.unknown`."""
        ...

    def files(self, manifest: Manifest) -> Files:
        """What its engine is made of; blocks; raises OutriderError."""
        ...


@dataclass(frozen=True, slots=True)
class OffloadSettings:
    """What an operator may choose.

    Attributes:
        max_models: how many models are held loaded, at most.
        threads: how many cores one engine may use.
    """

    max_models: int = 4
    threads: int = 1


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
        self._figures = Figures(metrics)
        self._places: OrderedDict[tuple[str, str], _Place] = OrderedDict()
        self._engines = 0
        self._turn = asyncio.Lock()
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

    async def describe(self, model: str, version: str, *, candidates: bool) -> Release:
        """The release behind a name, published unless candidates may be meant; raises ModelError `model.unknown`."""
        return await self._releases.find(model, version, candidates=candidates)

    async def infer(self, ask: Ask) -> Answered:
        """Answer.

        Raises:
            InputRefused: the tensors do not fit the model.
            ModelError: there is no such model, or it cannot be loaded or run.
            Overload: the answer could not be in time, or too much waits.
        """
        release = await self._releases.find(ask.model, ask.version, candidates=ask.candidates)
        signature = release.manifest.signature
        rows = check_inputs(signature, ask.inputs, sum(len(data) for data in ask.payload))
        if rows > MAX_REQUEST_ROWS:
            raise InputRefused(f"{rows} rows are too many, {MAX_REQUEST_ROWS} are possible", code="model.too_large")
        served = await self._open(release, deadline_us=ask.deadline_us)
        verdict = await served.ask(rows_of(ask, rows, served.engine), ask)
        if isinstance(verdict, OutriderError):
            self._figures.answers.labels("failed").inc()
            raise verdict
        met = self._now_us() <= ask.deadline_us
        self._figures.answers.labels("answered" if met else "late").inc()
        variant = served.engine.variant
        return Answered(verdict, release.manifest, variant.name, variant.file.digest, met)

    async def _open(self, release: Release, *, deadline_us: int) -> Served:
        """The model, loaded; raises ModelError when it cannot be, Overload when it is not yet."""
        place = self._places.get(release.key)
        if place is None or place.is_stale(self._now_us()):
            if self._group is None:
                raise unavailable()
            self._forget_failures()
            if sum(not other.loaded.is_set() for other in self._places.values()) >= MAX_LOADS:
                self._figures.rejects.labels("loading").inc()
                raise Overload("too many models are to be loaded", code="model.loading", retry_after_us=5_000_000)
            place = self._places[release.key] = _Place()
            self._group.create_task(self._load(release, place))
        self._places.move_to_end(release.key)
        if not place.loaded.is_set():
            await self._await_loading(place, deadline_us=deadline_us)
        if isinstance(place.outcome, Served):
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
            served = await self._start(release)
        except Exception as error:  # a runtime may raise anything, and one model must not end the hub
            known = error if isinstance(error, OutriderError) else ModelError(f"the model does not load: {error}")
            logger.error("model not loaded: %s/%s: %s: %s", family, version, known.code, known.message)
            place.fail(known, at_us=self._now_us())
            return
        place.succeed(served)
        logger.info("model loaded", extra={"family": family, "version": version, "variant": served.engine.variant.name})
        try:
            await served.run()
        finally:
            served.close()
            if served.stuck is None:
                self._engine_ended()
            else:
                logger.error("model stuck: %s/%s", family, version)
                place.fail(ModelError("the model did not come back", code="model.stuck"), at_us=None)
                self._places.setdefault(release.key, place)
                served.stuck.add_done_callback(partial(self._came_back, release.key, place))

    async def _start(self, release: Release) -> Served:
        """Load a model when its turn has come and there is room; raises OutriderError, and whatever a runtime does."""
        async with self._turn:
            await self._make_room()
            self._engines += 1
            building = asyncio.get_running_loop().run_in_executor(None, self._build, release.manifest)
            await asyncio.wait((building,), timeout=LOAD_S)
            if not building.done():
                building.add_done_callback(self._built_in_vain)
                raise ModelError(f"the model was not loaded within {LOAD_S:.0f} s", code="model.stuck")
            try:
                engine, timed = building.result()
            except BaseException:
                self._engines -= 1
                raise
        self._figures.loaded.inc()
        served = Served(engine, now_us=self._now_us, figures=self._figures)
        for rows, took_us in timed:
            served.line.pace.note(rows, took_us)
        return served

    def _build(self, manifest: Manifest) -> tuple[Engine, list[tuple[int, int]]]:
        files = self._releases.files(manifest)
        engine = Engine(manifest=manifest, variant=files.variant, model=files.model, threads=self._settings.threads)
        try:
            timed = engine.warm_up(files.golden, rows=(1, MAX_BATCH_ROWS), now_us=self._now_us)
        except BaseException:
            engine.close()
            raise
        return engine, timed

    async def _make_room(self) -> None:
        """Have models that were used longest ago end what waits for them and go, until one more has room.

        Raises:
            Overload: none can go, because all that is in memory is stuck.
        """
        while self._engines >= self._settings.max_models:
            loaded = ((key, place.outcome) for key, place in self._places.items())
            oldest = next(((key, outcome) for key, outcome in loaded if isinstance(outcome, Served)), None)
            if oldest is None:
                raise Overload("no loaded model comes back", code="overload.stuck", retry_after_us=60_000_000)
            (family, version), served = oldest
            del self._places[family, version]
            served.retire()
            await served.gone.wait()
            logger.info("model unloaded", extra={"family": family, "version": version})

    def _engine_ended(self) -> None:
        self._engines -= 1
        self._figures.loaded.dec()

    def _came_back(self, key: tuple[str, str], place: _Place, answering: asyncio.Future[list[Verdict]]) -> None:
        """A stuck engine has ended after all; its model may be tried again."""
        if not answering.cancelled():
            answering.exception()
        self._engine_ended()
        if self._places.get(key) is place:
            del self._places[key]

    def _built_in_vain(self, building: asyncio.Future[tuple[Engine, list[tuple[int, int]]]]) -> None:
        self._engines -= 1
        if not building.cancelled() and building.exception() is None:
            building.result()[0].close()

    def _forget_failures(self) -> None:
        now_us = self._now_us()
        for key in [key for key, place in self._places.items() if place.is_stale(now_us)]:
            del self._places[key]


class _Place:
    """A model that is being loaded, is loaded, or could not be."""

    def __init__(self) -> None:
        self.loaded = asyncio.Event()
        self.outcome: Served | OutriderError = ModelError("the model is being loaded", code="model.loading")
        self.waiting = 0
        self._failed_us: int | None = 0

    def succeed(self, served: Served) -> None:
        """It is loaded."""
        self.outcome = served
        self.loaded.set()

    def fail(self, error: OutriderError, *, at_us: int | None) -> None:
        """It could not be loaded; None where it is not to be tried again after a while."""
        self.outcome, self._failed_us = error, at_us
        self.loaded.set()

    def is_stale(self, now_us: int) -> bool:
        """Whether it failed long enough ago to be tried again."""
        failed = self.loaded.is_set() and isinstance(self.outcome, OutriderError)
        return failed and self._failed_us is not None and now_us - self._failed_us > FAILURE_US
