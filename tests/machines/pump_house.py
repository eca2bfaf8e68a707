"""An outbox that is perfect, a driver, a broker and a hub that are not: what the pump is played against."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from edge_agent.core import pump
from edge_agent.core.pump import (
    AckArrived,
    AckTimedOut,
    BatchReady,
    Bury,
    Hurried,
    LoadBatch,
    NothingWaiting,
    NotTaken,
    PublishRefused,
    Pump,
    PumpEffect,
    PumpEvent,
    RecordsWaiting,
    RestOver,
    SendBatch,
    Settle,
    StartAckTimer,
    StartRestTimer,
    StopAckTimer,
    StopRestTimer,
    StorageRefused,
    WentOffline,
    WentOnline,
)
from edge_agent.core.slot_values import Note
from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Ack, Batch, Verdict

EPOCH = "0123456789abcdef"


@dataclass(frozen=True)
class Weather:
    """What goes wrong now: of what is sent, and of what is asked of the disk."""

    loses: bool = False
    has_no_room: bool = False
    bounces: int = 0
    fails: bool = False


WEATHERS: Final = (
    Weather(loses=True),
    Weather(has_no_room=True),
    Weather(bounces=0x97),
    Weather(bounces=0x87),
    Weather(fails=True),
    Weather(fails=True, loses=True),
)


@dataclass
class House:
    """Everything around one pump. `cursed` batches are taken by nobody: by the hub, or by the broker (odd ones)."""

    waiting: dict[RecordClass, int]
    cursed: frozenset[tuple[int, int]] = frozenset()
    pump: Pump = field(default_factory=Pump)
    weather: Weather = field(default_factory=Weather)
    hub: Counter[BatchId] = field(default_factory=Counter)
    buried: list[BatchId] = field(default_factory=list)
    answers: list[Verdict] = field(default_factory=list)
    inbox: list[PumpEvent] = field(default_factory=list)
    acks: dict[RecordClass, str] = field(default_factory=dict)
    rests: set[RecordClass] = field(default_factory=set)
    next: dict[RecordClass, int] = field(default_factory=dict)
    outbox: dict[RecordClass, list[Batch]] = field(default_factory=dict)
    accepted: list[BatchId] = field(default_factory=list)

    def __post_init__(self) -> None:
        for klass in RecordClass:
            self.next[klass], self.outbox[klass] = 1, []
            for _ in range(self.waiting.get(klass, 0)):
                self.put(klass)
        self.inbox.clear()

    def put(self, klass: RecordClass) -> None:
        """One more batch becomes durable."""
        number = self.next[klass]
        self.next[klass] += 1
        claim = BatchId(epoch=EPOCH, klass=int(klass), first=number, last=number, digest=f"{klass}-{number}")
        self.outbox[klass].append(Batch(batch=claim))
        self.accepted.append(claim)
        self.inbox.append(RecordsWaiting(klass))

    def say(self, event: PumpEvent) -> None:
        """Let the pump decide, and carry out what it wants."""
        decision = pump.decide(self.pump, event)
        self.pump = decision.state
        windows = [len(lane.sent) for lane in self.pump.lanes]
        assert max(windows) <= pump.WINDOW
        assert sum(windows) <= pump.MAX_IN_FLIGHT
        for lane in self.pump.lanes:
            assert [one.first for one in lane.sent] == sorted({one.first for one in lane.sent})
        for effect in decision.effects:
            self._act(effect)

    def _act(self, effect: PumpEffect) -> None:
        match effect:
            case LoadBatch(klass, after, ask):
                self.inbox.append(self._loaded(klass, after, ask))
            case SendBatch(one):
                self._publish(one)
            case Settle(claim):
                assert self.hub[claim], "nothing is deleted that the hub does not have"
                self._forget(claim)
            case Bury(claim, _):
                assert (claim.klass, claim.first) in self.cursed, "nothing is buried that may yet be taken"
                if self._forget(claim):
                    self.buried.append(claim)
            case Note():
                self.put(RecordClass.EVENT)
            case StartAckTimer(klass, digest, _):
                self.acks[klass] = digest
            case StopAckTimer(klass):
                del self.acks[klass]
            case StartRestTimer(klass, _):
                self.rests.add(klass)
            case StopRestTimer(klass):
                self.rests.remove(klass)

    def _loaded(self, klass: RecordClass, after: int, ask: int) -> PumpEvent:
        if self.weather.fails:
            return StorageRefused(klass)
        ready = [one for one in self.outbox[klass] if one.batch.first > after]
        return BatchReady(ready[0], ask) if ready else NothingWaiting(klass, ask)

    def _publish(self, one: Batch) -> None:
        claim = one.batch
        is_cursed = (claim.klass, claim.first) in self.cursed
        if self.weather.has_no_room:
            self.inbox.append(NotTaken(claim))
        elif self.weather.bounces:
            self.inbox.append(PublishRefused(batch=claim, code=self.weather.bounces, jitter=0.5))
        elif is_cursed and claim.first % 2:
            self.inbox.append(PublishRefused(batch=claim, code=0x95, jitter=0.5))
        elif self.weather.loses:
            pass
        elif is_cursed:
            self.answers.append(Verdict(batch=claim, status="refused", code="telemetry.conflict"))
        else:
            self.answers.append(Verdict(batch=claim, status="duplicate" if self.hub[claim] else "stored"))
            self.hub[claim] = 1

    def _forget(self, claim: BatchId) -> bool:
        if self.weather.fails:
            self.inbox.append(StorageRefused(RecordClass(claim.klass)))
            return False
        lane = self.outbox[RecordClass(claim.klass)]
        found = [one for one in lane if one.batch == claim]
        for one in found:
            lane.remove(one)
        return bool(found)

    def hear(self, *picks: int) -> None:
        """The hub's answers at these places arrive, in one message."""
        chosen = tuple(self.answers[pick % len(self.answers)] for pick in picks) if self.answers else ()
        self.answers = [one for one in self.answers if one not in chosen]
        self.say(AckArrived(Ack(verdicts=chosen)))

    def fire(self, choice: int) -> None:
        """One of the timers that run fires."""
        timers = [("ack", klass) for klass in sorted(self.acks)] + [("rest", klass) for klass in sorted(self.rests)]
        if timers:
            kind, klass = timers[choice % len(timers)]
            if kind == "ack":
                self.say(AckTimedOut(klass, self.acks.pop(klass)))
            else:
                self.rests.remove(klass)
                self.say(RestOver(klass))

    def step(self, choice: int, number: int) -> None:
        """Let one thing happen."""
        match choice:
            case 0:
                self.say(WentOffline())
            case 1:
                self.say(WentOnline())
            case 2:
                self.hear(number, number // 3, number // 7)
            case 3:
                self.answers = self.answers[: number % 3]
            case 4:
                self.answers += self.answers[:1]
            case 5:
                self.fire(number)
            case 6:
                self.put(RecordClass(number % len(RecordClass)))
            case 7:
                self.weather = WEATHERS[number % len(WEATHERS)]
            case 8:
                self.weather = Weather()
            case 9:
                self.say(Hurried())
            case _ if self.inbox:
                self.say(self.inbox.pop(0))

    def settle_down(self) -> None:
        """From now on nothing goes wrong; returns once the pump wants nothing any more."""
        self.weather = Weather()
        if self.pump.phase is pump.PumpPhase.OFFLINE:
            self.say(WentOnline())
        for _ in range(5_000):
            if self.inbox:
                self.say(self.inbox.pop(0))
            elif self.answers:
                self.hear(0)
            elif self.rests or self.acks:
                self.fire(0)
            else:
                return
        raise AssertionError("does not come to rest")
