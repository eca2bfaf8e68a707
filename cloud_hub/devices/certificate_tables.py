"""What is kept of each certificate that a device was given, and the statements on it. Private to the room.

Functions take a connection inside the caller's transaction; none of them begins, commits or decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from cloud_hub.devices.rules import CertificateStanding, DeviceTrust, Known, Standing
from cloud_hub.devices.tables import certificate_owner, device_certificates, devices
from cloud_hub.ground.ca import DeviceCertificate, ShownCertificate
from cloud_hub.ground.schema import metadata
from shared.ids import DeviceId

certificate_issues = sa.Table(
    "certificate_issues",
    metadata,
    sa.Column("fingerprint", sa.String(64), sa.ForeignKey("device_certificates.fingerprint"), primary_key=True),
    sa.Column("told", sa.String(255), nullable=False),
    sa.Column("csr_sha256", sa.String(64), nullable=False),
    sa.Column("renews", sa.String(64), nullable=True),
    sa.Column("pem", sa.Text, nullable=False),
    sa.Index("ix_certificate_issues_csr", "csr_sha256"),
    sa.Index("ix_certificate_issues_renews", "renews"),
)


@dataclass(frozen=True, slots=True)
class Issue:
    """How a certificate came about.

    Attributes:
        told: fingerprints of the CAs that the device was told with it.
        csr_sha256: what was asked (`shared.renewal.csr_digest`).
        renews: fingerprint of the certificate that was shown for it; None when it came with a join token.
    """

    told: Sequence[str]
    csr_sha256: str
    renews: str | None = None


def record_issued(
    conn: Connection, device: DeviceId, certificate: DeviceCertificate, *, issue: Issue, at_ms: int
) -> None:
    """Note a certificate that was issued to a device. Every one of them goes through here."""
    conn.execute(
        device_certificates.insert().values(
            fingerprint=certificate.fingerprint,
            device=device,
            issued_ms=at_ms,
            expires_ms=certificate.expires_ms,
            serial=f"{certificate.serial:x}",
            authority=certificate.authority,
        )
    )
    conn.execute(
        certificate_issues.insert().values(
            fingerprint=certificate.fingerprint,
            told=" ".join(issue.told),
            csr_sha256=issue.csr_sha256,
            renews=issue.renews,
            pem=certificate.pem,
        )
    )


def standing(conn: Connection, fingerprint: str) -> CertificateStanding | None:
    """What is known of a certificate and its device; None for one that was never issued to a device."""
    owner = certificate_owner(conn, fingerprint)
    if owner is None:
        return None
    return CertificateStanding(
        device=owner.device,
        is_revoked=owner.is_revoked or owner.standing is Standing.REVOKED,
        is_quarantined=owner.standing is Standing.QUARANTINED,
    )


def known(conn: Connection, device: str) -> Known | None:
    """The standing of a device and its newest certificate, void or not; None when nothing was ever issued to it."""
    own = device_certificates.c
    query = (
        sa.select(devices.c.standing, sa.func.max(own.issued_ms).label("newest_ms"))
        .join(device_certificates, own.device == devices.c.id)
        .where(devices.c.id == device)
        .group_by(devices.c.id, devices.c.standing)
    )
    row = conn.execute(query).one_or_none()
    return None if row is None else Known(standing=Standing(row.standing), newest_ms=row.newest_ms)


def record_adopted(conn: Connection, shown: ShownCertificate) -> None:
    """Note a certificate that the database had lost, as issued when it begins; what was told with it is not known."""
    conn.execute(
        device_certificates.insert().values(
            fingerprint=shown.fingerprint,
            device=shown.name,
            issued_ms=shown.begins_ms,
            expires_ms=shown.ends_ms,
            serial=f"{shown.serial:x}",
            authority=shown.issuer,
        )
    )


def record_use(conn: Connection, shown: ShownCertificate, *, at_ms: int) -> None:
    """Note that a certificate was shown by who has its key, and its serial where a hub of before did not."""
    own = device_certificates.c
    this = device_certificates.update().where(own.fingerprint == shown.fingerprint)
    conn.execute(this.where(own.used_ms.is_(None)).values(used_ms=at_ms))
    conn.execute(this.where(own.serial == "").values(serial=f"{shown.serial:x}", authority=shown.issuer))


def has_used_successor(conn: Connection, fingerprint: str) -> bool:
    """Whether a certificate was renewed, and one that it was traded for has been used since."""
    own = device_certificates.c
    query = (
        sa.select(own.fingerprint)
        .join(certificate_issues, certificate_issues.c.fingerprint == own.fingerprint)
        .where(certificate_issues.c.renews == fingerprint, own.used_ms.is_not(None))
    )
    return conn.execute(query.limit(1)).first() is not None


def answered(conn: Connection, *, csr_sha256: str, renews: str, now_ms: int) -> DeviceCertificate | None:
    """The certificate that this request was answered with already, if it is still good."""
    own = device_certificates.c
    query = (
        sa.select(certificate_issues.c.pem, own.fingerprint, own.expires_ms, own.serial, own.authority)
        .join(device_certificates, own.fingerprint == certificate_issues.c.fingerprint)
        .where(
            certificate_issues.c.csr_sha256 == csr_sha256,
            certificate_issues.c.renews == renews,
            own.revoked_ms.is_(None),
            own.expires_ms > now_ms,
        )
    )
    row = conn.execute(query).first()
    if row is None:
        return None
    return DeviceCertificate(
        pem=row.pem,
        fingerprint=row.fingerprint,
        expires_ms=row.expires_ms,
        serial=int(row.serial, 16),
        authority=row.authority,
    )


def live_count(conn: Connection, device: DeviceId, *, now_ms: int) -> int:
    """How many certificates of a device are good now."""
    own = device_certificates.c
    query = sa.select(sa.func.count()).where(own.device == device, own.revoked_ms.is_(None), own.expires_ms > now_ms)
    return int(conn.execute(query).scalar_one())


def forget_old(conn: Connection, device: DeviceId, *, before_ms: int) -> None:
    """Drop what is kept of a device's certificates that expired before then: nothing can be done with them."""
    own = device_certificates.c
    old = sa.select(own.fingerprint).where(own.device == device, own.expires_ms < before_ms)
    conn.execute(certificate_issues.delete().where(certificate_issues.c.fingerprint.in_(old)))
    conn.execute(device_certificates.delete().where(own.device == device, own.expires_ms < before_ms))


def trust_of_devices(conn: Connection) -> tuple[DeviceTrust, ...]:
    """For every welcome device with a certificate that was not revoked: its newest one, and what it was told with it.

    Who is in quarantine may not renew, and so can follow no change: it must not hold one up.
    """
    own, issues = device_certificates.c, certificate_issues.c
    query = (
        sa.select(own.device, own.expires_ms, own.authority, issues.told)
        .outerjoin_from(device_certificates, certificate_issues, own.fingerprint == issues.fingerprint)
        .join(devices, devices.c.id == own.device)
        .where(own.revoked_ms.is_(None), devices.c.standing == Standing.GOOD.value)
        .order_by(own.device, own.issued_ms, own.expires_ms)
    )
    newest = {
        row.device: DeviceTrust(
            device=DeviceId(row.device),
            expires_ms=row.expires_ms,
            issuer=row.authority,
            told=frozenset((row.told or "").split()),
        )
        for row in conn.execute(query)
    }
    return tuple(newest.values())
