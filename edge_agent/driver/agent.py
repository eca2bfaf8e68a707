"""The one loop: takes event after event from the inbox and hands each to the part that it is for.

Start: count the boot, read slots and the accepted assignment, open the door, start the link. A device whose hub is
gone serves before it has tried to connect. End: close the door, record what is left, say goodbye, stop the hosts.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, assert_never

from edge_agent.core import intake, link
from edge_agent.core.intake import Accepted, Intake, IntakeEvent, PauseOver, Refused, Unavailable
from edge_agent.core.slot_values import FetchDue
from edge_agent.driver.answering import Answering
from edge_agent.driver.events import (
    ForIntake,
    ForLink,
    ForPump,
    ForRenewal,
    ForSlot,
    ForTraining,
    HeartbeatDue,
    Inward,
    MessageArrived,
    Noted,
    ReconcileDue,
    ReportDue,
    Stop,
    TaskCame,
)
from edge_agent.driver.loop import Loop
from edge_agent.driver.models import Models
from edge_agent.driver.records import Records
from edge_agent.driver.renewals import Renewals
from edge_agent.driver.rounds import Rounds
from edge_agent.driver.uplink import Uplink
from edge_agent.ports import Ledger, Vitals
from edge_agent.update_ports import Verifier
from shared.clock import Clock
from shared.errors import OutriderError, StorageError, TrustError
from shared.release import VerifiedAssignment
from shared.telemetry import DeviceEvent, Grade, Reading

logger = logging.getLogger(__name__)

RETRY_MS: Final = 5_000
MAX_DETAIL_CHARS: Final = 400
MAX_HELD_EVENTS: Final = 256
"""Events that the disk does not take and that are held in memory: a month of a full disk is not to fill that too."""
RECONCILE_MS: Final = 900_000
"""How often the accepted assignment is offered again, for slots whose last attempt ended without a fault of its own."""


class Agent:
    """Routes events; owns intake, which is too small for a part of its own."""

    def __init__(
        self,
        *,
        clock: Clock,
        loop: Loop,
        ledger: Ledger,
        verifier: Verifier,
        models: Models,
        uplink: Uplink,
        records: Records,
        answering: Answering,
        rounds: Rounds,
        renewals: Renewals,
        vitals: Vitals,
        heartbeat_ms: int,
        vitals_ms: int,
    ) -> None:
        self._clock = clock
        self._loop = loop
        self._inbox, self._works, self._timers = loop.inbox, loop.works, loop.timers
        self._ledger = ledger
        self._verifier = verifier
        self._models = models
        self._uplink = uplink
        self._records = records
        self._answering = answering
        self._rounds = rounds
        self._renewals = renewals
        self._vitals = vitals
        self._heartbeat_ms = heartbeat_ms
        self._vitals_ms = vitals_ms
        self._intake = Intake()
        self._held: set[int] = set()

    async def start(self) -> None:
        """Restore what was, then begin to connect."""
        await self._models.restore()
        self._rounds.start()
        self._renewals.start()
        self._inbox.post(ReconcileDue())
        self._inbox.post(ForLink(link.StartLink()))
        self._inbox.post(HeartbeatDue())
        self._works.start("vitals", self._watch_vitals())

    async def run(self) -> str:
        """Handle events until Stop; returns its reason."""
        while True:
            event = await self._inbox.next()
            if isinstance(event, Stop):
                return event.reason
            await self._handle(event)

    async def stop(self) -> None:
        """Leave in order: nothing accepted is lost, the hub is told, no child stays behind."""
        self._answering.close()
        await asyncio.sleep(0)  # what happened last is on its way to the outbox: it goes onto the disk with the rest
        await self._records.end()
        self._loop.end()
        await self._uplink.say_goodbye()
        await self._rounds.stop()
        await self._models.stop()

    async def _handle(self, event: Inward) -> None:
        try:
            await self._hand_over(event)
        except StorageError as error:
            # Nothing was done yet: a slot is saved before it acts. Serving goes on while the disk is full.
            logger.error("the disk refuses the agent's state, trying again", extra={"why": error.message})
            self._timers.start(("again", id(event)), RETRY_MS, event)

    async def _hand_over(self, event: Inward) -> None:
        match event:
            case ForSlot(family, slot_event):
                await self._models.handle(family, slot_event)
            case ForLink(link_event):
                await self._on_link(link_event)
            case ForPump(pump_event):
                await self._uplink.on_pump(pump_event)
            case ForIntake(intake_event):
                await self._on_intake(intake_event)
            case ForTraining(training_event):
                self._rounds.handle(training_event)
            case ForRenewal(renewal_event):
                self._renewals.handle(renewal_event)
            case TaskCame(task):
                await self._rounds.on_task(task)
            case MessageArrived(topic, payload):
                self._uplink.on_message(topic, payload)
            case Noted():
                self._note(event)
            case ReconcileDue():
                await self._reconcile()
            case ReportDue():
                self._uplink.report_now()
            case HeartbeatDue():
                self._uplink.report_now()
                self._timers.start("heartbeat", self._heartbeat_ms, HeartbeatDue())
            case Stop():
                pass  # taken out of the loop before
            case _:
                assert_never(event)

    async def _on_link(self, event: link.LinkEvent) -> None:
        await self._uplink.on_link(event)
        if isinstance(event, link.Connected):
            # What waited for the network need not wait for its timer.
            self._inbox.post(ForIntake(PauseOver()))
            for family in self._models.families():
                self._inbox.post(ForSlot(family, FetchDue()))

    async def _on_intake(self, event: IntakeEvent) -> None:
        if isinstance(event, Accepted):
            self._uplink.assignment_version = event.verified.assignment.version
        decision = intake.INTAKE.decide(self._intake, event)
        self._intake = decision.state
        for effect in decision.effects:
            match effect:
                case intake.Verify(document):
                    self._works.start("verify-assignment", self._verify(document))
                case intake.OfferModels(verified):
                    await self._offer(verified)
                    self._uplink.report_soon()
                case intake.NoteRefusal(code, message):
                    logger.warning("assignment refused", extra={"code": code, "why": message})
                    self._inbox.post(Noted("release.refused", {"code": code, "message": message}))
                case intake.Pause(delay_ms):
                    self._timers.start("intake", delay_ms, ForIntake(PauseOver()))

    async def _verify(self, document: bytes) -> None:
        try:
            floors = await self._ledger.load_floors()
            verified = await self._verifier.verify(document, floors=floors, wall_ms=self._clock.wall_ms())
            await self._ledger.save_verified(verified)
        except TrustError as error:
            self._inbox.post(ForIntake(Refused(error.code, error.message)))
        except OutriderError as error:
            logger.warning("assignment cannot be verified yet", extra={"code": error.code, "why": error.message})
            self._inbox.post(ForIntake(Unavailable(error.message)))
        else:
            self._inbox.post(ForIntake(Accepted(verified)))

    async def _offer(self, verified: VerifiedAssignment) -> None:
        try:
            await self._models.offer(verified)
        except StorageError as error:
            # Intake has moved on, so its event must not be handled twice; the assignment is on disk and is read again.
            logger.error("the disk refuses the agent's state, trying again", extra={"why": error.message})
            self._timers.start("reconcile", RETRY_MS, ReconcileDue())

    async def _reconcile(self) -> None:
        verified = await self._ledger.load_verified()
        if verified is not None:
            self._uplink.assignment_version = verified.assignment.version
            await self._models.offer(verified)
        self._timers.start("reconcile", RECONCILE_MS, ReconcileDue())

    def _note(self, event: Noted) -> None:
        """Let the event be kept; the inbox does not wait for the disk."""
        if id(event) not in self._held and len(self._held) >= MAX_HELD_EVENTS:
            logger.error("event not recorded", extra={"event": event.name, "why": "too many wait for the disk"})
            return
        self._held.add(id(event))
        self._works.start(("note", id(event)), self._keep(event))

    async def _keep(self, event: Noted) -> None:
        # Some of it was said by others: the hub, a model's own process.
        clipped = {key: text[:MAX_DETAIL_CHARS] for key, text in event.detail.items()}
        try:
            await self._records.keep(DeviceEvent(name=event.name, detail=clipped))
        except StorageError:
            # Events are never evicted, so a full outbox pushes back: what happened is held here and said again.
            self._timers.start(("held", id(event)), RETRY_MS, event)
        else:
            self._held.discard(id(event))

    async def _watch_vitals(self) -> None:
        while True:
            # Buffered: one write a minute is no wear, and the reading before a crash is the one that explains it.
            for reading in self._vitals.read():
                await self._records.keep_soon(reading)
            for reading in self._queue_readings():
                # What the outbox says of itself shall cost no write of its own.
                await self._records.keep_soon(reading, grade=Grade.MEMORY)
            await asyncio.sleep(self._vitals_ms / 1000)

    def _queue_readings(self) -> tuple[Reading, ...]:
        depth = self._records.depth()
        return (
            Reading(name="queue_oldest_s", value=max(depth.oldest_ms.values(), default=0) / 1000),
            Reading(name="queue_lost_records", value=sum(depth.lost.values())),
            Reading(name="queue_buried_batches", value=depth.buried),
            Reading(name="queue_written_bytes", value=depth.wear.written_bytes),
            Reading(name="queue_syncs", value=depth.wear.syncs),
        )
