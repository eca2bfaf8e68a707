"""The pump in front of a slow line: what is sent is what is needed, and hardly more."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import Final

import pytest

from edge_agent.core import pump
from edge_agent.core.pump import (
    AckArrived,
    AckTimedOut,
    BatchReady,
    LoadBatch,
    NothingWaiting,
    NotTaken,
    Pump,
    PumpEffect,
    PumpEvent,
    RestOver,
    SendBatch,
    Settle,
    StartAckTimer,
    StartRestTimer,
    StopAckTimer,
    StopRestTimer,
    Taken,
    WentOnline,
)
from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Ack, Batch, Verdict

EVENT, OUTCOME, RESULT, READING = RecordClass
COURIER_WINDOW: Final = 64
HOURS_MS: Final = 12 * 3_600_000


@dataclass
class SlowLine:
    """A perfect outbox, a line that takes one message after the other, and a hub that answers each after a while."""

    bytes_a_second: int
    batch_bytes: int
    answer_ms: int
    classes: tuple[RecordClass, ...]
    batches: int
    now_ms: float = 0.0
    pump: Pump = field(default_factory=Pump)
    sent: int = 0
    settled: set[BatchId] = field(default_factory=set)
    held: list[BatchId] = field(default_factory=list)
    _free_ms: float = 0.0
    _plan: list[tuple[float, int, PumpEvent | BatchId, object]] = field(default_factory=list)
    _timers: dict[object, int] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def run(self) -> None:
        """Until nothing happens any more."""
        self._at(0, WentOnline())
        while self._plan:
            self.now_ms, number, what, timer = heapq.heappop(self._plan)
            assert self.now_ms < HOURS_MS, "does not come to an end"
            if timer is not None and self._timers.get(timer) != number:
                continue
            if isinstance(what, BatchId):
                self.held.remove(what)
                self._at(0, Taken(what))
                verdict = Verdict(batch=what, status="stored")
                self._at(self.answer_ms, AckArrived(Ack(verdicts=(verdict,))))
                continue
            if isinstance(what, AckTimedOut):
                oldest = self.pump.lanes[what.klass].sent[0]
                what = AckTimedOut(what.klass, what.digest, held=oldest in self.held)
            decision = pump.decide(self.pump, what)
            self.pump = decision.state
            for effect in decision.effects:
                self._act(effect)

    def _at(self, delay_ms: float, what: PumpEvent | BatchId, timer: object = None) -> None:
        number = next(self._numbers)
        heapq.heappush(self._plan, (self.now_ms + delay_ms, number, what, timer))
        if timer is not None:
            self._timers[timer] = number

    def _act(self, effect: PumpEffect) -> None:
        match effect:
            case LoadBatch(klass, after, ask):
                self._at(2, self._loaded(klass, after, ask))
            case SendBatch(one) if one.batch not in self.held:
                self._publish(one.batch)
            case Settle(claim):
                self.settled.add(claim)
            case StartAckTimer(klass, digest, delay_ms):
                self._at(delay_ms, AckTimedOut(klass, digest), ("ack", klass))
            case StartRestTimer(klass, delay_ms):
                self._at(delay_ms, RestOver(klass), ("rest", klass))
            case StopAckTimer(klass):
                self._timers.pop(("ack", klass), None)
            case StopRestTimer(klass):
                self._timers.pop(("rest", klass), None)

    def _loaded(self, klass: RecordClass, after: int, ask: int) -> PumpEvent:
        for number in range(after + 1, self.batches + 1) if klass in self.classes else ():
            claim = BatchId(epoch="e", klass=int(klass), first=number, last=number, digest=f"{klass}-{number}")
            if claim not in self.settled:
                return BatchReady(Batch(batch=claim), ask)
        return NothingWaiting(klass, ask)

    def _publish(self, claim: BatchId) -> None:
        if len(self.held) >= COURIER_WINDOW:
            self._at(0, NotTaken(claim))
            return
        self.sent += 1
        self.held.append(claim)
        self._free_ms = max(self._free_ms, self.now_ms) + self.batch_bytes / self.bytes_a_second * 1000
        self._at(self._free_ms - self.now_ms, claim)


@pytest.mark.parametrize("answer_ms", [200, 3_000, 9_000])
@pytest.mark.parametrize("classes", [(RESULT,), (RESULT, READING), (OUTCOME, RESULT, READING)], ids=len)
@pytest.mark.parametrize(
    ("bytes_a_second", "batch_bytes"),
    [(1_000, 15_000), (2_000, 60_000), (3_000, 15_000), (5_000, 60_000), (8_000, 15_000), (20_000, 150_000)],
)
def test_a_slow_line_carries_each_batch_once(
    bytes_a_second: int, batch_bytes: int, classes: tuple[RecordClass, ...], answer_ms: int
) -> None:
    line = SlowLine(bytes_a_second, batch_bytes, answer_ms, classes, batches=50)
    line.run()
    needed = 50 * len(classes)
    assert len(line.settled) == needed
    assert line.sent < 1.05 * needed


def test_a_hub_that_is_slower_than_patience_gets_few_copies() -> None:
    line = SlowLine(100_000, 15_000, 25_000, (RESULT,), batches=200)
    line.run()
    assert len(line.settled) == 200
    assert line.sent < 2 * 200
