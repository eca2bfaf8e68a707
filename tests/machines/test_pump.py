"""The pump as a script, and against an outbox, a broker and a hub that lose, repeat, delay, refuse and fail."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core import pump
from edge_agent.core.pump import (
    MAX_IN_FLIGHT,
    WINDOW,
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
    PumpPhase,
    RecordsWaiting,
    RestOver,
    SendBatch,
    Settle,
    StartAckTimer,
    StartRestTimer,
    StopAckTimer,
    StopRestTimer,
    StorageRefused,
    Taken,
    WentOffline,
    WentOnline,
)
from edge_agent.core.slot_values import Note
from shared.telemetry import BatchId, Gap, RecordClass
from shared.wire.messages import Ack, Batch, Verdict
from tests.machines.pump_house import House

EVENT, OUTCOME, RESULT, READING = RecordClass
EPOCH = "0123456789abcdef"
QUOTA, BARRED, TOO_LARGE = 0x97, 0x87, 0x95


def batch(klass: RecordClass, first: int, last: int | None = None) -> Batch:
    """A batch; its digest follows from its numbers."""
    last = first if last is None else last
    claim = BatchId(epoch=EPOCH, klass=int(klass), first=first, last=last, digest=f"{klass}-{first}-{last}")
    return Batch(batch=claim, columns=b"")


def ack(*batches: Batch) -> AckArrived:
    """The hub has them."""
    return AckArrived(Ack(verdicts=tuple(Verdict(batch=one.batch, status="stored") for one in batches)))


def refused(*batches: Batch) -> AckArrived:
    """The hub will never take them."""
    code = "telemetry.conflict"
    return AckArrived(Ack(verdicts=tuple(Verdict(batch=one.batch, status="refused", code=code) for one in batches)))


def bounced(one: Batch, code: int, *, jitter: float = 1.0) -> PublishRefused:
    """The broker does not take it."""
    return PublishRefused(batch=one.batch, code=code, jitter=jitter)


Saying = PumpEvent | Callable[[Pump], PumpEvent]


def ready(one: Batch) -> Callable[[Pump], PumpEvent]:
    """The answer to the newest load of its class, whenever it is said."""
    return lambda state: BatchReady(one, state.lanes[one.batch.klass].ask)


def nothing(klass: RecordClass) -> Callable[[Pump], PumpEvent]:
    """The other answer to it."""
    return lambda state: NothingWaiting(klass, state.lanes[klass].ask)


class Script:
    """A pump, and what it wanted after the last thing that was said to it."""

    def __init__(self) -> None:
        self.pump = Pump()
        self.effects: list[PumpEffect] = []

    def say(self, *sayings: Saying) -> list[PumpEffect]:
        """What the pump wants after the last of these."""
        for saying in sayings:
            decision = pump.decide(self.pump, saying(self.pump) if callable(saying) else saying)
            self.pump, self.effects = decision.state, list(decision.effects)
        return self.effects

    def until(self, klass: RecordClass, *batches: Batch) -> list[PumpEffect]:
        """Go online with nothing in the more precious classes and these on their way in this one."""
        self.say(WentOnline())
        for empty in range(klass):
            self.say(nothing(RecordClass(empty)))
        for one in batches:
            self.say(ready(one))
        return self.effects

    @property
    def sent(self) -> list[list[int]]:
        """First numbers of what is on its way, by class."""
        return [[one.first for one in lane.sent] for lane in self.pump.lanes]


def loads(effects: list[PumpEffect]) -> list[tuple[RecordClass, int]]:
    """The loads among them."""
    return [(effect.klass, effect.after) for effect in effects if isinstance(effect, LoadBatch)]


def notes(effects: list[PumpEffect]) -> list[Note]:
    """The notes among them."""
    return [effect for effect in effects if isinstance(effect, Note)]


# Order and windows


def test_the_most_precious_class_is_loaded_first() -> None:
    script = Script()
    assert script.say(WentOnline()) == [LoadBatch(EVENT, 0, 1)]
    assert script.say(nothing(EVENT)) == [LoadBatch(OUTCOME, 0, 1)]
    one = batch(OUTCOME, 1, 7)
    effects = script.say(ready(one))
    assert effects == [SendBatch(one), StartAckTimer(OUTCOME, "1-1-7", 10_000), LoadBatch(OUTCOME, 7, 2)]
    assert script.say(nothing(OUTCOME)) == [LoadBatch(RESULT, 0, 1)]


def test_a_class_is_sent_in_order_up_to_its_window_then_the_next_class_comes() -> None:
    script = Script()
    batches = [batch(EVENT, n) for n in range(1, WINDOW + 1)]
    effects = script.until(EVENT, *batches)
    assert script.sent[EVENT] == [1, 2, 3, 4]
    assert effects == [SendBatch(batches[-1]), LoadBatch(OUTCOME, 0, 1)]


def test_an_answer_makes_room_for_the_next_batch() -> None:
    script = Script()
    batches = [batch(READING, n) for n in range(1, WINDOW + 1)]
    script.until(READING, *batches)
    assert script.say(ack(batches[0])) == [
        Settle(batches[0].batch),
        StartAckTimer(READING, batches[1].batch.digest, 10_000),
        LoadBatch(READING, 4, 5),
    ]


def test_an_event_goes_before_the_next_reading_although_all_windows_are_full() -> None:
    script = Script()
    script.until(EVENT)
    script.say(nothing(EVENT))
    for klass in (OUTCOME, RESULT, READING):
        for number in range(1, WINDOW + 1):
            script.say(ready(batch(klass, number)))
    assert sum(map(len, script.sent)) == MAX_IN_FLIGHT - 1
    assert script.say(RecordsWaiting(EVENT)) == [LoadBatch(EVENT, 0, 2)]
    script.say(ready(batch(EVENT, 1)))
    assert sum(map(len, script.sent)) == MAX_IN_FLIGHT
    assert loads(script.effects) == []


def test_a_gap_goes_out_like_a_batch() -> None:
    script = Script()
    claim = BatchId(epoch=EPOCH, klass=READING, first=1, last=900, digest="gap")
    gap = Batch(batch=claim, gap=Gap(reason="evicted", records=900))
    effects = script.until(READING, gap)
    assert effects == [SendBatch(gap), StartAckTimer(READING, "gap", 10_000), LoadBatch(READING, 900, 2)]
    assert script.say(ack(gap))[0] == Settle(claim)


def test_what_comes_while_the_outbox_is_asked_is_not_forgotten() -> None:
    script = Script()
    script.say(WentOnline(), RecordsWaiting(EVENT))
    assert script.say(nothing(EVENT)) == [LoadBatch(EVENT, 0, 2)]
    assert loads(script.say(nothing(EVENT))) == [(OUTCOME, 0)]


def test_a_quiet_class_is_woken_by_its_records() -> None:
    script = Script()
    script.until(READING)
    script.say(nothing(READING))
    assert script.say(RecordsWaiting(OUTCOME)) == [LoadBatch(OUTCOME, 0, 2)]


# Answers


def test_without_an_answer_the_whole_class_is_sent_again_more_patiently() -> None:
    script = Script()
    one, two = batch(EVENT, 1), batch(EVENT, 2)
    script.until(EVENT, one, two)
    patience = []
    for _ in range(5):
        script.say(nothing(EVENT))
        assert loads(script.say(AckTimedOut(EVENT, one.batch.digest))) == [(EVENT, 0)]
        effects = script.say(ready(one))
        patience += [effect.delay_ms for effect in effects if isinstance(effect, StartAckTimer)]
        assert script.say(ready(two))[0] == SendBatch(two)
    assert patience == [20_000, 40_000, 80_000, 80_000, 80_000]


def test_a_lost_answer_in_the_middle_holds_up_nothing_until_it_is_the_oldest() -> None:
    script = Script()
    one, two, three = (batch(EVENT, n) for n in (1, 2, 3))
    script.until(EVENT, one, two, three)
    script.say(ack(one, three))
    assert script.sent[EVENT] == [2]
    script.say(nothing(EVENT))
    assert loads(script.say(AckTimedOut(EVENT, two.batch.digest))) == [(EVENT, 0)]


def test_a_timer_of_an_earlier_batch_does_nothing() -> None:
    script = Script()
    script.until(EVENT, batch(EVENT, 1), batch(EVENT, 2))
    before = script.pump
    assert script.say(AckTimedOut(EVENT, batch(EVENT, 2).batch.digest)) == []
    assert script.pump == before


def test_answers_come_in_any_order_and_the_next_load_begins_above_the_newest_on_its_way() -> None:
    script = Script()
    batches = [batch(EVENT, n) for n in (1, 2, 3, 4)]
    script.until(EVENT, *batches)
    effects = script.say(ack(batches[3], batches[1]))
    # The oldest is the same as before, so its timer runs on.
    assert effects == [Settle(batches[3].batch), Settle(batches[1].batch), LoadBatch(EVENT, 3, 5)]
    assert script.sent[EVENT] == [1, 3]


def test_a_repeated_answer_settles_again_and_disturbs_nothing() -> None:
    script = Script()
    one, two = batch(EVENT, 1), batch(EVENT, 2)
    script.until(EVENT, one, two)
    script.say(ack(one))
    before = script.pump
    assert script.say(ack(one, one)) == [Settle(one.batch), Settle(one.batch)]
    assert script.pump == before


def test_an_answer_for_something_unknown_settles_what_the_outbox_may_know() -> None:
    script = Script()
    script.until(EVENT, batch(EVENT, 1))
    before = script.pump
    stranger = batch(READING, 900)
    assert script.say(ack(stranger)) == [Settle(stranger.batch)]
    assert script.pump == before
    strange = Verdict(batch=BatchId(epoch=EPOCH, klass=9, first=1, last=1, digest="x"), status="stored")
    assert script.say(AckArrived(Ack(verdicts=(strange,)))) == []
    assert script.say(AckArrived(Ack(verdicts=()))) == []


def test_a_class_that_is_drained_looks_once_more_for_what_was_left_or_lost_meanwhile() -> None:
    script = Script()
    one, two = batch(READING, 1), batch(READING, 2)
    script.until(READING, one, two)
    script.say(nothing(READING))
    assert loads(script.say(ack(two))) == []
    assert loads(script.say(refused(one))) == [(READING, 0)]
    assert loads(script.say(nothing(READING))) == []


def test_an_answer_to_what_was_sent_once_makes_patience_short_again() -> None:
    script = Script()
    one, two, three = (batch(EVENT, n) for n in (1, 2, 3))
    script.until(EVENT, one)
    script.say(AckTimedOut(EVENT, one.batch.digest))
    script.say(ready(one), ack(one))
    effects = script.say(ready(two))
    assert StartAckTimer(EVENT, two.batch.digest, 20_000) in effects, "it may be the first copy's answer"
    script.say(ack(two))
    assert StartAckTimer(EVENT, three.batch.digest, 10_000) in script.say(ready(three))


def test_what_the_broker_has_yet_to_take_is_not_sent_again() -> None:
    script = Script()
    one, two = batch(EVENT, 1), batch(EVENT, 2)
    script.until(EVENT, one, two)
    digest = one.batch.digest
    script.say(nothing(EVENT))
    again = [StartAckTimer(EVENT, digest, 10_000)]
    for _ in range(3):
        assert script.say(AckTimedOut(EVENT, digest, held=True)) == again
    assert script.say(Taken(one.batch)) == again, "only now the hub can hear of it"
    assert script.say(Taken(two.batch)) == []
    assert script.sent[EVENT] == [1, 2]
    assert loads(script.say(AckTimedOut(EVENT, digest))) == [(EVENT, 0)]
    assert StartAckTimer(EVENT, digest, 20_000) in script.say(ready(one))


# Refusals


def test_what_the_hub_refuses_is_buried_in_the_middle_of_a_window() -> None:
    script = Script()
    one, two, three = (batch(EVENT, n) for n in (1, 2, 3))
    script.until(EVENT, one, two, three)
    detail = {"code": "telemetry.conflict", "class": "0", "records": "2-2"}
    effects = script.say(refused(two))
    assert effects == [Bury(two.batch, "telemetry.conflict"), Note("telemetry.refused", detail)]
    assert script.sent[EVENT] == [1, 3]
    assert script.say(ack(one, three))[:2] == [Settle(one.batch), Settle(three.batch)]


def test_the_gap_of_what_was_buried_goes_out_once_what_is_on_its_way_is_answered() -> None:
    script = Script()
    one, two, three, four = (batch(EVENT, n) for n in (1, 2, 3, 4))
    script.until(EVENT, one, two, three)
    script.say(refused(two))
    assert loads(script.say(ready(four))) == [(OUTCOME, 0)], "the class goes no further, the others do"
    script.say(nothing(OUTCOME), nothing(RESULT), nothing(READING))
    assert loads(script.say(ack(one, three))) == []
    assert loads(script.say(ack(four))) == [(EVENT, 0)]
    gap = Batch(
        batch=BatchId(epoch=EPOCH, klass=0, first=2, last=2, digest="gap"), gap=Gap(reason="refused", records=1)
    )
    assert loads(script.say(ready(gap))) == [(EVENT, 2)]
    assert script.say(ack(gap)) == [Settle(gap.batch), StopAckTimer(EVENT)]


@pytest.mark.parametrize("is_late", [True, False])
def test_the_gap_of_what_was_buried_is_found_while_nothing_else_waits(is_late: bool) -> None:
    script = Script()
    one = batch(READING, 1)
    script.until(READING, one)
    if is_late:
        script.say(ack(one))
    script.say(nothing(READING))
    if is_late:
        script.say(nothing(READING))
    assert loads(script.say(refused(one))) == [(READING, 0)]


def test_a_refusal_while_the_outbox_is_asked_makes_it_be_asked_from_the_head() -> None:
    script = Script()
    one = batch(READING, 1)
    script.until(READING, one)
    assert loads(script.say(refused(one))) == []
    assert loads(script.say(nothing(READING))) == [(READING, 0)]
    assert loads(script.say(nothing(READING))) == []


def test_only_the_first_refusal_of_a_row_is_noted() -> None:
    script = Script()
    batches = [batch(EVENT, n) for n in range(1, 5)]
    script.until(EVENT, *batches)
    assert len(notes(script.say(refused(batches[0], batches[1])))) == 1
    assert notes(script.say(refused(batches[1]))) == []
    script.say(ack(batches[2]))
    assert len(notes(script.say(refused(batches[3])))) == 1


def test_a_refusal_that_comes_late_is_buried_too() -> None:
    script = Script()
    one = batch(EVENT, 1)
    script.until(EVENT, one)
    script.say(WentOffline())
    assert script.say(refused(one))[0] == Bury(one.batch, "telemetry.conflict")


@pytest.mark.parametrize(
    ("code", "reason"),
    [(0x90, "broker.topic_name"), (0x95, "broker.packet_too_large"), (0x99, "broker.payload_format")],
)
def test_what_the_broker_will_never_take_is_buried(code: int, reason: str) -> None:
    script = Script()
    one, two = batch(READING, 1), batch(READING, 2)
    script.until(READING, one, two)
    effects = script.say(bounced(one, code))
    assert effects[0] == Bury(one.batch, reason)
    assert notes(effects) == [Note("telemetry.refused", {"code": reason, "class": "3", "records": "1-1"})]
    assert StartAckTimer(READING, two.batch.digest, 10_000) in effects
    assert script.sent[READING] == [2]


def test_a_quota_lets_the_class_rest_longer_each_time_and_no_other_with_it() -> None:
    script = Script()
    one, two, three = (batch(OUTCOME, n) for n in (1, 2, 3))
    delays = []
    script.until(OUTCOME, one, two, three)
    for _ in range(8):
        effects = script.say(bounced(two, QUOTA))
        assert script.sent[OUTCOME] == [1]
        delays += [effect.delay_ms for effect in effects if isinstance(effect, StartRestTimer)]
        if len(delays) == 1:
            assert loads(effects) == [(RESULT, 0)], "the less precious class goes on"
            script.say(nothing(RESULT), nothing(READING))
        assert loads(script.say(RecordsWaiting(OUTCOME))) == []
        assert loads(script.say(RestOver(OUTCOME))) == [(OUTCOME, 1)]
        script.say(ready(two), ready(three))
    assert delays == [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000]
    script.say(ack(one, two))
    effects = script.say(bounced(three, QUOTA))
    assert [effect.delay_ms for effect in effects if isinstance(effect, StartRestTimer)] == [1_000]


@pytest.mark.parametrize(("jitter", "delay_ms"), [(0.0, 200), (0.5, 500), (1.0, 1_000), (7.0, 1_000), (-1.0, 200)])
def test_a_rest_has_full_jitter(jitter: float, delay_ms: int) -> None:
    assert pump.rest_ms(0, jitter=jitter) == delay_ms


@pytest.mark.parametrize("code", [0x80, 0x83, 0x97, 0x9F, 0xFF])
def test_a_failure_that_may_pass_is_no_reason_to_give_up_a_batch(code: int) -> None:
    script = Script()
    one = batch(READING, 1)
    script.until(READING, one)
    effects = script.say(bounced(one, code))
    assert effects == [StopAckTimer(READING), StartRestTimer(READING, 1_000)]


def test_without_rights_the_class_rests_long_and_says_so_once() -> None:
    script = Script()
    one = batch(READING, 1)
    script.until(READING, one)
    effects = script.say(bounced(one, BARRED))
    detail = {"code": "broker.not_authorized", "class": "3", "records": "1-1"}
    assert effects == [
        Note("telemetry.refused", detail),
        StopAckTimer(READING),
        StartRestTimer(READING, pump.BARRED_REST_MS),
    ]
    script.say(RestOver(READING), ready(one))
    assert notes(script.say(bounced(one, BARRED))) == []
    script.say(RestOver(READING), ready(one), ack(one), ready(batch(READING, 2)))
    assert len(notes(script.say(bounced(batch(READING, 2), BARRED)))) == 1


def test_a_bounce_of_what_no_longer_counts_as_sent_does_nothing() -> None:
    script = Script()
    one, two = batch(EVENT, 1), batch(EVENT, 2)
    script.until(EVENT, one, two)
    script.say(bounced(one, QUOTA))
    before = script.pump
    assert script.say(bounced(two, QUOTA), bounced(two, TOO_LARGE)) == []
    assert script.pump == before


# The courier and the disk


def test_what_the_courier_has_no_room_for_is_offered_again_soon_from_there() -> None:
    script = Script()
    one, two, three = (batch(READING, n) for n in (1, 2, 3))
    script.until(READING, one, two, three)
    assert script.say(NotTaken(two.batch)) == [StartRestTimer(READING, pump.NO_ROOM_REST_MS)]
    assert script.sent[READING] == [1]
    assert script.say(NotTaken(three.batch)) == []
    assert loads(script.say(RestOver(READING))) == [(READING, 1)]


def test_a_disk_that_fails_lets_the_class_rest_and_then_asks_from_the_head() -> None:
    script = Script()
    one = batch(OUTCOME, 1)
    script.until(OUTCOME, one)
    void = NothingWaiting(OUTCOME, script.pump.lanes[OUTCOME].ask)
    effects = script.say(StorageRefused(OUTCOME))
    assert effects == [StopAckTimer(OUTCOME), StartRestTimer(OUTCOME, pump.STORAGE_REST_MS), LoadBatch(RESULT, 0, 1)]
    assert script.say(void) == []
    assert script.pump.lanes[OUTCOME].phase is pump.LanePhase.RESTING
    script.say(nothing(RESULT), nothing(READING))
    assert loads(script.say(RestOver(OUTCOME))) == [(OUTCOME, 0)]


def test_an_answer_during_a_rest_settles_and_ends_no_rest() -> None:
    script = Script()
    one, two = batch(READING, 1), batch(READING, 2)
    script.until(READING, one, two)
    script.say(bounced(two, QUOTA))
    assert script.say(ack(one)) == [Settle(one.batch), StopAckTimer(READING)]
    assert script.say(ack(two)) == [Settle(two.batch)]
    assert loads(script.say(RestOver(READING))) == [(READING, 0)]


def test_a_timeout_during_a_rest_counts_all_as_unsent() -> None:
    script = Script()
    one, two = batch(READING, 1), batch(READING, 2)
    script.until(READING, one, two)
    script.say(bounced(two, QUOTA))
    assert script.say(AckTimedOut(READING, one.batch.digest)) == []
    assert loads(script.say(RestOver(READING))) == [(READING, 0)]


def test_a_person_ends_every_rest() -> None:
    script = Script()
    script.until(READING, batch(READING, 1))
    script.say(bounced(batch(READING, 1), BARRED))
    assert script.say(Hurried()) == [StopRestTimer(READING), LoadBatch(READING, 0, 3)]
    assert script.say(RestOver(READING)) == []


# Reconnects


def in_phase(name: str) -> Script:
    """A script whose READING lane has one batch on its way and is in this phase."""
    script = Script()
    script.until(READING, batch(READING, 1))  # now LOADING the next
    if name == "quiet":
        script.say(nothing(READING))
    if name == "resting":
        script.say(ready(batch(READING, 2)))
        script.say(NotTaken(batch(READING, 2).batch))
    if name == "waiting":
        for number in (2, 3, 4):
            script.say(ready(batch(READING, number)))
    assert script.pump.lanes[READING].phase.value == name
    return script


@pytest.mark.parametrize("phase", [phase.value for phase in pump.LanePhase])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_reconnect_in_each_phase_asks_again_from_the_head(phase: str, is_told: bool) -> None:
    script = in_phase(phase)
    void = BatchReady(batch(READING, 2), script.pump.lanes[READING].ask)
    stops = [StopAckTimer(READING), *([StopRestTimer(READING)] if phase == "resting" else [])]
    if is_told:
        assert script.say(WentOffline()) == stops
        before = script.pump
        assert script.say(void, RestOver(READING), Hurried(), NotTaken(batch(READING, 1).batch)) == []
        assert script.pump == before
        stops = []
    assert script.say(WentOnline()) == [*stops, LoadBatch(EVENT, 0, 2)]
    script.say(nothing(EVENT), nothing(OUTCOME))
    assert loads(script.say(nothing(RESULT))) == [(READING, 0)]
    assert script.say(void) == [], "an answer from before the reconnect would leave a hole"
    assert script.sent[READING] == []
    assert script.say(ready(batch(READING, 1)))[0] == SendBatch(batch(READING, 1))


def test_an_answer_from_before_the_reconnect_saves_a_resend() -> None:
    script = Script()
    one = batch(EVENT, 1)
    script.until(EVENT, one)
    script.say(WentOffline())
    before = script.pump
    assert script.say(ack(one)) == [Settle(one.batch)]
    assert script.pump == before


def test_every_pair_has_a_row() -> None:
    assert set(pump.PUMP.rows) == set(product(PumpPhase, get_args(PumpEvent)))


# Everything at once

STEPS = st.lists(st.tuples(st.integers(0, 16), st.integers(0, 60)), min_size=20, max_size=120)


@given(
    waiting=st.fixed_dictionaries({klass: st.integers(0, 9) for klass in RecordClass}),
    cursed=st.frozensets(st.tuples(st.integers(0, 3), st.integers(1, 6)), max_size=4),
    steps=STEPS,
)
def test_whatever_happens_all_takes_effect_once_and_the_windows_hold(
    waiting: dict[RecordClass, int], cursed: frozenset[tuple[int, int]], steps: list[tuple[int, int]]
) -> None:
    house = House(waiting, cursed=cursed)
    for choice, number in steps:
        house.step(choice, number)
    house.settle_down()
    assert all(not left for left in house.outbox.values())
    arrived = {claim: 1 for claim in house.accepted if (claim.klass, claim.first) not in cursed}
    assert dict(house.hub) == arrived
    assert {(claim.klass, claim.first) for claim in house.accepted} & cursed == {
        (claim.klass, claim.first) for claim in house.buried
    }


@given(waiting=st.integers(1, 40))
def test_over_a_good_link_a_class_arrives_in_order(waiting: int) -> None:
    house = House({READING: waiting})
    house.settle_down()
    assert [claim.first for claim in house.hub] == list(range(1, waiting + 1))
