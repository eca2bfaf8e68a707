"""A batch is exactly what its id says, or it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_hub.telemetry import rules
from cloud_hub.telemetry.rules import MAX_SPAN, TelemetryRefused
from shared import limits
from shared.ids import DeviceId
from shared.telemetry import BatchId, Gap, Reading, Record, RecordClass
from shared.wire.messages import Batch, digest_of
from tests.fakes.batches import EPOCH, batch_of, gap_of, readings

DEVICE = DeviceId("pi-1")


def test_a_small_batch_that_unpacks_to_much_is_refused() -> None:
    text = "x" * (limits.MAX_BATCH_BYTES - 8192)
    blown = [Record(seq=seq, at_ms=1, body=Reading(name=text, value=1.0)) for seq in range(1, 501)]
    assert len(batch_of(blown).columns) < limits.MAX_BATCH_BYTES
    with pytest.raises(TelemetryRefused) as caught:
        rules.open_batch(DEVICE, batch_of(blown))
    assert caught.value.code == "telemetry.too_large"
    largest = [Record(seq=1, at_ms=1, body=Reading(name="x" * limits.MAX_RECORD_BYTES, value=1.0))]
    assert rules.open_batch(DEVICE, batch_of(largest)).id.last == 1


def test_an_honest_batch_opens() -> None:
    batch = batch_of(readings(3, 4, 6))
    opened = rules.open_batch(DEVICE, batch)
    assert opened.content is not None
    assert opened.content.runs == ((3, 4), (6, 6))
    assert opened.stream == rules.Stream(DEVICE, EPOCH, RecordClass.READING)
    assert opened.columns == batch.columns
    assert rules.explode(opened.columns) == readings(3, 4, 6)


def test_an_honest_gap_opens() -> None:
    opened = rules.open_batch(DEVICE, gap_of(1, 2_000_000, records=5))
    assert (opened.id.last, opened.columns, opened.content) == (2_000_000, b"", None)
    assert opened.gap == Gap(reason="evicted", records=5)


@pytest.mark.parametrize(
    ("code", "dishonest"),
    [
        ("telemetry.malformed", lambda: batch_of(readings(1), epoch="0123")),
        ("telemetry.malformed", lambda: batch_of(readings(1), klass=7)),
        ("telemetry.numbers", lambda: batch_of(readings(1, 2), first=2, last=1)),
        ("telemetry.numbers", lambda: batch_of(readings(1, 2), first=0)),
        ("telemetry.numbers", lambda: batch_of(readings(1, 2), last=2**70)),
        ("telemetry.numbers", lambda: batch_of(readings(1, 2), last=3)),
        ("telemetry.numbers", lambda: batch_of(readings(2, 3), first=1)),
        ("telemetry.numbers", lambda: batch_of(readings(1, 1 + MAX_SPAN))),
        ("telemetry.numbers", lambda: gap_of(1, 5, records=6)),
        ("telemetry.numbers", lambda: gap_of(1, 5, records=-1)),
        ("telemetry.numbers", lambda: gap_of(5, 1, records=0)),
        ("telemetry.digest", lambda: gap_of(1, 5, records=5, digest=digest_of(columns=b"", gap=None))),
        ("telemetry.malformed", lambda: msgspec.structs.replace(gap_of(1, 2, records=2), columns=b"x")),
        ("telemetry.columns", lambda: batch_of(readings(1, 1))),
        ("telemetry.digest", lambda: batch_of(readings(1), digest="0" * 64)),
        ("telemetry.digest", lambda: batch_of(readings(1), digest="é")),
        ("telemetry.class", lambda: batch_of(readings(1), klass=int(RecordClass.EVENT))),
    ],
)
def test_a_batch_that_is_not_what_it_says_is_refused(code: str, dishonest: Callable[[], Batch]) -> None:
    with pytest.raises(TelemetryRefused) as caught:
        rules.open_batch(DEVICE, dishonest())
    assert caught.value.code == code


@pytest.mark.parametrize("columns", [b"", b"\x80", b"\x81\xa1v\x01", b"\xc1", b"\x81\xa1v\x02", b"\x81\xa1v\x03"])
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


def test_classes_have_names() -> None:
    assert [rules.class_named(name) for name in ("event", "outcome", "result", "reading", "READING")] == [
        0,
        1,
        2,
        3,
        None,
    ]
