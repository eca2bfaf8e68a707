"""Renewal: a certificate at hand is traded for one with a new key. Part of the devices room; others ask the desk.

Rules:
1. No certificate is shown to TLS for this, so that an expired one may be renewed and can do nothing else. What proves
   the device is a signature of the certificate's key over the request (`shared/renewal.py`), checked before the
   database is asked anything.
2. The hub's clock decides. The name is the certificate's, never the request's.
3. The same request with the same certificate is answered with the same new certificate, so that a lost answer costs
   nothing; a device has at most `MAX_LIVE` good certificates; what expired beyond use is forgotten.
4. Once a new certificate has been used, the one that it was traded for gets nothing but that same answer: its key would
   otherwise be worth a renewal for a year, and eight of them shut the device out.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final

from sqlalchemy.engine import Connection

from cloud_hub.devices import certificate_tables, rules, sightings
from cloud_hub.devices.certificate_tables import Issue
from cloud_hub.ground import audit
from cloud_hub.ground.authorities import Authorities
from cloud_hub.ground.ca import DeviceCertificate, ShownCertificate, check_csr, is_proof, read_certificate
from cloud_hub.ground.database import Database
from cloud_hub.ground.rates import Buckets
from cloud_hub.ground.refusals import NotAllowed, Throttled
from shared.clock import Clock
from shared.errors import InvalidValue
from shared.ids import DeviceId
from shared.renewal import REFUSED_FOR_GOOD, csr_digest, proof_message

MAX_LIVE: Final = 8
DAY_MS: Final = 24 * 3600 * 1000
_BURST: Final = 12
_PER_MINUTE: Final = 2
_TOO_MANY_S: Final = 3600


@dataclass(frozen=True, slots=True)
class RenewalRequest:
    """What a device sends: the certificate at hand, a request for the new key, the old key's signature in Base64."""

    certificate_pem: str
    csr_pem: str
    proof: str


class Renewing:
    """The part of the devices room that renews.

    Args:
        database, clock, authorities: the hub's.
        certificate_days: how long a new certificate lives.
        expired_days: how long after its end one may still be renewed; 0 for not at all.
    """

    def __init__(
        self,
        *,
        database: Database,
        clock: Clock,
        authorities: Authorities,
        certificate_days: float,
        expired_days: float,
    ) -> None:
        self._database = database
        self._clock = clock
        self._authorities = authorities
        self._certificate_days = certificate_days
        self._expired_ms = int(expired_days * DAY_MS)
        self._rate = Buckets(burst=_BURST, per_minute=_PER_MINUTE)

    async def renew(self, request: RenewalRequest, *, address: str) -> tuple[DeviceId, DeviceCertificate]:
        """A new certificate for the device of this one.

        Raises:
            InvalidValue: the request is not usable, or for the key that the device has already.
            NotAllowed: nothing proves it, or the certificate may not be renewed.
            Throttled: too often.
            ConfigError: the hub's clock is doubted.
        """
        shown = self._prove(request)
        wait_s = self._rate.take(shown.name, now_ms=self._clock.mono_ms())
        if wait_s:
            raise Throttled("this device renews too often", retry_after_s=wait_s, hint="wait and try again")
        try:
            return await self._database.write(lambda conn: self._renew(conn, shown, request, address=address))
        except NotAllowed as error:
            await self._note_refusal(shown, error, address=address)
            raise

    def _prove(self, request: RenewalRequest) -> ShownCertificate:
        new_key = check_csr(request.csr_pem)
        der = read_certificate(request.certificate_pem)
        shown = None if der is None else self._authorities.examine(der)
        if shown is None:
            raise NotAllowed(
                "the certificate is not of this hub",
                code="renew.unknown_certificate",
                hint="enrol the device again with a new join token",
            )
        try:
            signature = base64.b64decode(request.proof, validate=True)
        except (ValueError, binascii.Error) as error:
            raise InvalidValue("the proof is not Base64", code="renew.proof") from error
        message = proof_message(
            device=DeviceId(shown.name), csr_sha256=csr_digest(request.csr_pem), ca_fingerprint=shown.issuer
        )
        if not is_proof(shown.key, signature=signature, message=message):
            raise NotAllowed(
                "the request is not signed by the certificate's key",
                code="renew.proof",
                hint="sign it with the key of the certificate that is sent along",
            )
        if new_key == shown.key:
            raise InvalidValue("the request is for the old key", code="renew.same_key", hint="make a new key")
        return shown

    def _renew(
        self, conn: Connection, shown: ShownCertificate, request: RenewalRequest, *, address: str
    ) -> tuple[DeviceId, DeviceCertificate]:
        now_ms = self._clock.wall_ms()
        # First: by a clock that is wrong for a moment this could be refused for good.
        self._authorities.require_time(now_ms)
        sightings.note(conn, shown, at_ms=now_ms)
        device = rules.check_renewal(
            certificate_tables.standing(conn, shown.fingerprint),
            name=shown.name,
            ends_ms=shown.ends_ms,
            expired_ms=self._expired_ms,
            now_ms=now_ms,
        )
        digest = csr_digest(request.csr_pem)
        certificate = certificate_tables.answered(conn, csr_sha256=digest, renews=shown.fingerprint, now_ms=now_ms)
        is_repeated = certificate is not None
        if certificate is None:
            if certificate_tables.has_used_successor(conn, shown.fingerprint):
                raise rules.superseded()
            if certificate_tables.live_count(conn, device, now_ms=now_ms) >= MAX_LIVE:
                raise Throttled(
                    f"{device} has {MAX_LIVE} certificates that are good",
                    retry_after_s=_TOO_MANY_S,
                    hint="look at `outrider audit` for who renews it",
                )
            certificate_tables.forget_old(conn, device, before_ms=now_ms - self._expired_ms - DAY_MS)
            certificate = self._authorities.issue_device(
                request.csr_pem, device=device, now_ms=now_ms, days=self._certificate_days
            )
            issue = Issue(
                told=self._authorities.fingerprints,
                csr_sha256=digest,
                renews=shown.fingerprint,
            )
            certificate_tables.record_issued(conn, device, certificate, issue=issue, at_ms=now_ms)
        audit.record(
            conn,
            at_ms=now_ms,
            actor=f"device:{device}",
            action="certificate.renewal_repeated" if is_repeated else "certificate.renewed",
            subject=f"device:{device}",
            detail={
                "address": address,
                "certificate": certificate.fingerprint,
                "renews": shown.fingerprint,
                "had_expired": now_ms >= shown.ends_ms,
            },
        )
        return device, certificate

    async def _note_refusal(self, shown: ShownCertificate, error: NotAllowed, *, address: str) -> None:
        # Somebody holds the key of a certificate that is good for nothing any more: worth a look.
        if error.code not in REFUSED_FOR_GOOD:
            return
        now_ms = self._clock.wall_ms()

        def work(conn: Connection) -> None:
            sightings.note(conn, shown, at_ms=now_ms)
            audit.record(
                conn,
                at_ms=now_ms,
                actor=f"address:{address[:64]}",
                action="certificate.renewal_refused",
                subject=f"device:{shown.name[:63]}",
                detail={"code": error.code, "certificate": shown.fingerprint},
            )

        await self._database.write(work)
