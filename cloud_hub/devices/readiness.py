"""How far the fleet has followed a change of the CA. Part of the devices room; others ask the desk."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.engine import Connection

from cloud_hub.devices import certificate_tables, rules
from shared.ids import DeviceId


@dataclass(frozen=True, slots=True)
class Readiness:
    """How far a fleet has followed a change of the CA.

    Attributes:
        live: devices with a certificate that is good now.
        asleep: devices whose newest certificate has expired, which may still come back to renew it.
        untold: live ones that were not told of the CA yet.
        unsigned: live ones whose certificate is not of the CA.
    """

    live: int
    asleep: int
    untold: tuple[DeviceId, ...]
    unsigned: tuple[DeviceId, ...]


def readiness(conn: Connection, *, ca_fingerprint: str, now_ms: int) -> Readiness:
    """How far the fleet has followed a change to this CA, in the caller's transaction."""
    trust = certificate_tables.trust_of_devices(conn)
    live = sum(each.expires_ms > now_ms for each in trust)
    return Readiness(
        live=live,
        asleep=len(trust) - live,
        untold=rules.without_bundle(trust, wanted=ca_fingerprint, now_ms=now_ms),
        unsigned=rules.not_of(trust, issuer=ca_fingerprint, now_ms=now_ms),
    )
