"""One small question to the hub over HTTPS, blocking: for commands and short-lived children, never for the daemon.

Nothing is redirected or sent through a proxy; each wait has a deadline and the answer a bound.
"""

from __future__ import annotations

import http.client
import ssl
from typing import Final

import msgspec

from edge_agent.adapters.tls import WrongDates, dated_trust
from edge_agent.core.trusted_time import WRONG_DATES
from edge_agent.identity import check_hub_url
from shared.errors import OutriderError, ProtocolViolation, TransferRefused, TrustError, Unreachable
from shared.limits import KIB, MAX_ROOT_BYTES

TIMEOUT_S: Final = 15.0
MAX_ANSWER_BYTES: Final = MAX_ROOT_BYTES + 64 * KIB
_NOT_SENT: Final = "check the address, the network and that `outrider-hub serve` is running"


class _Problem(msgspec.Struct, frozen=True):
    detail: str = ""
    code: str = ""
    hint: str = ""


def trusting(ca_pem: str, *, now_ms: int) -> ssl.SSLContext:
    """TLS that trusts these CAs only and shows no certificate of ours; dates are judged by `now_ms`.

    Raises TrustError when the CAs do not parse.
    """
    try:
        return dated_trust(ca_pem, now_ms=lambda: now_ms)
    except ValueError as error:
        raise TrustError(f"the hub's CA does not parse: {error}", code="trust.ca", hint="enrol again") from error


def blind() -> ssl.SSLContext:
    """TLS that trusts anybody: only to fetch what is checked by itself, and never to send a secret."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def fetch_ca(hub_url: str, *, unsent: str = _NOT_SENT) -> str:
    """What the hub at this address says of its CAs, PEM; nobody vouches for it.

    Raises:
        Unreachable: nobody answers.
        TransferRefused: it is no hub.
        ProtocolViolation: what it sent is no text.
    """
    status, body = exchange(hub_url, blind(), method="GET", path="/v1/ca", body=None, unsent=unsent)
    if status != 200:
        raise TransferRefused(
            f"{hub_url} answered {status} to the question for its CA", hint="check that this is an Outrider hub"
        )
    try:
        return body.decode("ascii")
    except UnicodeDecodeError as error:
        raise ProtocolViolation(f"{hub_url} sent no certificate as its CA", code="protocol.ca") from error


def exchange(
    hub_url: str,
    context: ssl.SSLContext,
    *,
    method: str,
    path: str,
    body: bytes | None,
    unsent: str = _NOT_SENT,
    lost: str = "",
) -> tuple[int, bytes]:
    """Status and body of the answer.

    Args:
        hub_url: `https://host[:port]`.
        context: whom to trust.
        method, path, body: the question; a body is JSON.
        unsent: what to try when the question was not even sent.
        lost: what to try when it was sent and no answer came.

    Raises:
        TrustError: `trust.hub_certificate`, whoever answers has no certificate of a CA that is trusted.
        TransferRefused: `transfer.certificate_dates`, it has one that is not valid now.
        Unreachable: nobody answers, or not in time.
        ProtocolViolation: the answer is too large.
    """
    host, port = check_hub_url(hub_url)
    connection = http.client.HTTPSConnection(host, port, context=context, timeout=TIMEOUT_S)
    was_sent = False
    try:
        connection.connect()
        was_sent = method == "POST"
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body=body, headers=headers)
        with connection.getresponse() as response:
            status, data = response.status, response.read(MAX_ANSWER_BYTES + 1)
    except WrongDates as error:
        raise TransferRefused(
            f"the certificate of the hub at {hub_url} is not valid now: {error.verify_message}",
            code=WRONG_DATES,
            hint="check this machine's clock; if it is right, restart the hub, which renews its certificates",
        ) from error
    except ssl.SSLCertVerificationError as error:
        raise TrustError(
            f"the hub at {hub_url} does not hold a certificate of its own CA for {host}: {error.verify_message}",
            code="trust.hub_certificate",
            hint="use the name or address that the hub was set up with, and check this machine's clock",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(
            f"the hub at {hub_url} cannot be reached: {str(error) or type(error).__name__}",
            hint=lost if was_sent and lost else unsent,
        ) from error
    finally:
        connection.close()
    if len(data) > MAX_ANSWER_BYTES:
        raise ProtocolViolation(f"the hub's answer exceeds {MAX_ANSWER_BYTES} bytes", code="protocol.too_large")
    return status, data


def refusal(hub_url: str, status: int, data: bytes, *, hint: str) -> OutriderError:
    """The error that an answer other than the expected stands for; `hint` where the hub gives none."""
    try:
        problem = msgspec.json.decode(data, type=_Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        problem = _Problem()
    message = f"the hub at {hub_url} refused: {problem.detail or f'HTTP {status}'}"
    if status == 429 or status >= 500:
        return Unreachable(message, code=problem.code or None, hint=problem.hint or "try again later")
    return TransferRefused(message, code=problem.code or None, hint=problem.hint or hint)
