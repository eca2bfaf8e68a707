"""The one loop: takes event after event from the inbox and hands each to the part that it is for.

Start: count the boot, read slots and the accepted assignment, open the door, start the link. A device whose hub is
gone serves before it has tried to connect. End: close the door, record what is left, say goodbye, stop the hosts.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final, assert_never

from edge_agent.core import intake, link
from edge_agent.core.intake import (
    Accepted,
    Intake,
    IntakeEvent,
    PauseOver,
    Refused,
    TimeTrusted,
    Unavailable,
    Untimed,
)
from edge_agent.core.slot_values import FetchDue, Installed
from edge_agent.core.trusted_time import BY_THE_TIME
from edge_agent.driver.answering import Answering
from edge_agent.driver.events import (
    ForIntake,
    ForLink,
    ForPump,
    ForRenewal,
    ForSlot,
    ForSlots,
    ForTraining,
    HeartbeatDue,
    InstalledJudged,
    Inward,
    MessageArrived,
    Noted,
    ReconcileDue,
    ReportDue,
    Stop,
    TaskCame,
    TimeAttested,
    TimeDoubted,
)
from edge_agent.driver.loop import Loop
from edge_agent.driver.models import Models
from edge_agent.driver.records import Records
from edge_agent.driver.renewals import Renewals
from edge_agent.driver.rounds import Rounds
from edge_agent.driver.timekeeping import Timekeeping
from edge_agent.driver.uplink import Uplink
from edge_agent.ports import Ledger, Vitals
from edge_agent.update_ports import Verifier
from shared.errors import OutriderError, StorageError, TrustError
from shared.release import VerifiedAssignment
from shared.telemetry import DeviceEvent, Grade, Reading
from shared.wire.verification import UNATTESTED, Judged, StoredRelease
from shared.wire.verification import Refused as StoredRefusal

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
        loop: Loop,
        ledger: Ledger,
        verifier: Verifier,
        models: Models,
        uplink: Uplink,
        records: Records,
        answering: Answering,
        rounds: Rounds,
        timekeeping: Timekeeping,
        renewals: Renewals,
        vitals: Vitals,
        heartbeat_ms: int,
        vitals_ms: int,
    ) -> None:
        self._loop = loop
        self._inbox, self._works, self._timers = loop.inbox, loop.works, loop.timers
        self._ledger = ledger
        self._verifier = verifier
        self._models = models
        self._uplink = uplink
        self._records = records
        self._answering = answering
        self._rounds = rounds
        self._timekeeping = timekeeping
        self._renewals = renewals
        self._vitals = vitals
        self._heartbeat_ms = heartbeat_ms
        self._vitals_ms = vitals_ms
        self._intake = Intake()
        self._held: set[int] = set()

    async def start(self) -> None:
        """Restore what was, then begin to connect."""
        await self._models.restore()
        await self._timekeeping.start()
        await self._tell_of_lost_floors()
        self._rounds.start()
        self._works.start("judge-installed", self._judge())
        self._renewals.start()
        self._inbox.post(ForLink(link.StartLink()))
        self._inbox.post(HeartbeatDue())
        self._works.start("vitals", self._watch_vitals())

    async def _tell_of_lost_floors(self) -> None:
        try:
            await self._ledger.load_floors()
        except StorageError as error:
            logger.error("nothing new is installed", extra={"code": error.code, "why": error.message})
            self._inbox.post(Noted("floors.lost", {"code": error.code, "message": error.message}))

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
            case ForSlots(slot_events):
                await self._models.handle_all(slot_events)
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
            case InstalledJudged():
                await self._on_judged(event)
            case ReconcileDue():
                await self._reconcile()
            case ReportDue():
                self._uplink.report_now()
            case HeartbeatDue():
                self._uplink.report_now()
                self._timers.start("heartbeat", self._heartbeat_ms, HeartbeatDue())
            case TimeAttested():
                # Connections that the wrong time forbade may be allowed now.
                self._inbox.post(ForIntake(TimeTrusted()))
                self._renewals.time_changed()
                self._inbox.post(ForLink(link.StartLink()))
            case TimeDoubted():
                self._timekeeping.doubt()
            case Stop():
                pass  # taken out of the loop before
            case _:
                assert_never(event)

    async def _on_link(self, event: link.LinkEvent) -> None:
        await self._uplink.on_link(event)
        if isinstance(event, link.Connected):
            self._timekeeping.reconnected()
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
                    await self._models.trust(verified)
                    await self._offer(verified)
                    self._uplink.report_soon()
                case intake.NoteRefusal(code, message):
                    logger.warning("assignment refused", extra={"code": code, "why": message})
                    self._inbox.post(Noted("release.refused", {"code": code, "message": message}))
                case intake.NoteDelay(code, message):
                    self._inbox.post(Noted("release.delayed", {"code": code, "message": message}))
                case intake.AskTime():
                    self._timekeeping.hurry()
                case intake.ShowWaiting(message):
                    self._timekeeping.waits = message
                case intake.NoteWaiting(message):
                    logger.warning("an assignment waits for the time", extra={"why": message})
                    self._inbox.post(Noted("release.waits_for_time", {"message": message}))
                case intake.Pause(delay_ms):
                    self._timers.start("intake", delay_ms, ForIntake(PauseOver()))

    async def _judge(self) -> None:
        """Have what is installed looked at while it serves; only then is anything installed anew."""
        releases: tuple[StoredRelease, ...] = ()
        judged = Judged(refused={}, undecided={})
        try:
            releases = stored_releases(self._models.installed(), await self._ledger.load_verified())
            if releases:
                judged = await self._verifier.judge(releases, floors=await self._ledger.load_floors())
        except OutriderError as error:
            # No word on any release: each was accepted once, and its files are hashed before they are loaded.
            logger.warning("what is installed could not be judged", extra={"code": error.code, "why": error.message})
        self._inbox.post(InstalledJudged(releases=releases, judged=judged))

    async def _on_judged(self, event: InstalledJudged) -> None:
        for release in event.releases:
            refused = event.judged.refused.get(release.digest)
            undecided = event.judged.undecided.get(release.digest)
            if refused is not None:
                logger.error("an installed release is not served", extra={"code": refused.code, "why": refused.message})
                self._inbox.post(Noted("release.revoked", _detail(release, refused)))
            elif undecided is not None:
                logger.warning("an installed release runs on unjudged", extra={"why": undecided.message})
        await self._models.distrust({digest: (one.code, one.message) for digest, one in event.judged.refused.items()})
        self._uplink.report_soon()
        await self._reconcile()

    async def _verify(self, document: bytes) -> None:
        try:
            verified = await self._verified(document)
            await self._ledger.save_verified(verified)
            self._timekeeping.proven(verified.floors.time_ms)
        except TrustError as error:
            is_untimed = error.code == UNATTESTED
            event = Untimed(error.message) if is_untimed else Refused(error.code, error.message)
            self._inbox.post(ForIntake(event))
        except OutriderError as error:
            logger.warning("assignment cannot be verified yet", extra={"code": error.code, "why": error.message})
            self._inbox.post(ForIntake(Unavailable(error.message, error.code)))
        else:
            self._inbox.post(ForIntake(Accepted(verified)))

    async def _verified(self, document: bytes) -> VerifiedAssignment:
        """What the verifier accepts; something that has expired is judged anew when the hub tells another time."""
        time = self._timekeeping
        while True:
            floors, news = await self._ledger.load_floors(), time.news
            try:
                return await self._verifier.verify(
                    document, floors=floors, wall_ms=time.now_ms(), time_attested=time.attested
                )
            except TrustError as error:
                if error.code not in BY_THE_TIME:
                    raise
                await time.confirm()
                if time.news == news:
                    raise

    async def _offer(self, verified: VerifiedAssignment) -> None:
        try:
            await self._models.offer(verified)
        except StorageError as error:
            # Intake has moved on, so its event must not be handled twice; the assignment is on disk and is read again.
            logger.error("the disk refuses the agent's state, trying again", extra={"why": error.message})
            self._timers.start("reconcile", RETRY_MS, ReconcileDue())

    async def _reconcile(self) -> None:
        verified = await self._ledger.load_verified()
        if verified is not None and not self._models.withheld.names(verified):
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


def stored_releases(installed: tuple[Installed, ...], verified: VerifiedAssignment | None) -> tuple[StoredRelease, ...]:
    """Everything that a device may serve without asking anybody: what its slots hold and what was accepted last."""
    held = [(release.manifest, release.manifest_digest) for release in installed]
    held += [(model.manifest, model.manifest_digest) for model in (verified.models if verified is not None else ())]
    found = {
        digest: StoredRelease(family=manifest.family, version=manifest.version, digest=digest)
        for manifest, digest in held
    }
    return tuple(found.values())


def _detail(release: StoredRelease, refused: StoredRefusal) -> dict[str, str]:
    return {
        "family": release.family,
        "version": release.version,
        "code": refused.code,
        "message": refused.message,
    }
