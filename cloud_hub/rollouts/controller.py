"""The controller of rollouts: looks at the fleet, lets the rules decide, stores that, carries it out. A reconciler.

Rules of this file:
1. What was decided is stored with its notes and audit rows in one transaction before anything is done about it.
2. What is to be done is read from the state: devices whose wish has no assignment yet. Assigning is idempotent (a
   device that has the assignment keeps it), so a hub that dies between any two steps does the same again.
3. Reports and births wake it; a slow timer heals whatever was missed.

Not here: what to look at (lookout.py), what to decide (rules.py), what operators may ask (desk.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from sqlalchemy.engine import Connection

from cloud_hub.devices.desk import Device
from cloud_hub.ground import audit
from cloud_hub.ground.bus import Bus, DeviceBorn, DeviceDied, DeviceReported, DeviceStandingChanged
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import NotFound
from cloud_hub.releases.desk import Outcome, Selector
from cloud_hub.rollouts import rules, tables
from cloud_hub.rollouts.lookout import Lookout
from cloud_hub.rollouts.values import Event, Note, Rollout, WishesDone
from shared.clock import Clock
from shared.errors import Conflict, OutriderError
from shared.ids import DeviceId, FamilyName, ModelVersion
from shared.rollout import ACTIVE, Phase, Wish

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 2.0
IDLE_S: Final = 30.0
GATHER_S: Final = 0.2
"""After a report others are on their way; they are looked at together."""
PACE: Final = 10
"""A look that took long is followed by a pause this many times as long."""
DEVICES_PER_CALL: Final = 1000
FINAL: Final = frozenset({"conflict.not_published", "conflict.floor"})
"""Conflicts over an assignment that no second try would end."""


class Assigner(Protocol):
    """What is asked of the releases room (cloud_hub/releases/desk.py, `assigning`)."""

    async def assign(self, selector: Selector, *, actor: str) -> Outcome:
        """Set one family of the devices' desired state; a device that has it already keeps its assignment."""
        ...


class Counts:
    """What the room counts."""

    def __init__(self, metrics: Metrics) -> None:
        self.rollouts = metrics.gauge("outrider_hub_rollouts", "Rollouts by phase.", ("phase",))
        self.decisions = metrics.counter("outrider_hub_rollout_decisions_total", "Decisions on rollouts.", ("kind",))
        self.look_seconds = metrics.histogram(
            "outrider_hub_rollout_look_seconds", "Time to look at one rollout and carry out what follows."
        )


class Controller:
    """Looks after the rollouts that have not ended.

    Args:
        database, clock, counts: what it works with.
        lookout: looks at the fleet.
        assigner: the releases room.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        counts: Counts,
        lookout: Lookout,
        assigner: Assigner,
    ) -> None:
        self._database = database
        self._clock = clock
        self._counts = counts
        self.lookout = lookout
        self._assigner = assigner
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._watched: frozenset[DeviceId] = frozenset()

    def listen(self, bus: Bus) -> None:
        """Be woken by news of the devices from now on."""
        bus.subscribe(DeviceBorn, self._on_news)
        bus.subscribe(DeviceDied, self._on_news)
        bus.subscribe(DeviceReported, self._on_news)
        bus.subscribe(DeviceStandingChanged, self._on_news)

    def wake(self) -> None:
        """Look as soon as possible."""
        self._wake.set()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            began_ms = self._clock.mono_ms()
            self._wake.clear()
            busy = True
            try:
                busy = await self.look()
            except OutriderError as error:
                # A locked or full database passes; the state is where it was, and is looked at again soon.
                logger.error("rollouts were not looked after: %s: %s", error.code, error.message)
            took_s = (self._clock.mono_ms() - began_ms) / 1000
            await asyncio.sleep(max(GATHER_S, took_s))
            try:
                async with asyncio.timeout(max(LOOK_EVERY_S, took_s * PACE) if busy else IDLE_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def look(self) -> bool:
        """Look at every rollout once and carry out what follows; returns whether there is one that goes on."""
        ids = await self._database.read(tables.active_ids)
        self.lookout.forget(but=ids)
        fleet = await self.lookout.fleet() if ids else {}
        watched: set[DeviceId] = set()
        for rollout in ids:
            try:
                watched |= await self._look_at(rollout, fleet)
            except OutriderError as error:
                # One rollout that cannot be looked at must not hold up the others.
                logger.error("a rollout was not looked after: %s: %s: %s", rollout, error.code, error.message)
        self._watched = frozenset(watched)
        counted = await self._database.read(tables.phases)
        for phase in Phase:
            self._counts.rollouts.labels(phase.value).set(counted.get(phase.value, 0))
        return bool(ids)

    async def apply(self, rollout: str, make: Callable[[Rollout], Event]) -> Rollout:
        """Let an event of an operator happen; raises NotFound, and Conflict where it cannot happen now."""
        async with self._turn:
            state = await self.load(rollout)
            event = make(state)
            if not rules.TABLE.accepts(state, type(event)):
                asked = type(event).__name__.removesuffix("Asked").lower()
                raise Conflict(
                    f"rollout {rollout} is {state.phase.value}: {asked} is not possible",
                    code="conflict.rollout_phase",
                    hint=f"outrider rollout status {rollout}",
                )
            after = await self._decide(state, event)
        self.wake()
        return after

    async def load(self, rollout: str) -> Rollout:
        """A rollout with its members; raises NotFound."""
        state = await self._database.read(lambda conn: tables.load(conn, rollout))
        if state is None:
            raise unknown(rollout)
        return state

    async def _look_at(self, rollout: str, fleet: Mapping[DeviceId, Device]) -> set[DeviceId]:
        began_ms = self._clock.mono_ms()
        # A long look must not keep operators waiting: the picture does not depend on what they may change meanwhile.
        picture = await self.lookout.picture(await self.load(rollout), fleet)
        async with self._turn:
            state = await self._carry_out(await self.load(rollout))
            if state.phase in ACTIVE:
                state = await self._decide(state, picture)
                state = await self._carry_out(state)
        self._counts.look_seconds.observe((self._clock.mono_ms() - began_ms) / 1000)
        return {member.device for member in state.members} if state.phase in ACTIVE else set()

    async def _decide(self, state: Rollout, event: Event) -> Rollout:
        decision = rules.decide(state, event)
        after, notes = decision.state, decision.effects
        if after is not state:
            await self._database.write(lambda conn: store(conn, state, after, notes))
            for note in notes:
                self._counts.decisions.labels(note.kind).inc()
            if after.phase is not state.phase:
                logger.info("rollout %s is %s", after.id, after.phase.value)
        return after

    async def _carry_out(self, state: Rollout) -> Rollout:
        """Have assignments made for every wish that has none, a release at a time; the next look tries what failed."""
        while waiting := rules.outstanding(state):
            wish = waiting[0].wish
            version = state.spec.version if wish is Wish.TARGET else ModelVersion(waiting[0].before or "")
            same = [member for member in waiting if member.wish is wish]
            names = [member.device for member in same if wish is Wish.TARGET or member.before == version]
            names = names[:DEVICES_PER_CALL]
            answer = await self._assign(state, version, names)
            if answer is None:
                break
            assigned, impossible = answer
            at_ms = self._clock.wall_ms()
            done = WishesDone(at_ms=at_ms, wish=wish, assigned=assigned, impossible=impossible)
            state = await self._decide(state, done)
        return state

    async def _assign(
        self, state: Rollout, version: ModelVersion, names: Sequence[DeviceId]
    ) -> tuple[dict[DeviceId, int], dict[DeviceId, str]] | None:
        """Assignments by device, and reasons of those that cannot have one; None when it is to be tried again."""
        selector = Selector(family=FamilyName(state.spec.family), version=version, devices=tuple(names))
        try:
            outcome = await self._assigner.assign(selector, actor=f"rollout:{state.id}")
        except (Conflict, NotFound) as error:
            if not isinstance(error, NotFound) and error.code not in FINAL:
                logger.warning("assignments are made later: %s: %s: %s", state.id, error.code, error.message)
                return None
            return {}, dict.fromkeys(names, f"{error.code}: {error.message}")
        assigned = {one.device: one.version for one in outcome.assigned}
        reasons = {one.device: one.reason for one in outcome.skipped}
        return assigned, {name: reasons.get(name, "not assigned") for name in names if name not in assigned}

    async def _on_news(self, event: DeviceBorn | DeviceDied | DeviceReported | DeviceStandingChanged) -> None:
        if event.device in self._watched:
            self.wake()


def store(conn: Connection, before: Rollout, after: Rollout, notes: Sequence[Note]) -> None:
    """Save a decision with its notes and audit rows, in the caller's transaction."""
    tables.save(conn, before, after, notes)
    record(conn, after.id, notes)


def record(conn: Connection, rollout: str, notes: Sequence[Note]) -> None:
    """Write the audit rows of these notes."""
    for note in notes:
        audit.record(
            conn,
            at_ms=note.at_ms,
            actor=note.actor,
            action=f"rollout.{note.kind}",
            subject=f"rollout:{rollout}",
            detail={
                "text": note.text,
                "readings": {reading.gate: reading.verdict.value for reading in note.readings},
                **note.detail,
            },
        )


def unknown(rollout: str) -> NotFound:
    """There is no such rollout."""
    return NotFound(
        f"there is no rollout {rollout[:160]!r}", code="not_found.rollout", hint="`outrider rollout status` lists them"
    )
