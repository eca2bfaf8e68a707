"""What the hub signs by itself: the next snapshot and timestamp over the newest files, and what it learned itself.

Rule: which key signs is decided by the root that is the newest where the signature is stored, in the same transaction.
So a hub needs no restart when a root with other keys is published, also by another process, and nothing signed with
keys of yesterday is served under the root of today.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cloud_hub.releases import rules
from cloud_hub.releases.tables import MetadataRow
from shared.errors import ConfigError, Conflict
from shared.ids import FamilyName
from shared.model import Manifest
from shared.trust import ceremony, repository
from shared.trust.authority import family_keys, signed_by
from shared.trust.library import Metadata, Signer, Targets
from shared.trust.metadata import expires_ms
from shared.trust.roles import LEARNED, ROOT, SNAPSHOT, TARGETS, TIMESTAMP, learned_role


@dataclass(frozen=True, slots=True)
class OnlineKeys:
    """The keys that the hub signs with by itself; under a root made earlier there may be none for the time.

    Attributes:
        learned: the key for a family's learned releases that has one of these identifiers; raises ConfigError when it
            is not here. Targets list those, not the root.
    """

    snapshot: Signer
    timestamp: Signer
    assignment: Signer
    time: Signer | None = None
    learned: Callable[[FamilyName, Collection[str]], Signer] | None = None


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


def learned_signer(targets: Metadata[Targets], family: FamilyName, keys: OnlineKeys) -> Signer:
    """The key that these targets let the hub sign the family's learned releases with.

    Raises:
        Conflict: they let it sign none.
        ConfigError: the key is not here.
    """
    held = family_keys(targets.signed, learned_role(family))
    if held is None:
        raise Conflict(
            f"nobody allowed the hub to sign what it learns for {family!r}",
            code="conflict.learned",
            hint=f"`outrider-hub keys rotate learned/{family}` makes the draft that allows it; holders of targets sign",
        )
    if keys.learned is None:
        raise ConfigError("this hub has no key for learned releases", code="config.key_missing")
    return keys.learned(family, [key.keyid for key in held.keys])


def sign_learned(current: Mapping[str, MetadataRow], *, keys: OnlineKeys, now_ms: int) -> list[MetadataRow]:
    """The roles of learned releases that must be signed now: new ones, under a new key, or past half of their life."""
    targets = repository.read_targets(current[TARGETS].document)
    delegations = targets.signed.delegations
    rows = []
    for name in (delegations.roles or {}) if delegations is not None else {}:
        if not name.startswith(LEARNED):
            continue
        held, row = family_keys(targets.signed, name), current.get(name)
        before = None if row is None else repository.read_targets(row.document, role=name)
        is_ours = held is not None and before is not None and bool(signed_by(held, before))
        if is_ours and row is not None and not _is_due(row, now_ms):
            continue
        signer = learned_signer(targets, FamilyName(name.removeprefix(LEARNED)), keys)
        rows.append(_signed_role(name, next_learned(before, now_ms=now_ms), signer, now_ms=now_ms))
    return rows


def next_learned(before: Metadata[Targets] | None, *, now_ms: int) -> Metadata[Targets]:
    """The next version of a role of learned releases, with the files that it had, for a few days."""
    if before is None:
        return Metadata(Targets(version=1, expires=repository.in_days(now_ms, repository.LEARNED_DAYS)))
    return ceremony.next_role(before, now_ms=now_ms, days=repository.LEARNED_DAYS)


def add_learned(
    current: Mapping[str, MetadataRow], manifest: Manifest, *, keys: OnlineKeys, now_ms: int
) -> MetadataRow:
    """The role of learned releases with one more in it, signed; raises Conflict or ConfigError as `learned_signer`."""
    name = learned_role(manifest.family)
    signer = learned_signer(repository.read_targets(current[TARGETS].document), manifest.family, keys)
    row = current.get(name)
    before = None if row is None else repository.read_targets(row.document, role=name)
    role = repository.add_release(before, manifest, now_ms=now_ms, days=repository.LEARNED_DAYS)
    return _signed_role(name, role, signer, now_ms=now_ms)


def _is_due(row: MetadataRow, now_ms: int) -> bool:
    return rules.is_due(issued_ms=row.stored_ms, expires_ms=row.expires_ms, now_ms=now_ms)


def _signed_role(name: str, role: Metadata[Targets], signer: Signer, *, now_ms: int) -> MetadataRow:
    document = repository.sign(role, signer)
    return MetadataRow(name, role.signed.version, document, now_ms, expires_ms(role.signed))
