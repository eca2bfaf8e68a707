"""Who is welcome: revoking, quarantine, and one name in two places at once.

Rules:
1. A standing is a row with its audit line in one transaction. From then on the hub drops what the device sends, sends
   it nothing and answers it nothing, whatever the broker does; only then is the broker told.
2. What is dropped is not acknowledged: the device keeps its records, and sends them when it is welcome again.
3. Every certificate that was ever issued to a revoked name goes onto the revocation list. Enrolling the name again
   lifts the denial of the name, and leaves the old certificates on the list.
4. What the broker has not shown to be done is tried again until it has, and told: in the answer, the log, a metric. A
   name that is welcome again shares it with a device that must not be disturbed: once its session has ended, it is
   tried again only when the list is made anew.
5. The revocation list is made anew long before it ends. An expired one keeps the whole fleet out.

Not here: lists and sessions (ground/revocation.py, ground/access.py), what is evidence of a clone (clones.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from sqlalchemy.engine import Connection

from cloud_hub.devices import clones, rules, tables
from cloud_hub.devices.clones import SeenBirth
from cloud_hub.devices.rules import Standing
from cloud_hub.ground import audit
from cloud_hub.ground.access import PushedOut
from cloud_hub.ground.bus import Bus, DeviceStandingChanged
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import NotFound
from cloud_hub.ground.revocation import AccessLists, ListState, RevokedCertificate
from shared.clock import Clock
from shared.errors import OutriderError, StorageError
from shared.ids import DeviceId
from shared.wire.envelope import Envelope
from shared.wire.messages import Birth

logger = logging.getLogger(__name__)

LOOK_S: Final = 5.0
KICK_AGAIN_MS: Final = 30_000
"""A session that could not be ended is tried again after so long."""
ACTOR: Final = "hub"


class Access(Protocol):
    """What is asked of the broker's door (cloud_hub/ground/access.py)."""

    async def enforce(
        self,
        *,
        revoked: Collection[RevokedCertificate],
        denied: Collection[DeviceId],
        kick: Collection[DeviceId],
    ) -> PushedOut:
        """Write the lists, have them read, end these sessions; returns what was shown. Raises StorageError."""
        ...


class Lists(Protocol):
    """What is asked of the lists on the disk (cloud_hub/ground/revocation.py)."""

    def state(self) -> ListState | None:
        """What the list on the disk is; None when there is none."""
        ...

    def is_due(self) -> bool:
        """Whether it has to be made anew."""
        ...


@dataclass(frozen=True, slots=True)
class Changed:
    """What became of a standing: `is_enforced` says whether the broker has shown that it knows."""

    standing: Standing
    reason: str
    is_enforced: bool


class Standings:
    """The part of the devices room that says who is welcome.

    Args:
        database: the hub's.
        clock: for stamps and the window of births.
        access, lists: the broker's door, and the lists that it reads.
        bus: hears of each change after it is stored.
        metrics: tells the list's times, what fails, and how many are not welcome.
        kicks_at_start: whether the broker may have sessions from before: one that is not ours.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        access: Access,
        lists: Lists,
        bus: Bus,
        metrics: Metrics,
        kicks_at_start: bool,
    ) -> None:
        self._database = database
        self._clock = clock
        self._access = access
        self._lists = lists
        self._bus = bus
        self._kicks_at_start = kicks_at_start
        self._standings: Mapping[DeviceId, Standing] = {}
        self._changes = 0
        self._births: dict[DeviceId, tuple[SeenBirth, ...]] = {}
        self._pending: set[DeviceId] = set()
        self._ended: set[DeviceId] = set()
        self._kick_again_ms = 0
        self._is_failing = False
        self._barred = metrics.gauge("outrider_hub_devices_barred", "Devices that are not welcome.", ("standing",))
        self._waiting = metrics.gauge(
            "outrider_hub_revocations_waiting", "Devices of which the broker has not shown that they are out."
        )
        self._made = metrics.gauge(
            "outrider_hub_revocation_list_made_timestamp_seconds", "When the revocation list was made."
        )
        self._expires = metrics.gauge(
            "outrider_hub_revocation_list_expires_timestamp_seconds", "When the revocation list ends, and all are out."
        )
        self._failures = metrics.counter(
            "outrider_hub_revocation_list_failures_total", "Tries to make the revocation list that failed."
        )

    def of(self, device: DeviceId) -> Standing:
        """Whether a device is welcome, from memory."""
        return self._standings.get(device, Standing.GOOD)

    def is_welcome(self, device: DeviceId) -> bool:
        """Whether anything may be sent to a device."""
        return self.of(device) is Standing.GOOD

    def takes(self, device: str, leaf: str) -> bool:
        """Whether anything is taken of a device on a topic's leaf; for the switchboard."""
        return rules.takes(self._standings.get(DeviceId(device), Standing.GOOD), leaf)

    async def start(self) -> None:
        """Read who is not welcome; before anything arrives."""
        await self._read()
        if self._kicks_at_start:
            self._pending = {device for device, standing in self._standings.items() if standing is Standing.REVOKED}
        self._tell()

    async def revoke(self, device: str, *, reason: str, actor: str) -> Changed:
        """Let a device in nowhere from now on, for good; doing it again has the broker told again.

        Raises:
            NotFound: there is no such device.
            InvalidValue: the reason is not one line.
        """
        known = await self._set(device, Standing.REVOKED, reason=reason, actor=actor)
        is_enforced = await self.enforce(kick={known})
        return Changed(Standing.REVOKED, reason, is_enforced)

    async def quarantine(self, device: str, *, reason: str, actor: str) -> Changed:
        """Give a device nothing and take nothing of it; it keeps its certificate. Raises NotFound, Conflict."""
        await self._set(device, Standing.QUARANTINED, reason=reason, actor=actor)
        return Changed(Standing.QUARANTINED, reason, is_enforced=True)

    async def lift(self, device: str, *, actor: str) -> Changed:
        """End a quarantine; raises NotFound, and Conflict for a revoked device."""
        known = await self._set(device, Standing.GOOD, reason="", actor=actor)
        self._births.pop(known, None)
        return Changed(Standing.GOOD, "", is_enforced=True)

    async def reenrolled(self, device: DeviceId) -> None:
        """A name has a new certificate: its old ones go onto the list, and a session that rests on one of them ends."""
        self._births.pop(device, None)
        if self.of(device) is Standing.REVOKED:
            self._remember(device, Standing.GOOD)
        await self.enforce(kick={device})

    async def born(self, device: DeviceId, envelope: Envelope, birth: Birth) -> bool:
        """Note a birth; returns whether the device is welcome after it. Quarantines a name that is in two places."""
        seen = SeenBirth(
            epoch=birth.epoch,
            boot=birth.boot,
            session=birth.session,
            message=f"{envelope.id} {envelope.wall_ms} {envelope.mono_ms}",
            at_ms=self._clock.mono_ms(),
        )
        self._births[device], reason = clones.note_birth(self._births.get(device, ()), seen)
        if reason and self.is_welcome(device):
            why = f"one name in two places: {reason}"
            logger.error("device is in two places", extra={"device": device, "reason": reason})
            await self._set(device, Standing.QUARANTINED, reason=why, actor=ACTOR)
        return self.is_welcome(device)

    async def enforce(self, *, kick: Collection[DeviceId] = ()) -> bool:
        """Tell the broker who is out; whether it has shown that it knows. What it has not is tried again by `run`."""
        self._pending |= set(kick)
        self._ended -= set(kick)
        try:
            now_ms = self._clock.wall_ms()
            revoked, denied = await self._database.read(lambda conn: listed(conn, now_ms=now_ms))
            pushed = await self._access.enforce(revoked=revoked, denied=denied, kick=kick)
        except OutriderError as error:
            self._failures.inc()
            if not self._is_failing:
                self._is_failing = True
                logger.error("revocation list cannot be made: %s: %s", error.code, error.message)
            self._tell()
            return False
        if self._is_failing:
            self._is_failing = False
            logger.info("revocation list is made again")
        left = frozenset(kick) - pushed.out
        self._pending -= pushed.out
        self._ended |= pushed.ended & left
        self._kick_again_ms = self._clock.mono_ms() + KICK_AGAIN_MS
        for device in left:
            logger.error("broker has not shown that a device is out", extra={"device": device})
        self._tell()
        return not left

    async def run(self) -> None:
        """Keep the list young and try again what failed, until cancelled."""
        while True:
            try:
                await self.look()
            except OutriderError as error:
                # A locked database passes; who is not welcome is in memory meanwhile.
                logger.error("standings were not looked after: %s: %s", error.code, error.message)
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Read who is not welcome, make the list anew when it is due, and try again what failed."""
        await self._read()
        now_ms = self._clock.mono_ms()
        for device, births in list(self._births.items()):
            if now_ms - births[-1].at_ms >= clones.WINDOW_MS:
                del self._births[device]
        is_due = await asyncio.to_thread(self._lists.is_due)
        if is_due:
            await self.enforce(kick=frozenset(self._pending))
        elif (again := self._again()) and now_ms >= self._kick_again_ms:
            await self.enforce(kick=again)

    def _again(self) -> frozenset[DeviceId]:
        """Whose session is ended again soon: not that of a welcome device, which would pay for the broker's sloth."""
        return frozenset(one for one in self._pending if one not in self._ended or not self.is_welcome(one))

    async def _set(self, device: str, standing: Standing, *, reason: str, actor: str) -> DeviceId:
        rules.check_reason(reason)
        now_ms = self._clock.wall_ms()

        def work(conn: Connection) -> tuple[DeviceId, bool]:
            found = tables.find_device(conn, device)
            if found is None:
                raise NotFound(
                    f"there is no device {device[:80]!r}",
                    code="not_found.device",
                    hint="`outrider ls devices` lists them",
                )
            if not rules.next_standing(found.standing, standing, device=device):
                return found.id, False
            tables.set_standing(conn, found.id, standing, reason=reason, at_ms=now_ms)
            if standing is Standing.REVOKED:
                tables.revoke_certificates(conn, found.id, at_ms=now_ms)
            audit.record(
                conn,
                at_ms=now_ms,
                actor=actor,
                action=_ACTIONS[standing],
                subject=f"device:{device}",
                detail={"reason": reason} if reason else {},
            )
            return found.id, True

        known, is_changed = await self._database.write(work)
        if is_changed:
            self._remember(known, standing)
            await self._bus.publish(DeviceStandingChanged(device=known, standing=standing.value))
        return known

    async def _read(self) -> None:
        changes = self._changes
        found = await self._database.read(tables.standings)
        if changes == self._changes:
            self._standings = found
            self._count()

    def _remember(self, device: DeviceId, standing: Standing) -> None:
        """Know a change at once; what is being read meanwhile is from before."""
        self._changes += 1
        others = {name: one for name, one in self._standings.items() if name != device}
        self._standings = others if standing is Standing.GOOD else {**others, device: standing}
        self._count()

    def _count(self) -> None:
        for standing in (Standing.QUARANTINED, Standing.REVOKED):
            many = sum(one is standing for one in self._standings.values())
            self._barred.labels(standing.value).set(many)

    def _tell(self) -> None:
        self._waiting.set(len(self._pending))
        state = self._lists.state()
        self._made.set(state.made_ms / 1000 if state else 0)
        self._expires.set(state.expires_ms / 1000 if state else 0)


_ACTIONS: Final[Mapping[Standing, str]] = {
    Standing.GOOD: "device.quarantine_lifted",
    Standing.QUARANTINED: "device.quarantined",
    Standing.REVOKED: "device.revoked",
}


def listed(conn: Connection, *, now_ms: int) -> tuple[tuple[RevokedCertificate, ...], tuple[DeviceId, ...]]:
    """What the two lists shall hold now: certificates by their serial, and names."""
    denied = [device for device, standing in tables.standings(conn).items() if standing is Standing.REVOKED]
    return tables.revoked_certificates(conn, now_ms=now_ms), tuple(sorted(denied))


def write_lists(database: Database, lists: AccessLists, *, clock: Clock) -> None:
    """Write the lists from the database: before a broker starts, which may have been down for longer than they live.

    Raises:
        StorageError: they cannot be written, and those on the disk are none or have ended.
    """
    now_ms = clock.wall_ms()
    revoked, denied = database.read_now(lambda conn: listed(conn, now_ms=now_ms))
    try:
        lists.write(revoked=revoked, denied=denied)
    except StorageError as error:
        # A full disk must not keep the fleet out as long as the lists hold; `run` goes on trying.
        state = lists.state()
        if state is None or state.expires_ms <= now_ms:
            raise
        logger.error("revocation list cannot be made: %s: %s", error.code, error.message)
