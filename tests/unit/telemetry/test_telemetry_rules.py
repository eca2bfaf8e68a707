"""Ranges are sets of numbers written short, and a batch is exactly what its id says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.telemetry import rules
from cloud_hub.telemetry.rules import StoredRecord, TelemetryRefused
from shared import limits
from shared.ids import DeviceId
from shared.telemetry import BatchId, Body, DeviceEvent, Outcome, Reading, Record, RecordClass
from shared.wire.columns import encode_columns
from shared.wire.messages import Batch

DEVICE = DeviceId("pi-1")
EPOCH = "0123456789abcdef"
NUMBERS = st.sets(st.integers(1, 60))


def numbers(ranges: rules.Ranges) -> set[int]:
    """The set that the ranges stand for."""
    return {number for first, last in ranges for number in range(first, last + 1)}


def ranges(found: set[int]) -> rules.Ranges:
    """The set as ranges."""
    return rules.ranges_of(sorted(found))


@given(NUMBERS)
def test_ranges_hold_the_numbers_and_are_as_short_as_can_be(found: set[int]) -> None:
    made = ranges(found)
    assert numbers(made) == found
    assert rules.count(made) == len(found)
    assert all(last + 1 < first for (_, last), (first, _) in pairwise(made))


@given(NUMBERS, NUMBERS)
def test_union_is_the_union_in_any_order(one: set[int], other: set[int]) -> None:
    assert rules.union(ranges(one), ranges(other)) == ranges(one | other)
    assert rules.union(ranges(other), ranges(one)) == ranges(one | other)


@given(NUMBERS, st.integers(1, 60), st.integers(0, 10))
def test_covers_and_meets(found: set[int], first: int, more: int) -> None:
    asked = set(range(first, first + more + 1))
    assert rules.covers(ranges(found), first, first + more) == (asked <= found)
    assert rules.meets(ranges(found), first, first + more) == bool(asked & found)


@given(NUMBERS)
def test_missing_is_what_lies_below_the_highest_and_is_not_in(found: set[int]) -> None:
    assert numbers(rules.missing(ranges(found))) == set(range(1, max(found, default=0) + 1)) - found


@given(NUMBERS)
def test_ranges_survive_their_bytes(found: set[int]) -> None:
    assert rules.decode_ranges(rules.encode_ranges(ranges(found))) == ranges(found)


def batch(records: list[Record], **changed: object) -> Batch:
    """An honest batch of these records, with parts of its id changed."""
    columns = encode_columns(records)
    claim = BatchId(
        epoch=EPOCH,
        klass=int(RecordClass.TELEMETRY),
        first=records[0].seq,
        last=records[-1].seq,
        digest=hashlib.sha256(columns).hexdigest(),
    )
    return Batch(batch=msgspec.structs.replace(claim, **changed), columns=columns)


def readings(*seqs: int) -> list[Record]:
    """A reading for each number."""
    return [Record(seq=seq, at_ms=1000 + seq, body=Reading(name="t", value=float(seq))) for seq in seqs]


def test_a_small_batch_that_unpacks_to_much_is_refused() -> None:
    text = "x" * (limits.MAX_BATCH_BYTES - 8192)
    blown = [Record(seq=seq, at_ms=1, body=Reading(name=text, value=1.0)) for seq in range(1, 501)]
    assert len(batch(blown).columns) < limits.MAX_BATCH_BYTES
    with pytest.raises(TelemetryRefused) as caught:
        rules.open_batch(DEVICE, batch(blown))
    assert caught.value.code == "telemetry.too_large"
    largest = [Record(seq=1, at_ms=1, body=Reading(name="x" * limits.MAX_RECORD_BYTES, value=1.0))]
    assert len(rules.open_batch(DEVICE, batch(largest)).records) == 1


def test_an_honest_batch_opens() -> None:
    opened = rules.open_batch(DEVICE, batch(readings(3, 4, 6)))
    assert [record.seq for record in opened.records] == [3, 4, 6]
    assert opened.stream == rules.Stream(device=DEVICE, epoch=EPOCH, klass=RecordClass.TELEMETRY)
    assert rules.read_body(opened.records[0].body) == {"name": "t", "value": 3.0}


BODIES: list[tuple[Body, RecordClass, dict[str, object]]] = [
    (DeviceEvent(name="host.lost"), RecordClass.EVENT, {"name": "host.lost", "detail": {}}),
    (
        Outcome(request="r", correct=False),
        RecordClass.OUTCOME,
        {"request": "r", "model": "", "version": "", "variant": "", "correct": False, "latency_us": 0, "source": ""},
    ),
]


@pytest.mark.parametrize(("body", "klass", "fields"), BODIES)
def test_what_is_not_known_is_not_stored(body: Body, klass: RecordClass, fields: dict[str, object]) -> None:
    opened = rules.open_batch(DEVICE, batch([Record(seq=1, at_ms=5, body=body)], klass=int(klass)))
    assert rules.read_body(opened.records[0].body) == fields


@pytest.mark.parametrize(
    ("code", "dishonest"),
    [
        ("telemetry.malformed", lambda: batch(readings(1), epoch="0123")),
        ("telemetry.malformed", lambda: batch(readings(1), klass=7)),
        ("telemetry.numbers", lambda: batch(readings(1, 2), first=2, last=1)),
        ("telemetry.numbers", lambda: batch(readings(1, 2), first=0)),
        ("telemetry.numbers", lambda: batch(readings(1, 2), last=2**70)),
        ("telemetry.numbers", lambda: batch(readings(1, 2), last=3)),
        ("telemetry.numbers", lambda: batch(readings(2, 3), first=1)),
        ("telemetry.columns", lambda: batch(readings(1, 1))),
        ("telemetry.digest", lambda: batch(readings(1), digest="0" * 64)),
        ("telemetry.digest", lambda: batch(readings(1), digest="é")),
        ("telemetry.class", lambda: batch(readings(1), klass=int(RecordClass.EVENT))),
    ],
)
def test_a_batch_that_is_not_what_it_says_is_refused(code: str, dishonest: Callable[[], Batch]) -> None:
    with pytest.raises(TelemetryRefused) as caught:
        rules.open_batch(DEVICE, dishonest())
    assert caught.value.code == code


@pytest.mark.parametrize("columns", [b"", b"\x80", b"\x81\xa1v\x01", b"\xc1", b"\x81\xa1v\x02"])
def test_columns_that_do_not_parse_or_are_empty_are_refused(columns: bytes) -> None:
    claim = BatchId(epoch=EPOCH, klass=2, first=1, last=1, digest=hashlib.sha256(columns).hexdigest())
    with pytest.raises(TelemetryRefused) as caught:
        rules.open_batch(DEVICE, Batch(batch=claim, columns=columns))
    assert caught.value.code in ("telemetry.columns", "telemetry.numbers")


@given(st.binary(max_size=200))
def test_any_bytes_are_taken_or_refused(columns: bytes) -> None:
    claim = BatchId(epoch=EPOCH, klass=2, first=1, last=1, digest=hashlib.sha256(columns).hexdigest())
    with pytest.raises(TelemetryRefused):
        rules.open_batch(DEVICE, Batch(batch=claim, columns=columns))


@given(st.sets(st.integers(1, 12), min_size=1), st.sets(st.integers(1, 12)))
def test_merging_inserts_what_is_new_and_counts_the_rest(sent: set[int], here: set[int]) -> None:
    opened = rules.open_batch(DEVICE, batch(readings(*sorted(sent))))
    known = rules.open_batch(DEVICE, batch(readings(*sorted(here)))).records if here else ()
    merged = rules.merge(opened, known)
    assert {record.seq for record in merged.fresh} == sent - here
    assert merged.duplicates == len(sent & here)


def test_the_same_number_with_other_content_is_a_conflict() -> None:
    opened = rules.open_batch(DEVICE, batch(readings(1, 2)))
    other = StoredRecord(seq=2, at_ms=0, kind="reading", body=b"\x80")
    with pytest.raises(TelemetryRefused) as caught:
        rules.merge(opened, [other])
    assert caught.value.code == "telemetry.conflict"


def test_classes_have_names() -> None:
    assert [rules.class_named(name) for name in ("event", "outcome", "telemetry", "TELEMETRY")] == [0, 1, 2, None]
