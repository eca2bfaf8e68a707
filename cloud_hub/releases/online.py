"""What the hub signs by itself: the next snapshot and timestamp over the newest files, with the newest root's keys.

Rule: which key signs is decided by the root that is the newest where the signature is stored, in the same transaction.
So a hub needs no restart when a root with other keys is published, also by another process, and nothing signed with
keys of yesterday is served under the root of today.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cloud_hub.releases.tables import MetadataRow
from shared.trust import repository
from shared.trust.library import Signer
from shared.trust.metadata import expires_ms
from shared.trust.roles import ROOT, SNAPSHOT, TIMESTAMP


@dataclass(frozen=True, slots=True)
class OnlineKeys:
    """The keys that the hub signs with by itself; under a root made earlier there may be none for the time."""

    snapshot: Signer
    timestamp: Signer
    assignment: Signer
    time: Signer | None = None


KeySource = Callable[[bytes], OnlineKeys]
"""The online keys that this root authorises; raises ConfigError when one of them is not here."""


def sign_online(
    current: Mapping[str, MetadataRow], *, snapshot: Signer | None, timestamp: Signer, now_ms: int
) -> list[MetadataRow]:
    """The next snapshot (with a key for it) and the next timestamp, over these newest files."""
    rows: list[MetadataRow] = []
    newest = current.get(SNAPSHOT)
    if snapshot is not None or newest is None:
        assert snapshot is not None, "there is a snapshot from the founding on"
        files = {role: row.document for role, row in current.items() if role not in (ROOT, SNAPSHOT, TIMESTAMP)}
        previous = None if newest is None else repository.read_snapshot(newest.document)
        unsigned = repository.new_snapshot(previous, files, now_ms=now_ms)
        document = repository.sign(unsigned, snapshot)
        newest = MetadataRow(SNAPSHOT, unsigned.signed.version, document, now_ms, expires_ms(unsigned.signed))
        rows.append(newest)
    before = current.get(TIMESTAMP)
    stamped = repository.new_timestamp(
        None if before is None else repository.read_timestamp(before.document), newest.document, now_ms=now_ms
    )
    document = repository.sign(stamped, timestamp)
    return [*rows, MetadataRow(TIMESTAMP, stamped.signed.version, document, now_ms, expires_ms(stamped.signed))]
