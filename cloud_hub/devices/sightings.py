"""A certificate that a device shows, held against what is kept of it. Part of the devices room; others ask the desk.

The broker lets in what the CA signed and no list names; the hub knows each certificate besides. A database that was
restored from a backup has forgotten those of after it: the devices that have them are as good as before, and are taken
up again when they show them. Nobody but the hub signs such certificates.

When a certificate is used for the first time is noted, because then its device has it: the one before is not renewed
any more (`Renewing`). A certificate of a hub that kept no serials is completed by the way, so that it can be put onto a
revocation list; that of a revoked device too.

Functions take a connection inside the caller's transaction; none of them begins or commits.
"""

from __future__ import annotations

from sqlalchemy.engine import Connection

from cloud_hub.devices import certificate_tables, rules, tables
from cloud_hub.devices.tables import Owner
from cloud_hub.ground import audit
from cloud_hub.ground.ca import ShownCertificate


def is_due(conn: Connection, shown: ShownCertificate) -> bool:
    """Whether `note` has anything to note: asked first, so that a look costs no write."""
    owner = tables.certificate_owner(conn, shown.fingerprint)
    return _is_adoptable(conn, shown) if owner is None else not owner.is_noted


def note(conn: Connection, shown: ShownCertificate, *, at_ms: int) -> Owner | None:
    """Note that a certificate was used, and its serial; take it up first if the database has lost it.

    Returns:
        Whose it is; None when it is nobody's.
    """
    owner = tables.certificate_owner(conn, shown.fingerprint)
    if owner is None and _is_adoptable(conn, shown):
        certificate_tables.record_adopted(conn, shown)
        audit.record(
            conn,
            at_ms=at_ms,
            actor=f"device:{shown.name}",
            action="certificate.adopted",
            subject=f"device:{shown.name}",
            detail={"certificate": shown.fingerprint, "begins_ms": shown.begins_ms},
        )
        owner = tables.certificate_owner(conn, shown.fingerprint)
    if owner is not None and not owner.is_noted:
        certificate_tables.record_use(conn, shown, at_ms=at_ms)
    return owner


def _is_adoptable(conn: Connection, shown: ShownCertificate) -> bool:
    known = certificate_tables.known(conn, shown.name)
    return shown.is_of_device and rules.is_adoptable(known, begins_ms=shown.begins_ms)
