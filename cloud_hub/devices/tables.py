"""The room's tables and the statements on them. Private to the room: others ask the desk.

Functions take a connection inside the caller's transaction; none of them begins, commits or decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from cloud_hub.devices.rules import JoinGrant, Presence, ReportMark, Standing
from cloud_hub.ground.revocation import RevokedCertificate
from cloud_hub.ground.schema import metadata
from shared.ids import DeviceId
from shared.wire.messages import Birth, Reported

join_tokens = sa.Table(
    "join_tokens",
    metadata,
    sa.Column("secret_sha256", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("device", sa.String(63), nullable=True),
    sa.Column("profile", sa.String(63), nullable=True),
    sa.Column("uses", sa.Integer, nullable=False),
    sa.Column("uses_left", sa.Integer, nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("created_by", sa.String(128), nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.CheckConstraint("uses_left >= 0", name="uses_left"),
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("profile", sa.String(63), nullable=False),
    sa.Column("enrolled_ms", sa.BigInteger, nullable=False),
    sa.Column("online", sa.Boolean, nullable=False),
    sa.Column("last_seen_ms", sa.BigInteger, nullable=True),
    sa.Column("boot", sa.BigInteger, nullable=False),
    sa.Column("session", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.String(16), nullable=False),
    sa.Column("agent_version", sa.String(64), nullable=False),
    sa.Column("assignment_version", sa.BigInteger, nullable=False),
    sa.Column("reported_boot", sa.BigInteger, nullable=False),
    sa.Column("reported_revision", sa.BigInteger, nullable=False),
    sa.Column("reported_ms", sa.BigInteger, nullable=True),
    sa.Column("reported", sa.Text, nullable=False),
    sa.Column("standing", sa.String(16), nullable=False, server_default="", index=True),
    sa.Column("standing_reason", sa.Text, nullable=False, server_default=""),
    sa.Column("standing_ms", sa.BigInteger, nullable=True),
)

device_labels = sa.Table(
    "device_labels",
    metadata,
    sa.Column("device", sa.String(63), sa.ForeignKey("devices.id"), primary_key=True),
    sa.Column("key", sa.String(63), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
    sa.Index("ix_device_labels_key", "key", "value"),
)

device_certificates = sa.Table(
    "device_certificates",
    metadata,
    sa.Column("fingerprint", sa.String(64), primary_key=True),
    sa.Column("device", sa.String(63), sa.ForeignKey("devices.id"), nullable=False, index=True),
    sa.Column("issued_ms", sa.BigInteger, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_ms", sa.BigInteger, nullable=True),
    sa.Column("serial", sa.String(40), nullable=False, server_default=""),
    sa.Column("authority", sa.String(64), nullable=False, server_default=""),
    sa.Column("used_ms", sa.BigInteger, nullable=True),
)


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the hub knows it.

    Attributes:
        online: born and not died since, as far as this run of the hub has seen.
        last_seen_ms: hub's clock at its last birth, death or report.
        boot: its boot counter at the newest birth.
        assignment_version: the newest assignment that it says it has accepted.
        reported: the newest state it reported, JSON object (`shared.wire.messages.Reported`), empty before the first.
        reported_ms: hub's clock when that came.
        standing: whether it is welcome; `standing_reason` says why not, `standing_ms` since when.
    """

    id: DeviceId
    profile: str
    labels: Mapping[str, str]
    enrolled_ms: int
    online: bool
    last_seen_ms: int | None
    boot: int
    agent_version: str
    assignment_version: int
    reported_ms: int | None
    reported: Mapping[str, Any]
    standing: Standing = Standing.GOOD
    standing_reason: str = ""
    standing_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom a certificate was issued to, whether it is void, and whether its device is welcome.

    Attributes:
        is_noted: its first use was noted, and its serial, without which it cannot be put onto a revocation list.
    """

    device: DeviceId
    is_revoked: bool
    is_noted: bool
    standing: Standing
    reason: str


def add_grant(conn: Connection, *, secret_sha256: str, grant: JoinGrant, at_ms: int, created_by: str) -> None:
    """Store a new join token."""
    conn.execute(
        join_tokens.insert().values(
            secret_sha256=secret_sha256,
            name=grant.name,
            device=grant.device,
            profile=grant.profile,
            uses=grant.uses_left,
            uses_left=grant.uses_left,
            created_ms=at_ms,
            created_by=created_by,
            expires_ms=grant.expires_ms,
        )
    )


def find_grant(conn: Connection, secret_sha256: str) -> JoinGrant | None:
    """The join token with this hash."""
    row = conn.execute(sa.select(join_tokens).where(join_tokens.c.secret_sha256 == secret_sha256)).one_or_none()
    if row is None:
        return None
    return JoinGrant(
        name=row.name, device=row.device, profile=row.profile, uses_left=row.uses_left, expires_ms=row.expires_ms
    )


def spend_grant(conn: Connection, secret_sha256: str, *, now_ms: int) -> bool:
    """Use the token once, if it has a use left and has not expired: one statement, so that it cannot be used twice."""
    done = conn.execute(
        join_tokens.update()
        .where(
            join_tokens.c.secret_sha256 == secret_sha256,
            join_tokens.c.uses_left > 0,
            join_tokens.c.expires_ms > now_ms,
        )
        .values(uses_left=join_tokens.c.uses_left - 1)
    )
    return done.rowcount == 1


def add_device(conn: Connection, device: DeviceId, *, profile: str, at_ms: int) -> None:
    """Store a new device that was never seen."""
    conn.execute(devices.insert().values(id=device, profile=profile, enrolled_ms=at_ms, **_UNSEEN))


def reset_device(conn: Connection, device: DeviceId, *, profile: str, at_ms: int) -> None:
    """Let a device begin anew under its name: it was enrolled again, its former certificates are void.

    A revocation ends with this, for the certificates that follow.
    """
    conn.execute(devices.update().where(devices.c.id == device).values(profile=profile, enrolled_ms=at_ms, **_UNSEEN))
    conn.execute(
        devices.update()
        .where(devices.c.id == device, devices.c.standing == Standing.REVOKED.value)
        .values(standing=Standing.GOOD.value, standing_reason="", standing_ms=at_ms)
    )
    revoke_certificates(conn, device, at_ms=at_ms)


def certificate_owner(conn: Connection, fingerprint: str) -> Owner | None:
    """Whose certificate this is; None for one that was never issued to a device."""
    row = conn.execute(
        sa.select(
            device_certificates.c.device,
            device_certificates.c.revoked_ms,
            device_certificates.c.used_ms,
            device_certificates.c.serial,
            devices.c.standing,
            devices.c.standing_reason,
        )
        .join(devices, devices.c.id == device_certificates.c.device)
        .where(device_certificates.c.fingerprint == fingerprint)
    ).one_or_none()
    if row is None:
        return None
    return Owner(
        device=DeviceId(row.device),
        is_revoked=row.revoked_ms is not None,
        is_noted=row.used_ms is not None and row.serial != "",
        standing=Standing(row.standing),
        reason=row.standing_reason,
    )


def revoke_certificates(conn: Connection, device: DeviceId, *, at_ms: int) -> None:
    """Make every certificate void that was issued to this name so far."""
    conn.execute(
        device_certificates.update()
        .where(device_certificates.c.device == device, device_certificates.c.revoked_ms.is_(None))
        .values(revoked_ms=at_ms)
    )


def revoked_certificates(conn: Connection, *, now_ms: int) -> tuple[RevokedCertificate, ...]:
    """What belongs onto revocation lists now: void, with a known serial, and not at its end anyway."""
    query = sa.select(device_certificates).where(
        device_certificates.c.revoked_ms.is_not(None),
        device_certificates.c.expires_ms > now_ms,
        device_certificates.c.serial != "",
    )
    return tuple(
        RevokedCertificate(authority=row.authority, serial=int(row.serial, 16), revoked_ms=row.revoked_ms)
        for row in conn.execute(query.order_by(device_certificates.c.revoked_ms, device_certificates.c.serial))
    )


def live_serials(conn: Connection, device: DeviceId, *, now_ms: int) -> tuple[int, ...]:
    """Serials of the device's certificates that are neither void nor at their end."""
    rows = conn.execute(
        sa.select(device_certificates.c.serial)
        .where(
            device_certificates.c.device == device,
            device_certificates.c.revoked_ms.is_(None),
            device_certificates.c.expires_ms > now_ms,
            device_certificates.c.serial != "",
        )
        .order_by(device_certificates.c.issued_ms)
    )
    return tuple(int(row.serial, 16) for row in rows)


def has_unlistable(conn: Connection, device: DeviceId, *, now_ms: int) -> bool:
    """Whether the name has a certificate in its time whose serial was not noted when it was issued."""
    query = sa.select(device_certificates.c.fingerprint).where(
        device_certificates.c.device == device,
        device_certificates.c.expires_ms > now_ms,
        device_certificates.c.serial == "",
    )
    return conn.execute(query.limit(1)).one_or_none() is not None


def standings(conn: Connection) -> dict[DeviceId, Standing]:
    """Every device that is not in good standing."""
    query = sa.select(devices.c.id, devices.c.standing).where(devices.c.standing != Standing.GOOD.value)
    return {DeviceId(row.id): Standing(row.standing) for row in conn.execute(query)}


def standing_of(conn: Connection, device: DeviceId) -> Standing | None:
    """Whether a device is welcome; None for an unknown one."""
    row = conn.execute(sa.select(devices.c.standing).where(devices.c.id == device)).one_or_none()
    return None if row is None else Standing(row.standing)


def set_standing(conn: Connection, device: DeviceId, standing: Standing, *, reason: str, at_ms: int) -> None:
    """Note whether a device is welcome from now on; who is revoked is not connected any more."""
    values: dict[str, Any] = {"standing": standing.value, "standing_reason": reason, "standing_ms": at_ms}
    if standing is Standing.REVOKED:
        values["online"] = False
    conn.execute(devices.update().where(devices.c.id == device).values(**values))


def presence(conn: Connection, device: DeviceId) -> Presence | None:
    """What is known of a device's presence; None for an unknown device."""
    columns = (devices.c.epoch, devices.c.boot, devices.c.session, devices.c.online)
    row = conn.execute(sa.select(*columns).where(devices.c.id == device)).one_or_none()
    return None if row is None else Presence(epoch=row.epoch, boot=row.boot, session=row.session, online=row.online)


def set_born(conn: Connection, device: DeviceId, birth: Birth, *, at_ms: int, is_new_epoch: bool) -> None:
    """Note a birth; with a new epoch the counters of reports begin anew."""
    values: dict[str, Any] = {
        "online": True,
        "last_seen_ms": at_ms,
        "boot": birth.boot,
        "session": birth.session,
        "epoch": birth.epoch[:16],
        "profile": birth.profile[:63],
        "agent_version": birth.agent_version[:64],
        "assignment_version": birth.assignment_version,
    }
    if is_new_epoch:
        values |= {"reported_boot": 0, "reported_revision": 0}
    conn.execute(devices.update().where(devices.c.id == device).values(**values))


def set_gone(conn: Connection, device: DeviceId, *, at_ms: int) -> None:
    """Note that a device is not connected."""
    conn.execute(devices.update().where(devices.c.id == device).values(online=False, last_seen_ms=at_ms))


def forget_presence(conn: Connection) -> None:
    """Nobody is known to be connected."""
    conn.execute(devices.update().where(devices.c.online).values(online=False))


def online_count(conn: Connection) -> int:
    """How many devices are connected."""
    return int(conn.execute(sa.select(sa.func.count()).select_from(devices).where(devices.c.online)).scalar_one())


def report_mark(conn: Connection, device: DeviceId) -> ReportMark | None:
    """How new the stored report is; None for an unknown device."""
    columns = (devices.c.reported_boot, devices.c.reported_revision)
    row = conn.execute(sa.select(*columns).where(devices.c.id == device)).one_or_none()
    return None if row is None else ReportMark(boot=row.reported_boot, revision=row.reported_revision)


def set_reported(conn: Connection, device: DeviceId, report: Reported, *, boot: int, at_ms: int) -> None:
    """Store a report. Who reports is connected."""
    conn.execute(
        devices.update()
        .where(devices.c.id == device)
        .values(
            online=True,
            last_seen_ms=at_ms,
            assignment_version=report.assignment_version,
            reported_boot=boot,
            reported_revision=report.revision,
            reported_ms=at_ms,
            reported=msgspec.json.encode(report).decode(),
        )
    )


def find_device(conn: Connection, device: str) -> Device | None:
    """One device with its labels."""
    found = _with_labels(conn, conn.execute(sa.select(devices).where(devices.c.id == device)).all())
    return found[0] if found else None


def list_devices(conn: Connection, *, after: str, limit: int, labels: Mapping[str, str]) -> tuple[Device, ...]:
    """Devices by name, those after `after` that carry all these labels."""
    query = sa.select(devices).where(devices.c.id > after).order_by(devices.c.id).limit(limit)
    for key, value in labels.items():
        carriers = sa.select(device_labels.c.device).where(device_labels.c.key == key, device_labels.c.value == value)
        query = query.where(devices.c.id.in_(carriers))
    return _with_labels(conn, conn.execute(query).all())


def set_labels(conn: Connection, device: DeviceId, labels: Mapping[str, str]) -> None:
    """Replace a device's labels."""
    conn.execute(device_labels.delete().where(device_labels.c.device == device))
    if labels:
        conn.execute(
            device_labels.insert(), [{"device": device, "key": key, "value": value} for key, value in labels.items()]
        )


_UNSEEN: Final[Mapping[str, Any]] = {
    "online": False,
    "last_seen_ms": None,
    "boot": 0,
    "session": 0,
    "epoch": "",
    "agent_version": "",
    "assignment_version": 0,
    "reported_boot": 0,
    "reported_revision": 0,
    "reported_ms": None,
    "reported": "{}",
}


def _with_labels(conn: Connection, rows: Sequence[Row[Any]]) -> tuple[Device, ...]:
    labels: dict[str, dict[str, str]] = {row.id: {} for row in rows}
    if rows:
        # By range and not by a list of names: a page may hold more names than a statement takes parameters.
        first, last = rows[0].id, rows[-1].id
        query = sa.select(device_labels).where(device_labels.c.device.between(first, last))
        for label in conn.execute(query.order_by(device_labels.c.key)):
            if label.device in labels:
                labels[label.device][label.key] = label.value
    return tuple(
        Device(
            id=DeviceId(row.id),
            profile=row.profile,
            labels=labels[row.id],
            enrolled_ms=row.enrolled_ms,
            online=row.online,
            last_seen_ms=row.last_seen_ms,
            boot=row.boot,
            agent_version=row.agent_version,
            assignment_version=row.assignment_version,
            reported_ms=row.reported_ms,
            reported=msgspec.json.decode(row.reported),
            standing=Standing(row.standing),
            standing_reason=row.standing_reason,
            standing_ms=row.standing_ms,
        )
        for row in rows
    )
