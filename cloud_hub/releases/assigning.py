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

from sqlalchemy.engine import Connection

from cloud_hub.devices.desk import Device
from cloud_hub.ground import audit
from cloud_hub.ground.bus import Bus, DeviceBorn, DeviceReported
from cloud_hub.ground.database import Database
from cloud_hub.ground.post import Post
from cloud_hub.ground.problems import NotFound
from cloud_hub.releases import rules, tables
from cloud_hub.releases.counts import Counts
from cloud_hub.releases.rules import Candidate, Selector, Skipped
from cloud_hub.releases.tables import AssignmentRow
from shared import limits
from shared.clock import Clock
from shared.errors import Conflict, OutriderError, Unreachable
from shared.ids import DeviceId
from shared.release import AssignedModel
from shared.trust.assignment import sign_assignment
from shared.trust.library import Signer
from shared.wire.messages import Assign

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 30.0
RESEND_AFTER_MS: Final = 5_000
"""The least time between two sendings of the same assignment to a device."""
DEVICES_PER_WRITE: Final = 250
"""Signed in one transaction; between two of them others get to write."""
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
        signer: the assignment key.
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
        signer: Signer,
        ttl_ms: int,
    ) -> None:
        self._database = database
        self._clock = clock
        self._counts = counts
        self._fleet = fleet
        self._post = post
        self._signer = signer
        self._ttl_ms = ttl_ms
        self._sent: dict[DeviceId, tuple[int, int]] = {}

    def listen(self, bus: Bus) -> None:
        """Hear of births and reports from now on."""
        bus.subscribe(DeviceBorn, self._on_birth)
        bus.subscribe(DeviceReported, self._on_report)

    async def assign(self, selector: Selector, *, actor: str) -> Outcome:
        """Set one family of the devices' desired state; a device that has it already keeps its assignment.

        Raises:
            NotFound: there is no such release.
            Conflict: it is not published, or lies below the family's security floor.
            InvalidValue: the selector names no devices, or names them in two ways.
        """
        wanted = await self._database.read(lambda conn: _published(conn, selector))
        candidates = await self._candidates()
        chosen, skipped = rules.select(candidates, selector)
        by_name = {candidate.device: candidate for candidate in candidates}
        assigned: list[Assigned] = []
        for start in range(0, len(chosen), DEVICES_PER_WRITE):
            batch = [by_name[device] for device in chosen[start : start + DEVICES_PER_WRITE]]
            rows, full = await self._sign(batch, wanted, actor=actor, force=selector.force)
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
        now_ms = self._clock.wall_ms()
        stale = [
            candidates[row.assignment.device]
            for row in rows
            if row.assignment.device in candidates and self._is_stale(row, candidates[row.assignment.device], now_ms)
        ]
        for start in range(0, len(stale), DEVICES_PER_WRITE):
            await self._sign(stale[start : start + DEVICES_PER_WRITE], None, actor=ACTOR, force=False)
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
        self, batch: Sequence[Candidate], wanted: AssignedModel | None, *, actor: str, force: bool
    ) -> tuple[list[AssignmentRow], list[DeviceId]]:
        """Sign for these devices in one transaction; returns what they shall have, and those that hold too much."""
        now_ms = self._clock.wall_ms()
        cause: Literal["assigned", "renewed"] = "renewed" if wanted is None else "assigned"

        def work(conn: Connection) -> tuple[list[AssignmentRow], list[DeviceId]]:
            rows: list[AssignmentRow] = []
            full: list[DeviceId] = []
            for candidate in batch:
                row = tables.current_assignment(conn, candidate.device)
                has_it = row is not None and wanted in row.assignment.models and not force
                if row is not None and has_it and not self._is_stale(row, candidate, now_ms):
                    rows.append(row)
                    continue
                following = rules.next_assignment(
                    None if row is None else row.assignment,
                    wanted,
                    device=candidate.device,
                    seen=candidate.assignment_version,
                    force=force,
                    now_ms=now_ms,
                    ttl_ms=self._ttl_ms,
                )
                if following is None:
                    full.append(candidate.device)
                    continue
                new = AssignmentRow(following, sign_assignment(following, self._signer), actor)
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
                    },
                )
                rows.append(new)
                self._counts.assignments_signed.labels(cause).inc()
            return rows, full

        return await self._database.write(work)

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
                    standing=device.standing.value,
                )
                for device in page
            ]
            after = page[-1].id
        return found


def _published(conn: Connection, selector: Selector) -> AssignedModel:
    row = tables.find_model(conn, selector.family, selector.version)
    if row is None:
        raise NotFound(f"there is no release {selector.family}/{selector.version}", hint="`outrider release ls`")
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
