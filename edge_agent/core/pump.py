"""The pump: which batch of the outbox goes out next.

    decision = decide(pump, event)         nothing is saved: the outbox remembers what is not acknowledged

Rules of this file:
1. Of each class at most one batch is on its way; a class is loaded only when every more precious one has nothing to
   load or waits for its acknowledgement.
2. A batch is sent again, the same one, after a reconnect and when its acknowledgement does not come. That is safe: the
   outbox hands out the same batch until it is settled, and the hub counts it once.
3. A refused batch is settled too, because the hub will never take it; the first refusal in a row is noted. Only the
   first: the note is itself a record, and notes about refused notes would never end.

The driver carries out the effects of one decision in order, each before the next: `LoadBatch` after `Settle` must
find the next batch. Not here: bytes, disk, the courier.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import msgspec
from msgspec.structs import replace

from edge_agent.core.slot_values import Note
from shared.machine import Decision, Row, Table
from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Ack, Batch

FIRST_ACK_MS: Final = 10_000
LONGEST_ACK_MS: Final = 80_000


class PumpPhase(Enum):
    """Whether the link is up."""

    OFFLINE = "offline"
    ONLINE = "online"


class LanePhase(Enum):
    """QUIET: nothing waits. WAITING: something may. LOADING: asked the outbox. SENT: waits for the hub's answer."""

    QUIET = "quiet"
    WAITING = "waiting"
    LOADING = "loading"
    SENT = "sent"


class Lane(msgspec.Struct, frozen=True):
    """One class. `more`: records came while loading; `resends` and `refusals` count in a row."""

    phase: LanePhase = LanePhase.WAITING
    batch: BatchId | None = None
    more: bool = False
    resends: int = 0
    refusals: int = 0


class Pump(msgspec.Struct, frozen=True):
    """The lanes, most precious first."""

    phase: PumpPhase = PumpPhase.OFFLINE
    lanes: tuple[Lane, ...] = (Lane(),) * len(RecordClass)


class WentOnline(msgspec.Struct, frozen=True):
    """The link is up and the birth was sent."""


class WentOffline(msgspec.Struct, frozen=True):
    """The link is lost."""


class RecordsWaiting(msgspec.Struct, frozen=True):
    """A record of this class became durable."""

    klass: RecordClass


class BatchReady(msgspec.Struct, frozen=True):
    """Answer to LoadBatch: the oldest batch of its class that is not acknowledged."""

    batch: Batch


class NothingWaiting(msgspec.Struct, frozen=True):
    """Answer to LoadBatch: the class is empty."""

    klass: RecordClass


class AckArrived(msgspec.Struct, frozen=True):
    """The hub answered a batch."""

    ack: Ack


class AckTimedOut(msgspec.Struct, frozen=True):
    """The lane's timer: no answer to the batch with this digest."""

    klass: RecordClass
    digest: str


PumpEvent = WentOnline | WentOffline | RecordsWaiting | BatchReady | NothingWaiting | AckArrived | AckTimedOut


class LoadBatch(msgspec.Struct, frozen=True):
    """Ask the outbox for the class's next batch; answered by BatchReady or NothingWaiting."""

    klass: RecordClass


class SendBatch(msgspec.Struct, frozen=True):
    """Publish it; when the courier does not take it, do nothing: the timer will."""

    batch: Batch


class Settle(msgspec.Struct, frozen=True):
    """Let the outbox delete it."""

    batch: BatchId
    status: str


class StartAckTimer(msgspec.Struct, frozen=True):
    """Say AckTimedOut(klass, digest) after this time; one per class, replaced when started again."""

    klass: RecordClass
    digest: str
    delay_ms: int


class StopAckTimer(msgspec.Struct, frozen=True):
    """Forget the class's timer."""

    klass: RecordClass


PumpEffect = LoadBatch | SendBatch | Settle | StartAckTimer | StopAckTimer | Note
_Step = Decision[Pump, PumpEffect]


def decide(pump: Pump, event: PumpEvent) -> _Step:
    """The pump after this event, and what to do."""
    return PUMP.decide(pump, event)


def _online(pump: Pump, _: WentOnline) -> _Step:
    lanes = tuple(replace(lane, phase=LanePhase.WAITING, batch=None, more=False) for lane in pump.lanes)
    return _load(Pump(phase=PumpPhase.ONLINE, lanes=lanes))


def _offline(pump: Pump, _: WentOffline) -> _Step:
    # Everything counts as waiting again: the next connection starts by asking the outbox.
    lanes = tuple(replace(lane, phase=LanePhase.WAITING, batch=None, more=False, resends=0) for lane in pump.lanes)
    stops = tuple(StopAckTimer(klass) for klass in RecordClass if pump.lanes[klass].phase is LanePhase.SENT)
    return Decision(Pump(phase=PumpPhase.OFFLINE, lanes=lanes), stops)


def _waiting(pump: Pump, event: RecordsWaiting) -> _Step:
    lane = pump.lanes[event.klass]
    if lane.phase is LanePhase.QUIET:
        return _load(_with(pump, event.klass, replace(lane, phase=LanePhase.WAITING)))
    if lane.phase is LanePhase.LOADING and not lane.more:
        return Decision(_with(pump, event.klass, replace(lane, more=True)))
    return Decision(pump)


def _ready(pump: Pump, event: BatchReady) -> _Step:
    batch = event.batch.batch
    klass = RecordClass(batch.klass)
    lane = pump.lanes[klass]
    if lane.phase is not LanePhase.LOADING:
        return Decision(pump)
    delay_ms = min(LONGEST_ACK_MS, FIRST_ACK_MS << min(lane.resends, 10))
    sent = replace(lane, phase=LanePhase.SENT, batch=batch, more=False)
    effects = (SendBatch(event.batch), StartAckTimer(klass, batch.digest, delay_ms))
    return _load(_with(pump, klass, sent), *effects)


def _nothing(pump: Pump, event: NothingWaiting) -> _Step:
    lane = pump.lanes[event.klass]
    if lane.phase is not LanePhase.LOADING:
        return Decision(pump)
    # What came while the outbox was asked may have been missed by the answer.
    phase = LanePhase.WAITING if lane.more else LanePhase.QUIET
    return _load(_with(pump, event.klass, replace(lane, phase=phase, more=False)))


def _acked(pump: Pump, event: AckArrived) -> _Step:
    ack = event.ack
    if ack.batch.klass not in tuple(RecordClass):
        return Decision(pump)
    klass = RecordClass(ack.batch.klass)
    lane = pump.lanes[klass]
    settle = Settle(ack.batch, ack.status)
    if lane.phase is not LanePhase.SENT or lane.batch != ack.batch:
        # An answer from before a reconnect, or the second one: settling it saves a resend, and twice is harmless.
        return Decision(pump, (settle,))
    refusals = lane.refusals + 1 if ack.status == "refused" else 0
    effects: tuple[PumpEffect, ...] = (StopAckTimer(klass), settle)
    if refusals == 1:
        effects = (*effects, _refusal(ack))
    return _load(_with(pump, klass, Lane(refusals=refusals)), *effects)


def _acked_late(pump: Pump, event: AckArrived) -> _Step:
    return Decision(pump, (Settle(event.ack.batch, event.ack.status),))


def _timed_out(pump: Pump, event: AckTimedOut) -> _Step:
    lane = pump.lanes[event.klass]
    if lane.phase is not LanePhase.SENT or lane.batch is None or lane.batch.digest != event.digest:
        return Decision(pump)
    again = replace(lane, phase=LanePhase.WAITING, batch=None, resends=lane.resends + 1)
    return _load(_with(pump, event.klass, again))


def _stay(pump: Pump, _: PumpEvent) -> _Step:
    return Decision(pump)


def _load(pump: Pump, *effects: PumpEffect) -> _Step:
    """Ask for the most precious class that has something to load, unless a more precious answer is outstanding."""
    for klass in RecordClass:
        lane = pump.lanes[klass]
        if lane.phase is LanePhase.LOADING:
            break
        if lane.phase is LanePhase.WAITING:
            pump = _with(pump, klass, replace(lane, phase=LanePhase.LOADING, more=False))
            return Decision(pump, (*effects, LoadBatch(klass)))
    return Decision(pump, effects)


def _with(pump: Pump, klass: RecordClass, lane: Lane) -> Pump:
    return replace(pump, lanes=(*pump.lanes[:klass], lane, *pump.lanes[klass + 1 :]))


def _refusal(ack: Ack) -> Note:
    batch = ack.batch
    records = f"{batch.first}-{batch.last}"
    return Note("telemetry.refused", {"code": ack.code, "class": str(batch.klass), "records": records})


_OFF, _ON = PumpPhase.OFFLINE, PumpPhase.ONLINE

PUMP: Final[Table[PumpPhase, Pump, PumpEvent, PumpEffect]] = Table(
    "pump",
    phase_of=lambda pump: pump.phase,
    rows={
        (_OFF, WentOnline): Row((_ON,), _online),
        # A reconnect whose loss was not heard of.
        (_ON, WentOnline): Row((_ON,), _online),
        (_ON, WentOffline): Row((_OFF,), _offline),
        (_OFF, WentOffline): Row((_OFF,), _stay),
        (_ON, RecordsWaiting): Row((_ON,), _waiting),
        # Offline every lane is WAITING already.
        (_OFF, RecordsWaiting): Row((_OFF,), _stay),
        (_ON, BatchReady): Row((_ON,), _ready),
        (_ON, NothingWaiting): Row((_ON,), _nothing),
        # Answers to questions asked before the link was lost.
        (_OFF, BatchReady): Row((_OFF,), _stay),
        (_OFF, NothingWaiting): Row((_OFF,), _stay),
        (_ON, AckArrived): Row((_ON,), _acked),
        (_OFF, AckArrived): Row((_OFF,), _acked_late),
        (_ON, AckTimedOut): Row((_ON,), _timed_out),
        (_OFF, AckTimedOut): Row((_OFF,), _stay),
    },
)
