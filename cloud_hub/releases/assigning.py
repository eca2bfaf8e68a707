"""Who shall run what: signs one assignment per device, hands it to the broker, and sees that it arrives.

Nothing rests on a message getting through: an assignment is sent when it is made, again at each birth and report that
names an older one, and again by a slow timer; the device says in its reports what it has. The same timer renews
assignments at half their life, and catches up when a device has seen a higher version than this hub remembers (the
hub was restored from a backup).

Not here: what an assignment may look like (shared/trust/assignment.py), which devices there are (the devices room).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import msgspec
from sqlalchemy.engine import Connection

from cloud_hub.devices.desk import Device
from cloud_hub.ground import audit
from cloud_hub.ground.bus import Bus, DeviceBorn, DeviceReported
from cloud_hub.ground.database import Database
from cloud_hub.ground.post import Post
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases import rules, tables
from cloud_hub.releases.counts import Counts
from cloud_hub.releases.online import KeySource
from cloud_hub.releases.rules import Candidate, Named, Selector, Skipped
from cloud_hub.releases.tables import AssignmentRow, MetadataRow
from shared import limits
from shared.clock import Clock
from shared.errors import Conflict, InvalidValue, OutriderError, StorageError, TrustError, Unreachable
from shared.ids import DeviceId
from shared.release import AssignedModel, Assignment, Patch
from shared.trust import repository
from shared.trust.assignment import fit_assignment, open_assignment, sign_assignment
from shared.trust.library import Root
from shared.trust.roles import ROOT
from shared.wire.messages import Assign

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 30.0
RESEND_AFTER_MS: Final = 5_000
"""The least time between two sendings of the same assignment to a device."""
DEVICES_PER_WRITE: Final = 250
"""Signed in one transaction; between two of them others get to write."""
READABLE_ASSIGNMENTS: Final = 8
"""So many of a device's newest assignments say which files it may read."""
ACTOR: Final = "hub"


class Fleet(Protocol):
    """What is asked of the devices room (cloud_hub/devices/desk.py)."""

    async def list(
        self, *, after: str = "", limit: int = limits.MAX_PAGE_ITEMS, labels: Mapping[str, str] | None = None
    ) -> tuple[Device, ...]:
        """Devices by name, those after `after`, at most `limit`."""
        ...


@dataclass(frozen=True, slots=True)
class Assigned:
    """A device and the version of the assignment that it shall have."""

    device: DeviceId
    version: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an assignment came to."""

    assigned: tuple[Assigned, ...]
    skipped: tuple[Skipped, ...]


class Assigning:
    """The room's controller of desired states.

    Args:
        database, clock, counts: what it works with.
        fleet: the devices.
        post: sends to devices.
        keys: the online keys, by root.
        ttl_ms: how long an assignment is worth installing.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        counts: Counts,
        fleet: Fleet,
        post: Post,
        keys: KeySource,
        ttl_ms: int,
    ) -> None:
        self._database = database
        self._clock = clock
        self._counts = counts
        self._fleet = fleet
        self._post = post
        self._keys = keys
        self._ttl_ms = ttl_ms
        self._sent: dict[DeviceId, tuple[int, int]] = {}
        self._followed_root = 0

    def listen(self, bus: Bus) -> None:
        """Hear of births and reports from now on."""
        bus.subscribe(DeviceBorn, self._on_birth)
        bus.subscribe(DeviceReported, self._on_report)

    async def assign(self, selector: Selector, *, actor: str) -> Outcome:
        """Set what a selector names of the devices' desired state; a device that has it already keeps its assignment.

        Raises:
            NotFound: there is no such release.
            Conflict: it is not published, or lies below the family's security floor.
            InvalidValue: the selector names no devices, or names them in two ways, or a family twice.
        """
        releases = rules.named(selector)
        wanted = await self._database.read(lambda conn: tuple(_published(conn, release) for release in releases))
        together = None if selector.together is None else len(wanted) > 1
        candidates = await self._candidates()
        chosen, skipped = rules.select(candidates, selector)
        by_name = {candidate.device: candidate for candidate in candidates}
        assigned: list[Assigned] = []
        for start in range(0, len(chosen), DEVICES_PER_WRITE):
            batch = [by_name[device] for device in chosen[start : start + DEVICES_PER_WRITE]]
            rows, full = await self._sign(batch, wanted, actor=actor, force=selector.force, together=together)
            skipped += tuple(Skipped(device, "too_many_models") for device in full)
            for row in rows:
                assigned.append(Assigned(row.assignment.device, row.assignment.version))
                if by_name[row.assignment.device].online:
                    await self._send(row)
        logger.info("assigned: %s/%s to %d devices", selector.family, selector.version, len(assigned))
        return Outcome(tuple(assigned), skipped)

    async def page(self, *, after: str, limit: int) -> Sequence[AssignmentRow]:
        """The newest assignment of each device, by device."""
        return await self._database.read(lambda conn: tables.current_assignments(conn, after=after, limit=limit))

    async def may_read(self, device: DeviceId, digest: str) -> bool:
        """Whether a device may have this file: one of a release, or a patch, only if an assignment of it names that.

        Assignments right before the newest count too, because the device may still be at it. What belongs to no
        release (tasks of federated runs) is read by whoever was told its digest.
        """

        def work(conn: Connection) -> bool:
            if not tables.is_release_file(conn, digest):
                return True
            return digest in tables.assigned_digests(conn, device, newest=READABLE_ASSIGNMENTS)

        return await self._database.read(work)

    async def run(self) -> None:
        """Renew and send what is due, until cancelled."""
        while True:
            try:
                await self.look()
            except OutriderError as error:
                # The database may be locked or full for now; births and reports go on sending what there is.
                logger.error("assignments were not looked after: %s: %s", error.code, error.message)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Renew what has lived half its life or lags behind its device; send what a device that is here lacks."""
        candidates = {found.device: found for found in await self._candidates() if not found.standing}
        rows = await self._database.read(tables.current_assignments)
        root = await self._database.read(_root)
        orphans: frozenset[DeviceId] = frozenset()
        if root.version != self._followed_root:
            # Once for each root, and once after a start: what was signed with a key that is none any more.
            orphans = await asyncio.to_thread(_unauthorised, rows, repository.read_root(root.document).signed)
        now_ms = self._clock.wall_ms()
        stale = [
            candidates[device]
            for row in rows
            if (device := row.assignment.device) in candidates
            and (device in orphans or self._is_stale(row, candidates[device], now_ms))
        ]
        for start in range(0, len(stale), DEVICES_PER_WRITE):
            await self._sign(stale[start : start + DEVICES_PER_WRITE], (), actor=ACTOR, force=False)
        self._followed_root = root.version
        for row in await self._database.read(tables.current_assignments) if stale else rows:
            candidate = candidates.get(row.assignment.device)
            if candidate is not None and candidate.online and candidate.assignment_version < row.assignment.version:
                await self._send(row)

    def _is_stale(self, row: AssignmentRow, candidate: Candidate, now_ms: int) -> bool:
        ahead = rules.is_ahead(row.assignment.version, seen=candidate.assignment_version)
        return ahead or rules.is_due(
            issued_ms=row.assignment.issued_ms, expires_ms=row.assignment.expires_ms, now_ms=now_ms
        )

    async def _sign(
        self,
        batch: Sequence[Candidate],
        wanted: tuple[AssignedModel, ...],
        *,
        actor: str,
        force: bool,
        together: bool | None = None,
    ) -> tuple[list[AssignmentRow], list[DeviceId]]:
        """Sign for these devices in one transaction; returns what they shall have, and those that hold too much."""
        now_ms = self._clock.wall_ms()
        cause: Literal["assigned", "renewed"] = "assigned" if wanted else "renewed"

        def work(conn: Connection) -> tuple[list[AssignmentRow], list[DeviceId]]:
            rows: list[AssignmentRow] = []
            full: list[DeviceId] = []
            signer = self._keys(_root(conn).document).assignment
            for candidate in batch:
                row = tables.current_assignment(conn, candidate.device)
                has_it = row is not None and not force and _has(row, wanted, together=together)
                if row is not None and has_it and not self._is_stale(row, candidate, now_ms):
                    rows.append(row)
                    continue
                following = rules.next_assignment(
                    None if row is None else row.assignment,
                    wanted,
                    device=candidate.device,
                    seen=candidate.assignment_version,
                    force=force,
                    together=together,
                    now_ms=now_ms,
                    ttl_ms=self._ttl_ms,
                )
                if following is not None:
                    following = _fitting(self._with_patches(conn, following, candidate))
                if following is None:
                    full.append(candidate.device)
                    continue
                new = AssignmentRow(following, sign_assignment(following, signer), actor)
                tables.add_assignment(conn, new)
                audit.record(
                    conn,
                    at_ms=now_ms,
                    actor=actor,
                    action=f"assignment.{cause}",
                    subject=f"device:{candidate.device}",
                    detail={
                        "version": following.version,
                        "models": {model.family: model.version for model in following.models},
                        "force": list(following.force),
                        "together": [list(families) for families in following.together],
                    },
                )
                rows.append(new)
                self._counts.assignments_signed.labels(cause).inc()
            return rows, full

        return await self._database.write(work)

    def _with_patches(self, conn: Connection, assignment: Assignment, candidate: Candidate) -> Assignment:
        """Shorter ways from what the device serves now to the files that it is assigned."""
        running = set(candidate.running.values())
        known = tables.patches_from(conn, sorted(running)) if running else []
        rows = [tables.find_model(conn, model.family, model.version) for model in assignment.models] if known else []
        files = {file.digest for row in rows if row is not None for file in row.files}
        found = tuple(
            Patch(base=row.base, result=row.result, digest=row.digest, length=row.length)
            for row in known
            if row.digest is not None and row.result in files and row.result not in running
        )
        return msgspec.structs.replace(assignment, patches=found)

    async def _on_birth(self, event: DeviceBorn) -> None:
        await self._catch_up(event.device, event.assignment_version)

    async def _on_report(self, event: DeviceReported) -> None:
        await self._catch_up(event.device, event.assignment_version)

    async def _catch_up(self, device: DeviceId, has: int) -> None:
        row = await self._database.read(lambda conn: tables.current_assignment(conn, device))
        if row is not None and has < row.assignment.version:
            await self._send(row)

    async def _send(self, row: AssignmentRow) -> None:
        device, version, now_ms = row.assignment.device, row.assignment.version, self._clock.mono_ms()
        last_version, last_ms = self._sent.get(device, (0, 0))
        if version == last_version and now_ms - last_ms < RESEND_AFTER_MS:
            return
        self._sent[device] = (version, now_ms)
        try:
            await self._post.send(device, Assign(document=row.document), leaf="assignment")
        except Unreachable:
            # The device's next birth, or the timer, sends it.
            del self._sent[device]
            self._counts.assignments_sent.labels("no_link").inc()
            return
        self._counts.assignments_sent.labels("sent").inc()

    async def _candidates(self) -> list[Candidate]:
        found: list[Candidate] = []
        after = ""
        while page := await self._fleet.list(after=after, limit=limits.MAX_PAGE_ITEMS):
            found += [
                Candidate(
                    device=DeviceId(device.id),
                    labels=device.labels,
                    online=device.online,
                    assignment_version=device.assignment_version,
                    running=rules.running_files(device.reported),
                    standing=device.standing.value,
                )
                for device in page
            ]
            after = page[-1].id
        return found


def _root(conn: Connection) -> MetadataRow:
    row = tables.find_metadata(conn, ROOT)
    if row is None:
        raise StorageError("the hub has no root", code="storage.no_repository", hint="run `outrider-hub init` first")
    return row


def _unauthorised(rows: Sequence[AssignmentRow], root: Root) -> frozenset[DeviceId]:
    """The devices whose assignment this root's keys have not signed."""
    found = set()
    for row in rows:
        try:
            open_assignment(row.document, root)
        except TrustError:
            found.add(row.assignment.device)
    return frozenset(found)


def _fitting(assignment: Assignment) -> Assignment | None:
    """With as many of its patches as there is room for; None when it is too large without any."""
    try:
        return fit_assignment(assignment)
    except InvalidValue as error:
        logger.warning("assignment for %s cannot be made: %s", assignment.device, error.message)
        return None


def _has(row: AssignmentRow, wanted: tuple[AssignedModel, ...], *, together: bool | None) -> bool:
    """Whether the device has been assigned all this already; to be renewed, it never has."""
    sets, families = row.assignment.together, [model.family for model in wanted]
    same = rules.sets_after(sets, families, together=together) == sets
    return bool(wanted) and same and all(model in row.assignment.models for model in wanted)


def _published(conn: Connection, release: Named) -> AssignedModel:
    row = tables.find_model(conn, release.family, release.version)
    if row is None:
        raise NotFound(f"there is no release {release.family}/{release.version}", hint="`outrider release ls`")
    if row.published_ms is None or row.release_counter is None:
        raise Conflict(
            f"{row.family}/{row.version} is not published",
            code="conflict.not_published",
            hint=f"`outrider release sign {row.family}/{row.version} --keys DIR`, then publish it",
        )
    floor = tables.published_floor(conn, row.family)
    if row.release_counter < floor:
        raise Conflict(
            f"{row.family}/{row.version} has the release counter {row.release_counter}, below the floor {floor} that "
            "devices keep",
            code="conflict.floor",
            hint="choose a newer release, or release the old model again under a new version",
        )
    return AssignedModel(family=row.family, version=row.version, manifest=row.files[0])
