"""The devices room's one public face: joining, certificates, presence, reports, labels; who is welcome is `standings`'.

Every mutation that a person or a device asks for has its audit row in the same transaction. Presence and reports have
none: they are the device's own word, many a minute, and kept in its row.

Not here: what devices shall run (releases), what they send as records (telemetry).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from sqlalchemy.engine import Connection

from cloud_hub.devices import certificate_tables, rules, sightings, tables
from cloud_hub.devices.certificate_tables import Issue
from cloud_hub.devices.readiness import Readiness, readiness
from cloud_hub.devices.renewing import RenewalRequest, Renewing
from cloud_hub.devices.rules import Standing
from cloud_hub.devices.standing import Changed, Standings, write_lists
from cloud_hub.devices.tables import Device
from cloud_hub.ground import audit
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.bus import Bus, DeviceBorn, DeviceDied, DeviceReported
from cloud_hub.ground.ca import ShownCertificate, check_csr
from cloud_hub.ground.database import Database
from cloud_hub.ground.metrics import Metrics
from cloud_hub.ground.refusals import NotAllowed, NotFound
from shared import join, limits
from shared.clock import Clock
from shared.errors import InvalidValue, OutriderError, ProtocolViolation, StorageError
from shared.ids import DeviceId, parse_device_id
from shared.renewal import csr_digest
from shared.wire.envelope import Envelope
from shared.wire.messages import Birth, Death, Reported

logger = logging.getLogger(__name__)

__all__ = [
    "BrokerAddress",
    "Changed",
    "Desk",
    "Device",
    "EnrolSettings",
    "Enrolled",
    "Readiness",
    "RenewalRequest",
    "Renewed",
    "Standing",
    "Standings",
    "make_join_token",
    "readiness",
    "write_lists",
]

_MAX_COUNTER = 2**53


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where devices reach the broker."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class EnrolSettings:
    """What a device is told when it joins, how long its certificate lives, and how late it may still be renewed."""

    hub_url: str
    broker: BrokerAddress
    certificate_days: float
    renew_expired_days: float = 365


@dataclass(frozen=True, slots=True)
class Renewed:
    """A device with a new certificate."""

    device: DeviceId
    certificate_pem: str
    ca_pem: str
    hub_url: str
    broker: BrokerAddress


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A device that has joined; `root` is the TUF root that it shall begin its trust with, JSON text.

    `is_again` says that the name had a certificate before.
    """

    device: DeviceId
    certificate_pem: str
    ca_pem: str
    hub_url: str
    broker: BrokerAddress
    root: str
    is_again: bool = False


class Desk:
    """The devices room.

    Args:
        database: the hub's.
        clock: for stamps and expiry.
        authorities: sign devices' certificates.
        bus: hears of births, deaths and reports after they are stored.
        metrics: counts who is online and who tried to join.
        settings: what new devices are told.
        root: the newest TUF root as JSON text (the releases room).
        standings: who is welcome.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        authorities: Authorities,
        bus: Bus,
        metrics: Metrics,
        settings: EnrolSettings,
        root: Callable[[], Awaitable[str]],
        standings: Standings,
    ) -> None:
        self.standings = standings
        self._database = database
        self._clock = clock
        self._authorities = authorities
        self._renewing = Renewing(
            database=database,
            clock=clock,
            authorities=authorities,
            certificate_days=settings.certificate_days,
            expired_days=settings.renew_expired_days,
        )
        self._bus = bus
        self._metrics = metrics
        self._settings = settings
        self._root = root
        self._renewals = metrics.counter("outrider_hub_renewals_total", "Tries to renew.", ("outcome",))
        self._enrolments = metrics.counter("outrider_hub_enrolments_total", "Tries to enrol.", ("outcome",))

    # Joining

    async def create_join_token(
        self, *, name: str, device: str | None, profile: str | None, uses: int, ttl_ms: int, actor: str
    ) -> str:
        """Make a join token and return its text, which is nowhere stored."""
        return await self._database.write(
            lambda conn: make_join_token(
                conn,
                hub_url=self._settings.hub_url,
                ca_fingerprint=self._authorities.fingerprint,
                name=name,
                device=device,
                profile=profile,
                uses=uses,
                ttl_ms=ttl_ms,
                at_ms=self._clock.wall_ms(),
                actor=actor,
            )
        )

    async def enroll(self, *, token: str, csr_pem: str, profile: str, name: str | None, address: str) -> Enrolled:
        """Trade a join token and a certificate request for a device's identity.

        Token, name, device and certificate are one transaction: when anything is wrong, the token keeps its use.

        Raises:
            NotAllowed: the token is unknown or expired, or bound to another name.
            Conflict: the token is spent, or the name is taken.
            InvalidValue: the request, the name or the profile is not usable.
        """
        try:
            secret_sha256 = _secret_sha256(token)
            check_csr(csr_pem)
            root = await self._root()
            enrolled = await self._database.write(
                lambda conn: self._enroll(
                    conn, secret_sha256, csr_pem=csr_pem, profile=profile, name=name, address=address, root=root
                )
            )
        except OutriderError as error:
            await self._note_refusal(error, name=name, address=address)
            raise
        self._enrolments.labels("ok").inc()
        if enrolled.is_again:
            # Before the answer: a session that ends later would be that of the new certificate.
            await self.standings.reenrolled(enrolled.device)
        return enrolled

    def _enroll(
        self,
        conn: Connection,
        secret_sha256: str,
        *,
        csr_pem: str,
        profile: str,
        name: str | None,
        address: str,
        root: str,
    ) -> Enrolled:
        now_ms = self._clock.wall_ms()
        grant = rules.check_grant(tables.find_grant(conn, secret_sha256), now_ms=now_ms)
        device = rules.choose_name(grant, proposed=name, generated=_generated_name())
        profile = rules.choose_profile(grant, proposed=profile)
        standing = tables.standing_of(conn, device)
        is_known = standing is not None
        if is_known and grant.device is None:
            raise rules.name_taken(device)
        if standing is Standing.QUARANTINED:
            raise rules.quarantined(device)
        if standing is Standing.REVOKED and tables.has_unlistable(conn, device, now_ms=now_ms):
            raise rules.unlistable(device)
        if not tables.spend_grant(conn, secret_sha256, now_ms=now_ms):
            raise rules.spent()
        if is_known:
            tables.reset_device(conn, device, profile=profile, at_ms=now_ms)
        else:
            tables.add_device(conn, device, profile=profile, at_ms=now_ms)
        certificate = self._authorities.issue_device(
            csr_pem, device=device, now_ms=now_ms, days=self._settings.certificate_days
        )
        issue = Issue(told=self._authorities.fingerprints, csr_sha256=csr_digest(csr_pem))
        certificate_tables.record_issued(conn, device, certificate, issue=issue, at_ms=now_ms)
        audit.record(
            conn,
            at_ms=now_ms,
            actor=f"join-token:{grant.name}",
            action="device.reenrolled" if is_known else "device.enrolled",
            subject=f"device:{device}",
            detail={"profile": profile, "address": address, "certificate": certificate.fingerprint},
        )
        return Enrolled(
            device=device,
            certificate_pem=certificate.pem,
            ca_pem=self._authorities.pem,
            hub_url=self._settings.hub_url,
            broker=self._settings.broker,
            root=root,
            is_again=is_known,
        )

    async def _note_refusal(self, error: OutriderError, *, name: str | None, address: str) -> None:
        self._enrolments.labels("refused").inc()
        if not error.code.startswith("enrol.token"):
            return
        # A token that is shown twice, or made up, is worth a look: it may have been stolen.
        now_ms = self._clock.wall_ms()
        await self._database.write(
            lambda conn: audit.record(
                conn,
                at_ms=now_ms,
                actor=f"address:{address[:64]}",
                action="enrol.refused",
                subject=f"device:{(name or '')[:63]}",
                detail={"code": error.code},
            )
        )

    async def renew(self, request: RenewalRequest, *, address: str) -> Renewed:
        """Trade a certificate, in its time or not, for one with a new key; raises as `Renewing.renew` does."""
        try:
            device, certificate = await self._renewing.renew(request, address=address)
        except OutriderError:
            self._renewals.labels("refused").inc()
            raise
        self._renewals.labels("ok").inc()
        return Renewed(
            device=device,
            certificate_pem=certificate.pem,
            ca_pem=self._authorities.pem,
            hub_url=self._settings.hub_url,
            broker=self._settings.broker,
        )

    async def device_of(self, certificate_der: bytes) -> DeviceId:
        """The device that a verified client certificate stands for; raises NotAllowed for any other certificate."""
        now_ms = self._clock.wall_ms()
        shown = self._authorities.check_client(certificate_der, now_ms=now_ms)
        owner = None if shown is None else await self._owner(shown, at_ms=now_ms)
        if shown is None or owner is None or owner.device != shown.name:
            raise NotAllowed(
                "the client certificate is not one of this hub's devices, or has expired",
                code="auth.unknown_certificate",
                hint="enrol the device again with a new join token",
            )
        if owner.is_revoked or owner.standing is Standing.REVOKED:
            raise NotAllowed(
                "the client certificate was revoked",
                code="auth.revoked_certificate",
                hint="the device was revoked, or enrolled again since; if that is right, use its new certificate",
            )
        if owner.standing is Standing.QUARANTINED:
            raise NotAllowed(
                f"the device is in quarantine: {owner.reason or 'no reason given'}",
                code="auth.quarantined",
                hint=f"look at it, then `outrider device quarantine {owner.device} --lift`",
            )
        return owner.device

    async def _owner(self, shown: ShownCertificate, *, at_ms: int) -> tables.Owner | None:
        def look(conn: Connection) -> tuple[tables.Owner | None, bool]:
            return tables.certificate_owner(conn, shown.fingerprint), sightings.is_due(conn, shown)

        owner, is_due = await self._database.read(look)
        if is_due:
            try:
                owner = await self._database.write(lambda conn: sightings.note(conn, shown, at_ms=at_ms))
            except StorageError as error:
                # A full disk keeps nobody out whom the hub knows; it is noted another time.
                logger.warning("use of a certificate was not noted: %s: %s", error.code, error.message)
        return owner

    # Presence and reports

    async def start(self) -> None:
        """Forget who was online before this start: births tell. Read who is not welcome."""
        await self._database.write(tables.forget_presence)
        await self.standings.start()
        self._metrics.devices_online.set(0)

    async def born(self, device: DeviceId, envelope: Envelope, birth: Birth) -> None:
        """Note a birth and tell the other rooms, unless a newer one is known."""
        _check_counters(birth.boot, birth.session, birth.assignment_version)
        now_ms = self._clock.wall_ms()

        def work(conn: Connection) -> bool:
            known = _known(tables.presence(conn, device), device)
            if not rules.is_newer_birth(known, epoch=birth.epoch, boot=birth.boot, session=birth.session):
                return False
            tables.set_born(conn, device, birth, at_ms=now_ms, is_new_epoch=birth.epoch != known.epoch)
            self._metrics.devices_online.set(tables.online_count(conn))
            return True

        is_news = await self._database.write(work)
        if await self.standings.born(device, envelope, birth) and is_news:
            await self._bus.publish(
                DeviceBorn(device=device, assignment_version=birth.assignment_version, boot=birth.boot)
            )

    async def died(self, device: DeviceId, _envelope: Envelope, death: Death) -> None:
        """Note a death and tell the other rooms, unless the device was born again since."""
        now_ms = self._clock.wall_ms()

        def work(conn: Connection) -> bool:
            known = _known(tables.presence(conn, device), device)
            if not known.online or not rules.is_current_death(known, boot=death.boot, session=death.session):
                return False
            tables.set_gone(conn, device, at_ms=now_ms)
            self._metrics.devices_online.set(tables.online_count(conn))
            return True

        if await self._database.write(work):
            await self._bus.publish(DeviceDied(device=device, reason=death.reason))

    async def reported(self, device: DeviceId, envelope: Envelope, report: Reported) -> None:
        """Store a device's state and tell the other rooms, if it is newer than what is stored."""
        _check_counters(envelope.boot, report.revision, report.assignment_version)
        now_ms = self._clock.wall_ms()

        def work(conn: Connection) -> bool:
            mark = tables.report_mark(conn, device)
            if mark is None:
                raise _unknown(device)
            if not rules.is_newer_report(mark, boot=envelope.boot, revision=report.revision):
                return False
            tables.set_reported(conn, device, report, boot=envelope.boot, at_ms=now_ms)
            self._metrics.devices_online.set(tables.online_count(conn))
            return True

        if await self._database.write(work) and self.standings.is_welcome(device):
            await self._bus.publish(
                DeviceReported(device=device, assignment_version=report.assignment_version, models=report.models)
            )

    # Looking and labelling

    async def get(self, device: str) -> Device:
        """One device; raises NotFound."""
        found = await self._database.read(lambda conn: tables.find_device(conn, device))
        if found is None:
            raise _unknown(device)
        return found

    async def list(
        self, *, after: str = "", limit: int = limits.MAX_PAGE_ITEMS, labels: Mapping[str, str] | None = None
    ) -> tuple[Device, ...]:
        """Devices by name, those after `after` that carry all these labels, at most `limit`."""
        bounded = max(1, min(limit, limits.MAX_PAGE_ITEMS))
        return await self._database.read(
            lambda conn: tables.list_devices(conn, after=after, limit=bounded, labels=labels or {})
        )

    async def label(self, device: str, *, changes: Mapping[str, str | None], actor: str) -> Device:
        """Set labels, and remove those whose new value is None; returns the device as it is then."""
        now_ms = self._clock.wall_ms()

        def work(conn: Connection) -> Device:
            found = tables.find_device(conn, device)
            if found is None:
                raise _unknown(device)
            tables.set_labels(conn, found.id, rules.merge_labels(found.labels, changes))
            audit.record(
                conn,
                at_ms=now_ms,
                actor=actor,
                action="device.labelled",
                subject=f"device:{device}",
                detail=dict(changes),
            )
            after = tables.find_device(conn, device)
            assert after is not None
            return after

        return await self._database.write(work)


def make_join_token(
    conn: Connection,
    *,
    hub_url: str,
    ca_fingerprint: str,
    name: str,
    device: str | None,
    profile: str | None,
    uses: int,
    ttl_ms: int,
    at_ms: int,
    actor: str,
) -> str:
    """Make a join token in the caller's write transaction, with its audit row; returns its text."""
    rules.check_join_request(uses=uses, ttl_ms=ttl_ms)
    bound = None if device is None else parse_device_id(device)
    if bound is not None and uses != 1:
        raise InvalidValue("a token for one device has one use", code="invalid.uses")
    if len(name) > 64:
        raise InvalidValue("a token's name has at most 64 characters", code="invalid.token_name")
    secret = secrets.token_bytes(join.SECRET_BYTES)
    digest = hashlib.sha256(secret).hexdigest()
    label = name or digest[:12]
    grant = rules.JoinGrant(name=label, device=bound, profile=profile, uses_left=uses, expires_ms=at_ms + ttl_ms)
    if profile is not None:
        rules.choose_profile(grant, proposed=profile)
    tables.add_grant(conn, secret_sha256=digest, grant=grant, at_ms=at_ms, created_by=actor)
    audit.record(
        conn,
        at_ms=at_ms,
        actor=actor,
        action="join_token.created",
        subject=f"join-token:{label}",
        detail={"device": device, "profile": profile, "uses": uses, "expires_ms": grant.expires_ms},
    )
    return join.encode_join_token(join.JoinToken(hub_url=hub_url, ca_fingerprint=ca_fingerprint, secret=secret))


def _secret_sha256(token: str) -> str:
    try:
        return hashlib.sha256(join.decode_join_token(token).secret).hexdigest()
    except InvalidValue as error:
        raise NotAllowed("this is not a join token", code="enrol.token_unknown", hint=error.hint) from error


def _generated_name() -> DeviceId:
    return DeviceId("dev-" + base64.b32encode(secrets.token_bytes(5)).decode().lower())


def _known(presence: rules.Presence | None, device: DeviceId) -> rules.Presence:
    if presence is None:
        raise _unknown(device)
    return presence


def _unknown(device: str) -> NotFound:
    return NotFound(
        f"there is no device {device[:80]!r}", code="not_found.device", hint="`outrider ls devices` lists them"
    )


def _check_counters(*counters: int) -> None:
    if any(not 0 <= counter < _MAX_COUNTER for counter in counters):
        raise ProtocolViolation("a counter is out of bounds", code="protocol.counter")
