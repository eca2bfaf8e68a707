"""Batches as an honest device would send them, and with parts of their id changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from shared.ids import DeviceId
from shared.telemetry import CLASS_OF, BatchId, Gap, Reading, Record, RecordClass
from shared.wire.columns import encode_columns
from shared.wire.messages import Batch, digest_of

EPOCH: Final = "0123456789abcdef"


@dataclass(frozen=True)
class Sent:
    """A batch that has come in from a device, as `telemetry.desk.Parcel`; without one it is nothing to answer."""

    device: DeviceId
    batch: Batch | None

    def open(self) -> tuple[DeviceId, Batch] | None:
        """Whom it is from, and what."""
        return None if self.batch is None else (self.device, self.batch)


def batch_of(records: Sequence[Record], **changed: object) -> Batch:
    """A batch of these records, with parts of its id changed."""
    columns = encode_columns(records)
    claim = BatchId(
        epoch=EPOCH,
        klass=int(CLASS_OF[type(records[0].body)]),
        first=records[0].seq,
        last=records[-1].seq,
        digest=digest_of(columns=columns, gap=None),
    )
    return Batch(batch=msgspec.structs.replace(claim, **changed), columns=columns)


def gap_of(
    first: int,
    last: int,
    *,
    records: int,
    reason: Literal["evicted", "expired", "dropped", "damaged"] = "evicted",
    klass: RecordClass = RecordClass.READING,
    **changed: object,
) -> Batch:
    """A gap in a class."""
    gap = Gap(reason=reason, records=records)
    claim = BatchId(epoch=EPOCH, klass=int(klass), first=first, last=last, digest=digest_of(columns=b"", gap=gap))
    return Batch(batch=msgspec.structs.replace(claim, **changed), gap=gap)


def readings(*seqs: int) -> list[Record]:
    """A reading for each number."""
    return [Record(seq=seq, at_ms=1000 + seq, body=Reading(name="t", value=float(seq))) for seq in seqs]
