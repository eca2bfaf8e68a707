"""The link to the hub: connects, says birth and state, sends batches, takes acknowledgements and assignments.

Rules of this file:
1. Birth is the first message after every connect, then the state, then batches.
2. A batch leaves the outbox because the hub has acknowledged it, never because the broker took it.
3. Nothing here waits for the disk: each thing that is asked of the outbox is a task of its own, in order, and a disk
   that does not answer within DISK_WITHIN_S counts as one that refuses. Link and slots go on meanwhile.
4. What arrives is decoded and checked here and goes into the inbox as an event; what is not understood is logged once
   per kind and counted, and never stops the agent.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar, assert_never

import msgspec
from msgspec.structs import replace

from edge_agent import __version__
from edge_agent.core import link, pump
from edge_agent.core.intake import Arrived
from edge_agent.core.slot_values import Note
from edge_agent.core.trusted_time import WRONG_DATES
from edge_agent.driver.events import ForIntake, ForLink, ForPump, Noted, ReportDue, TaskCame, TimeDoubted
from edge_agent.driver.loop import Loop
from edge_agent.ports import Courier, Outbox
from shared.clock import Clock
from shared.errors import ProtocolViolation, StorageError, TransferError
from shared.ids import DeviceId
from shared.telemetry import BatchId, RecordClass
from shared.wire import topics
from shared.wire.envelope import WIRE_VERSION, Envelope, decode_envelope, encode_envelope
from shared.wire.messages import (
    KIND_OF,
    Ack,
    Assign,
    Batch,
    Birth,
    Death,
    Message,
    Reported,
    RoundReply,
    RoundTask,
    RunningModel,
    decode_body,
    encode_body,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

DISK_WITHIN_S: Final = 10.0
REPORT_DELAY_MS: Final = 200
"""Reports asked for within this time become one."""

_LEAF: Final[dict[RecordClass, topics.UpLeaf]] = {
    RecordClass.EVENT: "event",
    RecordClass.OUTCOME: "outcome",
    RecordClass.RESULT: "telemetry",
    RecordClass.READING: "telemetry",
}


class RunningDevice(msgspec.Struct, frozen=True):
    """Who speaks: the device, its profile's name, and how often it was started."""

    device: DeviceId
    profile: str
    boot: int


class Uplink:
    """The driver's part that talks to the hub."""

    def __init__(
        self,
        *,
        running: RunningDevice,
        clock: Clock,
        loop: Loop,
        courier: Courier,
        outbox: Outbox,
        models: Callable[[], tuple[RunningModel, ...]],
    ) -> None:
        self._running = running
        self._clock = clock
        self._inbox, self._works, self._timers = loop.inbox, loop.works, loop.timers
        self._courier = courier
        self._outbox = outbox
        self._models = models
        self._link = link.Link()
        self._pump = pump.Pump()
        self._session = 0
        self._revision = 0
        self._unknown: set[str] = set()
        self._bounced: set[tuple[str, int]] = set()
        self._told_why = ""
        self.assignment_version = 0

    @property
    def state(self) -> str:
        """`online`, `connecting` or `offline`."""
        return self._link.phase.value

    @property
    def detail(self) -> str:
        """Why the link is not up; empty when it is."""
        return self._link.detail

    @property
    def online(self) -> bool:
        """Whether messages reach the broker now."""
        return self._link.phase is link.LinkPhase.ONLINE

    # Link

    async def on_link(self, event: link.LinkEvent) -> None:
        """Let the link machine decide and carry out what it says."""
        before = self._link.phase
        decision = link.decide(self._link, event)
        self._link = decision.state
        for effect in decision.effects:
            match effect:
                case link.Connect():
                    self._works.start("connect", self._connect())
                case link.Disconnect():
                    self._works.cancel("connect")
                    self._works.start("disconnect", self._courier.disconnect())
                case link.StartTimer(delay_ms):
                    self._timers.start("link", delay_ms, ForLink(link.TimerFired()))
                case link.StopTimer():
                    self._timers.stop("link")
                case link.Announce():
                    self._announce()
        if self._link.phase is before:
            return
        if self.online:
            self._told_why = ""
            self._bounced.clear()
            logger.info("hub link up", extra={"boot": self._running.boot, "session": self._session})
        elif before is link.LinkPhase.ONLINE:
            logger.warning("hub link lost", extra={"why": self._link.detail})
            self._inbox.post(ForPump(pump.WentOffline()))
        elif self._link.detail and self._link.detail != self._told_why:
            self._told_why = self._link.detail  # it is tried again and again; only what is new is worth a line
            logger.warning("hub cannot be reached", extra={"why": self._link.detail})

    def lost(self, reason: str) -> None:
        """The courier says that the link is gone."""
        self._inbox.post(ForLink(link.Lost(reason=reason, jitter=random.random())))

    def refused(self, topic: str, ref: BatchId | None, code: int, reason: str) -> None:
        """The broker does not take a message; a batch stays in the outbox until the pump has decided."""
        if (topic, code) not in self._bounced:
            self._bounced.add((topic, code))
            logger.warning("the broker refuses messages", extra={"topic": topic, "reason": reason})
        if ref is not None:
            self._inbox.post(ForPump(pump.PublishRefused(batch=ref, code=code, jitter=random.random())))

    def taken(self, ref: BatchId) -> None:
        """The broker has a batch."""
        self._inbox.post(ForPump(pump.Taken(ref)))

    async def _connect(self) -> None:
        self._session += 1
        device = self._running.device
        will = Death(boot=self._running.boot, session=self._session)
        try:
            await self._courier.connect(
                will_topic=topics.up(device, "death"),
                will_payload=self._pack(will),
                subscribe=topics.down_filter(device),
            )
        except TransferError as error:
            if error.code == WRONG_DATES:
                self._inbox.post(TimeDoubted())
            self._inbox.post(ForLink(link.ConnectFailed(reason=error.message, jitter=random.random())))
        else:
            self._inbox.post(ForLink(link.Connected()))

    def _announce(self) -> None:
        birth = Birth(
            boot=self._running.boot,
            session=self._session,
            epoch=self._outbox.epoch,
            agent_version=__version__,
            profile=self._running.profile,
            assignment_version=self.assignment_version,
            models=self._models(),
        )
        self.send("birth", birth)
        self.report_now()
        self._inbox.post(ForPump(pump.WentOnline()))

    async def say_goodbye(self) -> None:
        """Tell the hub that this is a clean stop, then leave without the last will."""
        if self.online:
            self.send("death", Death(boot=self._running.boot, session=self._session, reason="stopped"))
        await self._courier.disconnect()

    # State reports

    def report_soon(self) -> None:
        """Tell the hub the device's state soon; repeated calls become one report."""
        self._timers.start("report", REPORT_DELAY_MS, ReportDue())

    def report_now(self) -> None:
        """Tell the hub the device's state, if it can be told; it is told anew at every connect."""
        if not self.online:
            return
        depth = self._outbox.depth()
        self._revision += 1
        reported = Reported(
            revision=self._revision,
            assignment_version=self.assignment_version,
            models=self._models(),
            queue_records=sum(depth.records.values()),
            queue_bytes=depth.bytes,
        )
        if not self.send("reported", reported):
            self.report_soon()

    # Batches

    async def on_pump(self, event: pump.PumpEvent) -> None:
        """Let the pump decide and carry out what it says; the outbox is asked in that order."""
        if isinstance(event, pump.AckTimedOut):
            oldest = self._pump.lanes[event.klass].sent[:1]
            event = replace(event, held=any(map(self._courier.holds, oldest)))
        decision = pump.decide(self._pump, event)
        self._pump = decision.state
        for effect in decision.effects:
            match effect:
                case pump.LoadBatch(klass, after, ask):
                    self._works.start(("load", klass), self._load(klass, after=after, ask=ask))
                case pump.SendBatch(batch):
                    # A copy of what still waits for a slow line would only come behind it.
                    ref, leaf = batch.batch, _LEAF[RecordClass(batch.batch.klass)]
                    if not self._courier.holds(ref) and not self.send(leaf, batch, ref=ref):
                        self._inbox.post(ForPump(pump.NotTaken(ref)))
                case pump.Settle(batch_id):
                    self._let_go(batch_id, partial(self._outbox.settle, batch_id))
                case pump.Bury(batch_id, reason):
                    self._let_go(batch_id, partial(self._outbox.bury, batch_id, reason=reason))
                case pump.StartAckTimer(klass, digest, delay_ms):
                    self._timers.start(("ack", klass), delay_ms, ForPump(pump.AckTimedOut(klass, digest)))
                case pump.StopAckTimer(klass):
                    self._timers.stop(("ack", klass))
                case pump.StartRestTimer(klass, delay_ms):
                    self._timers.start(("rest", klass), delay_ms, ForPump(pump.RestOver(klass)))
                case pump.StopRestTimer(klass):
                    self._timers.stop(("rest", klass))
                case Note(name, detail):
                    self._inbox.post(Noted(name, detail))
                case _:
                    assert_never(effect)

    def _let_go(self, batch: BatchId, ask: Callable[[], Awaitable[bool]]) -> None:
        async def work() -> None:
            try:
                await _in_time(ask())
            except StorageError as error:
                # It will be sent once more, and the hub will say that it has it.
                logger.error("answered records cannot be deleted", extra={"why": error.message})
                self._inbox.post(ForPump(pump.StorageRefused(RecordClass(batch.klass))))

        self._works.start(("let go", batch), work())

    async def _load(self, klass: RecordClass, *, after: int, ask: int) -> None:
        try:
            batch = await _in_time(self._outbox.load(klass, after=after))
        except StorageError as error:
            logger.error("records cannot be read", extra={"why": error.message})
            self._inbox.post(ForPump(pump.StorageRefused(klass)))
            return
        answer = pump.NothingWaiting(klass, ask) if batch is None else pump.BatchReady(batch, ask)
        self._inbox.post(ForPump(answer))

    # Messages

    def on_message(self, topic: str, payload: bytes) -> None:
        """Take apart what arrived and say it to the part that it is for."""
        try:
            message = _open(topic, payload, device=self._running.device)
        except ProtocolViolation as error:
            if error.code not in self._unknown:
                self._unknown.add(error.code)
                logger.warning("message not understood", extra={"code": error.code, "why": error.message})
            return
        match message:
            case Ack():
                self._inbox.post(ForPump(pump.AckArrived(message)))
            case Assign():
                self._inbox.post(ForIntake(Arrived(message.document)))
            case RoundTask():
                self._inbox.post(TaskCame(message))
            case Birth() | Death() | Batch() | Reported() | RoundReply():
                logger.warning("message for the hub came to the device", extra={"kind": KIND_OF[type(message)]})

    def send(self, leaf: topics.UpLeaf, message: Message, *, ref: BatchId | None = None) -> bool:
        """Publish a message now; False when the link does not take it: whoever needs it sends it again."""
        return self._courier.publish(topics.up(self._running.device, leaf), self._pack(message), ref=ref)

    def _pack(self, message: Message) -> bytes:
        return encode_envelope(
            Envelope(
                v=WIRE_VERSION,
                id=secrets.token_hex(8),
                kind=KIND_OF[type(message)],
                device=self._running.device,
                boot=self._running.boot,
                wall_ms=self._clock.wall_ms(),
                mono_ms=self._clock.mono_ms(),
                body=encode_body(message),
            )
        )


async def _in_time(work: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(DISK_WITHIN_S):
            return await work
    except TimeoutError as error:
        message = f"the disk has not answered for {DISK_WITHIN_S:g} s"
        raise StorageError(message, code="storage.stalled", hint="look at the system's log") from error


def _open(topic: str, payload: bytes, *, device: DeviceId) -> Message:
    topics.parse_down(topic)
    envelope = decode_envelope(payload)
    if envelope.device != device:
        raise ProtocolViolation(f"the message is for {envelope.device[:80]!r}", code="protocol.device")
    return decode_body(envelope)
