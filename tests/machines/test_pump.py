"""The pump as a script, and against an outbox and a hub that lose, repeat and delay."""

from __future__ import annotations

from itertools import product
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import pump
from edge_agent.core.pump import (
    AckArrived,
    AckTimedOut,
    BatchReady,
    LoadBatch,
    NothingWaiting,
    Pump,
    PumpEffect,
    PumpEvent,
    PumpPhase,
    RecordsWaiting,
    SendBatch,
    Settle,
    StartAckTimer,
    StopAckTimer,
    WentOffline,
    WentOnline,
)
from edge_agent.core.slot_values import Note
from shared.telemetry import BatchId, RecordClass
from shared.wire.messages import Ack, Batch

EVENT, OUTCOME, TELEMETRY = RecordClass.EVENT, RecordClass.OUTCOME, RecordClass.TELEMETRY
EPOCH = "0123456789abcdef"


def batch(klass: RecordClass, first: int = 1, last: int = 1) -> Batch:
    """A batch; its digest follows from its numbers."""
    claim = BatchId(epoch=EPOCH, klass=int(klass), first=first, last=last, digest=f"{klass}-{first}-{last}")
    return Batch(batch=claim, columns=b"")


def said(*events: PumpEvent, start: Pump | None = None) -> tuple[Pump, list[PumpEffect]]:
    """The pump after these events, and what the last one wanted."""
    state, effects = start or Pump(), []
    for event in events:
        decision = pump.decide(state, event)
        state, effects = decision.state, list(decision.effects)
    return state, effects


def stored(one: Batch) -> AckArrived:
    """The hub has it."""
    return AckArrived(Ack(batch=one.batch, status="stored"))


def refused(one: Batch) -> AckArrived:
    """The hub will never take it."""
    return AckArrived(Ack(batch=one.batch, status="refused", code="telemetry.conflict"))


def test_the_most_precious_class_is_loaded_first() -> None:
    state, effects = said(WentOnline())
    assert effects == [LoadBatch(EVENT)]
    state, effects = said(NothingWaiting(EVENT), start=state)
    assert effects == [LoadBatch(OUTCOME)]
    state, effects = said(BatchReady(batch(OUTCOME)), start=state)
    assert effects == [SendBatch(batch(OUTCOME)), StartAckTimer(OUTCOME, "1-1-1", 10_000), LoadBatch(TELEMETRY)]


def test_an_event_goes_before_the_next_telemetry() -> None:
    telemetry = batch(TELEMETRY)
    state, _ = said(WentOnline(), NothingWaiting(EVENT), NothingWaiting(OUTCOME), BatchReady(telemetry))
    state, effects = said(RecordsWaiting(EVENT), start=state)
    assert effects == [LoadBatch(EVENT)]
    state, effects = said(stored(telemetry), start=state)
    assert effects == [StopAckTimer(TELEMETRY), Settle(telemetry.batch, "stored")]
    state, effects = said(BatchReady(batch(EVENT)), start=state)
    assert effects[-1] == LoadBatch(TELEMETRY)


def test_one_batch_of_a_class_is_on_its_way_at_a_time() -> None:
    state, _ = said(WentOnline(), BatchReady(batch(EVENT)))
    _, effects = said(RecordsWaiting(EVENT), RecordsWaiting(EVENT), start=state)
    assert effects == []


def test_what_comes_while_the_outbox_is_asked_is_not_forgotten() -> None:
    state, _ = said(WentOnline(), RecordsWaiting(EVENT))
    _, effects = said(NothingWaiting(EVENT), start=state)
    assert effects == [LoadBatch(EVENT)]


def test_without_an_answer_the_batch_is_loaded_and_sent_again_more_patiently() -> None:
    one = batch(EVENT)
    state, _ = said(WentOnline(), BatchReady(one))
    patience = []
    for _ in range(5):
        state, effects = said(AckTimedOut(EVENT, one.batch.digest), start=state)
        assert effects == [LoadBatch(EVENT)]
        state, effects = said(BatchReady(one), start=state)
        assert effects[0] == SendBatch(one)
        patience += [effect.delay_ms for effect in effects if isinstance(effect, StartAckTimer)]
    assert patience == [20_000, 40_000, 80_000, 80_000, 80_000]


def test_a_timer_of_an_earlier_batch_does_nothing() -> None:
    state, _ = said(WentOnline(), BatchReady(batch(EVENT)))
    assert said(AckTimedOut(EVENT, "another"), start=state) == (state, [])


def test_losing_the_link_forgets_what_was_sent_and_asks_again() -> None:
    one = batch(EVENT)
    state, effects = said(WentOnline(), BatchReady(one), WentOffline())
    assert effects == [StopAckTimer(EVENT)]
    assert said(BatchReady(one), start=state) == (state, [])
    state, effects = said(WentOnline(), start=state)
    assert effects == [LoadBatch(EVENT)]


def test_a_late_answer_settles_and_disturbs_nothing() -> None:
    one = batch(EVENT)
    state, _ = said(WentOnline(), BatchReady(one), WentOffline())
    assert said(stored(one), start=state) == (state, [Settle(one.batch, "stored")])
    state, _ = said(WentOnline(), BatchReady(batch(EVENT, 2, 2)), start=state)
    assert said(stored(one), start=state) == (state, [Settle(one.batch, "stored")])


def test_a_refused_batch_is_settled_and_only_the_first_in_a_row_is_noted() -> None:
    one, two = batch(EVENT, 1, 1), batch(EVENT, 2, 2)
    state, effects = said(WentOnline(), BatchReady(one), refused(one))
    assert effects[:2] == [StopAckTimer(EVENT), Settle(one.batch, "refused")]
    detail = {"code": "telemetry.conflict", "class": "0", "records": "1-1"}
    assert Note("telemetry.refused", detail) in effects
    state, _ = said(NothingWaiting(OUTCOME), NothingWaiting(TELEMETRY), start=state)
    _, effects = said(BatchReady(two), refused(two), start=state)
    assert Settle(two.batch, "refused") in effects
    assert not [effect for effect in effects if isinstance(effect, Note)]


def test_an_answer_for_an_unknown_class_is_ignored() -> None:
    strange = AckArrived(Ack(batch=BatchId(epoch=EPOCH, klass=9, first=1, last=1, digest="x"), status="stored"))
    state, _ = said(WentOnline())
    assert said(strange, start=state) == (state, [])


def test_every_pair_has_a_row() -> None:
    assert set(pump.PUMP.rows) == set(product(PumpPhase, get_args(PumpEvent)))


class House:
    """An outbox of batches per class, a driver, and a hub behind a bad link; counts each effect."""

    def __init__(self, waiting: dict[RecordClass, int]) -> None:
        self.pump = Pump()
        self.outbox = {klass: [batch(klass, n, n) for n in range(1, count + 1)] for klass, count in waiting.items()}
        self.hub: list[BatchId] = []
        self.on_the_way: list[Ack] = []
        self.timers: dict[RecordClass, str] = {}
        self.inbox: list[PumpEvent] = []

    def say(self, event: PumpEvent, *, lossy: bool) -> None:
        """Let the pump decide, and carry out what it wants; a lossy link swallows batches."""
        decision = pump.decide(self.pump, event)
        self.pump = decision.state
        for effect in decision.effects:
            match effect:
                case LoadBatch(klass):
                    ready = self.outbox[klass]
                    self.inbox.append(BatchReady(ready[0]) if ready else NothingWaiting(klass))
                case SendBatch(one):
                    if not lossy:
                        known = one.batch in self.hub
                        self.hub += [] if known else [one.batch]
                        self.on_the_way.append(Ack(batch=one.batch, status="duplicate" if known else "stored"))
                case Settle(claim, _):
                    assert claim in self.hub, "nothing is deleted that the hub does not have"
                    klass = RecordClass(claim.klass)
                    self.outbox[klass] = [one for one in self.outbox[klass] if one.batch != claim]
                case StartAckTimer(klass, digest, _):
                    self.timers[klass] = digest
                case StopAckTimer(klass):
                    self.timers.pop(klass, None)

    def step(self, choice: int) -> None:
        """Let one thing happen."""
        if self.inbox and choice % 2:
            self.say(self.inbox.pop(0), lossy=choice % 8 == 7)
        elif choice == 0:
            self.say(WentOffline(), lossy=False)
        elif choice == 2:
            self.say(WentOnline(), lossy=False)
        elif choice == 4 and self.on_the_way:
            self.say(AckArrived(self.on_the_way.pop(0)), lossy=False)
        elif choice == 6 and self.on_the_way:
            self.on_the_way.pop(0)
        elif choice == 8 and self.timers:
            klass, digest = self.timers.popitem()
            self.say(AckTimedOut(klass, digest), lossy=False)

    def settle_down(self) -> None:
        """The link holds from now on."""
        self.say(WentOffline(), lossy=False)
        self.inbox.clear()
        self.say(WentOnline(), lossy=False)
        for _ in range(500):
            if self.inbox:
                self.say(self.inbox.pop(0), lossy=False)
            elif self.on_the_way:
                self.say(AckArrived(self.on_the_way.pop(0)), lossy=False)
            elif self.timers:
                klass, digest = self.timers.popitem()
                self.say(AckTimedOut(klass, digest), lossy=False)
            else:
                return
        raise AssertionError("does not come to rest")


@given(
    waiting=st.fixed_dictionaries({klass: st.integers(0, 3) for klass in RecordClass}),
    choices=st.lists(st.integers(0, 9), max_size=60),
)
def test_whatever_the_link_does_everything_arrives_once(waiting: dict[RecordClass, int], choices: list[int]) -> None:
    house = House(waiting)
    sent = [one.batch for klass in RecordClass for one in house.outbox[klass]]
    for choice in choices:
        house.step(choice)
    house.settle_down()
    assert all(not left for left in house.outbox.values())
    assert sorted(house.hub, key=lambda claim: (claim.klass, claim.first)) == sent
