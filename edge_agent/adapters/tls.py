"""TLS to the hub and to its broker, dated by trusted time instead of by the system clock.

Rules of this file:
1. OpenSSL's own date check is off (`X509_V_FLAG_NO_CHECK_TIME`): it knows only the system clock, which may say 1970.
   In its place the server certificate's dates are held against the trusted time when the handshake is done, before a
   byte of ours is sent; chain, purpose and host name are OpenSSL's affair as ever. Whoever connects calls
   `do_handshake`, which is where this happens: http.client does it in `connect`, paho right after wrapping.
2. Only the question for the time itself goes without dates (`undated_…`): its answer is signed. It shows no
   client certificate, which might have expired, and carries nothing secret.
3. Only the hub's own CAs are trusted: one, or two during a change. The dates of the one that signed count too.

Not here: what the time is (edge_agent/core/trusted_time.py).
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from edge_agent.core.trusted_time import WRONG_DATES
from shared.errors import TransferRefused

NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME (OpenSSL, x509_vfy.h), which the ssl module has no name for."""


class WrongDates(ssl.SSLCertVerificationError):
    """A certificate that is the server's, but not at this time; `verify_message` says so in words."""

    def __init__(self, why: str) -> None:
        super().__init__(1, why)
        self.verify_message = why


class DatedContext(ssl.SSLContext):
    """A client context that carries the time: `now_ms` tells it, from any thread."""

    now_ms: Callable[[], int]


class DatedSocket(ssl.SSLSocket):
    """A TLS socket whose handshake ends with the dates of the server's certificate. A failed one is closed."""

    def do_handshake(self, block: bool = False) -> None:
        """Raises WrongDates, or what the handshake raises."""
        super().do_handshake(block)
        try:
            context = self.context
            assert isinstance(context, DatedContext)
            now_ms, certificate = context.now_ms(), self.getpeercert() or {}
            check_dates(certificate, now_ms=now_ms)
            check_issuer(certificate, context.get_ca_certs(), now_ms=now_ms)
        except BaseException:
            self.close()
            raise


def dated_context(
    ca_path: Path,
    *,
    now_ms: Callable[[], int],
    certificate_path: Path | None = None,
    key_path: Path | None = None,
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
    sockets: type[DatedSocket] = DatedSocket,
) -> ssl.SSLContext:
    """A context that trusts this CA only, shows the device's certificate, and judges dates by `now_ms`.

    Args:
        ca_path: the hub's CA.
        now_ms: the trusted time.
        certificate_path, key_path: the device's own; None shows none.
        minimum: the oldest TLS version.
        sockets: what it wraps connections in.

    Raises:
        TransferRefused: `transfer.identity`, the files cannot be used.
    """
    context = DatedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.now_ms = now_ms
    context.sslsocket_class = sockets
    return _furnished(context, ca_path, certificate_path=certificate_path, key_path=key_path, minimum=minimum)


def dated_trust(ca_pem: str, *, now_ms: Callable[[], int]) -> ssl.SSLContext:
    """The same for CAs at hand, PEM, showing no certificate of ours; raises ValueError when they do not parse."""
    context = DatedContext(ssl.PROTOCOL_TLS_CLIENT)
    context.now_ms = now_ms
    context.sslsocket_class = DatedSocket
    return _trusting(context, ca_pem)


def undated_context(ca_path: Path) -> ssl.SSLContext:
    """A context for the question for the time, and for nothing else; raises TransferRefused."""
    return _furnished(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ca_path)


def undated_trust(ca_pem: str) -> ssl.SSLContext:
    """The same for CAs at hand, PEM; raises ValueError when they do not parse."""
    return _trusting(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ca_pem)


def check_dates(certificate: Mapping[str, Any], *, now_ms: int) -> None:
    """Raise WrongDates unless this certificate (as `getpeercert` gives it) is valid at this time."""
    try:
        first_s = ssl.cert_time_to_seconds(certificate["notBefore"])
        last_s = ssl.cert_time_to_seconds(certificate["notAfter"])
    except (KeyError, ValueError, TypeError) as error:
        raise WrongDates("its dates cannot be read") from error
    if now_ms < first_s * 1000:
        raise WrongDates(f"it is not valid before {certificate['notBefore']}")
    if now_ms > last_s * 1000:
        raise WrongDates(f"it expired on {certificate['notAfter']}")


def check_issuer(certificate: Mapping[str, Any], trusted: Sequence[Mapping[str, Any]], *, now_ms: int) -> None:
    """Raise WrongDates unless a CA by the name of the one that signed this is valid at this time."""
    for authority in trusted:
        if authority.get("subject") == certificate.get("issuer"):
            with contextlib.suppress(WrongDates):
                check_dates(authority, now_ms=now_ms)
                return
    raise WrongDates("the CA that signed it is not valid at this time")


def refused_certificate(who: str, error: ssl.SSLCertVerificationError, *, code: str) -> TransferRefused:
    """What to raise for a server certificate that was refused; `code` is for all reasons but its dates."""
    if isinstance(error, WrongDates):
        return TransferRefused(
            f"the certificate of {who} is not valid now: {error.verify_message}",
            code=WRONG_DATES,
            hint="`outrider-agent doctor` tells this device's time and what it rests on; if that is right, restart the "
            "hub, which renews its certificates",
        )
    return TransferRefused(
        f"the certificate of {who} is not the hub's: {error.verify_message}",
        code=code,
        hint="check the hub's address; enrol again if the hub was set up anew",
    )


def _trusting(context: ssl.SSLContext, ca_pem: str) -> ssl.SSLContext:
    _relax(context, ssl.TLSVersion.TLSv1_2)
    try:
        context.load_verify_locations(cadata=ca_pem)
    except ssl.SSLError as error:
        raise ValueError(str(error)) from error
    return context


def _furnished(
    context: ssl.SSLContext,
    ca_path: Path,
    *,
    certificate_path: Path | None = None,
    key_path: Path | None = None,
    minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
) -> ssl.SSLContext:
    _relax(context, minimum)
    try:
        context.load_verify_locations(cafile=ca_path)
        if certificate_path is not None:
            context.load_cert_chain(certificate_path, key_path)
    except (OSError, ssl.SSLError) as error:
        raise TransferRefused(
            f"the certificates beside {ca_path} cannot be used: {error}",
            code="transfer.identity",
            hint="run `outrider-agent doctor`",
        ) from error
    return context


def _relax(context: ssl.SSLContext, minimum: ssl.TLSVersion) -> None:
    context.minimum_version = minimum
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | NO_CHECK_TIME)
