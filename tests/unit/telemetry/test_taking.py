"""Whatever comes, in whatever order and however often: a record has one effect, and each number is accounted for.

The oracle is a dictionary: number to content for what is here, and a set for what is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud_hub.telemetry.rules import Stream, TelemetryRefused, open_batch
from cloud_hub.telemetry.taking import Received, take, take_all
from shared.ids import DeviceId
from shared.telemetry import BatchId, Reading, Record, RecordClass
from shared.wire.messages import Batch, digest_of
from tests.fakes.batches import EPOCH, batch_of, gap_of
from tests.fakes.telemetry_store import MemoryTelemetry

PI = DeviceId("pi-1")
STREAM = Stream(PI, EPOCH, RecordClass.READING)
Reason = Literal["evicted", "expired"]


@dataclass(frozen=True)
class Records:
    """A batch of these numbers; `forged` ones say something else than the first device did."""

    seqs: tuple[int, ...]
    forged: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Missing:
    """A gap."""

    first: int
    last: int
    reason: Reason


@dataclass
class Oracle:
    """What should be known."""

    here: dict[int, float] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    def take(self, step: Records | Missing) -> str:
        if isinstance(step, Missing):
            new = [n for n in range(step.first, step.last + 1) if n not in self.here and n not in self.lost]
            self.lost.update(dict.fromkeys(new, step.reason))
            return "stored" if new else "duplicate"
        values = {seq: value_of(seq, step) for seq in step.seqs}
        if any(seq in self.here and self.here[seq] != value for seq, value in values.items()):
            return "refused"
        fresh = {seq: value for seq, value in values.items() if seq not in self.here}
        self.here.update(fresh)
        for seq in fresh:
            self.lost.pop(seq, None)
        return "stored" if fresh else "duplicate"


def value_of(seq: int, step: Records) -> float:
    return float(-seq if seq in step.forged else seq)


def sent(step: Records | Missing, *, klass: RecordClass = RecordClass.READING) -> Batch:
    if isinstance(step, Missing):
        return gap_of(step.first, step.last, records=0, reason=step.reason, klass=klass)
    return batch_of(
        [Record(seq=seq, at_ms=seq, body=Reading(name="t", value=value_of(seq, step))) for seq in step.seqs]
    )


SEQS = st.sets(st.integers(1, 25), min_size=1, max_size=8).map(lambda found: tuple(sorted(found)))
RECORDS = st.builds(Records, SEQS, st.just(frozenset()) | st.frozensets(st.integers(1, 25), max_size=2))
GAPS = st.builds(
    lambda first, more, reason: Missing(first, first + more, reason),
    st.integers(1, 25), st.integers(0, 6), st.sampled_from(["evicted", "expired"]),
)  # fmt: skip
STEPS = st.lists(RECORDS | GAPS, max_size=12)


def check(telemetry: MemoryTelemetry, oracle: Oracle) -> None:
    known = telemetry.received.get(STREAM, Received())
    stored = {record.seq: record.body for record in telemetry.records(STREAM)}
    assert len(telemetry.records(STREAM)) == len(stored), "a record has two effects"
    assert {seq: body.value for seq, body in stored.items() if isinstance(body, Reading)} == oracle.here
    assert {n for first, last in known.here for n in range(first, last + 1)} == set(oracle.here)
    assert {n: one.reason for one in known.lost for n in range(one.first, one.last + 1)} == oracle.lost
    assert known.records == len(oracle.here)


@settings(max_examples=300)
@given(STEPS)
def test_each_number_is_here_once_or_lost_or_missing(steps: list[Records | Missing]) -> None:
    telemetry, oracle = MemoryTelemetry(), Oracle()
    for step in steps:
        with telemetry.transaction() as store:
            verdict = take(store, PI, sent(step), at_ms=1)
        assert verdict.status == oracle.take(step)
        check(telemetry, oracle)


@settings(max_examples=150)
@given(STEPS)
def test_a_group_says_what_its_batches_would_have_said_one_by_one(steps: list[Records | Missing]) -> None:
    telemetry, oracle = MemoryTelemetry(), Oracle()
    with telemetry.transaction() as store:
        taken = take_all(store, [open_batch(PI, sent(step)) for step in steps], at_ms=1)
    assert [one.status for one in taken] == [oracle.take(step) for step in steps]
    check(telemetry, oracle)


@given(STEPS, st.integers(0, 11))
def test_a_transaction_that_is_rolled_back_changes_nothing(steps: list[Records | Missing], cut: int) -> None:
    telemetry, oracle = MemoryTelemetry(), Oracle()
    for number, step in enumerate(steps):
        try:
            with telemetry.transaction() as store:
                verdict = take(store, PI, sent(step), at_ms=1)
                if number == cut:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            check(telemetry, oracle)
            continue
        assert verdict.status == oracle.take(step)
    check(telemetry, oracle)


ODD = st.sampled_from([0, 1, 2**31, 2**63 - 1, -(2**63), 2**63, 2**64 - 1])
NAMES = st.sampled_from(["", "r", "x" * 50_000, "y" * 50_000, "z" * 50_000])
CONTENT = st.lists(st.tuples(NAMES, ODD), min_size=16, max_size=16)
"""Of each number, so that batches which overlap say the same."""


@st.composite
def hostile(draw: st.DrawFn, content: list[tuple[str, int]]) -> Batch:
    """Columns as no agent of ours writes them, under an id that fits: texts as lists or named, and any number."""
    first, count, step = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 1, 2]))
    seqs = [first + step * n for n in range(count)]
    texts = [content[seq][0] for seq in seqs]
    distinct = list(dict.fromkeys(texts))
    places = [distinct.index(text) for text in texts]
    forms: list[object] = [texts, {"d": distinct, "i": bytes(places)}, {"d": distinct, "i": places}]
    few = ["m"] * count
    results = {
        "seq": [value for seq in seqs for value in (seq, 1)] if step > 1 else [first, count],
        "at": [5] + [0] * (count - 1),
        "request": draw(st.sampled_from(forms)),
        "model": few, "version": few, "variant": few, "rung": few,
        "took_us": [content[seq][1] for seq in seqs],
    }  # fmt: skip
    columns = msgspec.msgpack.encode({"v": 2, "result": results})
    claim = BatchId(
        epoch=EPOCH,
        klass=int(RecordClass.RESULT),
        first=first,
        last=seqs[-1],
        digest=digest_of(columns=columns, gap=None),
    )
    return Batch(batch=claim, columns=columns)


@settings(max_examples=300, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(
    CONTENT.flatmap(
        lambda content: st.lists(
            hostile(content) | GAPS.map(lambda gap: sent(gap, klass=RecordClass.RESULT)), min_size=2, max_size=6
        )
    )
)
def test_whatever_a_device_sends_over_what_is_here_is_taken_or_refused_and_can_be_read(batches: list[Batch]) -> None:
    telemetry = MemoryTelemetry()
    for batch in batches:
        try:
            opened = open_batch(PI, batch)
        except TelemetryRefused:
            continue
        with telemetry.transaction() as store:
            (taken,) = take_all(store, [opened], at_ms=1)
        assert taken.status in ("stored", "duplicate", "refused")
        assert taken.damaged == 0
    stream = Stream(PI, EPOCH, RecordClass.RESULT)
    stored = [record.seq for record in telemetry.records(stream)]
    assert len(stored) == len(set(stored)) == telemetry.received.get(stream, Received()).records
