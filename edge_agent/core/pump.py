"""The pump: which batches of the outbox go out next, and what becomes of those that nobody takes.

    decision = decide(pump, event)         nothing is saved: the outbox remembers what is not acknowledged

Rules of this file:
1. Of each class at most WINDOW batches are on their way, and at most MAX_IN_FLIGHT in all, of which one place is kept
   for class 0. A class is loaded only when every more precious one has nothing to load, rests, or has its window full.
2. Batches of a class are sent in order. Their answers may come in any order, once, twice or never. When the oldest has
   no answer in time, and at every connect, the whole class counts as unsent and is loaded again from its head. That is
   safe: the outbox hands out the same batches until they are settled, and the hub counts each once. The time does not
   count while the broker has yet to take the batch: on a slow line copies would only delay it. Nor does the answer to a
   batch that was sent twice say how long an answer takes, so only one that was sent once makes patience short again.
3. A batch that will never be taken, by the hub or by the broker, is buried: put aside with the reason. It holds up
   nothing, and its numbers become a gap that has to go out: once what is on its way is answered, the class is loaded
   from its head. The first of a row is noted; only the first, because the note is itself a record, and notes about
   refused notes would never end. A stored batch ends the row.
4. A class that is refused for now (quota, rights, a disk that fails) rests, and no other class with it.

Each `LoadBatch` is answered once, with the number that it was asked under; an answer to an earlier one is void. A gap
is a batch like any other. The driver asks the outbox in the order of the effects, and it answers in that order:
`LoadBatch` after `Settle` must not find what was settled. Not here: bytes, disk, the courier, drawing the jitter.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, get_args

import msgspec
from msgspec.structs import replace

from edge_agent.core.backoff import doubled_ms, drawn_ms
from edge_agent.core.slot_values import Note
from shared.machine import Decision, Row, Table
from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Ack, Batch, Verdict

WINDOW: Final = 4
MAX_IN_FLIGHT: Final = 12
FIRST_ACK_MS: Final = 10_000
LONGEST_ACK_MS: Final = 80_000
NO_ROOM_REST_MS: Final = 250
"""Until a batch is offered again that the courier had no room for; its room comes back with the broker's answers."""
FIRST_REST_MS: Final = 1_000
LONGEST_REST_MS: Final = 60_000
SHORTEST_REST_MS: Final = 200
BARRED_REST_MS: Final = 60_000
STORAGE_REST_MS: Final = 10_000
"""How long a class rests after the disk refused, so that a full disk does not become a busy loop."""
MAX_REASON_CHARS: Final = 200

NOT_AUTHORIZED: Final = 0x87
FOR_GOOD: Final = {0x90: "broker.topic_name", 0x95: "broker.packet_too_large", 0x99: "broker.payload_format"}
"""PUBACK reasons that the same message will meet every time (MQTT 5.0, section 3.4.2.1), as codes of ours."""


class PumpPhase(Enum):
    """Whether the link is up."""

    OFFLINE = "offline"
    ONLINE = "online"


class LanePhase(Enum):
    """QUIET: nothing waits. WAITING: something may. LOADING: asked the outbox. RESTING: waits for its rest timer."""

    QUIET = "quiet"
    WAITING = "waiting"
    LOADING = "loading"
    RESTING = "resting"


class Lane(msgspec.Struct, frozen=True):
    """One class.

    Attributes:
        sent: on their way, oldest first.
        ask: number of the newest LoadBatch; answers to earlier ones are void.
        more: records came while loading.
        again: a gap lies below what is on its way: nothing more goes out before that is answered.
        resends, rests: in a row, each making the next wait longer.
        copied: up to this number batches may have been sent twice.
        noted: the row of refusals that goes on was told.
    """

    phase: LanePhase = LanePhase.WAITING
    sent: tuple[BatchId, ...] = ()
    ask: int = 0
    more: bool = False
    again: bool = False
    resends: int = 0
    rests: int = 0
    copied: int = 0
    noted: bool = False


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
    """Answer to the LoadBatch of this number: the oldest batch that is not settled and begins above what it named."""

    batch: Batch
    ask: int


class NothingWaiting(msgspec.Struct, frozen=True):
    """Answer to the LoadBatch of this number: there is no such batch."""

    klass: RecordClass
    ask: int


class StorageRefused(msgspec.Struct, frozen=True):
    """The disk failed under a LoadBatch, Settle or Bury of this class."""

    klass: RecordClass


class NotTaken(msgspec.Struct, frozen=True):
    """The courier had no room for this batch."""

    batch: BatchId


class Taken(msgspec.Struct, frozen=True):
    """The broker has this batch; the hub has yet to hear of it."""

    batch: BatchId


class PublishRefused(msgspec.Struct, frozen=True, kw_only=True):
    """The broker acknowledged this batch with a failure, or would have. `jitter` is drawn from 0 to 1."""

    batch: BatchId
    code: int
    jitter: float


class AckArrived(msgspec.Struct, frozen=True):
    """The hub answered batches."""

    ack: Ack


class AckTimedOut(msgspec.Struct, frozen=True):
    """The class's ack timer: no answer to the batch with this digest; `held`: the broker has yet to take it."""

    klass: RecordClass
    digest: str
    held: bool = False


class RestOver(msgspec.Struct, frozen=True):
    """The class's rest timer."""

    klass: RecordClass


class Hurried(msgspec.Struct, frozen=True):
    """A person wants what waits to go now: no class rests any longer."""


PumpEvent = (
    WentOnline | WentOffline | RecordsWaiting | BatchReady | NothingWaiting | StorageRefused | NotTaken
    | Taken | PublishRefused | AckArrived | AckTimedOut | RestOver | Hurried
)  # fmt: skip


class LoadBatch(msgspec.Struct, frozen=True):
    """Ask the outbox for the next batch above this number; BatchReady, NothingWaiting or StorageRefused answer."""

    klass: RecordClass
    after: int
    ask: int


class SendBatch(msgspec.Struct, frozen=True):
    """Publish it, unless the courier holds it still; say NotTaken when the courier does not take it."""

    batch: Batch


class Settle(msgspec.Struct, frozen=True):
    """Let the outbox delete it."""

    batch: BatchId


class Bury(msgspec.Struct, frozen=True):
    """Let the outbox put it aside with the reason, and leave a gap; delete it where it is a gap itself."""

    batch: BatchId
    reason: str


class StartAckTimer(msgspec.Struct, frozen=True):
    """Say AckTimedOut(klass, digest) after this time; one per class, replaced when started again."""

    klass: RecordClass
    digest: str
    delay_ms: int


class StopAckTimer(msgspec.Struct, frozen=True):
    """Forget the class's ack timer."""

    klass: RecordClass


class StartRestTimer(msgspec.Struct, frozen=True):
    """Say RestOver(klass) after this time; one per class, replaced when started again."""

    klass: RecordClass
    delay_ms: int


class StopRestTimer(msgspec.Struct, frozen=True):
    """Forget the class's rest timer."""

    klass: RecordClass


PumpEffect = (
    LoadBatch | SendBatch | Settle | Bury | StartAckTimer | StopAckTimer | StartRestTimer | StopRestTimer | Note
)
_Step = Decision[Pump, PumpEffect]


def decide(pump: Pump, event: PumpEvent) -> _Step:
    """The pump after this event, and what to do."""
    return PUMP.decide(pump, event)


def _online(pump: Pump, _: WentOnline) -> _Step:
    stops = _stops(pump)
    lanes = tuple(_unsent(lane) for lane in pump.lanes)
    return _load(Pump(phase=PumpPhase.ONLINE, lanes=lanes), *stops)


def _offline(pump: Pump, _: WentOffline) -> _Step:
    # Everything counts as waiting again: the next connection starts by asking the outbox.
    lanes = tuple(replace(_unsent(lane), resends=0) for lane in pump.lanes)
    return Decision(Pump(phase=PumpPhase.OFFLINE, lanes=lanes), _stops(pump))


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
    if lane.phase is not LanePhase.LOADING or lane.ask != event.ask:
        return Decision(pump)
    after = replace(lane, phase=LanePhase.WAITING, sent=(*lane.sent, batch), more=False)
    return _load(_with(pump, klass, after), SendBatch(event.batch), *_ack_timer(klass, lane, after))


def _nothing(pump: Pump, event: NothingWaiting) -> _Step:
    lane = pump.lanes[event.klass]
    if lane.phase is not LanePhase.LOADING or lane.ask != event.ask:
        return Decision(pump)
    # What came while the outbox was asked may have been missed by the answer.
    phase = LanePhase.WAITING if lane.more or lane.again else LanePhase.QUIET
    return _load(_with(pump, event.klass, replace(lane, phase=phase, more=False)))


def _storage_refused(pump: Pump, event: StorageRefused) -> _Step:
    # What could not be settled lies below what is on its way: only from the head it is found again.
    return _rest(pump, event.klass, keep=0, delay_ms=STORAGE_REST_MS)


def _not_taken(pump: Pump, event: NotTaken) -> _Step:
    place = _place(pump, event.batch)
    if place is None:
        return Decision(pump)
    klass, index = place
    return _rest(pump, klass, keep=index, delay_ms=NO_ROOM_REST_MS)


def _taken(pump: Pump, event: Taken) -> _Step:
    klass, index = _place(pump, event.batch) or (RecordClass.EVENT, None)
    return Decision(pump, _patience(klass, pump.lanes[klass]) if index == 0 else ())


def _publish_refused(pump: Pump, event: PublishRefused) -> _Step:
    place = _place(pump, event.batch)
    if place is None:
        # Sent before the class was counted as unsent; it is sent again, and then this is said again.
        return Decision(pump)
    klass, index = place
    lane = pump.lanes[klass]
    for_good = FOR_GOOD.get(event.code)
    if for_good is not None:
        after, effects = _buried(lane, event.batch, for_good)
        return _load(_with(pump, klass, after), *effects, *_ack_timer(klass, lane, after))
    if event.code == NOT_AUTHORIZED:
        notes = () if lane.noted else (_note(event.batch, "broker.not_authorized"),)
        barred = _with(pump, klass, replace(lane, noted=True))
        return _rest(barred, klass, notes, keep=index, delay_ms=BARRED_REST_MS)
    delay_ms = rest_ms(lane.rests, jitter=event.jitter)
    return _rest(_with(pump, klass, replace(lane, rests=lane.rests + 1)), klass, keep=index, delay_ms=delay_ms)


def rest_ms(rests: int, *, jitter: float) -> int:
    """Full jitter over a window that doubles with each rest in a row."""
    window_ms = doubled_ms(FIRST_REST_MS, times=rests, longest_ms=LONGEST_REST_MS)
    return drawn_ms(window_ms, jitter=jitter, shortest_ms=SHORTEST_REST_MS)


def _acked(pump: Pump, event: AckArrived) -> _Step:
    before, effects = pump, list[PumpEffect]()
    for verdict in event.ack.verdicts:
        if verdict.batch.klass in tuple(RecordClass):
            klass = RecordClass(verdict.batch.klass)
            lane, wanted = _answered(pump.lanes[klass], verdict)
            pump = _with(pump, klass, lane)
            effects += wanted
    for klass in RecordClass:
        effects += _ack_timer(klass, before.lanes[klass], pump.lanes[klass])
    if pump.phase is PumpPhase.OFFLINE:
        return Decision(pump, tuple(effects))
    return _load(pump, *effects)


def _answered(lane: Lane, verdict: Verdict) -> tuple[Lane, tuple[PumpEffect, ...]]:
    if verdict.status == "refused":
        return _buried(lane, verdict.batch, verdict.code)
    settle = Settle(verdict.batch)
    if verdict.batch not in lane.sent:
        # An answer from before a reconnect, or the second one: settling it saves a resend, and twice is harmless.
        return lane, (settle,)
    resends = lane.resends if verdict.batch.first <= lane.copied else 0
    return replace(_without(lane, verdict.batch), resends=resends, rests=0, noted=False), (settle,)


def _buried(lane: Lane, batch: BatchId, code: str) -> tuple[Lane, tuple[PumpEffect, ...]]:
    bury = Bury(batch, code[:MAX_REASON_CHARS])
    effects = (bury,) if lane.noted else (bury, _note(batch, code))
    phase = LanePhase.WAITING if lane.phase is LanePhase.QUIET else lane.phase
    return replace(_without(lane, batch), phase=phase, again=True, noted=True), effects


def _without(lane: Lane, batch: BatchId) -> Lane:
    """The lane once this batch was answered; with the last one it looks again, since a gap may have come meanwhile."""
    if batch not in lane.sent:
        return lane
    sent = tuple(other for other in lane.sent if other != batch)
    is_drained = not sent and lane.phase is LanePhase.QUIET
    return replace(lane, sent=sent, phase=LanePhase.WAITING if is_drained else lane.phase)


def _timed_out(pump: Pump, event: AckTimedOut) -> _Step:
    lane = pump.lanes[event.klass]
    if not lane.sent or lane.sent[0].digest != event.digest:
        return Decision(pump)
    if event.held:
        return Decision(pump, _patience(event.klass, lane))
    late = replace(lane, resends=lane.resends + 1, copied=lane.sent[-1].last)
    if lane.phase is LanePhase.RESTING:
        return Decision(_with(pump, event.klass, replace(late, sent=())))
    return _load(_with(pump, event.klass, _unsent(late)))


def _rested(pump: Pump, event: RestOver) -> _Step:
    lane = pump.lanes[event.klass]
    if lane.phase is not LanePhase.RESTING:
        return Decision(pump)
    return _load(_with(pump, event.klass, replace(lane, phase=LanePhase.WAITING)))


def _hurried(pump: Pump, _: Hurried) -> _Step:
    stops = []
    for klass in RecordClass:
        lane = pump.lanes[klass]
        if lane.phase is LanePhase.RESTING:
            pump = _with(pump, klass, replace(lane, phase=LanePhase.WAITING))
            stops.append(StopRestTimer(klass))
    return _load(pump, *stops)


def _stay(pump: Pump, _: PumpEvent) -> _Step:
    return Decision(pump)


def _load(pump: Pump, *effects: PumpEffect) -> _Step:
    """Ask for the most precious class that may be loaded, unless the answer for a more precious one is outstanding."""
    on_the_way = sum(len(lane.sent) + (lane.phase is LanePhase.LOADING) for lane in pump.lanes)
    for klass in RecordClass:
        lane = pump.lanes[klass]
        if lane.phase is LanePhase.LOADING:
            break
        places = MAX_IN_FLIGHT if klass is RecordClass.EVENT else MAX_IN_FLIGHT - 1
        window = 1 if lane.again else WINDOW
        if lane.phase is LanePhase.WAITING and len(lane.sent) < window and on_the_way < places:
            asking = replace(lane, phase=LanePhase.LOADING, ask=lane.ask + 1, more=False, again=False)
            after = lane.sent[-1].last if lane.sent else 0
            return Decision(_with(pump, klass, asking), (*effects, LoadBatch(klass, after, asking.ask)))
    return Decision(pump, effects)


def _rest(pump: Pump, klass: RecordClass, told: tuple[PumpEffect, ...] = (), *, keep: int, delay_ms: int) -> _Step:
    """Let the class rest; of what is on its way only the `keep` oldest still count as sent."""
    lane = pump.lanes[klass]
    resting = replace(lane, phase=LanePhase.RESTING, sent=lane.sent[:keep], more=False)
    effects = (*told, *_ack_timer(klass, lane, resting), StartRestTimer(klass, delay_ms))
    return _load(_with(pump, klass, resting), *effects)


def _unsent(lane: Lane) -> Lane:
    return replace(lane, phase=LanePhase.WAITING, sent=(), more=False)


def _place(pump: Pump, batch: BatchId) -> tuple[RecordClass, int] | None:
    """The batch's class and its place among those on their way."""
    for klass in RecordClass:
        if batch in pump.lanes[klass].sent:
            return klass, pump.lanes[klass].sent.index(batch)
    return None


def _ack_timer(klass: RecordClass, before: Lane, after: Lane) -> tuple[PumpEffect, ...]:
    """The timer belongs to the oldest on its way: it starts anew when that is another one."""
    if before.sent[:1] == after.sent[:1]:
        return ()
    return _patience(klass, after) if after.sent else (StopAckTimer(klass),)


def _patience(klass: RecordClass, lane: Lane) -> tuple[PumpEffect, ...]:
    delay_ms = doubled_ms(FIRST_ACK_MS, times=lane.resends, longest_ms=LONGEST_ACK_MS)
    return (StartAckTimer(klass, lane.sent[0].digest, delay_ms),)


def _stops(pump: Pump) -> tuple[PumpEffect, ...]:
    acks = tuple(StopAckTimer(klass) for klass in RecordClass if pump.lanes[klass].sent)
    rests = tuple(StopRestTimer(klass) for klass in RecordClass if pump.lanes[klass].phase is LanePhase.RESTING)
    return acks + rests


def _with(pump: Pump, klass: RecordClass, lane: Lane) -> Pump:
    return replace(pump, lanes=(*pump.lanes[:klass], lane, *pump.lanes[klass + 1 :]))


def _note(batch: BatchId, code: str) -> Note:
    detail = {"code": code[:MAX_REASON_CHARS], "class": str(batch.klass), "records": f"{batch.first}-{batch.last}"}
    return Note("telemetry.refused", detail)


_HEARD_OFFLINE: Final = (WentOnline, AckArrived)
_OFF, _ON = PumpPhase.OFFLINE, PumpPhase.ONLINE

PUMP: Final[Table[PumpPhase, Pump, PumpEvent, PumpEffect]] = Table(
    "pump",
    phase_of=lambda pump: pump.phase,
    rows={
        (_OFF, WentOnline): Row((_ON,), _online),
        # A reconnect whose loss was not heard of.
        (_ON, WentOnline): Row((_ON,), _online),
        (_ON, WentOffline): Row((_OFF,), _offline),
        (_ON, RecordsWaiting): Row((_ON,), _waiting),
        (_ON, BatchReady): Row((_ON,), _ready),
        (_ON, NothingWaiting): Row((_ON,), _nothing),
        (_ON, StorageRefused): Row((_ON,), _storage_refused),
        (_ON, NotTaken): Row((_ON,), _not_taken),
        (_ON, Taken): Row((_ON,), _taken),
        (_ON, PublishRefused): Row((_ON,), _publish_refused),
        (_ON, AckArrived): Row((_ON,), _acked),
        (_OFF, AckArrived): Row((_OFF,), _acked),
        (_ON, AckTimedOut): Row((_ON,), _timed_out),
        (_ON, RestOver): Row((_ON,), _rested),
        (_ON, Hurried): Row((_ON,), _hurried),
        # Offline every lane waits already, nothing is on its way, nothing rests, and answers from before are void.
        **{(_OFF, event): Row((_OFF,), _stay) for event in get_args(PumpEvent) if event not in _HEARD_OFFLINE},
    },
)
